import torch
from networks import build
from torch import nn

from gaplab.metrics import gap
from gaplab.training.gap import predict, score

CPU = torch.device("cpu")


def random_batches(seed: int, count: int = 700, classes: int = 10):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return list(zip(images.split(64), labels.split(64), strict=True))


def test_score_is_an_independent_count_over_every_sample():
    network, batches = build("mlp", bn=True, dropout=0.5).train(), random_batches(0)
    found = score(network, batches, 10, CPU)
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
    assert score(First(), batches, 3, CPU).acc == 4 / 6


def test_evaluation_moves_no_running_statistic():
    network, batches = build("cnn", bn=True).train(), random_batches(0, 100)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    score(network, batches, 10, CPU)
    predict(network, batches)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_identical_data_in_both_splits_give_a_gap_of_exactly_zero():
    network, batches = build("cnn", bn=True), random_batches(0, 200)
    train, valid = score(network, batches, 10, CPU), score(network, batches, 10, CPU)
    assert gap(train, valid).acc == 0.0
    assert train.loss - valid.loss == 0.0


def test_a_model_that_answers_at_random_has_an_interval_over_zero():
    network = build("mlp")
    found = gap(score(network, random_batches(3), 10, CPU), score(network, random_batches(4), 10, CPU))
    assert found.low < 0 < found.high
