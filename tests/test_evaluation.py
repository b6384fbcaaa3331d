"""What an evaluation says is what an independent count finds."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import DIGITS, assert_refused, composed, typed
from hydra import compose, initialize_config_dir
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from gaplab import config as configs
from gaplab import stats
from gaplab.errors import UserError
from gaplab.evaluation import Answers, answer, compare, evaluate, evaluation, pair
from gaplab.metrics import Score, gap, paired_difference
from gaplab.trained import load_run

DATA = ["data=mnist", f"data.root={DIGITS}", "data.num_train=4000"]


def settings(outputs, *words):
    with initialize_config_dir(str(configs.PROJECT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", ["tracking=none", f"paths.outputs={outputs}", *words])
    return configs.evaluate_from_hydra(cfg, words)


@pytest.fixture(scope="module")
def outputs(trained_runs):
    return trained_runs[0].parents[1]


def raw(name, offset):
    return np.fromfile(DIGITS / "MNIST" / "raw" / f"{name}-ubyte", np.uint8, offset=offset)


def test_every_split_equals_an_independent_count(trained_runs, outputs):
    folder, _ = trained_runs
    network = load_run(str(folder), outputs, None)
    official = raw("train-images-idx3", 16).reshape(-1, 1, 28, 28), raw("train-labels-idx1", 8)
    test = raw("t10k-images-idx3", 16).reshape(-1, 1, 28, 28), raw("t10k-labels-idx1", 8)
    splits = np.load(folder / "splits.npz")
    result = json.loads((folder / "result.json").read_text())
    for split, images, labels in (
        ("train", official[0][splits["train"]], official[1][splits["train"]]),
        ("valid", official[0][splits["valid"]], official[1][splits["valid"]]),
        ("test", *test),
    ):
        found = evaluate(settings(outputs, f"run={folder}", f"split={split}"))
        said = json.loads((found / "evaluation.json").read_text())
        answers = network.probabilities(torch.from_numpy(images.copy())).argmax(1).numpy()
        assert said["correct"] == int((answers == labels).sum())
        assert said["total"] == len(labels)
        known = result["test_acc"] if split == "test" else result["best"][f"{split}_acc"]
        assert said["acc"] == known
        for number, one in enumerate(said["recall"]):
            assert one["total"] == int((labels == number).sum())
            assert one["correct"] == int(((labels == number) & (answers == number)).sum())
        counts = np.zeros((10, 10), int)
        np.add.at(counts, (labels, answers), 1)
        assert said["confusion"] == counts.tolist()
        saved = np.load(found / "answers.npz")
        assert np.array_equal(saved["labels"], labels)
        assert np.array_equal(saved["probabilities"].argmax(1), answers)
        assert (found / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_loss_equals_the_runs_own(trained_runs, outputs):
    folder, _ = trained_runs
    said = json.loads((evaluate(settings(outputs, f"run={folder}")) / "evaluation.json").read_text())
    assert said["loss"] == pytest.approx(json.loads((folder / "result.json").read_text())["test_loss"], rel=1e-5)


def test_calibration_error_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    found = evaluation(Answers(probabilities, torch.tensor([0, 1, 1, 1])), ["a", "b"])
    # bins of 1/15: 0.9 twice, half of them right; 0.7 once and 0.6 once, both right
    assert found.ece == pytest.approx((2 * abs(0.9 - 0.5) + 0.3 + 0.4) / 4, abs=1e-6)
    assert (found.correct, found.total) == (3, 4)
    assert found.recall[0].recall == 1.0
    assert found.recall[1].recall == pytest.approx(2 / 3)


def test_a_class_without_samples_has_no_recall():
    found = evaluation(Answers(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0])), ["a", "b", "c"])
    assert [one.recall for one in found.recall] == [1.0, None, None]


@pytest.mark.parametrize("seed", range(20))
def test_mcnemar_equals_statsmodels(seed):
    only_first, only_second = np.random.default_rng(seed).integers(0, 60, 2).tolist()
    expected = statsmodels_mcnemar([[500, only_first], [only_second, 20]], exact=True).pvalue
    assert stats.mcnemar(only_first, only_second) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_mcnemar_without_any_difference_is_one():
    assert stats.mcnemar(0, 0) == 1.0


@pytest.mark.parametrize("counts", [(50, 3, 9, 4), (0, 0, 0, 9), (90, 0, 0, 10), (0, 7, 5, 0), (9, 1, 0, 0)])
def test_the_interval_of_a_paired_difference(counts):
    both, only_first, only_second, neither = counts
    found = paired_difference(*counts)
    assert found.acc == pytest.approx((only_second - only_first) / sum(counts))
    assert -1 <= found.low <= found.acc <= found.high <= 1
    mirrored = paired_difference(both, only_second, only_first, neither)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_of_answers_that_do_not_go_together_it_is_the_interval_of_two_independent_samples():
    # 40 % and 60 % right, independently: phi is 0
    found = paired_difference(24, 16, 36, 24)
    expected = gap(Score(60, 100, 0.0), Score(40, 100, 0.0))
    assert (found.acc, found.low, found.high) == pytest.approx((expected.acc, expected.low, expected.high))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    chances = [0.88, 0.02, 0.06, 0.04]
    found = [paired_difference(*map(int, counts)) for counts in rng.multinomial(400, chances, 4000)]
    held = np.mean([one.low <= 0.04 <= one.high for one in found])
    assert 0.94 <= held <= 0.97


def test_two_runs_on_the_same_samples(trained_runs, outputs, capsys):
    one, other = trained_runs
    said = json.loads((evaluate(settings(outputs, f"run={one}", f"against={other}")) / "evaluation.json").read_text())
    paired = said["against"]
    first, second = (json.loads((folder / "result.json").read_text())["test_acc"] for folder in (one, other))
    assert (paired["second_acc"], paired["first_acc"]) == (first, second)  # the one that it is held against is first
    assert paired["difference"] == pytest.approx(first - second)
    assert paired["both"] + paired["only_first"] + paired["only_second"] + paired["neither"] == 2000
    assert paired["p"] == stats.mcnemar(paired["only_first"], paired["only_second"])
    assert said["notes"] == []
    assert f"{100 * (first - second):+.2f} pp" in capsys.readouterr().out


def test_who_was_trained_on_the_samples_is_said(trained_runs, outputs):
    one, other = trained_runs
    found = evaluate(settings(outputs, f"run={one}", f"against={other}", "split=valid"))
    mine, theirs = (np.load(folder / "splits.npz") for folder in (one, other))
    seen = len(np.intersect1d(mine["valid"], theirs["train"]))
    assert seen > 0
    (note,) = json.loads((found / "evaluation.json").read_text())["notes"]
    assert f"was trained on {seen:,} of these 500 samples" in note


def said_of(outputs, *words):
    return json.loads((evaluate(settings(outputs, *words)) / "evaluation.json").read_text())


def test_the_samples_that_a_network_was_trained_on_are_counted_in_another_split_of_the_same_data(
    trained_runs, outputs, capsys
):
    words = [*DATA, "data.valid_size=2000"]  # the first 2 000 of the order whose first 500 were valid, 1 000 then train
    said = said_of(outputs, f"run={trained_runs[0]}", "split=valid", *words)
    assert said["trained_on"] == 1000
    (note,) = said["notes"]
    assert re.fullmatch(r"mlp bn s. was trained on 1,000 of these 2,000 samples", note)
    assert f"note: {said['notes'][0]}\n" in capsys.readouterr().out


def test_they_are_found_by_their_pixels_in_other_data(trained_runs, outputs, tmp_path):
    from PIL import Image

    images, labels = raw("train-images-idx3", 16).reshape(-1, 28, 28), raw("train-labels-idx1", 8)
    splits = np.load(trained_runs[0] / "splits.npz")
    for part, indices in {"test": [*splits["train"][:30], *splits["valid"][:20]], "train": splits["valid"]}.items():
        for index in indices:
            folder = tmp_path / part / str(labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / f"{index}.png")
    for label in range(10):
        (tmp_path / "test" / str(label)).mkdir(exist_ok=True)
        if not any((tmp_path / "test" / str(label)).iterdir()):
            index = next(index for index in splits["valid"][20:] if labels[index] == label)
            Image.fromarray(images[index]).save(tmp_path / "test" / str(label) / f"{index}.png")
    words = ["data=image_folder", f"data.root={tmp_path}", "data.image_size=28", "data.channels=1", "data.workers=0"]
    said = said_of(outputs, f"run={trained_runs[0]}", f"against={trained_runs[1]}", *words)
    theirs = np.isin(
        [int(path.stem) for path in tmp_path.glob("test/*/*")], np.load(trained_runs[1] / "splits.npz")["train"]
    )
    assert (said["trained_on"], said["against"]["trained_on"]) == (30, theirs.sum())


def test_what_is_not_known_is_told(trained_runs, outputs, tmp_path):
    folder = tmp_path / "runs" / "one"
    shutil.copytree(trained_runs[0], folder)
    (folder / "splits.npz").write_bytes(b"cut off")
    said = said_of(tmp_path, "split=valid")
    assert said["trained_on"] is None
    assert re.match(r"not known whether mlp bn s. was trained on samples of this split: ", said["notes"][0])
    said = said_of(tmp_path)
    assert (said["trained_on"], said["notes"]) == (0, [])


def test_label_noise_in_the_samples_is_noted_with_the_accuracy_against_the_labels_without_it(trained_runs, outputs):
    words = [f"run={trained_runs[0]}", "split=train", *DATA, "data.train_size=1000", "data.valid_size=500"]
    clean, noisy = (
        json.loads((evaluate(settings(outputs, *words, f"data.label_noise={share}")) / "evaluation.json").read_text())
        for share in (0, 0.3)
    )
    assert clean["acc"] - noisy["acc"] > 0.2
    (note,) = [note for note in noisy["notes"] if "label_noise" in note]
    assert note.startswith("300 of these labels are wrong")
    assert note.endswith(f"the accuracy is {clean['acc']:.4f}")
    assert not any("label_noise" in note for note in clean["notes"])


def test_a_network_beside_itself_differs_in_nothing(trained_runs, outputs):
    network = load_run(str(trained_runs[0]), outputs, None)
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    batches = [(images[:40], torch.zeros(40, dtype=torch.int64)), (images[40:], torch.ones(24, dtype=torch.int64))]
    found = compare(network, network, batches)
    assert (found.only_first, found.only_second, found.p, found.difference) == (0, 0, 1.0, 0.0)
    assert found.total == 64
    assert pair(answer(network, batches), answer(network, batches)) == found


def test_other_data_of_the_same_shape(trained_runs, outputs, tmp_path):
    raw_files = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(DIGITS / "MNIST" / "raw", raw_files)
    from torchvision import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.FashionMNIST, "resources", datasets.MNIST.resources)
        words = [f"run={trained_runs[0]}", "data=fashion_mnist", f"data.root={tmp_path}", "data.num_train=4000"]
        words += ["data.valid_size=500"]
        said = json.loads((evaluate(settings(outputs, *words)) / "evaluation.json").read_text())
    assert said["samples"] == "fashion_mnist, test split"
    assert said["acc"] == json.loads((trained_runs[0] / "result.json").read_text())["test_acc"]  # they are MNIST's


def test_data_of_another_shape_or_without_a_test_part_are_refused(trained_runs, outputs, picture_folder):
    words = [f"run={trained_runs[0]}", "data=image_folder", f"data.root='{picture_folder}'", "data.workers=0"]
    with pytest.raises(UserError, match=r"data=image_folder: pictures of 3x64x64, and mlp bn s\d takes 1x28x28"):
        evaluate(settings(outputs, *words))
    with pytest.raises(UserError, match=r"2 classes, and mlp bn s\d knows 10"):
        evaluate(settings(outputs, *words, "data.channels=1", "data.image_size=28"))


def test_the_latest_run_is_evaluated_even_if_it_is_a_job(trained_runs, outputs, tmp_path, capsys):
    assert load_run("latest", outputs, None).folder == trained_runs[1]
    job = tmp_path / "sweeps" / "s" / "3_seed=0"
    shutil.copytree(trained_runs[0], job)
    (job.parent / "sweep.json").write_text("{}")
    assert load_run("latest", tmp_path, None).folder == job
    assert capsys.readouterr().err.endswith("run=latest is sweeps/s/3_seed=0\n")


def test_damaged_weights_are_named(trained_runs, tmp_path):
    shutil.copytree(trained_runs[0], tmp_path / "runs" / "one")
    with (tmp_path / "runs" / "one" / "checkpoints" / "best.ckpt").open("r+b") as file:
        file.seek(2000)
        file.write(b"xxxx")
    with pytest.raises(UserError, match=r"best\.ckpt: damaged"):
        load_run("one", tmp_path, None)


def test_weights_of_another_network_are_named(trained_runs, tmp_path):
    shutil.copytree(trained_runs[0], tmp_path / "runs" / "one")
    config = composed("model.hidden_dims=[32]", "model.bn=true", f"paths.outputs={tmp_path}")
    (tmp_path / "runs" / "one" / "config.yaml").write_text(configs.to_yaml(config))
    with pytest.raises(UserError, match=r"best\.ckpt: not of the network that config.yaml says"):
        load_run("one", tmp_path, None)


REFUSED = {
    "run=nothing": "run=nothing: no run there",
    "model_uri=gaplab": "model=gaplab: the registry is in MLflow",
    "run=00000000000000000000000000000000": "no folder of it here",
    "against=nothing": "nothing: no run there",
    "split=all": "split=all: choose one of train, valid, test",
    "run=latest,model_uri=models:/x/1": "run and model: one of them",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named(outputs, words):
    with pytest.raises(UserError, match=re.escape(REFUSED[words])):
        evaluate(settings(outputs, *words.split(",")))


def test_bad_input_is_one_line(outputs, tmp_path):
    where = "tracking=none", f"paths.outputs={outputs}"
    assert_refused(typed("evaluate", *where, "run=nothing (1)", cwd=tmp_path), "run=nothing (1): no run there")


def test_classes_of_the_same_name_in_another_place_are_refused(trained_runs, outputs, tmp_path):
    from PIL import Image

    for name in "123456789x":
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(np.full((28, 28), number, np.uint8)).save(tmp_path / name / f"{number}.png")
    words = [f"data.root={tmp_path}", "data.image_size=28", "data.channels=1", "data.valid_size=2", "data.workers=0"]
    with pytest.raises(UserError, match=r"class 1 stands where mlp bn s. has 0; number the classes alike: 0, 1, 2"):
        evaluate(settings(outputs, f"run={trained_runs[0]}", "split=train", "data=image_folder", *words))
