"""The decision rule of each claim, on runs made so that its answer is known."""

import pytest
from synthetic import accuracies, noise, synthetic

from gaplab.analysis.claims import judge
from gaplab.analysis.compare import sections
from gaplab.config import CLAIMS

SEEDS = range(8)


def verdict(claim, grid, measure, seeds=SEEDS):
    (part,) = sections(synthetic(grid, seeds, measure), ["gap/acc", "valid/acc"], 0.002)
    return judge(claim, part, 0.002)


def test_every_claim_has_a_rule_that_asks_for_what_it_lacks():
    for claim in CLAIMS:
        found = verdict(claim, {"optimizer.lr": ["0.1"]}, lambda *_: accuracies(0.99, 0.97))
        assert (found.claim, found.verdict) == (claim, "inconclusive")
        assert "needs " in found.summary


TOGGLES = {"model.bn": ["false", "true"], "model.dropout": ["0.0", "0.5"]}


@pytest.mark.parametrize(
    ("effect", "spread", "seeds", "expected"),
    [
        (-0.005, 0.0005, 8, "supported"),
        (+0.005, 0.0005, 8, "contradicted"),
        (0.0, 0.0005, 8, "contradicted"),
        (-0.003, 0.008, 8, "inconclusive"),
        (-0.005, 0.0005, 5, "inconclusive"),
    ],
)
def test_overfitting_is_about_the_gap_of_batchnorm_alone(effect, spread, seeds, expected):
    def measure(settings, seed):
        bn, dropout = settings["model.bn"] == "true", settings["model.dropout"] == "0.5"
        gap = 0.02 + effect * bn - 0.01 * dropout + spread * noise(bn, dropout, seed)
        return accuracies(0.97 + gap, 0.97)

    found = verdict("overfitting", TOGGLES, measure, range(seeds))
    assert found.verdict == expected
    assert any(line.startswith("bn=true: gap ") for line in found.evidence)
    turned = {name: levels[::-1] for name, levels in TOGGLES.items()}
    assert verdict("overfitting", turned, measure, range(seeds)).verdict == expected  # the plain network is the last
    assert any(line.startswith("dropout=0.5: gap -") for line in found.evidence)
    if expected == "inconclusive":
        assert found.seeds_needed is not None


RATES = {"model.bn": ["false", "true"], "optimizer.lr": ["0.01", "0.1", "1.0", "10.0"]}


def rates(with_bn: float, without: float, speed: float):
    def measure(settings, seed):
        bn, lr = settings["model.bn"] == "true", float(settings["optimizer.lr"])
        if lr > (with_bn if bn else without):
            return None if lr == 10 else accuracies(0.1, 0.1)
        return accuracies(0.99, 0.97 + speed * bn + 0.001 * noise(seed, bn))

    return measure


def test_higher_lr_needs_larger_rates_and_fewer_steps():
    found = verdict("higher_lr", RATES, rates(10, 0.1, 0.0))
    assert "largest stable learning rate, with BatchNorm over without: 100 times [100, 100], real" in found.evidence[0]
    both = verdict("higher_lr", RATES, rates(10, 10, 0.0))
    assert "1 times the largest stable learning rate (inconclusive)" in both.summary
    assert "and without it in 8: larger rates would tell" in both.evidence[0]
    assert "10) was still stable with it in 8 of 8" in found.evidence[0]
    runs = synthetic(RATES, SEEDS, rates(1, 0.1, 0.01))
    for run in runs:
        if run.status == "FINISHED":
            slow = run.settings["model.bn"] == "false"
            value = run.metrics["valid/acc"]
            run.history["valid/acc"] = {epoch: value if epoch >= (8 if slow else 2) else 0.5 for epoch in range(1, 11)}
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    found = judge("higher_lr", part, 0.002)
    assert found.verdict == "supported"
    assert "epochs to the plain network's best valid accuracy, with over without: 0.25 times" in found.evidence[1]
    assert verdict("higher_lr", RATES, rates(0.1, 1, 0.01)).verdict == "contradicted"
    assert verdict("higher_lr", RATES, rates(1, 0.1, -0.02)).verdict == "contradicted"  # never gets there


@pytest.mark.parametrize(("shrink", "expected"), [(0.2, "supported"), (5.0, "contradicted"), (1.0, "contradicted")])
def test_init_robustness_compares_spreads(shrink, expected):
    def measure(settings, seed):
        bn, std = settings["model.bn"] == "true", float(settings["model.init_std"])
        offset = {0.01: -0.01, 0.1: 0.0, 1.0: 0.01}[std] * (shrink if bn else 1)
        return accuracies(0.99, 0.9 + offset + 0.0003 * noise(bn, std, seed))

    found = verdict(
        "init_robustness", {"model.bn": ["false", "true"], "model.init_std": ["0.01", "0.1", "1.0"]}, measure
    )
    assert found.verdict == expected
    assert f"{shrink:.2f}"[:3] in found.evidence[2]


def test_a_diverged_initializer_counts_as_chance():
    def measure(settings, seed):
        if settings == settings | {"model.bn": "false", "model.init_std": "1.0"}:
            return None
        return accuracies(0.99, 0.9 + 0.001 * noise(settings["model.init_std"], seed))

    found = verdict("init_robustness", {"model.bn": ["false", "true"], "model.init_std": ["0.1", "1.0"]}, measure)
    assert found.verdict == "supported"
    assert any("8 of 8 diverged" in line for line in found.evidence)


@pytest.mark.parametrize(
    ("alone", "beside", "expected"),
    [
        (0.006, 0.0, "supported"),
        (0.006, -0.006, "supported"),
        (0.006, 0.006, "contradicted"),
        (0.0, 0.0, "inconclusive"),
    ],
)
def test_dropout_is_redundant_when_it_gains_nothing_beside_batchnorm_but_does_without(alone, beside, expected):
    def measure(settings, seed):
        bn, dropout = settings["model.bn"] == "true", settings["model.dropout"] == "0.5"
        gain = (beside if bn else alone) * dropout
        return accuracies(0.99, 0.96 + gain + 0.0004 * noise(bn, dropout, seed))

    assert verdict("dropout_redundant", TOGGLES, measure).verdict == expected


def test_dropout_is_not_redundant_by_two_effects_that_hardly_differ():
    def measure(settings, seed):
        bn, dropout = settings["model.bn"] == "true", settings["model.dropout"] == "0.5"
        return accuracies(0.99, 0.96 + (0.0015 if bn else 0.0027) * dropout + 0.0001 * noise(bn, dropout, seed))

    found = verdict("dropout_redundant", TOGGLES, measure)
    assert found.verdict == "inconclusive"
    assert "the difference is not decided" in found.summary


@pytest.mark.parametrize("claim", ["dropout_redundant", "higher_lr", "init_robustness"])
def test_a_rule_over_a_grid_refuses_what_varies_beside_it(claim):
    grid = TOGGLES | {"optimizer.lr": ["0.1", "1.0"], "model.init_std": ["0.1", "1.0"]}
    found = verdict(claim, grid, lambda *_: accuracies(0.99, 0.97))
    assert found.verdict == "inconclusive"
    assert "the runs differ in " in found.summary


@pytest.mark.parametrize(("factor", "expected"), [(0.3, "supported"), (3.0, "contradicted"), (1.0, "contradicted")])
def test_activations_compares_height_and_movement(factor, expected):
    runs = synthetic({"model.bn": ["false", "true"]}, SEEDS, lambda *_: accuracies(0.99, 0.97))
    for run in runs:
        scale = (factor if run.settings["model.bn"] == "true" else 1.0) * (1 + 0.02 * noise(run.name))
        for name, value in {"p15": -2.0, "p50": 0.5, "p85": 2.5}.items():
            run.history[f"act/1/{name}"] = {step: scale * value * (1 + step / 10) for step in range(5)}
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    assert judge("activations", part, 0.002).verdict == expected


def test_identity_is_exact_or_not():
    for error, expected in {1e-15: "supported", 1e-6: "contradicted"}.items():
        grid = {"model.bn": ["true"]}
        found = verdict("identity", grid, lambda *_, e=error: accuracies(1, 1) | {"bn/identity_error": e}, [0])
        assert found.verdict == expected


def test_a_claim_over_joined_sweeps_takes_no_number_from_a_killed_run():
    runs = synthetic(RATES, SEEDS, rates(1, 0.1, 0.01))
    killed = synthetic(RATES, SEEDS, lambda *_: accuracies(0.1, 0.1))
    for run in killed:
        run.status, run.history["valid/acc"] = "KILLED", {1: 0.999}
    expected, joined = (
        judge("higher_lr", sections(every, ["gap/acc", "valid/acc"], 0.002)[0], 0.002)
        for every in (runs, [*runs, *killed])
    )
    assert joined == expected
    alone = sections(killed, ["gap/acc", "valid/acc"], 0.002)[0]
    assert judge("higher_lr", alone, 0.002).verdict == "inconclusive"


def test_identity_asks_every_finished_run_of_joined_sweeps_and_no_killed_one():
    one, other, killed = (
        synthetic({"model.bn": ["true"], "model.name": [name]}, [0], lambda *_, e=e: {"bn/identity_error": e})
        for name, e in (("mlp", 1e-3), ("cnn", 1e-15), ("resnet20", 1.0))
    )
    for (run,), status in ((one, "FINISHED"), (other, "FINISHED"), (killed, "KILLED")):
        run.name, run.status = "0_true_s0", status
    (part,) = sections([*one, *other, *killed], [], 0.002)
    found = judge("identity", part, 0.002)
    assert found.verdict == "contradicted"
    assert "at most 1.0e-03" in found.summary
    assert found.evidence == ["2 trained networks in float64; asked for: at most 1e-10"]


def test_a_smaller_gap_of_a_worse_network_is_called_so():
    def measure(settings, seed):
        bn = settings["model.bn"] == "true"
        return accuracies(0.99 - 0.15 * bn, 0.90 - 0.06 * bn + 0.001 * noise(seed, bn))

    found = verdict("overfitting", TOGGLES, measure)
    assert found.verdict == "supported"
    assert ", and lowers valid accuracy by " in found.summary
    assert found.summary.endswith(" pp): smaller gap, worse network")


def test_under_label_noise_the_gap_of_a_claim_is_the_one_against_the_true_labels():
    def measure(settings, seed):
        bn = settings["model.bn"] == "true"
        clean = {"gap/acc_clean": 0.03 + 0.01 * bn + 0.0001 * noise(seed, bn), "train/acc_clean": 0.9}
        return accuracies(0.5 - 0.2 * bn, 0.87) | clean

    assert verdict("overfitting", TOGGLES, measure).verdict == "supported"
    assert verdict("overfitting", TOGGLES | {"data.label_noise": ["0.3"]}, measure).verdict == "contradicted"


def test_a_run_without_valid_accuracy_is_no_stable_rate():
    runs = synthetic(RATES, SEEDS, rates(1, 0.1, 0.01))
    runs[0].metrics.pop("valid/acc")
    runs[0].history.pop("valid/acc")
    assert judge("higher_lr", sections(runs, ["gap/acc"], 0.002)[0], 0.002).claim == "higher_lr"
