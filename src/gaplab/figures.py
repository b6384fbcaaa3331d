"""The pictures of one run, drawn with matplotlib and written as PNG."""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context, rcdefaults
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray

from gaplab.files import plain

TRAIN, VALID, GREY = "#0072b2", "#d55e00", "#666666"  # told apart by the colour-blind: Okabe, Ito


def save_figures(folder: Path, drawings: dict[str, Callable[[], Figure]]) -> list[Path]:
    """Draw each figure and write it as `<name>.png`; the paths of those that could be drawn."""
    folder.mkdir(exist_ok=True)
    paths = {folder / f"{name}.png": draw for name, draw in drawings.items()}
    return [path for path, draw in paths.items() if save_figure(draw, path)]


def save_figure(draw: Callable[[], Figure], path: Path) -> bool:
    """Draw a figure and write it as PNG; False, and a line on stderr, where that failed: no figure fails a run.

    The user's matplotlibrc does not apply. Names appear as they are: a `$` begins no formula, except in the ticks of a
    log axis.
    """
    try:
        path.unlink(missing_ok=True)  # a link there would lead the figure elsewhere
        with rc_context(), warnings.catch_warnings():
            rcdefaults()
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # an empty box says so
            figure = draw()
            _take_names_as_they_are(figure)
            figure.savefig(path, dpi=120, facecolor="white")
    except Exception as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        reason = plain(str(error).strip().partition("\n")[0] or type(error).__name__)
        print(f"{path.name} could not be drawn: {reason}", file=sys.stderr, flush=True)
        return False
    return True


def _take_names_as_they_are(figure: Figure) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for labels, formatter in (
                (axis.get_majorticklabels(), axis.get_major_formatter()),
                (axis.get_minorticklabels(), axis.get_minor_formatter()),
            ):
                for label in labels:
                    label.set_parse_math(isinstance(formatter, LogFormatter))


def learning_curves(history: list[dict[str, float]], best: int, title: str) -> Figure:
    """Accuracy per epoch with the gap shaded, the gap with its interval, and the loss; `best` counts from 1.

    Epochs whose train split was not evaluated have no train accuracy and no gap: lines join those that have. Under
    label noise, train and gap count the labels without it.
    """
    clean = "_clean" if "gap/acc_clean" in history[-1] else ""
    labels = ", clean labels" if clean else ""
    epochs = np.arange(1, len(history) + 1)
    measured = np.array([number for number, row in zip(epochs, history, strict=True) if f"gap/acc{clean}" in row])
    column = {name: np.array([row[name] for row in history if name in row]) for name in history[-1]}
    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    marker = "o" if len(epochs) < 25 else None
    train = column[f"train/acc{clean}"]
    valid = train - column[f"gap/acc{clean}"]  # of the same epochs
    upper.fill_between(measured, valid, train, color=GREY, alpha=0.2, label="overfitting gap")
    upper.plot(measured, train, color=TRAIN, marker=marker, ms=3, label=f"train{labels}")
    upper.plot(epochs, column["valid/acc"], color=VALID, marker=marker, ms=3, label="valid")
    upper.plot(epochs, column["train/acc_running"], color=TRAIN, lw=1, ls=":", label="train, running (not the gap's)")
    upper.axvline(best, color=GREY, lw=0.8, ls="--", label=f"best valid: epoch {best}")
    upper.set(ylabel="accuracy", title=title)
    upper.legend(loc="lower right", fontsize=8)
    gap, low, high = (100 * column[f"gap/acc{clean}{end}"] for end in ("", "_low", "_high"))
    middle.fill_between(measured, low, high, color=GREY, alpha=0.2, label="95 % interval")
    middle.plot(measured, gap, color="black", marker=marker, ms=3)
    middle.axhline(0, color=GREY, lw=0.8)
    middle.set(ylabel=f"gap, pp{labels}")
    middle.legend(loc="upper left", fontsize=8)
    lower.plot(measured, column[f"train/loss{clean}"], color=TRAIN, marker=marker, ms=3, label=f"train{labels}")
    lower.plot(epochs, column["valid/loss"], color=VALID, marker=marker, ms=3, label="valid")
    lower.set(xlabel="epoch", ylabel="loss, nats", ylim=(0, None))
    lower.legend(loc="best", fontsize=8)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def activations(looks: list[tuple[int, dict[str, float]]], title: str) -> Figure:
    """15th, 50th and 85th percentile of what goes into at most 6 of the layers' activation functions, the first and the
    last among them, and into one unit of the last; the share of dead units. All over optimizer steps.

    `looks` are optimizer steps and values, as `gaplab.training.activations.look` names them.
    """
    steps = [step for step, _ in looks]
    column = {name: np.array([values[name] for _, values in looks]) for name in looks[0][1]}
    count = sum(name.endswith("/dead") for name in column)
    shown = np.unique(np.linspace(1, count, min(count, 6)).round().astype(int))
    bands = {f"layer {number} of {count}": f"act/{number}" for number in shown}
    bands["one unit of the last layer"] = "act/unit"
    width, height = 3, -(-(len(bands) + 1) // 3)
    figure = Figure(figsize=(3.6 * width, 2.7 * height), layout="constrained")
    grid = figure.subplots(height, width, sharex=True, squeeze=False).flat
    for axes, (name, prefix) in zip(grid, bands.items(), strict=False):
        low, middle, high = (column[f"{prefix}/{level}"] for level in ("p15", "p50", "p85"))
        axes.fill_between(steps, low, high, color=TRAIN, alpha=0.2, lw=0, label="15th to 85th percentile")
        axes.plot(steps, middle, color=TRAIN, lw=1.2, label="median")
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_title(name, size=10)
    grid[0].set_ylabel("input of the\nactivation function")
    dead = grid[len(bands)]
    for number, colour in zip(shown, colormaps["viridis"](np.linspace(0, 0.9, len(shown))), strict=True):
        dead.plot(steps, 100 * column[f"act/{number}/dead"], color=colour, lw=1.2, label=f"layer {number}")
    dead.set_title("dead units", size=10)
    dead.set(ylabel="%", ylim=(-3, 103))
    dead.legend(fontsize=7)
    for number, axes in enumerate(grid):
        axes.set_visible(number <= len(bands))
        axes.set_xlabel("optimizer step" if number + width > len(bands) else "")
        axes.xaxis.set_tick_params(labelbottom=number + width > len(bands))
    dead.xaxis.set_major_locator(MaxNLocator(4, integer=True))  # shared by all
    figure.suptitle(title, size=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """Rows are true classes, columns predicted ones; (K, K) counts, coloured by their share of the row."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.5, min(0.5 * len(classes) + 2, 14))
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the root lets small errors be seen
    if len(classes) <= 25:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                colour = "white" if share[row, column] > 0.4 else "black"
                axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", size=7, color=colour)
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 3 else 0, size=8)
        axes.set_yticks(range(len(classes)), classes, size=8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    bar = figure.colorbar(image, ticks=np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]), shrink=0.8)
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"], size=8)
    return figure


def reliability(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], ece: float, title: str, bins: int = 15
) -> Figure:
    """How often the answers are right, by the probability that they were given: a calibrated model is on the diagonal.

    Args:
        confidence: of each answer, (N,) in [0, 1].
        right: whether it was, (N,).
        ece: expected calibration error, with as many bins.
    """
    figure = Figure(figsize=(5.5, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = count > 0
    mean = np.bincount(place, confidence, bins)[filled] / count[filled]
    share = np.bincount(place, right, bins)[filled] / count[filled]
    half = 1.96 * np.sqrt(share * (1 - share) / count[filled])
    upper.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="calibrated")
    upper.errorbar(mean, share, half, color=TRAIN, marker="o", ms=4, lw=1, capsize=2, label="measured, 95 %")
    upper.set(ylabel="share that is right", ylim=(-0.03, 1.03), title=f"{title}\nECE {100 * ece:.2f} pp")
    upper.legend(loc="upper left", fontsize=8)
    lower.bar(edges[:-1], count, 1 / bins, align="edge", color=TRAIN, alpha=0.6)
    lower.set(xlabel="probability given to the answer", ylabel="samples", yscale="log", xlim=(0, 1), ylim=(0.8, None))
    return figure


def worst_mistakes(
    images: NDArray[np.uint8],
    labels: Sequence[str],
    predictions: Sequence[str],
    confidences: NDArray[np.float64],
    title: str,
) -> Figure:
    """Up to 24 pictures (n, C, H, W), the most confidently wrong first: true class, predicted class, probability."""
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(8, 1.75 * rows + 0.5), layout="constrained")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, image, label, prediction, confidence in zip(
        grid.flat, images, labels, predictions, confidences, strict=False
    ):
        _show(axes, image)
        axes.set_title(f"true: {label}\npredicted: {prediction}\n{100 * confidence:.1f} % sure", size=8)
    figure.suptitle(title if len(images) else f"{title}: none", size=10)
    return figure


def normalization(images: NDArray[np.uint8], mean: NDArray[np.float64], std: NDArray[np.float64]) -> Figure:
    """The same pictures (n, C, H, W) as stored, with the mean subtracted and as standard scores, over their histograms.

    Each strip runs from its own darkest to its own brightest value; the histograms share one axis.

    Args:
        mean: of the train split per channel, (C,) in units of [0, 1].
        std: likewise.
    """
    pixels = images / 255.0
    centred = pixels - mean[:, None, None]
    panels = {
        "pixels in [0, 1]": pixels,
        "mean subtracted": centred,
        "standard scores": centred / std[:, None, None],
    }
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    strips, histograms = figure.subplots(2, 3, height_ratios=[1, 1.6], sharex="row", sharey="row")
    for (name, values), top, bottom in zip(panels.items(), strips, histograms, strict=True):
        strip = np.concatenate([*values[:4]], axis=2)
        low, high = strip.min(), strip.max()
        _show(top, (255 * (strip - low) / (high - low + 1e-9)).astype(np.uint8))
        top.set_title(f"{name}\nblack {low:.2f}, white {high:.2f}", size=9)
        colours = [GREY] if values.shape[1] == 1 else ["r", "g", "b"]
        for channel, colour in zip(range(values.shape[1]), colours, strict=False):
            bottom.hist(values[:, channel].ravel(), bins=60, color=colour, alpha=0.6)
        bottom.set(yscale="log", xlabel=f"mean {values.mean():.3f}, sd {values.std():.3f}")
    histograms[0].set_ylabel("pixels")
    return figure


def _show(axes, image: NDArray[np.uint8]) -> None:  # type: ignore[no-untyped-def]
    axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
