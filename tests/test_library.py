"""What `from gaplab import …` gives: cheap to import, and the same as the commands."""

import re
import subprocess
import sys

import pytest
from conftest import SMALL

import gaplab
from gaplab import config as configs

PAGE = (configs.PROJECT / "docs" / "library.md").read_text()


def test_importing_gaplab_imports_nothing_of_it():
    code = "import sys; import gaplab; print(sorted(m for m in sys.modules if m.startswith('gaplab.') or '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(configs.PROJECT / 'src')!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(re.findall(r"'(.*?)'", done.stdout))
    assert "gaplab" in loaded
    assert not {name for name in loaded if name.startswith("gaplab.")}
    assert not loaded & {"torch", "hydra", "omegaconf", "numpy", "scipy", "mlflow", "lightning"}


def test_every_name_is_there():
    assert all(getattr(gaplab, name) is not None for name in gaplab.__all__)
    assert set(gaplab.__all__) <= set(dir(gaplab))
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        gaplab.fit  # noqa: B018


def test_the_page_names_what_is_there():
    named = set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE))
    assert named == {"compose", "train", "gap", "compare"}
    assert named <= set(gaplab.__all__)


def test_the_pages_code_runs_and_prints_what_the_page_says(tmp_path, capfd):
    small = ", ".join(f'"{word}"' for word in [*SMALL, "trainer.max_epochs=1", f"paths.outputs={tmp_path}"])
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert '"trainer.max_epochs=2"' in code
    names = {}
    exec(code.replace('"trainer.max_epochs=2"', small), names)
    printed = capfd.readouterr().out
    said = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]
    assert printed.startswith(said)
    assert printed.splitlines()[-1].startswith("inconclusive ")
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert names["contrast"].n == 2


def test_compose_takes_what_the_command_takes():
    config = gaplab.compose("model=cnn", "model.bn=true", "seed=3")
    assert (config.model.name, config.model.bn, config.seed) == ("cnn", True, 3)
    assert gaplab.compose("allowed_targets=[gaplab,torch,torchvision,mine]").allowed_targets[-1] == "mine"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.bnn=true", 'no such key in model; did you mean "bn"'),
        ("model=mlpp", 'did you mean "mlp"'),
        ("model.dropout=2", "must be a number in [0, 1)"),
        ("foo", "not understood; expected key=value"),
    ],
)
def test_compose_refuses_in_the_commands_words(word, said):
    with pytest.raises(gaplab.UserError, match=re.escape(said)):
        gaplab.compose(word)


def test_what_is_the_commands_alone_is_refused_in_a_line():
    with pytest.raises(gaplab.UserError, match="resume: goes on with a run's own config"):
        gaplab.train(gaplab.compose("resume=latest"))
    with pytest.raises(gaplab.UserError, match=re.escape("tracking.register=true: python src/train.py does that")):
        gaplab.train(gaplab.compose("tracking.register=true"))


def test_compare_pairs_by_seed_and_decides_with_six():
    plain = {seed: 0.02 + seed / 1000 for seed in range(6)}
    other = {seed: value + 0.01 + seed / 1e5 for seed, value in plain.items()}
    contrast = gaplab.compare(plain, other | {9: 5.0}, name="bn")
    assert (contrast.name, contrast.n, contrast.verdict) == ("bn", 6, "real")
    assert contrast.difference == pytest.approx(0.01 + 2.5e-5)
    assert gaplab.compare(plain, plain).verdict == "equivalent"
    few = gaplab.compare(dict(list(plain.items())[:5]), other)
    assert (few.n, few.verdict) == (5, "inconclusive")
