"""What this machine has, and how to spare it work."""

import gc
import multiprocessing
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GPUS = "GAPLAB_GPUS"  # the names of those that a sweep's processes share
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def memory() -> int:
    """Bytes of main memory that this process can ever have: the machine's, or its container's."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # no container, or one without a limit: "max"
            found.append(int(Path(limit).read_text()))
    return min(found)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(name: str, *words: str) -> str:
    """What to type, in this folder and shell, for `src/<name>.py` with these words under the Python that runs now."""
    python = Path(sys.executable)
    on_path = shutil.which(python.name)
    program = python.name if on_path and Path(on_path).parent == python.parent else from_here(python)
    return shlex.join([program, from_here(Path(__file__).resolve().parents[1] / f"{name}.py"), *words])


def from_here(path: Path) -> str:
    """`path` as short as it can be typed: relative where it lies below the working folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def share_gpus(count: int) -> None:
    """Have the processes that this one starts, each by `take_a_gpu`, share the `count` GPUs that it sees."""
    os.environ[GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))


def take_a_gpu() -> None:
    """Have a process of joblib's, before it uses any GPU, see only its own among those that `share_gpus` named."""
    gpus = os.environ.get(GPUS, "").split(",")
    number = multiprocessing.current_process().name.rpartition("-")[2]
    if len(gpus) > 1 and number.isdecimal():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(number) % len(gpus)]


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: imports make a million objects that stay, and to look through them again and
    again takes a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
