import pytest
import torch
from networks import IMAGES, NETWORKS, build
from torch import nn

from gaplab.config import INITIALIZERS
from gaplab.nn.init import init_, lsuv_, weighted_layers


@pytest.mark.parametrize("init", [name for name in INITIALIZERS if name != "lsuv"])
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
        "trunc_normal": 0.1 * 0.8796,  # of a normal cut at two standard deviations
        "zeros": 0.0,
    }
    assert float(layer.weight.detach().std()) == pytest.approx(2 * expected[init], rel=0.02)
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


def test_lsuv_refuses_a_constant_layer():
    with pytest.raises(ValueError, match=r"the output of layer body\.blocks\.0\.0 is constant"):
        lsuv_(build("mlp", init="zeros"), IMAGES)
