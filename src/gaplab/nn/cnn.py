"""A small convolutional network of the LeNet family."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gaplab.nn.blocks import Layers


class CNN(nn.Module):
    """Stages of a 3x3 convolution and 2x2 max pooling, dense blocks, a linear layer: (B, C, H, W) -> logits (B, K).

    Dropout acts in the dense blocks alone. Raises ValueError when the pictures are too small for the stages.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        layers: Layers,
        widths: Sequence[int],
        hidden_dims: Sequence[int],
    ) -> None:
        super().__init__()
        in_channels, height, width = in_shape
        height, width = height >> len(widths), width >> len(widths)
        if height == 0 or width == 0:
            raise ValueError(f"pictures of {in_shape[1]}x{in_shape[2]} pixels are too small for {len(widths)} stages")
        channels = [in_channels, *widths]
        self.stages = nn.Sequential(
            *(nn.Sequential(layers.conv_block(*pair), nn.MaxPool2d(2)) for pair in pairwise(channels))
        )
        dims = [channels[-1] * height * width, *hidden_dims]
        self.blocks = nn.Sequential(*(layers.dense_block(*pair) for pair in pairwise(dims)))
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stages(x).flatten(1)))
