"""Is a difference between two conditions real, negligible, or not decided yet, and how many seeds would decide it?

Accuracies are fractions, and so are their differences: 0.002 is 0.2 percentage points. Conditions are paired by seed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from math import fsum, inf, isfinite, prod, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammainc, gammaincinv, ndtr, stdtrit
from scipy.stats import binomtest, bootstrap, permutation_test
from statsmodels.stats.weightstats import DescrStatsW

Array = NDArray[np.float64]
Levels = tuple[str, ...]  # one level of each factor
Table = Mapping[Levels, Mapping[int, float]]  # seed -> value, for each condition

MIN_SEEDS = 6  # the fewest pairs whose exact two-sided sign-flip test can reach p < 0.05: 2 / 2**6 = 0.03125
MAX_SEEDS = 1000  # more than these are not worth proposing
ENUMERATED = 14  # up to here every assignment of signs is tried: 2**14
RESAMPLES = 9999
ROUNDING = 1e-12  # accuracies that differ by less differ by floating point alone


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values, their standard deviation `sd`, and the t interval of the mean; None when n is 1."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Contrast:
    """One difference between conditions over the `n` seeds in which every condition that it needs is there.

    What takes at least two seeds is None with fewer; `difference` is None without any.
    """

    name: str
    n: int
    difference: float | None  # mean over the seeds
    sd: float | None = None
    low: float | None = None  # 95 % t interval, of this contrast alone
    high: float | None = None
    effect_size: float | None = None  # Cohen's d_z = difference / sd, None where sd is 0
    p: float | None = None  # two-sided paired t test
    p_holm: float | None = None  # the same, corrected for the family
    p_exact: float | None = None  # sign-flip permutation test of the mean, not corrected; at least 2 / 2**n
    p_equivalent: float | None = None  # two one-sided t tests against -margin and +margin, corrected for the family
    verdict: str = "inconclusive"  # or "real" or "equivalent"
    seeds_needed: int | None = None  # in all, to decide what is inconclusive; None also when MAX_SEEDS would not do
    reason: str = ""  # a sentence on what limits the verdict


def estimate(values: Sequence[float], confidence: float = 0.95, bounds: tuple[float, float] = (-inf, inf)) -> Estimate:
    """Mean, standard deviation and t interval of one condition over its seeds, at least one.

    The interval ends at `bounds`, between which every value lies: cut off there, it covers the mean as often.
    """
    x = _finite("the estimate", values)
    if not len(x):
        raise ValueError("there are no values to estimate a mean from")
    if len(x) == 1:
        return Estimate(1, _mean(x), None, None, None)
    low, high = _interval(x, confidence)
    return Estimate(len(x), _mean(x), _sd(x), max(low, bounds[0]), min(high, bounds[1]))


def compare(
    differences: Mapping[str, Sequence[float]], margin: float = 0.002, alpha: float = 0.05, power: float = 0.8
) -> list[Contrast]:
    """Judge each contrast, given as its values per seed; together they are one family.

    From MIN_SEEDS seeds on a contrast is "equivalent" when both one-sided tests place it within `margin` of 0, else
    "real" when it differs from 0, else "inconclusive". Holm's correction holds the probability of any wrong "real"
    in the family below `alpha`, and that of any wrong "equivalent" as well. `seeds_needed` takes the observed mean
    and spread for the truth and corrects by Bonferroni, so it promises `power` or more where they are.

    Raises:
        ValueError: a value is not finite.

    References:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
        Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
        equivalence of average bioavailability", Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.
    """
    samples = {name: _finite(name, values) for name, values in differences.items()}
    tests = {name: _p_values(x, margin) for name, x in samples.items() if len(x) >= 2}
    p_holm = dict(zip(tests, holm([different for different, _ in tests.values()]), strict=True))
    p_equivalent = dict(zip(tests, holm([equivalent for _, equivalent in tests.values()]), strict=True))

    contrasts = []
    for name, x in samples.items():
        n = len(x)
        if n < 2:
            reason = f"1 seed: there is no spread to judge by; {MIN_SEEDS} seeds are the least"
            mean = _mean(x) if n else None
            contrasts.append(Contrast(name, n, mean, reason=reason if n else "no seed has every condition it needs"))
            continue
        mean, sd, p_exact = _mean(x), _sd(x), sign_flip(x)
        low, high = _interval(x, 0.95)
        verdict, reason, needed = "inconclusive", "", None
        if n < MIN_SEEDS:
            least = f"{2 / 2**n:g}; {MIN_SEEDS} are the least"
            reason = f"{n} seeds: even if all agree, an exact test cannot go below p = {least}"
        elif p_equivalent[name] < alpha:
            verdict = "equivalent"
            if p_holm[name] < alpha:
                reason = "the difference is real, but smaller than the margin"
        elif p_holm[name] < alpha:
            verdict = "real"
            if p_exact >= alpha:
                reason = f"an exact test, which does not take the differences for normal, gives only p = {p_exact:.2g}"
        if verdict == "inconclusive":
            needed = seeds_needed(mean, sd, n, margin, alpha / len(tests), power)
            if needed is None and not reason:
                reason = f"at this difference and spread, {MAX_SEEDS} seeds would not decide it either"
        contrasts.append(
            Contrast(
                name=name,
                n=n,
                difference=mean,
                sd=sd,
                low=low,
                high=high,
                effect_size=mean / sd if sd else None,
                p=tests[name][0],
                p_holm=p_holm[name],
                p_exact=p_exact,
                p_equivalent=p_equivalent[name],
                verdict=verdict,
                seeds_needed=needed,
                reason=reason,
            )
        )
    return contrasts


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: whether two classifiers are right equally often on the same samples.

    Args:
        only_first, only_second: samples that this one alone has right.

    References:
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
        Psychometrika 12, 1947, 153-157.
    """
    discordant = only_first + only_second
    return float(binomtest(min(only_first, only_second), discordant).pvalue) if discordant else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given.

    As statsmodels' `multipletests(method="holm")`, but that runs a garbage collection on each call (60 ms).
    """
    order = np.argsort(p)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(order), 0, -1)))
    return adjusted.tolist()


def sign_flip(x: ArrayLike) -> float:
    """Two-sided p of the permutation test that flips the signs of paired differences `x`, shape (n,), n >= 2.

    Over all 2**n assignments of signs up to n = ENUMERATED, else over RESAMPLES random ones with a fixed seed.
    """
    x = np.asarray(x, dtype=np.float64)
    if len(x) > ENUMERATED:
        options = {"permutation_type": "samples", "vectorized": True, "n_resamples": RESAMPLES, "rng": 0}
        return min(1.0, float(permutation_test((x,), np.mean, **options).pvalue))
    tie = 1e-10 * np.abs(x).sum()
    return float(np.mean(np.abs(_signs(len(x)) @ x) >= abs(x.sum()) - tie))


@cache
def _signs(n: int) -> Array:
    """Every assignment of signs that begins with +, shape (2**(n - 1), n); the others mirror them."""
    return np.array([(1, *rest) for rest in product((1, -1), repeat=n - 1)], dtype=np.float64)


# Power. Given the sample's spread w = s / sd, a normal probability; then the mean over w by quadrature, at quantiles
# of w, whose df * w**2 is chi-squared. statsmodels' TTestPower and scipy's nct rest on series that give nan for many
# ordinary inputs (effect 5, n = 6); where they do not, this agrees within 1e-4, and 2e-3 at n = 2.
_X, _W = np.polynomial.legendre.leggauss(32)
_QUANTILES, _WEIGHTS = (_X + 1) / 2, _W / 2


@cache
def _spreads(df: int) -> Array:
    return _spreads_below(df, 1.0)


def _spreads_below(df: int, share: float) -> Array:
    """Quantiles of w at the nodes of the smallest `share` of its values."""
    return np.asarray(np.sqrt(gammaincinv(df / 2, share * _QUANTILES) * 2 / df))


def power_of_test(difference: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Probability in [0, 1] that a two-sided paired t test over `n` seeds finds a true mean `difference`.

    `sd` is that of the paired differences. References: Cohen, "Statistical Power Analysis for the Behavioral
    Sciences", 2nd edition, 1988, chapter 2.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return float(difference != 0)
    shift, bound = difference * sqrt(n) / sd, stdtrit(n - 1, 1 - alpha / 2) * _spreads(n - 1)
    return float(_WEIGHTS @ (ndtr(shift - bound) + ndtr(-shift - bound)))


def power_of_equivalence(difference: float, sd: float, n: int, margin: float, alpha: float = 0.05) -> float:
    """Probability in [0, 1] that two one-sided t tests over `n` seeds place a true mean `difference` within `margin`.

    `sd` is that of the paired differences. References: Phillips, "Power of the two one-sided tests procedure in
    bioequivalence", Journal of Pharmacokinetics and Biopharmaceutics 18, 1990, whose integral (Owen's Q) this is.
    """
    if n < 2:
        return 0.0
    if sd == 0:
        return float(abs(difference) < margin)
    df = n - 1
    shift, reach, critical = difference * sqrt(n) / sd, margin * sqrt(n) / sd, stdtrit(df, 1 - alpha)
    possible = gammainc(df / 2, df * (reach / critical) ** 2 / 2)  # that the spread leaves any room inside the margin
    room = reach - critical * _spreads_below(df, possible)
    return float(possible * _WEIGHTS @ (ndtr(room - shift) - ndtr(-room - shift)))


def seeds_needed(difference: float, sd: float, n: int, margin: float, alpha: float, power: float) -> int | None:
    """The fewest seeds, more than `n`, at which the t test or the equivalence test has `power`; None beyond MAX_SEEDS.

    `difference` and `sd` of the paired differences are taken for the truth; `alpha` is that of a single contrast.
    """

    def decides(seeds: int) -> bool:  # false up to some number of seeds, then true
        return power_of_test(difference, sd, seeds, alpha) >= power or (
            abs(difference) < margin and power_of_equivalence(difference, sd, seeds, margin, alpha) >= power
        )

    low, high = max(MIN_SEEDS, n + 1), MAX_SEEDS
    if low > high or not decides(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return low


def effects(factors: Mapping[str, Sequence[str]], table: Table) -> dict[str, dict[int, float]]:
    """Main effects and two-way interactions of a factorial sweep: name -> seed -> value.

    A main effect is a level minus the factor's first level, an interaction the difference of two such differences;
    both are means over those settings of the other factors for which `table` has every condition needed. A seed
    counts if it has all of these conditions; an effect without any setting is left out.

    Raises:
        ValueError: `table` has a condition that `factors` does not.
    """
    for levels in table:
        if len(levels) != len(factors) or any(a not in b for a, b in zip(levels, factors.values(), strict=True)):
            raise ValueError(f"condition {levels} is not one of the factors' levels")
    names, all_levels = list(factors), list(factors.values())
    first = [levels[0] for levels in all_levels]
    numbers = range(len(names))
    found: dict[str, dict[int, float]] = {}
    for varied in [*combinations(numbers, 1), *combinations(numbers, 2)]:
        for chosen in product(*(all_levels[i][1:] for i in varied)):
            choice = dict(zip(varied, chosen, strict=True))
            settings = []
            for others in product(*([""] if i in choice else all_levels[i] for i in numbers)):
                signed = [[(choice[i], 1), (first[i], -1)] if i in choice else [(others[i], 1)] for i in numbers]
                cells = [
                    (tuple(level for level, _ in cell), prod(sign for _, sign in cell)) for cell in product(*signed)
                ]
                if all(table.get(levels) for levels, _ in cells):
                    settings.append(cells)
            if settings:
                if len(varied) == 1:
                    name = f"{names[varied[0]]}: {chosen[0]} − {first[varied[0]]}"
                else:
                    name = " × ".join(f"{names[i]}={level}" for i, level in choice.items())
                terms = [(sign, table[levels]) for cells in settings for levels, sign in cells]
                found[name] = {
                    seed: fsum(sign * values[seed] for sign, values in terms) / len(settings)
                    for seed in _common(values for _, values in terms)
                }
    return found


def against(reference: Levels, table: Table, name: Callable[[Levels], str]) -> dict[str, dict[int, float]]:
    """Every other condition minus the reference: name -> seed -> difference, over the seeds that both have.

    Raises:
        ValueError: `table` lacks the reference, or two conditions have one name.
    """
    if reference not in table:
        raise ValueError(f"there is no condition {reference} to compare with")
    base = table[reference]
    others = {levels: values for levels, values in table.items() if levels != reference}
    found = {
        name(levels): {seed: values[seed] - base[seed] for seed in _common([values, base])}
        for levels, values in others.items()
    }
    if len(found) != len(others):
        raise ValueError("two conditions have the same name")
    return found


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two means and its paired percentile bootstrap interval: (ratio, low, high), all positive.

    With few seeds the interval is too short, as every bootstrap's: about 87 % at 6 of them where 95 % is asked for.

    Raises:
        ValueError: not the same number of values, fewer than two, or a value that is not positive.
    """
    a, b = _finite("the numerator", numerator), _finite("the denominator", denominator)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a ratio's interval takes two or more pairs, not {len(a)} and {len(b)} values")
    if min(a.min(), b.min()) <= 0:
        raise ValueError("a ratio's interval takes positive values")

    def ratio(x: Array, y: Array, axis: int = -1) -> Array:
        return np.asarray(x.mean(axis) / y.mean(axis))

    options = {"paired": True, "vectorized": True, "n_resamples": RESAMPLES, "rng": seed, "method": "percentile"}
    low, high = bootstrap((a, b), ratio, confidence_level=confidence, **options).confidence_interval
    return float(ratio(a, b)), float(low), float(high)


def _finite(name: str, values: Sequence[float]) -> Array:
    if not all(isfinite(value) for value in values):
        raise ValueError(f"{name}: a value is not finite")
    return np.asarray(values, dtype=np.float64)


def _mean(x: Array) -> float:
    mean = float(x.mean())
    return 0.0 if abs(mean) <= ROUNDING else mean


def _sd(x: Array) -> float:
    return 0.0 if np.ptp(x) <= ROUNDING else float(x.std(ddof=1))


def _interval(x: Array, confidence: float) -> tuple[float, float]:
    if _sd(x) == 0:
        return _mean(x), _mean(x)
    low, high = DescrStatsW(x).tconfint_mean(alpha=1 - confidence)
    return float(low), float(high)


def _p_values(x: Array, margin: float) -> tuple[float, float]:
    """Of the paired t test, and of the two one-sided ones (the larger); without spread, certainty."""
    if _sd(x) == 0:
        return float(_mean(x) == 0), float(abs(_mean(x)) >= margin - ROUNDING)
    sample = DescrStatsW(x)
    return float(sample.ttest_mean(0)[1]), float(sample.ttost_mean(-margin, margin)[0])


def _common(conditions: Iterable[Mapping[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(condition) for condition in conditions)))
