"""Runs that were never run, for what reads runs."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

from gaplab.analysis.runs import Run

FIXED = {"data.name": "mnist", "data.valid_size": "5000", "model.name": "mlp", "optimizer.lr": "0.001"}


def noise(*keys: object) -> float:
    """A number in (-1, 1) that depends on the keys alone."""
    return random.Random(repr(keys)).uniform(-1, 1)


def synthetic(
    grid: Mapping[str, Sequence[str]], seeds: Sequence[int], measure: Callable[..., dict[str, float] | None]
) -> list[Run]:
    """A run for each combination and seed; `measure(settings, seed)` gives its metrics, None for one that diverged."""
    runs = []
    for levels in itertools.product(*grid.values()):
        for seed in seeds:
            settings = FIXED | dict(zip(grid, levels, strict=True))
            metrics = measure(settings, seed)
            name = f"{len(runs)}_{'_'.join(levels)}_s{seed}"
            run = Run(name, seed, "FAILED" if metrics is None else "FINISHED", settings, classes=10)
            if metrics is None:
                run.diverged, run.error = True, "the loss is nan"
            else:
                run.metrics = dict(metrics)
                run.history = {key: {1: 0.5 * value, 2: value} for key, value in metrics.items()}
            runs.append(run)
    return runs


def accuracies(train: float, valid: float) -> dict[str, float]:
    return {"train/acc": train, "valid/acc": valid, "gap/acc": train - valid, "train/acc_running": train - 0.001}
