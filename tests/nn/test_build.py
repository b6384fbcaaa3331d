import pytest
import torch
from conftest import composed
from networks import MODEL, Own, Pretrained, Untoggled
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


def test_a_users_network_keeps_its_weights_unless_an_initializer_is_asked_for_and_frozen_ones_always():
    own = composed("model=custom", "model._target_=gaplab.nn.mlp.MLP").model.init
    assert (own, composed().model.init) == ("default", "kaiming_normal")
    as_built = Pretrained((3, 2, 2), 5)
    default, drawn = build_own(Pretrained, init=own).body, build_own(Pretrained, init="kaiming_normal").body
    for body in (default, drawn):
        assert torch.equal(body.backbone[1].weight, as_built.backbone[1].weight)
    assert torch.equal(default.head.weight, as_built.head.weight)
    assert not torch.equal(drawn.head.weight, as_built.head.weight)
    assert not any(module.training for module in default.backbone)


def test_wrong_arguments_are_one_line():
    with pytest.raises(UserError, match="unexpected keyword argument 'depth'"):
        build_own(Own, kwargs={"depth": 3})
    with pytest.raises(UserError, match="pictures of 2x2 pixels are too small for 2 stages"):
        build_network(MODEL | {"_target_": "gaplab.nn.cnn.CNN", "widths": [4, 4], "hidden_dims": [4]}, (3, 2, 2), 5)
