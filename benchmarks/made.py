"""Data sets that are made, not stored: `data._target_=made.Pictures`."""

from typing import Any

import torch
from torch.utils.data import Dataset


class Pictures(Dataset[Any]):
    """`samples` random pictures of `side` x `side` pixels in 10 classes, which their brightness tells roughly."""

    def __init__(self, samples: int, side: int = 32, channels: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = [str(label) for label in range(10)]
        self.targets = torch.randint(10, (samples,), generator=generator)
        shape = (samples, side, side, channels) if channels > 1 else (samples, side, side)
        self.data = torch.empty(shape, dtype=torch.uint8)
        for part, labels in zip(self.data.split(65536), self.targets.split(65536), strict=True):
            part.random_(0, 156, generator=generator)
            part += (10 * labels).to(torch.uint8).view(-1, *[1] * (part.ndim - 1))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[index].permute(2, 0, 1), int(self.targets[index])
