"""Initial weights, drawn layer by layer from streams of their own.

The k-th linear or convolutional layer draws from (seed, k) alone: two networks that differ in a toggle start from the
same weights wherever their shapes agree, and runs can be paired by seed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gaplab.seeding import derive_seed

WeightedLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Fill = Callable[[Tensor, torch.Generator], object]
STD_WITHIN_2 = 0.879626  # standard deviation of a standard normal variable that lies within [-2, 2]


def weighted_layers(network: nn.Module) -> list[tuple[str, WeightedLayer]]:
    """The linear and convolutional layers, in order of definition, with their names."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, WeightedLayer)]


def is_drawn(layer: WeightedLayer) -> bool:
    """Whether an initializer may fill this layer: none of its parameters is frozen (`requires_grad` is False), and its
    weight is a parameter, not computed from others (`torch.nn.utils.parametrize`)."""
    frozen = any(not parameter.requires_grad for parameter in layer.parameters(recurse=False))
    return "weight" in layer._parameters and not frozen


def described(network: nn.Module, init: str) -> str:
    """Which layers of `network` the initializer `init` fills, in words."""
    layers = [layer for _, layer in weighted_layers(network)]
    drawn = 0 if init == "default" else sum(map(is_drawn, layers))
    text = "as the network's constructor leaves them (model.init=default)"
    if init != "default":
        text = f"{init} in {drawn} of {len(layers)} linear and convolutional layers"
        if drawn < len(layers):
            text += "; the others, frozen or with a computed weight, as the network's constructor leaves them"
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    if trained < (params := sum(parameter.numel() for parameter in network.parameters())):
        text += f"; {trained:,} of {params:,} parameters are trained"
    return text


def init_(network: nn.Module, init: str, gain: float, std: float, activation: str, seed: int) -> None:
    """Fill the weights of the linear and convolutional layers that `is_drawn` in place; their biases become 0.

    Args:
        init: a name of `torch.nn.init` without its underscore, "lsuv" (orthogonal here; see `lsuv_`), or "default",
            which changes nothing.
        gain: factor on the initializer's own scale, > 0.
        std: standard deviation of normal, uniform and trunc_normal, > 0. trunc_normal is a normal distribution cut at
            2 of its own standard deviations, which are std / 0.88 each, so that what is left has `std`.
        activation: what kaiming initializers correct for.
        seed: the run's seed.

    References:
        https://docs.pytorch.org/docs/stable/nn.init.html
    """
    # torch knows no gain for the smooth kin of relu, and takes relu's
    torch_name: Any = {"silu": "relu", "gelu": "relu", "elu": "relu"}.get(activation, activation)
    wide = std / STD_WITHIN_2
    slope = 0.01 if activation == "leaky_relu" else 0.0
    fills: dict[str, Fill] = {
        "kaiming_normal": lambda w, g: nn.init.kaiming_normal_(w, a=slope, nonlinearity=torch_name, generator=g),
        "kaiming_uniform": lambda w, g: nn.init.kaiming_uniform_(w, a=slope, nonlinearity=torch_name, generator=g),
        "xavier_normal": lambda w, g: nn.init.xavier_normal_(w, generator=g),
        "xavier_uniform": lambda w, g: nn.init.xavier_uniform_(w, generator=g),
        "orthogonal": lambda w, g: nn.init.orthogonal_(w, generator=g),
        "lsuv": lambda w, g: nn.init.orthogonal_(w, generator=g),
        "normal": lambda w, g: nn.init.normal_(w, std=std, generator=g),
        "uniform": lambda w, g: nn.init.uniform_(w, -std * 3**0.5, std * 3**0.5, generator=g),
        "trunc_normal": lambda w, g: nn.init.trunc_normal_(w, std=wide, a=-2 * wide, b=2 * wide, generator=g),
        "zeros": lambda w, g: nn.init.zeros_(w),
    }
    if init == "default":
        return
    with torch.no_grad():
        for index, (_, layer) in enumerate(weighted_layers(network)):
            if not is_drawn(layer):
                continue
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", index))
            fills[init](layer.weight, generator)
            layer.weight.mul_(gain)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def lsuv_(network: nn.Module, images: Tensor, gain: float = 1.0) -> None:
    """Scale the weights of each layer that `is_drawn` in place so that its output on `images` has standard deviation
    `gain`.

    Biases must be 0: a layer's output is then linear in its weights, one pass in evaluation mode sets every layer
    exactly, and nothing is iterated. Raises ValueError for a layer whose output is constant, or that the network does
    not call exactly once.

    References:
        Mishkin, Matas, "All you need is a good init", 2015, arXiv:1511.06422.
    """

    calls: list[str] = []

    def rescale(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(name)
            std = float(output.double().std())
            if not std > 0:
                raise ValueError(f"model.init=lsuv: the output of layer {name} is constant, it cannot be scaled")
            layer.weight.mul_(gain / std)
            return output * (gain / std)

        return hook

    drawn = [(name, layer) for name, layer in weighted_layers(network) if is_drawn(layer)]
    handles = [layer.register_forward_hook(rescale(name)) for name, layer in drawn]
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()(images)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    for name, _ in drawn:
        if calls.count(name) != 1:
            raise ValueError(f"model.init=lsuv: the network calls layer {name} {calls.count(name)} times, not once")
