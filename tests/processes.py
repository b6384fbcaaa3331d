"""Commands that run beside a test, and the ranks that they start."""

import subprocess
import sys
from pathlib import Path

from gaplab import config as configs


def started(*words: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """`python src/train.py …`, under the command `before`; what it says is read by `communicate`."""
    command = [*before, sys.executable, str(configs.PROJECT / "src" / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(folder: Path) -> dict[int, int]:
    """Process ids of a run's ranks on this machine, by their numbers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(folder / "ranks").encode() in words and b"rank" in words:
                environment = (path / "environ").read_bytes().split(b"\0")
                found[next(int(word[5:]) for word in environment if word.startswith(b"RANK="))] = int(path.name)
        except OSError:
            continue
    return found


def of_gaplab(folder: Path) -> list[str]:
    """Command lines of all processes that have to do with a folder, but this one's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and "gaplab" in line and "pytest" not in line:
            found.append(line)
    return found


def train_py(*arguments: str, cwd: Path = configs.PROJECT) -> "subprocess.CompletedProcess[str]":
    """`python src/train.py …` in a process of its own, which may crash; conftest's runs in that of the test."""
    script = str(configs.PROJECT / "src" / "train.py")
    return subprocess.run([sys.executable, script, *arguments], cwd=cwd, capture_output=True, text=True)
