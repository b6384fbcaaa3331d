"""Checkpoints read back: they may be damaged, or somebody else's. Needs torch alone."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gaplab.errors import UserError
from gaplab.files import plain, read_bytes


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's plain values and tensors; nothing in it is executed, or grows beyond the file.

    The one function that reads checkpoints. Raises UserError when it is damaged or holds anything else.
    """
    try:
        _check_checksum(path)
        _check_archive(path)
        found = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{plain(path)}: holds more than plain values and tensors; it is not read") from None
    except UserError:
        raise
    except Exception as error:  # of a file that is made to break its reader, it may be any; MemoryError, too
        reason = plain(f"{type(error).__name__}: {error}".partition("\n")[0])
        raise UserError(f"{plain(path)}: cannot be read ({reason[:200]})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{plain(path)}: not a checkpoint, it holds no named values")
    state = found.get("state_dict", {})
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{plain(path)}: not a checkpoint, its state_dict holds no named values")
    return found


def _check_checksum(path: Path) -> None:
    for one in (path, checksum_path(path)):
        if one.is_symlink():
            raise UserError(f"{plain(one)}: a link, to {plain(os.path.realpath(one))}; give the file itself")
    if not path.is_file():  # a pipe would keep us waiting
        raise UserError(f"{plain(path)}: {'not a file' if path.exists() else 'no such file'}")
    checksum = checksum_path(path)
    if checksum.exists() and read_bytes(checksum, 4096).split()[:1] != [sha256(path).encode()]:
        raise UserError(f"{plain(path)}: damaged, it does not have the checksum in {plain(checksum.name)}")


def _check_archive(path: Path) -> None:
    """torch writes zip archives whose entries are stored as they are: what is compressed may unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise UserError(f"{plain(path)}: not a checkpoint, or cut off (no zip archive)") from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise UserError(f"{plain(path)}: has compressed entries, which torch never writes; it is not read")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{plain(path)}: its entries overlap; it is not read")
    for entry in entries:
        if entry.filename.startswith("/") or ".." in entry.filename.replace("\\", "/").split("/"):
            raise UserError(f"{plain(path)}: the entry {plain(entry.filename)} leads out of it; it is not read")


def checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
