"""What an epoch costs: gaplab beside what one would write or take instead, interleaved turn by turn.

    python benchmarks/training.py [--turns 3] [--work mlp cnn] [--batch 128] [--threads 2]

The contenders are described in contenders.py. The ratio is the median over turns of one contender's seconds against the
hand-written loop's in the same turn.
"""

import argparse
import os

from contenders import CONTENDERS, WORK
from harness import Contender, keep, ratio, spread

SAMPLES = {"mlp": 55_000, "mlp 2x1024": 20_000, "cnn": 5_000, "resnet-20": 2_000}
BATCHES = (32, 128, 512, 4096)
ALL_BATCHES = ("hand-written", "gaplab")  # the others at one size alone
SLOW = ("DataLoader", "DataLoader, 2 workers")  # minutes: in two turns
ONE_BATCH, SLOW_TURNS = 128, 2
EPOCHS = {"mlp": 6}  # of which the first is left out; the others take longer, and two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    words = parser.parse_args()
    processes = [Contender(name, words.threads) for name in words.contenders]
    rows = []
    print("| network | batch | contender | seconds an epoch | to hand-written | with evaluation | accuracy |")
    print("|---|---|---|---|---|---|---|")
    for work in words.work:
        for batch in words.batch:
            rows += measure(processes, work, batch, words.turns)
            keep("training", {"threads": words.threads, "turns": words.turns, "rows": rows})
    for process in processes:
        process.close()


def measure(processes: list[Contender], work: str, batch: int, turns: int) -> list[dict[str, object]]:
    samples = max(SAMPLES[work], batch)
    seen: dict[str, list[dict[str, float]]] = {process.name: [] for process in processes}
    for turn in range(turns):
        for process in processes:
            if (process.name not in ALL_BATCHES and batch != ONE_BATCH) or (
                process.name in SLOW and turn >= SLOW_TURNS
            ):
                continue
            epochs = 2 if process.name in SLOW else EPOCHS.get(work, 2)
            seen[process.name].append(process.ask(work=work, batch=batch, samples=samples, epochs=epochs, seed=turn))
    rows = []
    base = seen[processes[0].name]
    for name, answers in seen.items():
        if not answers:
            continue
        row: dict[str, object] = {"work": work, "batch": batch, "samples": samples, "contender": name}
        for kind in ("train", "whole"):
            if kind in answers[0]:
                seconds = [answer[kind] for answer in answers]
                row |= {kind: seconds, f"{kind}_ratio": ratio(seconds, [one[kind] for one in base[: len(seconds)]])}
        if "evaluation" in answers[0]:
            row["evaluation"] = [answer["evaluation"] for answer in answers]
        row["accuracy"] = [answer["accuracy"] for answer in answers]
        rows.append(row)
        whole = f"{row['whole_ratio']:.2f}" if "whole" in row else ""
        accuracy = sum(row["accuracy"]) / len(answers)  # type: ignore[arg-type]
        print(
            f"| {work} | {batch} | {name} | {spread(row['train'])} | {row['train_ratio']:.2f} | "  # type: ignore[arg-type]
            f"{whole} | {accuracy:.4f} |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
