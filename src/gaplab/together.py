"""Several runs trained as one program, each with its own journal, checkpoints and result.

The runs share forward and backward passes (`Stack`) and whatever is read; all else each does as it would alone. Seconds
of a run are then its share: those of the shared steps divided by their number, and its own.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor

from gaplab import interrupt, worker
from gaplab.data.datamodule import Sources, read_sources, read_together
from gaplab.run import Run
from gaplab.seeding import derive_seed
from gaplab.training.checkpoint import BEST, LAST, Checkpoints, ChecksumIO, let_last_be_best
from gaplab.training.classifier import set_rng_state
from gaplab.training.gap import Epoch, GapCallback
from gaplab.training.progress import ProgressBar
from gaplab.training.reader import read_checkpoint
from gaplab.training.stack import Stack

Leave = Callable[[Run, BaseException | None], None]


class Replica:
    """A run among those that are trained together; gone on with from its newest checkpoint, if it has one.

    Args:
        run: begun.
        sources: its data, read.

    Attributes:
        rng: the state of the random generators in the checkpoint, or None.
        ended: by an error.
    """

    def __init__(self, run: Run, sources: Sources) -> None:
        config = run.config
        self.run = run
        self.ended = False
        self.data, self.network, digest = worker.prepare(run, sources=sources)
        self.classifier = worker.classifier_of(config, self.data, self.network, digest)
        if config.trainer.precision == "64-true":
            self.classifier.double()
        device = worker.device_of(config)
        self.classifier.to(device).train()
        self.data.to_(device)
        self.optimizer, self.scheduler = self.classifier.build(config.trainer.max_epochs)
        self.stopping = worker.early_stopping(config)
        self.measured = GapCallback(
            self._batches, self._tell, train_every=config.metrics.train_every, clock=self._clock
        )
        self._progress = ProgressBar(run.console)
        self._spent_s = self._earlier_s = self._save_s = 0.0
        self._since: float | None = None
        self.rng = self._go_on()

    @property
    def position(self) -> tuple[int, int]:
        """Finished epochs, and mini-batches of the current one."""
        return self.classifier.at.epochs, self.classifier.at.batches

    def order(self) -> str:
        """Among those trained as one: those whose optimizers are alike beside each other, which then cost as one. The
        same when they are gone on with, for dropout draws by places."""
        config = self.run.config
        return repr((config.optimizer, config.scheduler, config.trainer.max_epochs))

    @property
    def is_trained(self) -> bool:
        return self.classifier.stopped or self.classifier.at.epochs == self.run.config.trainer.max_epochs

    def share(self, seconds: float) -> None:
        """Take part in what the runs did together in training steps."""
        self._spent_s += seconds
        self.classifier.train_s += seconds

    def end_step(self) -> None:
        self.classifier.at.batches += 1
        self.classifier.end_step(self.optimizer, self.scheduler)

    def end_epoch(self) -> None:
        """Evaluate and save. Raises DivergenceError, before anything is saved, and Interrupted."""
        with self._alone(), worker.forward(self.run.config):
            epoch = self.measured.measure(self.run.config.trainer.max_epochs)
            self.classifier.end_epoch()
            if self.stopping is not None:
                accuracy = torch.tensor(epoch.valid.acc, dtype=torch.float64)
                self.classifier.stopped, _ = self.stopping._evaluate_stopping_criteria(accuracy)
            is_best = self.measured.best is epoch
            self.save(BEST if is_best else LAST)
            if is_best:
                let_last_be_best(self.run.folder / "checkpoints")

    def save(self, name: str) -> None:
        """A checkpoint as Lightning's, so that the run can be gone on with alone. Raises DivergenceError."""
        start = time.perf_counter()
        classifier, at = self.classifier, self.classifier.at
        callbacks = [self.measured, *([self.stopping] if self.stopping else [])]
        seconds = {"seconds": self._earlier_s + self._clock()}
        checkpoint: dict[str, Any] = {
            "epoch": at.epochs - (at.batches == 0),
            "global_step": at.steps,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": _of_its_own(classifier.state_dict()),
            "callbacks": {one.state_key: one.state_dict() for one in callbacks} | {Checkpoints.__qualname__: seconds},
            "optimizer_states": [_of_its_own(self.optimizer.state_dict())],
            "lr_schedulers": [] if self.scheduler is None else [self.scheduler.state_dict()],
            "hparams_name": "hyper_parameters",
            "hyper_parameters": dict(classifier.hparams),
        }
        classifier.on_save_checkpoint(checkpoint)
        ChecksumIO().save_checkpoint(checkpoint, self.run.folder / "checkpoints" / name)
        self._save_s += time.perf_counter() - start

    def account(self) -> None:
        """Write what is known into the run's result."""
        result = self.run.result
        result.fit_s = self._earlier_s + self._clock()
        result.steps = self.classifier.at.steps
        result.times |= {
            "steps": self.classifier.train_s,
            "evaluation": self.measured.eval_s,
            "checkpoints": self._save_s,
        }
        worker.record(result, self.measured)

    def conclude(self) -> None:
        """Measure what is known at the end alone."""
        config = self.run.config
        first_step = self.classifier.first_step
        worker.conclude(self.run, self.data, self.network, self.measured, lambda: worker.forward(config), first_step)

    def _go_on(self) -> dict[str, Any] | None:
        path = worker.go_on(self.run, self.classifier, self.data)
        if path is None:
            return None
        checkpoint = read_checkpoint(path, self.classifier.device)
        self.classifier.load_state_dict(checkpoint["state_dict"])
        self.classifier.on_load_checkpoint(checkpoint)
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
        states = checkpoint["callbacks"]
        self.measured.load_state_dict(states[self.measured.state_key])
        if self.stopping is not None:
            self.stopping.load_state_dict(states[self.stopping.state_key])
        self._earlier_s = states[Checkpoints.__qualname__]["seconds"]
        return dict(checkpoint["ranks"][0]["rng"])

    def _clock(self) -> float:
        return self._spent_s + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it, time is this run's alone."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._spent_s, self._since = self._clock(), None

    def _tell(self, epoch: Epoch) -> None:
        self.run.tracker.metrics(epoch.metrics(), epoch.number)
        self._progress.show(epoch, self.run.config.trainer.max_epochs)

    def _batches(self, split: str) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.data.labelled(split):
            interrupt.check()
            yield batch


def _of_its_own(state: Any) -> Any:
    """The same without views, of which torch would save all that they are a part of."""
    if isinstance(state, Mapping):
        return {name: _of_its_own(value) for name, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def train(runs: Sequence[Run], leave: Leave) -> None:
    """Train runs of one kind (`fusing.kind`) as one, as many at a time as there are.

    Args:
        runs: begun.
        leave: called once for each, when it has ended, with what ended it early or None.

    Raises Interrupted, with a checkpoint of each run that is not left.
    """
    with worker.explained_memory(), worker.quiet_lightning():
        config = runs[0].config
        worker.set_up(config)
        replicas: list[Replica] = []
        sources: Sources | None = None
        for run in runs:
            with _left_on_error(run, leave):
                with run.result.timed("data"):
                    sources = sources or read_sources(config.data, config.allowed_targets, worker.data_cache(config))
                replicas.append(Replica(run, sources))
        with interrupt.deferred():
            replicas = [one for one in replicas if _catches_up(one, leave)]
            level: dict[tuple[int, int], list[Replica]] = {}
            for one in replicas:
                level.setdefault(one.position, []).append(one)
            for position in sorted(level):
                _fit(level[position], leave)


def _catches_up(replica: Replica, leave: Leave) -> bool:
    """End the epoch of a checkpoint that was saved while it was evaluated; whether the run goes on."""
    classifier = replica.classifier
    with _left_on_error(replica.run, leave, replica):
        if classifier.at.batches == replica.data.batches_per_epoch:
            replica.measured.begin(classifier)
            replica.end_epoch()
        return True
    return False


def _fit(replicas: list[Replica], leave: Leave) -> None:
    """Train runs that are at the same place."""
    first = replicas[0]
    if first.rng is None:
        torch.manual_seed(derive_seed(first.run.config.seed, "together"))
    else:  # of dropout; the others have the same
        set_rng_state(first.rng)
    active = _without_trained(replicas, leave)
    active.sort(key=Replica.order)
    if not active:
        return
    config = active[0].run.config
    every_s = min(one.run.config.checkpoint.every_s for one in active)
    stack = Stack(
        [one.network for one in active],
        [one.optimizer for one in active],
        [one.scheduler for one in active],
        [one.run.config.trainer.gradient_clip_val for one in active],
    )
    saved = time.perf_counter()
    for one in active:
        if len(active) > 1:
            one.run.tracker.tags({"trained_together": str(len(active))})
            one.run.console.print(
                f"trained as one with {len(active) - 1} other runs: seconds are this run's share", highlight=False
            )
    while active:
        for one in active:
            one.measured.begin(one.classifier)
            one.classifier.first_step = one.classifier.first_step or time.perf_counter()
        rows = list(range(len(active)))  # of the epoch's mini-batches, those of runs that are still there
        stream = read_together([one.data for one in active], *active[0].position)
        end = False
        while active and not end:
            start = time.perf_counter()
            with worker.forward(config):
                chunk = _advance(stack, active, stream, rows, config.trainer.chunk_size)
            end = active[0].classifier.at.batches == active[0].data.batches_per_epoch
            for one in active:
                one.share((time.perf_counter() - start) / len(active))
            active = _still(active, leave, chunk.count, stack, rows)
            if signum := interrupt.pending():
                _save_all(active, leave)
                raise interrupt.Interrupted(signum)
            if time.perf_counter() - saved > every_s and not end:
                _save_all(active, leave)
                saved = time.perf_counter()
        try:
            active = _still(active, leave, lambda _, one: one.end_epoch(), stack, rows)
        except interrupt.Interrupted:
            _save_all([one for one in active if one.classifier.at.batches and not one.ended], leave)
            raise
        saved = time.perf_counter()
        staying = [place for place, one in enumerate(active) if not one.is_trained]
        if 0 < len(staying) < len(active):
            stack.keep(staying)
        active = _without_trained(active, leave)


@dataclass
class _Chunk:
    """What some steps of R runs came to: each one's losses (R, S), correct answers (R,) and number of samples."""

    losses: Tensor
    correct: list[int]
    samples: int

    def count(self, place: int, replica: Replica) -> None:
        """Raises DivergenceError."""
        replica.classifier.count(self.losses[place], self.correct[place], self.samples)


def _advance(
    stack: Stack, active: list[Replica], stream: Iterator[tuple[Tensor, Tensor]], rows: list[int], steps: int
) -> _Chunk:
    """Take `steps` steps, fewer at the end of the epoch or when a signal waits."""
    losses, right = [], []
    samples = 0
    for images, labels in itertools.islice(stream, steps):
        if len(rows) < len(images):
            images, labels = images[rows], labels[rows]
        loss, answers = stack.step(images, labels)
        losses.append(loss)
        right.append((answers == labels).sum(1))
        samples += labels.shape[1]
        for one in active:
            one.end_step()
        if interrupt.pending():
            break
    return _Chunk(torch.stack(losses, 1).cpu(), torch.stack(right).sum(0).tolist(), samples)


def _still(
    active: list[Replica], leave: Leave, call: Callable[[int, Replica], None], stack: Stack, rows: list[int]
) -> list[Replica]:
    """Call for each run with its place; those that it did not end, which `stack` and `rows` keep."""
    kept = []
    for place, one in enumerate(active):
        with _left_on_error(one.run, leave, one):
            call(place, one)
            kept.append(place)
    if len(kept) < len(active):
        rows[:] = [rows[place] for place in kept]
        if kept:
            stack.keep(kept)
    return [active[place] for place in kept]


def _without_trained(replicas: list[Replica], leave: Leave) -> list[Replica]:
    """Those that are yet to be trained; the others end here. Raises Interrupted, between two of them."""
    for one in replicas:
        if one.is_trained:
            interrupt.check()  # all have their checkpoints
            one.account()
            with _left_on_error(one.run, leave):
                one.conclude()
                leave(one.run, None)
    return [one for one in replicas if not one.is_trained]


def _save_all(replicas: Iterable[Replica], leave: Leave) -> None:
    for one in replicas:
        with _left_on_error(one.run, leave, one):
            one.save(LAST)
            one.account()


@contextmanager
def _left_on_error(run: Run, leave: Leave, replica: Replica | None = None) -> Iterator[None]:
    """What one run meets ends that run alone."""
    try:
        with worker.explained_memory():
            yield
    except Exception as error:
        if replica is not None:
            replica.ended = True
            replica.account()
        leave(run, error)
