"""What computed a run: the project's commit, library versions, CPU, threads, device. They are tags of the run."""

import hashlib
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gaplab.config import PROJECT
from gaplab.files import plain

RESUMED = "resumed_from"  # tag of an attempt that began from a checkpoint
COMPARED = {
    "git/commit": "commit",
    "cpu/capability": "CPU",
    "cpu/threads": "CPU threads",
    "compute/device": "device",
    "version/torch": "torch",
    "version/lightning": "lightning",
}
CPUINFO = Path("/proc/cpuinfo")

Tags = Mapping[str, Any]


@cache  # every job of a sweep asks for the same
def source_tags() -> dict[str, str]:
    """Library versions and, in a git checkout, the project's commit and whether files differ from it."""
    return {f"version/{name}": metadata.version(name) for name in ("torch", "lightning", "hydra-core")} | dict(_git())


def _git() -> Iterator[tuple[str, str]]:
    def git(*words: str) -> bytes:
        command = ["git", "--no-optional-locks", "-C", str(PROJECT), *words]
        return subprocess.run(command, capture_output=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        commit = git("rev-parse", "HEAD").decode()
        yield "git/commit", commit
        yield "mlflow.source.git.commit", commit  # where MLflow's own pages look for it
        yield "git/dirty", str(bool(git("status", "--porcelain"))).lower()
        if changes := git("diff", "--no-ext-diff", "--no-textconv", "HEAD"):
            yield "git/diff", hashlib.sha256(changes).hexdigest()[:8]


def compute_tags(device: str) -> dict[str, str]:
    """The kind of CPU, which decides the last bits of a result, the threads of this process, and `device`."""
    import torch

    vendor = ""
    with suppress(OSError):  # only x86 on Linux names one
        vendor = "".join(re.findall(r"^vendor_id\s*:\s*(\S+)", CPUINFO.read_text(), re.MULTILINE)[:1])
    kind = platform.machine(), vendor, torch.backends.cpu.get_cpu_capability()
    return {
        "cpu/capability": " ".join(filter(None, kind)),
        "cpu/threads": str(torch.get_num_threads()),
        "compute/device": device,
    }


def attempts(events: Iterable[Mapping[str, Any]]) -> Sequence[Tags]:
    """The tags of each attempt in a run's journal that its result comes from: those since it last began anew. An
    attempt that ended before its first epoch did is no beginning."""
    found: list[dict[str, Any]] = []
    start = 0
    for event in events:
        if event["event"] == "run":
            found.append({})
        elif event["event"] == "tags" and found:
            found[-1] |= event["values"]
        elif event["event"] == "metrics" and found and RESUMED not in found[-1]:
            start = len(found) - 1
    return found[start:]


def difference(runs: Sequence[Sequence[Tags]]) -> str | None:
    """How the environments of some runs differ, as a sentence; None where they do not.

    Args:
        runs: each as the tags of its `attempts`. A tag that a run lacks counts as equal.
    """
    parts, many = [], len(runs) > 1
    for name, label in COMPARED.items():
        counts = Counter(
            " then ".join(dict.fromkeys(_shown(tags, name) for tags in run if name in tags)) for run in runs
        )
        del counts[""]
        if len(counts) > 1 or any(" then " in value for value in counts):
            values = [f"{value} ({count} run{'s' * (count > 1)})" if many else value for value, count in counts.items()]
            parts.append(f"{label} {', '.join(values)}")
    if not parts:
        return None
    what = (
        "these runs have different environments, which may explain differences between them"
        if many
        else "the environment changed during this run, so its results may differ from an uninterrupted run's"
    )
    return f"{what}: {'; '.join(parts)}"


def _shown(tags: Tags, name: str) -> str:
    value = plain(tags[name])[:80]
    if name != "git/commit":
        return value
    changes = f" with uncommitted changes ({plain(tags['git/diff'])[:8]})" if "git/diff" in tags else ""
    return value[:7] + changes
