"""Data sets that are made, not stored: `data._target_=made.Pictures`."""

import torch
from torchvision.datasets import CIFAR10


class Pictures(CIFAR10):
    """`samples` random pictures of `side` x `side` pixels in 10 classes, which their brightness tells roughly.

    Held as torchvision holds CIFAR-10, so that its arrays are read at once and not sample by sample.
    """

    def __init__(self, samples: int, side: int = 32, channels: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.classes = [str(label) for label in range(10)]
        self.targets = torch.randint(10, (samples,), generator=generator)
        shape = (samples, side, side, channels) if channels > 1 else (samples, side, side)
        data = torch.empty(shape, dtype=torch.uint8)
        for part, labels in zip(data.split(65536), self.targets.split(65536), strict=True):
            part.random_(0, 156, generator=generator)
            part += (10 * labels).to(torch.uint8).view(-1, *[1] * (part.ndim - 1))
        self.data = data.numpy()
        self.transform = self.target_transform = None
