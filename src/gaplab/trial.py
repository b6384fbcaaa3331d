"""How many runs to train as one: what a short trial finds fastest, down to one by one."""

import copy
import itertools
import math
import resource
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gaplab import config as configs
from gaplab import fusing, worker
from gaplab.config import Config
from gaplab.data.datamodule import DataModule, build_datamodule, read_sources, read_together
from gaplab.machine import memory
from gaplab.training import captured
from gaplab.training.captured import CapturedStep, Step
from gaplab.training.optim import build_optimizer, make_capturable_, update_
from gaplab.training.stack import Stack

STEPS = 40  # of a trial, at most, and seconds
SECONDS = 0.3
WARM_UP = 2  # steps
SHORT_S = 10.0  # of training for a process: a trial would take longer than it spares
LARGEST_PART = 0.05  # of the training, that the trial of one number may take
HOPE = 1.3  # times as long as alone, at most, that the first number may take for a larger one to be tried
WORTH = 0.95  # of the time alone, at most, for runs to be trained as one
COPIES = 3  # of what a run needs at least: vmap moves replicas between axes (1.0 to 2.6 seen on the CPU)
FILES = 4  # that a run holds open


def plan(
    config: Config, optimizers: Sequence[configs.Optimizer], replicas: int | None, processes: int
) -> tuple[int, str]:
    """How many of the runs of one kind to train as one, 0 for none at all, and why, in words.

    Args:
        config: of the first of them.
        optimizers: of each, in their order: those that are alike cost less.
        replicas: what was asked for, at most; None for what is fastest.
        processes: that compute at the same time, and have equal parts.

    Raises UserError where the runs cannot be prepared.
    """
    worker.set_up(config)
    count = len(optimizers)
    name = fusing.label(config, count)
    sources = read_sources(config.data, config.allowed_targets, worker.data_cache(config))
    data = build_datamodule(config.data, config.seed, bn=config.model.bn, sources=sources)
    each = COPIES * worker.bytes_of(config, data, worker.footprint_of(config, data))
    fitting = memory() // (processes * max(each, 1))
    sizes = [fusing.size(count, most, processes) for most in _rising(replicas or count)]
    if replicas is not None:
        if sizes[-1] > max(1, fitting):
            return 0, (
                f"hydra.launcher.replicas={replicas}: {sizes[-1]} as one, in {processes} processes, need "
                f"{processes * sizes[-1] * each / 1e9:,.1f} GB of memory or more; there are {memory() / 1e9:,.1f}"
            )
        return sizes[-1], f"{name}: {sizes[-1]} as one, as asked"
    if max(sizes) == 1:
        return 1, f"{name}: one by one, a process for each"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FILES
    possible = sorted({size for size in sizes if 1 < size <= min(fitting, files)})
    if not possible:
        return 1, f"{name}: one by one, for memory holds no two as one"
    found = times(config, optimizers, data, possible, config.trainer.max_epochs * count / processes)
    best = min(found, key=lambda number: found[number])
    if found[max(found)] == math.inf and len(found) == 2:
        return 1, f"{name}: one by one, for {max(found)} as one cannot be computed here"
    if len(found) == 1:
        return 1, f"{name}: one by one, too short to find out whether as one they would be faster"
    if found[best] > WORTH * found[1]:
        least = min(seconds for number, seconds in found.items() if number > 1)
        return 1, f"{name}: one by one, for as one they would take {least / found[1]:.2f} times as long"
    return best, f"{name}: {best} as one, {found[1] / found[best]:.2f} times as fast as one by one"


def _rising(most: int) -> list[int]:
    """1, 4, 16, …, `most`: seconds change little between, and a trial of one more number costs more than that."""
    return [*itertools.takewhile(lambda number: number < most, (4**power for power in itertools.count())), most]


def times(
    config: Config, optimizers: Sequence[configs.Optimizer], data: DataModule, sizes: list[int], epochs: float
) -> dict[int, float]:
    """Seconds of one run's optimizer step when 1 and each of `sizes`, rising, are trained as one.

    Stops where more only take longer, where a trial would take a good part of the `epochs` that a process is to train,
    and at a number that cannot be trained as one, which takes infinitely long. Where those are short, 1 is all that is
    tried.
    """
    device = worker.device_of(config)
    data.to_(device)
    with worker.forward(config), worker.quiet_lightning():
        found = {1: _seconds(config, optimizers[:1], data, device)}
        steps = data.batches_per_epoch * epochs
        if found[1] * steps < SHORT_S:
            return found
        for number in sizes:
            if (2 * WARM_UP + 1) * number > LARGEST_PART * steps:
                break
            try:
                found[number] = _seconds(config, optimizers[:number], data, device)
            except Exception:  # vmap cannot take everything, in more ways than one
                found[number] = math.inf
                break
            if found[number] > (HOPE if len(found) == 2 else 1.05) * min(found.values()):
                break
    return found


def _seconds(config: Config, settings: Sequence[configs.Optimizer], data: DataModule, device: torch.device) -> float:
    """Of one run's step where as many as have their settings take it at once, the median of some."""
    number, settings = len(settings), sorted(settings, key=repr)  # alike ones beside each other
    network = worker.initial_network(config, data)
    network = network.to(device, torch.float64 if config.trainer.precision == "64-true" else None).train()
    networks = [network, *(copy.deepcopy(network) for _ in range(number - 1))]
    optimizers = [
        build_optimizer(network, one, config.allowed_targets) for network, one in zip(networks, settings, strict=True)
    ]
    clip = config.trainer.gradient_clip_val

    def alone(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(images[0])
        loss = F.cross_entropy(logits, labels[0])
        loss.backward()
        update_(network, optimizers[0], clip)
        return loss.detach(), logits.argmax(1)

    step: Step = alone
    if number > 1:
        step = Stack(networks, optimizers, clips=[clip] * number).step
    elif config.trainer.compile:
        make_capturable_(optimizers[0])
        step = CapturedStep(alone, optimizers)
    warm_up = WARM_UP if device.type == "cpu" else captured.WARM_UP + 1  # and the capture
    taken: list[float] = []
    for images, labels in itertools.islice(_endless([data] * number), STEPS):
        start = time.perf_counter()
        step(images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if sum(taken) > SECONDS and len(taken) > 2 * warm_up:
            break
    return statistics.median(taken[warm_up:]) / number


def _endless(runs: list[DataModule]) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        yield from read_together(runs, epoch, 0)
