"""Networks of one build that learn as one: a forward and a backward pass for all of them.

Their tensors lie side by side, along a replica axis that comes first; each network's own are views into those. So an
optimizer, a checkpoint or an evaluation of one of them needs to know nothing of the others.

Shapes: R replicas, B samples, C channels, H height, W width, K classes, D anything.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm


class Stack:
    """Networks that differ in their tensors, and in the probabilities of their `nn.Dropout`, alone.

    BatchNorm's statistics are each network's own. So is what dropout draws, from torch's global stream.

    Args:
        networks: uint8 (B, C, H, W) -> logits (B, K), in train mode, on one device. From now on their parameters and
            buffers are views; the parameters stay the same objects.

    References:
        PyTorch documentation, "Model ensembling" (`torch.func`).
        Wang, Yang, Zheng, Li, Pekhimenko, "Horizontally Fused Training Array: An Effective Hardware Utilization
        Squeezer for Training Novel Deep Learning Models", 2021, arXiv:2102.02344.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._body = copy.deepcopy(networks[0])  # what is computed; its own tensors are never used
        self._dropouts = [name for name, module in self._body.named_modules() if isinstance(module, nn.Dropout)]
        for name in self._dropouts:
            self._body.set_submodule(name, Dropout())
        for module in self._body.modules():
            if isinstance(module, _BatchNorm):
                module.num_batches_tracked = None  # counted in `learn`: vmap cannot
        self._forward = vmap(self._call, in_dims=(0, 0, 0), randomness="different")
        self.networks: list[nn.Module] = []
        self.keep(networks)

    def keep(self, networks: Sequence[nn.Module]) -> None:
        """Go on with these alone; the others get tensors of their own, and hold no memory of the stack."""
        for network in self.networks:
            if network not in networks:
                _place(network, {name: value.clone() for name, value in _tensors(network)})
        self.networks = list(networks)
        first = self.networks[0]
        values = [dict(_tensors(network)) for network in self.networks]
        # contiguous, as the gradients: see `optim.align_`
        stacked = {name: torch.stack([one[name] for one in values]).contiguous() for name in values[0]}
        self._parameters = {name: stacked[name] for name, _ in first.named_parameters()}
        self._buffers = {name: stacked[name] for name, _ in first.named_buffers()}
        for number, network in enumerate(self.networks):
            _place(network, {name: value[number] for name, value in stacked.items()})
        for value in self._parameters.values():
            value.requires_grad_()
        self._own = [[network.get_parameter(name) for network in self.networks] for name in self._parameters]
        self._counts = [self._buffers.pop(name) for name in list(self._buffers) if name.endswith("num_batches_tracked")]
        for name in self._dropouts:
            chances = [network.get_submodule(name).p for network in self.networks]  # type: ignore[union-attr]
            self._buffers[f"{name}.p"] = torch.tensor(chances, device=next(first.parameters()).device)

    def learn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Give each network's parameters the gradient of its own mini-batch, in `grad`.

        Args:
            images: uint8 (R, B, C, H, W).
            labels: int64 (R, B).

        Returns each one's mean cross-entropy (R,) and answers (R, B).
        """
        logits = self._forward(self._parameters, self._buffers, images)  # (R, B, K)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        gradients = torch.autograd.grad(losses.sum(), list(self._parameters.values()), allow_unused=True)
        for parameters, gradient in zip(self._own, gradients, strict=True):
            if gradient is not None:  # of a parameter that the network does not use
                for parameter, own in zip(parameters, gradient.contiguous().unbind(), strict=True):
                    parameter.grad = own
        for count in self._counts:
            count += 1
        return losses.detach(), logits.detach().argmax(2)

    def _call(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self._body, (parameters, buffers), (images,))


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
