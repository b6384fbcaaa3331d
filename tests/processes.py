"""Commands that run beside a test, and the ranks that they start."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from gaplab import config as configs


def started(*words: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """`python src/train.py …`, under the command `before`; what it says is read by `communicate`."""
    command = [*before, sys.executable, str(configs.PROJECT / "src" / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Forked:
    """`python src/train.py …` in a fork of this process, which has imported torch already; it is asked like a Popen."""

    def __init__(self, *words: str) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed when it is read)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=words)
        self._process.start()
        self.pid, self.kill, self.returncode = self._process.pid, self._process.kill, None

    def _run(self, *words: str) -> None:
        for number in (1, 2):
            os.dup2(self._output.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        script = str(configs.PROJECT / "src" / "train.py")
        sys.argv = [script, *words]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        self._process.join()
        self.poll()
        self._output.seek(0)
        with self._output:
            return self._output.read(), ""


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
