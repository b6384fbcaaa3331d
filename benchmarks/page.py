"""Writes docs/benchmarks.md from what the benchmarks kept: `python benchmarks/page.py`, at the end of `make bench`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness import FIGURES, PROJECT, median, spread

PAGE = PROJECT / "docs" / "benchmarks.md"
NAMES = ("training", "startup", "resident", "streamed", "tracking", "store", "sweep")
GPU = [
    ("a captured step beside a hand-written captured loop, speed", "≥ 0.9 ×"),
    ("beside torchvision + DataLoader + Lightning", "≥ 30 ×"),
    ("training of the CNN to 99.0 % on MNIST's test split, mean of 20 seeds", "≤ 0.6 s"),
    ("small MLP, steps per second", "≥ 8 000"),
]


@dataclass
class Target:
    """A figure beside what it should be; `reason` is told where it is missed."""

    name: str
    figure: float
    limit: float
    at_most: bool
    reason: str = ""
    digits: int = 2

    @property
    def met(self) -> bool:
        shown = round(self.figure, self.digits)
        return shown <= self.limit if self.at_most else shown >= self.limit

    def row(self) -> str:
        sign = "≤" if self.at_most else "≥"
        verdict = "met" if self.met else "**missed**"
        return f"| {self.name} | {sign} {self.limit:g} | {self.figure:.{self.digits}f} | {verdict} |"


def rows_of(seen: dict[str, Any], contender: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (row["work"], row["batch"]): row for row in seen["training"]["figures"]["rows"] if row["contender"] == contender
    }


def training_targets(seen: dict[str, Any]) -> Iterator[Target]:
    ours, slow = rows_of(seen, "gaplab"), rows_of(seen, "DataLoader")
    slower = rows_of(seen, "DataLoader, 2 workers")
    for (work, batch), row in ours.items():
        name = f"{work}, batch {batch}"
        yield Target(
            f"{name}: training, to hand-written", row["train_ratio"], 1.05, True,
            "what gaplab does beside the network's arithmetic in each step: normalize uint8 pictures (the hand-written "
            "loop has them normalized, as floats of four times the size), keep the answers, count. A profile shows "
            "less than 4 % of a step in it; the rest is the spread from process to process, which reaches 10 % here",
        )  # fmt: skip
        yield Target(
            f"{name}: epoch with evaluation, to hand-written", row["whole_ratio"], 1.08, True,
            "as for training, and an epoch's end: checkpoint, checksum and journal, 15 to 25 ms",
        )  # fmt: skip
    for work, least in (("mlp", 10), ("cnn", 3)):
        if (key := (work, 128)) in ours and key in slow:
            fastest = min(median(kind[key]["train"]) for kind in (slow, slower) if key in kind)
            bare = median(slow[key]["train"]) / median(rows_of(seen, "hand-written")[key]["train"])
            yield Target(
                f"{work}, batch 128: times as fast as torchvision + DataLoader + Lightning",
                fastest / median(ours[key]["train"]), least, False,
                "nearly all of an epoch is the convolutions' arithmetic, which is the same in all of them: the "
                f"hand-written loop is {bare:.1f} times as fast, too",
                digits=1,
            )  # fmt: skip
    for (work, batch), row in ours.items():
        yield Target(
            f"{work}, batch {batch}: honest evaluation, share of training time",
            median(row["evaluation"]) / median(row["train"]), 0.25, True,
            "a forward pass is about a third of a step's arithmetic, and the split is as long as the epoch; "
            "`metrics.train_every=2` halves it",
        )  # fmt: skip


def other_targets(seen: dict[str, Any]) -> Iterator[Target]:
    figures = {name: one["figures"] for name, one in seen.items()}
    if startup := figures.get("startup"):
        for run in ("first", "second"):
            yield Target(
                f"command to first optimizer step, {run} run, to the minimal script",
                startup["ratios"][f"{run} run, first step"], 0.7, True,
                "nearly all of it is the import of torch and Lightning, on both sides",
            )  # fmt: skip
        peaks = [max(values) for name, values in startup["seen"].items() if name.startswith("gaplab") and "MB" in name]
        yield Target("peak memory of an MNIST run with tracking, GB", max(peaks) * 2**20 / 1e9, 1.0, True, "")
    if resident := figures.get("resident"):
        each = {row["samples"]: median(row["steps_s"]) / row["samples"] for row in resident["rows"]}
        middle = sorted(each)[len(each) // 2]
        worst = max(each, key=lambda samples: abs(each[samples] / each[middle] - 1))
        yield Target(
            f"training time per sample, {worst:,} samples against {middle:,}: difference",
            abs(each[worst] / each[middle] - 1), 0.05, True,
            "a profile of a step finds the difference in the reading of the pictures: those of a small set stay in the "
            "processor's cache, those of a large one come from memory, in random order",
        )  # fmt: skip
        yield Target("bytes per resident sample, to its size as uint8", resident["of_uint8"], 1.1, True, "")
    if streamed := figures.get("streamed"):
        yield Target(
            "pictures streamed while training, to a pool of bare decoders", streamed["ratio"], 0.9, False,
            "the optimizer steps take their share of the same cores",
        )  # fmt: skip
    if tracking := figures.get("tracking"):
        yield Target(
            "an epoch with MLflow, to one without", tracking["ratio"], 1.02, True,
            "the process that sends to MLflow computes on the same cores; the training process writes a line a metric",
        )  # fmt: skip
    if store := figures.get("store"):
        yield Target(
            f"first step beside {store['runs']} runs in folders and store, to beside one",
            store["ratios"]["step"], 1.05, True, "each run's folder is asked whether it has ended",
        )  # fmt: skip
    if sweep := figures.get("sweep"):
        yield Target(
            f"sweep of 72 runs of {sweep['epochs']} epochs, to bare training on {sweep['cores']} cores",
            sweep["ratio"], 1.15, True, "start of the command, 72 checkpoints, test splits and folders",
        )  # fmt: skip


def tables(seen: dict[str, Any]) -> Iterator[str]:
    training = seen["training"]["figures"]
    yield "## Training and evaluation\n"
    yield f"{training['turns']} turns, {training['threads']} threads. Seconds of an epoch: median (least–most).\n"
    yield "| network | batch | samples | contender | training | to hand-written | with evaluation | valid accuracy |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in training["rows"]:
        whole = f"{row['whole_ratio']:.2f}" if "whole" in row else ""
        accuracy = sum(row["accuracy"]) / len(row["accuracy"])
        yield (
            f"| {row['work']} | {row['batch']} | {row['samples']} | {row['contender']} | {spread(row['train'])} | "
            f"{row['train_ratio']:.2f} | {whole} | {accuracy:.3f} |"
        )
    figures = {name: one["figures"] for name, one in seen.items()}
    if startup := figures.get("startup"):
        yield f"\n## Start-up and memory\n\n{startup['turns']} turns.\n\n| figure | median (least–most), s |\n|---|---|"
        yield from (f"| {name} | {spread(values, 2)} |" for name, values in startup["seen"].items())
    if resident := figures.get("resident"):
        yield "\n## Number of samples\n"
        yield "| samples | training, s an epoch | µs per sample | with evaluation | peak, MB |\n|---|---|---|---|---|"
        for row in resident["rows"]:
            each = 1e6 * median(row["steps_s"]) / row["samples"]
            yield (
                f"| {row['samples']:,} | {spread(row['steps_s'])} | {each:.2f} | {spread(row['epoch_s'])} | "
                f"{median(row['peak_mb']):.0f} |"
            )
    yield "\n## Streaming, tracking, a full store, a sweep\n\n| figure | median (least–most) |\n|---|---|"
    for name, unit in (("streamed", "pictures a second, "), ("tracking", "s an epoch, "), ("store", "s, ")):
        if name in figures:
            yield from (f"| {name}: {unit}{kind} | {spread(v, 3)} |" for kind, v in figures[name]["seen"].items())
    if sweep := figures.get("sweep"):
        before, after = sweep["bare"]
        yield f"| sweep: s, halves of its bare training before and after it | {before:.0f}, {after:.0f} |"
        yield f"| sweep: s, from the command to its end | {sweep['sweep']:.0f} |"


def main() -> None:
    seen = {
        name: json.loads((FIGURES / f"{name}.json").read_text())
        for name in NAMES
        if (FIGURES / f"{name}.json").is_file()
    }
    targets = [*training_targets(seen), *other_targets(seen)]
    missed = [target for target in targets if not target.met]
    lines = [
        "# Benchmarks\n",
        "Written by `make bench` from what it measured; not edited. Contenders were written from scratch and are "
        "described in `benchmarks/contenders.py`. Each works in a process of its own, in turns; a ratio "
        "is the median over turns of the two figures of one turn.\n",
        f"{len(targets) - len(missed)} of {len(targets)} targets met on the CPU; those of the GPU were not measured.\n",
        "## Targets\n\n| figure | target | measured | |\n|---|---|---|---|",
        *(target.row() for target in sorted(targets, key=lambda target: target.met)),
        *(f"| GPU: {name} | {limit} | not measured | |" for name, limit in GPU),
    ]
    if missed:
        lines.append("\nWhy they are missed:\n")
        reasons: dict[str, list[str]] = {}
        for target in missed:
            reasons.setdefault(target.reason, []).append(target.name)
        lines += [f"- {'; '.join(names)}: {reason}." for reason, names in reasons.items()]
    lines += [
        "",
        *tables(seen),
        "\n## Where this was measured\n\n| part | commit | date | machine |\n|---|---|---|---|",
    ]
    lines += [f"| {name} | {one['commit']} | {one['date']} | {one['machine']} |" for name, one in seen.items()]
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"{PAGE.relative_to(PROJECT)}: {len(missed)} of {len(targets)} targets missed")
    for target in missed:
        print(target.row())


if __name__ == "__main__":
    main()
