"""A sweep of 72 runs beside their bare training: hand-written loops of one thread each, on all cores at once.

    python benchmarks/sweeps.py [--epochs 10]

BatchNorm x dropout x three initializers x six seeds of the small network on MNIST, with honest evaluation of both
splits after each epoch on either side. The sweep is the command as a person types it, with MLflow, checkpoints and
journals, from start to end; the hand-written loops have their data in memory and keep nothing.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from queue import Queue

from contenders import TOGGLED
from harness import TRAIN, Contender, keep, timed

SAMPLES, VALID = 55_000, 1000
GRID = ["model.bn=false,true", "model.dropout=0,0.5", "model.init=xavier_uniform,kaiming_normal,orthogonal"]
REPEATS = 3 * 6 // 2  # runs of each of TOGGLED before the sweep, and again after it


def bare(epochs: int) -> float:
    """Seconds of half the runs together, each as long as it took beside the others."""
    cores = len(os.sched_getaffinity(0))
    free: Queue[Contender] = Queue()
    for _ in range(cores):
        free.put(Contender("hand-written", threads=1))
    for one in list(free.queue):
        one.ask(work=next(iter(TOGGLED)), batch=128, samples=SAMPLES, epochs=1, seed=0)  # its data are read

    def run(job: tuple[int, str]) -> float:
        contender, start = free.get(), time.perf_counter()
        contender.ask(work=job[1], batch=128, samples=SAMPLES, epochs=epochs, seed=job[0])
        free.put(contender)
        return time.perf_counter() - start

    with ThreadPoolExecutor(cores) as pool:
        seconds = sum(pool.map(run, product(range(REPEATS), TOGGLED)))
    while not free.empty():
        free.get().close()
    return seconds


def sweep(epochs: int) -> float:
    with tempfile.TemporaryDirectory() as outputs:
        words = [*GRID, "seed=range(6)", "hydra/launcher=joblib", f"trainer.max_epochs={epochs}", "figures=false"]
        words += [f"data.train_size={SAMPLES}", f"data.valid_size={VALID}", f"paths.outputs={outputs}"]
        return timed(TRAIN, "-m", *words)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    cores = len(os.sched_getaffinity(0))
    before = bare(epochs)
    whole = sweep(epochs)
    after = bare(epochs)
    share = (before + after) / cores
    keep("sweep", {"epochs": epochs, "cores": cores, "bare": [before, after], "sweep": whole, "ratio": whole / share})
    print(
        f"72 runs of {epochs} epochs: bare training {before:.0f} s before it and {after:.0f} s after, on {cores} cores"
    )
    print(f"the sweep {whole:.0f} s: {whole / share:.2f} times as long")


if __name__ == "__main__":
    main()
