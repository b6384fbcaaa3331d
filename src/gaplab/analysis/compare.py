"""From runs to comparisons: what was varied, what the seeds of each condition say, and every contrast between them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from gaplab import stats
from gaplab.analysis.runs import Run

METRICS = ("gap/acc", "valid/acc", "train/acc", "train/acc_running", "test/acc")
CURVES = ("valid/acc", "train/acc", "act/unit/p15", "act/unit/p50", "act/unit/p85")
SPLIT_KEYS = ("data.name", "data.valid_size")  # these decide which samples are compared
SILENT = ("_target_", "name")


@dataclass
class Condition:
    """The replicates of one condition.

    Attributes:
        label: for people, the levels in words.
        levels: one for each factor.
        values: {metric: {seed: last value}} of the runs that finished.
        failed, diverged, unfinished: seeds of the runs that did not finish.
        runs: all of them.
    """

    label: str
    levels: stats.Levels
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def estimate(self, metric: str) -> stats.Estimate | None:
        values = list(self.values.get(metric, {}).values())
        return stats.estimate(values) if values else None

    def curve(self, metric: str) -> dict[int, float]:
        """{step: mean over the runs that finished}, at the steps that all of them have."""
        curves = [run.history[metric] for run in self.runs if run.status == "FINISHED" and metric in run.history]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}


@dataclass
class Section:
    """The runs on one data set and split, compared with each other.

    Attributes:
        data: name of the data set.
        factors: {name: its levels, the reference first}.
        keys: {factor: the config keys that it is made of}.
        conditions: in the order of the runs; the first is the reference.
        contrasts: {metric: {"effects" or "against": one family}}.
        notes: what is left out or cannot be said.
    """

    data: str
    factors: dict[str, list[str]]
    keys: dict[str, list[str]]
    conditions: list[Condition]
    contrasts: dict[str, dict[str, list[stats.Contrast]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for condition in self.conditions for run in condition.runs]

    def table(self, metric: str) -> dict[stats.Levels, dict[int, float]]:
        return {one.levels: one.values[metric] for one in self.conditions if one.values.get(metric)}


def sections(runs: Sequence[Run], metrics: Sequence[str], margin: float) -> list[Section]:
    """One section for each data set and split, compared in each of `metrics`; `margin` as in `stats.compare`."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    digests: dict[tuple[str, ...], str] = {}
    for run in sorted(runs, key=lambda run: not run.digest):  # a run that never read its data goes with the others
        where = tuple(run.settings.get(key, "") for key in SPLIT_KEYS)
        digest = run.digest or digests.get(where, "")
        digests.setdefault(where, digest)
        groups.setdefault((*where, digest), []).append(run)
    order = {id(run): index for index, run in enumerate(runs)}
    for group in groups.values():
        group.sort(key=lambda run: order[id(run)])
    return [_section(group, metrics, margin) for group in groups.values()]


def _section(runs: list[Run], metrics: Sequence[str], margin: float) -> Section:
    factors = find_factors([run.settings for run in runs])
    names = factor_names(factors)
    levels = {name: level_names([run.settings for run in runs], keys) for name, keys in names.items()}
    conditions: dict[stats.Levels, Condition] = {}
    repeated = 0
    for index, run in enumerate(runs):
        where = tuple(levels[name][index] for name in names)
        label = " ".join(f"{name}={level}" for name, level in zip(names, where, strict=True))
        condition = conditions.setdefault(where, Condition(label or run.settings.get("model.name", "all"), where))
        repeated += any(run.seed in values for values in condition.values.values())
        condition.runs.append(run)
        if run.status == "FINISHED":
            for metric, value in run.metrics.items():
                condition.values.setdefault(metric, {})[run.seed] = value
        elif run.diverged:
            condition.diverged.append(run.seed)
        else:
            (condition.failed if run.status == "FAILED" else condition.unfinished).append(run.seed)
    found = Section(
        runs[0].settings.get("data.name", "?"),
        {name: list(dict.fromkeys(levels[name])) for name in names},
        names,
        list(conditions.values()),
    )
    kinds = Counter(run.batchnorm for run in runs if run.batchnorm)
    found.notes += [f"BatchNorm {kind} ({count} runs)" for kind, count in sorted(kinds.items())]
    if repeated:
        found.notes.append(f"{repeated} runs repeat a condition and seed; the later one counts")
    _say_what_is_missing(found)
    for metric in metrics:
        found.contrasts[metric] = _contrasts(found, metric, margin)
    return found


def _contrasts(section: Section, metric: str, margin: float) -> dict[str, list[stats.Contrast]]:
    table = section.table(metric)
    families: dict[str, dict[str, dict[int, float]]] = {}
    if section.factors:
        families["effects"] = stats.effects(section.factors, table)
    reference = section.conditions[0]
    if len(section.conditions) > 1 and reference.levels in table:
        labels = {one.levels: one.label for one in section.conditions}
        families["against"] = stats.against(reference.levels, table, lambda where: labels[where])
    return {
        family: stats.compare({name: list(values.values()) for name, values in contrasts.items()}, margin)
        for family, contrasts in families.items()
        if contrasts
    }


def _say_what_is_missing(section: Section) -> None:
    seeds = sorted({run.seed for run in section.runs})
    for kind in ("failed", "diverged", "unfinished"):
        lost = [(one.label, getattr(one, kind)) for one in section.conditions if getattr(one, kind)]
        if lost:
            count = sum(len(found) for _, found in lost)
            where = "; ".join(f"{label} (seeds {_listed(found)})" for label, found in lost[:6])
            more = "" if len(lost) <= 6 else f" and {len(lost) - 6} more conditions"
            section.notes.append(f"left out, {kind}: {count} runs: {where}{more}")
    if len(section.conditions) == 1:
        section.notes.append("one condition: there is nothing to compare it with")
    elif not section.factors:
        section.notes.append("the conditions differ in nothing that was recorded")
    if len(seeds) == 1:
        section.notes.append("one seed: no interval over seeds and no test can be given; run more with 'seed=range(6)'")
    elif len(seeds) < stats.MIN_SEEDS:
        least = 2 / 2 ** len(seeds)
        section.notes.append(
            f"{len(seeds)} seeds: even if all agree, an exact test cannot go below p = {least:.4g}; "
            f"{stats.MIN_SEEDS} are the least to tell conditions apart"
        )
    counts = {one.label: len(next(iter(one.values.values()), {})) for one in section.conditions}
    if len(set(counts.values())) > 1:
        section.notes.append("conditions have unequal seeds; each contrast uses those that all of its conditions have")


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def find_factors(settings: Sequence[dict[str, str]]) -> list[list[str]]:
    """The config keys that vary, as factors. Keys of which one follows from the other, or of whose combinations at most
    half are there, make one factor together; single combinations may be missing."""
    keys = [
        key
        for key in dict.fromkeys(key for one in settings for key in one)
        if key not in SPLIT_KEYS and len({one.get(key) for one in settings}) > 1
    ]
    group = {key: [key] for key in keys}
    for first, second in combinations(keys, 2):
        pairs = {(one.get(first), one.get(second)) for one in settings}
        levels = [len({pair[side] for pair in pairs}) for side in (0, 1)]
        tied = len(pairs) == max(levels) or 2 * len(pairs) <= levels[0] * levels[1]
        if tied and group[first] is not group[second]:
            merged = group[first] + group[second]
            for key in merged:
                group[key] = merged
    return [sorted(factor, key=keys.index) for factor in {id(one): one for one in group.values()}.values()]


def factor_names(factors: Sequence[list[str]]) -> dict[str, list[str]]:
    """Short names for people: the last word of a factor's telling key, its group where that is a class or a name, or
    all of the key where that is ambiguous."""
    telling = [_telling(keys) for keys in factors]
    short = [key.partition(".")[0] if key.rpartition(".")[2] in SILENT else key.rpartition(".")[2] for key in telling]
    return {
        name if short.count(name) == 1 else key: keys for name, key, keys in zip(short, telling, factors, strict=True)
    }


def _telling(keys: Sequence[str]) -> str:
    """The key that says most: a name, else a class, else the first."""
    for end in reversed(SILENT):
        for key in keys:
            if key.rpartition(".")[2] == end:
                return key
    return keys[0]


def level_names(settings: Sequence[dict[str, str]], keys: Sequence[str]) -> list[str]:
    """Each run's level of a factor: the value of its first key; where others differ beside it, those too."""
    first = _telling(keys)
    rest = [key for key in keys if key != first and key.rpartition(".")[2] not in SILENT]
    beside: dict[str, set[tuple[str, ...]]] = {}
    for one in settings:
        beside.setdefault(one.get(first, ""), set()).add(tuple(one.get(key, "") for key in rest))

    def name(one: dict[str, str]) -> str:
        value = one.get(first, "")
        shown = value.rpartition(".")[2] if first.endswith("_target_") else value
        varied = [index for index in range(len(rest)) if len({others[index] for others in beside[value]}) > 1]
        return " ".join([shown, *(f"{rest[i].rpartition('.')[2]}={one.get(rest[i], '')}" for i in varied)])

    return [name(one) for one in settings]
