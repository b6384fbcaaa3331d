"""A multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gaplab.nn.blocks import Layers


class MLP(nn.Module):
    """Flatten, dense blocks, a linear layer: (B, C, H, W) -> logits (B, K)."""

    def __init__(
        self, in_shape: tuple[int, int, int], num_classes: int, layers: Layers, hidden_dims: Sequence[int]
    ) -> None:
        super().__init__()
        dims = [math.prod(in_shape), *hidden_dims]
        self.blocks = nn.Sequential(*(layers.dense_block(*pair) for pair in pairwise(dims)))
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x.flatten(1)))
