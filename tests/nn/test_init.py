import pytest
import torch
from networks import IMAGES, NETWORKS, build
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gaplab.config import INITIALIZERS
from gaplab.nn.init import described, init_, lsuv_, weighted_layers


@pytest.mark.parametrize("init", [name for name in INITIALIZERS if name not in ("lsuv", "default")])
def test_weights_are_torchs_own_up_to_the_gain(init):
    layer = nn.Linear(300, 200)
    init_(nn.Sequential(layer), init, gain=2.0, std=0.1, activation="relu", seed=0)
    expected = {
        "kaiming_normal": (2 / 300) ** 0.5,
        "kaiming_uniform": (2 / 300) ** 0.5,
        "xavier_normal": (2 / 500) ** 0.5,
        "xavier_uniform": (2 / 500) ** 0.5,
        "orthogonal": 300**-0.5,
        "normal": 0.1,
        "uniform": 0.1,
        "trunc_normal": 0.1,
        "zeros": 0.0,
    }
    assert float(layer.weight.detach().std()) == pytest.approx(2 * expected[init], rel=0.02)
    if init == "trunc_normal":  # cut at 2 standard deviations of the normal distribution, 2 / 0.8796 of its own
        assert 2 * 0.225 < float(layer.weight.detach().abs().max()) < 2 * 0.2274
    assert not layer.bias.any()
    if init == "orthogonal":
        torch.testing.assert_close(
            layer.weight.detach() @ layer.weight.detach().T, 4 * torch.eye(200), rtol=0, atol=1e-4
        )


def test_toggles_leave_the_initial_draws_alone():
    plain, toggled = build("resnet8"), build("resnet8", bn=True, dropout=0.5)
    for (name, one), (_, other) in zip(weighted_layers(plain), weighted_layers(toggled), strict=True):
        assert torch.equal(one.weight, other.weight), name


def test_building_draws_nothing_from_the_runs_own_stream():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    build("mlp")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_lsuv_gives_every_layer_unit_output(name):
    network = build(name, init="lsuv", activation="tanh").double()
    before = {key: value.clone() for key, value in network.state_dict().items() if "weight" not in key}
    lsuv_(network, IMAGES, gain=1.5)
    outputs = []
    for _, layer in weighted_layers(network):
        layer.register_forward_hook(lambda module, args, output: outputs.append(float(output.detach().std())))
    network.eval()(IMAGES)
    assert outputs == pytest.approx([1.5] * len(outputs), rel=1e-6)
    for key, value in before.items():  # running statistics above all
        assert torch.equal(network.state_dict()[key], value)


@pytest.mark.parametrize("init", ["normal", "uniform", "trunc_normal"])
def test_init_std_is_the_standard_deviation_of_convolutions_too(init):
    layer = nn.Conv2d(64, 128, 3, groups=4)
    init_(layer, init, gain=1.0, std=0.05, activation="relu", seed=0)
    assert float(layer.weight.detach().std()) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("init", INITIALIZERS)
def test_frozen_layers_and_computed_weights_are_left_as_built(init):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8), weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)
    )
    network[1].requires_grad_(False)
    network[2].weight.data.fill_(3.0)
    network.train()[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    init_(network, init, gain=1.0, std=0.1, activation="relu", seed=0)
    if init == "lsuv":
        lsuv_(network, IMAGES.float())
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == (set() if init == "default" else {"4.weight", "4.bias"})
    assert [module.training for module in network] == [True, True, False, True, True]
    drawn = "as the network's constructor leaves them (model.init=default)"
    if init != "default":
        drawn = f"{init} in 1 of 3 linear and convolutional layers; the others, frozen or with a computed weight, as"
    assert described(network, init).startswith(drawn)
    assert described(network, init).endswith("; 132 of 24,716 parameters are trained")


def test_lsuv_refuses_a_layer_that_is_not_called_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(ValueError, match="calls layer layer 2 times, not once"):
        lsuv_(Twice(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))


def test_lsuv_refuses_a_constant_layer():
    with pytest.raises(ValueError, match=r"the output of layer body\.blocks\.0\.0 is constant"):
        lsuv_(build("mlp", init="zeros"), IMAGES)
