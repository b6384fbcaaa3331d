"""What gaplab does on a GPU, checked in under four minutes: `make test-gpu`.

    python tests/gpu/kit.py [--dry] [--out FOLDER]

Each check prints a line as it ends: passed with the figures seen, failed with the reason, or not run with what is
missing. The status is 0 where none failed. `--dry` runs the checks on the CPU in their small form; what only a GPU can
show is then not run. `FOLDER` (`outputs/gpu`) keeps `test-gpu.json`.

Needs torch >= 2.11, torchvision, lightning, torchmetrics, hydra-core, omegaconf, joblib, rich; no MLflow, no network.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / folder) for folder in ("src", "benchmarks")]

import torch
from hydra import compose, initialize_config_dir

from gaplab import config as configs
from gaplab import interrupt, launch
from gaplab.errors import TrainingError, UserError
from gaplab.nn.build import build_network
from gaplab.training import classifier as classifiers
from gaplab.training import optim
from gaplab.training.captured import CapturedStep
from gaplab.training.gap import predict
from gaplab.training.stack import Stack

VERSION = 1  # of the kit: another one where a check asks for something else
PAGES = (PROJECT / "README.md", PROJECT / "docs" / "scale.md")
BEGIN, END = "<!-- gpu status -->", "<!-- /gpu status -->"
configs.register()
NETWORKS = {"mlp": ["model=mlp"], "cnn": ["model=cnn"], "resnet": ["model=resnet", "model.depth=8"]}
EXACT_LR = "optimizer.lr=0.0009765625"  # a graph's rates are float32


class NotRunError(Exception):
    """Why a check cannot be made here."""


class Kit:
    """Where the checks run, and what they share.

    Attributes:
        dry: on the CPU, in small.
        device: of the checks.
        folder: for their runs.
    """

    def __init__(self, dry: bool, folder: Path) -> None:
        self.dry, self.folder = dry, folder
        self.device = torch.device("cpu" if dry else "cuda")
        self._count = 0

    def need_gpu(self, what: str) -> None:
        if self.dry:
            raise NotRunError(f"{what} needs a GPU")

    def overrides(self) -> list[str]:
        """Of every run, but for the accelerator."""
        words = [f"paths.outputs={self.folder}", "tracking=none", "figures=false"]
        if not self.dry:
            return [*words, "data.train_size=5000", "data.valid_size=2000"]
        return [*words, *made_words(240, side=28, channels=1), "data.valid_size=80", "trainer.threads=1"]

    def config(self, *overrides: str, accelerator: str = "") -> configs.Config:
        words = [f"trainer.accelerator={accelerator or self.device.type}", "trainer.max_epochs=2"]
        words += [*self.overrides(), *overrides]
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            return configs.from_hydra(compose("train", words), words)

    def run(self, *overrides: str, accelerator: str = "", folder: Path | None = None) -> tuple[dict[str, Any], Path]:
        """A run in this process: its result and its folder."""
        self._count += 1
        folder = folder or self.folder / f"run{self._count}"
        launch.launch(self.config(*overrides, accelerator=accelerator), folder)
        return json.loads((folder / "result.json").read_text()), folder

    def train_py(self, *overrides: str) -> "subprocess.Popen[str]":
        """`python src/train.py …` with the overrides that `run` has."""
        words = [f"trainer.accelerator={self.device.type}", *self.overrides()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(
            [sys.executable, str(PROJECT / "src" / "train.py"), *overrides[:1], *words, *overrides[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    def images(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """MNIST's first pictures, uint8 (N, 1, 28, 28), and their labels, on the CPU."""
        from torchvision.datasets import MNIST

        mnist = MNIST(PROJECT / "data", download=True)
        return mnist.data[:count, None], mnist.targets[:count]

    def network(self, name: str, *overrides: str, seed: int = 0) -> torch.nn.Module:
        model = self.config(*NETWORKS[name], "model.bn=true", *overrides).model
        network = build_network({**configs.asdict(model)}, (1, 28, 28), 10, seed)
        network.normalize.set_(torch.tensor([0.13], dtype=torch.float64), torch.tensor([0.31], dtype=torch.float64))
        return network


def made_words(samples: int, **more: int) -> list[str]:
    """Made pictures as the data, of which 100 are the test part."""
    kwargs = [f"+data.{part}_kwargs.{name}={value}" for part in ("train", "test") for name, value in more.items()]
    return [
        "allowed_targets=[gaplab,torch,torchvision,made]", "data._target_=made.Pictures", "data.name=made",
        "~data.train_kwargs.train", "~data.test_kwargs.train", "data.num_train=null", *kwargs,
        f"+data.train_kwargs.samples={samples}", "+data.test_kwargs.samples=100",
    ]  # fmt: skip


CHECKS: list[tuple[str, Callable[[Kit], str]]] = []


def check(title: str) -> Callable[[Callable[[Kit], str]], Callable[[Kit], str]]:
    def add(function: Callable[[Kit], str]) -> Callable[[Kit], str]:
        CHECKS.append((title, function))
        return function

    return add


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(
        folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
    )["state_dict"]
    return state


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of any value."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def within(figure: float, bound: float, what: str) -> str:
    assert figure <= bound, f"{what} {figure:.3g}, at most {bound:g} allowed"
    return f"{what} {figure:.2g} (<= {bound:g})"


@contextmanager
def stand_in_for_graphs(kit: Kit) -> Any:
    """On the CPU a capture runs the work again at each replay; on a GPU it is the real one."""
    if not kit.dry:
        yield
        return

    def capture(work: Callable[[], Any]) -> Callable[[], Any]:
        return work

    with (
        mock.patch("gaplab.config._check_compile", lambda trainer: None),
        mock.patch.object(classifiers, "CapturedStep", partial(CapturedStep, capture=capture)),
    ):
        yield


@check("answers and losses against the CPU")
def answers(kit: Kit) -> str:
    images, labels = kit.images(64 if kit.dry else 2000)
    seen = []
    for name in NETWORKS:
        for dtype, loss_bound, tie in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-2, 2e-2)):
            network = kit.network(name).to(dtype)
            expected, _ = predict(network, [(images, labels)])
            found, _ = predict(network.to(kit.device), [(images.to(kit.device), labels.to(kit.device))])
            top = expected.double().topk(2, dim=1).values
            differ = (found.argmax(1) != expected.argmax(1)) & (top[:, 0] - top[:, 1] > tie)
            assert not bool(differ.any()), f"{name} {dtype}: {int(differ.sum())} answers differ"
            losses = [float(torch.nn.functional.cross_entropy(one.double(), labels)) for one in (expected, found)]
            seen.append(within(abs(losses[0] - losses[1]), loss_bound, f"{name} {str(dtype)[6:]} loss off by"))
    return "; ".join(seen)


@check("an epoch of training against the CPU, float64")
def training(kit: Kit) -> str:
    seen = []
    for name in NETWORKS:
        words = [*NETWORKS[name], "model.bn=true", "trainer.precision=64-true", "trainer.max_epochs=1"]
        words += ["data.train_size=64" if kit.dry else "data.train_size=160", "data.valid_size=80"]
        words += ["data.batch_size=32", "optimizer=sgd", "optimizer.lr=0.01"]
        here, folder = kit.run(*words)
        there, other = kit.run(*words, accelerator="cpu")
        assert here["valid_acc"] == there["valid_acc"]
        seen.append(within(furthest(weights(folder), weights(other)), 1e-9, f"{name}: weights off by"))
    return "; ".join(seen)


@check("a whole run: honest evaluation of its best checkpoint, equal to the CPU's to the sample")
def evaluation(kit: Kit) -> str:
    result, folder = kit.run("model=cnn", "model.bn=true", "trainer.precision=64-true", "data.augment=crop_flip")
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True, map_location="cpu")
    network = build_network(state["hyper_parameters"]["model"], (1, 28, 28), 10).double()
    network.load_state_dict({name.removeprefix("network."): value for name, value in state["state_dict"].items()})
    from gaplab.data.datamodule import build_datamodule

    config = kit.config("model=cnn", accelerator="cpu")
    data = build_datamodule(config.data, config.seed, allowed_targets=config.allowed_targets)
    right = 0
    for images, labels in data.labelled("valid"):
        right += int((predict(network, [(images, labels)])[0].argmax(1) == labels).sum())
    count = len(data.splits["valid"].indices)
    assert result["best"]["valid_acc"] == right / count, f"{result['best']['valid_acc']} there, {right}/{count} here"
    return f"{right} of {count} valid samples right on both, gap {100 * result['gap_acc']:+.2f} pp, {result['device']}"


@check("a CUDA graph against eager steps")
def graph(kit: Kit) -> str:
    seen = []
    words = [
        "model.bn=true",
        EXACT_LR,
        "optimizer=adamw",
        "trainer.gradient_clip_val=0.5",
        "trainer.deterministic=true",
    ]
    for name in ("mlp", "cnn"):
        _, eager = kit.run(*NETWORKS[name], *words)
        with stand_in_for_graphs(kit):
            _, captured = kit.run(*NETWORKS[name], *words, "trainer.compile=true")
        seen.append(within(furthest(weights(eager), weights(captured)), 1e-3, f"{name}: weights off by"))
    return "; ".join(seen)


@check("a CUDA graph after a stop and a resume")
def graph_resumed(kit: Kit) -> str:
    words = ["model.bn=true", EXACT_LR, "trainer.max_epochs=4", "trainer.deterministic=true", "trainer.compile=true"]
    with stand_in_for_graphs(kit):
        _, whole = kit.run(*words)
        folder = kit.folder / "stopped"
        with stop_after_an_epoch(folder), suppress(interrupt.Interrupted):
            kit.run(*words, folder=folder)
        result, _ = kit.run(*words, folder=folder)
    assert result["epochs"] == 4
    return within(furthest(weights(whole), weights(folder)), 1e-6, "weights off by")


@contextmanager
def stop_after_an_epoch(folder: Path) -> Any:
    """Send this process SIGTERM once the run in `folder` has a checkpoint."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            if (folder / "checkpoints" / "last.ckpt.sha256").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def stack_of(kit: Kit, count: int, capture: Callable[..., Any] | None) -> Stack:
    networks = [kit.network("mlp", seed=seed).to(kit.device).train() for seed in range(count)]
    optimizers = [torch.optim.Adam(network.parameters(), lr=2**-10, fused=True) for network in networks]
    return Stack(networks, optimizers, capture=capture)


@check("a group of fused runs as one CUDA graph, before and after a run leaves it")
def graph_of_group(kit: Kit) -> str:
    images, labels = (value.to(kit.device) for value in kit.images(640))
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 640, 64)]
    ends = []
    for captured in (False, True):
        stack = stack_of(kit, 3, (lambda work: work) if kit.dry and captured else None)
        if not captured:
            stack._capture = None
            stack.keep(range(3))
        for step, (pictures, classes) in enumerate(batches * 2):
            if step == 10:
                stack.keep([0, 2])
            rows = 3 if step < 10 else 2
            stack.step(pictures.expand(rows, *pictures.shape), classes.expand(rows, *classes.shape))
        ends.append({name: value.detach().cpu().clone() for name, value in stack._parameters.items()})
    return within(furthest(*ends), 1e-4, "weights off by")


@check("an optimizer that no CUDA graph can hold is refused in a line")
def refused(kit: Kit) -> str:
    words = ["optimizer._target_=torch.optim.Adagrad", "trainer.compile=true"]
    with stand_in_for_graphs(kit):
        try:
            kit.run(*words)
        except UserError as error:
            assert "Adagrad" in str(error)
            assert "\n" not in str(error)
            return str(error)
    raise AssertionError("it was trained")


@check("out of memory ends one run in a line, and the next run trains")
def out_of_memory(kit: Kit) -> str:
    kit.need_gpu("a limit on its memory")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        kit.run("model=cnn", "model.widths=[512,512]", "data.batch_size=5000")
    except TrainingError as error:
        said = str(error)
    else:
        raise AssertionError("it fits into a hundredth of the memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of memory" in said
    assert "\n" not in said
    kit.run()
    return said[:90]


@check("bf16-mixed against float32, paired by seed")
def bf16(kit: Kit) -> str:
    seeds = range(2 if kit.dry else 6)
    words = ["model.bn=true", "trainer.max_epochs=3"]
    by = [
        [kit.run(*words, f"trainer.precision={one}", f"seed={seed}")[0]["valid_acc"] for seed in seeds]
        for one in ("32-true", "bf16-mixed")
    ]
    differences = torch.tensor(by[1], dtype=torch.float64) - torch.tensor(by[0], dtype=torch.float64)
    error = float(differences.std() / len(seeds) ** 0.5)
    # four standard errors, and what 2 000 samples alone leave open
    return within(abs(float(differences.mean())), 4 * error + 0.01, f"valid/acc over {len(seeds)} seeds differs by")


@check("channels_last against contiguous, and augmentation on the device")
def layout(kit: Kit) -> str:
    images, labels = kit.images(32 if kit.dry else 512)
    network = kit.network("cnn").double().to(kit.device).train()
    plain = kit.network("cnn").double().to(kit.device, memory_format=torch.contiguous_format).train()
    seen = []
    for one in (network, plain):
        loss = torch.nn.functional.cross_entropy(one(images.to(kit.device)), labels.to(kit.device))
        loss.backward()
        seen.append({name: value.grad.cpu() for name, value in one.named_parameters()})
    from gaplab.data.loader import augmentation

    change = augmentation("crop_flip", 4, 0, 0)
    here, there = (change(images.to(device), 0, len(images), 0) for device in (kit.device, "cpu"))
    assert torch.equal(here.cpu(), there), "augmented pictures differ from the CPU's"
    return within(furthest(*seen), 1e-9, "gradients off by") + "; augmented pictures equal"


@check("deterministic mode, twice the same bits")
def deterministic(kit: Kit) -> str:
    words = ["model=cnn", "model.bn=true", "model.dropout=0.3", "trainer.deterministic=true"]
    (_, one), (_, other) = kit.run(*words), kit.run(*words)
    return within(furthest(weights(one), weights(other)), 0, "weights off by")


@check("dropout's draws after SIGKILL and resume")
def killed(kit: Kit) -> str:
    words = ["model.bn=true", "model.dropout=0.5", "trainer.deterministic=true", "trainer.max_epochs=6", "name=killed"]
    _, whole = kit.run(*words)
    known = set(kit.folder.glob("runs/*"))
    process = kit.train_py(*words)
    deadline = time.monotonic() + 90
    while not (found := [path for path in set(kit.folder.glob("runs/*")) - known if _has_checkpoint(path)]):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint within 90 s"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    result, _ = kit.run(*words, folder=found[0])
    assert result["epochs"] == 6
    return within(furthest(weights(whole), weights(found[0])), 0, "weights off by")


def _has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoints" / "last.ckpt.sha256").exists()


@check("8 fused runs against one alone, float64")
def fused(kit: Kit) -> str:
    words = ["model.bn=true", "trainer.precision=64-true", "trainer.max_epochs=2"]
    launcher = ["hydra/launcher=fused", "hydra.launcher.replicas=8", "hydra.launcher.n_jobs=1"]
    process = kit.train_py("-m", *launcher, *words, "seed=range(8)")
    output = process.communicate()[0]
    assert process.returncode == 0, output[-500:]
    folder = next(path for path in sorted(kit.folder.glob("sweeps/*/*")) if path.name.startswith("3_"))
    found = json.loads((folder / "result.json").read_text())
    alone, other = kit.run(*words, "seed=3")
    assert found["valid_acc"] == alone["valid_acc"]
    return within(furthest(weights(folder), weights(other)), 1e-9, "weights off by")


@check("resident data take what their pixels take")
def memory(kit: Kit) -> str:
    kit.need_gpu("its memory")
    from gaplab.data.datamodule import build_datamodule

    data = build_datamodule(kit.config("data.train_size=null").data, 0)
    pixels = sum({id(part.source): part.source.pixels.numel() for part in data.splits.values()}.values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    data.to_(kit.device)
    taken = torch.cuda.memory_allocated() - before
    return within(taken / pixels, 1.05, f"{taken / 1e6:.1f} MB, bytes a pixel")


@check("two ranks on one GPU over gloo, synchronized BatchNorm, against one rank")
def two_ranks(kit: Kit) -> str:
    kit.need_gpu("SyncBatchNorm")
    images, labels = kit.images(256)
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (scratch, images, labels), nprocs=2)
        found = torch.load(Path(scratch) / "weights.pt", weights_only=True)
    expected = _steps(kit.network("cnn").double().cuda().train(), images.cuda(), labels.cuda(), len(labels))
    return within(furthest(found, expected), 1e-9, "weights off by")


def _rank(rank: int, scratch: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=2)
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(Kit(False, Path(scratch)).network("cnn"))
    part = slice(rank * 128, rank * 128 + 128)
    state = _steps(network.double().cuda().train(), images[part].cuda(), labels[part].cuda(), len(labels))
    if rank == 0:
        torch.save(state, Path(scratch) / "weights.pt")
    dist.destroy_process_group()


def _steps(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, total: int) -> dict[str, torch.Tensor]:
    """Ten steps of SGD on one mini-batch, of which this process may have a part."""
    import torch.distributed as dist

    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for _ in range(10):
        torch.nn.functional.cross_entropy(network(images), labels, reduction="sum").div(total).backward()
        if dist.is_initialized():
            for parameter in network.parameters():
                dist.all_reduce(parameter.grad)
        optim.update_(network, optimizer, None)
    return {name: value.detach().cpu() for name, value in network.state_dict().items() if value.is_floating_point()}


@check("NCCL with one rank, and with every GPU where there are several")
def nccl(kit: Kit) -> str:
    kit.need_gpu("NCCL")
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    value = torch.arange(4.0, device="cuda")
    dist.all_reduce(value)
    dist.destroy_process_group()
    assert value.tolist() == [0, 1, 2, 3]
    count = torch.cuda.device_count()
    if count == 1:
        return "one rank; there is no second GPU"
    process = kit.train_py("model.bn=true", f"trainer.devices={count}", "trainer.max_epochs=2")
    output = process.communicate()[0]
    assert process.returncode == 0, output[-500:]
    return f"one rank, and a run on {count} GPUs"


def machine(kit: Kit) -> dict[str, Any]:
    """Where the kit runs: for the status table."""
    from importlib import metadata

    name = "CPU (dry run)" if kit.dry else torch.cuda.get_device_name()
    driver = ""
    with suppress(OSError, subprocess.CalledProcessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return {
        "device": name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {one: metadata.version(one) for one in ("torch", "lightning", "torchmetrics", "hydra-core")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def status_table(where: dict[str, Any], said: str) -> str:
    """What was run on which GPU, when, and with which version of the kit."""
    software = f"torch {where['versions']['torch']}, CUDA {where['cuda']}, driver {where['driver']}"
    head = "| `make test-gpu` | GPU | software | date | kit |\n|---|---|---|---|---|"
    return f"{head}\n| {said} | {where['device']} | {software} | {where['date']} | {VERSION} |"


def write_status(table: str) -> None:
    for page in PAGES:
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, each check in its small form")
    parser.add_argument("--out", type=Path, default=PROJECT / "outputs" / "gpu")
    wanted = parser.parse_args(arguments)
    if not wanted.dry and not torch.cuda.is_available():
        print("no GPU here; --dry runs the checks on the CPU", file=sys.stderr)
        return 2
    begun, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(wanted.dry, Path(folder))
        where = machine(kit)
        print(" · ".join([where["device"], f"torch {where['versions']['torch']}", f"Python {where['python']}"]))
        for title, function in CHECKS:
            start, trace = time.perf_counter(), ""
            try:
                with open(os.devnull, "w") as nowhere, _output(nowhere):
                    said, outcome = function(kit), "passed"
            except NotRunError as reason:
                said, outcome = str(reason), "not run"
            except Exception as error:
                said, outcome, trace = f"{type(error).__name__}: {error}", "FAILED", traceback.format_exc()
            seconds = time.perf_counter() - start
            print(f"{outcome:8} {seconds:5.1f} s  {title}: {said}", flush=True)
            outcomes.append({"check": title, "outcome": outcome, "seconds": seconds, "said": said, "traceback": trace})
    counts = {name: sum(one["outcome"] == name for one in outcomes) for name in ("passed", "FAILED", "not run")}
    said = ", ".join(f"{count} {name.lower()}" for name, count in counts.items())
    print(f"{said} in {time.perf_counter() - begun:.0f} s")
    wanted.out.mkdir(parents=True, exist_ok=True)
    (wanted.out / "test-gpu.json").write_text(
        json.dumps(where | {"kit": VERSION, "counts": counts, "checks": outcomes}, indent=1) + "\n"
    )
    if not wanted.dry:
        write_status(status_table(where, said))
    return 1 if counts["FAILED"] else 0


@contextmanager
def _output(file: Any) -> Any:
    """What runs print goes to `file`."""
    kept = sys.stdout
    sys.stdout = file
    try:
        yield
    finally:
        sys.stdout = kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
