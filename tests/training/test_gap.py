from dataclasses import asdict, replace

import pytest
import torch
from conftest import composed
from networks import build
from torch import nn

from gaplab.errors import UserError
from gaplab.metrics import Score, gap
from gaplab.result import RunResult
from gaplab.tracking.journal import read_journal
from gaplab.training import gap as gap_module
from gaplab.training.gap import Epoch, GapCallback, predict, score

CPU = torch.device("cpu")


def random_batches(seed: int, count: int = 700, classes: int = 10):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return list(zip(images.split(64), labels.split(64), strict=True))


def test_score_is_an_independent_count_over_every_sample():
    network, batches = build("mlp", bn=True, dropout=0.5).train(), random_batches(0)
    found = score(network, batches, CPU)
    assert network.training
    network.eval()
    logits = torch.cat([network(images) for images, _ in batches]).detach().double()
    labels = torch.cat([labels for _, labels in batches])
    assert (found.correct, found.total) == (int((logits.argmax(1) == labels).sum()), 700)
    assert abs(found.loss - float(nn.functional.cross_entropy(logits, labels))) < 1e-6


def test_score_weighs_samples_not_batches_or_classes():
    class First(nn.Module):
        def forward(self, images):
            return torch.eye(3)[torch.zeros(len(images), dtype=torch.int64)]

    batches = [(torch.zeros(5, 1), torch.tensor([0, 0, 0, 0, 1])), (torch.zeros(1, 1), torch.tensor([2]))]
    assert score(First(), batches, CPU).acc == 4 / 6


def test_under_label_noise_the_train_split_is_counted_against_both_labels_and_both_gaps_are_reported():
    class Truth(nn.Module):
        def forward(self, images):
            return 9 * nn.functional.one_hot(images[:, 0], 4).float()

    clean = torch.arange(100) % 4
    noisy = torch.where(torch.arange(100) < 30, (clean + 1) % 4, clean)
    parts = list(zip(clean[:, None].split(32), noisy.split(32), clean.split(32), strict=True))
    train, valid = score(Truth(), parts, CPU), score(Truth(), [(clean[:50, None], clean[:50])], CPU)
    assert (train.correct, train.total, train.clean.correct, train.clean.total) == (70, 100, 100, 100)
    epoch = Epoch(1, train, valid, 0.7, 0.001, 1.0, 0.1, 400.0)
    found, expected = epoch.metrics(), gap(Score(100, 100, 0.0), valid)
    assert (found["train/acc"], found["train/acc_clean"]) == (0.7, 1.0)
    assert (found["gap/acc"], found["gap/acc_clean"]) == (pytest.approx(-0.3), 0.0)
    assert (found["gap/acc_clean_low"], found["gap/acc_clean_high"]) == (expected.low, expected.high)
    assert (found["train/loss_clean"], found["gap/loss_clean"]) == pytest.approx((valid.loss, 0.0), abs=1e-6)
    callback = GapCallback(lambda split: [], lambda epoch: None)
    callback.load_state_dict({"history": [asdict(epoch)], "elapsed": (0.0, 0.0)})
    assert callback.history == [epoch]
    assert not any("clean" in name for name in Epoch(1, valid, valid, 0.7, 0.001, 1.0, 0.1, 400.0).metrics())


def test_evaluation_leaves_each_layer_in_its_own_mode():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Linear(3072, 10)).train()
    network[1].eval()  # frozen by a user
    batches = [(images.float(), labels) for images, labels in random_batches(0, 64)]
    score(network, batches, CPU)
    predict(network, batches)
    assert [module.training for module in network] == [True, False, True]


def test_evaluation_moves_no_running_statistic():
    network, batches = build("cnn", bn=True).train(), random_batches(0, 100)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    score(network, batches, CPU)
    predict(network, batches)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_identical_data_in_both_splits_give_a_gap_of_exactly_zero():
    network, batches = build("cnn", bn=True), random_batches(0, 200)
    train, valid = score(network, batches, CPU), score(network, batches, CPU)
    assert gap(train, valid).acc == 0.0
    assert train.loss - valid.loss == 0.0


def test_a_model_that_answers_at_random_has_an_interval_over_zero():
    network = build("mlp")
    found = gap(score(network, random_batches(3), CPU), score(network, random_batches(4), CPU))
    assert found.low < 0 < found.high


def logged(folder, name: str) -> dict[int, float]:
    """A metric by epoch, as it was tracked."""
    events = [event for event in read_journal(folder) if name in event.get("values", {})]
    assert len({event["step"] for event in events}) == len(events)
    return {event["step"]: event["values"][name] for event in events}


def numbers(result: RunResult) -> dict[str, object]:
    return {
        name: value for name, value in result.items() if not name.endswith("_s") and name not in ("run_id", "times")
    }


@pytest.fixture
def stage_valid(monkeypatch):
    """Has the valid split's accuracy be what is said of each epoch, whatever the network has learned."""

    def stage(*correct: int) -> None:
        left = iter(correct)

        def staged(network, batches, *words):
            found = score(network, batches, *words)
            return replace(found, correct=next(left)) if found.total == 500 else found

        monkeypatch.setattr(gap_module, "score", staged)

    return stage


def test_the_train_split_is_evaluated_when_asked_after_the_last_and_for_the_best_epoch(run, stage_valid):
    words = ["trainer.max_epochs=7", "data.label_noise=0.2", "model.bn=true"]
    stage_valid(100, 200, 300, 250, 400, 350, 300)
    every, every_folder = run(*words)
    stage_valid(100, 200, 300, 250, 400, 350, 300)
    result, folder = run(*words, "metrics.train_every=3", "figures=true")
    best = result["best"]["epoch"]
    assert best == 5
    for name in ("train/acc", "train/loss", "gap/acc", "gap/acc_low", "gap/acc_high", "gap/loss"):
        found, expected = logged(folder, name), logged(every_folder, name)
        assert set(found) == {3, 6, 7, best}
        assert found == pytest.approx({epoch: expected[epoch] for epoch in found}, abs=1e-12)
    for name in ("valid/acc", "valid/loss", "train/acc_running"):
        assert logged(folder, name) == logged(every_folder, name)
        assert len(logged(folder, name)) == 7
    assert numbers(result) == numbers(every)
    assert (folder / "figures" / "learning_curves.png").is_file()


def test_a_run_that_stops_early_has_its_last_epochs_figures(run, stage_valid):
    words = ["trainer.max_epochs=20", "trainer.early_stopping=2", "model.bn=true"]
    stage_valid(100, 300, 250, 200)
    every, _ = run(*words)
    stage_valid(100, 300, 250, 200)
    result, folder = run(*words, "metrics.train_every=50")
    assert result["epochs"] == 4
    assert set(logged(folder, "gap/acc")) == {2, 4}
    assert numbers(result) == numbers(every)


def test_how_often_does_not_decide_the_numbers_and_is_a_positive_count():
    from gaplab.config import condition, config_hash

    often, seldom = composed(), composed("metrics.train_every=3")
    assert (config_hash(often), condition(often)) == (config_hash(seldom), condition(seldom))
    for value in ("0", "-1"):
        with pytest.raises(UserError, match=r"metrics\.train_every"):
            composed(f"metrics.train_every={value}")
