"""Networks of one build that learn as one: a forward and a backward pass for all of them, then each one's own update.

Their tensors lie side by side, along a replica axis that comes first; each network's own are views into those. So an
optimizer, a checkpoint or an evaluation of one of them needs to know nothing of the others.

Shapes: R replicas, B samples, C channels, H height, W width, K classes, D anything.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaplab.training.captured import CapturedStep, Step, cuda_graph
from gaplab.training.joint import Joint, likeness
from gaplab.training.optim import can_be_captured, make_capturable_


class Stack:
    """Networks that differ in their tensors, and in the probabilities of their `nn.Dropout`, alone.

    BatchNorm's statistics are each network's own. So is what dropout draws, from torch's global stream. On a GPU a step
    of all of them is one CUDA graph, where every optimizer can be part of one.

    Args:
        networks: uint8 (B, C, H, W) -> logits (B, K), in train mode, on one device. From now on their parameters and
            buffers are views; the parameters stay the same objects.
        optimizers: each network's own. Neighbours that are alike (`likeness`) cost as one.
        schedulers: of their rates, or None; stepped by the caller.
        clips: the largest L2 norm of each one's gradient, or None.
        capture: as of `CapturedStep`; None for `cuda_graph` on a GPU, and for no graph elsewhere and in
            float64.

    References:
        PyTorch documentation, "Model ensembling" (`torch.func`).
        Wang, Yang, Zheng, Li, Pekhimenko, "Horizontally Fused Training Array: An Effective Hardware Utilization
        Squeezer for Training Novel Deep Learning Models", 2021, arXiv:2102.02344.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[LRScheduler | None] | None = None,
        clips: Sequence[float | None] | None = None,
        capture: Callable[..., Any] | None = None,
    ) -> None:
        self._body = copy.deepcopy(networks[0])  # what is computed; its own tensors are never used
        self._dropouts = [name for name, module in self._body.named_modules() if isinstance(module, nn.Dropout)]
        for name in self._dropouts:
            self._body.set_submodule(name, Dropout())
        for module in self._body.modules():
            if isinstance(module, _BatchNorm):
                module.num_batches_tracked = None  # counted in `_eager`: vmap cannot
        self._forward = vmap(self._call, in_dims=(0, 0, 0), randomness="different")
        like = next(networks[0].parameters())
        self._device = like.device
        # a graph's rates are float32, which float64 would show
        self._capture = capture or (cuda_graph if like.is_cuda and like.dtype != torch.float64 else None)
        none = [None] * len(networks)
        self._all = list(zip(networks, optimizers, schedulers or none, clips or none, strict=True))
        self._joints: list[tuple[slice, Joint]] = []
        self.keep(range(len(networks)))

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these alone; the others get tensors of their own, and hold no memory of the stack."""
        for span, joint in self._joints:
            for place in set(range(span.start, span.stop)) - set(places):
                network = self._all[place][0]
                _place(network, {name: value.clone() for name, value in _tensors(network)})
                joint.leave(place - span.start)
        self._all = [self._all[place] for place in places]
        networks = [network for network, *_ in self._all]
        values = [dict(_tensors(network)) for network in networks]
        # contiguous, as the gradients: see `optim.align_`
        stacked = {name: torch.stack([one[name] for one in values]).contiguous() for name in values[0]}
        self._parameters = {name: stacked[name] for name, _ in networks[0].named_parameters()}
        self._buffers = {name: stacked[name] for name, _ in networks[0].named_buffers()}
        for number, network in enumerate(networks):
            _place(network, {name: value[number] for name, value in stacked.items()})
        for value in self._parameters.values():
            value.requires_grad_()
        self._counts = [self._buffers.pop(name) for name in list(self._buffers) if name.endswith("num_batches_tracked")]
        for name in self._dropouts:
            chances = [network.get_submodule(name).p for network in networks]  # type: ignore[union-attr]
            self._buffers[f"{name}.p"] = torch.tensor(chances, device=self._device)
        clips = [clip for *_, clip in self._all]
        largest = [math.inf if clip is None else clip for clip in clips]
        like = next(iter(self._parameters.values()))
        self._clips = like.new_tensor(largest) if any(clips) else None
        self._joints = list(self._joined())
        self._whole: Step = self._eager
        optimizers = [joint.optimizer for _, joint in self._joints]
        if self._capture and all(can_be_captured(optimizer) for optimizer in optimizers):
            for optimizer in optimizers:
                make_capturable_(optimizer)
            self._whole = CapturedStep(self._eager, optimizers, self._capture)

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Have each network's optimizer take a step with the gradient of its own mini-batch.

        Args:
            images: uint8 (R, B, C, H, W).
            labels: int64 (R, B).

        Returns each one's mean cross-entropy (R,) and answers (R, B).
        """
        for _, joint in self._joints:
            joint.take_rates()
        return self._whole(images, labels)

    def _joined(self) -> Iterator[tuple[slice, Joint]]:
        values = {name: value.detach() for name, value in self._parameters.items()}
        start = 0
        for _, group in itertools.groupby(self._all, lambda one: likeness(one[1], one[2])):
            networks, optimizers, *_ = zip(*group, strict=True)
            span = slice(start, start + len(networks))
            yield span, Joint(networks, optimizers, {name: value[span] for name, value in values.items()})
            start = span.stop

    def _eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._forward(self._parameters, self._buffers, images)  # (R, B, K)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        found = torch.autograd.grad(losses.sum(), list(self._parameters.values()), allow_unused=True)
        gradients = {
            name: gradient.contiguous()
            for name, gradient in zip(self._parameters, found, strict=True)
            if gradient is not None  # of a parameter that the network does not use
        }
        for count in self._counts:
            count += 1
        if self._clips is not None:
            clip_(gradients.values(), self._clips)
        for span, joint in self._joints:
            joint.step({name: gradient[span] for name, gradient in gradients.items()})
        return losses.detach(), logits.detach().argmax(2)

    def _call(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self._body, (parameters, buffers), (images,))


def clip_(gradients: Iterable[Tensor], largest: Tensor) -> None:
    """As `nn.utils.clip_grad_norm_` for each of R networks: gradients (R, ...), the largest L2 norm of each (R,)."""
    each = [gradient.view(len(gradient), -1) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in each])
    shrunk = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1)
    shrunk = torch.where(largest.isinf(), 1, shrunk)  # where even the norm is infinite
    for gradient in each:
        gradient.mul_(shrunk.unsqueeze(1))


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Values of the parameters, and buffers."""
    yield from ((name, parameter.data) for name, parameter in network.named_parameters())
    yield from network.named_buffers()


def _place(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Have the parameters and buffers of `network` hold these."""
    for name, parameter in network.named_parameters():
        parameter.data = tensors[name]
    for name, _ in list(network.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, tensors[name])


class Dropout(nn.Module):
    """As `nn.Dropout`, with a probability that each replica has for itself."""

    p: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand_like(x) < self.p, 0, x / (1 - self.p))
