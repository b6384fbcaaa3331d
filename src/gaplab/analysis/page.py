"""The report of a sweep as one HTML page that needs nothing else: no other file, no network, no JavaScript."""

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gaplab.notes import margins

NONE = "–"
NAMES = {
    "gap/acc": "gap",
    "gap/acc_clean": "gap, true labels",
    "valid/acc": "valid accuracy",
    "train/acc": "train accuracy",
    "train/acc_clean": "train accuracy, true labels",
    "train/acc_running": "running train accuracy",
    "test/acc": "test accuracy",
}
CAPTIONS = {
    "conditions": (
        "Every dot is a run; the diamond is the mean over the seeds of a condition, the bar its interval. Runs are "
        "paired by seed, so bars that overlap may still belong to a real difference: the contrasts above decide."
    ),
    "learning_curves": (
        "Solid lines are valid accuracy, dashed ones train accuracy; the distance between the two is the gap. Means "
        "over the seeds, the band from the lowest valid accuracy of any seed to the highest."
    ),
    "loss_curves": (
        "Solid lines are valid loss, dashed ones train loss: means over the seeds. Where valid loss rises while train "
        "loss falls, the network overfits, even if valid accuracy stays level: its errors become more confident."
    ),
    "interaction": (
        "The two factors that interact most. Parallel lines: the two act independently of each other. Lines that close "
        "up, open or cross: what one does depends on the other. A hollow point lacks runs, diverged ones for instance, "
        "and may look too good."
    ),
    "heat_map": (
        "Mean valid accuracy in each cell, brighter is higher. “4 of 6” counts the finished seeds; a dash: none did."
    ),
    "honest_vs_running": (
        "On the dashed line both gaps agree. Below it, the gap by the train accuracy that most training loops report, "
        "averaged over the epoch while weights move and units are dropped, is too small."
    ),
    "activations": (
        "(a) accuracy over training; (b, c) how the input of one unit is spread over the samples, for one seed. Level "
        "and evenly spaced lines: the unit sees much the same distribution throughout."
    ),
}


def render(report: dict[str, Any], figures: Mapping[str, Path]) -> str:
    """The page of a report, with those of its figures that `figures` has a PNG for, by name."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"amount": amount, "change": change, "p": p_value, "number": number}
    environment.globals |= {"title_of": title_of, "in_pp": in_pp, "interval": interval, "measured": measured}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    images = {name: b64encode(path.read_bytes()).decode() for name, path in figures.items() if path.is_file()}
    metrics = dict.fromkeys(metric for section in report["sections"] for metric in section["contrasts"])
    shown = {"images": images, "caption_of": caption_of, "margins": margins(metrics, report["margin"])}
    return template.render(report | shown)


def measured(section: Mapping[str, Any]) -> list[str]:
    """The metrics that any of its conditions has."""
    estimates = [one["estimates"] for one in section["conditions"]]
    return list(dict.fromkeys(name for found in estimates for name, value in found.items() if value is not None))


def title_of(metric: str) -> str:
    return NAMES.get(metric, metric)


def caption_of(figure: str) -> str:
    """The caption of a figure by the end of its name."""
    stem = figure.removesuffix(".png")
    return next((caption for kind, caption in CAPTIONS.items() if stem.endswith(kind)), stem)


def in_pp(metric: str) -> bool:
    """Whether a difference in it is one of accuracies, given in percentage points."""
    return "/acc" in metric


def amount(value: float | None, metric: str) -> str:
    """A value of a metric: a gap in pp with its sign, anything else with 4 decimals."""
    return change(value, metric) if "gap/acc" in metric else number(value, 4, sign=False)


def change(value: float | None, metric: str) -> str:
    return number(value if value is None or not in_pp(metric) else 100 * value, 2 if in_pp(metric) else 4)


def interval(contrast: Mapping[str, Any], metric: str) -> str:
    if contrast["low"] is None:
        return NONE
    return f"[{change(contrast['low'], metric)}, {change(contrast['high'], metric)}]"


def p_value(value: float | None) -> str:
    """With 3 decimals, or 4 where 3 do not say on which side of 0.05 it lies."""
    if value is not None and round(value, 3) == 0.05:
        return number(value, 4, sign=False)
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3, sign=False)


def number(value: float | None, decimals: int = 2, sign: bool = True) -> str:
    """With a true minus sign, and never as a negative zero."""
    if value is None:
        return NONE
    return f"{round(value, decimals) + 0.0:{'+' if sign else ''}.{decimals}f}".replace("-", "−")
