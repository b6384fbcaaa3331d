"""Pictures that fit into memory: one uint8 tensor on the training device."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Pictures by index, wherever they lie. `labels` is int64 (N,) on the CPU; `in_shape` is (C, H, W)."""

    labels: Tensor
    in_shape: tuple[int, int, int]

    def images(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each int64 (B,) of indices, uint8 (B, C, H, W) on the device."""
        ...

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over the pixels of `indices`, float64 (C,), in units of [0, 1]."""
        ...

    def digest(self) -> str:
        """16 hex digits that change when a picture or a label does."""
        ...

    def to_(self, device: torch.device) -> None:
        """Have `images` give tensors on `device` from now on."""
        ...


class Resident:
    """A `Source` in memory.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels.contiguous()
        self.labels = labels
        self.in_shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self._digest = ""

    def images(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        rows = self.pixels.flatten(1)  # of whole rows, index_select is several times as fast as indexing
        for indices in batches:
            yield rows.index_select(0, indices.to(rows.device)).view(-1, *self.in_shape)

    def moments(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        sums = [pixel_sums(self.pixels[part]) for part in indices.split(4096)]
        return moments(sums, len(indices) * self.in_shape[1] * self.in_shape[2])

    def digest(self) -> str:
        if not self._digest:
            whole = hashlib.sha256(self.pixels.cpu().numpy().data)
            whole.update(self.labels.numpy().data)
            self._digest = whole.hexdigest()[:16]
        return self._digest

    def to_(self, device: torch.device) -> None:
        self.pixels = self.pixels.to(device)


def pixel_sums(pixels: Tensor) -> Tensor:
    """Exact sums of the values and of their squares: uint8 (B, C, H, W) -> int64 (2, C), by way of a histogram."""
    histogram = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]
    )  # (C, 256)
    values = torch.arange(256, device=pixels.device)
    return torch.stack([(histogram * values).sum(1), (histogram * values.square()).sum(1)])


def count_flat(pixels: Tensor) -> int:
    """How many of some pictures, uint8 (B, C, H, W), are of a single colour, or nearly: no channel spans 8 values."""
    if not len(pixels):
        return 0
    rows = pixels.flatten(2)
    return int(((rows.amax(2) - rows.amin(2)).amax(1) < 8).sum())


def tell_flat(flat: int, count: int) -> str:
    """That in a line; empty when there is none."""
    return f"{flat} of {count} pictures are of a single colour, or nearly" if flat else ""


def moments(sums: Iterable[Tensor], pixels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64 (C,) in units of [0, 1], from `pixel_sums` over `pixels` pixels a channel.

    A channel without any variation gets the standard deviation 1.
    """
    total = sum(sums, torch.zeros((), dtype=torch.int64)).double().cpu()  # (2, C)
    mean = total[0] / pixels
    variance = (total[1] / pixels - mean.square()).clamp(min=0)
    std = torch.where(variance > 0, variance.sqrt(), 255.0)
    return mean / 255, std / 255
