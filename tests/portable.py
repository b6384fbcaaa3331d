"""The tests on other kinds of CPU, with other counts of threads and other seeds: `make test-portable`.

Each variant is a line: passed, failed, seconds. `python tests/portable.py <variant>…` runs some of them.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

DEFAULT = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ALL = ["--ignore=tests/faults", "--ignore=tests/cluster", "--ignore=tests/ui"]
TRAINING = [
    "tests/training",
    "tests/data/test_cache.py",
    "tests/test_devices.py",
    "tests/test_evaluation.py",
    "tests/test_library.py",
    "tests/test_prediction.py",
    "tests/test_promotion.py",
    "tests/test_resume.py",
    "tests/test_together.py",
    "tests/test_worker.py",
    "tests/tracking/test_registry.py",
    "tests/tracking/test_serving.py",
]
VARIANTS = {
    "default": (DEFAULT, ALL),
    "avx2": (AVX2, ALL),
    "1-thread": ({"GAPLAB_TEST_THREADS": "1"}, ALL),
    "2-threads": ({"GAPLAB_TEST_THREADS": "2", "OMP_WAIT_POLICY": "passive"}, ALL),  # 4 threads on 2 cores would spin
    **{f"seeds+{shift}": ({}, [*TRAINING, f"--seed-shift={shift}"]) for shift in range(1, 6)},
    "training-default": (DEFAULT, TRAINING),  # a part of the first, for .ci/run
}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=2", "--dist=worksteal"]


def passes(name: str) -> bool:
    """Run one variant; its failures, and a line of what it came to."""
    environment, words = VARIANTS[name]
    begin = time.monotonic()
    done = subprocess.run(
        [*PYTEST, "-m", "not full", *words],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    if done.returncode:
        print(done.stdout)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    seconds = time.monotonic() - begin
    print(f"{name:<16} {counts.get('passed', 0):>5} passed {failed:>3} failed {seconds:>6.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    outcomes = [passes(name) for name in sys.argv[1:] or list(VARIANTS)[:-1]]
    sys.exit(not all(outcomes))
