"""Residual networks for small pictures."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gaplab.nn.blocks import Layers


class BasicBlock(nn.Module):
    """activation(shortcut + conv(block(x))): (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    With `bn_position=before_activation`, each convolution is normalized before the addition, as in the paper; with
    `after_activation`, each activation is normalized, the one after the addition included.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.first = layers.conv_block(in_channels, channels, stride)
        self.second = nn.Sequential(layers.conv(channels, channels), layers.norm_before(channels, 2))
        self.shortcut = Shortcut(channels - in_channels, stride)
        self.activation = nn.Sequential(layers.activation(), layers.norm_after(channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.second(self.first(x)) + self.shortcut(x))


class Shortcut(nn.Module):
    """The paper's option A, without parameters: every stride-th pixel, new channels zero."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class ResNet(nn.Module):
    """(B, C, H, W) -> logits (B, K). Dropout stands before the last layer.

    Args:
        depth: 6n+2, three stages of n blocks each (the CIFAR networks of section 4.2), or 18, four stages of two
            blocks (table 1), here with a 3x3 stem without pooling, for small pictures.
        widths: channels of each stage; None means the paper's.

    References:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        layers: Layers,
        depth: int,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        blocks = 2 if depth == 18 else (depth - 2) // 6
        widths = widths or ([64, 128, 256, 512] if depth == 18 else [16, 32, 64])
        self.stem = layers.conv_block(in_shape[0], widths[0])
        stages: list[nn.Module] = []
        in_channels = widths[0]
        for stage, channels in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(in_channels, channels, stride, layers))
                in_channels = channels
        self.stages = nn.Sequential(*stages)
        self.dropout = layers.dropout()
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x)).mean((2, 3))  # (B, C)
        return self.head(self.dropout(x))
