"""One optimizer in place of several does what they do."""

import copy

import pytest
import torch
from torch import nn

from gaplab.training.joint import ELEMENTWISE, Joint, likeness
from gaplab.training.stack import Stack, clip_

R, B = 4, 8
RULES = {
    **{rule.__name__: (rule, {"lr": 0.01, "weight_decay": 0.1}) for rule in ELEMENTWISE},
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "fused": True}),
    "Adam, fused": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "fused": True}),
    "Adadelta, one by one": (torch.optim.Adadelta, {"lr": 0.01}),
}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return super().forward(images.double() / 255)


def made(rule, words):
    torch.manual_seed(0)
    networks = [Net().double() for _ in range(R)]
    return networks, [rule([{"params": network.parameters()}], **words) for network in networks]


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randint(0, 256, (R, B, 1, 4, 4), dtype=torch.uint8, generator=generator),
            torch.randint(0, 5, (R, B), generator=generator),
        )


def state_of(optimizer):
    return {
        (number, name): torch.as_tensor(value).double()
        for number, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
    }


@pytest.mark.parametrize("name", RULES)
def test_it_does_what_each_would_do(name):
    """At rates that change; one leaves, and then all go on from what checkpoints hold."""
    networks, optimizers = made(*RULES[name])
    twins, theirs = made(*RULES[name])
    stack = Stack(networks, optimizers, clips=[None, 0.1, 0.2, None])
    left = list(range(R))
    for number, (images, labels) in enumerate(batches(12)):
        if number == 4:
            left = [0, 2, 3]
            stack.keep(left)
            gone = copy.deepcopy([networks[1].state_dict(), state_of(optimizers[1])])
        if number == 8:  # anew, as a run that was stopped
            for r in left:
                optimizers[r] = RULES[name][0](networks[r].parameters(), **RULES[name][1])
                optimizers[r].load_state_dict(copy.deepcopy(theirs[r].state_dict()))
            stack = Stack([networks[r] for r in left], [optimizers[r] for r in left], clips=[None, 0.2, None])
        for r in left:
            optimizers[r].param_groups[0]["lr"] = theirs[r].param_groups[0]["lr"] = 0.01 / (1 + number // 3)
            loss = nn.functional.cross_entropy(twins[r](images[r]), labels[r])
            theirs[r].zero_grad()
            loss.backward()
            if r in (1, 2):
                nn.utils.clip_grad_norm_(twins[r].parameters(), r / 10)
            theirs[r].step()
        stack.step(images[left], labels[left])
        for r in left:
            for one, other in zip(networks[r].parameters(), twins[r].parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
            ours, alone = state_of(optimizers[r]), state_of(theirs[r])
            assert ours.keys() == alone.keys()
            for key, value in alone.items():
                torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9)
    for key, value in gone[0].items():
        assert torch.equal(networks[1].state_dict()[key], value)
    for key, value in gone[1].items():
        assert torch.equal(state_of(optimizers[1])[key], value)


def test_alike_ones_are_stepped_by_one():
    networks, optimizers = made(torch.optim.SGD, {"lr": 0.01})
    assert len({likeness(one, None) for one in optimizers}) == 1
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(one, total)
        for one, total in zip(optimizers, (5, 5, 6, 6), strict=True)
    ]
    found = [likeness(one, schedule) for one, schedule in zip(optimizers, schedulers, strict=True)]
    assert found[0] == found[1] != found[2] == found[3]
    stack = Stack(networks, optimizers, schedulers)
    assert [span for span, _ in stack._joints] == [slice(0, 2), slice(2, 4)]
    optimizers[1].param_groups[0]["weight_decay"] = 0.5
    assert likeness(optimizers[0], schedulers[0]) != likeness(optimizers[1], schedulers[1])
    _, others = made(torch.optim.Adadelta, {"lr": 0.01})
    assert len({likeness(one, None) for one in others}) == R


def test_a_joint_optimizer_is_the_own_one_where_elements_are_not_independent():
    networks, (optimizer, *_) = made(torch.optim.Adadelta, {"lr": 0.01})
    joint = Joint(networks[:1], [optimizer], {})
    assert joint.optimizer is optimizer


def test_a_network_that_is_not_clipped_keeps_gradients_whose_norm_is_infinite():
    gradients = [torch.full((2, 3), 1e30)]
    clip_(gradients, torch.tensor([float("inf"), 1.0]))
    assert torch.equal(gradients[0][0], torch.full((3,), 1e30))


def test_gradients_are_clipped_for_each_as_torch_clips_them():
    gradients = [torch.randn(R, *shape, dtype=torch.float64) for shape in ((3, 4), (5,), ())]
    largest = torch.tensor([0.5, float("inf"), 100, 2], dtype=torch.float64)
    expected = []
    for r in range(R):
        parameters = [nn.Parameter(torch.zeros_like(gradient[r])) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[r].clone()
        nn.utils.clip_grad_norm_(parameters, float(largest[r]))
        expected.append([parameter.grad for parameter in parameters])
    clip_(gradients, largest)
    for r in range(R):
        for gradient, one in zip(gradients, expected[r], strict=True):
            torch.testing.assert_close(gradient[r], one, rtol=0, atol=1e-15)
