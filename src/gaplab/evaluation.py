"""How good a trained network is, on any samples, and whether another one is better on the same: `src/evaluate.py`."""

import json
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from gaplab import config as configs
from gaplab import figures, launch
from gaplab.config import Evaluate, MLflow, TorchvisionData
from gaplab.data.datamodule import DataModule, build_datamodule, read_sources
from gaplab.data.datasets import files_of
from gaplab.data.resident import Resident
from gaplab.errors import UserError
from gaplab.files import held, plain, write_whole
from gaplab.finder import find_run
from gaplab.metrics import Score, paired_difference, wilson
from gaplab.stats import mcnemar
from gaplab.terminal import Table
from gaplab.trained import Trained, check_same_kind, load, load_either

BINS = 15  # of the calibration error
SHOWN_CLASSES = 20  # the worst are shown to people; the file has all
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Answers:
    """What a network says of N samples: `probabilities` float32 (N, K) and the true `labels` int64 (N,)."""

    probabilities: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """Whether the most probable class is the true one, bool (N,)."""
        return self.probabilities.argmax(1) == self.labels


@dataclass(frozen=True)
class Recall:
    """How many samples of a class were found: of `total`, with a 95 % interval; None without any."""

    name: str
    total: int
    correct: int
    recall: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """One network on one set of samples. Accuracies and `ece` are fractions, `loss` nats; intervals are of 95 %.

    `ece` is the expected calibration error over 15 bins: the mean distance of a probability from the share of answers
    that are right where it was given. `confusion` counts (true class, answer).
    """

    total: int
    correct: int
    acc: float
    acc_low: float
    acc_high: float
    loss: float
    ece: float
    recall: list[Recall]
    confusion: list[list[int]]


@dataclass(frozen=True)
class Paired:
    """Two networks on the same `total` samples, counted by who has them right; `p` is McNemar's, exact, two-sided.

    `difference` is the second's accuracy minus the first's, [`low`, `high`] its 95 % interval.
    """

    total: int
    both: int
    only_first: int
    only_second: int
    neither: int
    first_acc: float
    second_acc: float
    difference: float
    low: float
    high: float
    p: float

    @property
    def p_shown(self) -> str:
        """With its sign, for people: `= 0.013`."""
        return f"= {self.p:.3g}" if self.p >= 1e-16 else "< 1e-16"


def answer(network: Trained, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """What a network says of every sample of `batches`: images uint8 (B, C, H, W), labels int64 (B,)."""
    parts = [(network.probabilities(images), labels) for images, labels in batches]
    return Answers(torch.cat([found for found, _ in parts]), torch.cat([labels for _, labels in parts]))


def evaluation(found: Answers, classes: Sequence[str]) -> Evaluation:
    """What can be said of these answers."""
    probabilities, labels = found.probabilities, found.labels
    confusion = multiclass_confusion_matrix(probabilities.argmax(1), labels, len(classes)).numpy()
    correct = int(found.right.sum())
    likelihood = probabilities.double().clamp(min=torch.finfo(torch.float32).tiny)[torch.arange(len(labels)), labels]
    score = Score(correct, len(labels), float(-likelihood.log().mean()))
    low, high = wilson(score, Z)
    ece = multiclass_calibration_error(probabilities, labels, len(classes), n_bins=BINS, norm="l1")
    recall = [_recall(name, row, index) for index, (name, row) in enumerate(zip(classes, confusion, strict=True))]
    return Evaluation(score.total, correct, score.acc, low, high, score.loss, float(ece), recall, confusion.tolist())


def _recall(name: str, row: Any, index: int) -> Recall:
    total, correct = int(row.sum()), int(row[index])
    if not total:
        return Recall(name, 0, 0, None, None, None)
    return Recall(name, total, correct, correct / total, *wilson(Score(correct, total, 0.0), Z))


def pair(first: Answers, second: Answers) -> Paired:
    """Compare two networks by their answers to the same samples."""
    one, other = first.right, second.right
    both, neither = int((one & other).sum()), int((~one & ~other).sum())
    only_first, only_second = int((one & ~other).sum()), int((~one & other).sum())
    total = len(one)
    change = paired_difference(both, only_first, only_second, neither)
    return Paired(
        total, both, only_first, only_second, neither, (both + only_first) / total, (both + only_second) / total,
        change.acc, change.low, change.high, mcnemar(only_first, only_second),
    )  # fmt: skip


def compare(first: Trained, second: Trained, batches: Iterable[tuple[Tensor, Tensor]]) -> Paired:
    """Compare two networks on every sample of `batches`, which is read once. Raises UserError unless of one kind."""
    check_same_kind(first, second)
    said = [(first.probabilities(images), second.probabilities(images), labels) for images, labels in batches]
    one, other, labels = (torch.cat(parts) for parts in zip(*said, strict=True))
    return pair(Answers(one, labels), Answers(other, labels))


def evaluate(settings: Evaluate, typed: Sequence[str] = ()) -> Path:
    """Evaluate what `settings` name; the folder with `evaluation.json`, the answers and the figures.

    They are added to the run in MLflow, if it is there. Raises UserError.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    outputs = configs.folder("paths.outputs", settings.paths.outputs)
    uri = settings.tracking.uri if isinstance(settings.tracking, MLflow) else None
    network = load(settings.run, settings.model_uri, outputs, uri, typed)
    other = None if settings.against is None else load_either("against", settings.against, outputs, uri, typed)
    if other is not None:
        check_same_kind(network, other)
    data, what = _data(network, settings, outputs)
    seen = trained_on(network, data, settings.split, outputs, uri)
    seen_by_other = None if other is None else trained_on(other, data, settings.split, outputs, uri)
    total = len(data.splits[settings.split].indices)
    notes = _seen_notes(network, seen, total) + ([] if other is None else _seen_notes(other, seen_by_other, total))
    if data.classes != network.classes:
        notes.append(
            f"its classes have other names ({data.classes[0]} for {network.classes[0]}, …): what counts as right?"
        )
    found = answer(network, data.batches(settings.split))
    part = data.splits[settings.split]
    clean = part.source.labels[part.indices]
    if noisy := int((clean != found.labels).sum()):
        accuracy = float((found.probabilities.argmax(1) == clean).double().mean())
        notes.append(
            f"{noisy:,} of these labels are wrong (data.label_noise) and counted as they were trained on; against the "
            f"labels without noise, the accuracy is {accuracy:.4f}"
        )
    result = evaluation(found, network.classes)
    others = None if other is None else answer(other, data.batches(settings.split))
    paired = None if others is None else pair(others, found)
    folder = _folder(network, settings, outputs, what)
    content: dict[str, Any] = {"name": network.name, "run_id": network.run_id, "samples": what, "split": settings.split}
    content |= {"digest": data.splits["train"].source.digest(), **asdict(result), "trained_on": seen}
    if paired is not None and other is not None:
        content["against"] = {"name": other.name, "run_id": other.run_id, **asdict(paired), "trained_on": seen_by_other}
    content["notes"] = notes
    paths = _write(folder, content, network, found, result, what)
    _print(console, network, other, result, paired, what, notes)
    console.print(f"files     {folder}", markup=False, soft_wrap=True)
    _write_back(console, network, settings, result, paired, seen, paths, uri)
    return folder


def _data(network: Trained, settings: Evaluate, outputs: Path) -> tuple[DataModule, str]:
    """The samples, and in words what they are: the run's own data, or others of the same kind."""
    own = settings.data is None
    config = network.config.data if own else settings.data
    launch.check_root(config)
    data = build_datamodule(
        config, network.config.seed, allowed_targets=list(network.config.allowed_targets), cache=outputs / "cache"
    )
    if data.in_shape != network.in_shape:
        shapes = "x".join(map(str, data.in_shape)), "x".join(map(str, network.in_shape))
        raise UserError(f"data={config.name}: pictures of {shapes[0]}, and {network.name} takes {shapes[1]}")
    if len(data.classes) != len(network.classes):
        raise UserError(
            f"data={config.name}: {len(data.classes)} classes, and {network.name} knows {len(network.classes)}"
        )
    for name, known in zip(data.classes, network.classes, strict=True):
        if name != known and name in network.classes:  # its answers would be counted against another class
            raise UserError(
                f"data={config.name}: class {plain(name)} stands where {network.name} has {plain(known)}; number the "
                f"classes alike: {', '.join(map(plain, network.classes))[:500]}"
            )
    if settings.split not in data.splits:
        raise UserError(f"split={settings.split}: {config.name} has no test part; split=valid or split=train")
    if own and data.splits["train"].source.digest() != network.digest:
        raise UserError(
            f"data.root={config.root}: the data are not those that {network.name} was trained on; to evaluate on them "
            f"all the same, say data={config.name} data.root={config.root}"
        )
    return data, f"{config.name}, {settings.split} split"


def trained_on(network: Trained, data: DataModule, split: str, outputs: Path, uri: str | None) -> int | None:
    """How many samples of a split a network was trained on; None where that is not known.

    Samples of the data that it was trained on, by their digest, are compared by index, as `splits.npz` of its run has
    them; those of other data by their pixels, where both fit in memory.

    Args:
        network: its folder is looked for in `outputs` and its run in MLflow at `uri`.
        data: the splits.
        split: the name of one.
        outputs: folder of runs, sweeps and cached data.
        uri: of the tracking store; None without one.
    """
    part = data.splits[split]
    if part.source.digest() == network.digest:
        trained = _train_indices(network, outputs, uri)
        return None if trained is None else int(np.isin(part.indices.numpy(), trained).sum())
    if data.splits["train"].source.digest() == network.digest:
        return 0  # the official test part has files of its own
    trained, config = _train_indices(network, outputs, uri), network.config.data
    try:
        launch.check_root(config)
        allowed = list(network.config.allowed_targets)
        if (
            isinstance(config, TorchvisionData)
            and config._target_.startswith("torchvision.")
            and not files_of(config._target_, Path(config.root).expanduser(), allowed)
        ):
            return None  # they would be downloaded
        own = read_sources(config, allowed, outputs / "cache").train
    except UserError:
        return None
    if trained is None or own.digest() != network.digest:
        return None
    if not isinstance(own, Resident) or not isinstance(part.source, Resident):
        return None
    known = set(_pixel_hashes(own, torch.from_numpy(trained)))
    return sum(pixels in known for pixels in _pixel_hashes(part.source, part.indices))


def _seen_notes(network: Trained, seen: int | None, total: int) -> list[str]:
    if seen is None:
        needed = "its splits.npz and its data must be here, and fit in memory"
        return [f"not known whether {network.name} was trained on samples of this split: {needed}"]
    return [f"{network.name} was trained on {seen:,} of these {total:,} samples"] if seen else []


def _train_indices(network: Trained, outputs: Path, uri: str | None) -> np.ndarray | None:
    """Indices of the train split that its run recorded, here or in MLflow."""
    with suppress(Exception), tempfile.TemporaryDirectory(prefix="gaplab-") as target:  # anything, of a damaged file
        folder = network.folder or find_run(outputs, network.run_id or "", "run")
        if folder is None and uri is not None and network.run_id is not None:
            from gaplab.tracking.store import download

            folder = Path(target)
            download(uri, network.run_id, ["splits.npz"], folder)
        if folder is not None:
            return np.asarray(np.load(folder / "splits.npz", allow_pickle=False)["train"], np.int64)
    return None


def _pixel_hashes(source: Resident, indices: Tensor) -> Iterator[bytes]:
    for images in source.images(indices.split(4096)):
        for pixels in images.flatten(1).numpy():
            yield blake2b(pixels.data, digest_size=16).digest()


def _folder(network: Trained, settings: Evaluate, outputs: Path, what: str) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{stamp}_{configs.slug(what)}_{secrets.token_hex(3)}"
    parent = network.folder if network.folder is not None else outputs
    folder = parent / "evaluations" / name
    if settings.output is not None:
        folder = configs.folder("output", settings.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{plain(folder)}: cannot be written ({error.strerror})") from None
    return folder


def _write(
    folder: Path, content: dict[str, Any], network: Trained, found: Answers, result: Evaluation, what: str
) -> list[Path]:
    title = f"{network.name}: {what}"
    confidence = found.probabilities.max(1).values.double().numpy()
    drawings = {
        "confusion_matrix": lambda: figures.confusion_matrix(np.array(result.confusion), network.classes, title),
        "reliability": lambda: figures.reliability(confidence, found.right.numpy(), result.ece, title, BINS),
    }
    try:
        write_whole(folder / "evaluation.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        np.savez_compressed(
            folder / "answers.npz", labels=found.labels.numpy(), probabilities=found.probabilities.numpy()
        )
        return [folder / "evaluation.json", *figures.save_figures(folder, drawings)]
    except OSError as error:
        raise UserError(f"{plain(folder)}: cannot be written ({error.strerror})") from None


def _write_back(
    console: Console,
    network: Trained,
    settings: Evaluate,
    result: Evaluation,
    paired: Paired | None,
    seen: int | None,
    paths: Sequence[Path],
    uri: str | None,
) -> None:
    """Add the figures to the run in MLflow: by its journal where that is its own, else directly."""
    if network.run_id is None or uri is None:
        return
    prefix = f"eval/{settings.split}" if settings.data is None else f"eval/{settings.data.name}_{settings.split}"
    metrics = {f"{prefix}/{name}": getattr(result, name) for name in ("acc", "acc_low", "acc_high", "loss", "ece")}
    if seen:
        metrics[f"{prefix}/trained_on"] = seen
    if paired is not None:
        metrics |= {f"{prefix}/difference": paired.difference, f"{prefix}/mcnemar_p": paired.p}
    step, place = int((network.result.get("best") or {}).get("epoch", 0)), f"evaluations/{paths[0].parent.name}"
    folder = network.folder
    if folder is not None and not (folder.parent / "sweep.json").is_file() and paths[0].is_relative_to(folder):
        from gaplab.tracking.journal import Tracker

        with held(folder, "this run is going on in another process"):
            tracker = Tracker.reopen(folder)
            if tracker is not None:
                tracker.metrics(metrics, step)
                for path in paths:
                    tracker.artifact(path, place)
                tracker.close()
        return
    from gaplab.tracking.store import add_to_run

    try:
        add_to_run(uri, network.run_id, metrics, step, list(paths), place)
    except UserError as error:
        console.print(f"note: not in MLflow: {error}", markup=False, soft_wrap=True)


def _print(
    console: Console,
    network: Trained,
    other: Trained | None,
    result: Evaluation,
    paired: Paired | None,
    what: str,
    notes: Sequence[str],
) -> None:
    console.print(f"[bold]{escape(plain(network.name))}[/bold]  {escape(plain(what))}, {result.total:,} samples")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "" and not table.columns else "right")
    table.add_row("accuracy", f"{result.acc:.4f}", f"[{result.acc_low:.4f}, {result.acc_high:.4f}]".replace("[", r"\["))
    table.add_row("loss, nats", f"{result.loss:.4f}", "")
    table.add_row("calibration error (ECE), pp", f"{100 * result.ece:.2f}", "")
    console.print(table)
    worst = sorted((one for one in result.recall if one.recall is not None), key=lambda one: one.recall or 0.0)
    title = "recall by class" + (f", the {SHOWN_CLASSES} lowest" if len(worst) > SHOWN_CLASSES else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("class", "samples", "recall", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for one in worst[:SHOWN_CLASSES]:
        interval = rf"\[{one.low:.4f}, {one.high:.4f}]"
        table.add_row(escape(plain(one.name)), f"{one.total:,}", f"{one.recall:.4f}", interval)
    console.print(table)
    if paired is not None and other is not None:
        change, low, high = 100 * paired.difference, 100 * paired.low, 100 * paired.high
        console.print(f"against   {plain(other.name)}: accuracy {paired.first_acc:.4f}", markup=False, soft_wrap=True)
        console.print(
            f"          {change:+.2f} pp [{low:+.2f}, {high:+.2f}], McNemar p {paired.p_shown}; right: both "
            f"{paired.both:,}, only this {paired.only_second:,}, only the other {paired.only_first:,}, neither "
            f"{paired.neither:,}",
            markup=False,
            soft_wrap=True,
        )
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
