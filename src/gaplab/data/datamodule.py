"""The data of a run: sources, splits, statistics and loaders."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import PIL
import torch
import torchvision
from lightning.pytorch import LightningDataModule
from torch import Tensor

from gaplab.config import Data, ImageFolder, TorchvisionData, count, sizes
from gaplab.data.cache import Loaded, cached
from gaplab.data.datasets import files_of, load_dataset, notes_on
from gaplab.data.loader import Batch, ChunkLoader, EpochOrder, augmentation
from gaplab.data.pictures import find_pictures, fit_memory, load_pictures
from gaplab.data.resident import Source
from gaplab.data.splits import noisy_labels, split
from gaplab.errors import UserError
from gaplab.files import plain
from gaplab.ranks import ALONE, Ranks

SHOWN_CLASSES = 8

log = logging.getLogger(__name__)


@dataclass
class Split:
    """Samples of a source: `indices` int64 (n,), and `labels` int64 (N,) of the whole source, noise included."""

    source: Source
    indices: Tensor
    labels: Tensor


class DataModule(LightningDataModule):
    """The splits `train`, `valid` and, where there is one, `test`.

    Args:
        splits: by name.
        classes: names of the K classes.
        data: the config group.
        seed: the run's seed.
        chunk_size: mini-batches in a chunk.
        bn: whether the network has BatchNorm, which takes at least 2 samples of a batch on each device.
        ranks: the processes that train together; each reads its part of every mini-batch.

    Attributes:
        mean, std: float64 (C,) over the train split alone, in units of [0, 1]; 0 and 1 as far as `normalize` leaves
            them out.
    """

    def __init__(
        self,
        splits: dict[str, Split],
        classes: list[str],
        data: Data,
        seed: int,
        chunk_size: int,
        bn: bool,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.classes = classes
        self.in_shape = splits["train"].source.in_shape
        self._data = data
        self._seed = seed
        self._ranks = ranks
        mean, std = splits["train"].source.moments(splits["train"].indices)
        self.mean = torch.zeros_like(mean) if data.normalize in ("none", "binary") else mean
        self.std = std if data.normalize == "standardize" else torch.ones_like(std)
        self._chunk_size = chunk_size
        side = min(self.in_shape[1:])
        if "crop" in data.augment and data.crop_padding >= side:
            raise UserError(f"data.crop_padding={data.crop_padding}: must be below {side}, the side of the pictures")
        self.fit_batchnorm(bn)

    def fit_batchnorm(self, bn: bool) -> None:
        """Leave out a last mini-batch that is too small for BatchNorm, if there is `bn`. Raises UserError when nothing
        is left."""
        data, ranks = self._data, self._ranks
        sampler = EpochOrder(self.splits["train"].indices, self._seed)
        least = 2 * ranks.size if bn else 1
        self._loader = ChunkLoader(self._read_train, sampler, data.batch_size, self._chunk_size, least)
        if self._loader.steps == 0:
            few = f"{self._loader.left_out} sample{'s' * (self._loader.left_out != 1)}"
            raise UserError(f"data.batch_size={data.batch_size}: the train split has {few}, too few for BatchNorm")
        if (left_out := self._loader.left_out) and ranks.rank == 0:
            few, on = ("one sample", "") if left_out == 1 else (f"{left_out} samples", f" on {ranks.size} devices")
            log.warning("each epoch's last training batch has %s, too few for BatchNorm%s: it is left out", few, on)

    def describe(self) -> list[str]:
        """What the splits hold, in two lines; the counts of classes are those of the train split, without noise."""
        parts = [f"{name} {len(part.indices):,}" for name, part in self.splits.items()]
        train = self.splits["train"]
        counts = train.source.labels[train.indices].bincount(minlength=len(self.classes)).tolist()
        each = [f"{plain(name)[:30]} ({count:,})" for name, count in zip(self.classes, counts, strict=True)]
        if len(each) > SHOWN_CLASSES:
            each = [*each[: SHOWN_CLASSES - 1], "…", each[-1]]
        least, most = min(counts), max(counts)
        each_has = f"{least:,} each" if least == most else f"of {least:,} to {most:,}"
        classes = f"{len(counts)} in train, {each_has}: {', '.join(each)}"
        size = "x".join(map(str, self.in_shape))
        missing = "" if "test" in self.splits else ", no test"
        return [f"data    {plain(self._data.name)} {size}: {', '.join(parts)}{missing}", f"classes {classes}"]

    @property
    def batches_per_epoch(self) -> int:
        """Mini-batches in an epoch."""
        return self._loader.steps

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch trains on."""
        return self._loader.samples

    def setup(self, stage: str) -> None:
        """Move what is resident to the training device; Lightning calls this."""
        assert self.trainer is not None
        self.to_(self.trainer.strategy.root_device)

    def to_(self, device: torch.device) -> None:
        for part in self.splits.values():
            part.source.to_(device)
            part.labels = part.labels.to(device)

    def save_splits(self, path: Path) -> None:
        """Write the indices of `train` and `valid` into the official training part (of a folder: its sorted pictures).

        A file from an earlier attempt stays as it is. Raises UserError when it holds other indices, or cannot be read.
        """
        splits = {name: self.splits[name].indices.numpy() for name in ("train", "valid")}
        if not path.is_file():
            partial = path.with_name(f".{path.name}")
            np.savez(partial, allow_pickle=False, **splits)
            os.replace(partial, path)
            return
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                same = all(np.array_equal(kept[name], indices) for name, indices in splits.items())
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{plain(path)}: cannot be read ({plain(error)}); start a new run") from None
        if not same:
            raise UserError(
                f"{plain(path)}: the run was trained on other samples than its config selects now; resume it with the "
                "data and the version of gaplab that it was started with, or start a new run"
            )

    def train_dataloader(self) -> ChunkLoader:
        return self._loader

    def batches(self, name: str) -> Iterator[Batch]:
        """Every sample of a split once, in order, unaugmented: images uint8 (B, C, H, W), labels int64 (B,)."""
        part = self.splits[name]
        yield from _read(part, list(part.indices.split(self._data.eval_batch_size)))

    def labelled(self, name: str, shared: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """As `batches`; under label noise, those of the train split end with the labels without noise, int64 (B,).

        `shared` among the processes that train together, each gets its part of them, in as many batches.
        """
        part, size = self.splits[name], self._data.eval_batch_size
        parts = list(part.indices.split(size))
        if shared and self._ranks.size > 1:
            largest = -(-len(part.indices) // self._ranks.size)
            parts = list(self._ranks.share(part.indices).tensor_split(-(-largest // size)))
        for indices, (images, labels) in zip(parts, _read(part, parts), strict=True):
            if name == "train" and self._data.label_noise:
                yield images, labels, part.source.labels.index_select(0, indices).to(labels.device)
            else:
                yield images, labels

    def sample(self, name: str, count: int) -> Tensor:
        """The same `count` images of a split every time, or all if they are fewer: uint8 (B, C, H, W)."""
        part = self.splits[name]
        available = len(part.indices)
        count = min(count, available)
        return next(iter(part.source.images([part.indices[torch.arange(count) * available // count]])))

    def begin_at(self, batch: int) -> None:
        """Leave out the first `batch` mini-batches of the next epoch: they are done."""
        self._loader.begin = batch

    def _read_train(self, batches: list[Tensor], epoch: int, first: int) -> Iterator[Batch]:
        stream = _read(self.splits["train"], [self._ranks.share(batch) for batch in batches])
        if self._data.augment == "none":
            yield from stream
            return
        augment = augmentation(self._data.augment, self._data.crop_padding, self._seed, epoch)
        for number, (batch, (images, labels)) in enumerate(zip(batches, stream, strict=True), first):
            yield augment(images, number, len(batch), self._ranks.first(len(batch))), labels


def read_together(runs: Sequence[DataModule], epoch: int, first: int) -> Iterator[Batch]:
    """The mini-batches of an epoch, from `first` on, of R runs at once: images uint8 (R, B, C, H, W), labels (R, B).

    Each gets those that it would get alone. Their train splits are of one source and of one size.
    """
    loaders = [one.train_dataloader() for one in runs]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    parts = [one.splits["train"] for one in runs]
    source, device = parts[0].source, parts[0].labels.device
    orders = torch.stack([loader.sampler.order() for loader in loaders])  # (R, N)
    labels = torch.stack(
        [part.labels.index_select(0, order.to(device)) for part, order in zip(parts, orders, strict=True)]
    )
    steps, size = loaders[0].steps, loaders[0].batch_size
    chosen = list(zip(orders.split(size, 1), labels.split(size, 1), strict=True))[first:steps]
    augments = [
        augmentation(one._data.augment, one._data.crop_padding, one._seed, epoch)
        for one in runs
        if one._data.augment != "none"
    ]
    stream = source.images(indices.flatten() for indices, _ in chosen)
    for number, ((indices, answers), flat) in enumerate(zip(chosen, stream, strict=True), first):
        images = flat.unflatten(0, indices.shape)
        if augments:
            pairs = zip(augments, images, strict=True)
            images = torch.stack([augment(own, number, len(own), 0) for augment, own in pairs])
        yield images, answers


def _read(part: Split, batches: list[Tensor]) -> Iterator[Batch]:
    for indices, images in zip(batches, part.source.images(batches), strict=True):
        yield images, part.labels.index_select(0, indices.to(part.labels.device))


@dataclass
class Sources:
    """What a data config names, before any seed has split it; `parts` are int64 indices into `train`, or `test`."""

    train: Source
    test: Source
    parts: dict[str, np.ndarray]
    classes: list[str]


def read_sources(data: Data, allowed_targets: list[str] | None = None, cache: Path | None = None) -> Sources:
    """Read the data that a config group describes, from the folder `cache` if they are there. Raises UserError."""
    if isinstance(data, ImageFolder):
        source, parts, classes = _image_folder(data, cache)
        return Sources(source, source, parts, classes)
    assert isinstance(data, TorchvisionData)
    train, test, classes = _torchvision(data, allowed_targets or ["torchvision"], cache)
    if data.num_train not in (None, len(train.labels)):
        raise UserError(f"data.num_train={data.num_train}: {data.name} in {data.root} has {len(train.labels)}")
    return Sources(train, test, {"train": np.arange(len(train.labels)), "test": np.arange(len(test.labels))}, classes)


def build_datamodule(
    data: Data,
    seed: int,
    chunk_size: int = 50,
    bn: bool = False,
    allowed_targets: list[str] | None = None,
    ranks: Ranks = ALONE,
    cache: Path | None = None,
    sources: Sources | None = None,
) -> DataModule:
    """Read the data that a config group describes, as `read_sources`, unless `sources` has them, and split them.

    Raises UserError.
    """
    sources = sources or read_sources(data, allowed_targets, cache)
    source, parts, classes = sources.train, sources.parts, sources.classes
    labels = source.labels.numpy()
    official = parts["train"]
    if "valid" in parts:
        if data.valid_size != type(data).valid_size:
            log.warning(
                "data.valid_size=%g is not used: %s has a validation part of its own", data.valid_size, data.root
            )
        num_train = sizes_beside(data, len(official))
        train, valid = official[split(labels[official], num_train, 0, seed)[0]], parts["valid"]
    else:
        chosen = split(labels[official], *sizes(data, len(official)), seed)
        train, valid = official[chosen[0]], official[chosen[1]]
    noisy = noisy_labels(labels, train, data.label_noise, len(classes), seed)
    splits = {
        "train": Split(source, torch.from_numpy(train), torch.from_numpy(noisy)),
        "valid": Split(source, torch.from_numpy(valid), source.labels),
    }
    if len(parts.get("test", [])):
        splits["test"] = Split(sources.test, torch.from_numpy(parts["test"]), sources.test.labels)
    return DataModule(splits, classes, data, seed, chunk_size, bn, ranks)


def sizes_beside(data: Data, available: int) -> int:
    """Samples of the train split when `valid/` holds the other one."""
    if data.train_size is None:
        return available
    wanted = count("train_size", data.train_size, available)
    if wanted > available:
        raise UserError(f"data.train_size={data.train_size:g}: the training part has {available} samples")
    return wanted


def _torchvision(data: TorchvisionData, allowed: list[str], cache: Path | None) -> tuple[Source, Source, list[str]]:
    root = Path(data.root).expanduser()

    def files() -> list[Path]:
        elsewhere = "root" in data.train_kwargs | data.test_kwargs
        return [] if elsewhere else files_of(data._target_, root, allowed)

    def load() -> Loaded:
        train, test, classes = load_dataset(data._target_, data.root, data.train_kwargs, data.test_kwargs, allowed)
        return [train, test], {"classes": classes, "notes": list(notes_on(train, test, classes, data.name))}

    recipe = [torchvision.__version__, data._target_, data.train_kwargs, data.test_kwargs]
    (train, test), names = cached(cache, recipe, root, files, load)
    for note in names["notes"]:
        log.warning("%s", note)
    return train, test, names["classes"]


def _image_folder(data: ImageFolder, cache: Path | None) -> tuple[Source, dict[str, np.ndarray], list[str]]:
    root = Path(data.root).expanduser()
    found = find_pictures(root)

    def load() -> Loaded:
        source, folder, notes = load_pictures(
            found, data.image_size, data.channels, data.skip_broken, data.memory_budget_gb, data.workers
        )
        return [source], {"classes": folder.classes, "parts": folder.parts, "notes": notes}

    if not fit_memory(found, data.image_size, data.channels, data.memory_budget_gb):
        cache = None
    recipe = [PIL.__version__, data.image_size, data.channels, data.skip_broken]
    (source,), names = cached(cache, recipe, root, lambda: found.files, load)
    for note in found.notes + names["notes"]:
        log.warning("%s", note)
    marks = np.array(names["parts"])
    parts = {part: np.flatnonzero(marks == part) for part in ("train", "valid", "test") if (marks == part).any()}
    if "test" not in parts:
        log.warning("%s has no test/ folder with pictures: no test accuracy will be measured", data.root)
    return source, parts, names["classes"]
