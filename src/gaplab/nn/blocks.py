"""The layers that a network is built from, and where its toggles act.

A network asks `Layers` for a convolution, a normalization before or after an activation, a dropout; what is switched
off comes back as an identity, so that no network holds a toggle `if`.

Shapes: B samples, C channels, H height, W width, D units, K classes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
ACTIVATION_CLASSES: tuple[type[nn.Module], ...] = tuple(type(build()) for build in ACTIVATIONS.values())


class Layers:
    """Factories of the layers that a config toggles.

    Args:
        bn: whether `norm_before` or `norm_after` gives BatchNorm (the other, and both without, give the identity).
        bn_position: "before_activation" (the paper's place, on Wu) or "after_activation".
        bn_momentum: weight of the newest batch in the running statistics, in (0, 1].
        bn_eps: added to the variance under the root, > 0.
        dropout: probability of dropping a unit, in [0, 1).
        activation: a key of `ACTIVATIONS`.

    References:
        Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        2015, arXiv:1502.03167.
        Li, Chen, Hu, Yang, "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift",
        2018, arXiv:1801.05134: within a block, dropout comes after the last normalization.
    """

    def __init__(
        self,
        bn: bool = False,
        bn_position: str = "before_activation",
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        self._bn_before = bn and bn_position == "before_activation"
        self._bn_after = bn and not self._bn_before
        self._norms = {
            rank: partial(norm, eps=bn_eps, momentum=bn_momentum)
            for rank, norm in {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}.items()
        }
        self._dropout = dropout
        self.activation = ACTIVATIONS[activation]

    def linear(self, in_features: int, out_features: int) -> nn.Linear:
        """(B, in_features) -> (B, out_features); without a bias where a normalization follows and would cancel it."""
        return nn.Linear(in_features, out_features, bias=not self._bn_before)

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride); bias as in `linear`."""
        return nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=not self._bn_before
        )

    def norm_before(self, features: int, rank: int) -> nn.Module:
        """What stands between a layer and its activation: (B, D) for rank 1, (B, C, H, W) for rank 2."""
        return self._norms[rank](features) if self._bn_before else nn.Identity()

    def norm_after(self, features: int, rank: int) -> nn.Module:
        """What stands behind an activation; shapes as in `norm_before`."""
        return self._norms[rank](features) if self._bn_after else nn.Identity()

    def behind_conv(self, channels: int) -> nn.Module:
        """For networks of others that only let a `norm_layer` be chosen: the norm, or activation and norm in one."""
        return (
            sequential(self.activation(), self.norm_after(channels, 2))
            if self._bn_after
            else self.norm_before(channels, 2)
        )

    def behind_norm(self) -> nn.Module:
        """The activation that belongs to `behind_conv`."""
        return nn.Identity() if self._bn_after else self.activation()

    def add_bias_(self, conv: nn.Conv2d) -> None:
        """Give a convolution that was made without one its bias, unless a normalization follows directly."""
        if not self._bn_before:
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))

    def dropout(self) -> nn.Module:
        """Drops single units of (B, D), and scales the others by 1 / (1 - p)."""
        return nn.Dropout(self._dropout) if self._dropout else nn.Identity()

    def dense_block(self, in_features: int, out_features: int) -> nn.Sequential:
        """linear, [norm], activation, [norm], [dropout]: (B, in_features) -> (B, out_features)."""
        return sequential(
            self.linear(in_features, out_features),
            self.norm_before(out_features, 1),
            self.activation(),
            self.norm_after(out_features, 1),
            self.dropout(),
        )

    def conv_block(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
        """conv, [norm], activation, [norm]: (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""
        return sequential(
            self.conv(in_channels, out_channels, stride=stride),
            self.norm_before(out_channels, 2),
            self.activation(),
            self.norm_after(out_channels, 2),
        )


def sequential(*modules: nn.Module) -> nn.Sequential:
    """`nn.Sequential` without the identities."""
    return nn.Sequential(*(module for module in modules if not isinstance(module, nn.Identity)))


class Normalize(nn.Module):
    """Raw pixels to network input: (x / 255 - mean) / std per channel, uint8 (B, C, H, W) -> float32 (B, C, H, W).

    With `binary`, pixels above half of the range become 1 and the others 0 instead. `mean` and `std`, float64 (C,) in
    units of [0, 1], and `binary` are buffers: saved with the network, so that a checkpoint takes pictures as they are.
    """

    mean: Tensor
    std: Tensor
    binary: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("std", torch.ones(channels, dtype=torch.float64))
        self.register_buffer("binary", torch.tensor(False))
        self.register_buffer("scale", torch.full((channels, 1, 1), 1 / 255), persistent=False)
        self.register_buffer("shift", torch.zeros(channels, 1, 1), persistent=False)
        self._binary = False  # the buffer's value, known without waiting for a GPU
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh_())

    def set_(self, mean: Tensor, std: Tensor, binary: bool = False) -> None:
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.binary.fill_(binary)
        self.refresh_()

    def refresh_(self) -> None:
        """Fold both into one multiplication and one addition, computed in float64, rounded to float32: a network that
        is float64 by now began so."""
        self.scale.copy_((1 / (255 * self.std)).float().reshape(self.scale.shape))
        self.shift.copy_((-self.mean / self.std).float().reshape(self.shift.shape))
        self._binary = bool(self.binary)

    def forward(self, images: Tensor) -> Tensor:
        if self._binary:
            return (images > 127).to(self.scale.dtype)
        return images.to(self.scale.dtype, copy=True).mul_(self.scale).add_(self.shift)
