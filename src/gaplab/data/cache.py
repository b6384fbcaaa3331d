"""Decoded data kept on disk from one run to the next: verified each time, memory-mapped, never needed."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from gaplab.data.resident import Resident, Source
from gaplab.files import locked, plain, read_json

FORMAT = 2  # another one when what is kept changes, or how gaplab decodes
KEPT = 5  # entries
NAME = "[0-9a-f]" * 16  # of an entry
ABANDONED = 24 * 3600  # seconds since anything was written to a folder that is not complete
Loaded = tuple[list[Source], dict[str, list[str]]]  # and names that go with the sources, "classes" among them

log = logging.getLogger(__name__)


def cached(
    cache: Path | None, recipe: list[Any], root: Path, files: Callable[[], Iterable[Path]], load: Callable[[], Loaded]
) -> Loaded:
    """What `load` gives, to the bit; its pixels are mapped from `cache` when an earlier run has decoded them.

    An entry is found by `recipe` and the place below `root`, size and times of the files, so these are as they were
    when `load` had verified them. A cache that is damaged is made anew, one that cannot be written is done without.

    Args:
        cache: the folder of all entries; None for no cache.
        recipe: plain values that decide what is made of the files.
        root: the folder that the files are in.
        files: names those that `load` reads, before and after it, as it may unpack some; without any nothing is kept.
        load: gives all sources as `Resident`.
    """
    if cache is None:
        return load()
    entry = _entry(cache, recipe, _state(root, files()))
    if found := _read(entry):
        return found
    with locked(entry.with_suffix(".lock")):  # others that want the same wait, then read it
        before = _state(root, files())
        if found := _read(_entry(cache, recipe, before)):
            return found
        sources, names = load()
        after = _state(root, files())
        if after and before.items() <= after.items():
            _write(_entry(cache, recipe, after), sources, names)
    return sources, names


def _state(root: Path, files: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(files):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            # tools that copy or unpack set the first time as they please, the second one nobody can
            found[str(path.relative_to(root))] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return found


def _entry(cache: Path, recipe: list[Any], state: dict[str, tuple[int, int, int]]) -> Path:
    return cache / _hash([FORMAT, recipe, state])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _read(entry: Path) -> Loaded | None:
    """None when there is no entry, or one that is not what was written there; that one is deleted."""
    if not os.path.isdir(entry):
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # the last that was used is the last to be dropped
    try:
        return _verified(entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: damaged (%s); the data are decoded anew", plain(entry), plain(error))
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _verified(entry: Path) -> Loaded:
    index = read_json(entry / "index.json")
    if index.pop("checksum", None) != _hash([entry.name, index]):
        raise ValueError("index.json")
    shapes, names = index["shapes"], index["names"]
    if not all(len(shape) == 4 and all(type(side) is int and side > 0 for side in shape) for shape in shapes):
        raise ValueError("shapes")
    if not all(type(some) is list and all(type(name) is str for name in some) for some in names.values()):
        raise ValueError("names")
    sizes = [math.prod(shape) + 8 * shape[0] for shape in shapes]
    if (entry / "pixels.bin").stat().st_size != sum(sizes):
        raise ValueError("the size of pixels.bin")
    content: Any = np.memmap(entry / "pixels.bin", np.uint8, "c")  # torch wants it writable; no write gets to the file
    sources: list[Source] = []
    for shape, size, digest in zip(shapes, sizes, index["digests"], strict=True):
        part, content = content[:size], content[size:]
        labels = np.array(part[-8 * shape[0] :]).view(np.int64)
        source = Resident(torch.from_numpy(part[: -8 * shape[0]]).view(shape), torch.from_numpy(labels))
        if source.digest() != digest or not 0 <= labels.min() <= labels.max() < len(names["classes"]):
            raise ValueError("pixels.bin")
        sources.append(source)
    return sources, names


def _write(entry: Path, sources: list[Source], names: dict[str, list[str]]) -> None:
    """Each source's pixels and then its labels in one file, and an index of them; at once, or not at all."""
    parts = [source for source in sources if isinstance(source, Resident)]
    partial = entry.with_name(f"{entry.name}-{uuid4().hex}")
    index = {
        "format": FORMAT,
        "shapes": [list(part.pixels.shape) for part in parts],
        "digests": [part.digest() for part in parts],
        "names": names,
    }
    text = json.dumps(index | {"checksum": _hash([entry.name, index])})
    arrays = [array.numpy().data for part in parts for array in (part.pixels, part.labels)]
    try:
        partial.mkdir(parents=True)
        if shutil.disk_usage(partial).free < 2 * sum(array.nbytes for array in arrays):
            return  # checkpoints need the room more
        for name, contents in (("pixels.bin", arrays), ("index.json", [text.encode()])):
            with (partial / name).open("wb") as file:
                file.writelines(contents)
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, entry)  # fails if another process was first, without a lock
        _drop_oldest(entry.parent)
    except OSError:
        return
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _drop_oldest(cache: Path) -> None:
    """Whoever has mapped an entry keeps it. What a writer left half done goes once it is too old to be at work."""
    entries = [path for path in cache.glob(NAME) if path.is_dir()]
    for old in sorted(entries, key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
        old.with_suffix(".lock").unlink(missing_ok=True)
    for partial in cache.glob(f"{NAME}-*"):
        if partial.stat().st_mtime < time.time() - ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)
