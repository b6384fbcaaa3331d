"""Which settings were varied, and what is said of runs that are missing."""

import pytest
from scipy import stats as scipy_stats
from synthetic import FIXED, accuracies, noise, synthetic

from gaplab.analysis.compare import find_factors, sections


def measure(settings, seed):
    bn, dropout = settings["model.bn"] == "true", float(settings["model.dropout"])
    valid = 0.97 + 0.005 * bn - 0.01 * dropout + 0.001 * noise("split", seed) + 0.0003 * noise(bn, dropout, seed)
    return accuracies(0.99, valid)


GRID = {"model.bn": ["false", "true"], "model.dropout": ["0.0", "0.5"]}


def test_a_crossed_sweep_has_its_factors_and_contrasts_equal_scipy():
    runs = synthetic(GRID, range(6), measure)
    (part,) = sections(runs, ["valid/acc"], 0.002)
    assert part.factors == {"bn": ["false", "true"], "dropout": ["0.0", "0.5"]}
    assert [one.label for one in part.conditions][:2] == ["bn=false dropout=0.0", "bn=false dropout=0.5"]
    effects = {one.name: one for one in part.contrasts["valid/acc"]["effects"]}
    assert list(effects) == ["bn: true − false", "dropout: 0.5 − 0.0", "bn=true × dropout=0.5"]
    values = {
        (run.settings["model.bn"], run.settings["model.dropout"], run.seed): run.metrics["valid/acc"] for run in runs
    }
    with_bn, without = (
        [(values[bn, "0.0", seed] + values[bn, "0.5", seed]) / 2 for seed in range(6)] for bn in ("true", "false")
    )
    expected = scipy_stats.ttest_rel(with_bn, without)
    found = effects["bn: true − false"]
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert found.verdict == "real"
    against = {one.name: one for one in part.contrasts["valid/acc"]["against"]}
    assert list(against) == ["bn=false dropout=0.5", "bn=true dropout=0.0", "bn=true dropout=0.5"]
    assert part.notes == []


def test_missing_failed_and_unequal_seeds_are_left_out_and_said():
    def some(settings, seed):
        if settings["model.bn"] == "false" and seed == 2:
            return None
        return measure(settings, seed)

    runs = synthetic(GRID, range(6), some)
    runs[-1].status, runs[-1].metrics = "RUNNING", {}
    (part,) = sections(runs, ["valid/acc"], 0.002)
    notes = " | ".join(part.notes)
    assert "left out, diverged: 2 runs: bn=false dropout=0.0 (seeds 2); bn=false dropout=0.5 (seeds 2)" in notes
    assert "left out, unfinished: 1 runs: bn=true dropout=0.5 (seeds 5)" in notes
    assert "unequal seeds" in notes
    (bn, dropout, _) = part.contrasts["valid/acc"]["effects"]
    assert (bn.n, dropout.n) == (4, 4)
    assert part.conditions[0].estimate("valid/acc").n == 5


@pytest.mark.parametrize(
    ("grid", "seeds", "said"),
    [
        ({"model.bn": ["true"], "model.dropout": ["0.5"]}, range(6), "one condition: there is nothing to compare"),
        (GRID, [3], "one seed: no interval"),
        (GRID, range(5), "5 seeds: even if all agree, an exact test cannot go below p = 0.0625; 6 are the least"),
    ],
)
def test_what_little_can_be_said_is_said(grid, seeds, said):
    (part,) = sections(synthetic(grid, seeds, measure), ["gap/acc", "valid/acc"], 0.002)
    assert any(said in note for note in part.notes)
    assert part.conditions[0].estimate("gap/acc").mean == pytest.approx(0.02, abs=0.005)
    for families in part.contrasts.values():
        for contrasts in families.values():
            assert {one.verdict for one in contrasts} <= {"inconclusive"}


def test_settings_that_were_not_crossed_are_one_factor():
    crossed = [{"a": a, "b": b} for a in "12" for b in "34"]
    assert find_factors(crossed) == [["a"], ["b"]]
    assert find_factors(crossed[:3]) == [["a"], ["b"]]  # one combination is missing
    assert find_factors(crossed[::3]) == [["a", "b"]]
    init = [
        FIXED | {"model.bn": bn, "model.init": name, "model.init_std": std}
        for bn in ("false", "true")
        for name, std in [("normal", "0.1"), ("normal", "1.0"), ("lsuv", "0.05")]
    ]
    assert find_factors(init) == [["model.bn"], ["model.init", "model.init_std"]]
    runs = synthetic({"model.bn": ["false"]}, [0], lambda *_: accuracies(1, 1)) * len(init)
    from dataclasses import replace

    (part,) = sections([replace(run, settings=one) for run, one in zip(runs, init, strict=True)], ["gap/acc"], 0.002)
    assert part.factors["init"] == ["normal init_std=0.1", "normal init_std=1.0", "lsuv"]


def test_another_optimizer_is_called_so():
    grid = {"optimizer._target_": ["torch.optim.Adam", "torch.optim.SGD"]}
    runs = synthetic(grid, range(6), lambda *_: accuracies(1, 1))
    for run in runs:
        run.settings["optimizer.lr"] = "0.1" if run.settings["optimizer._target_"].endswith("SGD") else "0.001"
    (part,) = sections(runs, ["gap/acc"], 0.002)
    assert part.factors == {"optimizer": ["Adam", "SGD"]}


def test_pictures_that_differ_are_not_one_data_set():
    runs = [*synthetic(GRID, range(6), measure), *synthetic(GRID, range(6), measure)]
    for index, run in enumerate(runs):
        run.digest = "one" if index < 24 else "other"
    runs[0].digest = ""  # failed before it read its data
    assert [len(part.runs) for part in sections(runs, ["gap/acc"], 0.002)] == [24, 24]


def test_two_data_sets_are_not_compared_with_each_other():
    grid = {"data.name": ["mnist", "kmnist"], "model.bn": ["false", "true"], "model.dropout": ["0.0"]}
    parts = sections(synthetic(grid, range(6), measure), ["gap/acc"], 0.002)
    assert [part.data for part in parts] == ["mnist", "kmnist"]
    assert all(part.factors == {"bn": ["false", "true"]} for part in parts)


def test_a_repeated_run_counts_once():
    runs = synthetic(GRID, range(6), measure)
    (part,) = sections([*runs, *runs[:3]], ["gap/acc"], 0.002)
    assert "3 runs repeat a condition and seed; the later one counts" in part.notes
    assert part.conditions[0].estimate("gap/acc").n == 6


def test_how_batchnorm_was_computed_on_several_devices_is_said():
    runs = synthetic(GRID, range(6), measure)
    for run in runs:
        if run.settings["model.bn"] == "true":
            run.batchnorm = "synchronized over 2 devices"
    (part,) = sections(runs, ["valid/acc"], 0.002)
    assert part.notes == ["BatchNorm synchronized over 2 devices (12 runs)"]
