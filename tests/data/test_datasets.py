import hashlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image
from scipy.io import savemat
from torch.utils.data import Dataset
from torchvision import datasets

from gaplab.config import PROJECT
from gaplab.data.datamodule import build_datamodule
from gaplab.data.datasets import load_dataset, to_tensors
from gaplab.errors import UserError

MNIST = ("torchvision.datasets.MNIST", {"train": True}, {"train": False}, ["torchvision"])


def load(root, target=MNIST[0], train=MNIST[1], test=MNIST[2], allowed=MNIST[3]):
    return load_dataset(target, str(root), train, test, allowed)


def test_mnist_is_in_the_project():
    train, test, classes = load(PROJECT / "data")
    assert train.pixels.shape == (60000, 1, 28, 28)
    assert test.pixels.shape == (10000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert classes == list("0123456789")


def test_a_damaged_archive_is_named_and_nothing_is_touched(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (PROJECT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    broken = raw / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz: damaged, its MD5 sum is"):
        load(tmp_path)
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before


def test_data_that_are_not_there_are_one_line(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(UserError, match="MNIST is neither there in a readable form nor to be downloaded") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_cifar_is_read_from_its_own_archive(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    sums = {}
    for number, name in enumerate(names):
        rows = slice(10 * number, 10 * number + 10)
        content = pickle.dumps({"data": pixels[rows], "labels": [number] * 10})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": [f"class {number}" for number in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(meta).hexdigest()})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / "cifar-10-python.tar.gz").read_bytes()).hexdigest())
    train, test, classes = load(tmp_path, "torchvision.datasets.CIFAR10")
    assert torch.equal(train.pixels, torch.from_numpy(pixels[:50].reshape(50, 3, 32, 32)))
    assert test.labels.tolist() == [5] * 10
    assert classes[0] == "class 0"
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: damaged"):
        load(tmp_path, "torchvision.datasets.CIFAR10")


def test_svhn_is_read_with_its_own_arguments(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    split_list = {}
    for part, count in (("train", 7), ("test", 4)):
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.arange(1, count + 1)[:, None]})
        content = (tmp_path / f"{part}_32x32.mat").read_bytes()
        split_list[part] = ["", f"{part}_32x32.mat", hashlib.md5(content).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    data = composed("data=svhn").data
    train, test, _ = load(tmp_path, data._target_, data.train_kwargs, data.test_kwargs)
    assert train.pixels.shape == (7, 3, 32, 32)
    assert test.labels.tolist() == [1, 2, 3, 4]


def test_arguments_that_a_data_set_does_not_take_are_refused(tmp_path):
    # left out, they would make its training part the test part too
    with pytest.raises(UserError, match="unexpected keyword argument 'train'"):
        load(tmp_path, "torchvision.datasets.SVHN", {"train": True}, {"train": False})


class Own(Dataset):
    """A user's data set of PIL pictures."""

    def __init__(self, root, train, size=5):
        self.size = size

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.new("RGB", (self.size if index else 5, 4), (index, 0, 0)), index % 2


def test_any_data_set_of_pictures_is_read_one_by_one():
    found = to_tensors(Own(None, True))
    assert found.pixels.shape == (6, 3, 4, 5)
    assert found.pixels[:, 0, 0, 0].tolist() == list(range(6))
    with pytest.raises(UserError, match="pictures of different sizes"):
        to_tensors(Own(None, True, size=7))


def test_statistics_come_from_the_train_split_alone():
    data = build_datamodule(composed("data.train_size=500").data, seed=0)
    train = data.splits["train"]
    pixels = train.source.pixels[train.indices].double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0), rtol=0, atol=1e-12)
    centred = build_datamodule(composed("data.train_size=500", "data.normalize=center").data, seed=0)
    assert torch.equal(centred.mean, data.mean)
    assert centred.std.tolist() == [1.0]


def test_a_sample_is_the_same_pictures_every_time_spread_over_the_split():
    data = build_datamodule(composed("data.train_size=700", "data.valid_size=100").data, seed=0)
    train = data.splits["train"]
    assert torch.equal(data.sample("train", 70), train.source.pixels[train.indices[::10]])
    assert torch.equal(data.sample("train", 70), data.sample("train", 70))
    assert data.sample("valid", 256).shape == (100, 1, 28, 28)


def test_every_sample_of_each_split_is_read_once():
    data = build_datamodule(
        composed("data.train_size=1001", "data.valid_size=333", "data.label_noise=0.5").data, seed=0
    )
    labels = {name: torch.cat([labels for _, labels in data.batches(name)]) for name in data.splits}
    assert {name: len(found) for name, found in labels.items()} == {"train": 1001, "valid": 333, "test": 10000}
    trained = torch.cat([labels for chunk in data.train_dataloader() for _, labels in chunk])
    assert torch.bincount(trained).tolist() == torch.bincount(labels["train"]).tolist()  # the noise is in both
    clean = data.splits["train"].source.labels[data.splits["train"].indices]
    assert int((clean != labels["train"]).sum()) == 500
