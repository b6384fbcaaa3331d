"""Which settings were varied, and what is said of runs that are missing."""

from dataclasses import replace

import pytest
from scipy import stats as scipy_stats
from synthetic import FIXED, accuracies, noise, synthetic

from gaplab import stats
from gaplab.analysis.compare import OUTCOMES, find_factors, outcome, sections


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
    (part,) = sections([replace(run, settings=one) for run, one in zip(runs, init, strict=True)], ["gap/acc"], 0.002)
    assert part.factors["init"] == ["normal init_std=0.1", "normal init_std=1.0", "lsuv"]


def test_another_optimizer_is_called_so():
    grid = {"optimizer._target_": ["torch.optim.Adam", "torch.optim.SGD"]}
    runs = synthetic(grid, range(6), lambda *_: accuracies(1, 1))
    for run in runs:
        run.settings["optimizer.lr"] = "0.1" if run.settings["optimizer._target_"].endswith("SGD") else "0.001"
    (part,) = sections(runs, ["gap/acc"], 0.002)
    assert part.factors == {"optimizer": ["Adam lr=0.001", "SGD lr=0.1"]}
    assert "optimizer: optimizer.lr, optimizer._target_ always vary together, so their effects" in " ".join(part.notes)


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
    assert any(
        note.startswith("3 runs repeat a condition and seed; of each such group one counts") for note in part.notes
    )
    assert part.conditions[0].estimate("gap/acc").n == 6


def test_how_batchnorm_was_computed_on_several_devices_is_said():
    runs = synthetic(GRID, range(6), measure)
    for run in runs:
        if run.settings["model.bn"] == "true":
            run.batchnorm = "synchronized over 2 devices"
    (part,) = sections(runs, ["valid/acc"], 0.002)
    assert part.notes == ["BatchNorm synchronized over 2 devices (12 runs)"]


def arms(*settings, seeds=range(6), measure=lambda *_: accuracies(0.99, 0.97)):
    """Runs of arms that each differ from the others in several keys."""
    return [run for one in settings for run in synthetic({key: [value] for key, value in one.items()}, seeds, measure)]


def test_keys_that_always_vary_together_are_all_named():
    runs = arms(
        {"model.bn": "false", "optimizer.weight_decay": "0.001", "trainer.max_epochs": "5"},
        {"model.bn": "true", "optimizer.weight_decay": "0.01", "trainer.max_epochs": "20"},
    )
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    assert [one.label for one in part.conditions] == [
        "bn=false weight_decay=0.001 max_epochs=5",
        "bn=true weight_decay=0.01 max_epochs=20",
    ]
    (effect,) = part.contrasts["gap/acc"]["effects"]
    assert effect.name == "bn: true weight_decay=0.01 max_epochs=20 − false weight_decay=0.001 max_epochs=5"
    tied = "bn: model.bn, optimizer.weight_decay, trainer.max_epochs always vary together, so their effects cannot be "
    assert f"{tied}told apart" in part.notes


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (
            {"model._target_": "mine.a.Net", "model.name": "custom"},
            {"model._target_": "mine.b.Net", "model.name": "custom"},
            ["model=mine.a.Net", "model=mine.b.Net"],
        ),
        (
            {"model._target_": "mine.a.Net", "model.name": "net", "model.kwargs.width": "8"},
            {"model._target_": "mine.b.Net", "model.name": "net", "model.kwargs.width": "16"},
            None,
        ),
        (
            {"model.name": "mlp", "optimizer._target_": "torch.optim.Adam", "optimizer.betas": "[0.9, 0.999]"},
            {"model.name": "cnn", "optimizer._target_": "torch.optim.SGD", "optimizer.momentum": "0.9"},
            ["model=mlp optimizer=Adam", "model=cnn optimizer=SGD"],
        ),
        (
            {
                "model.name": "mlp",
                "model._target_": "gaplab.nn.mlp.MLP",
                "model.hidden_dims": "[64]",
                "model.bn": "true",
            },
            {"model.name": "cnn", "model._target_": "gaplab.nn.cnn.CNN", "model.widths": "[32]", "model.bn": "false"},
            ["model=mlp bn=true", "model=cnn bn=false"],
        ),
        (
            {"model.init": "normal", "model.init_std": "0.1"},
            {"model.init": "lsuv", "model.init_std": "0.05"},
            ["init=normal init_std=0.1", "init=lsuv"],
        ),
    ],
)
def test_two_configs_are_two_conditions_whatever_they_are_called(first, second, labels):
    (part,) = sections(arms(first, second), ["gap/acc"], 0.002)
    assert len(part.conditions) == 2
    assert [len(one.finished) for one in part.conditions] == [6, 6]
    assert labels is None or [one.label for one in part.conditions] == labels
    assert part.conditions[0].label != part.conditions[1].label
    assert not any("repeat" in note for note in part.notes)


def test_a_finished_run_speaks_for_its_condition_and_seed_wherever_it_stands():
    good, killed, diverged = (synthetic({"model.bn": ["true"]}, range(6), measure) for measure in (
        lambda *_: accuracies(0.99, 0.97), lambda *_: accuracies(0.5, 0.4), lambda *_: None))  # fmt: skip
    for run in killed:
        run.status = "KILLED"
    for runs in ([*good, *killed, *diverged], [*killed, *diverged, *good], [*diverged, *good, *killed]):
        (part,) = sections(runs, ["valid/acc"], 0.002)
        (condition,) = part.conditions
        assert condition.runs == good
        assert (condition.failed, condition.diverged, condition.unfinished) == ([], [], [])
        assert condition.estimate("valid/acc").mean == pytest.approx(0.97)
        assert any(note.startswith("12 runs repeat a condition and seed") for note in part.notes)
    later = [replace(run, metrics=accuracies(0.98, 0.96)) for run in good]
    (part,) = sections([*good, *later], ["valid/acc"], 0.002)
    assert part.conditions[0].estimate("valid/acc").mean == pytest.approx(0.96)


def test_sections_of_one_data_set_are_told_apart_by_what_differs():
    runs = [run for size in ("32", "64") for run in synthetic({"data.image_size": [size]}, range(2), measure_nothing)]
    for run in runs:
        run.digest = run.settings["data.image_size"]
    assert [part.data for part in sections(runs, [], 0.002)] == ["mnist (image_size=32)", "mnist (image_size=64)"]
    for run in runs:
        run.settings.pop("data.image_size")
    assert [part.data for part in sections(runs, [], 0.002)] == ["mnist (digest 32)", "mnist (digest 64)"]


def measure_nothing(*_):
    return {}


def test_a_run_without_a_metric_is_counted_and_does_not_hide_the_others():
    runs = synthetic(GRID, range(6), measure)
    runs[0].metrics.pop("gap/acc")
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    assert "gap/acc: 1 runs that finished have none" in part.notes
    assert len(part.conditions[0].finished) == 6
    assert part.outcomes["against"][0].contrasts["gap/acc"].n == 5
    assert part.outcomes["against"][0].contrasts["valid/acc"].n == 6


STAGED = {"down": -0.05, "up": 0.05, "same": 0.0, "open": 0.0}


def staged(gap, valid):
    """The outcome of paired differences that were made to be smaller, larger, equivalent or undecided."""

    def differences(which):
        spread = 0.01 if which == "open" else 0.0001
        return [STAGED[which] + spread * (-1) ** seed for seed in range(6)]

    return outcome("x", {"gap/acc": stats.compare({"x": differences(gap)})[0],
                         "valid/acc": stats.compare({"x": differences(valid)})[0]})  # fmt: skip


@pytest.mark.parametrize(
    ("gap", "valid", "words", "tone"),
    [
        ("down", "up", "helps", "good"),
        ("down", "same", "smaller gap, no better", "plain"),
        ("down", "down", "smaller gap, worse network", "bad"),
        ("down", "open", "smaller gap, valid undecided", "open"),
        ("same", "up", "same gap, better network", "good"),
        ("same", "same", "does nothing", "plain"),
        ("same", "down", "same gap, worse network", "bad"),
        ("same", "open", "same gap, valid undecided", "open"),
        ("up", "up", "larger gap, better network", "plain"),
        ("up", "same", "larger gap, no worse", "plain"),
        ("up", "down", "hurts", "bad"),
        ("up", "open", "larger gap, valid undecided", "open"),
        ("open", "up", "better network, gap undecided", "good"),
        ("open", "same", "no better, gap undecided", "open"),
        ("open", "down", "worse network, gap undecided", "bad"),
        ("open", "open", "undecided", "open"),
    ],
)
def test_gap_and_valid_accuracy_have_one_verdict(gap, valid, words, tone):
    found = staged(gap, valid)
    assert (found.verdict, found.tone) == (words, tone)
    assert (words, tone) in OUTCOMES.values()


def test_an_interaction_is_no_better_or_worse_network_and_a_gap_alone_has_no_verdict():
    def one(name, gap, valid):
        return outcome(name, staged(gap, valid).contrasts)

    assert [one("a=1 × b=2", *pair).verdict for pair in [("down", "down"), ("same", "same"), ("same", "open")]] == [
        "interact",
        "independent",
        "undecided",
    ]
    alone = {"gap/acc": staged("down", "same").contrasts["gap/acc"]}
    assert (outcome("x", alone).verdict, outcome("x", alone).tone) == ("", "open")


def test_no_colour_of_a_worse_network_is_good():
    assert {tone for (_, valid), (_, tone) in OUTCOMES.items() if valid == "lower"} == {"bad"}
    assert not [pair for pair, (_, tone) in OUTCOMES.items() if tone == "good" and pair[1] != "higher"]


def test_no_interval_leaves_what_is_possible():
    def high(settings, seed):
        valid = [1.0, 0.94][seed] - 0.01 * (settings["model.bn"] == "true") * seed
        return accuracies(1.0, valid) | {"gap/acc": [1.0, 0.2][seed]}

    (part,) = sections(synthetic(GRID, range(2), high), ["gap/acc", "valid/acc"], 0.002)
    for one in part.conditions:
        gap, valid = one.estimate("gap/acc"), one.estimate("valid/acc")
        assert (gap.low, gap.high) == (-1, 1)
        assert 0 <= valid.low < valid.mean < valid.high <= 1
    for families in part.contrasts["valid/acc"].values():
        for one in families:
            assert max(abs(one.low), abs(one.high)) <= (2 if " × " in one.name else 1)


def test_the_best_condition_is_one_without_lost_runs():
    def some(settings, seed):
        if settings["model.dropout"] == "0.5":
            return None if seed else accuracies(1.0, 0.999)
        return measure(settings, seed)

    (part,) = sections(synthetic(GRID, range(6), some), ["valid/acc"], 0.002)
    assert part.best.label == "bn=true dropout=0.0"


def test_few_validation_images_and_unequal_steps_are_told():
    runs = synthetic({"data.train_size": ["270", "2700"]}, range(6), lambda *_: accuracies(0.99, 0.97))
    for run in runs:
        run.sizes = {"train": int(run.settings["data.train_size"]), "valid": 100, "test": 10_000}
        run.settings |= {"data.batch_size": "128", "trainer.max_epochs": "10", "trainer.accumulate_grad_batches": "1"}
        run.params, run.root = 22_346, "/pictures"
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    notes = " | ".join(part.notes)
    assert "100 validation images: one image is 1 pp of accuracy, so they can hardly show that" in notes
    assert "about 1000 or more can" in notes
    assert "optimizer steps, about: train_size=270 30; train_size=2700 220" in notes
    assert part.facts == {
        "network": "mlp",
        "parameters": "22,346",
        "optimizer": "lr=0.001",
        "epochs": "10",
        "batch size": "128",
        "images": "270, 2,700 train, 100 valid, 10,000 test",
        "data": "mnist in /pictures",
    }
    assert "validation images" not in " ".join(sections(runs, ["valid/acc"], 0.03)[0].notes)


def test_under_label_noise_the_true_labels_decide():
    def noisy(settings, seed):
        if settings["data.label_noise"] == "0.0":
            return accuracies(0.99, 0.97 + 0.001 * noise(seed))
        clean = {"train/acc_clean": 0.96, "gap/acc_clean": 0.02}
        return accuracies(0.4, 0.94 + 0.001 * noise(seed)) | {"gap/acc": -0.54} | clean

    (part,) = sections(
        synthetic({"data.label_noise": ["0.0", "0.5"]}, range(6), noisy), ["gap/acc", "valid/acc"], 0.002
    )
    assert list(part.contrasts) == ["gap/acc_clean", "valid/acc"]
    (one,) = part.outcomes["effects"]
    assert one.contrasts["gap/acc_clean"].difference == pytest.approx(0.0, abs=0.001)
    assert one.verdict == "same gap, worse network"
    assert part.conditions[0].estimate("train/acc_clean").mean == pytest.approx(0.99)
    assert any("against the true labels" in note for note in part.notes)
    assert list(sections(part.runs, ["gap/loss", "train/loss"], 0.002)[0].contrasts) == [
        "gap/loss_clean",
        "train/loss_clean",
    ]


def test_without_clean_accuracies_label_noise_has_no_verdict_on_the_gap():
    runs = synthetic({"data.label_noise": ["0.2", "0.5"]}, range(6), lambda *_: accuracies(0.5, 0.9))
    (part,) = sections(runs, ["gap/acc", "valid/acc"], 0.002)
    assert part.contrasts["gap/acc_clean"] == {}
    assert [one.verdict for one in part.outcomes["effects"]] == [""]
    assert "gap/acc_clean: 12 runs that finished have none" in part.notes
