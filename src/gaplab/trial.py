"""How many runs to train as one: what a short trial finds fastest, down to one by one."""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaplab import config as configs
from gaplab import worker
from gaplab.config import Config
from gaplab.data.datamodule import DataModule, build_datamodule, read_sources, read_together
from gaplab.errors import UserError
from gaplab.machine import memory
from gaplab.training.optim import build_optimizer
from gaplab.training.stack import Stack

STEPS = 40  # of a trial, at most, and seconds
SECONDS = 0.5
WARM_UP = 2  # steps
SHORT_S = 10.0  # of training in all: a trial would take longer than it spares
LONGEST_STEP_S = 2.0  # of all runs together; more are not tried
WORTH = 0.95  # of the time alone, at most, for runs to be trained as one
COPIES = 3  # of what a run needs at least: vmap moves replicas between axes (1.0 to 2.6 seen on the CPU)


def plan(config: Config, count: int, replicas: int | None, processes: int) -> tuple[int, str]:
    """How many of `count` runs of the kind of `config` to train as one, and why, in words.

    Args:
        config: of one of them.
        count: at least 2.
        replicas: what was asked for; None for what is fastest.
        processes: that compute at the same time.

    Raises UserError where memory cannot hold what was asked for.
    """
    worker.set_up(config)
    name = f"{count} runs of {configs.run_name(replace(config, name=None)).rpartition(' ')[0]}"
    sources = read_sources(config.data, config.allowed_targets, worker.data_cache(config))
    data = build_datamodule(config.data, config.seed, bn=config.model.bn, sources=sources)
    each = COPIES * worker.bytes_of(config, data, worker.footprint_of(config, data))
    fitting = max(1, int(memory() / (processes * max(each, 1))))
    most = min(count, replicas or count)
    if replicas is not None and most > fitting:
        needed = processes * most * each / 1e9
        raise UserError(
            f"hydra.launcher.replicas={replicas}: as one, in {processes} processes, they need {needed:,.1f} GB of "
            f"memory or more; there are {memory() / 1e9:,.1f}, enough for {fitting}"
        )
    if replicas is not None:
        return most, f"{name}: {most} as one, as asked"
    if fitting == 1:
        return 1, f"{name}: one by one, for memory holds no two as one"
    found = times(config, data, min(count, fitting))
    best = min(found, key=lambda number: found[number])
    if len(found) == 1:
        return 1, f"{name}: one by one, too short to find out whether as one they would be faster"
    if found[best] > WORTH * found[1]:
        least = min(seconds for number, seconds in found.items() if number > 1)
        return 1, f"{name}: one by one, for as one they would take {least / found[1]:.2f} times as long"
    return best, f"{name}: up to {best} as one, {found[1] / found[best]:.2f} times as fast as one by one"


def times(config: Config, data: DataModule, most: int) -> dict[int, float]:
    """Seconds of one run's optimizer step when 1, 2, 4, … runs, at most `most`, are trained as one.

    Stops where more only take longer, and at a number that cannot be trained as one. Where the whole training is short,
    1 is all that is tried.
    """
    device = worker.device_of(config)
    data.to_(device)
    with worker.forward(config), worker.quiet_lightning():
        found = {1: _seconds(config, data, 1, device)}
        if found[1] * data.batches_per_epoch * config.trainer.max_epochs * most < SHORT_S:
            return found
        number = 2
        while number <= most:
            try:
                found[number] = _seconds(config, data, number, device)
            except (RuntimeError, ValueError):  # vmap cannot take every network
                break
            if (found[number] > 1.05 * min(found.values()) and number > 4) or found[number] * number > LONGEST_STEP_S:
                break
            number *= 2
    return found


def _seconds(config: Config, data: DataModule, number: int, device: torch.device) -> float:
    """Of one run's step, the median of some."""
    networks: list[nn.Module] = []
    for place in range(number):
        network = worker.initial_network(replace(config, seed=(config.seed + place) % 2**32), data)
        networks.append(network.to(device, torch.float64 if config.trainer.precision == "64-true" else None).train())
    optimizers = [build_optimizer(network, config.optimizer, config.allowed_targets) for network in networks]
    stack = Stack(networks) if number > 1 else None
    taken: list[float] = []
    for images, labels in itertools.islice(_endless([data] * number), STEPS):
        start = time.perf_counter()
        if stack is None:
            F.cross_entropy(networks[0](images[0]), labels[0]).backward()
        else:
            stack.learn(images, labels)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if sum(taken) > SECONDS and len(taken) > 2 * WARM_UP:
            break
    return statistics.median(taken[WARM_UP:]) / number


def _endless(runs: list[DataModule]) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        yield from read_together(runs, epoch, 0)
