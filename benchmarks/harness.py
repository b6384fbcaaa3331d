"""What the benchmarks share: processes that answer, medians with their spread, and where the figures are kept."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
FIGURES = PROJECT / "outputs" / "benchmarks"
HERE, TRAIN = PROJECT / "benchmarks", PROJECT / "src" / "train.py"


class Contender:
    """A process of `contenders.py`, which works only while it is asked."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        words = [sys.executable, str(PROJECT / "benchmarks" / "contenders.py"), name, str(threads)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **words: Any) -> dict[str, float]:
        """Raises RuntimeError when it did not answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended without an answer to {words}")
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def timed(*arguments: str | Path) -> tuple[float, float, float, str]:
    """Unix time of a script's start, seconds, peak resident memory in MB of its process alone, and standard output.

    Raises RuntimeError with what it said unless its status is 0, or 2 for what was typed wrong.
    """
    begun, start = time.time(), time.perf_counter()
    words = [sys.executable, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=os.environ | {"PYTHONPATH": str(HERE)})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if os.waitstatus_to_exitcode(status) not in (0, 2):
            raise RuntimeError(f"{' '.join(words)}: {errors.read()}")
        return begun, seconds, usage.ru_maxrss / 1024, output.read()


def run(outputs: Path, *words: str) -> tuple[list[dict[str, Any]], float, float, float]:
    """The events of a run's journal; then as `timed`: start, seconds, peak memory in MB."""
    known = set(outputs.glob("runs/*"))
    # a model is logged when the run has ended, beside whatever is measured next
    begun, seconds, peak, _ = timed(TRAIN, f"paths.outputs={outputs}", "tracking.log_model=false", *words)
    (folder,) = set(outputs.glob("runs/*")) - known
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return events, begun, seconds, peak


def first_step(events: list[dict[str, Any]]) -> float:
    """Unix time at which a run's first optimizer step began."""
    began = next(event["time"] for event in events if event["event"] == "run")
    values = {name: value for event in events for name, value in event.get("values", {}).items()}
    return float(began + values["time/to_first_step_s"])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, least and most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median over turns of one's seconds against the other's in the same turn: what slows a turn slows both."""
    return median([one / other for one, other in zip(ones, others, strict=True)])


def machine() -> str:
    """This machine and the versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "mlflow"))
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu}, {memory:.0f} GiB; Python {platform.python_version()}, {versions}"


def commit() -> str:
    """The commit, with a plus sign where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "conf", "benchmarks")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def keep(name: str, figures: Any) -> None:
    """Keep what a benchmark saw, for `page.py`."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    seen = {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "figures": figures,
    }
    (FIGURES / f"{name}.json").write_text(json.dumps(seen, indent=1) + "\n")
