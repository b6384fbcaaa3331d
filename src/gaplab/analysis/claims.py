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

from gaplab import stats
from gaplab.analysis.compare import Condition, Section
from gaplab.analysis.runs import Run

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
    question, rule = RULES[claim]
    try:
        found = rule(section, margin)
    except CannotSayError as error:
        found = Verdict("", "", "inconclusive", str(error))
    found.claim, found.question = claim, question
    return found


def overfitting(section: Section, margin: float) -> Verdict:
    """Each toggle alone against the reference, in one Holm family per metric with every other condition."""
    reference = section.conditions[0]
    singles = [
        one
        for one in section.conditions[1:]
        if sum(a != b for a, b in zip(one.levels, reference.levels, strict=True)) == 1
    ]
    bn_factor = _factor(section, "model.bn")
    evidence, decided = [f"reference {reference.label}: gap {_pp(_mean(reference, 'gap/acc'), sign=False)}"], None
    for one in singles:
        gap, valid = (_against(section, metric, one) for metric in ("gap/acc", "valid/acc"))
        if gap is None or valid is None:
            continue
        evidence.append(f"{_changed(section, one)}: gap {_said(gap)}; valid accuracy {_said(valid)}")
        if one.levels[bn_factor] != reference.levels[bn_factor]:
            decided = gap, valid
    if decided is None:
        raise CannotSayError("needs runs that differ from the reference in model.bn alone")
    gap, valid = decided
    verdict = _one_sided(gap, -1)
    price = ""
    if valid.verdict == "real" and valid.difference is not None:
        direction = "raises" if valid.difference > 0 else "lowers"
        price = f", and {direction} valid accuracy by {_pp(abs(valid.difference), sign=False)}"
    summary = {
        "supported": f"BatchNorm shrinks the gap ({_pp(gap.difference)}{price})",
        "contradicted": f"BatchNorm does not shrink the gap ({_pp(gap.difference)}, {gap.verdict}{price})",
        "inconclusive": f"the effect of BatchNorm on the gap is not decided ({_pp(gap.difference)}{price})",
    }[verdict]
    return Verdict("", "", verdict, summary, evidence, gap.seeds_needed)


def higher_lr(section: Section, margin: float) -> Verdict:
    """The largest stable rate with BatchNorm over that without, and the epochs to the plain network's best accuracy."""
    arms = _arms(section)
    lr = _factor(section, "optimizer.lr")
    rates, epochs, unreached, top = [], [], 0, 0
    seeds = _common_seeds(section)
    highest = max(float(one.levels[lr]) for one in section.conditions)
    for seed in seeds:
        by_rate = {bn: {float(one.levels[lr]): _run(one, seed) for one in arms[bn]} for bn in arms}
        stable = {bn: _largest_stable(runs) for bn, runs in by_rate.items()}
        if stable["true"] is None or stable["false"] is None:
            continue
        rates.append(math.log(stable["true"] / stable["false"]))
        top += stable["true"] == highest
        target = max(max(_curve(run).values(), default=0.0) for run in by_rate["false"].values())
        reached = {bn: [_first(run, target) for run in runs.values()] for bn, runs in by_rate.items()}
        first = {bn: min((one for one in found if one is not None), default=None) for bn, found in reached.items()}
        if first["true"] is None or first["false"] is None:
            unreached += 1
        else:
            epochs.append(math.log(first["true"] / first["false"]))
    if not rates:
        raise CannotSayError("no seed has a stable rate both with and without BatchNorm")
    contrasts = {one.name: one for one in stats.compare({"rate": rates, "epochs": epochs}, RATIO_MARGIN)}
    allows, faster = _one_sided(contrasts["rate"], 1), _one_sided(contrasts["epochs"], -1)
    if unreached:
        faster = "contradicted" if unreached == len(seeds) >= stats.MIN_SEEDS else "inconclusive"
    evidence = [
        f"largest stable learning rate, with BatchNorm over without: {_ratio(contrasts['rate'])}"
        + (
            f"; the largest rate tried ({highest:g}) was still stable with it in {top} of {len(seeds)} seeds"
            * bool(top)
        ),
        f"epochs to the plain network's best valid accuracy, with over without: {_ratio(contrasts['epochs'])}"
        + (f"; not reached with BatchNorm in {unreached} of {len(seeds)} seeds" * bool(unreached)),
        *_matched_rates(section, arms, lr, margin),
        f"stable: all finite, and valid accuracy within {_pp(STABLE_WITHIN, sign=False)} of the best rate's",
    ]
    both = {allows, faster}
    verdict = "supported" if both == {"supported"} else "contradicted" if "contradicted" in both else "inconclusive"
    summary = f"larger stable rates: {allows}; fewer epochs to the plain network's best accuracy: {faster}"
    return Verdict("", "", verdict, summary, evidence, _most_seeds(contrasts.values()))


def init_robustness(section: Section, margin: float) -> Verdict:
    """The spread of valid accuracy over initializers, with BatchNorm over without; a diverged run counts as chance."""
    arms = _arms(section)
    spreads: dict[str, list[float]] = {"true": [], "false": []}
    for seed in _common_seeds(section):
        found = {bn: [_accuracy(_run(one, seed)) for one in arms[bn]] for bn in arms}
        if all(len(values) > 1 and None not in values for values in found.values()):
            for bn, values in found.items():
                spreads[bn].append(statistics.stdev(value for value in values if value is not None))
    pairs = [pair for pair in zip(spreads["true"], spreads["false"], strict=True) if min(pair) > 0]
    if len(pairs) < 2:
        raise CannotSayError("needs two initializers and two seeds, each with model.bn=false and true")
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
            f"{_but(section, one, 'model.bn')}: {' against '.join(_shown(other) for other in both)} (with, without)"
            for one, both in _by_bn(section, arms)
        ),
    ]
    words = {"supported": "less", "contradicted": "no less", "inconclusive": "perhaps not less"}
    summary = f"with BatchNorm the result depends {words[verdict]} on the initializer: {ratio:.2f} times the spread"
    return Verdict("", "", verdict, summary, evidence, contrast.seeds_needed)


def dropout_redundant(section: Section, margin: float) -> Verdict:
    """Whether dropout gains nothing in valid accuracy beside BatchNorm, though it does without."""
    arms = _arms(section)
    dropout = _factor(section, "model.dropout")
    families: dict[str, list[stats.Contrast]] = {}
    evidence = []
    for bn in ("true", "false"):
        base = next((one for one in arms[bn] if float(one.levels[dropout]) == 0), None)
        if base is None:
            raise CannotSayError("needs runs with model.dropout=0")
        differences = {one.levels[dropout]: _paired(one, base, "valid/acc") for one in arms[bn] if one is not base}
        families[bn] = stats.compare(differences, margin)
        where = "with" if bn == "true" else "without"
        evidence += [
            f"{where} BatchNorm, dropout {one.name} against none: valid accuracy {_said(one)}" for one in families[bn]
        ]
    interactions = section.contrasts.get("valid/acc", {}).get("effects", [])
    evidence += [f"interaction {one.name}: valid accuracy {_said(one)}" for one in interactions if "×" in one.name]
    beside, alone = ([_gain(one) for one in families[bn]] for bn in ("true", "false"))
    needed = _most_seeds(families["true"])
    if "better" in beside:
        return Verdict("", "", "contradicted", "beside BatchNorm dropout still raises valid accuracy", evidence)
    if not beside or "undecided" in beside:
        return Verdict(
            "", "", "inconclusive", "whether dropout gains anything beside BatchNorm is not decided", evidence, needed
        )
    if "better" in alone:
        summary = "dropout raises valid accuracy without BatchNorm, and gains nothing beside it"
        return Verdict("", "", "supported", summary, evidence)
    summary = (
        "beside BatchNorm dropout gains nothing, but it gains nothing without BatchNorm either: no work of BatchNorm's"
    )
    return Verdict("", "", "inconclusive", summary, evidence, _most_seeds(families["false"]))


def activations(section: Section, margin: float) -> Verdict:
    """How far the 15th and 85th percentiles of the activation functions' inputs go, and how much they move."""
    arms = _arms(section)
    height: list[float] = []
    drift: list[float] = []
    for seed in _common_seeds(section):
        heights, drifts = [], []
        for with_bn, without in _pairs(section, arms):
            looks = [_percentiles(_run(one, seed)) for one in (with_bn, without)]
            if all(looks):
                heights.append(math.log(_height(looks[0]) / _height(looks[1])))
                drifts.append(math.log(_drift(looks[0]) / _drift(looks[1])))
        if heights:
            height.append(statistics.mean(heights))
            drift.append(statistics.mean(drifts))
    if not height:
        raise CannotSayError("needs pairs of runs with trainer.log_activations_every, with model.bn=false and true")
    high, moved = stats.compare({"height": height, "drift": drift}, RATIO_MARGIN)
    verdicts = _one_sided(high, -1), _one_sided(moved, -1)
    evidence = [
        f"largest absolute percentile (15th, 85th) of any layer, with BatchNorm over without: {_ratio(high)}",
        f"movement of the percentiles (sd over training, mean over layers), with over without: {_ratio(moved)}",
        *(
            f"{_but(section, with_bn, 'model.bn')}: largest percentile {_typical(with_bn, _height):.2f} with, "
            f"{_typical(without, _height):.2f} without; movement {_typical(with_bn, _drift):.3f} and "
            f"{_typical(without, _drift):.3f}"
            for with_bn, without in _pairs(section, arms)
        ),
    ]
    summary = f"inputs of the activation functions stay lower: {verdicts[0]}; steadier: {verdicts[1]}"
    verdict = verdicts[0] if verdicts[0] == verdicts[1] else "inconclusive"
    if "contradicted" in verdicts:
        verdict = "contradicted"
    return Verdict("", "", verdict, summary, evidence, _most_seeds([high, moved]))


def identity(section: Section, margin: float) -> Verdict:
    """The largest relative error of trained layers whose alpha and beta were set to restore their input, in float64."""
    errors = {run.name: run.metrics["bn/identity_error"] for run in section.runs if "bn/identity_error" in run.metrics}
    if not errors:
        raise CannotSayError("needs runs with model.bn=true and trainer.log_activations_every")
    worst = max(errors.values())
    verdict = "supported" if worst <= EXACT else "contradicted"
    summary = f"the restored layers differ from the identity by at most {worst:.1e} of the largest input"
    return Verdict(
        "", "", verdict, summary, [f"{len(errors)} trained networks in float64; asked for: at most {EXACT:g}"]
    )


RULES: dict[str, tuple[str, Callable[[Section, float], Verdict]]] = {
    "overfitting": ("Does BatchNorm shrink the overfitting gap?", overfitting),
    "higher_lr": ("Does BatchNorm allow higher learning rates, and so train in fewer steps?", higher_lr),
    "init_robustness": ("Does BatchNorm make the result depend less on the initial weights?", init_robustness),
    "dropout_redundant": ("Does BatchNorm make dropout useless?", dropout_redundant),
    "activations": ("Does BatchNorm keep activations from becoming too high or too low?", activations),
    "identity": ("Do alpha = sqrt(Var) and beta = E make BatchNorm the identity?", identity),
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


def _factor(section: Section, key: str) -> int:
    for index, keys in enumerate(section.keys.values()):
        if key in keys:
            return index
    raise CannotSayError(f"needs runs that differ in {key}")


def _arms(section: Section) -> dict[str, list[Condition]]:
    """The conditions with and without BatchNorm."""
    bn = _factor(section, "model.bn")
    arms = {level: [one for one in section.conditions if one.levels[bn] == level] for level in ("true", "false")}
    if not all(arms.values()):
        raise CannotSayError("needs runs with model.bn=false and true")
    return arms


def _pairs(section: Section, arms: dict[str, list[Condition]]) -> Iterator[tuple[Condition, Condition]]:
    """Conditions with and without BatchNorm that differ in nothing else."""
    bn = _factor(section, "model.bn")
    without = {one.levels[:bn] + one.levels[bn + 1 :]: one for one in arms["false"]}
    for one in arms["true"]:
        if (other := without.get(one.levels[:bn] + one.levels[bn + 1 :])) is not None:
            yield one, other


def _by_bn(
    section: Section, arms: dict[str, list[Condition]]
) -> Iterator[tuple[Condition, tuple[Condition, Condition]]]:
    for pair in _pairs(section, arms):
        yield pair[0], pair


def _common_seeds(section: Section) -> list[int]:
    """Seeds of which every condition has an ended run, diverged or not."""
    seeds = [{run.seed for run in one.runs if run.status == "FINISHED" or run.diverged} for one in section.conditions]
    return sorted(set.intersection(*seeds)) if seeds else []


def _run(condition: Condition, seed: int) -> Run:
    return next(run for run in reversed(condition.runs) if run.seed == seed)


def _accuracy(run: Run) -> float | None:
    if run.diverged:
        return 1 / run.classes if run.classes else None
    return run.metrics.get("valid/acc")


def _curve(run: Run) -> dict[int, float]:
    return run.history.get("valid/acc", {})


def _first(run: Run, target: float) -> int | None:
    return min((epoch for epoch, value in _curve(run).items() if value >= target), default=None)


def _largest_stable(runs: dict[float, Run]) -> float | None:
    final = {lr: run.metrics["valid/acc"] for lr, run in runs.items() if run.status == "FINISHED"}
    best = max(final.values(), default=0.0)
    return max((lr for lr, value in final.items() if value >= best - STABLE_WITHIN), default=None)


def _matched_rates(section: Section, arms: dict[str, list[Condition]], lr: int, margin: float) -> list[str]:
    """The difference at the two lowest rates."""
    lowest = sorted({one.levels[lr] for one in section.conditions}, key=float)[:2]
    pairs = [(one, other) for one, other in _pairs(section, arms) if one.levels[lr] in lowest]
    found = stats.compare({one.levels[lr]: _paired(one, other, "valid/acc") for one, other in pairs}, margin)
    return [f"at the rate {one.name}, with BatchNorm minus without: valid accuracy {_said(one)}" for one in found]


def _paired(one: Condition, other: Condition, metric: str) -> list[float]:
    first, second = one.values.get(metric, {}), other.values.get(metric, {})
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _percentiles(run: Run) -> list[list[float]]:
    """The 15th, 50th and 85th percentile of each layer: a list over training for each."""
    names = [name for name in run.history if name.startswith("act/") and name.endswith(("/p15", "/p50", "/p85"))]
    return [list(run.history[name].values()) for name in sorted(names) if not name.startswith("act/unit/")]


def _height(looks: list[list[float]]) -> float:
    return max(abs(value) for values in looks for value in values)


def _drift(looks: list[list[float]]) -> float:
    return max(statistics.mean(statistics.pstdev(values) for values in looks), 1e-12)


def _typical(condition: Condition, measure: Callable[[list[list[float]]], float]) -> float:
    found = [measure(looks) for run in condition.runs if (looks := _percentiles(run))]
    return statistics.mean(found) if found else math.nan


def _against(section: Section, metric: str, condition: Condition) -> stats.Contrast | None:
    families = section.contrasts.get(metric, {})
    return next((one for one in families.get("against", []) if one.name == condition.label), None)


def _changed(section: Section, condition: Condition) -> str:
    reference = section.conditions[0]
    return " ".join(
        f"{name}={level}"
        for name, level, before in zip(section.factors, condition.levels, reference.levels, strict=True)
        if level != before
    )


def _but(section: Section, condition: Condition, key: str) -> str:
    """The levels of a condition without the factor of `key`."""
    skipped = _factor(section, key)
    return " ".join(level for index, level in enumerate(condition.levels) if index != skipped)


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


def _ratio(one: stats.Contrast) -> str:
    if one.difference is None:
        return "no seed tells"
    interval = ""
    if one.low is not None and one.high is not None:
        interval = f" [{math.exp(one.low):.3g}, {math.exp(one.high):.3g}]"
    needed = f" ({one.seeds_needed} seeds would decide)" if one.seeds_needed else ""
    return f"{math.exp(one.difference):.3g} times{interval}, {one.verdict} over {one.n} seeds{needed}"
