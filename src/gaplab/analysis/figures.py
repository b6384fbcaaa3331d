"""The pictures of a sweep, drawn with matplotlib: accuracies in %, gaps in percentage points (pp).

Where errors differ more than `STRETCH`-fold, an axis of accuracy is logarithmic in the error, so that 97 and 98 % can
be told apart beside a network that stayed at chance. Learning curves are linear: the distance of two lines is the gap.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from math import inf, isfinite
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from gaplab import stats
from gaplab.analysis.compare import Condition, Section
from gaplab.analysis.runs import Run

Array = NDArray[np.float64]
# Okabe, Ito: told apart by the colour-blind; grey in place of yellow, which is too pale
OKABE_ITO = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]
GREY, PALE, MARKERS = "#666666", "#e6e6e6", "osD^vP*X"
STRETCH, NO_BREAK = 8, "\N{NO-BREAK SPACE}"
TICKS = (0, 10, 50, 80, 90, 95, 97, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 100)
MAX_PANELS, MAX_LINES, MAX_METRICS = 16, 4, 3
NAMES = {"gap/acc": "gap", "train/acc_running": "running train accuracy"}
PERCENTILES = {"act/unit/p15": ":", "act/unit/p50": "-", "act/unit/p85": "--"}


def drawings(section: Section, metrics: Sequence[str]) -> dict[str, Callable[[], Figure]]:
    """Name and function of each figure that makes sense for these runs, of the first `MAX_METRICS` metrics known."""
    known = {metric for one in section.conditions for metric, values in one.values.items() if values}
    shown = [metric for metric in metrics if metric in known][:MAX_METRICS]
    finished = [run for one in section.conditions for run in _finished(one).values()]
    epochs = max((len(run.history.get("valid/acc", ())) for run in finished), default=0)
    sensible: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "conditions": (bool(shown), lambda: conditions(section, shown)),
        "learning_curves": (epochs > 1, lambda: learning_curves(section)),
        "loss_curves": (epochs > 1 and any(map(_has_loss, finished)), lambda: learning_curves(section, "loss")),
        "interaction": (bool(shown) and len(section.factors) > 1, lambda: interaction(section, shown)),
        "heat_map": ("valid/acc" in known and len(_numeric(section)) > 1, lambda: heat_map(section)),
        "honest_vs_running": (
            section.gap == "gap/acc"
            and any(_gaps(one) for one in section.conditions),  # the running one sees wrong labels
            lambda: honest_vs_running(section),
        ),
        "activations": (any(map(_looked, section.runs)), lambda: activations(section)),
    }
    return {name: draw for name, (makes_sense, draw) in sensible.items() if makes_sense}


def conditions(section: Section, metrics: Sequence[str] = ("gap/acc", "valid/acc")) -> Figure:
    """A row for each condition, a panel for each metric: every seed a dot, the mean and its 95 % t interval below."""
    count, by = len(section.conditions), _line_factor(section.factors) if len(section.factors) > 1 else None
    labels = [_row_label(one, reference=count > 1 and not row) for row, one in enumerate(section.conditions)]
    lines = max(label.count("\n") + 1 for label in labels)
    figure, grid = _figure(9, 1.4 + count * max(0.32, 0.14 * lines), 1, len(metrics), sharey=True)
    seeds = sorted({run.seed for run in section.runs})
    jitter = dict(zip(seeds, np.linspace(-0.34, 0.04, len(seeds)) if len(seeds) > 1 else [-0.1], strict=True))
    colours = _colours(section, by)
    for axes, metric in zip(grid[0], metrics, strict=True):
        dots: list[float] = []
        ends: list[float] = []
        for row, one in enumerate(section.conditions):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", lw=0, zorder=0)
            if not (values := {seed: _scaled(metric, value) for seed, value in one.values.get(metric, {}).items()}):
                continue
            heights = [row + jitter[seed] for seed in values]
            colour = colours[_level(section, one, by)]
            axes.scatter(list(values.values()), heights, s=13, color=colour, alpha=0.65, lw=0, zorder=3)
            mean, interval = _mean_and_ends(list(values.values()), metric)
            if row == 0 and count > 1:
                axes.axvline(mean, color=GREY, lw=0.8, ls="--", zorder=1)
            axes.plot(interval, [row + 0.24] * len(interval), color="black", lw=1.3, zorder=4)
            axes.plot(mean, row + 0.24, "D", color="black", ms=4, zorder=4)
            dots += values.values()
            ends += interval
        _set_scale(axes, "x", metric, dots, ends)
        axes.set_xlabel(_name(metric), size=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    grid[0][0].set_yticks(range(count), labels, size=8 if count <= 20 else 7)
    grid[0][0].set_ylim(count - 0.5, -0.5)
    keys = [_key(f"{by}={level}" if by else "a seed", ls="", marker="o", color=c) for level, c in colours.items()]
    keys.append(_key("mean, 95 % t interval over seeds", marker="D", ms=4, color="black"))
    if count > 1:
        grid[0][0].get_yticklabels()[0].set_fontweight("bold")
    if count > 1 and section.conditions[0].values:
        keys.append(_key("mean of the reference", color=GREY, lw=0.8, ls="--"))
    return _finish(figure, f"{section.data}: every condition", keys)


def learning_curves(section: Section, measure: str = "acc") -> Figure:
    """Valid and train accuracy, or loss, per epoch: means over the finished seeds, up to the last epoch that all have.

    The axis is linear, so that the distance between the two lines of accuracy is the gap; under label noise, train is
    counted against the true labels. A panel for each setting of all factors but the one of the lines; beyond
    `MAX_PANELS`, of the largest factor.
    """
    by = _line_factor(section.factors)
    by = by if by and len(section.factors[by]) <= MAX_LINES else None
    across = [name for name in section.factors if name != by]
    if len(_grouped(section, across)) > MAX_PANELS:
        across = [max(across, key=lambda name: len(section.factors[name]))]
    panels = _grouped(section, across)
    shown, colours = dict(list(panels.items())[:MAX_PANELS]), _colours(section, by)
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure, grid = _figure(9, 1.3 + (2.3 if rows > 1 else 3.2) * rows, rows, columns, sharex=True, sharey=True)
    drawn: list[float] = []
    unit = "accuracy, %" if measure == "acc" else "loss, nats"
    for number, (where, group) in enumerate(shown.items()):
        axes, missing = grid[number // columns][number % columns], []
        for (level,), members in _grouped(section, [by], group).items():
            for split, dashes, width in (("train", "--", 1.0), ("valid", "-", 1.6)):
                if found := _curves(members, f"{split}/{measure}"):
                    drawn += _draw_curve(axes, *found, dashes == "-", color=colours[level], ls=dashes, lw=width)
            drawn_seeds, planned = len(found[1]) if found else 0, len({run.seed for one in members for run in one.runs})
            if drawn_seeds < planned:
                missing.append(f"{by}={level}: " * bool(by) + f"{drawn_seeds} of {planned} seeds")
        axes.set_title("\n".join([_wrapped(_words(across, where), 34 if columns < 4 else 28), *missing]), size=8)
        axes.set_xlabel("epoch" if number + columns >= len(shown) else "", size=9)
        axes.set_ylabel("" if number % columns else unit, size=9)
        axes.xaxis.set_tick_params(labelbottom=number + columns >= len(shown))
        axes.grid(color=PALE, lw=0.6)
    for number in range(len(shown), rows * columns):
        grid[number // columns][number % columns].set_visible(False)
    _set_scale(grid[0][0], "y", f"valid/{measure}", drawn, stretch=False)
    grid[0][0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    plain = GREY if by else colours[""]
    keys = [_key(f"{by}={level}", color=colour, lw=3) for level, colour in colours.items() if by]
    keys.append(_key("valid; band: lowest to highest seed", color=plain, lw=1.6))
    keys.append(_key("train", color=plain, lw=1, ls="--"))
    cut = f"; the first {len(shown)} of {len(panels)}" if len(shown) < len(panels) else ""
    means = _means_over(section, [by, *across])
    curves = "learning curves" if measure == "acc" else "loss curves"
    curves += " against the true labels" if section.gap != "gap/acc" else ""
    return _finish(figure, f"{section.data}: {curves}, means over the finished seeds{means}{cut}", keys)


def interaction(section: Section, metrics: Sequence[str] = ("gap/acc", "valid/acc")) -> Figure:
    """Each metric against one factor, a line for each level of another one: means and 95 % t intervals over seeds.

    The two factors are those that interact most. A seed's value is its mean over the other factors; it counts if it has
    all of these conditions.
    """
    numeric = _numeric(section)
    pair = max(combinations(section.factors, 2), key=lambda names: _interaction_size(section, names, metrics))
    by = _line_factor({name: section.factors[name] for name in pair})
    along = pair[pair[0] == by]
    levels = sorted(section.factors[along], key=float) if along in numeric else section.factors[along]
    places, log = _places(levels, along in numeric)
    colours, cells = _colours(section, by), _grouped(section, [by, along])
    figure, grid = _figure(9, 4.2, 1, len(metrics))
    lost = False
    for axes, metric in zip(grid[0], metrics, strict=True):
        axes.set_xscale("log" if log else "linear")
        means: list[float] = []
        ends: list[float] = []
        for index, (line, colour) in enumerate(colours.items()):
            aside = ScaledTranslation((index - (len(colours) - 1) / 2) * 0.08, 0, figure.dpi_scale_trans)
            style: dict[str, Any] = {"color": colour, "transform": axes.transData + aside}
            points: list[tuple[float, float]] = []
            for place, level in zip(places, levels, strict=True):
                group = cells.get((line, level), [])
                if values := [_scaled(metric, value) for value in _seed_means(group, metric)]:
                    mean, interval = _mean_and_ends(values, metric)
                    whole = len(values) == len({run.seed for one in group for run in one.runs})
                    axes.plot([place] * len(interval), interval, lw=1.2, **style)
                    axes.plot(place, mean, MARKERS[index % 8], ms=5.5, mfc=colour if whole else "white", **style)
                    points.append((place, mean))
                    ends += interval
                    lost |= not whole
            axes.plot([x for x, _ in points], [y for _, y in points], lw=1.2, zorder=1, label=line, **style)
            means += [y for _, y in points]
        _set_scale(axes, "y", metric, means, ends)
        axes.set_xlabel(along, size=9)
        axes.set_ylabel(_name(metric), size=9)
        axes.spines[["top", "right"]].set_visible(False)
        limits = _padded(*np.log([places[0], places[-1]])) if log else _padded(places[0], places[-1])
        axes.set_xlim(*(np.exp(limits) if log else limits))
        turn = 35 if sum(map(len, levels)) + 2 * len(levels) > 110 / len(metrics) else 0
        axes.set_xticks(places, levels, size=8, rotation=turn, ha="right" if turn else "center", rotation_mode="anchor")
        axes.xaxis.set_minor_locator(NullLocator())
    keys = [_key(f"{by}={line}", color=c, marker=MARKERS[i % 8], ms=5.5) for i, (line, c) in enumerate(colours.items())]
    if lost:
        keys.append(_key("hollow: some runs are missing", ls="", marker="o", mfc="white", color=GREY))
    means_over = _means_over(section, [by, along])
    return _finish(figure, f"{section.data}: {by} and {along}{means_over}; bars: 95 % t intervals over seeds", keys)


def heat_map(section: Section) -> Figure:
    """Mean valid accuracy over the two largest numeric factors, a panel for each level of a boolean one."""
    along, up = sorted(_numeric(section), key=lambda name: -len(section.factors[name]))[:2]
    by = next((name for name, levels in section.factors.items() if set(levels) == {"false", "true"}), None)
    columns, rows = (sorted(section.factors[name], key=float) for name in (along, up))
    cells, panels = _grouped(section, [along, up, by]), section.factors[by] if by else [""]
    means = {where: [100 * value for value in _seed_means(group, "valid/acc")] for where, group in cells.items()}
    every = [float(np.mean(values)) for values in means.values() if values]
    stretched, floor = _stretch(every)
    shade = _nines(floor)[0] if stretched else np.asarray
    low, high = shade(np.array([min(every, default=0), max(every, default=1)]))
    width = max(5, min(14, max(0.62 * len(columns), 3) * len(panels) + 1.2))
    figure, grid = _figure(width, 0.45 * len(rows) + 1.7, 1, len(panels), sharey=True)
    for axes, panel in zip(grid[0], panels, strict=True):
        image = np.full((len(rows), len(columns)), np.nan)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            values = means.get((column, row, panel), [])
            planned = len({run.seed for one in cells.get((column, row, panel), []) for run in one.runs})
            image[i, j] = shade(np.array(np.mean(values))) if values else np.nan
            text = f"{np.mean(values):.2f}" if values else "–"
            text += f"\n{len(values)} of {planned}" if 0 < len(values) < planned else ""
            colour = "white" if image[i, j] < (low + high) / 2 else "black"
            axes.text(j, i, text, ha="center", va="center", size=7.5, color=colour)
        axes.set_facecolor(PALE)
        axes.imshow(np.ma.masked_invalid(image), cmap="cividis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(along, size=9)
        axes.set_title(f"{by}={panel}" if by else "", size=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    grid[0][0].set_ylabel(up, size=9)
    return _finish(figure, f"{section.data}: mean valid accuracy, %{_means_over(section, [along, up, by])}")


def honest_vs_running(section: Section) -> Figure:
    """Of every run, the gap by the running train accuracy against the honest one, both in pp."""
    by = next((name for name in section.factors if name.rpartition(".")[2] == "dropout"), None)
    by = by or (_line_factor(section.factors) if len(section.conditions) > 8 else None)
    groups = _named(section, by)
    figure, ((axes,),) = _figure(7, 5, 1, 1)
    keys = []
    for index, (label, group) in enumerate(groups.items()):
        if points := [point for one in group for point in _gaps(one)]:
            honest, running = np.array(points).T
            colour, marker = _palette(len(groups))[index], MARKERS[index % 8]
            axes.scatter(honest, running, s=26, color=colour, alpha=0.7, lw=0, marker=marker)
            off = f"{np.mean(running - honest):+.2f}".replace("-", "−")
            keys.append(_key(f"{label}: off by {off} pp on average", ls="", marker=marker, color=colour))
    axes.axline((0, 0), slope=1, color=GREY, lw=1, ls="--")
    axes.set_xlabel("honest gap, pp", size=9)
    axes.set_ylabel("gap by the running train accuracy, pp", size=9)
    axes.grid(color=PALE, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    keys.append(_key("both agree", color=GREY, lw=1, ls="--"))
    return _finish(figure, f"{section.data}: how far the usual gap lies from the honest one; every dot a run", keys)


def activations(section: Section) -> Figure:
    """Valid accuracy over optimizer steps; 15th, 50th and 85th percentile of what goes into one unit of the last layer.

    The steps of an epoch are those of the last look, divided by the epochs: up to one look too few.

    References:
        Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        2015, arXiv:1502.03167, figure 1.
    """
    bn = next((name for name in section.factors if name.rpartition(".")[2] == "bn"), None)
    groups = _named(section, bn)
    looked = {
        label: [(one, run) for one in group for run in one.runs if _looked(run)] for label, group in groups.items()
    }
    labels = sorted((label for label, pairs in looked.items() if pairs), key=f"{bn}=true".__eq__)[:6]
    figure = Figure(figsize=(9, 5.6), layout="constrained", dpi=120)
    panels = figure.subplot_mosaic([["a"] * len(labels[:2]), [*"bc"[: len(labels)]]], height_ratios=[1, 1.1])
    keys, drawn = [], []
    for label, letter, colour in zip(labels, "bc    ", OKABE_ITO, strict=False):
        pairs = looked[label]
        rates = [max(run.history["act/unit/p50"]) / max(run.history.get("valid/acc") or [1]) for _, run in pairs]
        if found := _curves(groups[label], "valid/acc"):
            drawn += _draw_curve(panels["a"], found[0] * max(rates), found[1], True, color=colour, lw=1.5)
            keys.append(_key(label, color=colour, lw=1.5))
        if letter == " ":
            continue
        one, run = min(
            pairs, key=lambda pair: (pair[1].status != "FINISHED", groups[label].index(pair[0]), pair[1].seed)
        )
        for name, dashes in PERCENTILES.items():
            panels[letter].plot(*zip(*sorted(run.history[name].items()), strict=True), ls=dashes, lw=1.2, color=colour)
        panels[letter].axhline(0, color=GREY, lw=0.6)
        words = {f"{bn}=false": "without BatchNorm", f"{bn}=true": "with BatchNorm"}.get(label, label)
        words += f": {one.label}" if one.label != label else ""
        ended = "" if run.status == "FINISHED" else " (diverged)" if run.diverged else f" ({run.status.lower()})"
        panels[letter].set_title(_wrapped(f"({letter}) {words}, seed{NO_BREAK}{run.seed}{ended}", 60), size=9)
    _set_scale(panels["a"], "y", "valid/acc", drawn)
    pooled = _means_over(section, [bn]) if bn else ""
    panels["a"].set_title(f"(a) valid accuracy{pooled}; band: lowest to highest seed", size=9)
    panels["a"].set_ylabel("accuracy, %", size=9)
    panels["b"].set_ylabel("input of one unit of\nthe last hidden layer", size=9)
    if "c" in panels:
        low, high = zip(*(panels[letter].get_ylim() for letter in "bc"), strict=True)
        for letter in "bc":  # one scale, wide enough for both
            panels[letter].set_ylim(min(low), max(high))
        panels["c"].tick_params(labelleft=False)
    for axes in panels.values():
        axes.grid(color=PALE, lw=0.6)
        axes.tick_params(labelsize=8)
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer step", size=9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    names = ("15th percentile", "median", "85th percentile")
    keys += [
        _key(name, color=GREY, ls=dashes, lw=1.2) for name, dashes in zip(names, PERCENTILES.values(), strict=True)
    ]
    return _finish(figure, f"{section.data}: accuracy, and one activation over training", keys)


def _finished(condition: Condition) -> dict[int, Run]:
    return {run.seed: run for run in condition.runs if run.status == "FINISHED"}


def _looked(run: Run) -> bool:
    return all(run.history.get(name) for name in PERCENTILES)


def _gaps(condition: Condition) -> list[tuple[float, float]]:
    """Of each finished seed the honest gap and the one by the running accuracy, in pp."""
    honest, running, valid = (condition.values.get(name, {}) for name in ("gap/acc", "train/acc_running", "valid/acc"))
    seeds = honest.keys() & running.keys() & valid.keys()
    return [(100 * honest[seed], 100 * (running[seed] - valid[seed])) for seed in sorted(seeds)]


def _numeric(section: Section) -> list[str]:
    def number(level: str) -> bool:
        try:
            return isfinite(float(level))
        except ValueError:
            return False

    return [name for name, levels in section.factors.items() if all(map(number, levels))]


def _line_factor(factors: Mapping[str, Sequence[str]]) -> str | None:
    """The factor that colours tell apart: BatchNorm, else the one with the fewest levels."""
    return min(factors, key=lambda name: (name.rpartition(".")[2] != "bn", len(factors[name])), default=None)


def _interaction_size(section: Section, names: Sequence[str], metrics: Sequence[str]) -> float:
    """Largest deviation of the cell means of two factors from the sum of their own effects, in units of the metric's
    range over all conditions, summed over the metrics; infinite where no run of a cell finished, and -1 where a cell
    has no run.
    """
    cells, size = _grouped(section, names), 0.0
    if len(cells) < len(section.factors[names[0]]) * len(section.factors[names[1]]):
        return -1.0
    for metric in metrics:
        mean = {
            one.levels: float(np.mean([*one.values[metric].values()]))
            for one in section.conditions
            if one.values.get(metric)
        }
        table = np.array(
            [
                [
                    np.mean([mean[one.levels] for one in cells[a, b] if one.levels in mean] or [inf])
                    for b in section.factors[names[1]]
                ]
                for a in section.factors[names[0]]
            ]
        )
        if np.isinf(table).any():
            return inf
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        size += float(np.abs(rest).max() / (np.ptp([*mean.values()]) or 1.0))
    return size


def _level(section: Section, condition: Condition, name: str | None) -> str:
    return condition.levels[list(section.factors).index(name)] if name else ""


def _grouped(
    section: Section, names: Sequence[str | None], members: Iterable[Condition] | None = None
) -> dict[stats.Levels, list[Condition]]:
    """Conditions by their levels of the factors `names`, in the order of the levels; no factor has the level ""."""
    groups: dict[stats.Levels, list[Condition]] = {}
    for one in section.conditions if members is None else members:
        groups.setdefault(tuple(_level(section, one, name) for name in names), []).append(one)
    order = product(*(section.factors[name] if name else [""] for name in names))
    return {levels: groups[levels] for levels in order if levels in groups}


def _named(section: Section, name: str | None) -> dict[str, list[Condition]]:
    """Conditions by their level of a factor, for a legend; each by itself without one."""
    grouped = _grouped(section, [name]).items() if name else []
    return {f"{name}={level}": group for (level,), group in grouped} or {one.label: [one] for one in section.conditions}


def _curves(group: Iterable[Condition], name: str) -> tuple[Array, Array] | None:
    """Steps (T,) that all have, and values (seeds, T), accuracies in %: means over conditions with a finished run."""
    tables = [{seed: run.curve(name) for seed, run in _finished(one).items()} for one in group]
    tables = [found for table in tables if (found := {seed: line for seed, line in table.items() if line})]
    seeds = sorted(set.intersection(*map(set, tables))) if tables else []
    steps = sorted(set.intersection(*(set(table[seed]) for table in tables for seed in seeds))) if seeds else []
    values = [
        [_scaled(name, float(np.mean([table[seed][step] for table in tables]))) for step in steps] for seed in seeds
    ]
    return (np.array(steps, float), np.array(values)) if steps else None


def _draw_curve(axes: Axes, steps: Array, values: Array, band: bool, **style: Any) -> list[float]:
    """The mean of `values` (seeds, T), and from the lowest to the highest; what the axis has to show."""
    mean = values.mean(0)
    axes.plot(steps, mean, marker="." if len(steps) < 4 else "", **style)
    if band:
        axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, lw=0)
    return [*(values.ravel() if band else mean).tolist()]


def _seed_means(group: Sequence[Condition], metric: str) -> list[float]:
    """Mean over the conditions, for each seed that has them all."""
    tables = [one.values.get(metric, {}) for one in group]
    seeds = sorted(set.intersection(*map(set, tables))) if tables else []
    return [float(np.mean([table[seed] for table in tables])) for seed in seeds]


def _mean_and_ends(values: Sequence[float], metric: str) -> tuple[float, list[float]]:
    """The mean, and the ends of its 95 % t interval within what the metric can be; no ends of a single value."""
    found, (least, most) = stats.estimate(values), _bounds(metric)
    ends = [] if found.low is None or found.high is None else [max(found.low, least), min(found.high, most)]
    return found.mean, ends


def _bounds(metric: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have, as `_scaled`."""
    if "/acc" not in metric:
        return -inf, inf
    return -100.0 if metric.startswith("gap/") else 0.0, 100.0


def _has_loss(run: Run) -> bool:
    return bool(run.curve("train/loss") and run.curve("valid/loss"))


def _scaled(metric: str, value: float) -> float:
    return 100 * value if "/acc" in metric else value


def _name(metric: str) -> str:
    unit = ", pp" if "gap/acc" in metric else ", %" if "/acc" in metric else ""
    return NAMES.get(metric, metric.replace("/acc", " accuracy") if unit == ", %" else metric) + unit


def _places(levels: Sequence[str], numeric: bool) -> tuple[list[float], bool]:
    """Where levels stand, and whether on a logarithmic axis; evenly where numbers would lie on top of each other."""
    numbers = [float(level) for level in levels] if numeric else []
    if numbers and numbers[0] > 0 and numbers[-1] > 10 * numbers[0]:
        return numbers, True
    if numbers and min(np.diff(numbers)) > 0.06 * (numbers[-1] - numbers[0]):
        return numbers, False
    return [float(place) for place in range(len(levels))], False


def _stretch(values: Sequence[float]) -> tuple[bool, float]:
    """Whether accuracies in % need the axis of nines, and the error below which it is linear."""
    errors = [100 - value for value in values]
    least = max(min((error for error in errors if error > 1e-9), default=1.0), 0.04)
    return max(errors, default=0.0) > STRETCH * least, least / 2


def _nines(floor: float) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """90, 99 and 99.9 % are equally far apart, and 100 % is not infinitely far; and the way back."""
    return lambda x: -np.arcsinh((100 - x) / floor), lambda y: 100 + floor * np.sinh(y)


def _set_scale(
    axes: Axes, which: str, metric: str, values: Sequence[float], ends: Sequence[float] = (), stretch: bool = True
) -> None:
    """Limits that show all values and the ends of all intervals; for accuracies the scale."""
    if not values:
        return
    low, high = min([*values, *ends]), max([*values, *ends])
    set_limits, axis = (axes.set_xlim, axes.xaxis) if which == "x" else (axes.set_ylim, axes.yaxis)
    accuracy = "/acc" in metric and not metric.startswith("gap/")
    stretched, floor = _stretch(values)
    if accuracy and stretched and stretch:
        forward, back = _nines(floor)
        (axes.set_xscale if which == "x" else axes.set_yscale)("function", functions=(forward, back))
        first, last = forward(np.array([low, high]))
        low, high = _padded(first, last, 0.04)
        set_limits(*back(np.array([low, high])))
        ticks: list[float] = []
        for tick, place in zip(TICKS[::-1], forward(np.array(TICKS[::-1])), strict=True):
            if low <= place <= high - 0.08 * (last - first) * bool(ticks):
                ticks, high = [*ticks, tick], place
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        room = 0.05 * ((high - low) or abs(high) or 1.0)
        set_limits(low - room, min(high + room, 100.2) if accuracy else high + room)
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))


def _padded(low: float, high: float, share: float = 0.1) -> tuple[float, float]:
    return low - share * (high - low), high + share * (high - low)


def _palette(count: int) -> list[str]:
    if count <= len(OKABE_ITO):
        return OKABE_ITO
    return ["#" + bytes(rgb[:3]).hex() for rgb in colormaps["viridis"](np.linspace(0, 0.9, count), bytes=True)]


def _colours(section: Section, name: str | None) -> dict[str, str]:
    levels = section.factors[name] if name else [""]
    return dict(zip(levels, _palette(len(levels)), strict=False))


def _words(names: Iterable[str], levels: stats.Levels) -> str:
    return " ".join(f"{name}={level}" for name, level in zip(names, levels, strict=True))


def _means_over(section: Section, shown: Sequence[str | None]) -> str:
    pooled = [name for name in section.factors if name not in shown]
    return f", means over {', '.join(pooled)}" if pooled else ""


def _row_label(condition: Condition, reference: bool) -> str:
    count = len({run.seed for run in condition.runs})
    lost = {"diverged": condition.diverged, "failed": condition.failed, "unfinished": condition.unfinished}
    beside = ["reference"] if reference else []
    beside += [f"{len(set(seeds))} of {count} {word}" for word, seeds in lost.items() if seeds]
    ending = f" ({', '.join(word.replace(' ', NO_BREAK) for word in beside)})" if beside else ""
    return _wrapped(condition.label + ending, 46)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …", break_on_hyphens=False))


def _figure(width: float, height: float, rows: int, columns: int, **shared: Any) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat:
        axes.tick_params(labelsize=8)
    return figure, grid.tolist()


def _key(label: str, **style: Any) -> Line2D:
    return Line2D([], [], label=label, **style)


def _finish(figure: Figure, title: str, keys: Sequence[Line2D] = ()) -> Figure:
    """Title above, legend below, in as few rows as fit."""
    figure.suptitle(_wrapped(title, int(13 * figure.get_figwidth())), size=10)
    lengths, room = [len(str(key.get_label())) + 7 for key in keys], 16 * figure.get_figwidth()
    if keys:
        columns = len(keys) if sum(lengths) <= room else max(1, int(room / max(lengths)))
        figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure
