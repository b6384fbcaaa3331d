"""One run, from a checked config to its result: the one place that puts the parts together."""

import ctypes
import json
import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from matplotlib.figure import Figure
from rich.console import Console
from torchmetrics.functional.classification import multiclass_confusion_matrix

from gaplab import config as configs
from gaplab import figures
from gaplab.config import Config
from gaplab.data.datamodule import DataModule, build_datamodule
from gaplab.errors import DivergenceError, TrainingError, UserError
from gaplab.files import write_whole
from gaplab.metrics import Score
from gaplab.nn.blocks import ACTIVATION_CLASSES
from gaplab.nn.build import Network, build_network
from gaplab.nn.init import lsuv_
from gaplab.tracking.journal import Tracker
from gaplab.training.activations import IDENTITY_SAMPLES, SAMPLES, ActivationsCallback, identity_error
from gaplab.training.checkpoint import ChecksumIO, read_checkpoint
from gaplab.training.classifier import Classifier
from gaplab.training.gap import Epoch, GapCallback, predict
from gaplab.training.progress import ProgressBar, print_summary

LSUV_SAMPLES = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass
class RunResult:
    """What `result.json` holds. Accuracies and gaps are fractions, losses nats, times seconds; None is not known."""

    run_id: str
    status: str
    seed: int
    condition: str
    config_hash: str
    epochs: int = 0
    steps: int = 0
    params: int = 0
    fit_s: float = 0.0
    total_s: float = 0.0
    steps_per_s: float | None = None
    device: str = ""
    train_acc: float | None = None
    valid_acc: float | None = None
    gap_acc: float | None = None
    gap_acc_low: float | None = None
    gap_acc_high: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    train_acc_running: float | None = None
    best: dict[str, float] | None = None
    test_acc: float | None = None
    test_loss: float | None = None
    diverged: bool = False
    error: str | None = None


RESULT_NAMES = {
    "train_acc": "train/acc", "valid_acc": "valid/acc", "gap_acc": "gap/acc", "gap_acc_low": "gap/acc_low",
    "gap_acc_high": "gap/acc_high", "train_loss": "train/loss", "valid_loss": "valid/loss",
    "train_acc_running": "train/acc_running",
}  # fmt: skip


def run(
    config: Config, folder: Path, tracker: Tracker, run_id: str, started: float, output: TextIO | None = None
) -> RunResult:
    """Train, measure, track; write `result.json` however it ends.

    Args:
        config: checked.
        folder: the run's own, existing folder.
        tracker: the run's journal, which is finished here.
        run_id: the run's id unless MLflow gives one.
        started: `time.perf_counter()` when the command began.
        output: where to tell people of it; None for the terminal.

    Raises UserError or TrainingError, after the run is recorded as FAILED, and KeyboardInterrupt, as KILLED.
    """
    result = RunResult(run_id, "RUNNING", config.seed, configs.condition(config), configs.config_hash(config))
    console = Console(file=output, highlight=False)
    try:
        with quiet_lightning():
            _run(config, folder, tracker, result, console, started)
        result.status = "FINISHED"
    except KeyboardInterrupt:
        result.status = "KILLED"
        raise
    except (UserError, TrainingError) as error:
        result.status, result.error, result.diverged = "FAILED", str(error), isinstance(error, DivergenceError)
        raise
    except Exception as error:
        result.status, result.error = "FAILED", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        (folder / "error.log").write_text(traceback.format_exc())
        raise TrainingError(f"{result.error} (traceback in {folder / 'error.log'})") from error
    finally:
        if result.error:
            tracker.tags({"error": result.error[:5000], "diverged": str(result.diverged).lower()})
        result.total_s = time.perf_counter() - started
        _write_result(result, folder)  # once before MLflow is waited for: it may keep us waiting, or be interrupted
        result.run_id = tracker.finish(result.status) or run_id
        result.total_s = time.perf_counter() - started
        _write_result(result, folder)
    print_summary(console, asdict(result), config)
    return result


def _run(config: Config, folder: Path, tracker: Tracker, result: RunResult, console: Console, started: float) -> None:
    _keep_freed_memory()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)
    data = build_datamodule(
        config.data, config.seed, config.trainer.chunk_size, config.model.bn, config.allowed_targets
    )
    data.save_splits(folder / "splits.npz")
    network = _build_network(config, data)
    result.params = sum(parameter.numel() for parameter in network.parameters())
    sizes = {name: len(part.indices) for name, part in data.splits.items()} | {"classes": len(data.classes)}
    tracker.params({name: configs.masked(str(value)) for name, value in configs.flatten(config).items()})
    tracker.dataset(config.data.name, data.splits["train"].source.digest(), config.data.root, sizes)

    progress = ProgressBar(console)

    def on_epoch(epoch: Epoch) -> None:
        tracker.metrics(epoch.metrics(), epoch.number)
        progress.show(epoch, config.trainer.max_epochs)

    measured = GapCallback(data.batches, len(data.classes), on_epoch)
    callbacks: list[pl.Callback] = [measured, progress]
    looks = None
    if every := config.trainer.log_activations_every:
        looks = ActivationsCallback(data.sample("valid", SAMPLES), every, ACTIVATION_CLASSES, tracker.metrics)
        callbacks.append(looks)
    trainer = _trainer(config, folder, callbacks)
    classifier = _classifier(config, data, network)
    result.device = _device_name(trainer.strategy.root_device)
    start = time.perf_counter()
    try:
        trainer.fit(classifier, datamodule=data)
    except SystemExit:  # Lightning's answer to Ctrl-C, which it has also switched off
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
    finally:
        result.fit_s = time.perf_counter() - start
        result.steps = trainer.global_step
        _record(result, measured)

    best = read_checkpoint(folder / "checkpoints" / "best.ckpt")
    network.load_state_dict({name.removeprefix("network."): value for name, value in best["state_dict"].items()})
    network.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU, away from the data
    with trainer.precision_plugin.forward_context():
        drawings = _test(config, data, network, measured, result)
    summary = _summary(result)
    if looks is not None:
        if looks.history and config.figures:
            drawings["activations"] = lambda: figures.activations(looks.history, configs.run_name(config))
        error = identity_error(network, data.sample("valid", IDENTITY_SAMPLES))
        summary |= {} if error is None else {"bn/identity_error": error}
    paths = figures.save_figures(folder / "figures", drawings)
    assert classifier.first_step is not None
    tracker.metrics(summary | {"time/to_first_step_s": classifier.first_step - started}, result.epochs)
    for path in paths:
        tracker.artifact(path, "figures")
    for name in ("config.yaml", "splits.npz"):
        tracker.artifact(folder / name)
    for name in ("best.ckpt", "best.ckpt.sha256"):
        tracker.artifact(folder / "checkpoints" / name, "checkpoints")


def _classifier(config: Config, data: DataModule, network: Network) -> Classifier:
    return Classifier(
        network,
        config.optimizer,
        config.scheduler,
        hyper_parameters={
            "model": asdict(config.model),
            "in_shape": list(data.in_shape),
            "num_classes": len(data.classes),
            "classes": data.classes,
        },
        batches_per_epoch=data.batches_per_epoch,
        accumulate=config.trainer.accumulate_grad_batches,
        clip=config.trainer.gradient_clip_val,
        allowed_targets=config.allowed_targets,
    )


def _trainer(config: Config, folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer, with what gaplab does itself switched off. Checkpoints come after the callbacks given."""
    settings = config.trainer
    checkpoints = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor="valid/acc",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    stopping: list[pl.Callback] = []
    if settings.early_stopping is not None:
        stopping = [
            EarlyStopping("valid/acc", mode="max", patience=settings.early_stopping, check_on_train_epoch_end=True)
        ]
    return pl.Trainer(
        accelerator=_accelerator(settings.accelerator),
        devices=1,
        max_epochs=settings.max_epochs,
        precision=settings.precision,  # type: ignore[arg-type]
        deterministic=settings.deterministic,
        callbacks=[*callbacks, *stopping, checkpoints],
        plugins=[ChecksumIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory rather than give it back: else every large activation is mapped, and cleared by the
    kernel, anew in every step. Other C libraries have no such call and go without."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def _build_network(config: Config, data: DataModule) -> Network:
    network = build_network(
        asdict(config.model), data.in_shape, len(data.classes), config.seed, tuple(config.allowed_targets)
    )
    network.normalize.set_(data.mean, data.std, binary=config.data.normalize == "binary")
    train = data.splits["train"]
    if config.model.init == "lsuv":
        images = next(iter(train.source.images([train.indices[:: max(1, len(train.indices) // LSUV_SAMPLES)]])))
        try:
            lsuv_(network, images, config.model.init_gain)
        except ValueError as error:
            raise UserError(str(error)) from None
    return network


def _record(result: RunResult, measured: GapCallback) -> None:
    """What the finished epochs say."""
    if not measured.history:
        return
    last, best = measured.history[-1], measured.best
    result.epochs = last.number
    result.steps_per_s = sorted(epoch.steps_per_s for epoch in measured.history)[len(measured.history) // 2]
    for name, metric in RESULT_NAMES.items():
        setattr(result, name, last.metrics()[metric])
    result.best = {name: best.metrics()[metric] for name, metric in RESULT_NAMES.items()} | {"epoch": best.number}


def _summary(result: RunResult) -> dict[str, float]:
    """The metrics of a run as a whole."""
    assert result.best is not None
    summary = {f"best/{RESULT_NAMES[name]}": value for name, value in result.best.items() if name in RESULT_NAMES}
    if result.test_acc is not None and result.test_loss is not None:
        summary |= {"test/acc": result.test_acc, "test/loss": result.test_loss}
    return summary | {"best/epoch": result.best["epoch"], "time/fit_s": result.fit_s}


def _test(
    config: Config, data: DataModule, network: Network, measured: GapCallback, result: RunResult
) -> dict[str, Callable[[], Figure]]:
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


def _accelerator(name: str) -> str:
    """CUDA or the CPU: elsewhere gaplab was never run, and float64 statistics are not to be had on Apple's GPUs."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write_result(result: RunResult, folder: Path) -> None:
    write_whole(folder / "result.json", json.dumps(asdict(result), indent=2, allow_nan=False) + "\n")


class quiet_lightning(warnings.catch_warnings):  # noqa: N801 (a context manager, used like a function)
    """Lightning's banners and hints are about its own loop; errors and other libraries' warnings pass."""

    def __enter__(self) -> None:
        super().__enter__()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\.")
