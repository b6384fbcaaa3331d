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


def weighted_layers(network: nn.Module) -> list[tuple[str, WeightedLayer]]:
    """The linear and convolutional layers, in order of definition, with their names."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, WeightedLayer)]


def init_(network: nn.Module, init: str, gain: float, std: float, activation: str, seed: int) -> None:
    """Fill the weights of all linear and convolutional layers in place; their biases become 0.

    Args:
        init: a name of `torch.nn.init` without its underscore, or "lsuv" (orthogonal here; see `lsuv_`).
        gain: factor on the initializer's own scale, > 0.
        std: standard deviation of normal, trunc_normal (cut at two of them) and uniform, > 0.
        activation: what kaiming initializers correct for.
        seed: the run's seed.

    References:
        https://docs.pytorch.org/docs/stable/nn.init.html
    """
    # torch knows no gain for the smooth kin of relu, and takes relu's
    torch_name: Any = {"silu": "relu", "gelu": "relu", "elu": "relu"}.get(activation, activation)
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
        "trunc_normal": lambda w, g: nn.init.trunc_normal_(w, std=std, a=-2 * std, b=2 * std, generator=g),
        "zeros": lambda w, g: nn.init.zeros_(w),
    }
    with torch.no_grad():
        for index, (_, layer) in enumerate(weighted_layers(network)):
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", index))
            fills[init](layer.weight, generator)
            layer.weight.mul_(gain)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def lsuv_(network: nn.Module, images: Tensor, gain: float = 1.0) -> None:
    """Scale each layer's weights in place so that its output on `images` has standard deviation `gain`.

    Biases must be 0: a layer's output is then linear in its weights, one pass in evaluation mode sets every layer
    exactly, and nothing is iterated. Raises ValueError for a layer whose output is constant.

    References:
        Mishkin, Matas, "All you need is a good init", 2015, arXiv:1511.06422.
    """

    def rescale(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            std = float(output.double().std())
            if not std > 0:
                raise ValueError(f"model.init=lsuv: the output of layer {name} is constant, it cannot be scaled")
            layer.weight.mul_(gain / std)
            return output * (gain / std)

        return hook

    handles = [layer.register_forward_hook(rescale(name)) for name, layer in weighted_layers(network)]
    training = network.training
    try:
        network.eval()(images)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
