import pytest
import torch
from networks import MODEL, Own, Untoggled
from torch import nn

from gaplab.errors import UserError
from gaplab.nn.build import build_network


def build_own(own: type, **keys: object) -> nn.Module:
    target = {"_target_": f"networks.{own.__name__}", "hidden_dims": [1]}
    return build_network(MODEL | target | keys, (3, 2, 2), 5, allowed_targets=("gaplab", "networks"))


def test_a_users_network_is_built_with_the_arguments_it_names():
    network = build_own(Own, bn=True, kwargs={"width": 7})
    assert network(torch.zeros(2, 3, 2, 2, dtype=torch.uint8)).shape == (2, 5)
    assert network.body.net[1][1].num_features == 7


def test_a_network_that_cannot_toggle_is_refused_only_while_a_toggle_is_on():
    assert build_own(Untoggled)
    for toggle in ({"bn": True}, {"dropout": 0.5}):
        with pytest.raises(UserError, match="takes no argument `layers`"):
            build_own(Untoggled, **toggle)


def test_wrong_arguments_are_one_line():
    with pytest.raises(UserError, match="unexpected keyword argument 'depth'"):
        build_own(Own, kwargs={"depth": 3})
    with pytest.raises(UserError, match="pictures of 2x2 pixels are too small for 2 stages"):
        build_network(MODEL | {"_target_": "gaplab.nn.cnn.CNN", "widths": [4, 4], "hidden_dims": [4]}, (3, 2, 2), 5)
