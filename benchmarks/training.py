"""What an epoch costs: gaplab beside what one would write or take instead, interleaved turn by turn.

    python benchmarks/training.py [--turns 3] [--work mlp cnn] [--batch 128] [--threads 2]

The contenders are described in contenders.py. Each turn has new processes, as one process differs from the next by more
than the contenders do: where its memory lies is settled when it starts. The ratio is the median over turns of one
contender's seconds against the hand-written loop's in the same turn.
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
TURNS, EPOCHS = {"mlp": 7}, {"mlp": 6}  # where they are short; else 3 turns of 2 epochs, the first of which is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, help="of every network; 3, and 7 for the smallest")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    words = parser.parse_args()
    rows: list[dict[str, object]] = []
    print("| network | batch | contender | seconds an epoch | to hand-written | with evaluation | accuracy |")
    print("|---|---|---|---|---|---|---|")
    for work in words.work:
        seen = measure(words.contenders, words.threads, work, words.batch, words.turns or TURNS.get(work, 3))
        for batch, answers in seen.items():
            rows += table(work, batch, answers)
        keep("training", {"threads": words.threads, "rows": rows})


def measure(
    names: list[str], threads: int, work: str, batches: list[int], turns: int
) -> dict[int, dict[str, list[dict[str, float]]]]:
    """What each contender answered in each turn, by batch size."""
    seen: dict[int, dict[str, list[dict[str, float]]]] = {batch: {} for batch in batches}
    for turn in range(turns):
        processes = [Contender(name, threads) for name in names if name not in SLOW or turn < SLOW_TURNS]
        for batch in batches:
            for process in processes:
                if process.name in ALL_BATCHES or batch == ONE_BATCH:
                    epochs = 2 if process.name in SLOW else EPOCHS.get(work, 2)
                    samples = max(SAMPLES[work], batch)
                    answer = process.ask(work=work, batch=batch, samples=samples, epochs=epochs, seed=turn)
                    seen[batch].setdefault(process.name, []).append(answer)
        for process in processes:
            process.close()
    return seen


def table(work: str, batch: int, seen: dict[str, list[dict[str, float]]]) -> list[dict[str, object]]:
    """A row for each contender; the first is the one that the others are held against."""
    rows = []
    base = next(iter(seen.values()))
    for name, answers in seen.items():
        row: dict[str, object] = {"work": work, "batch": batch, "samples": max(SAMPLES[work], batch), "contender": name}
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
