"""The gate: who becomes champion, who does not, and why."""

import json
import re
import shutil
import threading
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DIGITS, SMALL, composed, put_into_mlflow, small, train_py
from hydra import compose, initialize_config_dir

from gaplab import config as configs
from gaplab import evaluation, launch, promotion
from gaplab.config import Gate
from gaplab.data.splits import split
from gaplab.errors import UserError
from gaplab.evaluation import Paired, evaluate
from gaplab.export import best_network
from gaplab.files import locked
from gaplab.metrics import Gap, gap_change, paired_difference
from gaplab.promotion import _gap, decide, promote
from gaplab.stats import mcnemar
from gaplab.tracking import registry as module
from gaplab.tracking.registry import Registry
from gaplab.training.reader import checksum_path, read_checkpoint


def paired(both, only_first, only_second, neither):
    total = both + only_first + only_second + neither
    change = paired_difference(both, only_first, only_second, neither)
    return Paired(
        total, both, only_first, only_second, neither, (both + only_first) / total, (both + only_second) / total,
        change.acc, change.low, change.high, mcnemar(only_first, only_second),
    )  # fmt: skip


SMALL_GAP, GAP, LARGE_GAP = Gap(0.01, 0.007, 0.013), Gap(0.02, 0.017, 0.023), Gap(0.04, 0.036, 0.044)
STAGED = {
    "better": (paired(9500, 50, 150, 300), GAP, SMALL_GAP, True),
    "equal": (paired(9600, 60, 60, 280), GAP, GAP, True),
    "worse": (paired(9500, 150, 50, 300), GAP, GAP, False),
    "perhaps worse": (paired(95, 2, 1, 2), GAP, GAP, False),
    "worse by little, beyond doubt": (paired(9700, 45, 20, 235), GAP, GAP, False),
    "as good with a larger gap": (paired(9600, 60, 60, 280), GAP, LARGE_GAP, False),
    "of unknown gap": (paired(9600, 60, 60, 280), GAP, None, False),
}


@pytest.mark.parametrize("case", STAGED)
def test_staged_candidates(case):
    counts, champion, candidate, passes = STAGED[case]
    found = decide(counts, champion, candidate, Gate(), against=7)
    assert found.passed == passes
    tags = found.tags()
    assert tags["gate"] == ("passed" if passes else "not passed")
    assert tags["gate.against"] == "7"
    assert float(tags["gate.acc_change_low"]) == pytest.approx(counts.low, abs=1e-6)


def test_margins_decide():
    same = paired(9600, 60, 60, 280)  # [-0.21, +0.21] pp
    assert not decide(same, GAP, GAP, Gate(max_acc_loss=0.0020), 1).passed
    assert decide(same, GAP, GAP, Gate(max_acc_loss=0.0023), 1).passed
    assert not decide(same, GAP, GAP, Gate(max_gap_increase=0.0042), 1).passed  # half-width sqrt(2) * 0.3 pp
    assert decide(same, GAP, GAP, Gate(max_gap_increase=0.0043), 1).passed


def test_the_change_of_a_gap():
    found = gap_change(Gap(0.02, 0.017, 0.024), Gap(0.03, 0.026, 0.035))
    assert found.acc == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01 - (0.004**2 + 0.004**2) ** 0.5)
    assert found.high == pytest.approx(0.01 + (0.005**2 + 0.003**2) ** 0.5)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A registry in which four runs were put one after another: the first, an equal, a worse and a better one.

    Their weights are made by hand: each network answers the class whose mean picture is nearest, but never those in
    `missing`, so that no accuracy is nearer to another than 8 pp, eight standard errors.
    """
    home = tmp_path_factory.mktemp("registry")
    launch.launch(composed(f"paths.outputs={home}", *SMALL, "model.hidden_dims=[]"), home / "runs" / "trained")
    for name, missing in {"first": [1], "equal": [1], "worse": [1, 2, 3], "better": []}.items():
        shutil.copytree(home / "runs" / "trained", home / "runs" / name)
        stage(home / "runs" / name, missing)
        say(home, f"run={name}")
    return home


def stage(folder, missing=(), **keys):
    """Make a trained run's network by hand, and put the run into MLflow."""
    config = replace(configs.load(folder / "config.yaml"), name=folder.name, **keys)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    network, _ = best_network(folder, config)
    images, labels = mnist(train=True)
    pixels = network.normalize(images).flatten(1)
    means = torch.stack([pixels[labels == label].mean(0) for label in range(10)])
    network.body.head.weight.copy_(2 * means)
    network.body.head.bias.copy_(-means.square().sum(1))
    network.body.head.bias[list(missing)] = -1e9
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path) | {"state_dict": {f"network.{k}": v for k, v in network.state_dict().items()}}
    torch.save(checkpoint, path)
    checksum_path(path).unlink()
    result = json.loads((folder / "result.json").read_text()) | {"run_id": put_into_mlflow(folder)}
    result["best"] |= {"gap_acc": GAP.acc, "gap_acc_low": GAP.low, "gap_acc_high": GAP.high}
    images, labels = mnist(train=False)
    result["test_acc"] = float((network(images).argmax(1) == labels).double().mean())
    (folder / "result.json").write_text(json.dumps(result))


def mnist_labels():
    from torchvision.datasets import MNIST

    return MNIST(DIGITS).targets.numpy()


@cache
def mnist(train):
    """The pictures of DIGITS, uint8 (N, 1, 28, 28), and their labels."""
    from torchvision.datasets import MNIST

    found = MNIST(DIGITS, train=train)
    return found.data.unsqueeze(1), found.targets


def say(outputs, *words):
    """`python src/promote.py …`, in this process."""
    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        cfg = compose("promote", [f"paths.outputs={outputs}", *words])
    promote(configs.promote_from_hydra(cfg))


def registry(outputs):
    return Registry(f"sqlite:///{outputs}/mlflow.db", "gaplab")


def test_the_better_and_the_equal_become_champion_and_the_worse_does_not(outputs):
    versions = registry(outputs).versions()
    assert [one.tags["run"] for one in versions] == ["first", "equal", "worse", "better"]
    assert [one.tags["gate"] for one in versions] == ["passed", "passed", "not passed", "passed"]
    assert versions[0].tags["gate.reason"] == "the first champion: there was none to compare with"
    assert (versions[1].tags["gate.acc_change"], versions[1].tags["gate.mcnemar_p"]) == ("+0.000000", "1")
    assert " pp: worse; gap " in versions[2].tags["gate.reason"]
    assert [one.tags.get("gate.against") for one in versions] == [None, "1", "2", "2"]
    assert [one.aliases for one in versions] == [[], [], [], ["champion"]]
    results = [json.loads((outputs / "runs" / name / "result.json").read_text()) for name in ("equal", "better")]
    change = results[1]["test_acc"] - results[0]["test_acc"]
    assert float(versions[3].tags["gate.acc_change"]) == pytest.approx(change, abs=1e-6)
    assert int(versions[3].tags["gate.samples"]) == 2000


def test_people_list_force_and_roll_back(outputs, capsys):
    say(outputs)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed if "better" in line] == [["4", "champion"]]
    say(outputs, "version=4")
    assert capsys.readouterr().out == "gaplab: version 4 is champion already\n"
    say(outputs, "version=3", "force=true")
    assert "gaplab: version 3 is champion" in capsys.readouterr().out
    assert registry(outputs).version(3).tags["gate"] == "by hand"
    say(outputs, "rollback=true")
    assert capsys.readouterr().out == "gaplab: version 4 is champion again, version 3 no longer\n"
    assert registry(outputs).champion().number == 4


def test_the_champion_is_evaluated_and_asked_by_its_address(outputs, capsys):
    words = [f"paths.outputs={outputs}", "model_uri=models:/gaplab@champion", "against=first"]
    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", words)
    evaluate(configs.evaluate_from_hydra(cfg, words))
    better = json.loads((outputs / "runs" / "better" / "result.json").read_text())
    assert re.search(f"accuracy +{better['test_acc']:.4f}", capsys.readouterr().out)
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{outputs}/mlflow.db").get_run(better["run_id"])
    assert run.data.metrics["eval/test/acc"] == better["test_acc"]


REFUSED = {
    "version=9": "version=9: gaplab has no such version; known: 1, 2, 3, 4",
    "run=nothing": "run=nothing: no run there",
    "rollback=true version=1": "version and rollback: one at a time",
    "force=true": "force=true: say whose",
    "tracking=none": "tracking=none: the registry is in MLflow",
    "tracking.uri=http://127.0.0.1:9": "127.0.0.1:9",
    "tracking.registered_model=nobody rollback=true": "rollback: nobody has no champion",
    "tracking.registered_model=a/b": "a name without / : and @",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named(outputs, words):
    with pytest.raises(UserError, match=re.escape(REFUSED[words])):
        say(outputs, *words.split())


def test_a_run_that_has_not_finished_is_not_registered(outputs, tmp_path):
    shutil.copytree(outputs / "runs" / "worse", outputs / "runs" / "stopped")
    path = outputs / "runs" / "stopped" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "KILLED"}))
    with pytest.raises(UserError, match="the run is KILLED; only finished ones are registered"):
        say(outputs, "run=stopped")


def test_a_valid_split_that_the_champion_was_trained_on_does_not_judge(outputs, capsys):
    shutil.copytree(outputs / "runs" / "trained", outputs / "runs" / "seed50")
    stage(outputs / "runs" / "seed50", seed=50)
    say(outputs, "run=seed50", "gate.split=valid")
    held_out = split(mnist_labels(), 1000, 500, seed=50)[1]
    count = len(np.intersect1d(held_out, np.load(outputs / "runs" / "better" / "splits.npz")["train"]))
    assert count > 0
    out = capsys.readouterr().out
    assert f"the champion was trained on {count} of the 500 samples of this valid split; gate.split=test" in out
    assert registry(outputs).champion().number == 4


@pytest.mark.parametrize(
    ("chosen", "seen", "told", "judged"),
    [
        ("test", 3, "the champion was trained on 3 of the 2,000 samples of this test split", False),
        ("test", None, "not known whether the champion was trained on samples of this test split", True),
        ("valid", None, "not known whether the champion was trained on samples of this valid split", False),
    ],
)
def test_seen_samples_judge_nobody_and_unknown_ones_are_told(outputs, monkeypatch, capsys, chosen, seen, told, judged):
    monkeypatch.setattr(evaluation, "trained_on", lambda *_: seen)
    say(outputs, "version=2", f"gate.split={chosen}")
    out = capsys.readouterr().out
    assert told in out
    assert ("McNemar" in out) == judged
    assert registry(outputs).champion().number == 4


def test_a_run_with_register_is_judged_when_it_has_ended(outputs, monkeypatch):
    folder = shutil.copytree(outputs / "runs" / "trained", outputs / "runs" / "registered")
    keys = ["tracking.register=true", "tracking.registered_model=after", f"paths.outputs={outputs}"]
    stage(folder, tracking=composed(*keys).tracking)
    monkeypatch.setattr(launch, "main", lambda *_: folder)
    done = train_py(*keys)
    assert (done.returncode, "after: version 1 is champion" in done.stdout) == (0, True), done
    assert Registry(registry(outputs).uri, "after").champion().tags["run"] == "registered"


def test_a_model_that_takes_other_pictures_stays_challenger(outputs, picture_folder, capsys):
    folder = outputs / "runs" / "other"
    keys = small(f"paths.outputs={outputs}", "data=image_folder", f"data.root='{picture_folder}'", "name=other")
    keys += ["data.image_size=8", "data.workers=0", "trainer.max_epochs=1", "data.train_size=null"]
    launch.launch(composed(*keys, "data.valid_size=0.1"), folder)
    put_into_mlflow(folder)
    say(outputs, "run=other")
    assert "takes other pictures, or knows other classes, than the champion" in capsys.readouterr().out
    assert registry(outputs).champion().number == 4


@pytest.fixture
def models(outputs, request):
    """A registered model of its own: the same four versions, of which 1 and then 4 were champion."""
    found = Registry(registry(outputs).uri, f"of {request.node.name}")
    for version in registry(outputs).versions()[:4]:
        found.add(version.source.removeprefix("models:/"), version.run_id, "")
    for number in (1, 4):
        found.crown(found.version(number))
    return found


@pytest.fixture
def judge(outputs, models, capsys):
    """`python src/promote.py …` on it; what is printed."""

    def judge(*words):
        capsys.readouterr()
        say(outputs, f"tracking.registered_model='{models.name}'", *words)
        return capsys.readouterr().out

    return judge


def champion(models):
    version = models.champion()
    return version and version.number


def test_a_candidate_that_failed_stays_challenger_when_the_champion_is_deleted(models, judge):
    models._client.delete_model_version(models.name, "4")
    told = "version 4 was champion, and was deleted in MLflow"
    assert f"{told}: compared with version 1, the newest former champion" in judge("version=3")
    assert (champion(models), models.version(3).tags["gate"], models.version(3).tags["gate.against"]) == (
        None, "not passed", "1",
    )  # fmt: skip
    assert "promote.py rollback=true makes version 1 champion" in judge()
    judge("version=2")  # as good as version 1
    assert champion(models) == 2


def test_a_champion_whose_alias_was_removed_is_still_the_measure_and_comes_back(models, judge):
    models._client.delete_registered_model_alias(models.name, "champion")
    assert "its alias was removed in MLflow: compared with version 4" in judge("version=1")
    assert champion(models) is None
    assert "version 4 is champion again\n" in judge("rollback=true")
    assert champion(models) == 4


def test_without_any_former_champion_only_force_helps(models, judge):
    for number in "14":
        models._client.delete_model_version(models.name, number)
    assert "no former champion is left to compare with; force=true makes this version champion" in judge("version=2")
    assert (champion(models), models.version(2).tags["gate"]) == (None, "not passed")
    with pytest.raises(UserError, match=r"no former champion of .* is left in MLflow"):
        judge("rollback=true")
    judge("version=2", "force=true")
    assert champion(models) == 2


def test_a_champion_chosen_by_hand_is_the_measure_and_what_a_rollback_returns_to(models, judge):
    models._client.set_registered_model_alias(models.name, "champion", "2")
    judge("version=3", "force=true")
    assert "version 2 is champion again, version 3 no longer" in judge("rollback=true")
    models._client.set_registered_model_alias(models.name, "champion", "3")
    assert "version 2 is champion again, version 3 no longer" in judge("rollback=true")


def test_a_rollback_passes_over_deleted_and_unreadable_versions(models, judge, monkeypatch):
    for number in (2, 3):
        models.crown(models.version(number))
    models._client.delete_model_version(models.name, "2")

    def download(address, *_):
        if address.endswith("/4"):
            raise UserError("its files are gone")

    monkeypatch.setattr(module, "download", download)
    assert judge("rollback=true").splitlines() == [
        "passed over version 4: its files are gone",
        f"{models.name}: version 1 is champion again, version 3 no longer",
    ]


def test_a_champion_that_cannot_be_read_names_the_way_out(models, judge, monkeypatch):
    real = module.fetch

    def fetch(address, *rest):
        if address.endswith("/4"):
            raise UserError(f"{address}: its files are gone")
        return real(address, *rest)

    monkeypatch.setattr(module, "fetch", fetch)
    with pytest.raises(
        UserError, match=r"the champion cannot be read: .*/4: its files are gone; .* version=2 force=true"
    ):
        judge("version=2")


def test_a_champion_whose_run_was_deleted_still_judges(outputs, models, judge):
    run_id = models.version(4).run_id
    models._client.delete_run(run_id)
    try:
        assert "beside the champion, version 4" in judge("version=3")
    finally:
        models._client.restore_run(run_id)


def test_a_renamed_model_is_not_begun_anew(models, judge):
    models._client.rename_registered_model(models.name, "renamed")
    for words in ["version=2"], ["run=first"], ["rollback=true"]:
        with pytest.raises(UserError, match=r"was renamed renamed in MLflow; use tracking.registered_model=renamed"):
            judge(*words)


def test_a_champion_that_another_machine_chose_meanwhile_is_not_replaced(models, judge, monkeypatch):
    real = promotion._judge

    def slow(*args):
        models.crown(models.version(3))
        return real(*args)

    models.crown(models.version(1))
    monkeypatch.setattr(promotion, "_judge", slow)
    with pytest.raises(UserError, match="another version has become champion meanwhile"):
        judge("version=4")
    assert champion(models) == 3


def test_two_promotions_on_a_machine_follow_each_other(outputs, models, judge, monkeypatch):
    entered = threading.Event()
    monkeypatch.setattr(promotion, "_promote", lambda *_: entered.set())
    with locked(outputs / ".promote.lock"):
        second = threading.Thread(target=judge, args=["version=2"])
        second.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    second.join()


def test_the_gate_compares_the_gaps_of_the_labels_without_label_noise():
    best = {"gap_acc": -0.3, "gap_acc_low": -0.4, "gap_acc_high": -0.2}
    clean = {"gap_acc_clean": 0.02, "gap_acc_clean_low": 0.01, "gap_acc_clean_high": 0.03}
    assert _gap(SimpleNamespace(result={"best": best})) == Gap(-0.3, -0.4, -0.2)
    assert _gap(SimpleNamespace(result={"best": best | clean})) == Gap(0.02, 0.01, 0.03)
