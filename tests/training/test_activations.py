"""What a look sees is what is there, and looking changes nothing."""

import json

import numpy as np
import pytest
import torch
from networks import IMAGES, build
from torch import nn

from gaplab.nn.blocks import ACTIVATION_CLASSES
from gaplab.training import activations
from gaplab.training.activations import identity_error, look, restore_identity_

TIMES = {"run_id", "fit_s", "total_s", "steps_per_s", "times", "condition", "config_hash"}
TOGGLES = ["model.bn=true", "model.dropout=0.3", "data.augment=crop", "data.batch_size=96", "data.normalize=binary"]


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [(line["step"], line["values"]) for line in lines if line["event"] == "metrics"]


def looks(folder):
    return [(step, values) for step, values in metrics(folder) if any(name.startswith("act/") for name in values)]


@pytest.mark.parametrize("keys", [[], ["trainer.precision=bf16-mixed"]], ids=["float32", "bf16"])
def test_looks_do_not_touch_the_training(run, keys):
    blind, one = run(*TOGGLES, *keys)
    seeing, two = run(*TOGGLES, *keys, "trainer.log_activations_every=3")
    assert all(torch.equal(value, state(two)[name]) for name, value in state(one).items())
    assert {name: value for name, value in blind.items() if name not in TIMES} == {
        name: value for name, value in seeing.items() if name not in TIMES
    }
    assert looks(one) == []
    assert len(looks(two)) == 8


def test_looks_are_at_the_same_steps_and_the_same_whatever_the_chunk_size(run):
    keys = [*TOGGLES, "trainer.log_activations_every=3", "trainer.accumulate_grad_batches=2"]
    small, large = (looks(run(*keys, f"trainer.chunk_size={size}")[1]) for size in (1, 50))
    assert [step for step, _ in small] == [0, 3, 6, 9, 12]  # 11 mini-batches, 6 steps an epoch
    assert small == large
    names = [f"act/{layer}/{name}" for layer in (1, 2, 3) for name in ("p15", "p50", "p85", "dead")]
    assert list(small[0][1]) == [*names, "act/unit/p15", "act/unit/p50", "act/unit/p85"]


class Planted(nn.Module):
    """Known inputs to each activation function, with a dead unit in the first and a dead channel in the last."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(12, 4)
        self.conv = nn.Conv2d(1, 2, 1)
        self.activation = nn.ReLU(inplace=True)
        self.tanh = nn.Tanh()
        with torch.no_grad():
            self.dense.bias[1] = self.conv.bias[1] = -1e9

    def forward(self, x):
        x = self.activation(self.dense(x.float().flatten(1)))
        return self.activation(self.conv(self.tanh(x).reshape(-1, 1, 2, 2)))


@pytest.fixture
def planted():
    torch.manual_seed(0)
    network, images = Planted(), torch.randint(0, 256, (50, 3, 2, 2), dtype=torch.uint8)
    with torch.no_grad():
        first = network.dense(images.float().flatten(1))
        second = first.relu()
        third = network.conv(second.tanh().reshape(-1, 1, 2, 2))
    return network, images, [first, second, third]


def test_percentiles_are_numpys_of_the_inputs_and_a_module_called_twice_counts_twice(planted):
    network, images, inputs = planted
    values = look(network, images, ACTIVATION_CLASSES)
    for number, x in enumerate(inputs, 1):
        found = [values[f"act/{number}/p{level}"] for level in (15, 50, 85)]
        np.testing.assert_allclose(found, np.percentile(x.numpy(), [15, 50, 85]), rtol=1e-5, atol=1e-6)
    unit = [values[f"act/unit/p{level}"] for level in (15, 50, 85)]
    np.testing.assert_allclose(unit, np.percentile(inputs[2][:, 0].numpy(), [15, 50, 85]), rtol=1e-5, atol=1e-6)
    assert "act/4/p15" not in values


def test_dead_units_are_those_that_say_the_same_to_all(planted):
    network, images, inputs = planted
    values = look(network, images, ACTIVATION_CLASSES)
    alive = inputs[1].amax(0) > 0
    assert not alive[1]
    assert values["act/1/dead"] == values["act/2/dead"] == 1 - alive.float().mean()
    assert values["act/3/dead"] == 0.5
    with torch.no_grad():
        network.dense.bias.fill_(-1e9)
    assert look(network, images, ACTIVATION_CLASSES)["act/1/dead"] == 1


@pytest.mark.parametrize("shape", [(1000, 64), (500, 40, 8, 8), (256, 3, 64, 64)])
def test_a_large_layers_percentiles_come_from_all_of_its_units_and_positions(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x += torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))  # each unit has a level of its own
    expected = np.percentile(x.numpy(), [15, 50, 85])
    for layout in (x, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x):
        np.testing.assert_allclose(activations._percentiles(layout).numpy(), expected, atol=0.05 * x.std())


def test_batchnorm_is_looked_at_with_the_batchs_own_statistics_which_stay_where_they_are():
    network = build("mlp", bn=True, dropout=0.5).train()
    network.body.blocks[0][1].eval()  # a mode that a person set stays too
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    stream = torch.get_rng_state()
    values = look(network, IMAGES, ACTIVATION_CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(norm.track_running_stats for norm in network.modules() if isinstance(norm, nn.BatchNorm1d))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with torch.no_grad():
        x = network.body.blocks[0][0](network.normalize(IMAGES).flatten(1)).double()
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    found = [values[f"act/1/p{level}"] for level in (15, 50, 85)]
    np.testing.assert_allclose(found, np.percentile(x.numpy(), [15, 50, 85]), atol=1e-4)


def test_an_error_in_a_look_leaves_the_network_as_it_was():
    network = build("cnn", bn=True).train()
    with pytest.raises(RuntimeError):
        look(network, IMAGES[:, :1, :7], ACTIVATION_CLASSES)
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_looks_are_drawn(run):
    _, folder = run(*TOGGLES, "figures=true", "trainer.max_epochs=1", "trainer.log_activations_every=3")
    assert (folder / "figures" / "activations.png").stat().st_size > 10_000


def test_nothing_to_look_at_is_one_warning(run, caplog, monkeypatch):
    monkeypatch.setattr("gaplab.worker.ACTIVATION_CLASSES", (nn.Hardtanh,))
    _, folder = run("trainer.log_activations_every=1", "figures=true", "trainer.max_epochs=1")
    assert caplog.text.count("activations are not logged: the network calls none of nn.Hardtanh") == 1
    assert looks(folder) == []
    assert not (folder / "figures" / "activations.png").exists()


def trained(name, **toggles):
    """Weights and statistics as after some training: none at its initial value."""
    network = build(name, bn=True, **toggles).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(5):
        nn.functional.cross_entropy(network(IMAGES), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


@pytest.mark.parametrize("position", ["before_activation", "after_activation"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8"])
def test_batchnorm_can_be_the_identity_in_a_trained_network(name, position):
    network = trained(name, bn_position=position)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    error = identity_error(network, IMAGES)
    assert 0 < error < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_identity_error_sees_a_layer_that_is_none(monkeypatch):
    def wrong_(norm):
        restore_identity_(norm)
        norm.bias.data[0] += 1

    monkeypatch.setattr(activations, "restore_identity_", wrong_)
    assert identity_error(trained("mlp"), IMAGES) > 1e-3


def test_without_batchnorm_there_is_no_identity_to_measure(run):
    assert identity_error(build("mlp"), IMAGES) is None
    keys = ["trainer.log_activations_every=5", "trainer.max_epochs=1", "model.hidden_dims=[8]"]
    for bn in (False, True):
        _, folder = run(*keys, f"model.bn={str(bn).lower()}")
        errors = [
            (step, values["bn/identity_error"]) for step, values in metrics(folder) if "bn/identity_error" in values
        ]
        assert len(errors) == bn
        assert all(step == 1 and error < 1e-12 for step, error in errors)
