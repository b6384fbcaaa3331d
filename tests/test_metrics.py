import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.proportion import confint_proportions_2indep

from gaplab.metrics import Score, gap


def wilson(correct: int, total: int) -> tuple[float, float]:
    z = norm.ppf(0.975)
    centre = (correct + z**2 / 2) / (total + z**2)
    half = z / (total + z**2) * np.sqrt(correct * (total - correct) / total + z**2 / 4)
    return centre - half, centre + half


def test_same_data_in_both_splits_gives_a_gap_of_exactly_zero():
    assert gap(Score(977, 1000, 0.1), Score(977, 1000, 0.1)).acc == 0.0


@pytest.mark.parametrize("counts", [(54950, 55000, 4880, 5000), (55000, 55000, 5000, 5000), (0, 7, 3, 9)])
def test_interval_is_newcombes(counts):
    correct, total, correct_valid, total_valid = counts
    found = gap(Score(correct, total, 0.0), Score(correct_valid, total_valid, 0.0))
    p, q = correct / total, correct_valid / total_valid
    (low_p, high_p), (low_q, high_q) = wilson(correct, total), wilson(correct_valid, total_valid)
    assert found.acc == p - q
    assert found.low == pytest.approx(p - q - np.hypot(p - low_p, high_q - q), abs=1e-12)
    assert found.high == pytest.approx(p - q + np.hypot(high_p - p, q - low_q), abs=1e-12)
    library = confint_proportions_2indep(*counts, method="newcomb", compare="diff")
    assert (found.low, found.high) == pytest.approx(library, abs=1e-12)


def test_interval_covers_the_true_gap_in_95_percent_of_samples():
    rng = np.random.default_rng(0)
    train, valid = rng.binomial(2000, 0.99, 1000), rng.binomial(500, 0.97, 1000)
    found = [gap(Score(int(a), 2000, 0.0), Score(int(b), 500, 0.0)) for a, b in zip(train, valid, strict=True)]
    assert 0.93 <= np.mean([one.low <= 0.02 <= one.high for one in found]) <= 0.97
