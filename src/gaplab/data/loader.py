"""An epoch as chunks of mini-batches, in an order that (seed, epoch) alone decides."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from gaplab.seeding import derive_seed

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, int, int, int], Tensor]


class EpochOrder:
    """A sampler: the order of `indices` in the epoch that `set_epoch` names. Lightning calls it by itself."""

    def __init__(self, indices: Tensor, seed: int) -> None:
        self.indices = indices
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> Tensor:
        """A permutation of the indices, int64 (N,)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


class Chunk:
    """The next `steps` mini-batches of an epoch, read when it is used: gathered ahead, it would leave the cache."""

    def __init__(self, batches: Iterator[Batch], steps: int) -> None:
        self._batches = batches
        self._steps = steps

    def __iter__(self) -> Iterator[Batch]:
        return islice(self._batches, self._steps)

    def __len__(self) -> int:
        return self._steps


class ChunkLoader:
    """Iterates over the chunks of an epoch.

    Args:
        read: from the index tensors (B,) of mini-batches, the epoch and the first one's number in it to batches of
            images uint8 (B, C, H, W) and labels int64 (B,).
        sampler: order of the samples.
        batch_size: samples in a mini-batch; the last one of an epoch may hold fewer.
        chunk_size: mini-batches in a chunk.
        least: samples that a last mini-batch needs, or it is left out: BatchNorm cannot tell the variance of one.

    Attributes:
        samples: in an epoch; `left_out` more are in none of its mini-batches.
        begin: mini-batches of the next epoch that are done already; their chunks come without them, and maybe empty.
    """

    def __init__(
        self,
        read: Callable[[list[Tensor], int, int], Iterator[Batch]],
        sampler: EpochOrder,
        batch_size: int,
        chunk_size: int,
        least: int = 1,
    ) -> None:
        self.read = read
        self.sampler = sampler
        self.batch_size = batch_size
        self.chunk_size = chunk_size
        self.begin = 0
        count = len(sampler.indices)
        self.left_out = count % batch_size if count % batch_size < least else 0
        self.samples = count - self.left_out
        self.steps = -(-self.samples // batch_size)

    def __len__(self) -> int:
        return -(-self.steps // self.chunk_size)

    def __iter__(self) -> Iterator[Chunk]:
        begin, self.begin = self.begin, 0
        batches = list(self.sampler.order().split(self.batch_size))[begin : self.steps]
        stream = self.read(batches, self.sampler.epoch, begin)
        for start in range(0, self.steps, self.chunk_size):
            end = min(start + self.chunk_size, self.steps)
            yield Chunk(stream, max(0, end - max(start, begin)))


def augmentation(kind: str, padding: int, seed: int, epoch: int) -> Augment:
    """A function of uint8 images (b, C, H, W), the number of their batch in the epoch, its size B, and the place of the
    first of them in it: each picture changed on its own.

    `kind` is "crop" (shifted by up to `padding` pixels, zeros moving in), "flip" (mirrored left-right with probability
    one half) or "crop_flip". What is drawn depends on (seed, epoch, batch, B) alone, on any
    device and on any number of them.
    """

    def augment(images: Tensor, batch: int, size: int, first: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "augment", epoch, batch))
        count, _, height, width = images.shape
        device, part = images.device, slice(first, first + count)
        if "crop" in kind:
            top, left = torch.randint(0, 2 * padding + 1, (2, size, 1), generator=generator)[:, part].to(device)
            rows = (top + torch.arange(height, device=device))[:, :, None]  # (B, H, 1)
            columns = (left + torch.arange(width, device=device))[:, None, :]  # (B, 1, W)
            padded = torch.nn.functional.pad(images, (padding,) * 4)
            which = torch.arange(count, device=device)[:, None, None]
            images = padded[which, :, rows, columns].permute(0, 3, 1, 2)  # indexed: (B, H, W, C)
        if "flip" in kind:
            mirrored = (torch.rand(size, 1, 1, 1, generator=generator)[part] < 0.5).to(device)
            images = torch.where(mirrored, images.flip(3), images)
        return images

    return augment
