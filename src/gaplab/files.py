"""Files as they come, from a crash or from somebody else: written whole or not at all, read with limits.

What is read here is data alone: no tag of a YAML file makes an object, and nothing grows beyond its file.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gaplab.errors import UserError

MAX_TEXT_BYTES = 4_000_000  # of a config; the largest that gaplab writes has 5 kB
MAX_JSON_BYTES = 256_000_000
MAX_NODES = 100_000  # of a YAML document, its aliases written out
MAX_DEPTH = 32
LOCK_WAIT_S = 1  # others look for a moment whether it is held
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")} | {"!"}
# control characters, line ends and marks that turn the writing direction: a terminal obeys them
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object) -> str:
    r"""As one line that does nothing to a terminal: control characters are written out, as `\x1b`."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), str(text))


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)  # a link there would lead the text elsewhere
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file, or none that is whole."""
    try:
        found = json.loads(read_bytes(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError, UserError):
        return {}
    return found if isinstance(found, dict) else {}


def read_bytes(path: Path, limit: int) -> bytes:
    """What a regular file holds: a pipe would keep us waiting. Raises OSError, or UserError above `limit` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{plain(path)}: not a file")
    if status.st_size > limit:
        raise UserError(f"{plain(path)}: {status.st_size / 1e6:.1f} MB, more than the {limit / 1e6:g} MB that are read")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """A small text file. Raises UserError."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{plain(path)}: cannot be read (not UTF-8 text)") from None
    except OSError as error:
        raise UserError(f"{plain(path)}: cannot be read ({error.strerror or type(error).__name__})") from None


def refuse_links(folder: Path) -> None:
    """What goes on writes and deletes in its folder; no link there may lead that elsewhere. Raises UserError."""
    try:
        links = [Path(entry) for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError as error:
        raise UserError(f"{plain(folder)}: cannot be read ({error.strerror})") from None
    for link in links:
        raise UserError(f"{plain(link)}: a link, to {plain(os.path.realpath(link))}; replace it by what it leads to")


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder`, so that no other process writes there; the lock ends with its process, however that ends.

    Raises UserError that says `what` when another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise UserError(f"{folder}: {what}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time in. Where the lock cannot be written, all may go: nothing else is written there."""
    from filelock import FileLock

    lock = FileLock(path)
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_yaml(text: str, origin: str, resolved: bool = False) -> None:
    """Refuse a YAML document that a loader should not be given. Raises UserError that names `origin`.

    Refused are tags that make objects, a document within itself, and more than `MAX_NODES` nodes or `MAX_DEPTH` levels
    once its aliases are written out. Only the stream of events is looked at, so nothing is built meanwhile.

    Args:
        text: of the file.
        origin: where it comes from, for people.
        resolved: refuse `${…}` too, as in a config that was resolved before it was saved.
    """
    import yaml

    origin = plain(origin)
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"{origin}: more than the {MAX_TEXT_BYTES / 1e6:g} MB of a config that are read")
    open_nodes: list[list[Any]] = [[None, 0, 0]]  # anchor, nodes and levels of those that are not closed yet
    known: dict[str, tuple[int, int]] = {}

    def close(anchor: str | None, nodes: int, levels: int) -> None:
        if anchor is not None:
            known[anchor] = nodes, levels
        above = open_nodes[-1]
        above[1], above[2] = above[1] + nodes, max(above[2], levels)
        if sum(one[1] for one in open_nodes) > MAX_NODES:
            raise UserError(f"{origin}: more than {MAX_NODES} values; not a config")

    try:
        for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if (tag := getattr(event, "tag", None)) is not None and tag not in _PLAIN_TAGS:
                raise UserError(f"{origin}: the tag {plain(tag)} would make an object; only plain values are read")
            match event:
                case yaml.AliasEvent():
                    if event.anchor not in known:
                        raise UserError(f"{origin}: the alias {plain(event.anchor)} contains itself, or nothing")
                    close(None, *known[event.anchor])
                case yaml.ScalarEvent():
                    if resolved and "${" in event.value:
                        raise UserError(f"{origin}: {plain(event.value)[:80]} is still to be filled in")
                    close(event.anchor, 1, 1)
                case yaml.CollectionStartEvent():
                    known.pop(event.anchor, None)
                    open_nodes.append([event.anchor, 1, 0])
                case yaml.CollectionEndEvent():
                    anchor, nodes, levels = open_nodes.pop()
                    close(anchor, nodes, levels + 1)
            if len(open_nodes) + open_nodes[-1][2] > MAX_DEPTH:
                raise UserError(f"{origin}: nested more than {MAX_DEPTH} levels deep; not a config")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: cannot be read ({type(error).__name__})") from None


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
