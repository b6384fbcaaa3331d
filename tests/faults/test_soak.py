"""Three hundred runs in one process: memory, open files and threads do not grow."""

import gc
import os
import threading
from pathlib import Path

from conftest import SMALL, composed

from gaplab import launch

RUNS, WARM_UP = 300, 150  # freed memory is kept for reuse, and the network's figures come every thirtieth run
RUN = [*SMALL, "model.bn=true", "data.train_size=300", "data.valid_size=100", "trainer.max_epochs=1"]


def megabytes() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_three_hundred_runs_leave_nothing_behind_in_the_process(tmp_path: Path):
    seen = []
    for number in range(RUNS):
        figures = f"figures={'true' if number % 30 == 0 else 'false'}"
        launch.launch(composed(*RUN, f"paths.outputs={tmp_path}", f"seed={number}", figures))
        if number in (WARM_UP, RUNS - 1):
            gc.collect()  # what a run has mapped goes with the cycles that hold it
        seen.append((megabytes(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    for number in (0, WARM_UP // 2, WARM_UP, RUNS - 1):
        memory, files, threads = seen[number]
        print(f"after run {number + 1}: {memory:.0f} MB, {files} open files, {threads} threads")
    assert seen[-1][1:] == seen[WARM_UP][1:]
    assert seen[-1][0] - seen[WARM_UP][0] < 0.02 * seen[WARM_UP][0]
