"""Command lines drawn from the schema: right, at the ends of a range, and wrong in every way that comes to mind.

`commands` draws one, `outcome` says what became of it and raises AssertionError when that is not what a person may see,
`judge_commands` does both many times.
"""

import collections
import contextlib
import functools
import io
import os
import re
import resource
import signal
import sys
import tempfile
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gaplab import cli, launch, worker
from gaplab import config as configs
from gaplab.data import datamodule
from gaplab.data.resident import Resident
from gaplab.errors import DivergenceError, TrainingError, UserError

CONF = configs.PROJECT / "conf"
HANG_S = 20
MEMORY = 12e9  # bytes of address space that a run may ask for
MODEL_MEMORY = 2 * 10**9  # bytes that the machine is said to have
SAMPLES = 200  # a longer split is cut, so that an accepted command takes well under a second
SCHEMAS = {schema.__name__: schema for group in configs.SCHEMAS.values() for schema in group}

# ------------------------------------------------------------------------------------------------ values
NUMBERS = [
    "0", "1", "2", "3", "-1", "-0.0", "0.5", "1.0", "1.5", "1e-8", "1e-320", "1e38", "1e39", "1e308", "-1e308",
    "1e309", "nan", "inf", "-inf", "2147483647", "2147483648", "4294967296", "9223372036854775808", "1000000000000",
    "100000000000000000000000000000", "1_000", "0x10", "1e2", "1000000000", "0.9999999999999999", "1e-45", "9" * 400,
]  # fmt: skip
WORDS = [
    "", "''", "null", "true", "'true'", "yes", "maybe", "None", "???", "'???'", "a b", "'a b'", "été", "数字", "'🙂'",
    "x" * 3000, "9" * 5000, "'" + "y " * 2000 + "'", "a,b", "a=b", "'a=b'", "...", "../..", "a/b", "'a\\nb'", "'a\nb'",
    "a\nb", "'\\0'", "\0", "'\0'", "\udcff", "'\udcff'", "'\x1b[31m'", "'", '"', "{", "}", "[", "]", "[[1]]", "[]",
    "[1,2,3]", "[null]", "[nan]", "[a,'b c']", "{}", "{a: 1}", "{a: {b: [1]}}", "[{a: 1}]", "{0: 1}", "$", "${", "${}",
    "'${'", "${model.bn}", "${.}", "${..}", "${nowhere}", "${model.nowhere}", "${nope:1}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH}", "${seed}", "${name}", "${oc.env:}", "'${seed'", "%", "!!python/object:os.system", "*a", "&a",
    "- a", "#", "a#b", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "str(1)", "int(a)", "float(1)",
    "sort(3,1)", "\t", " ",
]  # fmt: skip
TARGETS = [
    "torch.nn.Identity", "torch.nn.Flatten", "torch.nn.Linear", "torch.nn.functional.relu", "torch", ".", "a..b",
    "os.system", "torch.hub.load", "gaplab.nn.mlp.MLP", "gaplab.nn.cnn.CNN", "gaplab.nn.mlp", "gaplab.nope.X",
    "torch.optim.SGD", "torch.optim.RMSprop", "torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Optimizer",
    "torch.optim.Adagrad", "torch.optim.NAdam", "torchvision.models.ResNet", "torchvision.datasets.MNIST",
    "torchvision.datasets.FakeData", "networks.Own", "torch.nn.LazyLinear", "torch.nn.Module", "torch.nn.Sequential",
    "lightning.pytorch.LightningModule",
]  # fmt: skip
URIS = ["sqlite:///x.db", "http://127.0.0.1:1", "postgresql://u:p@h/d", "file:///x", "sqlite://", "://", "http://", "x"]
PATHS = [
    "~",
    "~nobody_of_that_name/x",
    "a/b",
    ".",
    "",
    "''",
    "'a b'",
    "file",
    "file/x",
    "/dev/null",
    "/proc/x",
    "z" * 300,
    "'q\\0'",
]


def _valid(kind: Any, allowed: Any) -> st.SearchStrategy[str]:
    """Values of a field that lie within its type and range, few and small."""
    if isinstance(allowed, tuple):
        return st.sampled_from(allowed)
    options = typing.get_args(kind) if typing.get_origin(kind) is not list else ()
    if options and typing.get_origin(kind) is not dict:
        return st.one_of([_valid(one, allowed) for one in options])
    if kind is NoneType:
        return st.just("null")
    if kind is bool:
        return st.sampled_from(["true", "false"])
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return st.lists(_valid(inner, allowed), max_size=4).map(lambda words: f"[{','.join(words)}]")
    if kind in (int, float):
        low, high = (allowed.low, allowed.high) if allowed else (0, 10)
        steps = [0, 1, 2, 5] if kind is int else [0, 1e-3, 0.1, 0.5, 0.9]
        near = [low + step for step in steps if low + step <= high]
        return st.sampled_from([str(kind(value)) for value in near])
    if typing.get_origin(kind) is dict:
        return st.sampled_from(["{}", "{a: 1}"])
    return st.sampled_from(["word", "'two words'", "'été/🙂'"])


def _edge(allowed: Any) -> st.SearchStrategy[str]:
    """Numbers at the ends of a range and just beyond."""
    if not isinstance(allowed, configs.Range):
        return st.sampled_from(NUMBERS)
    ends = [end for end in (allowed.low, allowed.high) if abs(end) < 1e300]
    return st.sampled_from([f"{end + step:.17g}" for end in ends for step in (0, -1, 1, -1e-9, 1e-9)])


def _value(name: str, kind: Any, allowed: Any) -> st.SearchStrategy[str]:
    last = name.rpartition(".")[2]
    own = {"_target_": TARGETS, "uri": URIS, "root": PATHS, "outputs": PATHS, "artifacts": PATHS}.get(last)
    numbers = st.sampled_from(NUMBERS) | _edge(allowed)
    wrong = [
        numbers,
        numbers,
        numbers.map(lambda word: f"[{word}]"),
        numbers.map(lambda word: f"'{word}'"),
        st.sampled_from(WORDS),
        st.sampled_from(WORDS),
        st.text(max_size=8),
        st.text(max_size=8).map(lambda text: f"'{text}'"),
    ]
    right = [_valid(kind, allowed)] if own is None else [st.sampled_from(own)]
    return st.one_of(right * len(wrong) + wrong)


# ------------------------------------------------------------------------------------------------ keys
@functools.cache
def _choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def _schema(group: str, choice: str) -> type:
    found = re.search(r"schema@_here_: (\w+)", (CONF / group / f"{choice}.yaml").read_text())
    return SCHEMAS[found[1]] if found else SCHEMAS["Trainer"]


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, type and range of every leaf of a schema; groups are left to their choices."""
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            if item.name not in configs.SCHEMAS:
                yield from _fields(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name], item.metadata.get("allowed")


SMALL = {
    "mlp": [["model.hidden_dims=[]"], ["model.hidden_dims=[4]"], ["model.hidden_dims=[3,5,2]"]],
    "cnn": [["model.widths=[2]", "model.hidden_dims=[]"], ["model.widths=[2,3]", "model.hidden_dims=[4]"],
            ["model.widths=[2,2,2]", "model.hidden_dims=[3,3]"], ["model.widths=[]", "model.hidden_dims=[3]"]],
    "resnet": [["model.depth=8", "model.widths=[2,3,4]"], ["model.depth=18", "model.widths=[2,2,2,2]"],
               ["model.depth=14", "model.widths=[4,3,2]"]],
    "torchvision": [[]],
    "custom": [["model._target_=torch.nn.Flatten"], ["model._target_=torch.nn.Identity"], []],
}  # fmt: skip
ODD = [
    "model=", "model=null", "model=[mlp,cnn]", "model=nope", "+model=cnn", "++model=cnn", "~model", "model@data=cnn",
    "data=../x", "nope=1", "+nope=1", "++nope=1", "~nope", "~model.bn", "~model.bn=true", "~seed", "~trainer",
    "model.=1", ".model=1", "model..bn=1", "=1", "=", "", "-x", "--help", "+", "~", "model.bn", "model.bn.x=1",
    "seed.x=1", "+model.kwargs.a=1", "+model.kwargs.in_features=784", "+model.kwargs={a: 1}", "model.kwargs={a: 1}",
    "+tracking.tags.a=1", "+tracking.tags.a=[1]", "tracking.tags={a: {b: 1}}", "experiment=bn", "experiment=nope",
    "claim=dropout_redundant", "claim=null", "+experiment=bn", "experiment=init/lsuv", "hydra.run.dir=x",
    "hydra.nope=1", "hydra/launcher=nope", "hydra/sweeper=basic", "hydra.job.name=x", "hydra.verbose=true",
    "model={bn: true}", "data={a: 1}", "trainer=5", "seed={a: 1}", "optimizer=[]", "+data.train_kwargs.x=1",
    "data.train_kwargs={train: false}", "data.train_kwargs={}", "data.num_train=null", "+a.b.c=1",
    "model.hidden_dims.0=3", "+model.hidden_dims.5=3", "model.hidden_dims[0]=3", "schema=1", "+schema@x=Adam",
    "defaults=[]", "_self_=1",
]  # fmt: skip
HARSH = [
    "model.hidden_dims=[100000000]", "model.hidden_dims=[1000000000,1000000000]",
    "model.widths=[1000000000,1000000000,1000000000]", "trainer.threads=1024", "data.workers=256", "data.workers=2",
    "data.eval_batch_size=1000000000000", "model.depth=1000000", "model.depth=1202", "model.depth=6000002",
    "data.image_size=1024", "data.crop_padding=1000000", "data.augment=crop_flip", "data.memory_budget_gb=0",
    "data.label_noise=1", "model.init=lsuv", "model.init=orthogonal", "model.dropout=0.99", "model.bn=true",
    "data.channels=1", "data.batch_size=1", "data.train_size=1", "data.valid_size=1", "trainer.precision=64-true",
    "trainer.precision=bf16-mixed", "trainer.chunk_size=1", "trainer.log_activations_every=1", "optimizer.lr=1e38",
    "optimizer.lr=1e30", "model.init_gain=1e30", "optimizer.lr=1e308", "figures=true", "trainer.early_stopping=1",
]  # fmt: skip


@st.composite
def commands(draw: st.DrawFn, pictures: Path) -> list[str]:
    """A small run that is right, and some more words: within their ranges (three times in five), or of any kind."""
    model = draw(st.sampled_from([*["mlp"] * 6, *["cnn"] * 4, *["resnet"] * 4, "torchvision", "custom"]))
    data = draw(st.sampled_from(["mnist"] * 3 + ["image_folder"] * 2))
    groups = {"model": model, "data": data, "trainer": "default", "tracking": draw(st.sampled_from(["none", "mlflow"]))}
    groups |= {group: draw(st.sampled_from(_choices(group))) for group in ("optimizer", "scheduler")}
    words = [f"{group}={choice}" for group, choice in groups.items()]
    words += ["trainer.accelerator=cpu", "trainer.max_epochs=1", "figures=false", *draw(st.sampled_from(SMALL[model]))]
    words += [f"data.batch_size={draw(st.sampled_from([1, 2, 3, 16, 64]))}"]
    if data == "mnist":
        words += [f"data.{name}_size={draw(st.sampled_from([1, 2, 3, 10, 33]))}" for name in ("train", "valid")]
    else:
        words += [f"data.root='{pictures}'", "data.workers=0", f"data.image_size={draw(st.sampled_from([8, 9, 16]))}"]
        words += [f"data.valid_size={draw(st.sampled_from(['1', '0.3', '5']))}"]
    known = list(_fields(configs.Config))
    for group, choice in groups.items():
        known += _fields(_schema(group, choice), f"{group}.")
    right = draw(st.integers(0, 9)) < 6
    for _ in range(draw(st.integers(0, 5) if right else st.integers(1, 3))):
        if draw(st.integers(0, 9)) < 3:
            words.append(draw(st.sampled_from(HARSH if right else ODD)))
            continue
        name, kind, allowed = draw(st.sampled_from(known))
        if right:
            if name.endswith(
                ("_target_", ".root", "kwargs", "allowed_targets", "sweep.resume", "sweep.dry_run", "uri")
            ):
                continue
            words.append(f"{name}={draw(_valid(kind, allowed))}")
            continue
        prefix = draw(st.sampled_from([*[""] * 12, "+", "++", "~", " "]))
        name = draw(st.sampled_from([name] * 15 + [name[:-1], f"{name}x", name.upper()]))
        words.append(f"{prefix}{name}={draw(_value(name, kind, allowed))}")
    return words


# ------------------------------------------------------------------------------------------------ outcomes
@dataclass
class Outcome:
    """`kind` is trained, refused, diverged or failed (a class of the user's own); `line` what was said of it."""

    kind: str
    line: str = ""


def outcome(words: list[str], folder: Path) -> Outcome:
    """Compose a command line and run it in `folder`, with a bound on time and memory.

    Raises AssertionError for what a person should never see: several lines or none, a traceback, an error that names no
    key, or a result that is none.
    """
    own = any(
        word.lstrip("+ ").startswith(("model=custom", "model._target_", "optimizer._target_", "+model.kwargs"))
        for word in words
    )
    config = None
    with _bounded(), contextlib.redirect_stdout(io.StringIO()):
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = configs.from_hydra(compose("train", words), words)
            result = _run(config, folder)
        except UserError as error:
            found = Outcome("refused", cli.explain(error))
        except DivergenceError as error:
            found = Outcome("diverged", cli.explain(error))
        except TrainingError as error:
            found = Outcome("failed", cli.explain(error))
            assert own or "out of memory" in found.line, _log(folder) or found.line
        except Exception as error:
            found = Outcome("refused", cli.explain(error))
            kind = type(error).__name__
            assert config is None, f"{kind} after the checks"
            assert not found.line.startswith(f"{kind}: "), f"no line of its own: {found.line}"
        else:
            assert result.status == "FINISHED"
            assert result.steps >= 1
            return Outcome("trained")
    line = found.line
    assert line.isprintable(), f"not one printable line: {line!r}"
    assert line, "nothing is said"
    assert len(line) < 3000, f"{len(line)} characters: {line[:100]}"
    assert "Traceback" not in line
    if found.kind == "refused":
        assert names_a_key(line, words), f"names no key: {line}"
    return found


def names_a_key(line: str, words: list[str]) -> bool:
    """Whether a line says which word of the command, or which key, it is about."""
    typed = [word.lstrip("+~ ").partition("=")[0] for word in words]
    groups = "|".join([*configs.SCHEMAS, "sweep", "paths", "hydra"])
    return (
        bool(re.search(rf"\b(({groups})[./][\w@]|seed|name|figures|allowed_targets)", line))
        or any(
            (name or "''") in line or (name.partition("@")[2] and f"@{name.partition('@')[2]}: " in line)
            for name in typed
        )
        or "not understood" in line
    )


def _run(config: configs.Config, folder: Path) -> Any:
    """Launch what was accepted: what was written of it is read back, tracking is left out, long runs are cut short."""
    saved = folder / "config.yaml"
    saved.write_text(configs.to_yaml(config), encoding="utf-8")
    again = configs.load(saved)
    data = config.data
    if configs.masked(str(config)) == str(config):
        absolute = replace(data, root=str(configs.folder("data.root", data.root)))
        assert again == replace(config, data=absolute), "read back as another config"
    if isinstance(data, configs.TorchvisionData) and data.num_train is not None:
        train, valid = configs.sizes(data, data.num_train)
        data = replace(data, train_size=min(train, SAMPLES), valid_size=min(valid, SAMPLES))
    trainer = replace(config.trainer, max_epochs=min(config.trainer.max_epochs, 2))
    return launch.launch(replace(config, data=data, trainer=trainer, tracking=configs.Tracking()))


def _log(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("error.log"))


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Little time and memory, and no network; torch's settings are put back."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"not done after {HANG_S} s")

    threads = torch.get_num_threads()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + int(MEMORY), hard))
    try:
        with (
            mock.patch.object(datamodule, "load_dataset", _load),
            mock.patch("urllib.request.urlopen", _offline),
            mock.patch.object(worker, "memory", return_value=MODEL_MEMORY),
        ):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        torch.set_num_threads(threads)


def _offline(*_: Any, **__: Any) -> None:
    raise OSError("no network in tests")


_load_dataset = datamodule.load_dataset


@functools.cache
def _mnist() -> tuple[Resident, Resident, list[str]]:
    train, test, classes = _load_dataset(
        "torchvision.datasets.MNIST", str(configs.PROJECT / "data"), {"train": True}, {"train": False}, ["torchvision"]
    )
    return train, Resident(test.pixels[:SAMPLES], test.labels[:SAMPLES]), classes


def _load(target: str, root: str, train_kwargs: Any, test_kwargs: Any, allowed: list[str]) -> Any:
    """MNIST as it is, but read once and with a short test part; anything else by the real function."""
    usual = (target, root, train_kwargs, test_kwargs)
    if usual == ("torchvision.datasets.MNIST", str(configs.PROJECT / "data"), {"train": True}, {"train": False}):
        return _mnist()
    return _load_dataset(target, root, train_kwargs, test_kwargs, allowed)


def draw_pictures(root: Path) -> Path:
    """24 pictures of three classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(["a", "b", "c"]):
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(60 * label, 60 * label + 80, (12, 10, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def judge_commands(examples: int, folder: Path) -> "collections.Counter[str]":
    """Draw and run that many commands, always the same, each in a folder of its own; what became of them.

    Raises AssertionError for the shortest command at which something happens that should not.
    """
    counts: collections.Counter[str] = collections.Counter()
    pictures = draw_pictures(folder / "pictures")

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(commands(pictures))
    def judge(words: list[str]) -> None:
        with (
            tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place,
            contextlib.chdir(place),  # where a relative path of its own leads
            mock.patch.dict(os.environ, HOME=place),
        ):
            Path("file").write_text("in the way")
            counts[outcome([*words[:5], f"paths.outputs='{place}/outputs'", *words[5:]], Path(place)).kind] += 1

    judge()
    return counts
