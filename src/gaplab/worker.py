"""One run, from a checked config to its result: the one place that puts the parts together."""

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.functional.classification import multiclass_confusion_matrix

from gaplab import config as configs
from gaplab import interrupt, provenance
from gaplab.config import Config
from gaplab.data.datamodule import DataModule, Sources, build_datamodule
from gaplab.errors import TrainingError, UserError
from gaplab.machine import memory, usable_cores
from gaplab.metrics import Score
from gaplab.nn.blocks import ACTIVATION_CLASSES
from gaplab.nn.build import Network, build_network
from gaplab.nn.footprint import Footprint, footprint
from gaplab.nn.init import described, lsuv_
from gaplab.ranks import ALONE, Ranks
from gaplab.result import RESULT_NAMES, RunResult, cautions
from gaplab.run import Run
from gaplab.seeding import derive_seed
from gaplab.tracking.journal import read_journal
from gaplab.training.activations import IDENTITY_SAMPLES, SAMPLES, ActivationsCallback, identity_error
from gaplab.training.checkpoint import Checkpoints, ChecksumIO, newest_checkpoint
from gaplab.training.classifier import Classifier
from gaplab.training.gap import Epoch, GapCallback, predict, score
from gaplab.training.progress import ProgressBar
from gaplab.training.reader import read_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREADS_PER_CORE = 8  # more wait for each other: at 500, a step of a small network takes minutes
LSUV_SAMPLES = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def train(run: Run, ranks: Ranks = ALONE) -> None:
    """Train, measure, track: from the beginning, or from the newest checkpoint in the run's folder.

    Args:
        run: whose result is filled in.
        ranks: the processes that train together; all do this, and the first one writes.

    Raises UserError, TrainingError, Interrupted.
    """
    with explained_memory(), quiet_lightning():
        _train(run, ranks)


@contextmanager
def explained_memory() -> Iterator[None]:
    """Raises TrainingError where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory; a smaller network, data.batch_size or data.eval_batch_size needs less "
            f"({str(error).partition(chr(10))[0]})"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's memory alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _train(run: Run, ranks: Ranks) -> None:
    config, tracker, result = run.config, run.tracker, run.result
    set_up(config, ranks)
    data, network, digest = prepare(run, ranks)
    progress = ProgressBar(run.console)

    def on_epoch(epoch: Epoch) -> None:
        tracker.metrics(epoch.metrics(), epoch.number)
        progress.show(epoch, config.trainer.max_epochs)

    def batches(split: str) -> Iterator[tuple[torch.Tensor, ...]]:
        return checkpoints.paused(data.labelled(split, shared=True))

    measured = GapCallback(batches, on_epoch, ranks, config.metrics.train_every)
    checkpoints = Checkpoints(
        run.folder / "checkpoints", config.checkpoint.every_s, lambda: measured.best is measured.history[-1], ranks
    )
    callbacks: list[pl.Callback] = [measured, progress]
    looks = None
    if every := config.trainer.log_activations_every:
        looks = ActivationsCallback(data.sample("valid", SAMPLES), every, ACTIVATION_CLASSES, tracker.metrics)
        callbacks.append(looks)
    trainer = _trainer(config, run.folder, [*callbacks, checkpoints], ranks)
    classifier = classifier_of(config, data, network, digest, ranks)
    if config.trainer.precision == "64-true":
        classifier.double()  # Lightning would do so after it has read a checkpoint into float32
    if ranks.size > 1 and config.model.bn:
        result.batchnorm = "synchronized" if _synchronizes(config) else "averaged"
        each = "" if _synchronizes(config) else "of each one's part of a mini-batch, running statistics "
        tracker.tags({"batchnorm": f"{each}{result.batchnorm} over {ranks.size} devices"})
    checkpoint = go_on(run, classifier, data, ranks)
    start = time.perf_counter()
    try:
        with interrupt.deferred():
            trainer.fit(classifier, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        result.fit_s = checkpoints.earlier_s + time.perf_counter() - start
        result.steps = classifier.at.steps
        result.times |= {
            "steps": classifier.train_s - checkpoints.within_s,
            "evaluation": measured.eval_s,
            "checkpoints": checkpoints.save_s,
        }
        record(result, measured)
    if ranks.rank:
        return

    network.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU, away from the data
    forward = trainer.precision_plugin.forward_context
    conclude(run, data, network, measured, forward, classifier.first_step, looks)


def set_up(config: Config, ranks: Ranks = ALONE) -> None:
    """What belongs to the process: threads, memory. Raises UserError."""
    _keep_freed_memory()
    if not torch.cuda.is_available():  # Lightning has torch load NVIDIA's library to see that, in every optimizer step
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    if config.trainer.threads:
        if config.trainer.threads > (most := THREADS_PER_CORE * usable_cores()):
            raise UserError(f"trainer.threads={config.trainer.threads}: at most {most} here, {THREADS_PER_CORE} a core")
        torch.set_num_threads(config.trainer.threads)
    elif ranks.size > 1:
        torch.set_num_threads(max(1, usable_cores() // config.trainer.devices))


def prepare(run: Run, ranks: Ranks = ALONE, sources: Sources | None = None) -> tuple[DataModule, Network, str]:
    """The data of a run, its network with the initial weights, and the data's digest. Raises UserError.

    Args:
        run: begun.
        ranks: as in `train`.
        sources: the data, if somebody has read them.
    """
    config, folder, tracker, result = run.config, run.folder, run.tracker, run.result
    result.device = f"{ranks.size} x " * (ranks.size > 1) + device_name(device_of(config))
    tracker.tags(provenance.compute_tags(result.device))
    pl.seed_everything(config.seed, verbose=False)
    with result.timed("data"):
        data = build_datamodule(
            config.data,
            config.seed,
            config.trainer.chunk_size,
            config.model.bn,
            config.allowed_targets,
            ranks,
            data_cache(config),
            sources,
        )
        digest = data.splits["train"].source.digest()
    ranks.meet("data")  # reading them may take machines very unequal times
    if len(set(ranks.everyones(digest))) > 1:
        raise UserError(f"data.root={config.data.root}: the machines do not hold the same data")
    if ranks.rank == 0:
        for line in data.describe():
            run.console.print(line, markup=False, soft_wrap=True)
        data.save_splits(folder / "splits.npz")
        np.save(folder / "example.npy", data.sample("valid", 2).cpu().numpy())  # what its model takes
    with result.timed("network"):
        network = initial_network(config, data)
    if not config.model.bn and any(isinstance(one, _BatchNorm) and one.training for one in network.modules()):
        data.fit_batchnorm(True)  # a user's network may bring its own
    if ranks.rank:  # dropout is each process's own; whatever is drawn before this is the same in all
        torch.manual_seed(derive_seed(config.seed, "rank", ranks.rank))
    result.params = sum(parameter.numel() for parameter in network.parameters())
    if ranks.rank == 0:
        run.console.print(f"weights  {described(network.body, config.model.init)}", markup=False, soft_wrap=True)
        for note in _cautions(result, data, network, config.trainer.max_epochs):
            run.console.print(f"note: {note}", markup=False, soft_wrap=True)
    if result.params and not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"model={config.model.name}: all of its parameters are frozen, there is nothing to train")
    sizes = {name: len(part.indices) for name, part in data.splits.items()} | {"classes": len(data.classes)}
    tracker.params({name: configs.masked(str(value)) for name, value in configs.flatten(config).items()})
    tracker.dataset(config.data.name, digest, config.data.root, sizes)
    tracker.tags({"params": str(result.params)})
    return data, network, digest


def _cautions(result: RunResult, data: DataModule, network: Network, epochs: int) -> list[str]:
    labels = {split: part.source.labels[part.indices] for split, part in data.splits.items()}
    counts = {split: found.bincount(minlength=len(data.classes)).tolist() for split, found in labels.items()}
    norms = [
        one for one in network.modules() if isinstance(one, _BatchNorm) and one.training and one.track_running_stats
    ]
    momentum = min((one.momentum for one in norms if one.momentum is not None), default=None)
    return cautions(result, data.classes, counts, momentum, epochs * data.batches_per_epoch)


def data_cache(config: Config) -> Path:
    return configs.folder("paths.outputs", config.paths.outputs) / "cache"


def conclude(
    run: Run,
    data: DataModule,
    network: Network,
    measured: GapCallback,
    forward: Callable[[], AbstractContextManager[None]],
    first_step: float | None,
    looks: ActivationsCallback | None = None,
) -> None:
    """Measure what is known at the end alone, draw, and have the tracker take it.

    Args:
        run: trained.
        data, network: on one device; the network is left with the best epoch's weights.
        measured: the epochs.
        forward: the context of the precision that it was trained in.
        first_step: `time.perf_counter()` then; None when nothing was left to train.
        looks: at the activations.
    """
    config, folder, tracker, result = run.config, run.folder, run.tracker, run.result
    device = next(network.parameters()).device

    def complete(epoch: Epoch) -> None:
        if epoch.train is None:
            with forward(), result.timed("evaluation"):
                found = score(network, data.labelled("train"), device)
            tracker.metrics(measured.complete(epoch, found).train_metrics(), epoch.number)

    complete(measured.history[-1])
    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    if best["progress"]["epochs"] != measured.best.number:  # a crash, and a device that does not repeat itself
        raise TrainingError(f"best.ckpt is not of the best epoch, {measured.best.number}; begin a new run")
    network.load_state_dict({name.removeprefix("network."): value for name, value in best["state_dict"].items()})
    complete(measured.best)
    record(result, measured)
    with result.timed("test"), forward():
        drawings = _test(config, data, network, measured, result)
    result.notes = _cautions(result, data, network, result.epochs)
    summary = _summary(result)
    if looks is not None:
        if looks.history and config.figures:
            from gaplab import figures

            drawings["activations"] = lambda: figures.activations(looks.history, configs.run_name(config))
        error = identity_error(network, data.sample("valid", IDENTITY_SAMPLES))
        summary |= {} if error is None else {"bn/identity_error": error}
    paths = []
    with result.timed("figures"):  # every result has every phase
        if drawings:
            from gaplab.figures import save_figures

            paths = save_figures(folder / "figures", drawings)
    if first_step is not None:
        summary["time/to_first_step_s"] = first_step - run.started
    summary |= {f"time/{phase}_s": seconds for phase, seconds in result.times.items()}
    tracker.metrics(summary, result.epochs)
    for path in paths:
        tracker.artifact(path, "figures")
    for name in ("config.yaml", "splits.npz"):
        tracker.artifact(folder / name)
    for name in ("best.ckpt", "best.ckpt.sha256"):
        tracker.artifact(folder / "checkpoints" / name, "checkpoints")


def go_on(run: Run, classifier: Classifier, data: DataModule, ranks: Ranks = ALONE) -> Path | None:
    """The run's checkpoint to resume from, if any. Raises UserError if it is of another network or other data."""
    folder, console = run.folder / "checkpoints", run.console
    # the others take the first one's word: a folder may reach another machine late
    newest = newest_checkpoint(folder) if ranks.rank == 0 else (None, [])
    ranks.meet("checkpoint")
    path, wrong = ranks.everyones(newest)[0]
    for reason in wrong:
        console.print(reason, markup=False, soft_wrap=True)
    if path is None:
        if wrong:
            console.print("no checkpoint can be read: training begins anew")
        return None
    checkpoint = read_checkpoint(path)
    kept, expected = (
        {name: tuple(value.shape) for name, value in state.items()}
        for state in (checkpoint["state_dict"], classifier.state_dict())
    )
    if kept != expected:
        name = next(iter(kept.items() ^ expected.items()))[0]
        raise UserError(f"{path}: of another network than the config's ({name} differs)")
    if checkpoint["hyper_parameters"]["data"] != classifier.hparams["data"]:
        raise UserError(f"data.root: the data are not those that {path.parent.parent} was trained on; begin a new run")
    progress = checkpoint["progress"]
    data.begin_at(progress["batches"])
    within = f" and {progress['batches']} of {data.batches_per_epoch} batches" if progress["batches"] else ""
    console.print(f"going on from {path.name}, after {progress['epochs']} epochs{within}")
    if ranks.rank == 0:
        run.tracker.tags({provenance.RESUMED: f"{path.name}, epoch {progress['epochs']}"})
        if changed := provenance.difference([provenance.attempts(read_journal(run.folder))]):
            console.print(f"note: {changed}", markup=False, soft_wrap=True)
    return path


def classifier_of(config: Config, data: DataModule, network: Network, digest: str, ranks: Ranks = ALONE) -> Classifier:
    return Classifier(
        network,
        config.optimizer,
        config.scheduler,
        hyper_parameters={
            "model": asdict(config.model),
            "in_shape": list(data.in_shape),
            "num_classes": len(data.classes),
            "classes": data.classes,
            "data": digest,
        },
        batches_per_epoch=data.batches_per_epoch,
        accumulate=config.trainer.accumulate_grad_batches,
        clip=config.trainer.gradient_clip_val,
        allowed_targets=config.allowed_targets,
        batch_size=config.data.batch_size,
        samples_per_epoch=data.samples_per_epoch,
        ranks=ranks,
        compile=config.trainer.compile,
    )


def _trainer(config: Config, folder: Path, callbacks: list[pl.Callback], ranks: Ranks) -> pl.Trainer:
    """Lightning's Trainer, with what gaplab does itself switched off."""
    settings = config.trainer
    stopping = early_stopping(config)
    return pl.Trainer(
        accelerator=accelerator(settings.accelerator),
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(ranks),
        sync_batchnorm=_synchronizes(config),
        max_epochs=settings.max_epochs,
        precision=settings.precision,  # type: ignore[arg-type]
        deterministic=settings.deterministic,
        callbacks=callbacks if stopping is None else [*callbacks, stopping],
        # else Lightning takes a Slurm job for ranks that srun started, and saves and requeues it in its own way
        plugins=[ChecksumIO(), LightningEnvironment() if ranks.size == 1 else TorchElasticEnvironment()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def early_stopping(config: Config) -> EarlyStopping | None:
    patience = config.trainer.early_stopping
    if patience is None:
        return None
    return EarlyStopping("valid/acc", mode="max", patience=patience, check_on_train_epoch_end=True)


def _strategy(ranks: Ranks) -> Strategy | str:
    """BatchNorm's statistics are averaged when they are needed, not sent from the first process in every chunk."""
    return DDPStrategy(broadcast_buffers=False) if ranks.size > 1 else "auto"


def _synchronizes(config: Config) -> bool:
    """Whether BatchNorm sees the whole mini-batch of all devices."""
    wanted = config.trainer.sync_batchnorm
    several = configs.world_size(config.trainer) > 1
    return several and bool(accelerator(config.trainer.accelerator) == "cuda" if wanted == "auto" else wanted)


def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory rather than give it back: else every large activation is mapped, and cleared by the
    kernel, anew in every step. Other C libraries have no such call and go without."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def initial_network(config: Config, data: DataModule) -> Network:
    """The network with its initial weights. Raises UserError."""
    model, shape, classes, allowed = asdict(config.model), data.in_shape, len(data.classes), config.allowed_targets
    _refuse_what_memory_cannot_hold(config, data)
    network = build_network(model, shape, classes, config.seed, tuple(allowed))
    network.normalize.set_(data.mean, data.std, binary=config.data.normalize == "binary")
    train = data.splits["train"]
    if config.model.init == "lsuv":
        images = next(iter(train.source.images([train.indices[:: max(1, len(train.indices) // LSUV_SAMPLES)]])))
        try:
            lsuv_(network, images, config.model.init_gain)
        except ValueError as error:
            raise UserError(str(error)) from None
    return network


def bytes_of(config: Config, data: DataModule, size: Footprint) -> int:
    """Bytes of memory that the training takes, at least, on one device. On a GPU, those of the weights alone: they are
    drawn in main memory, and what the GPU cannot hold it says itself."""
    longest = max(len(part.indices) for part in data.splits.values())
    batch = min(config.data.batch_size // configs.world_size(config.trainer), len(data.splits["train"].indices))
    width = 8 if config.trainer.precision == "64-true" else 4
    if accelerator(config.trainer.accelerator) == "cuda":
        return width * size.params
    return size.bytes(batch, min(config.data.eval_batch_size, longest), width)


def footprint_of(config: Config, data: DataModule) -> Footprint:
    return footprint(asdict(config.model), data.in_shape, len(data.classes), tuple(config.allowed_targets))


def _refuse_what_memory_cannot_hold(config: Config, data: DataModule) -> None:
    size = footprint_of(config, data)
    needed = bytes_of(config, data, size) * config.trainer.devices
    if needed > (available := memory()):
        raise UserError(
            f"model={config.model.name}: {size.params:,} parameters and data.batch_size={config.data.batch_size} need "
            f"{needed / 1e9:,.1f} GB of memory or more; there are {available / 1e9:,.1f}"
        )


def record(result: RunResult, measured: GapCallback) -> None:
    """What the finished epochs say."""
    if not measured.history:
        return
    last, best = measured.history[-1], measured.best
    result.epochs = last.number
    result.steps_per_s = sorted(epoch.steps_per_s for epoch in measured.history)[len(measured.history) // 2]
    for name, metric in RESULT_NAMES.items():
        setattr(result, name, last.metrics().get(metric))
    known = best.metrics()
    result.best = {name: known[metric] for name, metric in RESULT_NAMES.items() if metric in known}
    result.best["epoch"] = best.number


def _summary(result: RunResult) -> dict[str, float]:
    """The metrics of a run as a whole."""
    assert result.best is not None
    summary = {f"best/{RESULT_NAMES[name]}": value for name, value in result.best.items() if name in RESULT_NAMES}
    if result.test_acc is not None and result.test_loss is not None:
        summary |= {"test/acc": result.test_acc, "test/loss": result.test_loss}
    return summary | {"best/epoch": result.best["epoch"], "time/fit_s": result.fit_s}


def _test(
    config: Config, data: DataModule, network: Network, measured: GapCallback, result: RunResult
) -> dict[str, "Callable[[], Figure]"]:
    """Read the test split, once, with the best weights, into `result`; the drawings of the run, if it has figures."""
    shown = "test" if "test" in data.splits else "valid"
    part, classes, name = data.splits[shown], data.classes, configs.run_name(config)
    logits, labels = predict(network, data.batches(shown))
    probabilities, answers = logits.softmax(1).max(1)
    wrong = (answers != labels).nonzero().flatten()
    if shown == "test":
        loss = float(torch.nn.functional.cross_entropy(logits.double(), labels))
        test = Score(len(labels) - len(wrong), len(labels), loss)
        result.test_acc, result.test_loss = test.acc, test.loss
    if not config.figures:
        return {}
    from gaplab import figures  # matplotlib, which nothing else needs

    counts = multiclass_confusion_matrix(answers, labels, len(classes)).numpy()
    worst = wrong[probabilities[wrong].argsort(descending=True)[:24]]
    mistakes = (
        next(iter(part.source.images([part.indices[worst]]))).cpu().numpy() if len(worst) else torch.empty(0).numpy()
    )
    train = data.splits["train"]
    sample = next(iter(train.source.images([train.indices[:200]]))).cpu().numpy()
    mean, std = (value.cpu().numpy() for value in train.source.moments(train.indices))
    assert result.best is not None
    best = int(result.best["epoch"])
    return {
        "learning_curves": lambda: figures.learning_curves([epoch.metrics() for epoch in measured.history], best, name),
        "confusion_matrix": lambda: figures.confusion_matrix(
            counts, classes, f"{name}: {shown} split, best epoch {best}"
        ),
        "worst_mistakes": lambda: figures.worst_mistakes(
            mistakes,
            [classes[int(labels[i])] for i in worst],
            [classes[int(answers[i])] for i in worst],
            probabilities[worst].double().numpy(),
            f"{name}: most confident mistakes, {shown} split",
        ),
        "normalization": lambda: figures.normalization(sample, mean, std),
    }


def accelerator(name: str) -> str:
    """CUDA or the CPU: elsewhere gaplab was never run, and float64 statistics are not to be had on Apple's GPUs."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name == "gpu" else name


def device_of(config: Config) -> torch.device:
    """Of a run on one device."""
    return torch.device("cuda", 0) if accelerator(config.trainer.accelerator) == "cuda" else torch.device("cpu")


def forward(config: Config) -> AbstractContextManager[None]:
    """The context of a precision, as Lightning's trainer has it; without autocast."""
    precision = DoublePrecision() if config.trainer.precision == "64-true" else Precision()
    return precision.forward_context()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class quiet_lightning(warnings.catch_warnings):  # noqa: N801 (a context manager, used like a function)
    """Lightning's banners and hints are about its own loop; errors and other libraries' warnings pass."""

    def __enter__(self) -> None:
        super().__enter__()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\.")
