"""Small files that a crash may cut off: written whole or not at all, read as empty when they are not whole."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file, or none that is whole."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def explain_disk(error: BaseException, folder: Path) -> str | None:
    """What to do about a disk that is full or cannot be written, when `error` says so; else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    if error.errno == errno.EROFS:
        return f"{folder}: the disk has become read-only; make it writable, then go on with resume={folder}"
    sizes = [path.stat().st_size for path in (folder / "checkpoints").glob("*.ckpt")]
    needed = f", a checkpoint takes {max(sizes) / 1e6:.1f} MB" if sizes else ""
    free = shutil.disk_usage(folder).free / 1e6
    return f"{folder}: the disk is full ({free:.1f} MB free{needed}); free some, then go on with resume={folder}"
