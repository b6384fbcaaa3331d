"""Which version of the model is champion: the gate that decides, and `python src/promote.py` for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape

from gaplab import config as configs
from gaplab import launch
from gaplab.config import Config, Gate, MLflow, Promote
from gaplab.errors import UserError
from gaplab.files import locked, plain
from gaplab.machine import command
from gaplab.metrics import Gap, gap_change
from gaplab.notes import without_noise
from gaplab.terminal import Table
from gaplab.tracking.registry import Registry, Version

if TYPE_CHECKING:
    from gaplab.evaluation import Paired
    from gaplab.trained import Trained

SENDER_WAIT_S = 180  # the process that sends a run to MLflow may be logging its model just now


@dataclass
class Decision:
    """What the gate says of a candidate.

    Attributes:
        passed: whether it becomes champion.
        reasons: in words, one for each thing looked at.
        paired: both on the same samples, the champion first; None where there was nothing to compare with.
        gap: candidate's minus champion's.
    """

    passed: bool
    reasons: list[str]
    paired: "Paired | None" = None
    gap: Gap | None = None
    against: int | None = None
    by_hand: bool = False

    @property
    def word(self) -> str:
        return "by hand" if self.by_hand else "passed" if self.passed else "not passed"

    def tags(self) -> dict[str, str]:
        """The decision and its figures, for the version."""
        found = {"gate": self.word, "gate.reason": "; ".join(self.reasons), "gate.rolled_back": "false"}
        if self.against is not None:
            found["gate.against"] = str(self.against)
        if self.paired is not None:
            found |= {
                "gate.samples": str(self.paired.total),
                "gate.acc": f"{self.paired.second_acc:.6f}",
                "gate.acc_champion": f"{self.paired.first_acc:.6f}",
                "gate.acc_change": f"{self.paired.difference:+.6f}",
                "gate.acc_change_low": f"{self.paired.low:+.6f}",
                "gate.acc_change_high": f"{self.paired.high:+.6f}",
                "gate.mcnemar_p": f"{self.paired.p:.6g}",
            }
        if self.gap is not None:
            found |= {
                "gate.gap_change": f"{self.gap.acc:+.6f}",
                "gate.gap_change_low": f"{self.gap.low:+.6f}",
                "gate.gap_change_high": f"{self.gap.high:+.6f}",
            }
        return found


def decide(paired: "Paired", champion: Gap | None, candidate: Gap | None, gate: Gate, against: int) -> Decision:
    """Whether a candidate is not worse than the champion, and its gap not larger beyond the margin: both intervals
    must lie within the margins, and that of accuracy may not say that it is worse, however little.

    Args:
        paired: both on the same samples, the champion first.
        champion, candidate: their gaps; None where a model does not say.
        gate: the margins.
        against: the champion's version.
    """
    worse = paired.low <= -gate.max_acc_loss or paired.high < 0
    reasons = [f"accuracy {_pp(paired.difference)} [{_pp(paired.low)}, {_pp(paired.high)}] pp: "]
    if paired.high < 0:
        reasons[0] += "worse"
    else:
        reasons[0] += f"may be worse by {100 * gate.max_acc_loss:g} pp or more" if worse else "not worse"
    if champion is None or candidate is None:
        return Decision(False, [*reasons, "a gap was not measured"], paired, None, against)
    change = gap_change(champion, candidate)
    larger, margin = change.high >= gate.max_gap_increase, f"{100 * gate.max_gap_increase:g} pp"
    reasons.append(f"gap {_pp(change.acc)} [{_pp(change.low)}, {_pp(change.high)}] pp: ")
    if larger:
        reasons[1] += f"may be larger by {margin} or more"
    else:
        reasons[1] += f"larger by less than {margin}" if change.low > 0 else "not larger"
    return Decision(not worse and not larger, reasons, paired, change, against)


def promote(settings: Promote, typed: Sequence[str] = ()) -> None:
    """List the versions, register a run's model, judge a version, or roll back. Raises UserError."""
    assert isinstance(settings.tracking, MLflow)
    models = Registry(settings.tracking.uri, settings.tracking.registered_model)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    if settings.run is None and settings.version is None and not settings.rollback:
        _list(console, models, typed)
        return
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    with locked(outputs / ".promote.lock"):  # two at once would both be judged beside the same champion
        if settings.rollback:
            _roll_back(console, models)
        else:
            _promote(console, models, settings, typed)


def _roll_back(console: Console, models: Registry) -> None:
    _, missing = models.last_champion()
    before, now, problems = models.roll_back()
    for line in [missing] * bool(missing) + problems:
        console.print(line, markup=False, soft_wrap=True)
    no_longer = ""
    if before is not None:
        models.describe(before, {"gate.rolled_back": "true"})
        no_longer = f", version {before.number} no longer"
    console.print(f"{models.name}: version {now.number} is champion again{no_longer}")


def _promote(console: Console, models: Registry, settings: Promote, typed: Sequence[str]) -> None:
    if settings.run is not None:
        version = register(models, settings, typed)
    else:
        assert settings.version is not None
        version = models.version(settings.version)
    champion = models.champion()
    if champion is not None and champion.number == version.number:
        console.print(f"{models.name}: version {version.number} is champion already")
        return
    if settings.force:
        decision = Decision(True, ["made champion by hand"], by_hand=True)
    else:
        decision = _judge(models, version, settings, typed)
    if decision.passed:
        latest = models.champion()
        if (latest and latest.number) != (champion and champion.number):
            again = _command(typed, f"version={version.number}")
            raise UserError(f"another version has become champion meanwhile; judge this one once more: {again}")
    models.describe(version, decision.tags())
    if decision.passed:
        models.crown(version)
    _print(console, models, version, decision, _command(typed, f"version={version.number}", "force=true"))


def after_run(folder: Path, config: Config, typed: Sequence[str]) -> None:
    """Register the model of a run that has just finished, and let the gate decide. Raises UserError."""
    tracking = launch.tracking(folder, config)
    settings = Promote(
        run=str(folder),
        gate=config.gate,
        tracking=tracking,
        paths=config.paths,
        allowed_targets=config.allowed_targets,
    )
    try:
        promote(settings, typed)
    except UserError as error:
        raise UserError(f"the run is finished, its model is not registered: {error}") from error


def register(models: Registry, settings: Promote, typed: Sequence[str]) -> Version:
    """The version of a run's model, logged first if it has not been yet. Raises UserError."""
    from filelock import FileLock, Timeout

    from gaplab.trained import load_run

    assert settings.run is not None
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    run = load_run(settings.run, outputs, models.uri, typed)
    if run.run_id is None:
        send = command("sync", *configs.elsewhere(outputs))
        raise UserError(f"{plain(run.folder)}: the run is not in MLflow; {send} sends it if it was tracked")
    if run.folder is not None and (status := run.result.get("status")) != "FINISHED":
        raise UserError(
            f"{plain(run.folder)}: the run is {status or 'not finished'}; only finished ones are registered"
        )
    if run.folder is None:
        model_id = models.logged(run.run_id)
        if model_id is None:
            raise UserError(f"run={settings.run}: has logged no model, and its folder is not here")
    else:
        from gaplab import export

        try:
            with FileLock(run.folder / ".mlflow.lock", timeout=SENDER_WAIT_S):
                model_id = models.logged(run.run_id, export.weights_of(run.folder))
                if model_id is None:
                    model_id = export.log(run.folder, run.run_id, settings.allowed_targets, models.uri)
        except Timeout:
            raise UserError(f"{plain(run.folder)}: it is still being sent to MLflow; try again later") from None
    version = models.add(model_id, run.run_id, _description(run.config, run.name))
    best = run.result.get("best") or {}
    figures = {"test/acc": run.result.get("test_acc"), "gap/acc": best.get("gap_acc")}
    figures["gap/acc_clean"] = best.get("gap_acc_clean")
    known = {name: f"{value:.6f}" for name, value in figures.items() if isinstance(value, float)}
    models.describe(version, {"run": plain(run.name)} | known)
    return version


def _description(config: Config, name: str) -> str:
    model = config.model
    return (
        f"{plain(name)}: {model.name} on {plain(config.data.name)}, bn={str(model.bn).lower()}, "
        f"dropout={model.dropout:g}, init={model.init}, seed {config.seed}. The model card is extra_files/README.md."
    )


def _judge(models: Registry, version: Version, settings: Promote, typed: Sequence[str]) -> Decision:
    champion, missing = models.last_champion(version)
    if champion is None:
        if missing:
            none_left = "no former champion is left to compare with; force=true makes this version champion"
            return Decision(False, [f"{missing}; {none_left}"])
        return Decision(True, ["the first champion: there was none to compare with"])
    from gaplab.trained import load_model

    against = champion.number
    other = load_model(f"models:/{models.name}/{version.number}", models.uri, typed)
    try:
        one = load_model(f"models:/{models.name}/{against}", models.uri, typed)
    except UserError as error:
        by_hand, back = _command(typed, f"version={version.number}", "force=true"), _command(typed, "rollback=true")
        choice = f"{by_hand} makes this version champion, {back} an earlier one"
        raise UserError(f"the champion cannot be read: {error}; {choice}") from error
    decision = _compare(one, other, version, against, settings, models.uri)
    if missing:
        decision.reasons.insert(0, f"{missing}: compared with version {against}, the newest former champion")
    return decision


def _compare(one: "Trained", other: "Trained", version: Version, against: int, settings: Promote, uri: str) -> Decision:
    """The decision on `other`, of `version`, beside `one`, the champion."""
    from gaplab.data.datamodule import build_datamodule
    from gaplab.evaluation import compare, trained_on

    if one.in_shape != other.in_shape or one.classes != other.classes:
        return Decision(False, ["takes other pictures, or knows other classes, than the champion"], against=against)
    split, config = settings.gate.split, other.config.data
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    launch.check_root(config)
    data = build_datamodule(
        config,
        other.config.seed,
        allowed_targets=settings.allowed_targets,
        cache=outputs / "cache",
    )
    if data.splits["train"].source.digest() != other.digest:
        raise UserError(f"data.root={config.root}: not the data that version {version.number} was trained on")
    if split not in data.splits:
        raise UserError(f"gate.split={split}: {config.name} has no test part; gate.split=valid")
    total, unknown = len(data.splits[split].indices), []
    for who, network in ("champion", one), ("candidate", other):
        count = trained_on(network, data, split, outputs, uri)
        advice = "; gate.split=test, or both with the same seed" if split == "valid" else ""
        if count:
            reason = f"the {who} was trained on {count:,} of the {total:,} samples of this {split} split{advice}"
            return Decision(False, [reason], against=against)
        if count is None:
            unknown.append(f"not known whether the {who} was trained on samples of this {split} split{advice}")
    if unknown and split == "valid":
        return Decision(False, unknown, against=against)
    decision = decide(compare(one, other, data.batches(split)), _gap(one), _gap(other), settings.gate, against)
    decision.reasons += unknown
    return decision


def _gap(model: "Trained") -> Gap | None:
    best = without_noise(model.result.get("best") or {})
    values = [float(best[name]) for name in ("gap_acc", "gap_acc_low", "gap_acc_high") if name in best]
    return Gap(*values) if len(values) == 3 else None


def _list(console: Console, models: Registry, typed: Sequence[str]) -> None:
    versions = models.versions()
    if not versions:
        console.print(f"{models.name}: no version yet; {_command(typed, 'run=latest')} makes one", markup=False)
        return
    table = Table(title=escape(models.name), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("version", "is", "run", "test", "gap, pp", "gate", "why"):
        table.add_column(heading)
    for one in versions:
        tags = one.tags
        test, gap = map(_number, (tags.get("test/acc"), tags.get("gap/acc_clean", tags.get("gap/acc"))))
        back = ", rolled back" if tags.get("gate.rolled_back") == "true" else ""
        cells = (
            str(one.number),
            ", ".join(sorted(one.aliases)),
            tags.get("run", one.run_id),
            "" if test is None else f"{test:.4f}",
            "" if gap is None else _pp(gap),
            tags.get("gate", "not judged") + back,
            tags.get("gate.reason", ""),
        )
        table.add_row(*(escape(plain(cell)) for cell in cells))
    console.print(table)
    last, missing = models.last_champion()
    if missing:
        again = f"; {_command(typed, 'rollback=true')} makes version {last.number} champion" if last else ""
        console.print(f"no champion: {missing}{again}", markup=False, soft_wrap=True)


def _number(text: str | None) -> float | None:
    """Tags are anybody's."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _print(console: Console, models: Registry, version: Version, decision: Decision, by_hand: str) -> None:
    if decision.paired is not None:
        console.print(f"version {version.number} beside the champion, version {decision.against}")
    for reason in decision.reasons:
        console.print(f"  {reason}", markup=False)
    if decision.paired is not None:
        console.print(f"  McNemar p {decision.paired.p_shown} on {decision.paired.total:,} samples", markup=False)
    if decision.passed:
        console.print(f"{models.name}: version {version.number} is champion", markup=False)
    else:
        line = f"{models.name}: version {version.number} is challenger; by hand: {by_hand}"
        console.print(line, markup=False, soft_wrap=True)


def _command(typed: Sequence[str], *words: str) -> str:
    """`src/promote.py` with these words, for the registry that the words typed so far name."""
    kept = [
        configs.masked(word) for word in typed if word.startswith(("tracking", "paths.", "gate.", "allowed_targets="))
    ]
    return command("promote", *words, *kept)


def _pp(value: float) -> str:
    return f"{100 * value:+.2f}"
