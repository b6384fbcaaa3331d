"""Checkpoints that are whole or absent, with a checksum beside each, and when they are written.

A file is written under a temporary name in its own folder, forced to disk, read back, and renamed, so that a crash
leaves the old one. `<name>.sha256`, written last, is in the format of `sha256sum --check`; a file without one was
renamed just before a crash. What `last.ckpt` held before is `previous.ckpt`.
"""

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gaplab import interrupt
from gaplab.errors import UserError
from gaplab.ranks import ALONE, Ranks
from gaplab.training.classifier import Classifier
from gaplab.training.reader import checksum_path, read_checkpoint, sha256

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

AGREE_EVERY = 10  # optimizer steps; asking all processes takes about 0.1 ms

T = TypeVar("T")


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` after every epoch, within one every `every_s` seconds, and before a signal stops the run;
    `best.ckpt` after each epoch that `is_best`. Lightning calls it after the other callbacks.

    Args:
        folder: existing.
        every_s: seconds between two saves within an epoch.
        is_best: whether the newest epoch is the best one.
        ranks: the processes that train together: all save, and stop, after the same step.

    Attributes:
        earlier_s: seconds that an earlier process spent in training and measuring, up to the checkpoint gone on from.
        save_s: seconds that this process spent in saving; `within_s` of them within training steps.
    """

    def __init__(self, folder: Path, every_s: float, is_best: Callable[[], bool], ranks: Ranks = ALONE) -> None:
        self._folder = folder
        self._every_s = every_s
        self._is_best = is_best
        self._ranks = ranks
        self.earlier_s = self.save_s = self.within_s = 0.0
        self._start = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        interrupt.reclaim()  # Lightning stops between two of its batches, without a checkpoint
        self._trainer, self._classifier = trainer, pl_module
        self._start = self._saved = time.perf_counter()
        pl_module.after_step.append(self._after_step)

    def _after_step(self, steps: int) -> None:
        if self._ranks.size > 1 and steps % AGREE_EVERY:
            return
        before = self.save_s
        try:
            self.pause()
        finally:
            self.within_s += self.save_s - before

    def pause(self) -> None:
        """Save if it is time, or if a signal waits; then raise Interrupted. To be called where training may be left:
        between two optimizer steps, and between two batches of an evaluation."""
        signum, due = divmod(self._ranks.largest(2 * (interrupt.pending() or 0) + self._is_due()), 2)
        if signum or due:
            self._classifier.count_up()
            self._save(LAST)
        if signum:
            raise interrupt.Interrupted(signum)

    def paused(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a place to stop before each."""
        for item in items:
            if interrupt.pending() or self._ranks.size > 1:  # several must agree, and have as many items
                self.pause()
            yield item

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_best():
            self._save(BEST)
            if self._ranks.rank == 0:  # who alone has written it
                start = time.perf_counter()
                let_last_be_best(self._folder)
                self.save_s += time.perf_counter() - start
        else:
            self._save(LAST)
        if signum := self._ranks.largest(interrupt.pending() or 0):
            raise interrupt.Interrupted(signum)

    def _is_due(self) -> bool:
        return self._ranks.rank == 0 and time.perf_counter() - self._saved > self._every_s

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.earlier_s + time.perf_counter() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_s = state_dict["seconds"]

    def _save(self, name: str) -> None:
        start = time.perf_counter()
        self._trainer.save_checkpoint(self._folder / name)
        self._saved = time.perf_counter()
        self.save_s += self._saved - start


class ChecksumIO(TorchCheckpointIO):
    """Lightning's checkpoint writer and reader with the promises above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch hides an error of the disk behind one of its own
        torch.save(checkpoint, buffer)
        _place(path, buffer.getbuffer(), hashlib.sha256(buffer.getbuffer()).hexdigest())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


def let_last_be_best(folder: Path) -> None:
    """Write what `best.ckpt` holds as `last.ckpt` too: a file of its own, in case one of them is damaged."""
    _place(folder / LAST, (folder / BEST).read_bytes(), _read_checksum(folder / BEST))


def _place(path: Path, content: bytes | memoryview, digest: str) -> None:
    """Have `content`, whose SHA-256 is `digest`, be the file at `path`."""
    partial = path.with_name(f".{path.name}")
    try:
        _write(partial, content)
        if sha256(partial) != digest:
            raise OSError(f"{path}: the disk does not give back what was written to it")
        if path.name == LAST and checksum_path(path).is_file():
            _keep(path, path.with_name(PREVIOUS))
        checksum_path(path).unlink(missing_ok=True)  # of the old file: a crash here leaves one without a checksum
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _write_checksum(path, digest)
    _sync_folder(path.parent)


def _keep(path: Path, older: Path) -> None:
    """Let `older` be what `path` is. At every instant one of the two is whole and has its checksum."""
    digest = _read_checksum(path)
    partial = older.with_name(f".{older.name}")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:  # a file system without links
        shutil.copyfile(path, partial)
    checksum_path(older).unlink(missing_ok=True)
    os.replace(partial, older)
    _write_checksum(older, digest)
    _sync_folder(path.parent)  # before `path` changes


def _read_checksum(path: Path) -> str:
    return checksum_path(path).read_text().partition(" ")[0]


def _write_checksum(path: Path, digest: str) -> None:
    partial = path.with_name(f".{path.name}.sha256")
    try:
        _write(partial, f"{digest}  {path.name}\n".encode())
        os.replace(partial, checksum_path(path))
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of `folder` to go on from, None to begin anew, and what is wrong with newer ones.

    What comes after it is computed again, so a `best.ckpt` may be newer, but one that is needed must be readable.
    """
    wrong: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            checkpoint = read_checkpoint(path)
            if checkpoint["progress"]["epochs"]:
                read_checkpoint(folder / BEST)
        except UserError as error:
            wrong.append(str(error))
        except (KeyError, TypeError):
            wrong.append(f"{path}: not a checkpoint that a run can go on from")
        else:
            return path, wrong
    return None, wrong
