"""Every key of a run: its type, default, meaning and range, and the one pass that checks them.

The dataclasses are registered with Hydra's ConfigStore, so that types and misspelled keys are refused while the config
is composed; `check` then refuses values out of range and fields that exclude each other. Nothing heavy is imported.
"""

import ctypes
import hashlib
import json
import math
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from gaplab.errors import UserError
from gaplab.files import check_yaml, plain, read_text
from gaplab.machine import usable_cores
from gaplab.targets import check_target

PROJECT = Path(__file__).resolve().parents[2]
UNSET = "???"  # OmegaConf's mark of a value that a config file must give


@dataclass(frozen=True)
class Range:
    """An interval of numbers; `ends` says which ends belong to it, as in "[)"."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below and abs(value) <= sys.float_info.max  # finite; asking an int that is larger would raise

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'≥' if self.ends[0] == '[' else '>'} {self.low:g}"
        return f"a number in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


def key(default: Any, doc: str, allowed: Range | tuple[str, ...] | None = None) -> Any:
    """A dataclass field: its default, a sentence of what it is (unit included), and the values it may take."""
    metadata = {"doc": doc, "allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


INITIALIZERS = (
    "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal", "normal", "uniform",
    "trunc_normal", "zeros", "lsuv", "default",
)  # fmt: skip
ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid")
RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
QUESTIONS = {
    "overfitting": "Does BatchNorm shrink the overfitting gap?",
    "higher_lr": "Does BatchNorm allow higher learning rates, and so train in fewer steps?",
    "init_robustness": "Does BatchNorm make the result depend less on the initial weights?",
    "dropout_redundant": "Does BatchNorm make dropout useless?",
    "activations": "Does BatchNorm keep activations from becoming too high or too low?",
    "identity": "Do alpha = sqrt(Var) and beta = E make BatchNorm the identity?",
}
CLAIMS = tuple(QUESTIONS)
USUAL_TARGETS = ("gaplab", "torch", "torchvision", "lightning")  # packages that a config may name without more
OWN_TAGS = (
    "arm", "attempt", "batchnorm", "claim", "condition", "config_hash", "data", "diverged", "error", "job", "overrides",
    "params", "resumed_from", "sweep", "trained_together",
)  # fmt: skip
OWN_TAG_PREFIXES = ("compute/", "cpu/", "gaplab.", "git/", "mlflow.", "model/", "nonfinite/", "version/")
PROCESSES_PER_CORE = 4  # more only wait for each other
POSITIVE = Range(1, 10**9)  # more is a slip of the finger, and overflows somewhere
SCALE = Range(0, 1e38, "(]")  # what float32 can hold
COUNT_OR_FRACTION = Range(0, 10**9, "(]")


@dataclass
class Model:
    """A network and its toggles. A class of your own gets those of `in_shape`, `num_classes`, `layers`, `kwargs` and
    the keys below that its constructor names."""

    _target_: str = key(UNSET, "Class of the network, a torch.nn.Module.")
    name: str = key(UNSET, "Short name, used in run names.")
    bn: bool = key(False, "BatchNorm after every hidden linear and convolutional layer.")
    bn_position: str = key(
        "before_activation",
        "Normalize before the activation, as the paper does, or after it.",
        ("before_activation", "after_activation"),
    )
    bn_momentum: float = key(0.1, "Weight of the newest batch in the running statistics.", Range(0, 1, "(]"))
    bn_eps: float = key(1e-5, "Added to the variance under the root.", SCALE)
    dropout: float = key(0.0, "Probability of dropping a unit.", Range(0, 1, "[)"))
    init: str = key(
        "default",
        "Initializer of linear and convolutional weights, whose biases start at 0; default leaves every layer as the "
        "network's constructor made it. Frozen parameters are never changed.",
        INITIALIZERS,
    )
    init_gain: float = key(1.0, "Factor on the initializer's own scale.", SCALE)
    init_std: float = key(0.05, "Standard deviation for init=normal, uniform and trunc_normal.", Range(0, 1e37, "(]"))
    activation: str = key("relu", "Activation function.", ACTIVATIONS)
    kwargs: dict[str, Any] = key({}, "Further constructor arguments for a network of your own.")


@dataclass
class Shipped(Model):
    init: str = key(
        "kaiming_normal",
        "Initializer of linear and convolutional weights, whose biases start at 0; default is torch's own.",
        INITIALIZERS,
    )


@dataclass
class MLP(Shipped):
    hidden_dims: list[int] = key([64, 128, 64], "Units in each hidden layer.", POSITIVE)


@dataclass
class CNN(Shipped):
    widths: list[int] = key([32, 64], "Channels of each stage: 3x3 convolution, then 2x2 max pooling.", POSITIVE)
    hidden_dims: list[int] = key([128], "Units in each hidden dense layer after the convolutions.", POSITIVE)


@dataclass
class ResNet(Shipped):
    depth: int = key(
        20,
        "Layers: 6n+2 (three stages, for CIFAR; the paper's deepest has 1202) or 18 (four stages).",
        Range(8, 1202),
    )
    widths: list[int] | None = key(
        None, "Channels of each stage; null means [16, 32, 64], or [64, 128, 256, 512] at depth 18.", POSITIVE
    )


@dataclass
class TorchvisionResNet(Shipped):
    arch: str = key("resnet18", "torchvision's name of the network.", RESNETS)


@dataclass
class Data:
    name: str = key(UNSET, "Short name, used in run names.")
    root: str = key(UNSET, "Folder that holds the data.")
    batch_size: int = key(128, "Samples per optimizer step (per gradient, with accumulation).", POSITIVE)
    eval_batch_size: int = key(512, "Samples per batch of the honest evaluation; no effect on accuracy.", POSITIVE)
    valid_size: int | float = key(
        0.1,
        "Validation samples held out of the official training part: a count, as an integer, or a fraction below 1.",
        COUNT_OR_FRACTION,
    )
    train_size: int | float | None = key(
        None,
        "Training samples to keep, the smaller inside the larger: a count, as an integer; a fraction below 1 of the "
        "official training part; or null or 1.0 for all that validation leaves.",
        COUNT_OR_FRACTION,
    )
    label_noise: float = key(
        0.0,
        "Share of training labels replaced by another class at random. train/acc and gap/acc count the labels trained "
        "on; train/acc_clean and gap/acc_clean count the labels without noise.",
        Range(0, 1),
    )
    normalize: str = key(
        "standardize",
        "Pixels in [0, 1] as they are, with the training mean subtracted, as standard scores, or 1 above half of the "
        "range and 0 below; per channel.",
        ("none", "center", "standardize", "binary"),
    )
    augment: str = key(
        "none",
        "Random changes of training images: shift by up to crop_padding pixels, mirror left-right, both.",
        ("none", "crop", "flip", "crop_flip"),
    )
    crop_padding: int = key(4, "Largest shift of augment=crop, in pixels.", POSITIVE)

    def __post_init__(self) -> None:
        """One form for each size, so that 500 and 500.0 are one condition."""
        if isinstance(self.train_size, float) and self.train_size == 1:
            self.train_size = None
        for name in ("train_size", "valid_size"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1 and value.is_integer():
                setattr(self, name, int(value))


@dataclass
class TorchvisionData(Data):
    _target_: str = key(UNSET, "Class of the data set, a torch.utils.data.Dataset.")
    root: str = key(
        str(PROJECT / "data"), "Folder that holds the data, in torchvision's layout; what is missing is downloaded."
    )
    train_kwargs: dict[str, Any] = key({}, "Arguments that select its official training part.")
    test_kwargs: dict[str, Any] = key({}, "Arguments that select its official test part.")
    num_train: int | None = key(None, "Size of the official training part, if known beforehand.", POSITIVE)


@dataclass
class ImageFolder(Data):
    root: str = key(UNSET, "Folder that holds one sub-folder a class, or train/, valid/ and test/ above them.")
    image_size: int = key(64, "Pictures are scaled and centre-cropped to this many pixels a side.", Range(8, 1024))
    channels: int = key(3, "3 for colour, 1 for grey.", Range(1, 3))
    skip_broken: bool = key(False, "Leave unreadable pictures out instead of stopping.")
    memory_budget_gb: float = key(4.0, "Decoded pictures above this many GB are streamed from disk.", Range(0))
    workers: int = key(2, "Processes that decode pictures, at most one a core.", Range(0, 256))


@dataclass
class Optimizer:
    _target_: str = key(UNSET, "Class of the optimizer, a torch.optim.Optimizer.")
    lr: float = key(1e-3, "Learning rate.", SCALE)
    weight_decay: float = key(0.0, "Weight decay.", Range(0, 1e38))
    decay_norm_and_bias: bool = key(False, "Apply weight decay to BatchNorm parameters and biases too.")


@dataclass
class Adam(Optimizer):
    betas: list[float] = key([0.9, 0.999], "Decay of the two running averages of the gradient.", Range(0, 1, "[)"))
    eps: float = key(1e-8, "Added to the denominator.", SCALE)


@dataclass
class SGD(Optimizer):
    lr: float = key(0.1, "Learning rate.", SCALE)
    momentum: float = key(0.9, "Momentum.", Range(0, 1, "[)"))
    nesterov: bool = key(False, "Nesterov momentum.")


@dataclass
class Scheduler:
    name: str = key("constant", "Course of the learning rate.", ("constant", "cosine", "one_cycle", "step"))


@dataclass
class Cosine(Scheduler):
    min_lr: float = key(0.0, "Learning rate at the end.", Range(0, 1e38))


@dataclass
class OneCycle(Scheduler):
    pct_start: float = key(0.3, "Share of the steps in which the rate rises to optimizer.lr.", Range(0, 1, "()"))


@dataclass
class Step(Scheduler):
    step_size: int = key(10, "Epochs between two drops.", POSITIVE)
    gamma: float = key(0.1, "Factor of each drop.", Range(0, 1, "(]"))


@dataclass
class Trainer:
    max_epochs: int = key(10, "Epochs to train.", POSITIVE)
    accelerator: str = key("auto", "Where to compute.", ("auto", "cpu", "cuda", "gpu"))
    devices: int = key(
        1, "Devices of this machine to train on: GPUs, or on the CPU processes. They share every mini-batch.", POSITIVE
    )
    num_nodes: int = key(1, "Machines that train together, each with as many devices.", POSITIVE)
    node_rank: int = key(0, "Which of the machines this is; the first one, 0, keeps the run.", Range(0, 1e6))
    rdzv_endpoint: str | None = key(None, "host:port of the first machine, where the others find it.")
    join_timeout_s: float = key(300.0, "Seconds that machines wait at the start for those missing.", Range(1, 1e6))
    rank_timeout_s: float = key(
        20.0, "Seconds that devices wait for one that does not answer, until the run fails.", Range(1, 1e6)
    )
    sync_batchnorm: Any = key(
        "auto",
        "BatchNorm over the whole mini-batch of all devices, true, or over each one's part of it; auto: true on GPUs.",
    )
    precision: str = key("32-true", "Number format, in Lightning's terms.", ("32-true", "bf16-mixed", "64-true"))
    deterministic: bool = key(False, "Refuse operations whose result varies from run to run (CUDA).")
    early_stopping: int | None = key(
        None, "Stop after this many epochs without a better valid/acc; null never.", POSITIVE
    )
    gradient_clip_val: float | None = key(None, "Largest L2 norm of the gradient; null for no limit.", SCALE)
    accumulate_grad_batches: int = key(1, "Mini-batches whose gradients make one optimizer step.", POSITIVE)
    threads: int | None = key(
        None,
        "CPU threads of an operation; they and the kind of CPU decide the last bits. null: torch's own, in a sweep 1.",
        Range(1, 1024),
    )
    chunk_size: int = key(50, "Mini-batches per call of Lightning's; no effect on the result.", POSITIVE)
    compile: bool = key(
        False, "Run each optimizer step as one CUDA graph: one GPU, no accumulation, no look at activations."
    )
    profile: bool = key(False, "Print where the time of the run went.")
    log_activations_every: int | None = key(
        None,
        "Optimizer steps between two looks at the activations: 15th, 50th, 85th percentile of each activation "
        "function's input, and dead units; null never.",
        POSITIVE,
    )


@dataclass
class Tracking:
    """`tracking=none`: the run folder alone."""


@dataclass
class MLflow(Tracking):
    uri: str = key(UNSET, "Tracking store: sqlite:///<absolute path>, http(s)://…, postgresql://…")
    artifacts: str | None = key(
        None, "Where a new experiment keeps its artifacts; null for beside a SQLite store, or the server's choice."
    )
    experiment: str = key("gaplab", "MLflow experiment.")
    tags: dict[str, str] = key({}, "Further tags of the run.")
    log_model: bool | None = key(
        None, "Log the best epoch's network as an MLflow model; null: of single runs, not of the jobs of a sweep."
    )
    register: bool = key(
        False, "Make the model a version in MLflow's registry, and its champion if it passes the gate; single runs."
    )
    registered_model: str = key("gaplab", "Name of the model in the registry.")


@dataclass
class Gate:
    """What a model must show, beside the champion on the same samples, to become champion itself."""

    split: str = key("test", "Samples to compare them on, of the candidate's data.", ("valid", "test"))
    max_acc_loss: float = key(
        0.005,
        "Largest loss of accuracy that counts as none: the lower end of the paired difference's 95 % interval must be "
        "above minus this.",
        Range(0, 1),
    )
    max_gap_increase: float = key(
        0.01,
        "Largest increase of the gap that counts as none: the upper end of the difference's 95 % interval must be "
        "below this.",
        Range(0, 1),
    )


@dataclass
class Sweep:
    """What is said of a multirun (`-m`) as a whole."""

    claim: str | None = key(None, "Claim whose rule turns the sweep's numbers into a verdict.", CLAIMS)
    dry_run: bool = key(False, "Print the jobs and the estimated time, run nothing.")
    resume: str | None = key(
        None,
        "Folder of a sweep to go on with, or latest, the one that began last: finished jobs are skipped, the rest run.",
    )
    allow_divergence: bool = key(
        False, "A loss that is not finite is a result of the sweep, not a failure: it ends with status 0."
    )


@dataclass
class Metrics:
    train_every: int = key(
        1,
        "Epochs between two honest evaluations of the train split, the costly half; the last and the best epoch "
        "have one in any case. The valid split has one after every epoch.",
        POSITIVE,
    )


@dataclass
class Checkpoint:
    every_s: float = key(
        300.0,
        "Seconds between two checkpoints within an epoch; there is one after every epoch too.",
        Range(0, ends="()"),
    )


@dataclass
class Paths:
    outputs: str = key(str(PROJECT / "outputs"), "Folder for runs, sweeps and the tracking store.")


@dataclass
class Config:
    """One run, fully said."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    trainer: Trainer = field(default_factory=Trainer)
    tracking: Tracking = field(default_factory=Tracking)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    gate: Gate = field(default_factory=Gate)
    sweep: Sweep = field(default_factory=Sweep)
    paths: Paths = field(default_factory=Paths)
    seed: int = key(
        0, "Seed of the split, the data order, the initial weights and every other draw.", Range(0, 2**32 - 1)
    )
    name: str | None = key(None, "Name of the run; null to say what it is.")
    resume: str | None = key(
        None, "Folder of a run to go on with exactly where it was, or latest, the one outside sweeps that began last."
    )
    figures: bool = key(True, "Draw the run's figures; a sweep of short runs is faster without.")
    allowed_targets: list[str] = key(list(USUAL_TARGETS), "Packages that _target_ may name.")


@dataclass
class Report:
    """What `src/report.py` reports on, and how."""

    sweep: Any = key("latest", "Sweep: latest, a folder, its name, or the id of its run in MLflow; or a list of them.")
    runs: Any = key([], "Instead of a sweep, a hand-picked list of run folders or MLflow run ids.")
    metrics: list[str] = key(["gap/acc", "valid/acc"], "Metrics to compare, by their MLflow names.")
    margin: float = key(
        0.002,
        "Largest difference that counts as none, in the metric's unit: 0.002 is 0.2 pp of an accuracy, 0.002 nats of a "
        "loss.",
        Range(0, 1, "()"),
    )
    claim: str | None = key(None, "Claim to judge; null for the one that the sweep was run for.", CLAIMS)
    output: str | None = key(None, "Folder for the report; null for report/ in the sweep's.")
    tracking: Tracking = field(default_factory=Tracking)
    paths: Paths = field(default_factory=Paths)


@dataclass
class Named:
    """A trained network, named by a person; what a command about one is told."""

    run: str | None = key(
        None,
        "A run: latest (that began last, jobs of sweeps included), a folder, its name, or its id in MLflow; null with "
        "no model either means latest.",
    )
    model_uri: str | None = key(
        None, "Instead of a run, a model: models:/<name>@<alias> or models:/<name>/<version>; typed as model=…."
    )
    tracking: Tracking = field(default_factory=Tracking)
    paths: Paths = field(default_factory=Paths)
    allowed_targets: list[str] = key(list(USUAL_TARGETS), "Packages that _target_ may name.")


@dataclass
class Evaluate(Named):
    """What `src/evaluate.py` evaluates, and on what."""

    against: str | None = key(None, "Another run or model, to be compared on the same samples.")
    split: str = key(
        "test", "Samples to evaluate on; of data without a test part, test is an error.", ("train", "valid", "test")
    )
    data: Any = key(None, "Other data than those of the run: data=<choice> and its keys.")
    output: str | None = key(None, "Folder for the evaluation; null for one in the run's.")


@dataclass
class Predict(Named):
    """What `src/predict.py` names, and how it says it."""

    images: Any = key(None, "Pictures: a file, a folder, a pattern like photos/*.png, a list of these, or - for stdin.")
    top_k: int = key(3, "Most probable classes to name.", POSITIVE)
    format: str = key("table", "How to say it.", ("table", "json", "csv"))
    output: str | None = key(None, "File to write to; null for stdout.")
    batch_size: int = key(256, "Pictures at once; no effect on the result.", POSITIVE)


@dataclass
class Promote:
    """What `src/promote.py` does to the registry."""

    run: str | None = key(
        None,
        "A run whose model to register and judge: latest, a folder, its name, or its id in MLflow, as in evaluate.",
    )
    version: int | None = key(None, "A version in the registry to judge once more.", POSITIVE)
    force: bool = key(False, "Make it champion whatever the gate says.")
    rollback: bool = key(False, "Give the title back to the champion before this one.")
    gate: Gate = field(default_factory=Gate)
    tracking: Tracking = field(default_factory=Tracking)
    paths: Paths = field(default_factory=Paths)
    allowed_targets: list[str] = key(list(USUAL_TARGETS), "Packages that _target_ may name.")


@dataclass
class Serve:
    """What `src/serve.py` serves, and where."""

    model_uri: str = key(
        "models:/gaplab@champion",
        "A model: models:/<name>@<alias>, models:/<name>/<version> or models:/<model id>; typed as model=….",
    )
    port: int = key(5001, "Port on this machine.", Range(1, 65535))
    tracking: Tracking = field(default_factory=Tracking)
    paths: Paths = field(default_factory=Paths)


@dataclass
class Sync:
    """What `src/sync.py` sends to MLflow."""

    paths: Paths = field(default_factory=Paths)
    allowed_targets: list[str] = key(list(USUAL_TARGETS), "Packages that the config of a model may name as _target_.")


@dataclass
class Ui:
    """What `src/ui.py` serves, and where."""

    port: int = key(5000, "Port of 127.0.0.1 to listen on.", Range(1, 65535))
    paths: Paths = field(default_factory=Paths)


SCHEMAS: dict[str, tuple[type, ...]] = {
    "model": (Model, MLP, CNN, ResNet, TorchvisionResNet),
    "data": (TorchvisionData, ImageFolder),
    "optimizer": (Optimizer, Adam, SGD),
    "scheduler": (Scheduler, Cosine, OneCycle, Step),
    "trainer": (Trainer,),
    "tracking": (Tracking, MLflow),
}


def slug(text: str) -> str:
    """`text` as a file name that needs no quoting in a shell, at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_")[:80]


COMMANDS: dict[str, type] = {
    "train": Config,
    "report": Report,
    "evaluate": Evaluate,
    "predict": Predict,
    "promote": Promote,
    "serve": Serve,
    "sync": Sync,
    "ui": Ui,
}


def kinds(schema: type) -> dict[str, str]:
    """{key: "bool", "text", "texts" where a list is allowed too, or "dict of texts"}, of the switches and free texts of
    a config: names, paths, addresses. Keys with a fixed set of values, numbers and lists of these are left out."""
    found: dict[str, str] = {}
    for item in fields(schema):
        nested = SCHEMAS.get(item.name) or (
            (item.type,) if isinstance(item.type, type) and is_dataclass(item.type) else ()
        )
        for one in nested:
            found |= {f"{item.name}.{name}": kind for name, kind in kinds(one).items()}
        if item.type in (bool, bool | None):
            found[item.name] = "bool"
        elif item.type in (str, str | None) and item.metadata["allowed"] is None:
            found[item.name] = "text"
        elif item.type is Any and item.name in ("images", "runs", "sweep"):
            found[item.name] = "texts"
        elif item.type == dict[str, str]:
            found[item.name] = "dict of texts"
    return found


def register() -> None:
    """Make the schemas known to Hydra: one for each command, and `schema: <class name>` for the files of each group."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name="schema" if name == "train" else f"{name}_schema", node=schema)
    for classes in SCHEMAS.values():
        for schema in classes:
            store.store(group="schema", name=schema.__name__, node=schema)


def from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Config:
    """The typed, checked config of a composed one. Raises UserError.

    `typed` are the overrides that a person typed: packages beyond the usual ones are allowed by these alone, never by
    the config file that names the class.
    """
    config = _to_object(cfg)
    assert isinstance(config, Config)
    check_trust(config, typed)
    check(config)
    return config


def report_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Report:
    """The typed, checked config of a report. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Report)
    _check_ranges(config)
    _check_texts(config)
    folder("paths.outputs", config.paths.outputs)
    if config.output is not None:
        folder("output", config.output)
    return config


def sync_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Sync:
    """The typed, checked config of a sync; `typed` as in `from_hydra`. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Sync)
    check_trust(config, typed)
    return config


def ui_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Ui:
    """The typed, checked config of MLflow's pages. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Ui)
    _check_ranges(config)
    return config


def evaluate_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Evaluate:
    """The typed, checked config of an evaluation; `typed` as in `from_hydra`. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Evaluate)
    _check_command(config, typed)
    if config.data is not None:
        folder("data.root", config.data.root)
        if isinstance(config.data, TorchvisionData):
            check_target(config.data._target_, config.allowed_targets, "data._target_")
    return config


def predict_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Predict:
    """The typed, checked config of predictions; `typed` as in `from_hydra`. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Predict)
    _check_command(config, typed)
    return config


def promote_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Promote:
    """The typed, checked config of a promotion; `typed` as in `from_hydra`. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Promote)
    _check_command(config, typed)
    if not isinstance(config.tracking, MLflow):
        raise UserError("tracking=none: the registry is in MLflow")
    said = [name for name in ("run", "version", "rollback") if getattr(config, name)]
    if len(said) > 1:
        raise UserError(f"{said[0]} and {said[1]}: one at a time")
    if config.force and not said:
        raise UserError("force=true: say whose, with run=… or version=…")
    return config


def serve_from_hydra(cfg: Any, typed: Iterable[str] = ()) -> Serve:
    """The typed, checked config of a server. Raises UserError."""
    config = _to_object(cfg)
    assert isinstance(config, Serve)
    _check_command(config, [])
    if not isinstance(config.tracking, MLflow):
        raise UserError("tracking=none: the registry is in MLflow")
    return config


def _check_command(config: Any, typed: Iterable[str]) -> None:
    if hasattr(config, "allowed_targets"):
        check_trust(config, typed)
    _check_ranges(config)
    _check_texts(config)
    folder("paths.outputs", config.paths.outputs)
    _check_tracking(config.tracking)
    if getattr(config, "run", None) is not None and getattr(config, "model_uri", None) is not None:
        raise UserError("run and model: one of them")


def listed(value: Any) -> list[str]:
    """One or several, as typed."""
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] if value is not None else []


def _to_object(cfg: Any) -> Any:
    from omegaconf import OmegaConf, flag_override
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

    try:
        with flag_override(cfg, "readonly", False):
            cfg.paths.outputs = str(folder("paths.outputs", cfg.paths.outputs))  # other addresses are made from it
        config = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: a value is needed; give {error.full_key}=…") from None
    except InterpolationResolutionError as error:  # does not always say where
        for name, value in flatten(OmegaConf.to_container(cfg, resolve=False)).items():
            try:
                OmegaConf.to_container(OmegaConf.create([OmegaConf.select(cfg, name)]), resolve=True)
            except InterpolationResolutionError:
                raise UserError(f"{name}={value}: {str(error).partition(chr(10))[0]}") from None
        raise
    _refuse_additions(cfg, config)
    return config


def check_trust(config: Config | Evaluate | Predict | Promote | Sync, typed: Iterable[str]) -> None:
    """Raises UserError unless a person typed the packages that `config` allows beyond the usual ones."""
    if config.allowed_targets != list(USUAL_TARGETS) and not any(one.startswith("allowed_targets=") for one in typed):
        names = ",".join(config.allowed_targets)
        raise UserError(
            f"allowed_targets=[{names}]: said by a file; if you trust it, say so yourself, on the command line"
        )


def _refuse_additions(cfg: Any, config: Any, prefix: str = "") -> None:
    """`+key=value` adds past a schema, and would be ignored without a word."""
    known = [item.name for item in fields(config)]
    for name in cfg:
        if name not in known:
            raise UserError(f"{prefix}{name}: no such key; {did_you_mean(name, known)}known: {', '.join(known)}")
        if is_dataclass(value := getattr(config, name)):
            _refuse_additions(cfg[name], value, f"{prefix}{name}.")


def masked(text: str) -> str:
    """`text` without the user names, passwords and tokens of addresses in it."""
    text = re.sub(r"://\S*@", "://***@", text)
    return re.sub(r"([?&][a-z_]*(?:password|passwd|token|secret|key)=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


def to_yaml(config: Config) -> str:
    """The resolved config as a file that Hydra can run again, schemas included, from wherever it is read."""
    from omegaconf import OmegaConf

    root = folder("data.root", config.data.root)
    config = replace(config, data=replace(config.data, root=str(root)))
    schemas = [f"- schema@{group}: {type(getattr(config, group)).__name__}" for group in SCHEMAS]
    defaults = "\n".join(
        ["defaults:", "- schema", *schemas, "- hydra/settings", "- _self_", "- override hydra/sweeper: gaplab"]
    )
    return f"{defaults}\n\n{masked(OmegaConf.to_yaml(OmegaConf.structured(config)))}"


SEED = re.compile(r"^seed: (0|[1-9][0-9]{0,19})$", re.MULTILINE)
MOST_KNOWN = 256
_known: dict[str, Config] = {}


def load(path: Path) -> Config:
    """The config that `to_yaml` wrote into a file, whatever packages it allows: `check_trust` is the caller's. Raises
    UserError."""
    text = read_text(path)
    seeds = SEED.findall(text)
    if len(seeds) != 1:
        return _parse(text, str(path))
    others = SEED.sub("seed: 0", text)
    if others not in _known:  # of one sweep, replicates differ in the seed alone, and to parse takes 0.04 s
        if len(_known) == MOST_KNOWN:
            _known.clear()
        _known[others] = _parse(others, str(path))
    config = replace(_known[others], seed=int(seeds[0]))
    _checked(config, str(path))
    return config


def loads(text: str, origin: str, typed: Iterable[str] = ()) -> Config:
    """The config that `to_yaml` wrote, come back from a tracking server: somebody else's. Raises UserError.

    `origin` says where it comes from; `typed` are the overrides that a person typed, as in `from_hydra`.
    """
    config = _parse(text, origin)
    try:
        check_trust(config, typed)
    except UserError as error:
        raise UserError(f"{plain(origin)}: {error}") from None
    return config


def _parse(text: str, origin: str) -> Config:
    from omegaconf import OmegaConf

    check_yaml(text, origin, resolved=True)
    known = {schema.__name__: schema for group in SCHEMAS.values() for schema in group}
    try:
        raw: Any = OmegaConf.create(text)
        named = [pair for entry in raw.pop("defaults") if not isinstance(entry, str) for pair in entry.items()]
        schemas = {name.removeprefix("schema@"): known[one] for name, one in named if name.startswith("schema@")}
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), schemas, raw))
    except Exception as error:  # it may hold anything, and OmegaConf's errors are of many kinds
        raise UserError(f"{plain(origin)}: not a config that gaplab wrote ({type(error).__name__})") from None
    assert isinstance(config, Config)
    _checked(config, origin)
    return config


def _checked(config: Config, origin: str) -> None:
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{plain(origin)}: {error}") from None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.bn": True, …}`: the leaves of a (nested) dataclass instance or dict, lists kept whole."""
    pairs = asdict(config).items() if is_dataclass(config) and not isinstance(config, type) else config.items()
    flat: dict[str, Any] = {}
    for name, value in pairs:
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def decides(name: str) -> bool:
    """Whether a key decides the numbers: not where things lie, nor how the run is called, drawn or tracked."""
    where = ("tracking.", "metrics.", "checkpoint.", "gate.", "sweep.", "paths.", "data.root", "allowed_targets")
    machines = ("node_rank", "rdzv_endpoint", "join_timeout_s", "rank_timeout_s")
    others = ("name", "figures", "resume", "trainer.profile", *(f"trainer.{one}" for one in machines))
    return not name.startswith(where) and name not in others


def _said(config: Config) -> dict[str, Any]:
    """What decides the numbers; of a folder of pictures, that is the folder."""
    said = {name: value for name, value in flatten(config).items() if decides(name)}
    return said | (
        {"data.root": str(folder("data.root", config.data.root))} if isinstance(config.data, ImageFolder) else {}
    )


def config_hash(config: Config) -> str:
    return _digest(_said(config))


def condition(config: Config) -> str:
    """Hash of all that the config says except its seed: equal for the replicates of one condition."""
    return _digest({name: value for name, value in _said(config).items() if name != "seed"})


def is_run_id(name: str) -> bool:
    """Whether `name` is an id that MLflow gives to runs."""
    return len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)


def registers(config: Config) -> bool:
    """Whether the model of a run goes into the registry."""
    return isinstance(config.tracking, MLflow) and config.tracking.register


def run_name(config: Config) -> str:
    """What the run is, for people: `mlp bn dropout=0.5 orthogonal s0`."""
    if config.name:
        return plain(config.name)
    model, parts = config.model, [config.model.name]
    if config.data.name != "mnist":
        parts.append(config.data.name)
    if model.bn:
        parts.append("bn" if model.bn_position == "before_activation" else "bn-after")
    if model.dropout:
        parts.append(f"dropout={model.dropout:g}")
    if model.init != type(model).init:
        parts.append(model.init if model.init_std == Model.init_std else f"{model.init}={model.init_std:g}")
    return " ".join([*parts, f"s{config.seed}"])


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def describe(config: Any) -> Iterator[str]:
    """A line for each key: its value, what it means, and what it may be."""
    for name, value, metadata in _walk(config):
        allowed = metadata.get("allowed")
        limits = (
            f" One of {', '.join(allowed)}."
            if isinstance(allowed, tuple)
            else f" Allowed: {allowed}."
            if allowed
            else ""
        )
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        yield f"{name}={shown}\n      {metadata['doc']}{limits}"


def _check_ranges(config: Any) -> None:
    for name, value, metadata in _walk(config):
        allowed = metadata.get("allowed")
        if isinstance(value, list) and any(isinstance(one, list | dict) for one in value):
            raise UserError(f"{name}={value}: must be a list of single values")  # OmegaConf lets it pass
        if allowed is None or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if one not in allowed:
                if isinstance(allowed, Range):
                    raise UserError(f"{name}={one}: must be {allowed}")
                raise UserError(f"{name}={one}: {did_you_mean(one, allowed)}choose one of {', '.join(allowed)}")


def _check_texts(config: Any) -> None:
    """Refuse texts that could not be written into config.yaml and read back. Raises UserError."""
    for name, value in flatten(config).items():
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{name}={value}: ${{ is read as a reference to another key, and cannot be part of a value")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{name}={value}: not UTF-8 text")


def folder(name: str, value: str) -> Path:
    """The folder that a key names, whether it is there or not. Raises UserError for what cannot name one."""
    if not value.strip():
        raise UserError(f"{name}='{value}': must be the path of a folder")
    try:
        path = Path(value).expanduser().absolute()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, ~ of an unknown user
        raise UserError(f"{name}={value}: cannot be a folder ({getattr(error, 'strerror', None) or error})") from None
    return path


def elsewhere(outputs: Path) -> list[str]:
    """The override with which a command looks into `outputs`; none where these are the usual ones."""
    return [] if outputs == PROJECT / "outputs" else [f"paths.outputs={outputs}"]


def check(config: Config) -> None:
    """Refuse values out of range and fields that exclude each other. Raises UserError with one line."""
    _check_ranges(config)
    _check_texts(config)
    model, data, trainer = config.model, config.data, config.trainer
    folder("paths.outputs", config.paths.outputs)
    folder("data.root", data.root)
    for name in ("train_size", "valid_size"):
        if (size := getattr(data, name)) is not None:
            count(name, size, 10**9)  # how many there are is not known yet
    check_target(model._target_, config.allowed_targets, "model._target_")
    check_target(config.optimizer._target_, config.allowed_targets, "optimizer._target_")
    if isinstance(data, TorchvisionData):
        check_target(data._target_, config.allowed_targets, "data._target_")
        if data.num_train is not None:
            sizes(data, data.num_train)
    if isinstance(data, ImageFolder) and data.channels == 2:
        raise UserError("data.channels=2: must be 1 (grey) or 3 (colour)")
    if isinstance(model, ResNet):
        if model.depth != 18 and model.depth % 6 != 2:
            raise UserError(f"model.depth={model.depth}: must be 18 or 6n+2 (8, 14, 20, 26, 32, 44, 56, 110 …)")
        stages = 4 if model.depth == 18 else 3
        if model.widths is not None and len(model.widths) != stages:
            raise UserError(
                f"model.widths={model.widths}: depth {model.depth} has {stages} stages, give {stages} numbers"
            )
    if isinstance(config.optimizer, Adam) and len(config.optimizer.betas) != 2:
        raise UserError(f"optimizer.betas={config.optimizer.betas}: must be two numbers")
    if isinstance(config.optimizer, SGD) and config.optimizer.nesterov and config.optimizer.momentum == 0:
        raise UserError("optimizer.nesterov=true: needs optimizer.momentum above 0")
    if model.bn and data.batch_size == 1:
        raise UserError("data.batch_size=1: BatchNorm (model.bn=true) needs at least 2 samples in a batch")
    _check_devices(trainer, data, model.bn)
    if trainer.compile:
        _check_compile(trainer)
    _check_tracking(config.tracking)
    if not config.allowed_targets:
        raise UserError("allowed_targets=[]: nothing could be built")


def _check_tracking(tracking: Tracking) -> None:
    if not isinstance(tracking, MLflow):
        return
    scheme = tracking.uri.partition("://")[0].partition("+")[0]
    known = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
    if scheme not in known or "://" not in tracking.uri:
        begins = ", ".join(f"{one}://" for one in known)
        raise UserError(f"tracking.uri={masked(tracking.uri)}: must begin with one of {begins}")
    if not re.fullmatch(r"[^/:@\s][^/:@\n]*", tracking.registered_model):
        raise UserError(f"tracking.registered_model={tracking.registered_model}: a name without / : and @")
    if not 1 <= len(tracking.experiment.strip()) <= 500:
        raise UserError(f"tracking.experiment={tracking.experiment[:50]}: a name of 1 to 500 characters")
    for name, value in tracking.tags.items():
        if name in OWN_TAGS or name.startswith(OWN_TAG_PREFIXES):
            raise UserError(f"tracking.tags.{name}: gaplab sets this tag itself; choose another name")
        is_path = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
        if not re.fullmatch(r"[\w.\-: /]{1,250}", name) or not is_path:
            raise UserError(
                f"tracking.tags.{name}: MLflow takes no such name; use at most 250 letters, digits, spaces and _-.:/"
            )
        if len(value) > 8000:
            raise UserError(f"tracking.tags.{name}: {len(value)} characters; MLflow takes at most 8000")


def _check_compile(trainer: Trainer) -> None:
    if trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not cuda_devices()):
        raise UserError("trainer.compile=true: needs a GPU; on the CPU there are no graphs to run")
    if world_size(trainer) > 1:
        raise UserError("trainer.compile=true: for one device alone; set trainer.devices=1 trainer.num_nodes=1")
    for name, alone in (("accumulate_grad_batches", 1), ("log_activations_every", None)):
        if (value := getattr(trainer, name)) != alone:
            raise UserError(f"trainer.{name}={value}: not with trainer.compile=true")


def count(name: str, value: int | float, available: int) -> int:
    """Samples that a size stands for: an integer is a count, a float a fraction of `available`. Raises UserError."""
    if isinstance(value, float) and value >= 1:
        raise UserError(f"data.{name}={value}: must be a count, as an integer, or a fraction below 1")
    found = value if isinstance(value, int) else round(value * available)
    if found < 1:
        raise UserError(f"data.{name}={value:g}: less than one of {available} samples")
    return found


def sizes(data: Data, available: int) -> tuple[int, int]:
    """Samples of the train and the valid split, out of `available` in the official training part. Raises UserError."""
    valid = count("valid_size", data.valid_size, available)
    if valid >= available:
        raise UserError(
            f"data.valid_size={data.valid_size:g}: must be below {available}, the size of {data.name}'s training part"
        )
    if data.train_size is None:
        return available - valid, valid
    train = count("train_size", data.train_size, available)
    if train + valid > available:
        raise UserError(
            f"data.train_size={data.train_size:g}: {available - valid} samples remain beside {valid} for validation; "
            "null takes them all"
        )
    return train, valid


def cuda_devices() -> int:
    """CUDA devices that the driver offers this process, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _check_devices(trainer: Trainer, data: Data, bn: bool) -> None:
    cuda = cuda_devices() if trainer.accelerator in ("auto", "cuda", "gpu") else 0
    if trainer.accelerator in ("cuda", "gpu") and cuda == 0:
        raise UserError(f"trainer.accelerator={trainer.accelerator}: no CUDA device here; use auto or cpu")
    most = cuda or PROCESSES_PER_CORE * usable_cores()
    if trainer.devices > most:
        kind = "CUDA device" if cuda else f"processes, {PROCESSES_PER_CORE} a core,"
        here = f"there is 1 {kind} here" if cuda == 1 else f"{most} {kind}{'s' * bool(cuda)} are the most here"
        raise UserError(f"trainer.devices={trainer.devices}: {here}")
    if not (isinstance(trainer.sync_batchnorm, bool) or trainer.sync_batchnorm == "auto"):  # 1 is not True here
        raise UserError(f"trainer.sync_batchnorm={trainer.sync_batchnorm}: must be auto, true or false")
    if trainer.sync_batchnorm is True and not cuda:
        raise UserError(
            "trainer.sync_batchnorm=true: needs GPUs; on the CPU each device takes its part of the batch, and running "
            "statistics are averaged; use auto"
        )
    world = world_size(trainer)
    if data.batch_size % world:
        near = max(1, round(data.batch_size / world)) * world
        raise UserError(f"data.batch_size={data.batch_size}: must divide among {world} devices; {near} would")
    if bn and data.batch_size < 2 * world:
        raise UserError(f"data.batch_size={data.batch_size}: BatchNorm needs 2 samples on each of {world} devices")
    _check_nodes(trainer)


def _check_nodes(trainer: Trainer) -> None:
    if trainer.node_rank >= trainer.num_nodes:
        raise UserError(
            f"trainer.node_rank={trainer.node_rank}: must be below trainer.num_nodes={trainer.num_nodes}; the first "
            "machine is 0"
        )
    if trainer.num_nodes == 1:
        return
    host, _, port = (trainer.rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"trainer.rdzv_endpoint={trainer.rdzv_endpoint or 'null'}: with trainer.num_nodes={trainer.num_nodes} it "
            "must be host:port of the first machine"
        )


def world_size(trainer: Trainer) -> int:
    """Devices that train together, on all machines."""
    return trainer.devices * trainer.num_nodes


def did_you_mean(word: str, known: Any) -> str:
    """`did you mean "bn"? `, or nothing when no known word is near."""
    import difflib

    near = difflib.get_close_matches(str(word), [str(one) for one in known], n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"? ' if near else ""
