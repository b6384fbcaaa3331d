"""The overfitting gap and its interval."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How a split was classified: `correct` of `total` samples, and the mean cross-entropy `loss` in nats."""

    correct: int
    total: int
    loss: float

    @property
    def acc(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True)
class Gap:
    """`train - valid` accuracy, a fraction in [-1, 1], and its confidence interval."""

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
    from statsmodels.stats.proportion import confint_proportions_2indep

    low, high = confint_proportions_2indep(
        train.correct, train.total, valid.correct, valid.total, method="newcomb", compare="diff", alpha=1 - confidence
    )
    return Gap(train.acc - valid.acc, float(low), float(high))
