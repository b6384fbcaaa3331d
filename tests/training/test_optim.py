import copy

import pytest
import torch
from conftest import composed
from networks import build

from gaplab.errors import UserError
from gaplab.training.optim import align_, build_optimizer, build_scheduler, can_be_captured, make_capturable_

ALLOWED = ["torch"]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_take_their_keys(name):
    config = composed(f"optimizer={name}", "optimizer.lr=0.02", "optimizer.weight_decay=0.3").optimizer
    optimizer = build_optimizer(build("mlp"), config, ALLOWED)
    assert type(optimizer).__name__.lower() == name
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], optimizer.defaults["fused"]) == (
        0.02,
        0.3,
        True,
    )


def test_weight_decay_spares_batchnorm_and_biases_unless_told():
    network = build("cnn", bn=True)
    spared = {id(parameter) for parameter in network.parameters() if parameter.ndim == 1}
    for everywhere in (False, True):
        config = composed(
            "optimizer.weight_decay=0.1", f"optimizer.decay_norm_and_bias={str(everywhere).lower()}"
        ).optimizer
        groups = build_optimizer(network, config, ALLOWED).param_groups
        decayed = {id(parameter) for group in groups for parameter in group["params"] if group["weight_decay"] > 0}
        assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
        assert bool(decayed & spared) is everywhere


def rates(*overrides, epochs=4, steps=10):
    config = composed("optimizer=sgd", "optimizer.lr=1", *overrides)
    optimizer = build_optimizer(build("mlp"), config.optimizer, ALLOWED)
    scheduler = build_scheduler(optimizer, config.scheduler, 1.0, epochs * steps, steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return found


def test_schedules():
    assert rates("scheduler=constant") == [1.0] * 40
    assert rates("scheduler=step", "scheduler.step_size=2", "scheduler.gamma=0.5") == [1.0] * 20 + [0.5] * 20
    cosine = rates("scheduler=cosine", "scheduler.min_lr=0.2")
    assert cosine[20] == pytest.approx(0.6)
    assert cosine == sorted(cosine, reverse=True)
    cycle = rates("scheduler=one_cycle", "scheduler.pct_start=0.25")
    assert max(cycle) == pytest.approx(1.0)
    assert cycle.index(max(cycle)) == 9
    assert cycle[-1] < 0.001


def test_an_optimizer_of_another_kind_is_refused():
    config = composed("optimizer._target_=torch.nn.Linear").optimizer
    with pytest.raises(UserError, match=r"not a subclass of torch\.optim"):
        build_optimizer(build("mlp"), config, ALLOWED)


def test_a_key_that_another_optimizer_would_ignore_is_refused_when_it_is_set():
    target = "optimizer._target_=torch.optim.Adagrad"
    assert build_optimizer(build("mlp"), composed("optimizer=sgd", target).optimizer, ALLOWED)
    with pytest.raises(UserError, match=r"optimizer\.momentum: torch\.optim\.Adagrad takes no such argument"):
        build_optimizer(build("mlp"), composed("optimizer=sgd", target, "optimizer.momentum=0.5").optimizer, ALLOWED)


def test_what_a_graph_can_hold():
    for name, can in (("Adam", True), ("NAdam", True), ("SGD", True), ("Adagrad", False)):
        network = build("mlp")
        optimizer = getattr(torch.optim, name)(network.parameters(), lr=0.1)
        network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).sum().backward()
        optimizer.step()
        kept = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert can_be_captured(optimizer) is can
        if can:  # and the steps so far are counted on
            make_capturable_(optimizer)
            again = [state["step"] for state in optimizer.state.values() if "step" in state]
            assert [float(step) for step in again] == [float(step) for step in kept]
            assert all(group.get("capturable", name == "SGD") for group in optimizer.param_groups)


def test_one_cycle_leaves_the_momentum_alone():
    config = composed("optimizer=sgd", "optimizer.momentum=0.3", "scheduler=one_cycle")
    optimizer = build_optimizer(build("mlp"), config.optimizer, ALLOWED)
    build_scheduler(optimizer, config.scheduler, 0.1, 100, 10)
    assert optimizer.param_groups[0]["momentum"] == 0.3


@pytest.mark.parametrize("words", [["optimizer=sgd"], ["optimizer=adam"]])
def test_what_was_kept_in_another_memory_layout_is_gone_on_with_right(words):
    settings, found = composed(*words).optimizer, []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 4, 3)
        optimizer = build_optimizer(network, settings, ["torch"])
        images = torch.rand(2, 3, 5, 5)
        network(images).square().mean().backward()
        optimizer.step()
        other = copy.deepcopy(network).to(memory_format=layout)
        again = build_optimizer(other, settings, ["torch"])
        again.load_state_dict(optimizer.state_dict())
        align_(again)
        other.zero_grad()
        other(images).square().mean().backward()
        again.step()
        found.append(other.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
