"""Where an epoch of gaplab goes, what normalizing takes of it, and the memory of imports alone."""

import os

import torch
from contenders import WORK, pictures
from harness import Contender, keep, timed
from torch.utils.benchmark import Timer
from training import BATCHES, SAMPLES

from gaplab.nn.blocks import Normalize


def normalizing(work: str, batch: int) -> float:
    """Seconds that it takes for a mini-batch."""
    images = pictures(work, batch)[0][:batch]
    normalize = Normalize(images.shape[1])
    return float(Timer("normalize(images)", globals=locals()).blocked_autorange(min_run_time=0.3).median)


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    gaplab, rows = Contender("gaplab", threads), []
    print("| network | batch | seconds of steps | normalizing | Lightning's loop | evaluation | checkpoints |")
    print("|---|---|---|---|---|---|---|")
    for work in WORK:
        for batch in BATCHES:
            samples = max(SAMPLES[work], batch)
            seen = gaplab.ask(work=work, batch=batch, samples=samples, epochs=3, seed=0)
            row = {
                "work": work,
                "batch": batch,
                "steps": seen["train"] - seen["loop"],
                "normalizing": normalizing(work, batch) * samples / batch,
                **{name: seen[name] for name in ("loop", "evaluation", "checkpoints")},
            }
            rows.append(row)
            values = [f"{value:.3f}" for name, value in row.items() if name not in ("work", "batch")]
            print(f"| {work} | {batch} | {' | '.join(values)} |", flush=True)
    gaplab.close()
    imports = timed("-c", "import os, torch, torchvision, lightning.pytorch; os._exit(0)")[2]
    print(f"importing torch, torchvision and Lightning alone: {imports:.0f} MB")
    keep("where", {"rows": rows, "imports_mb": imports})


if __name__ == "__main__":
    main()
