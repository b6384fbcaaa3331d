"""Tab after `eval "$(python src/train.py -sc install=bash)"`, which the README tells people to type."""

import subprocess
import sys
from pathlib import Path

import pytest

from gaplab import config as configs

SCRIPT = """\
export PATH={bin}:$PATH
cd {project}
eval "$(python src/train.py -sc install=bash)"
complete -p python | grep -q hydra_bash_completion || exit 3
COMP_LINE='{line}'
COMP_POINT=${{#COMP_LINE}}
read -ra COMP_WORDS <<< "$COMP_LINE"
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python src/train.py model=", {"model=cnn", "model=custom", "model=mlp", "model=resnet", "model=torchvision"}),
        ("python src/train.py model.bn_", {"model.bn_eps=", "model.bn_momentum=", "model.bn_position="}),
        ("python src/train.py -m claim=hi", {"claim=higher_lr", "claim=higher_lr_full"}),
        ("python src/predict.py imag", {"images="}),
    ],
)
def test_tab_offers_groups_choices_and_keys(line, offered):
    assert Path(sys.executable).with_name("python").exists()
    script = SCRIPT.format(bin=Path(sys.executable).parent, project=configs.PROJECT, line=line)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered
