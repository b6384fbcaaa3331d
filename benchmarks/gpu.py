"""What a GPU makes of gaplab, in under six minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--dry] [--out FOLDER]

The rows that matter most come first; those that no longer fit into the time are listed as such. Each row goes into
`FOLDER/bench-gpu.json` (`outputs/gpu`) and into `docs/benchmarks.md`. `--dry` measures on the CPU, in small and without
targets, and leaves the page alone: it shows that the benchmark runs.

Needs what tests/gpu/kit.py needs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / folder) for folder in ("src", "tests/gpu", "benchmarks")]

import torch
import torch.nn.functional as F
from kit import Kit, machine, made_words, stand_in_for_graphs
from torch import Tensor, nn

BUDGET_S = 360
PAGE = PROJECT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
PLAIN = ["model.bn=true", "optimizer=adam"]
GRAPH = [*PLAIN, "trainer.compile=true"]


@dataclass
class Row:
    figure: str
    target: str
    measured: str
    met: bool | None = None  # None for a figure without a target


def sizes(kit: Kit) -> list[str]:
    """All of MNIST, or in a dry run what `Kit.config` takes."""
    return [] if kit.dry else ["data.train_size=null", "data.valid_size=5000"]


def digits(kit: Kit) -> tuple[Tensor, Tensor]:
    images, labels = kit.images(400 if kit.dry else 55_000)
    return images.to(kit.device), labels.to(kit.device)


def small_mlp() -> nn.Sequential:
    """gaplab's `model=mlp model.bn=true`, written by hand."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((784, 64), (64, 128), (128, 64)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def gaplab_steps(kit: Kit, batch: int) -> float:
    """Steps a second of the small MLP, of the training steps alone."""
    with stand_in_for_graphs(kit):
        result, _ = kit.run(*GRAPH, *sizes(kit), f"data.batch_size={batch}", "trainer.max_epochs=4")
    return float(result["steps_per_s"])


def steps_per_second(kit: Kit) -> Iterator[Row]:
    for batch in (32, 128):
        found = gaplab_steps(kit, batch)
        target = 8000 if batch == 32 else None
        yield Row(
            f"mlp, batch {batch}: steps a second", f"≥ {target}" if target else "", f"{found:,.0f}",
            None if target is None else found >= target,
        )  # fmt: skip


def beside_a_hand_written_graph(kit: Kit) -> Iterator[Row]:
    """A loop that gathers its mini-batch, copies it into the graph's input and replays the step."""
    images, labels = digits(kit)
    batch, device = 128, kit.device
    network = small_mlp().to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True, capturable=not kit.dry)
    x, y = torch.empty(batch, 784, device=device), torch.empty(batch, dtype=torch.int64, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    x.copy_(images[:batch].flatten(1) / 255)
    y.copy_(labels[:batch])
    run = step
    if not kit.dry:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    rates = []
    for _ in range(3):
        order = torch.randperm(len(labels)).to(device).split(batch)[:-1]
        finish(kit)
        start = time.perf_counter()
        for part in order:
            x.copy_(images.index_select(0, part).flatten(1).float().div_(255))
            y.copy_(labels.index_select(0, part))
            run()
        finish(kit)
        rates.append(len(order) / (time.perf_counter() - start))
    by_hand, found = sorted(rates)[1], gaplab_steps(kit, batch)
    yield Row(
        "mlp, batch 128: steps a second, to a hand-written loop around one CUDA graph a step",
        "≥ 0.9", f"{found / by_hand:.2f} ({found:,.0f} to {by_hand:,.0f})", found / by_hand >= 0.9,
    )  # fmt: skip


def beside_a_template(kit: Kit) -> Iterator[Row]:
    """torchvision's data set, DataLoader and Lightning's own loop, a hundred mini-batches."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import MNIST

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_mlp()
            self.begun: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            self.begun.append(time.perf_counter())
            loss = F.cross_entropy(self.network(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    ready = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.13], [0.31])])
    loader = DataLoader(MNIST(PROJECT / "data", transform=ready, download=True), 128, shuffle=True)
    module = Plain()
    trainer = pl.Trainer(
        accelerator="cpu" if kit.dry else "cuda", devices=1, max_epochs=1, limit_train_batches=20 if kit.dry else 100,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=kit.folder,
    )  # fmt: skip
    trainer.fit(module, loader)
    half = module.begun[len(module.begun) // 2 :]
    template = (len(half) - 1) / (half[-1] - half[0])
    found = gaplab_steps(kit, 128)
    yield Row(
        "mlp, batch 128: times as fast as torchvision + DataLoader + Lightning",
        "≥ 30", f"{found / template:.0f} ({found:,.0f} to {template:,.0f} steps a second)", found / template >= 30,
    )  # fmt: skip


def cnn_to_99(kit: Kit) -> Iterator[Row]:
    """Training steps alone; reading, evaluation and saving are not counted."""
    words = [*GRAPH, "model=cnn", "data.batch_size=512", "optimizer.lr=0.01", "scheduler=one_cycle"]
    words += ["trainer.max_epochs=4", "trainer.precision=bf16-mixed", "metrics.train_every=4", *sizes(kit)]
    seconds, accuracies = [], []
    for seed in range(2 if kit.dry else 20):
        with stand_in_for_graphs(kit):
            result, _ = kit.run(*words, f"seed={seed}")
        seconds.append(result["times"]["steps"])
        accuracies.append(result["test_acc"])
    mean, reached = sum(seconds) / len(seconds), sum(one >= 0.99 for one in accuracies)
    accuracy = sum(accuracies) / len(accuracies)
    yield Row(
        f"MNIST, cnn to 99.0 % on test, seconds of training, mean of {len(seconds)} seeds",
        "≤ 0.6", f"{mean:.2f} (test {100 * accuracy:.2f} %; {reached} of {len(seconds)} reached 99.0)",
        mean <= 0.6 and accuracy >= 0.99,
    )  # fmt: skip


def fused(kit: Kit) -> Iterator[Row]:
    """Seconds of training, evaluation and saving of all runs of a sweep, to those of one run alone."""
    plans = (("mlp", ["model=mlp"], 64, "time of one", 3.0), ("cnn", ["model=cnn"], 16, "throughput of one", 4.0))
    for name, model, most, what, target in plans:
        count = 4 if kit.dry else most
        words = [*PLAIN, *model, "trainer.max_epochs=3", *sizes(kit)]
        alone, together = (fit_seconds(kit, words, number) for number in (1, count))
        ratio = together / alone if what.startswith("time") else count * alone / together
        met = ratio <= target if what.startswith("time") else ratio >= target
        sign = "≤" if what.startswith("time") else "≥"
        yield Row(f"{count} fused runs of {name}: times the {what}", f"{sign} {target:g}", f"{ratio:.1f}", met)


def fit_seconds(kit: Kit, words: list[str], count: int) -> float:
    """Of all runs of a sweep of `count` seeds, in a process of its own."""
    known = set(kit.folder.glob("sweeps/*"))
    process = kit.train_py("-m", "hydra/launcher=fused", *words, f"seed=range({count})")
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(output[-500:])
    (sweep,) = set(kit.folder.glob("sweeps/*")) - known
    return sum(json.loads(path.read_text())["fit_s"] for path in sweep.glob("*/result.json"))


def resnet(kit: Kit) -> Iterator[Row]:
    words = ["model=resnet", "model.bn=true", "data.batch_size=512", "trainer.max_epochs=2"]
    if not kit.dry:
        words += [*made_words(20_000), "data.train_size=null", "data.valid_size=0.1"]
    rates = [kit.run(*words, f"trainer.precision={one}")[0]["steps_per_s"] for one in ("32-true", "bf16-mixed")]
    yield Row(
        "ResNet-20, batch 512: steps a second, float32 and bf16-mixed", "", f"{rates[0]:,.0f} and {rates[1]:,.0f}"
    )


MEASURED: list[Callable[[Kit], Iterator[Row]]] = [
    steps_per_second, beside_a_hand_written_graph, beside_a_template, cnn_to_99, fused, resnet,
]  # fmt: skip


def finish(kit: Kit) -> None:
    if not kit.dry:
        torch.cuda.synchronize()


def write_page(where: dict[str, Any], rows: list[Row], left: list[str]) -> None:
    """Put the rows between the marks of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    verdicts = {None: "", True: "met", False: "**missed**"}
    lines = [
        f"On {where['date']}: {where['device']}, driver {where['driver']}, CUDA {where['cuda']}; Python "
        f"{where['python']}, {versions}.\n",
        "| figure | target | measured | |\n|---|---|---|---|",
        *(f"| {row.figure} | {row.target} | {row.measured} | {verdicts[row.met]} |" for row in rows),
        *(f"\nNot measured, for want of time: {', '.join(left)}." for _ in left[:1]),
    ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, in small, without writing the page")
    parser.add_argument("--out", type=Path, default=PROJECT / "outputs" / "gpu")
    wanted = parser.parse_args()
    if not wanted.dry and not torch.cuda.is_available():
        print("no GPU here; --dry shows that the benchmark runs", file=sys.stderr)
        return 2
    rows: list[Row] = []
    left: list[str] = []
    failed = False
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(wanted.dry, Path(folder))
        where = machine(kit)
        print(" · ".join([where["device"], f"torch {where['versions']['torch']}", f"Python {where['python']}"]))
        slowest = 0.0
        for measure in MEASURED:
            start = time.perf_counter()
            name = measure.__name__.replace("_", " ")
            if start - begun + slowest > BUDGET_S:
                left.append(name)
                continue
            try:
                with redirect_stdout(StringIO()):
                    found = list(measure(kit))
            except Exception as error:
                failed = True
                left.append(
                    f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
                )
                print(f"FAILED  {left[-1]}", flush=True)
                continue
            slowest = max(slowest, time.perf_counter() - start)
            for row in found:
                verdict = "" if row.met is None or kit.dry else "  met" if row.met else "  MISSED"
                print(f"{row.figure}: {row.measured}  {row.target}{verdict}", flush=True)
            rows += found
    print(f"{time.perf_counter() - begun:.0f} s" + (f"; not measured: {', '.join(left)}" if left else ""))
    wanted.out.mkdir(parents=True, exist_ok=True)
    seen = where | {"rows": [asdict(row) for row in rows], "not_measured": left}
    (wanted.out / "bench-gpu.json").write_text(json.dumps(seen, indent=1, ensure_ascii=False) + "\n")
    if not wanted.dry:
        write_page(where, rows, left)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
