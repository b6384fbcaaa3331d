"""A report: read, compare, judge, draw, write."""

import csv
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape

from gaplab import config as configs
from gaplab import notes, provenance, stats
from gaplab.analysis.claims import Verdict, judge
from gaplab.analysis.compare import CURVES, METRICS, Outcome, Section, sections
from gaplab.analysis.runs import Collection, Run, collect, tidy
from gaplab.errors import UserError
from gaplab.files import held, plain, write_whole
from gaplab.terminal import Table
from gaplab.tracking.journal import Tracker, read_journal

SHOWN_CONTRASTS = 16
LEGEND = (
    "difference [95 % interval over seeds]; real or equivalent (within {margins}) by tests that are corrected for the "
    "table; the verdict is on gap and validation accuracy together; p values: on the page"
)
COLOURS = {
    "supported": "blue", "contradicted": "magenta", "inconclusive": "yellow",
    "good": "green", "bad": "red", "plain": "blue", "open": "yellow",
}  # fmt: skip


def report(settings: configs.Report) -> Path:
    """Report on what `settings` name; the folder with `report.json`, `runs.csv`, the figures and `report.html`.

    Raises UserError when there is nothing to report on.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    tracking = settings.tracking
    uri = tracking.uri if isinstance(tracking, configs.MLflow) else ""
    found = collect(outputs, uri, configs.listed(settings.sweep), configs.listed(settings.runs))
    if not found.runs:
        raise UserError("; ".join([f"{found.title}: no run to report on", *found.notes]))
    metrics = _known_metrics(found, settings.metrics)
    parts = sections(found.runs, metrics, settings.margin)
    if len(parts) > 1:
        names = ", ".join(part.data for part in parts)
        found.notes.append(f"{len(parts)} data sets or splits ({names}): conditions are compared within each")
    if changed := provenance.difference([run.attempts for run in found.runs]):
        found.notes.append(changed)
    verdicts = _verdicts(found.runs, parts, settings)
    folder = _folder(found, settings, outputs)
    with _parent(found, uri) as tracker:  # its process imports MLflow while the figures are drawn
        content = _content(found, parts, verdicts, metrics, settings)
        for path in _write(folder, content, found.runs, parts):
            if tracker is not None:
                tracker.artifact(path, "report")
        if tracker is not None and found.folder is not None:
            tracker.tags({notes.NOTE: notes.joined(notes.found(content), _asked(found.folder))})
    _print(console, found, parts, verdicts, settings.margin)
    console.print(f"page      {folder / 'report.html'}", markup=False, soft_wrap=True)
    return folder


def _known_metrics(found: Collection, wanted: Sequence[str]) -> list[str]:
    known = sorted({name for run in found.runs for name in run.metrics if not name.startswith("act/")})
    if not known:
        lost = sum(run.status != "FINISHED" for run in found.runs)
        raise UserError(
            f"{found.title}: none of its {len(found.runs)} runs has measured anything ({lost} not finished)"
        )
    missing = [name for name in wanted if name not in known]
    for name in missing:
        hint = configs.did_you_mean(name, known)
        found.notes.append(f"no run has a metric {name}; {hint}known: {', '.join(known)}")
    chosen = [name for name in wanted if name in known]
    if {"gap/acc", "gap/acc_clean"} & {*chosen} and "valid/acc" in known:  # a smaller gap alone is no better network
        chosen = list(dict.fromkeys([*chosen, "valid/acc"]))
    if not chosen:
        raise UserError("; ".join(found.notes[-len(missing) :]))
    return chosen


def _verdicts(runs: list[Run], parts: list[Section], settings: configs.Report) -> list[Verdict]:
    """One for each claim and data set; of several sweeps at once, each claim is judged on its own runs."""
    found = []
    for claim in (
        [settings.claim] if settings.claim else [one for one in dict.fromkeys(run.claim for run in runs) if one]
    ):
        mine = parts
        if not settings.claim and any(run.claim != claim for run in runs):
            mine = sections([run for run in runs if run.claim == claim], [], settings.margin)
        for part in mine:
            found.append(judge(claim, part, settings.margin))
            if len(mine) > 1:
                found[-1].summary = f"{part.data}: {found[-1].summary}"
    return found


def _folder(found: Collection, settings: configs.Report, outputs: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = found.folder / "report" if found.folder else outputs / "reports" / f"{stamp}_{secrets.token_hex(3)}"
    folder = configs.folder("output", settings.output) if settings.output else folder
    if found.folder and folder.is_symlink() and not settings.output:
        raise UserError(f"{plain(folder)}: a link, to {plain(folder.resolve())}; name that with output=…, or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return folder


@contextmanager
def _parent(found: Collection, uri: str) -> Iterator[Tracker | None]:
    """The sweep's run in MLflow, to add to, or None; the sweep cannot be gone on with meanwhile.

    Of SQLite stores, only `uri` and one beside the sweeps are written to: the journal may be somebody else's.
    """
    with ExitStack() as stack:
        tracker = None
        if found.folder is not None:
            try:
                stack.enter_context(held(found.folder, "this sweep is running"))
                began = next((event["uri"] for event in read_journal(found.folder) if "uri" in event), uri)
                beside = f"sqlite:///{found.folder.parent.parent / 'mlflow.db'}"
                if began.startswith("sqlite:///") and began not in (uri, beside):
                    found.notes.append(f"not logged to MLflow: the sweep is in {plain(began)}; add tracking.uri=…")
                else:
                    tracker = Tracker.reopen(found.folder)
            except UserError:
                found.notes.append("the sweep is still running: this is its state now, and not logged to MLflow")
        if tracker is not None:
            stack.callback(tracker.close)
        yield tracker


def _asked(folder: Path) -> str:
    """What the sweep's description in MLflow says that it asks."""
    said = [event["values"].get(notes.NOTE) for event in read_journal(folder) if event["event"] == "tags"]
    return notes.asked_of(next((note for note in reversed(said) if isinstance(note, str)), ""))


def _content(
    found: Collection, parts: list[Section], verdicts: list[Verdict], metrics: list[str], settings: configs.Report
) -> dict[str, Any]:
    """What `report.json` holds."""
    counting = {id(run) for part in parts for run in part.runs}
    return {
        "title": found.title,
        "generated": datetime.now().astimezone().isoformat(timespec="seconds"),
        "claim": verdicts[0].claim if verdicts else None,
        "margin": settings.margin,
        "confidence": 0.95,
        "metrics": metrics,
        "sources": found.sources,
        "commands": found.commands,
        "notes": found.notes,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "sections": [_section(part) for part in parts],
        "runs": [
            {"run": run.name, "sweep": run.sweep, "run_id": run.run_id, "status": run.status, "error": run.error}
            | {"counts": id(run) in counting}
            for run in found.runs
        ],
    }


def _section(part: Section) -> dict[str, Any]:
    return {
        "data": part.data,
        "factors": part.factors,
        "facts": part.facts,
        "gap": part.gap,
        "notes": part.notes,
        "conditions": [
            {
                "label": one.label,
                "best": one is part.best,
                "seeds": sorted(run.seed for run in one.finished),
                "failed": one.failed,
                "diverged": one.diverged,
                "unfinished": one.unfinished,
                "estimates": {
                    metric: None if (estimate := one.estimate(metric)) is None else asdict(estimate)
                    for metric in dict.fromkeys([*METRICS, *part.contrasts])
                },
                "curves": {name: one.curve(name) for name in CURVES if one.curve(name)},
            }
            for one in part.conditions
        ],
        "contrasts": {
            metric: {family: [asdict(one) for one in contrasts] for family, contrasts in families.items()}
            for metric, families in part.contrasts.items()
        },
        "outcomes": {family: [asdict(one) for one in outcomes] for family, outcomes in part.outcomes.items()},
        "figures": [],
    }


def _write(folder: Path, content: dict[str, Any], runs: list[Run], parts: list[Section]) -> list[Path]:
    """Figures first, for the page shows them; all files of the report."""
    from gaplab.analysis.figures import drawings
    from gaplab.analysis.page import render
    from gaplab.figures import save_figure

    paths: dict[str, Path] = {}
    for index, (part, description) in enumerate(zip(parts, content["sections"], strict=True)):
        prefix = f"{configs.slug(part.data)}_{index}_" if len(parts) > 1 else ""
        for name, draw in drawings(part, list(part.contrasts)).items():
            path = folder / f"{prefix}{name}.png"
            if save_figure(draw, path):
                description["figures"].append(path.name)
                paths[path.name] = path
    rows = list(tidy(runs))
    (folder / "runs.csv").unlink(missing_ok=True)  # a link there would lead the table elsewhere
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    write_whole(folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "report.html", render(content, paths))
    return [folder / "report.json", folder / "runs.csv", folder / "report.html", *paths.values()]


def _print(console: Console, found: Collection, parts: list[Section], verdicts: list[Verdict], margin: float) -> None:
    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    console.print(f"[bold]{escape(found.title)}[/bold]  {len(found.runs)} runs", soft_wrap=True)
    for command in found.commands:
        say(command)
    for verdict in verdicts:
        colour = COLOURS[verdict.verdict]
        needed = f" ({verdict.seeds_needed} seeds would decide)" if verdict.seeds_needed else ""
        said = f"{verdict.verdict}[/]{needed}: {escape(verdict.summary)}"
        console.print(f"\n{verdict.question} [bold {colour}]{said}")
        for line in verdict.evidence:
            say(f"  {line}")
    for note in found.notes:
        say(f"note: {note}")
    for part in parts:
        say("\n" + "; ".join(f"{name} {text}" for name, text in part.facts.items()))
        for note in part.notes:
            say(f"note: {note}")
        console.print(_conditions(part))
        for family, outcomes in part.outcomes.items():
            if family == "effects" or len(part.factors) > 1:  # with one factor, both say the same
                console.print(_outcomes(part, family, outcomes[:SHOWN_CONTRASTS]))
                if len(outcomes) > SHOWN_CONTRASTS:
                    console.print(f"… and {len(outcomes) - SHOWN_CONTRASTS} more on the page\n")
    if any(part.outcomes for part in parts):
        say(LEGEND.format(margins=notes.margins(parts[0].contrasts, margin)) + "\n")


def _conditions(part: Section) -> Table:
    table = Table(title=f"{escape(part.data)}: last epoch, mean ± sd over seeds [95 % interval]", title_justify="left",
                  title_style="bold", box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("condition", overflow="fold")
    for heading in ("seeds", *part.contrasts):
        table.add_column(escape(heading), justify="right", overflow="fold")
    for one in part.conditions:
        label = escape(one.label) + (" [bold](highest valid/acc)[/]" if one is part.best else "")
        cells = [_estimate(metric, one.estimate(metric)) for metric in part.contrasts]
        table.add_row(label, str(len(one.finished)), *cells)
    return table


def _outcomes(part: Section, family: str, outcomes: list[Outcome]) -> Table:
    """A row for each contrast with its difference in every metric, and what the gap and valid accuracy say together."""
    what = "effects of the factors" if family == "effects" else f"against {part.conditions[0].label}"
    table = Table(title=escape(what), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("contrast", overflow="fold")
    for heading in ("seeds", *part.contrasts):
        table.add_column(escape(heading), justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for one in outcomes:
        contrasts = [one.contrasts.get(metric) for metric in part.contrasts]
        table.add_row(
            escape(one.name),
            str(min(contrast.n for contrast in one.contrasts.values())),
            *("–" if contrast is None else _contrast(metric, contrast)
              for metric, contrast in zip(part.contrasts, contrasts, strict=True)),
            f"[{COLOURS[one.tone]}]{one.verdict}[/]",
        )  # fmt: skip
    return table


def _contrast(metric: str, one: stats.Contrast) -> str:
    needed = f", {one.seeds_needed} seeds would decide" if one.seeds_needed else ""
    return f"{_interval(metric, one.difference, one.low, one.high)}\n{one.verdict}{needed}"


def _estimate(metric: str, estimate: stats.Estimate | None) -> str:
    if estimate is None:
        return "–"
    factor, digits, unit = _unit(metric)
    sd = "" if estimate.sd is None else f" ± {factor * estimate.sd:.{digits}f}"
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f" \\[{factor * estimate.low:.{digits}f}, {factor * estimate.high:.{digits}f}]"
    return f"{factor * estimate.mean:.{digits}f}{sd}{interval}{unit}"


def _interval(metric: str, difference: float | None, low: float | None, high: float | None) -> str:
    if difference is None:
        return "–"
    factor, digits, unit = (100, 2, " pp") if "acc" in metric else _unit(metric)
    interval = "" if low is None or high is None else f" \\[{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]"
    return f"{factor * difference:+.{digits}f}{interval}{unit}"


def _unit(metric: str) -> tuple[float, int, str]:
    return (100, 2, " pp") if "gap/acc" in metric else (1, 4, "")
