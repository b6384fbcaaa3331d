"""Descriptions of runs, in Markdown, for the pages of MLflow: what was asked, and what was found.

They are tags of the run, `mlflow.note.content`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTE = "mlflow.note.content"
LONGEST = 8000  # characters of a tag's value that MLflow takes
ASKED = "### What was asked"
WIDE = "&emsp;"
SHOWN = 12  # contrasts of a table, conditions have three times as many


def code(text: object) -> str:
    """`text` as it is, in the type of a machine."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def escaped(text: object) -> str:
    """`text` as it is, whatever Markdown would make of it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells in Markdown. MLflow sets them without any space between, so each ends in a wide one."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) + WIDE for cell in cells) + " |"

    return "\n".join([line(headings), "| --- " * len(headings) + "|", *map(line, rows)])


def joined(found: str, asked: str) -> str:
    """A whole description. What was found comes first, for MLflow folds all but the first lines; it is cut after a line
    where both are longer than MLflow takes."""
    tail = f"\n\n{ASKED}\n\n{asked}" if asked else ""
    room = LONGEST - len(tail)
    if len(found) > room:
        rest = "\n\n… cut here; the report has all of it"
        found = found[: max(0, room - len(rest))].rpartition("\n")[0] + rest
    return (found + tail)[:LONGEST]


def asked_of(note: str) -> str:
    """The part of a description that says what was asked."""
    return note.partition(ASKED)[2].strip()


def asked(
    kind: str,
    factors: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    runs: int,
    command: str,
    question: str | None = None,
    claim: str | None = None,
) -> str:
    """What a sweep asks.

    Args:
        kind: of runs, such as "mlp on mnist, 10 epochs".
        factors: {what is varied: its levels}.
        seeds: of the replicates.
        runs: how many.
        command: that asks it.
        question, claim: of a claim.
    """
    parts = []
    if question:
        parts.append(f"**{escaped(question)}** (claim {code(claim)})")
    conditions = "one condition"
    if factors:
        listed = [[code(name), ", ".join(map(code, levels))] for name, levels in factors.items()]
        parts.append(table(["factor", "levels"], listed))
        conditions = "every condition"
    parts.append(f"{runs} runs of {escaped(kind)}: {conditions} with {_seeds(seeds)}.")
    parts.append(code(command))
    return "\n\n".join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def counts(lost: Mapping[str, str], runs: int) -> str:
    """How a sweep ended; `lost` says of each job that did not finish why not."""
    lines = [f"{runs - len(lost)} of {runs} runs finished."]
    lines += [f"- {code(name)}: {escaped(reason[:200])}" for name, reason in list(lost.items())[:SHOWN]]
    if len(lost) > SHOWN:
        lines.append(f"- … and {len(lost) - SHOWN} more")
    return "\n".join(lines) + f"\n\n{code('python src/report.py')} compares its conditions."


def without_noise(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a `result.json`, or its `best`, holds, the train split counted against its labels without label noise."""
    clean = {name: value for name, value in values.items() if "_clean" in name and value is not None}
    return {**values, **{name.replace("_clean", ""): value for name, value in clean.items()}}


def of_run(result: Mapping[str, Any]) -> str:
    """What a single run came to, from what its `result.json` holds."""
    status, best = result["status"], result["best"]
    parts = [] if status == "FINISHED" else [f"**{status}** {escaped(result['error'] or '')}".strip()]
    if best and result["gap_acc"] is not None:
        clean = without_noise(result)
        against = ", against the labels without label noise" if result.get("gap_acc_clean") is not None else ""
        gap = f"{100 * clean['gap_acc']:+.2f} pp [{_interval(clean)}]"
        parts.append(f"**Gap {gap}** after {result['epochs']} epochs, with its 95 % interval{against}.")
        rows = [
            ["last epoch", str(result["epochs"]), *_row(result), "–"],
            ["best valid", f"{best['epoch']:g}", *_row(best), _number(result["test_acc"])],
        ]
        if against:
            rows += [
                ["last epoch, clean labels", rows[0][1], *_row(clean), "–"],
                ["best valid, clean labels", rows[1][1], *_row(without_noise(best)), rows[1][-1]],
            ]
        parts.append(table(["", "epoch", "train", "valid", "gap, pp", "95 % interval", "test"], rows))
        parts.append(f"{result['params']:,} parameters, {result['fit_s']:.1f} s on {escaped(result['device'])}")
    parts += [f"Note: {escaped(note)}" for note in result.get("notes", [])]
    return "\n\n".join(parts)[:LONGEST]


def _row(values: Mapping[str, Any]) -> list[str]:
    train, valid, gap = (values.get(name) for name in ("train_acc", "valid_acc", "gap_acc"))
    return [_number(train), _number(valid), "–" if gap is None else f"{100 * gap:+.2f}", _interval(values)]


def _interval(values: Mapping[str, Any]) -> str:
    low, high = values.get("gap_acc_low"), values.get("gap_acc_high")
    return "–" if low is None or high is None else f"{100 * low:+.2f}, {100 * high:+.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def found(content: Mapping[str, Any]) -> str:
    """What a report says, from what its `report.json` holds: verdicts, conditions, contrasts, runs that failed."""
    parts = []
    for verdict in content["verdicts"]:
        needed = f" ({verdict['seeds_needed']} seeds would decide)" if verdict["seeds_needed"] else ""
        parts.append(f"{escaped(verdict['question'])} **{verdict['verdict']}**{needed}: {escaped(verdict['summary'])}")
    runs = content["runs"]
    lost = sum(run["status"] != "FINISHED" for run in runs)
    parts.append(f"{len(runs) - lost} of {len(runs)} runs finished" + (f", **{lost} failed**." if lost else "."))
    for section in content["sections"]:
        parts.append(
            f"**{escaped(section['data'])}**, last epoch, mean ± standard deviation over seeds; test of the best epoch"
        )
        parts.append("; ".join(f"{name} {escaped(text)}" for name, text in section["facts"].items() if name != "data"))
        parts.append(_conditions(section["conditions"], section["gap"]))
        parts += _outcomes(section, content["margin"])
    parts.append("Intervals, tests and figures: Artifacts, `report/report.html`.")
    return "\n\n".join(parts)


def _conditions(conditions: Sequence[Mapping[str, Any]], gap: str) -> str:
    rows = [
        [
            code(one["label"]) + (" highest valid" if one["best"] else ""),
            str(len(one["seeds"])),
            *(_estimate(one["estimates"].get(metric)) for metric in ("train/acc", "valid/acc")),
            _estimate(one["estimates"].get(gap), 100, 2),
            _estimate(one["estimates"].get("test/acc")),
        ]
        for one in conditions[: 3 * SHOWN]
    ]
    text = table(["condition", "seeds", "train", "valid", "gap, pp", "test"], rows)
    return text + (f"\n\n… and {len(conditions) - 3 * SHOWN} more" if len(conditions) > 3 * SHOWN else "")


def _estimate(estimate: Mapping[str, Any] | None, factor: int = 1, digits: int = 4) -> str:
    if estimate is None:
        return "–"
    sd = "" if estimate["sd"] is None else f" ± {factor * estimate['sd']:.{digits}f}"
    return f"{factor * estimate['mean']:.{digits}f}{sd}"


def _outcomes(section: Mapping[str, Any], margin: float) -> Iterable[str]:
    """A list for each family: what differs, by how much, and the verdict on gap and validation accuracy together."""
    for family, outcomes in section["outcomes"].items():
        if not outcomes or (family == "against" and len(section["factors"]) < 2):  # with one, both say the same
            continue
        first = section["conditions"][0]["label"]
        what = "Effects of what was varied" if family == "effects" else f"Each condition against {code(first)}"
        lines = [f"**{what}** (equivalent: within {margins(section['contrasts'], margin)})", ""]
        for one in outcomes[:SHOWN]:
            verdict = f" **{one['verdict']}**:" if one["verdict"] else ""
            contrasts = "; ".join(_contrast(metric, contrast) for metric, contrast in one["contrasts"].items())
            lines.append(f"- {code(one['name'])}{verdict} {contrasts}")
        if len(outcomes) > SHOWN:
            lines.append(f"- … and {len(outcomes) - SHOWN} more")
        yield "\n".join(lines)


def margin_in(metric: str, margin: float) -> str:
    """A margin in the unit of `metric`: `0.2 pp` of an accuracy, `0.002 nats` of a loss."""
    return f"{100 * margin:g} pp" if "acc" in metric else f"{margin:g} nats" if "loss" in metric else f"{margin:g}"


def margins(metrics: Iterable[str], margin: float) -> str:
    """A margin in the unit of each of `metrics`."""
    units: dict[str, list[str]] = {}
    for metric in metrics:
        units.setdefault(margin_in(metric, margin), []).append(metric)
    if len(units) < 2:
        return "".join(units)
    return " or ".join(f"{unit} ({', '.join(alike)})" for unit, alike in units.items())


def _contrast(metric: str, one: Mapping[str, Any]) -> str:
    factor, digits, unit = (100, 2, " pp") if "acc" in metric else (1, 4, "")
    size = ""
    if one["difference"] is not None:
        size = f" {factor * one['difference']:+.{digits}f}{unit}"
        if one["low"] is not None and one["high"] is not None:
            size += f" [{factor * one['low']:+.{digits}f}, {factor * one['high']:+.{digits}f}]"
    needed = f" ({one['seeds_needed']} seeds would decide)" if one["seeds_needed"] else ""
    return f"{escaped(metric)}{size} {one['verdict']}{needed}"
