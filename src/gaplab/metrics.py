"""The overfitting gap and its interval.

The formulas stand here, a few lines, because the library that has them takes seconds to import into every run; the
tests hold them against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Score:
    """How a split was classified: `correct` of `total` samples, and the mean cross-entropy `loss` in nats.

    `clean` scores the same samples against their labels without label noise, where they have any.
    """

    correct: int
    total: int
    loss: float
    clean: Score | None = None

    @property
    def acc(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Gap:
    """A difference of accuracies, such as `train - valid`, a fraction in [-1, 1], and its confidence interval."""

    acc: float
    low: float
    high: float


def gap(train: Score, valid: Score, confidence: float = 0.95) -> Gap:
    """The overfitting gap with an interval for the difference of two independent proportions.

    Newcombe's hybrid score interval (method 10), which holds for proportions at and near 0 and 1, where networks end.

    References:
        Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven
        methods", Statistics in Medicine 17, 1998, 873-890.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    (train_low, train_high), (valid_low, valid_high) = wilson(train, z), wilson(valid, z)
    difference = train.acc - valid.acc
    low = difference - math.hypot(train.acc - train_low, valid_high - valid.acc)
    high = difference + math.hypot(train_high - train.acc, valid.acc - valid_low)
    return Gap(difference, low, high)


def gap_change(before: Gap, after: Gap) -> Gap:
    """`after - before` with its interval, made of theirs; too wide where both were measured on the same samples.

    References:
        Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in
        Medicine 27, 2008, 1693-1702.
    """
    change = after.acc - before.acc
    low = change - math.hypot(after.acc - after.low, before.high - before.acc)
    high = change + math.hypot(after.high - after.acc, before.acc - before.low)
    return Gap(change, low, high)


def paired_difference(both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95) -> Gap:
    """Accuracy of the second classifier minus that of the first on the same samples, and its interval.

    Newcombe's score interval for paired proportions (method 10).

    Args:
        both, only_first, only_second, neither: samples by who has them right.

    References:
        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
        Statistics in Medicine 17, 1998, 2635-2650.
    """
    total = both + only_first + only_second + neither
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first, second = Score(both + only_first, total, 0.0), Score(both + only_second, total, 0.0)
    (first_low, first_high), (second_low, second_high) = wilson(first, z), wilson(second, z)
    margins = math.prod(
        math.sqrt(one) for one in (first.correct, total - first.correct, second.correct, total - second.correct)
    )
    phi = (both * neither - only_first * only_second) / margins if margins else 0.0
    difference = second.acc - first.acc

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    low = difference - reach(second.acc - second_low, first_high - first.acc)
    high = difference + reach(second_high - second.acc, first.acc - first_low)
    return Gap(difference, low, high)


def wilson(score: Score, z: float) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, `z` standard errors to each side.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
        Statistical Association 22, 1927, 209-212.
    """
    wrong = score.total - score.correct
    middle = score.correct + z * z / 2
    half = z * math.sqrt(score.correct * wrong / score.total + z * z / 4)
    return (middle - half) / (score.total + z * z), (middle + half) / (score.total + z * z)
