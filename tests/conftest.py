import contextlib
import copy
import ctypes
import gc
import gzip
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser

from gaplab import cli, launch, worker
from gaplab import config as configs
from gaplab.tracking.journal import journal_of, read_receipt, write_receipt

THREADS = int(os.environ.get("GAPLAB_TEST_THREADS", "1"))  # of one operation; tests/portable.py tries 2

configs.register()
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)  # of the processes that tests start
worker._keep_freed_memory = lambda: None  # a run's memory goes back; hundreds of tests share a process
ctypes.CDLL(None).mallopt(worker.M_MMAP_THRESHOLD, 2**20)  # at once; the C library would keep ever larger blocks
OPENMP = ctypes.CDLL(next(Path(torch.__file__).parent.glob("lib/libgomp*")))
os.register_at_fork(before=lambda: OPENMP.omp_pause_resource_all(2))  # a fork would wait for threads that it lacks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to Ctrl-C


HAVE_DIGITS = "GAPLAB_TEST_DIGITS" in os.environ  # from the process that started this one


def some_digits() -> Path:
    """A folder with the first 4 000 training and 2 000 test pictures of MNIST: whole runs in a tenth of the memory."""
    if HAVE_DIGITS:
        return Path(os.environ["GAPLAB_TEST_DIGITS"])
    root = Path(tempfile.mkdtemp(prefix="gaplab-digits-"))
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4000), ("t10k", 2000)):
        for kind, size, head in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):  # bytes of a sample, of the head
            with gzip.open(configs.PROJECT / "data" / "MNIST" / "raw" / f"{part}-{kind}-ubyte.gz") as archive:
                start = archive.read(head)
                content = start[:4] + count.to_bytes(4, "big") + start[8:] + archive.read(count * size)
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    os.environ["GAPLAB_TEST_DIGITS"] = str(root)
    return root


DIGITS = some_digits()
SMALL = [
    f"data.root={DIGITS}",
    "data.num_train=4000",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "data.train_size=1000",
    "data.valid_size=500",
    "tracking=none",
    "figures=false",
]


def small(*overrides: str) -> list[str]:
    """SMALL and `overrides`; without its digits where these choose other data."""
    other = any(word.startswith("data=") for word in overrides)
    return [*(word for word in SMALL if not (other and word in SMALL[:2])), *overrides]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed-shift", type=int, default=0, help="added to the seed of every config that a test composes")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["GAPLAB_TEST_SEED_SHIFT"] = str(config.getoption("seed_shift"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays, which makes the collections after tests cheap


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Frees what a test leaves in cycles, such as a run's data set of 50 MB."""
    before = resident()
    yield
    if resident() > before + 5e6:
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # of files that a test left open
            gc.collect()
        gc.freeze()  # what is left is there to stay
        ctypes.CDLL(None).malloc_trim(0)


def pytest_sessionfinish() -> None:
    if not HAVE_DIGITS:
        shutil.rmtree(DIGITS)
    gc.unfreeze()  # before pytest imports Hypothesis: trio, which selenium brings, is not found among what is frozen


@lru_cache(64)  # 0.3 MB each
def _composed(choices: tuple[str, ...]) -> Any:
    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        return compose("train", list(choices))


def composed(*overrides: str) -> configs.Config:
    """The typed, checked config of a command line, with the seed and the threads that this session tests.

    Hydra composes each choice of groups once, for that takes a tenth of a second; values are entered as it does.
    """
    groups = {path.name for path in (configs.PROJECT / "conf").iterdir() if path.is_dir()}
    choices = tuple(word for word in overrides if re.split("[/=]", word.lstrip("+"))[0] in groups)
    cfg = copy.deepcopy(_composed(choices))
    values = OverridesParser.create().parse_overrides([word for word in overrides if word not in choices])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    config = configs.from_hydra(cfg)
    config.seed += int(os.environ["GAPLAB_TEST_SEED_SHIFT"])
    if config.trainer.threads == 1:
        config.trainer.threads = THREADS
    return config


def train_py(*arguments: str, cwd: Path = configs.PROJECT) -> "subprocess.CompletedProcess[str]":
    """`python src/train.py …` as a person types it."""
    return typed("train", *arguments, cwd=cwd)


def typed(
    name: str, *arguments: str, cwd: Path = configs.PROJECT, stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    """`python src/<name>.py …` as a person types it, in this process: one of its own takes seconds to import torch."""
    script = str(configs.PROJECT / "src" / f"{name}.py")
    out, err, status = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(cli, "atexit", SimpleNamespace(register=lambda _: None))  # it would end this process with it
        patch.setattr(cli, "_jobs", 0)
        for variable in (cli.FULL_ERROR, "MPLBACKEND"):  # set by the command; to be as it was after it
            patch.setenv(variable, "")
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int), status
    return subprocess.CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())


def assert_refused(done: "subprocess.CompletedProcess[str]", said: str) -> None:
    """One line on stderr that says so, status 2, nothing on stdout."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr


def sent(folder: Path, seconds: float = 240) -> None:
    """Wait until MLflow has all of a run, its model included."""
    deadline = time.monotonic() + seconds
    while read_receipt(folder).get("sent") != journal_of(folder).stat().st_size:
        assert time.monotonic() < deadline, (folder / "mlflow.log").read_text()
        time.sleep(0.1)


def put_into_mlflow(folder):
    """The id of a run without metrics, which stands for the one in `folder`."""
    from mlflow import MlflowClient

    home = folder.parents[1]
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("gaplab")  # the default one keeps its files in the current folder
    number = experiment.experiment_id if experiment else client.create_experiment("gaplab", f"{home}/mlruns")
    run_id = client.create_run(number, run_name=folder.name).info.run_id
    write_receipt(folder, {"run_id": run_id})
    return run_id


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Runs a small job in this process; its result.json and its folder."""

    def run(*overrides: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        launch.launch(composed(*small(f"paths.outputs={tmp_path}", *overrides)), folder)
        return json.loads((folder / "result.json").read_text()), folder

    return run


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small runs side by side in one outputs folder, of other seeds, without MLflow."""
    home = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        keys = [*SMALL, f"paths.outputs={home}", "model.bn=true", f"seed={seed}", "trainer.threads=1"]
        launch.launch(composed(*keys), home / "runs" / f"run{seed}")
    return home / "runs" / "run0", home / "runs" / "run1"


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """2 000 training images of MNIST, uint8 (N, 1, 28, 28), and their labels."""
    from torchvision.datasets import MNIST

    mnist = MNIST(DIGITS)
    return mnist.data[:2000].unsqueeze(1), mnist.targets[:2000]


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Two classes of pictures that a network can tell apart, in every mode and several sizes, with odd names."""
    from PIL import Image

    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    modes = ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "1", "LA"]
    for label, name in enumerate(["дубы", "ясень & co"]):
        (root / name).mkdir(parents=True)
        for number in range(40):
            mode = modes[number % len(modes)]
            height, width = rng.integers(9, 60, 2)
            grey = rng.integers(0, 90, (height, width)).astype(np.uint8) + np.uint8(150 * label)
            picture = Image.fromarray(grey)
            if mode == "I;16":
                picture = Image.fromarray(grey.astype(np.uint16) << 8)
            elif mode != "L":
                picture = picture.convert("RGB").convert(mode)
            picture.save(root / name / f"n° {number}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}")
    return root
