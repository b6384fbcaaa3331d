"""What the pages say can be typed: every command in them is run, composed, or run by a test that is named here."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from gaplab import cli
from gaplab import config as configs
from gaplab.foreign import composed

PROJECT = configs.PROJECT
NO_MAKE = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # make test runs this
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
SMALL = ["trainer.max_epochs=1", "data.train_size=500", "data.valid_size=200", "trainer.threads=1", "figures=false"]
SMALL += ["trainer.accelerator=cpu"]
CUT = {"'seed=range(6)'": "seed=0", "model.dropout=0,0.5": "model.dropout=0"}  # in a sweep that is run

# Run here, as they stand in a page, in this order; with what makes them small. All keep to one folder of outputs.
RUN = {
    "python src/train.py tracking=none": SMALL,
    "python src/train.py resume=latest": [],
    "python src/train.py -m model.bn=false,true model.dropout=0,0.5 'seed=range(6)'": SMALL,
    "python src/train.py -m sweep.resume=latest": [],
    "python src/report.py": [],
    "python src/sync.py": [],
    "python src/train.py model.bn=true tracking.register=true": SMALL,
    "python src/evaluate.py run=latest": [],
    "python src/predict.py run=latest images=docs/tutorial/seven.png": [],
    "python src/promote.py": [],
}

# Run elsewhere: how the command begins, and the test or the make target that runs it.
ELSEWHERE = {
    'eval "$(python src/train.py -sc': "tests/test_completion.py",
    "python src/train.py --config-dir": "tests/test_config.py",
    "python docs/make_config.py": "tests/test_docs.py",
    "python docs/make_claims.py": "docs/claims.md",  # after hours of sweeps
    "python benchmarks/": "Makefile",  # make bench
    "make bench": "Makefile",
    "make gpu-wheels": "Makefile",
    "torchrun --nproc-per-node": "tests/cluster/test_outside.py",
    "srun --ntasks": "tests/cluster/test_outside.py",
    "make format": "Makefile",
    "make setup": "Makefile",
    "make check": "Makefile",
    "make test": "Makefile",  # test-faults and test-cluster too
    "make ui": "tests/ui",
    "make serve": "tests/tracking/test_serving.py",
    "curl ": "tests/tracking/test_serving.py",
    "python -c 'import json, numpy, PIL": "tests/tracking/test_serving.py",
    "ssh -N -L 5000": "docs/deploy.md",  # needs a second machine
}
DEPLOYED = (
    "install",
    "server",
    "proxy",
    "check",
    "client",
    "backup",
    "restore",
)  # blocks that docs/deploy_check.sh runs
BY_HAND = "mkdir -p ~/.mlflow"  # a block that begins so is pasted


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands(page: Path) -> Iterator[Command]:
    """The lines of its shell blocks (untagged, or `sh`) and what stands in backticks and begins like a command."""
    text = page.read_text()
    for tag, block in re.findall(r"^```(.*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        kind, _, name = tag.partition(" ")
        if kind not in ("", "sh", "bash") or name in DEPLOYED or block.startswith(BY_HAND):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            yield from _parts(page, line)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(r"(python (src|docs|benchmarks)/|make [a-z])", span):
            yield from _parts(page, " ".join(span.split()))


def _parts(page: Path, line: str) -> Iterator[Command]:
    """One line, without its comment, at `&&` and `|`."""
    if line.startswith("eval "):
        yield Command(page.name, line.partition("  #")[0].strip())
        return
    words = shlex.split(line, comments=True)
    part: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|"):
            if part:
                yield Command(page.name, shlex.join(part).replace("'<folder>'", "<folder>"))
            part = []
        else:
            part.append(word)


ALL = sorted({command for page in PAGES if page.is_file() for command in commands(page)}, key=str)


def shown(text: str) -> str:
    """As `shlex` writes it, so that quotes make no difference."""
    return shlex.join(shlex.split(text))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder in which the commands of RUN, in their order, have been run; and what each printed."""
    home = tmp_path_factory.mktemp("outputs")
    printed = {}
    for text, more in RUN.items():
        line = text
        for long, short in CUT.items():
            line = line.replace(long, short)
        if "resume=latest" in text:  # as after a crash
            results = sorted(home.glob("sweeps/*/*/result.json" if "-m" in text else "runs/*/result.json"))
            results[-1].unlink()
        words = [sys.executable, *shlex.split(line)[1:], *more, f"paths.outputs={home}"]
        done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        printed[text] = done.stdout
    return home, printed


@pytest.mark.full
def test_what_is_run_says_and_leaves_what_the_pages_promise(outputs):
    home, printed = outputs
    said = dict(zip(RUN, printed.values(), strict=True))
    trained, resumed, swept, resumed_sweep, report, synced, registered, evaluated, predicted, promoted = said.values()
    assert "best valid" in trained
    assert "best valid" in resumed
    assert "2 jobs, 0 of them finished" in swept
    assert "2 jobs, 1 of them finished" in resumed_sweep
    results = sorted(home.glob("sweeps/*/*/result.json"))
    assert [json.loads(path.read_text())["status"] for path in results] == 2 * ["FINISHED"]
    assert "report.html" in report
    assert list(home.glob("sweeps/*/report/report.html"))
    assert "has all" in synced or "sent" in synced
    assert "best valid" in registered
    assert "is champion" in registered
    assert "test" in evaluated
    assert "seven.png" in predicted
    assert "champion" in promoted


def test_every_command_that_is_run_stands_in_a_page():
    there = {command.text for command in ALL}
    assert [text for text in RUN if shown(text) not in there] == []


def test_no_entry_of_the_table_is_left_over():
    there = [command.text for command in ALL]
    unused = [start for start in ELSEWHERE if not any(text.startswith(start) for text in there)]
    assert unused == []
    for where in ELSEWHERE.values():
        assert (PROJECT / where).exists(), where


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_covered(command):
    assert covered(command.text), f"{command}: neither run, nor composed, nor listed in ELSEWHERE"


@cache
def covered(text: str) -> bool:
    if text in map(shown, RUN) or any(text.startswith(start) for start in ELSEWHERE):
        return True
    words = shlex.split(text)
    if words == ["make"]:  # lists the targets
        return (
            "make train"
            in subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True, env=NO_MAKE).stdout
        )
    if words[0] == "make":  # its recipe, by make's own reading
        rule = subprocess.run(
            ["make", "-n", "-o", ".venv/.ready", *words[1:]],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=True,
            env=NO_MAKE,
        )
        lines = [line for line in rule.stdout.replace("\\\n", " ").splitlines() if line.strip()]
        return bool(lines) and all(covered(shlex.join(shlex.split(line))) for line in lines)
    while words and re.fullmatch(r"[A-Z]+=\S*", words[0]):
        words.pop(0)
    if len(words) < 2 or Path(words[0]).name != "python" or not words[1].startswith("src/"):
        return False
    return composes(Path(words[1]).stem, words[2:])


def composes(name: str, words: list[str]) -> bool:
    """Compose and check what `src/<name>.py <words>` would; of a sweep, the first and the last value of each key."""
    words = [re.sub(r"<.*?>", "somewhere", os.path.expandvars(word)) for word in words]
    if "…" in words:  # any sweep
        words[words.index("…") : words.index("…") + 1] = ["model.bn=false,true", "seed=0,1"]
    words = [word.replace("…", "somewhere") for word in words]
    flags = [word for word in words if word.startswith("-")]
    words = [word for word in words if not word.startswith("-")]
    given = SimpleNamespace(config_name=None, config_dir=None, multirun=False, overrides=words)
    if "--help" in flags:
        return bool(cli.help_text(name, given))
    if "--hydra-help" in flags or set(flags) - {"-m"}:
        return False
    if name == "train" and "sweep.resume=latest" in words and "-m" not in flags:
        return False
    choices = [words]
    if "-m" in flags:
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            single = [word for word in words if not _is_sweep(word)]
            params = compose(name, single, return_hydra_config=True).hydra.sweeper.get("params") or {}
        typed = {word.partition("=")[0] for word in words}
        whole = [*(f"{key}={value}" for key, value in params.items() if key not in typed), *words]
        choices = [[_one(word, end) for word in whole] for end in (0, -1)]
    for choice in choices:
        own = [word for word in choice if not word.startswith(("hydra/", "hydra."))]
        given.overrides = [cli.as_hydra_reads(word, name) for word in own]
        assert cli.READERS[name](composed(name, given), own)
    return True


def _is_sweep(word: str) -> bool:
    return OverridesParser.create().parse_override(word).is_sweep_override()


def _one(word: str, end: int) -> str:
    """`seed=range(6)` as `seed=0` or `seed=5`."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{override.input_line.partition('=')[0]}={list(override.sweep_string_iterator())[end]}"


@pytest.mark.parametrize(
    "text",
    [
        "python src/train.py model.bnn=true",
        "python src/train.py -m model=mlp,nothing",
        "python src/train.py -m claim=nothing",
        "python src/evaluate.py split=all",
        "python src/unknown.py",
        "make nothing",
        "rm -rf outputs",
    ],
)
def test_a_command_that_would_fail_is_found(text):
    try:
        assert not covered(shown(text))
    except Exception as error:
        assert not isinstance(error, AssertionError)  # noqa: PT017 - any other says that it would fail


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        path = (page.parent / target).resolve()
        assert "://" in target or path.exists(), target


def test_the_configuration_reference_is_current():
    written = runpy.run_path(str(PROJECT / "docs" / "make_config.py"))["page"]()
    assert (PROJECT / "docs" / "config.md").read_text() == written, "run python docs/make_config.py"
    assert str(PROJECT) not in written


def test_the_configuration_reference_has_every_key():
    page = (PROJECT / "docs" / "config.md").read_text()
    schemas = [configs.Config, *(one for group in configs.SCHEMAS.values() for one in group)]
    schemas += [
        configs.Report,
        configs.Evaluate,
        configs.Predict,
        configs.Promote,
        configs.Serve,
        configs.Sync,
        configs.Ui,
    ]
    for schema in schemas:
        for name, item in schema.__dataclass_fields__.items():
            if item.metadata:
                assert re.search(rf"^\| `([a-z]+\.)?{name}` \|", page, re.MULTILINE), f"{schema.__name__}.{name}"
                assert item.metadata["doc"] in page
    for path in (PROJECT / "conf").rglob("*/*.yaml"):
        if path.name != "settings.yaml":
            choice = path.relative_to(PROJECT / "conf").with_suffix("").as_posix()
            group, _, name = choice.partition("/")
            said = choice.replace("hydra/launcher/", "hydra/launcher=") if group == "hydra" else f"{group}={name}"
            assert f"`{said}`" in page, said
