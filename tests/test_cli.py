"""Every wrong input ends in one line and status 2; nothing is left behind."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_refused, train_py, typed
from hydra.core.override_parser.overrides_parser import OverridesParser

from gaplab import cli
from gaplab import config as configs
from gaplab.errors import UserError

PARSER = OverridesParser.create()

BAD = {
    "model.bnn=true": 'model.bnn: no such key in model; did you mean "bn"?',
    "model.bn=maybe": "model.bn: Value 'maybe'",
    "model.dropout=1": "model.dropout=1.0: must be a number in [0, 1)",
    "model.init=glorot": "model.init=glorot: choose one of kaiming_normal, kaiming_uniform, xavier_normal",
    "optimizer.lr=-1": "optimizer.lr=-1.0: must be a number in (0, 1e+38]",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a number in (0, 1e+38]",
    "data.batch_size=0": "data.batch_size=0: must be a number in [1, 1e+09]",
    "data.valid_size=70000": "data.valid_size=70000: must be below 60000",
    "trainer.devices=9999": "trainer.devices=9999: ",
    "trainer.devices=2 data.batch_size=63": "data.batch_size=63: must divide among 2 devices; 64 would",
    "trainer=ddp data.batch_size=2 model.bn=true": "data.batch_size=2: BatchNorm needs 2 samples on each of 2 devices",
    "trainer=ddp trainer.accelerator=cpu trainer.sync_batchnorm=true": "trainer.sync_batchnorm=true: needs GPUs; on ",
    "trainer.sync_batchnorm=maybe": "trainer.sync_batchnorm=maybe: must be auto, true or false",
    "+schema@x=Adam": "@x: no such part of the config; a group goes to its own",
    "model.bn=2": "model.bn=2: must be true or false",
    "-m model.bn=0,1,2": "model.bn=0,1,2: must be true or false",
    "--cfg job model.dropout=2": "model.dropout=2.0: must be a number in [0, 1)",
    "--cfg all data.root=nowhere": "data.root=nowhere: no such folder",
    "--cfg job claim=overfitting": "claim=overfitting: said of a sweep; add -m",
    "--cfg job resume=nowhere": "nowhere: no run there",
    "--info config seed=-5": "seed=-5: must be",
    "seed=-5 --info": "seed=-5: must be",
    "model.kwargs.a=é": "model.kwargs.a=é: not understood; expected key=value, quoted where Hydra or the shell needs "
    "it: 'model.kwargs.a=\"é\"'",
    "trainer.sync_batchnorm=1": "trainer.sync_batchnorm=1: must be auto, true or false",
    "trainer.node_rank=1": "trainer.node_rank=1: must be below trainer.num_nodes=1; the first machine is 0",
    "trainer.num_nodes=2": "trainer.rdzv_endpoint=null: with trainer.num_nodes=2 it must be host:port of ",
    "trainer.num_nodes=2 trainer.rdzv_endpoint=head:port": "trainer.rdzv_endpoint=head:port: ",
    "trainer.accelerator=cuda": "trainer.accelerator=cuda: no CUDA device here",
    "model._target_=os.system": "model._target_=os.system: package 'os' is not in allowed_targets",
    "model=mlpp": 'model=mlpp: did you mean "mlp"? choose one of cnn, custom, mlp, resnet, torchvision',
    "--foo": "unrecognized arguments: --foo; --help shows what can be typed",
    "seed=0 --cfg job model.dropout=1": "model.dropout=1.0: must be a number in [0, 1)",
    "modell=mlp": 'modell: no such key; did you mean "model"?',
    "+model.foo=1": "model.foo: no such key",
    "foo": "foo: not understood; expected key=value",
    "data=image_folder": "data.root: a value is needed",
    "data.root=nowhere": "data.root=nowhere: no such folder",
    "data=image_folder data.root=.": "data.root=.: empty; expected one sub-folder",
    "model=resnet model.depth=21": "model.depth=21: must be 18 or 6n+2",
    "model.bn=true data.batch_size=1": "data.batch_size=1: BatchNorm (model.bn=true) needs at least 2 samples",
    "tracking.uri=file:///x": "tracking.uri=file:///x: must begin with one of sqlite://",
    "tracking.tags.who=me": "tracking.tags.who: not there yet; add it with a plus sign, +tracking.tags.who=…",
    "seed=-5": "seed=-5: must be",
    "model.init_gain=1e308": "model.init_gain=1e+308: must be a number in (0, 1e+38]",
    "model.hidden_dims=[1,1000000000000]": "model.hidden_dims=1000000000000: must be a number in [1, 1e+09]",
    "model=resnet model.depth=6000002": "model.depth=6000002: must be a number in [8, 1202]",
    "paths.outputs=''": "paths.outputs='': must be the path of a folder",
    "data.root='~nobody_of_that_name'": "data.root=~nobody_of_that_name: cannot be a folder (Could not determine home",
    f"data.root={'z' * 300}": "z: cannot be a folder (File name too long)",
    "name='\udcff'": "name=\\udcff: not UTF-8 text",
    "name='\\${seed}'": "name=${seed}: ${ is read as a reference to another key",
    "model.dropout=${nowhere}": "model.dropout=${nowhere}: Interpolation key 'nowhere' not found",
    "model.dropout=${model.dropout}": "model.dropout=${model.dropout}: Recursive interpolation",
    "model.dropout=${trainer.max_epochs}": "model.dropout=10.0: must be",
    "model.hidden_dims=[[1]]": "model.hidden_dims=[[1]]: must be a list of single values",
    "experiment=null": "a config group takes the name of one of its choices",
    "experiment=nope": "experiment=nope: choose one of baseline",
}


@pytest.mark.parametrize("arguments", BAD)
def test_wrong_input_ends_in_one_line_and_status_2(arguments: str, tmp_path: Path):
    outputs = tmp_path / "outputs"
    done = train_py(f"paths.outputs={outputs}", *arguments.split(), cwd=tmp_path)
    assert_refused(done, BAD[arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["a\nb", "\x1b[31m", "x" * 100_000])
def test_what_was_typed_is_shown_in_one_line_of_bounded_length(value: str, tmp_path: Path):
    done = train_py(f"model.init='{value}'", cwd=tmp_path)
    assert_refused(done, "choose one of kaiming_normal, kaiming_uniform")
    assert done.stderr.strip().isprintable()
    assert len(done.stderr) < 3000


def test_outputs_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    done = train_py(f"paths.outputs={tmp_path / 'file'}")
    assert done.returncode == 2
    assert done.stderr == f"error: paths.outputs={tmp_path / 'file'}: cannot be written (Not a directory)\n"


def test_help_teaches(tmp_path: Path):
    done = train_py("--help", cwd=tmp_path)
    assert done.returncode == 0
    for expected in (
        "  model       cnn, custom, mlp, resnet, torchvision\n",
        "  python src/train.py model.bn=true ",
        "  model.dropout=0.0\n      Probability of dropping a unit. Allowed: a number in [0, 1).\n",
    ):
        assert expected in done.stdout
    assert "model.depth=20" in train_py("model=resnet", "-h", cwd=tmp_path).stdout
    wrong = train_py("model.bnn=1", "--help", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("package", ["hydra: {callbacks: {x: {", "# @package hydra.callbacks.x\n{"])
def test_a_config_of_somebody_else_lets_hydra_build_nothing(package: str, tmp_path: Path):
    touched = tmp_path / "touched"
    (tmp_path / "x").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [schema, x: y, _self_]\n")
    (tmp_path / "x" / "y.yaml").write_text(
        ("" if package.startswith("#") else "# @package _global_\n")
        + f"{package}_target_: pathlib.Path.touch, _args_: ['{touched}']{'}' * package.count('{')}\n"
    )
    done = train_py("--config-dir", str(tmp_path), "--config-name", "config", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sets hydra.callbacks; of Hydra itself, a folder of configs may set " in done.stderr
    assert not touched.exists()


def test_a_folder_of_configs_is_used(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /optimizer: sgd]\nhydra: {sweeper: {params: {seed: 1}}}\n"
    )
    done = train_py("--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_target_: torch.optim.SGD" in done.stdout


@pytest.mark.parametrize("word", ["--experimental-rerun=x.pickle", "--config-path=/x"])
def test_words_of_hydra_that_go_past_the_checks_are_refused(word: str, tmp_path: Path):
    assert_refused(train_py(word, cwd=tmp_path), word.partition("=")[0] + ": ")


@pytest.mark.parametrize("name", configs.COMMANDS)
def test_without_the_environment_a_command_names_the_one_to_use(name: str):
    command = [sys.executable, "-S", f"src/{name}.py", "a=b c"]  # without site-packages
    done = subprocess.run(command, cwd=configs.PROJECT, capture_output=True, text=True)
    assert_refused(done, f" has no hydra; .venv/bin/python src/{name}.py 'a=b c'\n")


def test_an_environment_that_was_never_made_is_to_be_set_up(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(cli, "PROJECT", tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "torch" else name)
    monkeypatch.setattr(sys, "argv", ["src/train.py", "seed=1"])
    setup = f"run make -C {tmp_path} setup, then {tmp_path}/.venv/bin/python {tmp_path}/src/train.py seed=1"
    with pytest.raises(UserError, match=re.escape(f"{sys.executable} has no torch; {setup}")):
        cli._check_environment("train")


TEXTS = ["/home/José/x", "a b", "a,b", "a (1).png", "0_model.bn=true_seed=0", "~/x", "5.10", "1e3", "true", "C:\\x\\",
         "\\", 'a"b', "it's", "#!&;", "{a}", '\\\\"', " a ", "$HOME", "plain/text_1.png"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("name", "key"),
    [("train", "data.root"), ("train", "resume"), ("train", "+tracking.tags.x"), ("report", "sweep"),
     ("evaluate", "run"), ("evaluate", "against"), ("predict", "images"), ("promote", "run"),
     ("sync", "paths.outputs")],
)  # fmt: skip
def test_free_text_is_taken_as_it_was_typed(name: str, key: str, text: str):
    override = PARSER.parse_override(cli.as_hydra_reads(f"{key}={text}", name))
    assert (override.key_or_group, override.value()) == (key.lstrip("+"), text)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("data.root=/a (1),/b", 'data.root="/a (1)",/b'),
        ("sweep.resume=/a,b", 'sweep.resume="/a,b"'),
        ("paths.outputs=/a,b", 'paths.outputs="/a,b"'),
        ("data.root=choice(/a,/b)", "data.root=choice(/a,/b)"),
        ("model.init=orthogonal,lsuv", "model.init=orthogonal,lsuv"),
    ],
)
def test_a_comma_separates_the_values_of_a_sweep_and_of_nothing_else(word: str, read: str):
    assert cli.as_hydra_reads(word, "train", multirun=True) == read


@pytest.mark.parametrize(
    ("word", "name"),
    [("images=[a.png,b.png]", "predict"), ("runs=[a,b]", "report"), ("name=null", "train"), ("data=mnist", "train"),
     ('name="a b"', "train"), ("data.root=${oc.env:HOME}/x", "train"), ("model.bn=1", "train"), ("seed=5.0", "train")],
)  # fmt: skip
def test_what_is_no_free_text_stays(word: str, name: str):
    assert cli.as_hydra_reads(word, name) == word


def test_a_command_without_a_value_to_work_on_is_refused(tmp_path: Path):
    done = typed("report", "-m", "margin=range(3,0)", f"paths.outputs={tmp_path}")
    assert_refused(done, f"margin=range(3,0) paths.outputs={tmp_path}: no value in it, so there is nothing to do")


def test_leaving_early_calls_whom_python_calls_at_exit_and_keeps_the_status():
    code = (
        "import atexit, sys, threading; sys.path.insert(0, 'src'); from gaplab import cli\n"
        "def main():\n"
        "    threading._register_atexit(print, 'pools')\n"  # where those of a sweep are told to end
        "    atexit.register(print, 'handlers')\n"
        "    threading.Timer(0.1, print, ['threads']).start()\n"
        "    raise SystemExit(3)\n"
        "cli.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=configs.PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.split() == ["pools", "threads", "handlers"]


def test_a_closed_standard_output_is_no_traceback():
    script = configs.PROJECT / "src" / "train.py"
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' '{script}' --help >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
