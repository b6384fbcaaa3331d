"""From runs to comparisons: what was varied, what the seeds of each condition say, and every contrast between them."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations

from gaplab import config as configs
from gaplab import stats
from gaplab.analysis.runs import CLEANED, Run

METRICS = (
    "gap/acc", "gap/acc_clean", "valid/acc", "train/acc", "train/acc_clean", "train/acc_running", "test/acc",
)  # fmt: skip
CURVES = ("valid/acc", "train/acc", "train/acc_clean", "act/unit/p15", "act/unit/p50", "act/unit/p85")
SPLIT_KEYS = ("data.name", "data.valid_size")  # these decide which samples are compared
SPLITS = ("train", "valid", "test")
CHOICES = ("_target_", "name")
COMMON = {  # what every choice of a group has: the other keys of the group come with the choice
    group: {one.name for one in fields(kind)} - set(CHOICES)
    for group, kind in {"model": configs.Model, "optimizer": configs.Optimizer, "scheduler": configs.Scheduler}.items()
}
INTERACTION = " × "  # in its name
WITH_STD = ("normal", "uniform", "trunc_normal")  # initializers that read model.init_std

# what the gap does, what valid accuracy does: the verdict on both, and its tone
OUTCOMES = {
    ("smaller", "higher"): ("helps", "good"),
    ("smaller", "same"): ("smaller gap, no better", "plain"),
    ("smaller", "lower"): ("smaller gap, worse network", "bad"),
    ("smaller", "undecided"): ("smaller gap, valid undecided", "open"),
    ("same", "higher"): ("same gap, better network", "good"),
    ("same", "same"): ("does nothing", "plain"),
    ("same", "lower"): ("same gap, worse network", "bad"),
    ("same", "undecided"): ("same gap, valid undecided", "open"),
    ("larger", "higher"): ("larger gap, better network", "plain"),
    ("larger", "same"): ("larger gap, no worse", "plain"),
    ("larger", "lower"): ("hurts", "bad"),
    ("larger", "undecided"): ("larger gap, valid undecided", "open"),
    ("undecided", "higher"): ("better network, gap undecided", "good"),
    ("undecided", "same"): ("no better, gap undecided", "open"),
    ("undecided", "lower"): ("worse network, gap undecided", "bad"),
    ("undecided", "undecided"): ("undecided", "open"),
}


@dataclass
class Outcome:
    """One contrast in every metric, and the verdict on gap and valid accuracy together; "" where not both are known.

    `tone` is "good" or "bad" where the network gets better or worse, "plain" where neither, "open" where that is not
    decided.
    """

    name: str
    verdict: str
    tone: str
    contrasts: dict[str, stats.Contrast]


def outcome(name: str, contrasts: dict[str, stats.Contrast], gap: str = "gap/acc") -> Outcome:
    """The verdict on what the contrast `name` does to the gap and to valid accuracy; `gap` is the gap's metric."""
    if not contrasts.keys() >= {gap, "valid/acc"}:
        return Outcome(name, "", "open", contrasts)
    first, second = _direction(contrasts[gap]), _direction(contrasts["valid/acc"])
    if INTERACTION in name:  # it has no network that could be better or worse
        both = {first, second}
        verdict = "interact" if both & {"up", "down"} else "independent" if both == {"same"} else "undecided"
        return Outcome(name, verdict, "open" if verdict == "undecided" else "plain", contrasts)
    gap_words, valid_words = {"down": "smaller", "up": "larger"}, {"down": "lower", "up": "higher"}
    return Outcome(name, *OUTCOMES[gap_words.get(first, first), valid_words.get(second, second)], contrasts)


def _direction(one: stats.Contrast) -> str:
    if one.verdict == "real" and one.difference:
        return "up" if one.difference > 0 else "down"
    return "same" if one.verdict == "equivalent" else "undecided"


def bounds(metric: str) -> tuple[float, float]:
    """Between which every value of a metric lies."""
    return (-math.inf, math.inf) if "/acc" not in metric else (-1.0, 1.0) if "gap/acc" in metric else (0.0, 1.0)


def judge_differences(metric: str, differences: Mapping[str, Iterable[float]], margin: float) -> list[stats.Contrast]:
    """`stats.compare` of differences between values of a metric; its intervals end where no difference can lie."""
    low, high = bounds(metric)
    found = []
    for one in stats.compare({name: list(values) for name, values in differences.items()}, margin):
        reach = (high - low) * (2 if INTERACTION in one.name else 1)
        if one.low is not None and one.high is not None:
            one = replace(one, low=max(one.low, -reach), high=min(one.high, reach))
        found.append(one)
    return found


@dataclass
class Condition:
    """The replicates of one condition.

    Attributes:
        label: for people, the levels in words.
        levels: one for each factor.
        values: {metric: {seed: last value}} of the runs that finished.
        failed, diverged, unfinished: seeds of the runs that did not finish.
        runs: one for each seed, chosen by `one_per_seed`.
    """

    label: str
    levels: stats.Levels
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "FINISHED"]

    def estimate(self, metric: str) -> stats.Estimate | None:
        values = list(self.values.get(metric, {}).values())
        return stats.estimate(values, bounds=bounds(metric)) if values else None

    def curve(self, metric: str) -> dict[int, float]:
        """{step: mean over the runs that finished}, at the steps that all of them have."""
        curves = [run.history[metric] for run in self.finished if metric in run.history]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}


@dataclass
class Section:
    """The runs on one data set and split, compared with each other.

    Attributes:
        data: name of the data set, and what tells it from other sections of that name.
        factors: {name: its levels, the reference first}.
        keys: {factor: the config keys that it is made of}.
        conditions: in the order of the runs; the first is the reference.
        gap: the metric of the gap: "gap/acc_clean" where any condition has label noise.
        facts: what the runs are, for people.
        contrasts: {metric: {"effects" or "against": one family}}.
        outcomes: {family: one for each contrast}.
        notes: what is left out or cannot be said.
    """

    data: str
    factors: dict[str, list[str]]
    keys: dict[str, list[str]]
    conditions: list[Condition]
    gap: str = "gap/acc"
    facts: dict[str, str] = field(default_factory=dict)
    contrasts: dict[str, dict[str, list[stats.Contrast]]] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for condition in self.conditions for run in condition.runs]

    @property
    def best(self) -> Condition | None:
        """The condition of the highest mean valid accuracy, of those without a lost run if there are any."""
        known = [one for one in self.conditions if one.values.get("valid/acc")]
        whole = [one for one in known if not one.failed and not one.diverged]
        return max(whole or known, key=lambda one: statistics.fmean(one.values["valid/acc"].values()), default=None)

    def table(self, metric: str) -> dict[stats.Levels, dict[int, float]]:
        return {one.levels: one.values[metric] for one in self.conditions if one.values.get(metric)}


def one_per_seed(runs: Iterable[Run]) -> list[Run]:
    """Of the runs of one condition the one of each seed whose numbers count: for tables, claims and figures.

    A finished run counts before one that diverged, and that before any other; of two alike, the later one.
    """
    chosen: dict[int, Run] = {}
    for run in runs:
        if run.seed not in chosen or _standing(run) >= _standing(chosen[run.seed]):
            chosen[run.seed] = run
    return list(chosen.values())


def _standing(run: Run) -> int:
    return 2 if run.status == "FINISHED" else int(run.diverged)


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
    found = [_section(group, metrics, margin) for group in groups.values()]
    for part, group in zip(found, groups.values(), strict=True):
        part.data += _told_apart(group, [one for one in groups.values() if one is not group])
    return found


def _told_apart(group: list[Run], others: list[list[Run]]) -> str:
    """What a section has otherwise than those of the same data set, in brackets; nothing where there is none."""
    first = group[0]
    alike = [one[0] for one in others if one[0].settings.get("data.name") == first.settings.get("data.name")]
    keys = [
        key
        for key in ("data.valid_size", "data.image_size", "data.channels")
        if any(one.settings.get(key) != first.settings.get(key) for one in alike)
    ]
    words = [f"{key.partition('.')[2]}={first.settings.get(key)}" for key in keys]
    if alike and not words:
        words = [f"digest {first.digest or 'unknown'}"]
    return f" ({', '.join(words)})" if words else ""


def _section(runs: list[Run], metrics: Sequence[str], margin: float) -> Section:
    factors = find_factors([run.settings for run in runs])
    names = factor_names(factors)
    levels = {name: level_names([run.settings for run in runs], keys) for name, keys in names.items()}
    noisy = any(run.noisy for run in runs)
    replicates: dict[stats.Levels, list[Run]] = {}
    for index, run in enumerate(runs):
        replicates.setdefault(tuple(levels[name][index] for name in names), []).append(run)
    found = Section(
        runs[0].settings.get("data.name", "?"),
        {name: list(dict.fromkeys(levels[name])) for name in names},
        names,
        [_condition(mine, where, list(names), noisy) for where, mine in replicates.items()],
    )
    if noisy:
        found.gap = "gap/acc_clean"
        metrics = [f"{metric}_clean" if metric in CLEANED else metric for metric in metrics]
    found.facts = _facts(found)
    _note_what_runs_share(found, len(runs), noisy)
    _say_what_is_missing(found, metrics)
    for metric in metrics:
        found.contrasts[metric] = _contrasts(found, metric, margin)
    for family in dict.fromkeys(family for families in found.contrasts.values() for family in families):
        by_name: dict[str, dict[str, stats.Contrast]] = {}
        for metric, families in found.contrasts.items():
            for one in families.get(family, []):
                by_name.setdefault(one.name, {})[metric] = one
        found.outcomes[family] = [outcome(name, contrasts, found.gap) for name, contrasts in by_name.items()]
    valid = min((run.sizes["valid"] for run in found.runs if run.sizes.get("valid")), default=0)
    if valid and margin * valid < 2:
        found.notes.append(
            f"{valid} validation images: one image is {100 / valid:.2g} pp of accuracy, so they can hardly show that a "
            f"difference is within {100 * margin:g} pp; about {math.ceil(2 / margin)} or more can, or a larger margin"
        )
    return found


def _condition(runs: list[Run], levels: stats.Levels, names: Sequence[str], noisy: bool) -> Condition:
    """Without label noise the labels trained on are the clean ones, beside conditions that have it."""
    label = " ".join(f"{name}={level}" for name, level in zip(names, levels, strict=True))
    found = Condition(label or runs[0].settings.get("model.name", "all"), levels, runs=one_per_seed(runs))
    for run in found.runs:
        if run.status == "FINISHED":
            metrics = dict(run.metrics)
            if noisy and not run.noisy:
                metrics |= {f"{name}_clean": metrics[name] for name in CLEANED if name in metrics}
            for metric, value in metrics.items():
                found.values.setdefault(metric, {})[run.seed] = value
        elif run.diverged:
            found.diverged.append(run.seed)
        else:
            (found.failed if run.status == "FAILED" else found.unfinished).append(run.seed)
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
        family: judge_differences(metric, {name: values.values() for name, values in contrasts.items()}, margin)
        for family, contrasts in families.items()
        if contrasts
    }


def _note_what_runs_share(section: Section, runs: int, noisy: bool) -> None:
    """How the runs of a section were made, where that is not the same for all."""
    notes = section.notes
    kinds = Counter(run.batchnorm for run in section.runs if run.batchnorm)
    notes += [f"BatchNorm {kind} ({count} runs)" for kind, count in sorted(kinds.items())]
    if repeated := runs - len(section.runs):
        notes.append(
            f"{repeated} runs repeat a condition and seed; of each such group one counts: a finished run before one "
            "that diverged, that before any other, and of two alike the later one"
        )
    for name, keys in section.keys.items():
        tied = [key for key in keys if _is_named(key, keys)]
        values = {tuple(run.settings.get(key) for key in tied) for run in section.runs}
        if len(tied) > 1 and all(len({one[i] for one in values}) == len(values) for i in range(len(tied))):
            notes.append(f"{name}: {', '.join(tied)} always vary together, so their effects cannot be told apart")
    if noisy:
        notes.append(
            "data.label_noise: verdicts and learning curves take the gap and the train split against the true labels "
            "(gap/acc_clean, train/acc_clean); train/acc counts the labels trained on, the wrong ones included"
        )
    steps = {one.label: {_steps(run) for run in one.runs} - {0} for one in section.conditions}
    distinct = {step for found in steps.values() for step in found}
    if len(distinct) > 1:
        shown = [f"{label} {' or '.join(map(str, sorted(found)))}" for label, found in list(steps.items())[:6] if found]
        more = " …" if len(steps) > 6 else ""
        notes.append(f"conditions differ in their number of optimizer steps, about: {'; '.join(shown)}{more}")


def _steps(run: Run) -> int:
    """Optimizer steps of a run that was not stopped early; 0 where that is not known."""
    try:
        train, keys = run.sizes["train"], ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.max_epochs")
        batch, accumulated, epochs = (int(run.settings[key]) for key in keys)
        return math.ceil(train / (batch * accumulated)) * epochs
    except (KeyError, ValueError, ZeroDivisionError):
        return 0


def _facts(section: Section) -> dict[str, str]:
    """What the runs are: the network, how it is trained, the data."""
    runs, varied = section.runs, {key for keys in section.keys.values() for key in keys}

    def of(key: str) -> str:
        return _values(run.settings.get(key, "") for run in runs)

    def group(name: str, *keys: str) -> str:
        """The choice of a group and some of its settings, without those that tell the conditions apart."""
        choice = f"{name}.name" if of(f"{name}.name") not in ("", "custom") else f"{name}._target_"
        shown = [key for key in keys if f"{name}.{key}" not in varied and of(f"{name}.{key}")]
        chosen = _values(_level(choice, run.settings) for run in runs if choice in run.settings)
        return " ".join([chosen, *(f"{key}={of(f'{name}.{key}')}" for key in shown)]).strip()

    params = sorted({run.params for run in runs if run.params})
    images = {split: _values(f"{run.sizes[split]:,}" for run in runs if split in run.sizes) for split in SPLITS}
    found = {
        "network": group("model", "hidden_dims", "widths", "depth", "arch", "bn", "dropout", "init", "activation"),
        "parameters": f"{params[0]:,}" + (f" to {params[-1]:,}" if len(params) > 1 else "") if params else "",
        "optimizer": group("optimizer", "lr", "weight_decay", "momentum"),
        "schedule": group("scheduler"),
        "epochs": of("trainer.max_epochs"),
        "batch size": of("data.batch_size"),
        "images": ", ".join(f"{size} {split}" for split, size in images.items() if size),
        "data": " in ".join(filter(None, [section.data, _values(run.root for run in runs)])),
    }
    return {name: text for name, text in found.items() if text}


def _values(values: Iterable[str]) -> str:
    """The distinct ones, at most four of them."""
    found = list(dict.fromkeys(value for value in values if value))
    return ", ".join(found[:4]) + (f" … ({len(found)} values)" if len(found) > 4 else "")


def _say_what_is_missing(section: Section, metrics: Sequence[str]) -> None:
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
    for metric in metrics:
        without = sum(len(one.finished) - len(one.values.get(metric, {})) for one in section.conditions)
        if without:
            section.notes.append(f"{metric}: {without} runs that finished have none")
    counts = {one.label: len(one.finished) for one in section.conditions}
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
    short = [_short(key) for key in telling]
    return {
        name if short.count(name) == 1 else key: keys for name, key, keys in zip(short, telling, factors, strict=True)
    }


def _short(key: str) -> str:
    group, _, last = key.partition(".")[0], *key.rpartition(".")[1:]
    return group if last in CHOICES else last


def _telling(keys: Sequence[str]) -> str:
    """The key that says most: a name, else a class, else the first."""
    for end in reversed(CHOICES):
        for key in keys:
            if key.rpartition(".")[2] == end:
                return key
    return keys[0]


def _is_named(key: str, keys: Sequence[str]) -> bool:
    """Whether a level of the factor of `keys` names this one; the others come with the choice of a class."""
    group, _, rest = key.partition(".")
    chosen = [one for one in keys if one.partition(".")[0] == group and one.rpartition(".")[2] in CHOICES]
    if not chosen:
        return True
    return key == _telling(chosen) or (key not in chosen and rest.partition(".")[0] in COMMON.get(group, ()))


def level_names(settings: Sequence[dict[str, str]], keys: Sequence[str]) -> list[str]:
    """Each run's level of a factor: the value of its telling key, then all that varies together with it.

    What the choice of a class brings along is left out where it does not vary within that class. Two levels never have
    one name: where the short ones agree, all keys are written out.
    """
    first = _telling(keys)
    named = [key for key in keys if key != first and _is_named(key, keys)]
    brought = [key for key in keys if key != first and key not in named and key.rpartition(".")[2] not in CHOICES]
    short = [_short(key) for key in [first, *named, *brought]]
    within: dict[str | None, list[dict[str, str]]] = {}
    for one in settings:
        within.setdefault(one.get(first), []).append(one)

    def name(one: dict[str, str], whole: bool) -> str:
        value = one.get(first, "–")
        if whole:
            return " ".join([value, *(f"{key}={one.get(key, '–')}" for key in keys if key != first)])
        alike = within[one.get(first)]
        shown = named + [key for key in brought if len({other.get(key) for other in alike}) > 1]
        words = [
            f"{_short(key) if short.count(_short(key)) == 1 else key}={_level(key, one)}"
            for key in shown
            if key != "model.init_std" or one.get("model.init", WITH_STD[0]) in WITH_STD
        ]
        return " ".join([_level(first, one), *words])

    names = [name(one, False) for one in settings]
    levels = {tuple(one.get(key) for key in keys) for one in settings}
    return names if len(set(names)) == len(levels) else [name(one, True) for one in settings]


def _level(key: str, one: dict[str, str]) -> str:
    value = one.get(key, "–")
    return value.rpartition(".")[2] if key.endswith("_target_") else value
