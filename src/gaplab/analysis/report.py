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
from rich.table import Table

from gaplab import config as configs
from gaplab import notes, provenance, stats
from gaplab.analysis.claims import Verdict, judge
from gaplab.analysis.compare import CURVES, METRICS, Section, sections
from gaplab.analysis.runs import Collection, Run, collect, tidy
from gaplab.errors import UserError
from gaplab.files import held, plain, write_whole
from gaplab.tracking.journal import Tracker, read_journal

SHOWN_CONTRASTS = 16
LEGEND = (
    "d: the difference in standard deviations over seeds; p (Holm): of chance alone, corrected for the table; "
    "p (equivalent): of a difference beyond the margin"
)
COLOURS = {"supported": "green", "real": "green", "contradicted": "red", "equivalent": "blue", "inconclusive": "yellow"}


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
        _print(console, found, parts, verdicts, metrics)
        content = _content(found, parts, verdicts, metrics, settings)
        for path in _write(folder, content, found.runs, parts, metrics):
            if tracker is not None:
                tracker.artifact(path, "report")
        if tracker is not None and found.folder is not None:
            tracker.tags({notes.NOTE: notes.joined(notes.found(content), _asked(found.folder))})
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
    return {
        "title": found.title,
        "generated": datetime.now().astimezone().isoformat(timespec="seconds"),
        "claim": verdicts[0].claim if verdicts else None,
        "margin": settings.margin,
        "confidence": 0.95,
        "metrics": metrics,
        "sources": [str(found.folder)] if found.folder else [],
        "notes": found.notes,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "sections": [_section(part) for part in parts],
        "runs": [
            {"run": run.name, "sweep": run.sweep, "run_id": run.run_id, "status": run.status, "error": run.error}
            for run in found.runs
        ],
    }


def _section(part: Section) -> dict[str, Any]:
    return {
        "data": part.data,
        "factors": part.factors,
        "notes": part.notes,
        "conditions": [
            {
                "label": one.label,
                "seeds": sorted(next(iter(one.values.values()), {})),
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
        "figures": [],
    }


def _write(
    folder: Path, content: dict[str, Any], runs: list[Run], parts: list[Section], metrics: list[str]
) -> list[Path]:
    """Figures first, for the page shows them; all files of the report."""
    from gaplab.analysis.figures import drawings
    from gaplab.analysis.page import render
    from gaplab.figures import save_figure

    paths: dict[str, Path] = {}
    for index, (part, description) in enumerate(zip(parts, content["sections"], strict=True)):
        prefix = f"{configs.slug(part.data)}_{index}_" if len(parts) > 1 else ""
        for name, draw in drawings(part, metrics).items():
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


def _print(
    console: Console, found: Collection, parts: list[Section], verdicts: list[Verdict], metrics: list[str]
) -> None:
    console.print(f"[bold]{escape(found.title)}[/bold]  {len(found.runs)} runs", soft_wrap=True)
    for verdict in verdicts:
        colour = COLOURS[verdict.verdict]
        needed = f" ({verdict.seeds_needed} seeds would decide)" if verdict.seeds_needed else ""
        said = f"{verdict.verdict}[/]{needed}: {escape(verdict.summary)}"
        console.print(f"\n{verdict.question} [bold {colour}]{said}")
        for line in verdict.evidence:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for part in parts:
        for note in part.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        console.print(_conditions(part, metrics))
        for metric in metrics:
            for family, contrasts in part.contrasts[metric].items():
                if family == "effects" or len(part.factors) > 1:  # with one factor, both say the same
                    _print_contrasts(console, part, metric, family, contrasts)
    if any(contrasts for part in parts for metric in metrics for contrasts in part.contrasts[metric].values()):
        console.print(f"{LEGEND}\n", markup=False, soft_wrap=True)


def _conditions(part: Section, metrics: list[str]) -> Table:
    table = Table(title=f"{escape(part.data)}: last epoch, mean ± sd over seeds [95 % interval]", title_justify="left",
                  title_style="bold", box=box.SIMPLE_HEAD)  # fmt: skip
    table.add_column("condition")
    for heading in ("seeds", *metrics):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for one in part.conditions:
        seeds = str(len(next(iter(one.values.values()), {})))
        table.add_row(escape(one.label), seeds, *(_estimate(metric, one.estimate(metric)) for metric in metrics))
    return table


def _print_contrasts(
    console: Console, part: Section, metric: str, family: str, contrasts: list[stats.Contrast]
) -> None:
    what = "effects of the factors" if family == "effects" else f"against {part.conditions[0].label}"
    table = Table(title=escape(f"{metric}: {what}"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("contrast")
    for heading in ("seeds", "difference [95 % interval]", "d", "p (Holm)", "p (equivalent)", "verdict"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for one in contrasts[:SHOWN_CONTRASTS]:
        needed = f" ({one.seeds_needed} seeds would decide)" if one.seeds_needed else ""
        table.add_row(
            escape(one.name),
            str(one.n),
            _interval(metric, one.difference, one.low, one.high),
            "–" if one.effect_size is None else f"{one.effect_size:+.1f}",
            _p(one.p_holm),
            _p(one.p_equivalent),
            f"[{COLOURS[one.verdict]}]{one.verdict}[/]{needed}",
        )
    console.print(table)
    if len(contrasts) > SHOWN_CONTRASTS:
        console.print(f"… and {len(contrasts) - SHOWN_CONTRASTS} more on the page\n")


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


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
