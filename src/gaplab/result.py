"""What a run came to: `result.json`, and the table that a person sees."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from gaplab.config import Config, run_name
from gaplab.files import plain, write_whole
from gaplab.metrics import Score, wilson
from gaplab.notes import without_noise

if TYPE_CHECKING:
    from rich.console import Console

COLD = 0.01  # share of a running statistic's initial value that is worth a note
Z = NormalDist().inv_cdf(0.975)


@dataclass
class RunResult:
    """What `result.json` holds. Accuracies and gaps are fractions, losses nats, times seconds; None is not known.

    `times` says where those of this process went, by the phases of `PHASES`.
    """

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
    batchnorm: str | None = None  # on several devices: "synchronized", or "averaged" running statistics
    train_acc: float | None = None
    valid_acc: float | None = None
    gap_acc: float | None = None
    gap_acc_low: float | None = None
    gap_acc_high: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    train_acc_running: float | None = None
    train_acc_clean: float | None = None  # under label noise: against the labels without it
    gap_acc_clean: float | None = None
    gap_acc_clean_low: float | None = None
    gap_acc_clean_high: float | None = None
    train_loss_clean: float | None = None
    best: dict[str, float] | None = None
    test_acc: float | None = None
    test_loss: float | None = None
    diverged: bool = False
    error: str | None = None
    notes: list[str] = field(default_factory=list)  # what `cautions` found
    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what happens meanwhile to `times`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start

    def write(self, folder: Path) -> None:
        """A loss that is not finite is None, for JSON: the test split may have one where the others have none."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        write_whole(folder / "result.json", json.dumps(values, indent=2, allow_nan=False) + "\n")


PHASES = {
    "compose": "Python, Hydra, the config",
    "imports": "torch, Lightning",
    "data": "read, verified, split",
    "network": "built and drawn",
    "steps": "optimizer steps",
    "evaluation": "both splits, honestly",
    "checkpoints": "written, read back",
    "test": "best weights, test split",
    "figures": "drawn, saved",
    "tracking": "waiting for MLflow's sender",
    "rest": "Lightning's loop, journal, all else",
}

RESULT_NAMES = {
    "train_acc": "train/acc", "valid_acc": "valid/acc", "gap_acc": "gap/acc", "gap_acc_low": "gap/acc_low",
    "gap_acc_high": "gap/acc_high", "train_loss": "train/loss", "valid_loss": "valid/loss",
    "train_acc_running": "train/acc_running", "train_acc_clean": "train/acc_clean", "gap_acc_clean": "gap/acc_clean",
    "gap_acc_clean_low": "gap/acc_clean_low", "gap_acc_clean_high": "gap/acc_clean_high",
    "train_loss_clean": "train/loss_clean",
}  # fmt: skip


def cautions(
    result: RunResult,
    classes: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    momentum: float | None,
    batches: int,
) -> list[str]:
    """Why the accuracies of a run may mean less than they seem to, a line each.

    Args:
        result: of the run; its accuracies are None before it is trained.
        classes: names of the K classes.
        counts: {split: samples of each class, (K,)}.
        momentum: the smallest of its BatchNorm layers; None without one whose running statistics move.
        batches: mini-batches that it is trained on, over all epochs.
    """
    notes = []
    if momentum is not None and (cold := (1 - momentum) ** batches) > COLD:
        notes.append(
            f"few optimizer steps: after {batches} mini-batches, BatchNorm's running statistics (momentum "
            f"{momentum:g}) still hold {100 * cold:.0f} % of their initial values, and accuracies may be far too low; "
            "use a smaller data.batch_size, more trainer.max_epochs or a larger model.bn_momentum"
        )
    for split, samples in counts.items():
        absent = [plain(name) for name, number in zip(classes, samples, strict=True) if not number]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            notes.append(f"the {split} split has no sample of {', '.join(absent[:3])}{more}")
    usual = max(range(len(classes)), key=lambda label: counts["train"][label])
    for split, accuracy in (("valid", result.valid_acc), ("test", result.test_acc)):
        if accuracy is None or split not in counts:
            continue
        total = sum(counts[split])
        majority = counts[split][usual] / total
        low, _ = wilson(Score(round(accuracy * total), total, 0.0), Z)
        if low <= majority:
            compared = "no higher than" if accuracy <= majority else "not distinguishable from"
            notes.append(
                f"{split} accuracy {accuracy:.4f} is {compared} {majority:.4f}, which a network that always answers "
                f"{plain(classes[usual])}, the largest class, reaches"
            )
    return notes


def print_summary(console: Console, result: RunResult, config: Config) -> None:
    """The table at the end of a run, and what to type next."""
    from rich import box
    from rich.markup import escape

    from gaplab.terminal import Table

    last = asdict(result)
    best = last["best"]
    noisy = result.gap_acc_clean is not None
    table = Table(title=escape(run_name(config)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("", "epoch", "train", "valid", "gap, pp", "95 % interval", "test"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    rows = [("best valid", best, str(best["epoch"]), result.test_acc), ("last epoch", last, str(result.epochs), None)]
    if noisy:
        rows[1:1] = [("clean labels", without_noise(best), "", None)]
        rows += [("clean labels", without_noise(last), "", None)]
    for label, row, epoch, test in rows:
        table.add_row(
            label,
            epoch,
            f"{row['train_acc']:.4f}",
            f"{row['valid_acc']:.4f}",
            f"{100 * row['gap_acc']:+.2f}",
            f"[{100 * row['gap_acc_low']:+.2f}, {100 * row['gap_acc_high']:+.2f}]",
            "" if test is None else f"{test:.4f}",
        )
    console.print(table)
    if noisy:
        console.print(
            f"data.label_noise={config.data.label_noise:g}: train and gap count the labels that the network is trained "
            'on; those of "clean labels" count the labels without noise',
            soft_wrap=True,
        )
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    batchnorm = f", BatchNorm {result.batchnorm}" if result.batchnorm else ""
    console.print(
        f"{result.epochs} epochs, {result.fit_s:.1f} s of training and measuring, "
        f"{result.total_s:.1f} s in all; "
        f"{result.params:,} parameters, {result.device}{batchnorm}",
        soft_wrap=True,
    )


def print_times(console: Console, result: RunResult) -> None:
    """Where the time went: `trainer.profile`."""
    from rich import box

    from gaplab.terminal import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("where the time went")
    for heading in ("seconds", "share"):
        table.add_column(heading, justify="right")
    table.add_column("", style="dim")
    known = {name: result.times.get(name, 0.0) for name in PHASES}
    whole = known["compose"] + result.total_s
    known["rest"] = max(0.0, whole - sum(known.values()))
    for name, seconds in known.items():
        table.add_row(name, f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %", PHASES[name])
    console.print(table)
