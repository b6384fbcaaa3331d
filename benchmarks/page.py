"""Writes docs/benchmarks.md from what the benchmarks kept: `python benchmarks/page.py`, at the end of `make bench`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness import FIGURES, PROJECT, median, spread
from training import BATCHES, SAMPLES

PAGE = PROJECT / "docs" / "benchmarks.md"
VALID = 1000  # samples of the valid split, in contenders.py
NAMES = ("training", "where", "startup", "resident", "streamed", "tracking", "store", "sweep")


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
    ours, bare = rows_of(seen, "gaplab"), rows_of(seen, "hand-written")
    slow, slower = rows_of(seen, "DataLoader"), rows_of(seen, "DataLoader, 2 workers")
    figures = seen["where"]["figures"]
    where = {(row["work"], row["batch"]): row for row in figures["rows"]}
    for (work, batch), row in ours.items():
        name, parts, other = f"{work}, batch {batch}", where[work, batch], bare[work, batch]
        step_ms = 1e3 * median([mine - its for mine, its in zip(row["train"], other["train"], strict=True)])
        evaluation_ms = 1e3 * (median(other["whole"]) - median(other["train"]))
        steps = (
            f"steps {step_ms:+.0f} ms an epoch of {-(-row['samples'] // batch)}: normalizing uint8 pictures, which the "
            f"hand-written loop has as normalized floats, takes {1e3 * parts['normalizing']:.0f} ms, Lightning's loop "
            f"{1e3 * parts['loop']:.0f} ms"
        )
        if work == "mlp":
            bare_us, *more_us = figures["steps_us"][str(batch)].values()
            steps += (
                f"; in one process, uint8 pictures and answers for the running accuracy make a hand-written step of "
                f"{bare_us:.0f} µs {sum(more_us):.0f} µs longer"
            )
        yield Target(f"{name}: training, to hand-written", row["train_ratio"], 1.05, True, steps)
        yield Target(
            f"{name}: epoch with evaluation, to hand-written", row["whole_ratio"], 1.08, True,
            f"{steps}; evaluation {1e3 * median(row['evaluation']):.0f} ms beside {evaluation_ms:.0f}; checkpoints, "
            f"written, read back and with checksums, {1e3 * parts['checkpoints']:.0f} ms",
        )  # fmt: skip
    for work, least in (("mlp", 10), ("cnn", 3)):
        fastest = min(median(kind[work, 128]["train"]) for kind in (slow, slower))
        yield Target(
            f"{work}, batch 128: times as fast as torchvision + DataLoader + Lightning",
            fastest / median(ours[work, 128]["train"]), least, False,
            f"the hand-written loop is {fastest / median(bare[work, 128]['train']):.1f} times as fast as it: what is "
            "left is arithmetic, which is the same in all of them",
            digits=1,
        )  # fmt: skip
    for (work, batch), row in ours.items():
        other = bare[work, batch]
        share = (median(other["whole"]) - median(other["train"])) / median(other["train"])
        yield Target(
            f"{work}, batch {batch}: honest evaluation, share of training time",
            median(row["evaluation"]) / median(row["train"]), 0.25, True,
            f"in the hand-written loop it takes {share:.2f}: a forward pass is a third of a step's arithmetic and more "
            f"of its time, over {row['samples'] + VALID} samples to {row['samples']} trained on; "
            "`metrics.train_every=2` nearly halves it",
        )  # fmt: skip


def other_targets(seen: dict[str, Any]) -> Iterator[Target]:
    figures = {name: one["figures"] for name, one in seen.items()}
    startup, resident, sweep = figures["startup"], figures["resident"], figures["sweep"]
    for run in ("first", "second"):
        yield Target(
            f"command to first optimizer step, {run} run, to the minimal script",
            startup["ratios"][f"{run} run, first step"], 0.7, True,
            "most of it is the import of torch and Lightning, on both sides",
        )  # fmt: skip
    peaks = [max(values) for name, values in startup["seen"].items() if name.startswith("gaplab") and "MB" in name]
    imports = figures["where"]["imports_mb"]
    yield Target(
        "peak memory of an MNIST run with tracking, GB", max(peaks) * 2**20 / 1e9, 1.0, True,
        f"importing torch, torchvision and Lightning alone takes {imports * 2**20 / 1e9:.2f} GB, whatever is trained",
    )  # fmt: skip
    turns = {row["samples"]: [1e6 * seconds / row["samples"] for seconds in row["steps_s"]] for row in resident["rows"]}
    each = {samples: median(values) for samples, values in turns.items()}
    middle = sorted(each)[len(each) // 2]
    worst = max(each, key=lambda samples: abs(each[samples] / each[middle] - 1))
    yield Target(
        f"training time per sample, {worst:,} samples against {middle:,}: difference",
        abs(each[worst] / each[middle] - 1), 0.05, True,
        f"{spread(turns[worst], 2)} and {spread(turns[middle], 2)} µs a sample: where these ranges overlap, turns in "
        "which the machine was slower",
    )  # fmt: skip
    yield Target("bytes per resident sample, to its size as uint8", resident["of_uint8"], 1.1, True)
    yield Target(
        "pictures streamed while training, to a pool of bare decoders", figures["streamed"]["ratio"], 0.9, False,
        "the optimizer steps take their share of the same cores",
    )  # fmt: skip
    yield Target(
        "an epoch with MLflow, to one without", figures["tracking"]["ratio"], 1.02, True,
        "the process that sends to MLflow computes on the same cores",
        digits=3,
    )  # fmt: skip
    yield Target(
        f"first step beside {figures['store']['runs']} runs in folders and store, to beside one",
        figures["store"]["ratios"]["step"], 1.05, True, "each run's folder is asked whether it has ended",
    )  # fmt: skip
    yield Target(
        f"sweep of 72 runs of {sweep['epochs']} epochs, to bare training on {sweep['cores']} cores",
        sweep["ratio"], 1.15, True,
        "the start of the command and its two workers, each run's folder, journal, checkpoints, test split and the "
        "process that sends them to MLflow: in all "
        f"{(sweep['sweep'] * sweep['cores'] - sum(sweep['bare'])) / 72:.1f} s of a core for a run",
    )  # fmt: skip


def tables(seen: dict[str, Any]) -> Iterator[str]:
    training = seen["training"]["figures"]
    turns = ", ".join(
        f"{len(row['train'])} of {work}" for (work, batch), row in rows_of(seen, "gaplab").items() if batch == 128
    )
    yield "## Training and evaluation\n"
    yield f"Turns: {turns}; in each, new processes of {training['threads']} threads."
    yield "Seconds of an epoch: median (least–most).\n"
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
    yield "\n## Where an epoch of gaplab goes\n"
    yield "| network | batch | steps, s | of which normalizing | Lightning's loop, s | evaluation, s | checkpoints, s |"
    yield "|---|---|---|---|---|---|---|"
    for row in figures["where"]["rows"]:
        names = ("steps", "normalizing", "loop", "evaluation", "checkpoints")
        yield f"| {row['work']} | {row['batch']} | {' | '.join(f'{row[name]:.3f}' for name in names)} |"
    steps = figures["where"]["steps_us"]
    yield "\nA hand-written step of the smallest network, µs, and what each of gaplab's additions makes it longer:\n"
    yield f"| batch | {' | '.join(steps['32'])} |\n|{'---|' * (1 + len(steps['32']))}"
    yield from (f"| {batch} | {' | '.join(f'{value:.0f}' for value in row.values())} |" for batch, row in steps.items())
    startup = figures["startup"]
    yield f"\n## Start-up and memory\n\n{startup['turns']} turns.\n\n| figure | median (least–most), s |\n|---|---|"
    yield from (f"| {name} | {spread(values, 2)} |" for name, values in startup["seen"].items())
    yield "\n## Number of samples\n"
    yield "| samples | training, s an epoch | µs per sample | with evaluation | peak, MB |\n|---|---|---|---|---|"
    for row in figures["resident"]["rows"]:
        each = 1e6 * median(row["steps_s"]) / row["samples"]
        yield (
            f"| {row['samples']:,} | {spread(row['steps_s'])} | {each:.2f} | {spread(row['epoch_s'])} | "
            f"{median(row['peak_mb']):.0f} |"
        )
    yield "\n## Streaming, tracking, a full store, a sweep\n\n| figure | median (least–most) |\n|---|---|"
    for name, unit in (("streamed", "pictures a second, "), ("tracking", "s an epoch, "), ("store", "s, ")):
        yield from (f"| {name}: {unit}{kind} | {spread(v, 3)} |" for kind, v in figures[name]["seen"].items())
    before, after = figures["sweep"]["bare"]
    yield f"| sweep: s, halves of its bare training before and after it | {before:.0f}, {after:.0f} |"
    yield f"| sweep: s, from the command to its end | {figures['sweep']['sweep']:.0f} |"


def main() -> None:
    files = {name: FIGURES / f"{name}.json" for name in NAMES}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        sys.exit(f"error: not measured yet: {', '.join(missing)}; make bench measures all")
    seen = {name: json.loads(file.read_text()) for name, file in files.items()}
    everything = {(work, batch) for work in SAMPLES for batch in BATCHES}
    if any(everything - rows_of(seen, name).keys() for name in ("hand-written", "gaplab")):
        sys.exit("error: a part of training.py alone was measured; make bench measures all")
    targets = [*training_targets(seen), *other_targets(seen)]
    missed = [target for target in targets if not target.met]
    lines = [
        "# Benchmarks\n",
        "Written by `make bench` from what it measured; not edited. Contenders were written from scratch and are "
        "described in `benchmarks/contenders.py`. Each works in a process of its own, a new one in every turn; a ratio "
        "is the median over turns of the two figures of one turn. The hand-written loop is what one writes, not tuned: "
        "gaplab also keeps convolutional networks in channels-last order and has the C library reuse freed memory.\n",
        f"{len(targets) - len(missed)} of {len(targets)} targets met on the CPU.\n",
        "## Targets\n\n| figure | target | measured | |\n|---|---|---|---|",
        *(target.row() for target in sorted(targets, key=lambda target: target.met)),
    ]
    if missed:
        lines.append("\nWhy they are missed:\n")
        lines += [f"- {target.name}: {target.reason}." for target in missed]
    lines += [
        "",
        *tables(seen),
        "\n## Where this was measured\n\n| part | commit | date | machine |\n|---|---|---|---|",
    ]
    lines += [f"| {name} | {one['commit']} | {one['date']} | {one['machine']} |" for name, one in seen.items()]
    gpu = PAGE.read_text().partition("## On a GPU\n")[2]  # which `make bench-gpu` wrote
    PAGE.write_text("\n".join(lines) + "\n\n## On a GPU\n" + gpu)
    print(f"{PAGE.relative_to(PROJECT)}: {len(missed)} of {len(targets)} targets missed")
    for target in missed:
        print(target.row())


if __name__ == "__main__":
    main()
