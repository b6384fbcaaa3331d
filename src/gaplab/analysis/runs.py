"""Runs read back, from their folders or from MLflow, as one kind of record."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gaplab import config as configs
from gaplab.errors import UserError
from gaplab.files import check_yaml, plain, read_json, read_text
from gaplab.finder import find_run, find_sweep
from gaplab.provenance import Tags, attempts
from gaplab.sweep import listed_jobs
from gaplab.tracking.journal import LARGEST, read_journal, read_receipt

ENDED = ("FINISHED", "FAILED", "KILLED")
CLEANED = ("gap/acc", "train/acc", "gap/loss", "train/loss")  # under label noise, each has a `_clean` beside it


@dataclass
class Run:
    """One run.

    `settings` are the leaves of its config as text, without what does not decide the numbers; `metrics` the last values
    by their MLflow names, and `history` those of every step: {name: {step: value}}; `batchnorm` how it was computed on
    several devices; `attempts` the tags of each start that its numbers come from; `sizes` the images of each split;
    `params` the network's parameters, 0 where that is not known.
    """

    name: str
    seed: int
    status: str
    settings: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    history: dict[str, dict[int, float]] = field(default_factory=dict)
    diverged: bool = False
    error: str | None = None
    run_id: str | None = None
    claim: str | None = None
    sweep: str = ""
    batchnorm: str = ""
    digest: str = ""
    classes: int = 0
    attempts: Sequence[Tags] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    root: str = ""
    params: int = 0

    @property
    def noisy(self) -> bool:
        """Whether some of its training labels were replaced."""
        return self.settings.get("data.label_noise", "0.0") not in ("0", "0.0")

    def curve(self, metric: str) -> dict[int, float]:
        """{step: value} of a metric, its train split counted against the true labels; empty where it is not known."""
        return self.history.get(f"{metric}_clean" if self.noisy and metric in CLEANED else metric, {})


@dataclass
class Collection:
    """Runs to be reported on together.

    Attributes:
        title: for people.
        folder: of the sweep if it is one and lies here.
        sources: folders of the sweeps that lie here.
        commands: that made the runs.
        notes: what was left out, a sentence each.
    """

    title: str
    runs: list[Run]
    folder: Path | None = None
    sources: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(outputs: Path, uri: str, sweeps: list[str], picked: list[str]) -> Collection:
    """The runs of some sweeps, or a hand-picked set.

    Args:
        outputs: folder of runs and sweeps.
        uri: of the tracking store, for what is given by an id.
        sweeps: each `latest`, a folder, a folder's name, or the id of a parent run in MLflow.
        picked: run folders or MLflow run ids; if there are any, `sweeps` is not looked at.

    Raises UserError.
    """
    if picked:
        found = Collection(f"{len(picked)} picked runs", [])
        folders = [None if configs.is_run_id(name) else find_run(outputs, name, "runs") for name in picked]
        ids = [name for name, folder in zip(picked, folders, strict=True) if folder is None]
        stored = _stored(uri, ids, found.notes) if ids else {}
        for name, folder in zip(picked, folders, strict=True):
            if folder is not None:
                found.runs.append(read_run(folder))
            elif name in stored:
                found.runs.append(stored[name])
        return found
    parts = [_sweep(outputs, uri, name) for name in sweeps]
    if len(parts) == 1:
        return parts[0]
    return Collection(
        " and ".join(part.title for part in parts),
        [run for part in parts for run in part.runs],
        sources=[source for part in parts for source in part.sources],
        commands=[command for part in parts for command in part.commands],
        notes=[note for part in parts for note in part.notes],
    )


def _sweep(outputs: Path, uri: str, name: str) -> Collection:
    if configs.is_run_id(name):
        from gaplab.tracking.store import read_children

        parent, overrides, children, deleted = read_children(uri, name)
        notes = [f"{deleted} of its runs are deleted in MLflow"] if deleted else []
        commands = [_command(overrides)] if overrides else []
        return Collection(plain(parent), _from_mlflow(children, notes), commands=commands, notes=notes)
    folder = find_sweep(outputs, name, "sweep")
    typed = read_json(folder / "sweep.json").get("overrides")
    commands = [_command(shlex.join(map(str, typed)))] if isinstance(typed, list) else []
    found = Collection(folder.name, [], folder, [plain(folder)], commands)
    for job, _ in listed_jobs(folder):
        if not (folder / job).is_dir():
            found.notes.append(f"the folder of job {job} is gone")
            continue
        try:
            found.runs.append(read_run(folder / job))
        except UserError as error:
            found.notes.append(f"left out, unreadable: {error}")
    return found


def _command(overrides: str) -> str:
    return plain(f"python src/train.py -m {overrides}")


def read_run(folder: Path) -> Run:
    """A run from its folder; one that has not begun has the status WAITING. Raises UserError."""
    settings: dict[str, Any] = {}
    history: dict[str, dict[int, float]] = {}
    tags: dict[str, Any] = {}
    dataset: dict[str, Any] = {}
    end = "RUNNING"
    events = list(read_journal(folder))
    for event in events:
        if event["event"] in ("run", "finish"):
            end = str(event.get("status", "RUNNING"))
        elif event["event"] == "params":
            settings = event["values"]
        elif event["event"] == "tags":
            tags |= event["values"]
        elif event["event"] == "dataset":
            dataset = {"digest": event["digest"], "profile": event["profile"], "root": event.get("source")}
        elif event["event"] == "metrics":
            for name, value in event["values"].items():  # what a later attempt measured again stands
                history.setdefault(name, {})[event["step"]] = value
    result, receipt = read_json(folder / "result.json"), read_receipt(folder)
    status = str(result.get("status", "WAITING"))
    return _run(
        str(folder),
        {
            "run_id": receipt.get("run_id") or result.get("run_id"),
            "name": folder.name,
            "status": status if status in ENDED or not history else end,
            "params": settings or _settings_of_file(folder / "config.yaml"),
            "tags": {name: tags.get(name) for name in ("sweep", "batchnorm")}
            | {name: result.get(name) for name in ("diverged", "error", "params")},
            "metrics": {name: values[max(values)] for name, values in history.items()},
            "history": history,
            "attempts": attempts(events),
            **dataset,
        },
    )


def _settings_of_file(path: Path) -> dict[str, Any]:
    text = read_text(path)
    check_yaml(text, str(path), resolved=True)
    try:
        raw = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        raw.pop("defaults")
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{plain(path)}: not a config that gaplab wrote") from None
    return configs.flatten(raw)


def _run(origin: str, found: dict[str, Any]) -> Run:
    """A record of what was found, as `tracking.store` gives it. Raises UserError.

    Text in it says nothing to a terminal. A number that is not finite, or too large to reckon with, is not measured.
    """
    profile = found.get("profile")
    profile = profile if isinstance(profile, dict) else {}
    sizes = {name: size for name, size in profile.items() if type(size) is int and size >= 0}
    params = {plain(name): plain(value) for name, value in found["params"].items()}
    tags = {name: plain(value) for name, value in found["tags"].items() if value is not None}
    seed = params.get("seed", "")
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 10):
        raise UserError(f"{plain(origin)}: its seed is no number")
    return Run(
        name=tags.get("job", plain(found["name"])),
        seed=int(seed),
        status=plain(found["status"]),
        settings=_deciding(params),
        metrics=_measured(found["metrics"]),
        history={plain(name): _measured(values) for name, values in found["history"].items()},
        diverged=tags.get("diverged", "").lower() == "true",
        error=tags.get("error"),
        run_id=None if found["run_id"] is None else plain(found["run_id"]),
        claim=_claim(params),
        sweep=tags.get("sweep", ""),
        batchnorm=tags.get("batchnorm", ""),
        attempts=found.get("attempts", [found["tags"]]),
        digest=plain(found.get("digest", "")),
        classes=sizes.pop("classes", 0),
        sizes=sizes,
        root=plain(found.get("root") or ""),
        params=int(parameters) if (parameters := tags.get("params", "")).isdecimal() and len(parameters) < 16 else 0,
    )


def _measured(values: dict[Any, float]) -> dict[Any, float]:
    """Without the gaps in percentage points that MLflow alone has, for its pages."""
    return {
        plain(name) if isinstance(name, str) else name: one
        for name, one in values.items()
        if abs(one) <= LARGEST and not str(name).endswith("_pp")
    }


def _claim(settings: dict[str, str]) -> str | None:
    claim = settings.get("sweep.claim", "None")
    return None if claim == "None" else claim


def _deciding(settings: dict[str, str]) -> dict[str, str]:
    """Without the seed, and what does not decide the numbers; booleans as people type them."""
    words = {"True": "true", "False": "false", "None": "null"}
    return {
        name: words.get(value, value) for name, value in settings.items() if name != "seed" and configs.decides(name)
    }


def _stored(uri: str, ids: Iterable[str], notes: list[str]) -> dict[str, Run]:
    from gaplab.tracking.store import read_runs

    runs, missing = read_runs(uri, list(ids))
    notes += [f"run {one}: {why}" for one, why in missing.items()]
    return {str(run.run_id): run for run in _from_mlflow(runs, notes)}


def _from_mlflow(stored: Iterable[dict[str, Any]], notes: list[str]) -> list[Run]:
    runs = []
    for one in stored:
        try:
            runs.append(_run(f"run {one['run_id']} in MLflow", one))
        except UserError as error:
            notes.append(f"left out, unreadable: {error}")
    return runs


def tidy(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    """A row for each run: what it is, its settings that vary, its metrics."""
    runs = list(runs)
    names = sorted({name for run in runs for name in run.settings})
    varied = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    metrics = sorted({name for run in runs for name in run.metrics if not name.startswith("act/")})
    several = len({run.sweep for run in runs}) > 1
    for run in runs:
        row: dict[str, Any] = {"sweep": run.sweep} if several else {}
        row |= {"run": run.name, "seed": run.seed, "status": run.status, "diverged": run.diverged}
        row |= {name: run.settings.get(name) for name in varied}
        row |= {name: run.metrics.get(name) for name in metrics}
        yield row
