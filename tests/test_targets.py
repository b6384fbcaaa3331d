import pytest
from torch import nn
from torch.optim import Optimizer

from gaplab.errors import UserError
from gaplab.targets import accepted, load_class

ALLOWED = ("gaplab", "torch", "torchvision", "lightning")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",  # a function that runs downloaded code
        "torch.serialization.os.system",  # an allowed module's reference to something from elsewhere
        "torch.nn.Nope",
        "torch.nope.Nope",
        "torch",
        "gaplab.nn.mlp.MLP; import os",
        "torch.optim.Adam",  # a class, but no network
        "",
    ],
)
def test_nothing_but_an_allowed_class_of_the_right_kind_is_reached(target):
    with pytest.raises(UserError, match="_target_="):
        load_class(target, ALLOWED, nn.Module, "model._target_")


def test_a_class_is_judged_by_where_it_is_defined(monkeypatch):
    import numpy as np
    import torch

    monkeypatch.setattr(torch, "smuggled", type("Evil", (nn.Module,), {"__module__": "numpy"}), raising=False)
    with pytest.raises(UserError, match="'numpy' is not in allowed_targets"):
        load_class("torch.smuggled", ALLOWED, nn.Module, "model._target_")
    assert np is not None


def test_allowed_class_is_returned():
    from torch.optim import Adam

    assert load_class("torch.optim.Adam", ALLOWED, Optimizer, "optimizer._target_") is Adam


def test_accepted_keeps_what_the_constructor_names():
    def narrow(a, b=1): ...
    def wide(a, **kwargs): ...

    assert accepted(narrow, {"a": 1, "c": 2}) == {"a": 1}
    assert accepted(wide, {"a": 1, "c": 2}) == {"a": 1, "c": 2}
