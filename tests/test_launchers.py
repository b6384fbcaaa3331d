"""Every launcher over every form of data: the same numbers as by the basic one."""

import json
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from PIL import Image

from gaplab import config as configs
from gaplab.finder import find_sweep

SMALL = ["trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.precision=64-true", "optimizer=sgd"]
SMALL += ["tracking=none", "figures=false", "seed=0,1", "data.batch_size=32"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "fused": ["hydra/launcher=fused", "hydra.launcher.n_jobs=2", "hydra.launcher.replicas=2"],
    "fused, one process": ["hydra/launcher=fused", "hydra.launcher.n_jobs=1", "hydra.launcher.replicas=2"],
}
FOLDER = ["data=image_folder", "data.image_size=8", "data.channels=1"]
FORMS = {
    "a class of torchvision": ["data=mnist", "data.train_size=200", "data.valid_size=100"],
    "a folder, cold cache": FOLDER,
    "a folder, warm cache": FOLDER,
    "a folder, streamed": [*FOLDER, "data.memory_budget_gb=0"],
    "a custom class": [
        "data=mnist", "data.name=own", "data._target_=own_digits.Digits", "data.num_train=null", "data.valid_size=100",
        "allowed_targets=[gaplab,torch,torchvision,own_digits]",
    ],
}  # fmt: skip
OWN = """
from torchvision.datasets import MNIST


class Digits(MNIST):
    def __init__(self, root, train):
        super().__init__(root, train)
        self.data, self.targets = self.data[:300], self.targets[:300]

    @property
    def raw_folder(self):
        return f"{self.root}/MNIST/raw"
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(3):
        (root / f"c{label}").mkdir()
        for number in range(50):
            pixels = rng.integers(0, 90, (12, 12)).astype(np.uint8) + np.uint8(60 * label)
            Image.fromarray(pixels).save(root / f"c{label}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def swept(pictures, tmp_path_factory):
    """The results of a sweep over a form of data by a launcher, in this process and joblib's; each is run once."""
    from joblib.externals.loky import get_reusable_executor

    home = tmp_path_factory.mktemp("outputs")
    (home / "own_digits.py").write_text(OWN)
    known: dict[tuple[str, str], list[dict]] = {}

    def swept(form: str, launcher: str) -> list[dict]:
        if "warm" in form:
            swept(form.replace("warm", "cold"), launcher)
        if (form, launcher) not in known:
            outputs = home / launcher / form.replace("warm", "cold")
            words = [*FORMS[form], *SMALL, *LAUNCHERS[launcher], f"paths.outputs='{outputs}'"]
            words += [f"data.root={pictures}"] if "folder" in form else []
            patch.setattr(sys, "argv", ["train.py", "-m", *words])
            hydra.main(version_base="1.3", config_path=str(configs.PROJECT / "conf"), config_name="train")(print)()
            jobs = sorted(find_sweep(outputs, "latest", "sweep").glob("*/result.json"))
            known[form, launcher] = [json.loads(path.read_text()) for path in jobs]
        return known[form, launcher]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(home))
        patch.syspath_prepend(home)
        yield swept
    get_reusable_executor().shutdown(wait=True)


PAIRS = [(form, launcher) for form in FORMS for launcher in LAUNCHERS if launcher != "basic"]


@pytest.mark.full
@pytest.mark.parametrize(("form", "launcher"), PAIRS)
def test_every_launcher_trains_on_every_form_of_data_with_the_numbers_of_the_basic_one(form, launcher, swept):
    expected, found = swept(form, "basic"), swept(form, launcher)
    assert [result["status"] for result in expected] == ["FINISHED"] * 2
    for one, other in zip(found, expected, strict=True):
        counted = ("status", "error", "seed", "train_acc", "valid_acc", "test_acc", "gap_acc", "epochs", "steps")
        assert {name: one[name] for name in counted} == {name: other[name] for name in counted}
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=0 if launcher == "joblib" else 1e-9)
