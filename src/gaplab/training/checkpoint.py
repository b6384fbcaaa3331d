"""Checkpoints that are whole or absent, with a checksum beside each.

A file is written under a temporary name in its own folder, forced to disk and renamed, so that a crash leaves the old
one. `<name>.sha256`, written last, is in the format of `sha256sum --check`.
"""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gaplab.errors import UserError


class ChecksumIO(TorchCheckpointIO):
    """Lightning's checkpoint writer and reader with the promises above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            digest = _sha256(partial)
            _checksum_path(path).unlink(missing_ok=True)  # of the old file: a crash here leaves one without a checksum
            os.replace(partial, path)
            with partial.open("w") as file:
                file.write(f"{digest}  {path.name}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, _checksum_path(path))
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        _checksum_path(Path(path)).unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's plain values and tensors; nothing in it is executed.

    Raises UserError when it is damaged or holds anything else.
    """
    checksum = _checksum_path(path)
    if checksum.is_file() and checksum.read_text().split()[:1] != [_sha256(path)]:
        raise UserError(f"{path}: damaged, it does not have the checksum in {checksum.name}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than plain values and tensors; it is not read") from None
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]})") from None


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
