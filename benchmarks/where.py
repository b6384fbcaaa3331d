"""Where an epoch of gaplab goes, what a step of the smallest network has that the hand-written one has not, and the
memory of imports alone."""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import WORK, drawn, floats, pictures
from harness import Contender, keep, median, timed
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from training import BATCHES, SAMPLES

from gaplab.nn.blocks import Normalize

TURNS, STEPS = 60, 100


def additions(batch: int) -> dict[str, float]:
    """Microseconds of a hand-written step of the smallest network, and what it takes more with each of gaplab's
    additions alone: medians over turns in one process, where all of them share what differs from process to process.
    """
    (pixels, labels), (images, _) = pictures("mlp", 55_000), floats("mlp", 55_000)
    normalized = nn.Sequential(Normalize(1), drawn("mlp"))

    def loop(
        network: nn.Module, source: Tensor, more: Callable[[Tensor, Tensor], object] | None = None
    ) -> Callable[[list[Tensor]], None]:
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

        def steps(parts: list[Tensor]) -> None:
            for part in parts:
                y = labels.index_select(0, part)
                logits = network(source.index_select(0, part).view(-1, 1, 28, 28))
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if more:
                    more(logits, loss)

        return steps

    kept: list[Tensor] = []

    def answers(logits: Tensor, loss: Tensor) -> None:
        kept.extend((logits.argmax(1), loss.detach()))
        if len(kept) == STEPS:
            torch.cat(kept[::2]), torch.stack(kept[1::2]).isfinite().all()
            kept.clear()

    variants = {
        "hand-written": loop(drawn("mlp"), images.flatten(1)),
        "pictures kept as uint8 and normalized in the step": loop(normalized, pixels.flatten(1)),
        "answers kept for the running accuracy": loop(drawn("mlp"), images.flatten(1), answers),
    }
    seen: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        parts = [torch.randint(len(labels), (batch,)) for _ in range(STEPS)]
        for name, steps in variants.items():
            start = time.perf_counter()
            steps(parts)
            seen[name].append(1e6 * (time.perf_counter() - start) / STEPS)
    bare = seen.pop("hand-written")
    more = {
        name: median([one - other for one, other in zip(values, bare, strict=True)]) for name, values in seen.items()
    }
    return {"hand-written": median(bare)} | more


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
    steps = {batch: additions(batch) for batch in BATCHES}
    print(steps)
    keep("where", {"rows": rows, "imports_mb": imports, "steps_us": steps})


if __name__ == "__main__":
    main()
