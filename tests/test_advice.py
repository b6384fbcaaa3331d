"""Each command that is printed as advice runs as it is printed: here it is composed and checked."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import composed

from gaplab import cli, launch
from gaplab import config as configs
from gaplab.foreign import composed as compose
from gaplab.machine import command
from gaplab.promotion import _command


def run(line: str) -> tuple[str, Any]:
    """The command of a printed line, and the settings that it comes to."""
    python, script, *words = shlex.split(line.partition("    (")[0])
    assert Path(python) == Path(sys.executable).relative_to(configs.PROJECT)
    flags = ["--config-dir", "--config-name"] if "--config-dir" in words else []
    options = {flag.lstrip("-").replace("-", "_"): words.pop(words.index(flag) + 1) for flag in flags}
    name, multirun = Path(script).stem, "-m" in words
    own = [cli.as_hydra_reads(word, name, multirun) for word in words if not word.startswith("-")]
    given = SimpleNamespace(**{"config_dir": None, "config_name": None} | options, multirun=multirun, overrides=own)
    return name, cli.READERS[name](compose(name, given), own)


def advice(monkeypatch: pytest.MonkeyPatch, words: list[str], folder: Path = Path()) -> list[str]:
    own = [cli.as_hydra_reads(word, "train") for word in words]
    monkeypatch.setattr(launch, "typed_words", lambda: own)
    return list(launch._advice(composed(*(word for word in own if not word.startswith("resume="))), folder))


@pytest.mark.parametrize("bn", ["false", "true"])
def test_the_next_run_is_the_one_that_was_typed_with_batchnorm_toggled(bn: str, monkeypatch, tmp_path: Path):
    words = ["model=cnn", f"model.bn={bn}", "model.dropout=0.5", "name=my run", f"paths.outputs={tmp_path}/José (1)"]
    (line, curves) = advice(monkeypatch, words)
    name, config = run(line)
    assert (name, config.model.bn, config.model.dropout, config.name) == ("train", bn == "false", 0.5, "my run")
    assert (config.model.name, config.paths.outputs) == ("cnn", f"{tmp_path}/José (1)")
    name, settings = run(curves)
    assert (name, settings.paths.outputs) == ("ui", f"{tmp_path}/José (1)")


def test_what_would_be_refused_or_shows_nothing_is_not_advised(monkeypatch):
    assert [line for line in advice(monkeypatch, ["tracking=none"]) if "ui.py" in line] == []
    assert advice(monkeypatch, ["tracking=none", "data.batch_size=1"]) == []
    assert advice(monkeypatch, ["tracking=none", "model=custom", "model._target_=torch.nn.Identity"]) == []
    assert advice(monkeypatch, ["tracking.uri=https://u:p@h"])[-1] == "https://***@h    (look at the curves)"


def test_after_a_resumed_run_the_next_one_is_that_run_and_not_a_resumption(monkeypatch, tmp_path: Path):
    first = composed("model.dropout=0.25", "tracking=none", "model.kwargs={}")
    (tmp_path / "config.yaml").write_text(configs.to_yaml(first))
    (line, *_) = advice(monkeypatch, ["resume=latest", "tracking=none"], tmp_path)
    _, config = run(line)
    assert (config.model.bn, config.model.dropout, config.resume) == (True, 0.25, None)


def test_advice_of_other_commands_keeps_the_registry_and_the_folders(tmp_path: Path):
    typed = ["run=latest", f"paths.outputs={tmp_path}/a b", "tracking.registered_model=mine", "gate.split=valid"]
    name, settings = run(_command(typed, "version=3", "force=true"))
    assert (name, settings.version, settings.force, settings.run) == ("promote", 3, True, None)
    assert (settings.tracking.registered_model, settings.gate.split) == ("mine", "valid")
    assert settings.paths.outputs == f"{tmp_path}/a b"
    folder = f"{tmp_path}/0_model.bn=true (1)"
    assert run(command("report", f"sweep={folder}"))[1].sweep == folder
    trust = ["allowed_targets=[gaplab,torch,torchvision,mine]"]
    config = run(command("train", "-m", f"sweep.resume={folder}", "hydra/launcher=joblib", *trust))[1]
    assert config.sweep.resume == folder


def test_a_command_is_named_as_this_shell_would_find_it(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.chdir(tmp_path)
    assert command("ui") == f"{Path(sys.executable).name} {configs.PROJECT}/src/ui.py"
