"""Networks that learn together learn what they learn alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import composed

from gaplab.nn.build import build_network
from gaplab.training.captured import WARM_UP
from gaplab.training.optim import build_optimizer, make_capturable_
from gaplab.training.stack import Dropout, Stack

R, B, STEPS = 3, 16, 60
KINDS = {
    "mlp": ["model=mlp"],
    "cnn": ["model=cnn", "model.widths=[4,8]", "model.hidden_dims=[16]"],
    "resnet": ["model=resnet", "model.depth=8", "model.widths=[4,8,8]"],
}
WORDS = {
    "sgd": ["optimizer=sgd", "optimizer.lr=0.01"],
    "adam": ["optimizer=adam", "optimizer.lr=0.001"],
}


def built(*words):
    """A network for each seed, float64, and its optimizer."""
    from dataclasses import asdict

    config = composed(*words)
    networks = []
    for seed in range(R):
        network = build_network(asdict(config.model), (1, 12, 12), 10, seed)
        network.normalize.set_(torch.tensor([0.1 + seed / 10]).double(), torch.tensor([0.3]).double())
        networks.append(network.double().train())
    return networks, config


def stacked(networks, **words):
    return Stack(networks, [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks], **words)


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (steps, R, B, 1, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (steps, R, B), generator=generator)
    return zip(images, labels, strict=True)


def alone(network, optimizer, images, labels):
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("kind", "bn", "optimizer"),
    [
        *((kind, bn, "sgd") for kind in KINDS for bn in ("false", "true")),
        ("mlp", "true", "adam"),
        ("cnn", "true", "adam"),
    ],
)
def test_weights_equal_those_of_networks_trained_alone_to_1e_9(kind, bn, optimizer):
    networks, config = built(*KINDS[kind], f"model.bn={bn}", *WORDS[optimizer], "optimizer.weight_decay=0.01")
    rates = [config.optimizer.lr * (1 + seed) for seed in range(R)]
    twins = copy.deepcopy(networks)

    def optimizers(of):
        found = [build_optimizer(network, config.optimizer, ["torch"]) for network in of]
        for one, rate in zip(found, rates, strict=True):
            for group in one.param_groups:
                group["lr"] = rate
        return found

    theirs = optimizers(twins)
    stack = Stack(networks, optimizers(networks))
    for images, labels in batches():
        losses, _ = stack.step(images, labels)
        for r in range(R):
            expected = alone(twins[r], theirs[r], images[r], labels[r])
            assert abs(losses[r] - expected) < 1e-9
    for network, twin in zip(networks, twins, strict=True):
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("optimizer", WORDS)
def test_a_captured_step_of_all_gives_the_weights_of_an_eager_one(optimizer):
    """Clipped, at rates that change, with one left out on the way: the capture is then another."""
    taken, finals = [], []

    def graph(work):  # what a GPU does at each replay
        taken.append(0)

        def replay():
            taken[-1] += 1
            return work()

        return replay

    for capture in (None, graph):
        networks, config = built("model.bn=true", "model.dropout=0.3", *WORDS[optimizer])
        optimizers = [build_optimizer(network, config.optimizer, ["torch"]) for network in networks]
        stack = Stack(networks, optimizers, None, [None, 0.5, 0.5], capture)
        torch.manual_seed(0)
        left = [0, 1, 2]
        for number, (images, labels) in enumerate(batches(20)):
            if number == 10:
                left = [0, 2]
                stack.keep(left)
            for r in left:
                optimizers[r].param_groups[0]["lr"] = 2.0 ** -(7 + r + number // 5)  # in float32 too
            losses, _ = stack.step(images[left], labels[left])
        finals.append([*losses, *(value for r in left for value in networks[r].state_dict().values())])
    assert taken == [10 - WARM_UP, 10 - WARM_UP]
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


def test_one_whose_optimizer_no_graph_can_hold_keeps_the_step_out_of_one():
    networks, _ = built()
    optimizers = [torch.optim.SGD(networks[0].parameters(), lr=0.1), torch.optim.Adagrad(networks[1].parameters())]

    def refused(work):
        raise AssertionError

    stack = Stack(networks[:2], optimizers, capture=refused)
    for images, labels in batches(WARM_UP + 2):
        stack.step(images[:2], labels[:2])


def test_a_refused_capture_leaves_the_other_optimizers_as_they_were():
    networks, _ = built()
    optimizers = [torch.optim.NAdam(networks[0].parameters()), torch.optim.Adagrad(networks[1].parameters())]
    Stack(networks[:2], optimizers, capture=lambda work: work)
    assert optimizers[0].param_groups[0]["capturable"] is False


def test_what_is_counted_in_python_moves_to_the_device():
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.NAdam([parameter])
    optimizer.state[parameter] = {"step": torch.ones(()), "mu_product": torch.ones(()), "exp_avg": torch.zeros(3)}
    make_capturable_(optimizer)
    kept = optimizer.state[parameter]
    assert (kept["step"].device.type, kept["mu_product"].device.type) == ("meta", "meta")


def test_one_that_diverges_does_not_touch_the_others_and_can_be_left_out():
    finals = []
    for lr in (0.01, 1e30):
        networks, config = built("model.bn=true", *WORDS["sgd"])
        optimizers = [build_optimizer(one, config.optimizer, ["torch"]) for one in networks]
        stack = Stack(networks, optimizers)
        optimizers[1].param_groups[0]["lr"] = lr
        left = [0, 1, 2]
        for number, (images, labels) in enumerate(batches(30)):
            if number == 20:
                left = [0, 2]
                stack.keep(left)
            losses, answers = stack.step(images[left], labels[left])
            assert answers.shape == (len(left), B)
        assert bool(losses.isfinite().all())
        finals.append([networks[0].state_dict(), networks[2].state_dict()])
    for one, other in zip(*finals, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def test_each_drops_with_its_own_probability_and_its_own_draws():
    chances = [0.2, 0.5, 0.8]
    networks = []
    for p in chances:
        (network, *_), _ = built("model.dropout=0.5")
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p
        networks.append(network)
    stack = stacked(networks)
    x = torch.ones(R, 400, 100)
    drop = torch.func.vmap(Dropout(), randomness="different")
    torch.manual_seed(0)
    found = torch.func.vmap(
        lambda p, one: torch.func.functional_call(Dropout(), {"p": p}, (one,)), randomness="different"
    )(torch.tensor(chances), x)
    for p, one in zip(chances, found, strict=True):
        assert (one == 0).double().mean() == pytest.approx(p, abs=0.01)
        assert one[one != 0].unique() == pytest.approx(1 / (1 - p))
        assert one.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop(x), x)  # nobody said a probability
    same = torch.randint(0, 256, (1, B, 1, 12, 12), dtype=torch.uint8).expand(R, -1, -1, -1, -1)
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    losses, _ = stack.step(same, torch.zeros(R, B, dtype=torch.int64))
    assert len(losses.unique()) == R


def test_a_networks_own_tensors_are_views_and_its_parameters_the_same_objects():
    networks, _ = built("model.bn=true")
    before = [list(network.parameters()) for network in networks]
    weights = [one.detach().clone() for one in before[1]]
    stacked(networks)
    for old, network in zip(before, networks, strict=True):
        assert all(one is other for one, other in zip(old, network.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(weights, networks[1].parameters(), strict=True))
    weight, twin = (next(networks[r].body.parameters()) for r in (0, 1))
    assert weight.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr()


def test_networks_that_are_left_out_keep_their_values_and_no_memory_of_the_others():
    networks, _ = built("model.bn=true")
    stack = stacked(networks)
    before = {name: value.clone() for name, value in networks[1].state_dict().items()}
    stack.keep([0, 2])
    for parameter in networks[1].parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert all(torch.equal(value, before[name]) for name, value in networks[1].state_dict().items())
    weight, twin = (next(networks[r].body.parameters()) for r in (0, 2))
    assert weight.untyped_storage().data_ptr() == twin.untyped_storage().data_ptr()
    assert weight.untyped_storage().nbytes() == 2 * weight.nbytes
