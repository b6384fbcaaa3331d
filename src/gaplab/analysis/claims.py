"""The claims of the BatchNorm literature, and the rule that turns a sweep's numbers into a verdict on each.

Supported, contradicted or inconclusive: a verdict is a measurement on the runs at hand. Where a claim is about a ratio,
its logarithm is compared, paired by seed, and two quantities within 10 % of each other count as equal.

References:
    Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015, arXiv:1502.03167, for the claims.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from gaplab import stats
from gaplab.analysis.compare import Condition, Section, judge_differences, outcome
from gaplab.analysis.runs import Run
from gaplab.config import QUESTIONS

RATIO_MARGIN = math.log(1.1)
STABLE_WITHIN = 0.05  # a rate is stable when it costs at most this much of the valid accuracy of the best one
EXACT = 1e-10


@dataclass
class Verdict:
    claim: str
    question: str
    verdict: str  # "supported", "contradicted" or "inconclusive"
    summary: str
    evidence: list[str] = field(default_factory=list)
    seeds_needed: int | None = None


class CannotSayError(Exception):
    """The runs lack what the claim is about."""


def judge(claim: str, section: Section, margin: float) -> Verdict:
    """The verdict on `claim`, one of `config.CLAIMS`; `margin` of accuracy counts as equal."""
    try:
        found = RULES[claim](section, margin)
    except CannotSayError as error:
        found = Verdict("", "", "inconclusive", str(error))
    found.claim, found.question = claim, QUESTIONS[claim]
    if found.verdict != "inconclusive":
        found.seeds_needed = None
    return found


def overfitting(section: Section, margin: float) -> Verdict:
    """Each toggle alone against the plain network, in one Holm family per metric with every other condition.

    The plain network is the condition without BatchNorm and with the least dropout, first where others vary too.
    """
    plain = min(_arms(section)["false"], key=lambda one: _number(one, "model.dropout", 0.0))
    labels = {one.levels: one.label for one in section.conditions}
    families = {}
    for metric in (section.gap, "valid/acc"):
        table = section.table(metric)
        if plain.levels not in table:
            raise CannotSayError(f"no run of {plain.label} finished with {metric}")
        differences = stats.against(plain.levels, table, lambda levels: labels[levels])
        family = judge_differences(metric, {name: found.values() for name, found in differences.items()}, margin)
        families[metric] = {one.name: one for one in family}
    evidence, decided = [f"plain network, {plain.label}: gap {_pp(_mean(plain, section.gap), sign=False)}"], None
    for one in section.conditions:
        changed = _differing(one, plain)
        if (
            not all(one.label in contrasts for contrasts in families.values())
            or sum(a != b for a, b in zip(one.levels, plain.levels, strict=True)) != 1
        ):
            continue
        mine = {metric: contrasts[one.label] for metric, contrasts in families.items()}
        gap, valid = mine.values()
        both = outcome("", mine, section.gap).verdict
        evidence.append(f"{_changed(section, one, plain)}: gap {_said(gap)}; valid accuracy {_said(valid)}: {both}")
        if changed == {"model.bn"}:
            decided = gap, valid, both
    if decided is None:
        raise CannotSayError("needs runs that differ from the plain network in model.bn alone")
    gap, valid, both = decided
    verdict = _one_sided(gap, -1)
    price = ""
    if valid.verdict == "real" and valid.difference is not None:
        direction = "raises" if valid.difference > 0 else "lowers"
        price = f", and {direction} valid accuracy by {_pp(abs(valid.difference), sign=False)}"
    summary = {
        "supported": f"BatchNorm shrinks the gap ({_pp(gap.difference)}{price})",
        "contradicted": f"BatchNorm does not shrink the gap ({_pp(gap.difference)}, {gap.verdict}{price})",
        "inconclusive": f"the effect of BatchNorm on the gap is not decided ({_pp(gap.difference)}{price})",
    }[verdict] + f": {both}"
    return Verdict("", "", verdict, summary, evidence, gap.seeds_needed)


def higher_lr(section: Section, margin: float) -> Verdict:
    """The largest stable rate with BatchNorm over that without, and the epochs to the plain network's best accuracy.

    Rates closer than half a step of the grid count as equal. Where both are stable at the largest rate tried, their
    ratio is not known. Where BatchNorm never gets to the accuracy, one epoch more than trained stands for its time.
    """
    arms = _arms(section)
    _only(section, {"model.bn", "optimizer.lr"})
    grid = sorted({_number(one, "optimizer.lr") for one in section.conditions})
    if len(grid) < 2:
        raise CannotSayError("needs runs that differ in optimizer.lr")
    rates, epochs, missed, open_end, top = [], [], 0, 0, 0
    seeds = _common_seeds(section)
    for seed in seeds:
        by_rate = {bn: {_number(one, "optimizer.lr"): _run(one, seed) for one in arms[bn]} for bn in arms}
        stable = {bn: _largest_stable(runs) for bn, runs in by_rate.items()}
        if stable["true"] is None or stable["false"] is None:
            continue
        open_end += stable["true"] == stable["false"] == grid[-1]
        top += stable["true"] == grid[-1]
        rates.append(math.log(stable["true"] / stable["false"]))
        target = max(max(_curve(run).values(), default=0.0) for run in by_rate["false"].values())
        first = {bn: [one for run in runs.values() if (one := _first(run, target))] for bn, runs in by_rate.items()}
        missed += not first["true"]
        last = max(max(_curve(run), default=0) for run in by_rate["true"].values())
        epochs.append(math.log(min(first["true"], default=last + 1) / min(first["false"])))
    if not rates:
        raise CannotSayError("no seed has a stable rate both with and without BatchNorm")
    step = min(math.log(high / low) for low, high in pairwise(grid))
    (rate,) = stats.compare({"rate": rates}, step / 2)
    (epoch,) = stats.compare({"epochs": epochs}, RATIO_MARGIN)
    allows = "inconclusive" if open_end else _one_sided(rate, 1)
    faster = _one_sided(epoch, -1)
    evidence = [
        f"largest stable learning rate, with BatchNorm over without: {_ratio(rate)}",
        f"epochs to the plain network's best valid accuracy, with over without: {_ratio(epoch)}",
        *_matched_rates(section, arms, margin),
        f"stable: finite, and valid accuracy within {_pp(STABLE_WITHIN, sign=False)} of the best rate's",
    ]
    if top:
        evidence[0] += (
            f"; the largest rate tried ({grid[-1]:g}) was still stable with it in {top} of {len(seeds)} seeds"
        )
    if open_end:
        evidence[0] += f", and without it in {open_end}: larger rates would tell"
    if missed:
        evidence[1] += f"; not reached with BatchNorm in {missed} of {len(seeds)} seeds"
    both = {allows, faster}
    verdict = "supported" if both == {"supported"} else "contradicted" if "contradicted" in both else "inconclusive"
    summary = (
        f"{_times(rate)} the largest stable learning rate ({allows}), and {_times(epoch)} the epochs to the plain "
        f"network's best accuracy ({faster})"
    )
    return Verdict("", "", verdict, summary, evidence, _most_seeds([rate, epoch]))


def init_robustness(section: Section, margin: float) -> Verdict:
    """The spread of valid accuracy over initializers, with BatchNorm over without; a diverged run counts as chance."""
    arms = _arms(section)
    _only(section, {"model.bn", "model.init", "model.init_std", "model.init_gain"})
    spreads: dict[str, list[float]] = {"true": [], "false": []}
    for seed in _common_seeds(section):
        found = {bn: [_accuracy(_run(one, seed)) for one in arms[bn]] for bn in arms}
        if all(len(values) > 1 and None not in values for values in found.values()):
            for bn, values in found.items():
                spreads[bn].append(statistics.stdev(value for value in values if value is not None))
    if len(spreads["true"]) < 2:
        raise CannotSayError("needs two initializers and two seeds, each with model.bn=false and true")
    pairs = [pair for pair in zip(spreads["true"], spreads["false"], strict=True) if min(pair) > 0]
    if len(pairs) < len(spreads["true"]):
        raise CannotSayError(
            "with some seeds all initializers end at the same accuracy (or all diverge): no ratio of spreads"
        )
    (contrast,) = stats.compare({"spread": [math.log(a / b) for a, b in pairs]}, RATIO_MARGIN)
    ratio, low, high = stats.bootstrap_ratio([a for a, _ in pairs], [b for _, b in pairs])
    verdict = _one_sided(contrast, -1)
    evidence = [
        f"spread of valid accuracy over {len(arms['true'])} initializers: "
        f"{_pp(statistics.mean(spreads['true']), sign=False)} with BatchNorm, "
        f"{_pp(statistics.mean(spreads['false']), sign=False)} without (sd, mean over {len(pairs)} seeds)",
        f"ratio, paired by seed: {_ratio(contrast)}",
        f"ratio of the means {ratio:.2f}, bootstrap interval [{low:.2f}, {high:.2f}]",
        *(
            f"{_but_bn(section, one)}: {_shown(one)} against {_shown(other)} (with, without)"
            for one, other in _pairs(arms)
        ),
    ]
    words = {"supported": "less", "contradicted": "no less", "inconclusive": "perhaps not less"}
    summary = f"with BatchNorm the result depends {words[verdict]} on the initializer: {ratio:.2f} times the spread"
    return Verdict("", "", verdict, summary, evidence, contrast.seeds_needed)


def dropout_redundant(section: Section, margin: float) -> Verdict:
    """Whether dropout gains nothing in valid accuracy beside BatchNorm, though it does without, and the two differ."""
    arms = _arms(section)
    _only(section, {"model.bn", "model.dropout"})
    level = {bn: {_number(one, "model.dropout"): one for one in arms[bn]} for bn in arms}
    if not all(0.0 in found and len(found) > 1 for found in level.values()):
        raise CannotSayError("needs runs with model.dropout=0 and another, each with model.bn=false and true")
    gains = {
        bn: {f"{dropout:g}": _paired(one, found[0.0], "valid/acc") for dropout, one in found.items() if dropout}
        for bn, found in level.items()
    }
    beside, alone = (
        {one.name: one for one in judge_differences("valid/acc", {d: g.values() for d, g in gains[bn].items()}, margin)}
        for bn in ("true", "false")
    )
    shared = {
        d: [
            gains["true"][d][seed] - gains["false"][d][seed]
            for seed in gains["true"][d].keys() & gains["false"][d].keys()
        ]
        for d in gains["true"].keys() & gains["false"].keys()
    }
    # differences of gains reach as far as those of gaps
    interactions = {one.name: one for one in judge_differences("gap/acc", dict(sorted(shared.items())), margin)}
    evidence = [
        f"{where} BatchNorm, dropout {one.name} against none: valid accuracy {_said(one)}"
        for where, family in (("with", beside), ("without", alone))
        for one in family.values()
    ]
    evidence += [f"interaction at dropout {one.name}: valid accuracy {_said(one)}" for one in interactions.values()]
    if any(_gain(one) == "better" for one in beside.values()):
        return Verdict("", "", "contradicted", "beside BatchNorm dropout still raises valid accuracy", evidence)
    if any(_gain(one) == "undecided" for one in beside.values()):
        summary = "whether dropout gains anything beside BatchNorm is not decided"
        return Verdict("", "", "inconclusive", summary, evidence, _most_seeds(beside.values()))
    useful = [name for name, one in alone.items() if _gain(one) == "better" and name in interactions]
    if any(_one_sided(interactions[name], -1) == "supported" for name in useful):
        summary = "dropout raises valid accuracy without BatchNorm, and gains nothing beside it"
        return Verdict("", "", "supported", summary, evidence)
    if useful:
        summary = "dropout gains nothing beside BatchNorm and something without, but the difference is not decided"
        return Verdict("", "", "inconclusive", summary, evidence, _most_seeds(interactions.values()))
    summary = "dropout gains nothing beside BatchNorm, but without it neither: this task cannot tell"
    return Verdict("", "", "inconclusive", summary, evidence, _most_seeds(alone.values()))


def activations(section: Section, margin: float) -> Verdict:
    """How far the 15th and 85th percentiles of the activation functions' inputs go, and how much they move.

    Two runs are compared over the looks that both have; a pair with fewer than 3 is left out.
    """
    arms = _arms(section)
    pairs = list(_pairs(arms))
    height: list[float] = []
    drift: list[float] = []
    for seed in _common_seeds(section):
        looks = [found for one, other in pairs if (found := _looks(_run(one, seed), _run(other, seed)))]
        if looks:
            height.append(statistics.mean(math.log(_height(one) / _height(other)) for one, other in looks))
            drift.append(statistics.mean(math.log(_drift(one) / _drift(other)) for one, other in looks))
    if not height:
        raise CannotSayError("needs pairs of runs with trainer.log_activations_every, with model.bn=false and true")
    high, moved = stats.compare({"height": height, "drift": drift}, RATIO_MARGIN)
    verdicts = _one_sided(high, -1), _one_sided(moved, -1)
    evidence = [
        f"largest absolute percentile (15th, 85th) of any layer, with BatchNorm over without: {_ratio(high)}",
        f"movement of the percentiles (sd over training, mean over layers), with over without: {_ratio(moved)}",
    ]
    for one, other in pairs:
        both = [found for seed in _common_seeds(section) if (found := _looks(_run(one, seed), _run(other, seed)))]
        if both:
            values = [
                statistics.mean(measure(run[arm]) for run in both) for measure in (_height, _drift) for arm in (0, 1)
            ]
            evidence.append(
                f"{_but_bn(section, one)}: largest percentile {values[0]:.2f} with, {values[1]:.2f} without; "
                f"movement {values[2]:.3f} and {values[3]:.3f} ({len(both)} seeds)"
            )
    verdict = "contradicted" if "contradicted" in verdicts else "inconclusive"
    if set(verdicts) == {"supported"}:
        verdict = "supported"
    summary = (
        f"inputs of the activation functions go {_times(high)} as far from 0 ({verdicts[0]}) and move {_times(moved)} "
        f"as much during training ({verdicts[1]})"
    )
    return Verdict("", "", verdict, summary, evidence, _most_seeds([high, moved]))


def identity(section: Section, margin: float) -> Verdict:
    """The largest relative error of trained layers whose alpha and beta were set to restore their input, in float64."""
    finished = [run.metrics for one in section.conditions for run in one.finished]
    errors = [metrics["bn/identity_error"] for metrics in finished if "bn/identity_error" in metrics]
    if not errors:
        raise CannotSayError("needs runs with model.bn=true and trainer.log_activations_every")
    worst = max(errors)
    verdict = "supported" if worst <= EXACT else "contradicted"
    summary = f"the restored layers differ from the identity by at most {worst:.1e} of the largest input"
    return Verdict(
        "", "", verdict, summary, [f"{len(errors)} trained networks in float64; asked for: at most {EXACT:g}"]
    )


RULES: dict[str, Callable[[Section, float], Verdict]] = {
    "overfitting": overfitting,
    "higher_lr": higher_lr,
    "init_robustness": init_robustness,
    "dropout_redundant": dropout_redundant,
    "activations": activations,
    "identity": identity,
}


def _one_sided(contrast: stats.Contrast, sign: int) -> str:
    """A claim that the difference has `sign`: one of the other sign, or one that is as good as 0, contradicts it."""
    if contrast.verdict == "inconclusive" or contrast.difference is None:
        return "inconclusive"
    return "supported" if contrast.verdict == "real" and contrast.difference * sign > 0 else "contradicted"


def _gain(contrast: stats.Contrast) -> str:
    if contrast.verdict == "inconclusive" or contrast.difference is None:
        return "undecided"
    return "better" if contrast.verdict == "real" and contrast.difference > 0 else "no better"


def _setting(condition: Condition, key: str) -> str | None:
    return condition.runs[0].settings.get(key)


def _number(condition: Condition, key: str, otherwise: float | None = None) -> float:
    value = _setting(condition, key)
    if value is None and otherwise is not None:
        return otherwise
    try:
        return float(value or "")
    except ValueError:
        raise CannotSayError(f"{key}={value} is not a number") from None


def _differing(one: Condition, other: Condition) -> set[str]:
    """The keys in which two conditions differ."""
    first, second = one.runs[0].settings, other.runs[0].settings
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def _only(section: Section, keys: set[str]) -> None:
    """A rule over a grid says nothing where more than the grid was varied."""
    more = {key for one in section.conditions[1:] for key in _differing(one, section.conditions[0])} - keys
    if more:
        raise CannotSayError(
            f"the runs differ in {', '.join(sorted(more))} too; the rule needs runs that differ in "
            f"{' and '.join(sorted(keys))} alone"
        )


def _arms(section: Section) -> dict[str, list[Condition]]:
    """The conditions with and without BatchNorm."""
    arms = {
        level: [one for one in section.conditions if _setting(one, "model.bn") == level] for level in ("true", "false")
    }
    if not all(arms.values()):
        raise CannotSayError("needs runs with model.bn=false and true")
    return arms


def _pairs(arms: dict[str, list[Condition]]) -> Iterator[tuple[Condition, Condition]]:
    """Conditions with and without BatchNorm that differ in nothing else."""
    for one in arms["true"]:
        for other in arms["false"]:
            if _differing(one, other) == {"model.bn"}:
                yield one, other


def _common_seeds(section: Section) -> list[int]:
    """Seeds of which every condition has an ended run, diverged or not."""
    seeds = [{run.seed for run in one.runs if run.status == "FINISHED" or run.diverged} for one in section.conditions]
    return sorted(set.intersection(*seeds)) if seeds else []


def _run(condition: Condition, seed: int) -> Run:
    return next(run for run in condition.runs if run.seed == seed)


def _accuracy(run: Run) -> float | None:
    if run.diverged:
        return 1 / run.classes if run.classes else None
    return run.metrics.get("valid/acc")


def _curve(run: Run) -> dict[int, float]:
    return run.history.get("valid/acc", {})


def _first(run: Run, target: float) -> int | None:
    return min((epoch for epoch, value in _curve(run).items() if value >= target), default=None)


def _largest_stable(runs: dict[float, Run]) -> float | None:
    final = {lr: run.metrics["valid/acc"] for lr, run in runs.items() if run.status == "FINISHED" and _curve(run)}
    best = max(final.values(), default=0.0)
    return max((lr for lr, value in final.items() if value >= best - STABLE_WITHIN), default=None)


def _matched_rates(section: Section, arms: dict[str, list[Condition]], margin: float) -> list[str]:
    """The difference at the two lowest rates."""
    pairs = sorted(_pairs(arms), key=lambda pair: _number(pair[0], "optimizer.lr"))[:2]
    found = judge_differences(
        "valid/acc",
        {f"{_number(one, 'optimizer.lr'):g}": _paired(one, other, "valid/acc").values() for one, other in pairs},
        margin,
    )
    return [f"at the rate {one.name}, with BatchNorm minus without: valid accuracy {_said(one)}" for one in found]


def _paired(one: Condition, other: Condition, metric: str) -> dict[int, float]:
    first, second = one.values.get(metric, {}), other.values.get(metric, {})
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


Looks = list[list[float]]  # the 15th, 50th and 85th percentile of each layer: a list over training for each


def _looks(one: Run, other: Run) -> tuple[Looks, Looks] | None:
    """Both runs' percentiles at the steps that both have."""
    names = sorted(
        name
        for name in one.history.keys() & other.history.keys()
        if name.startswith("act/") and not name.startswith("act/unit/") and name.endswith(("/p15", "/p50", "/p85"))
    )
    if not names:
        return None
    steps = sorted(set.intersection(*(set(run.history[name]) for run in (one, other) for name in names)))
    if len(steps) < 3:
        return None
    first, second = ([[run.history[name][step] for step in steps] for name in names] for run in (one, other))
    return first, second


def _height(looks: Looks) -> float:
    return max(1e-12, *(abs(value) for values in looks for value in values))


def _drift(looks: Looks) -> float:
    return max(statistics.mean(statistics.pstdev(values) for values in looks), 1e-12)


def _changed(section: Section, condition: Condition, reference: Condition) -> str:
    return " ".join(
        f"{name}={level}"
        for name, level, before in zip(section.factors, condition.levels, reference.levels, strict=True)
        if level != before
    )


def _but_bn(section: Section, condition: Condition) -> str:
    """The levels of a condition without BatchNorm's."""
    return " ".join(
        level for level, keys in zip(condition.levels, section.keys.values(), strict=True) if "model.bn" not in keys
    )


def _shown(condition: Condition) -> str:
    mean = _mean(condition, "valid/acc")
    lost = f" ({len(condition.diverged)} of {len(condition.runs)} diverged)" if condition.diverged else ""
    return ("no run" if mean is None else f"{mean:.4f}") + lost


def _mean(condition: Condition, metric: str) -> float | None:
    estimate = condition.estimate(metric)
    return None if estimate is None else estimate.mean


def _most_seeds(contrasts: Iterable[stats.Contrast]) -> int | None:
    needed = [one.seeds_needed for one in contrasts if one.seeds_needed is not None]
    return max(needed, default=None)


def _pp(value: float | None, sign: bool = True) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.2f} pp"


def _said(one: stats.Contrast) -> str:
    """`-0.12 pp [-0.20, -0.04], real`."""
    interval = "" if one.low is None or one.high is None else f" [{100 * one.low:+.2f}, {100 * one.high:+.2f}]"
    needed = f" ({one.seeds_needed} seeds would decide)" if one.seeds_needed else ""
    return f"{_pp(one.difference)}{interval}, {one.verdict}{needed}"


def _times(one: stats.Contrast) -> str:
    return "–" if one.difference is None else f"{math.exp(one.difference):.3g} times"


def _ratio(one: stats.Contrast) -> str:
    if one.difference is None:
        return "no seed tells"
    interval = ""
    if one.low is not None and one.high is not None:
        interval = f" [{math.exp(one.low):.3g}, {math.exp(one.high):.3g}]"
    needed = f" ({one.seeds_needed} seeds would decide)" if one.seeds_needed else ""
    return f"{math.exp(one.difference):.3g} times{interval}, {one.verdict} over {one.n} seeds{needed}"
