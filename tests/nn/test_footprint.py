import pytest
import torch
from networks import MODEL, NETWORKS, build

from gaplab.nn.footprint import footprint

SHAPE = (3, 32, 32)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_footprint_is_the_networks_own(name):
    network = build(name, bn=True).body.eval()
    outputs = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, output: outputs.append(output.numel()))
    network(torch.zeros(1, *SHAPE))
    found = footprint(MODEL | NETWORKS[name] | {"bn": True}, SHAPE, 10, ("gaplab",))
    assert found.params == sum(parameter.numel() for parameter in network.parameters())
    assert (found.values, found.largest) == (sum(outputs), max(outputs))


def test_nothing_is_said_of_anothers_network():
    model = MODEL | {"_target_": "torch.nn.Linear", "kwargs": {"in_features": 10**9, "out_features": 10**9}}
    assert footprint(model, SHAPE, 10, ("torch",)).params == 0


def test_the_larger_of_training_and_evaluation_counts():
    found = footprint(MODEL | NETWORKS["mlp"], SHAPE, 10, ("gaplab",))
    assert found.bytes(1, 1, 4) == 4 * (4 * found.params + found.values)
    assert found.bytes(1, 10**9, 4) == 4 * (2 * found.params + 10**9 * found.largest)
    assert found.bytes(1, 1, 8) == 2 * found.bytes(1, 1, 4)
