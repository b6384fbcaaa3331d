import hashlib
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import DIGITS, SMALL, composed
from PIL import Image, ImageOps
from scipy.io import savemat
from torch.utils.data import Dataset
from torchvision import datasets

from gaplab.config import PROJECT
from gaplab.data.datamodule import build_datamodule
from gaplab.data.datasets import load_dataset, notes_on, to_tensors
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


@pytest.fixture
def digits_on_disk(tmp_path, monkeypatch):
    """The root of 400 + 100 pictures of MNIST in its own format, small enough to be read one by one."""
    whole = datasets.MNIST(DIGITS)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, place in (("train", slice(400)), ("t10k", slice(400, 500))):
        for name, array in (("images-idx3", whole.data[place].numpy()), ("labels-idx1", whole.targets[place].numpy())):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    monkeypatch.setattr(datasets.MNIST, "_check_exists", lambda _: True)
    monkeypatch.setattr(datasets.MNIST, "raw_folder", str(raw))
    return tmp_path


class Parity(datasets.MNIST):
    """Odd or even."""

    classes = ("even", "odd")

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label % 2


class Inverted(datasets.MNIST):
    def __init__(self, root, train=True, download=False):
        super().__init__(root, train, transform=ImageOps.invert, target_transform=lambda label: 9 - label)


class Half(datasets.MNIST):
    def __len__(self):
        return len(self.data) // 2


class Noisy(datasets.MNIST):
    """Mirrors half of what is read of one part."""

    part = True

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (ImageOps.mirror(image) if self.train == self.part and random.random() < 0.5 else image), label


class NoisyTest(Noisy):
    part = False


class Filtered(datasets.MNIST):
    """Plain: what torchvision's own methods see is changed."""

    def __init__(self, root, train=True, download=False):
        super().__init__(root, train)
        few = self.targets < 2
        self.data, self.targets = self.data[few], self.targets[few]


def fake_init(self, _root):
    self.data, self.labels = torch.zeros(2, 5, 6, dtype=torch.uint8), torch.tensor([9, 0])
    self.transform = self.target_transform = None


def own(root, kind):
    return load(root, f"{__name__}.{kind.__name__}", allowed=[__name__.partition(".")[0]])


def test_what_a_users_getitem_makes_of_the_labels_is_trained(digits_on_disk):
    digits = load(digits_on_disk)
    parity = own(digits_on_disk, Parity)
    for before, after in zip(digits[:2], parity[:2], strict=True):
        assert torch.equal(after.labels, before.labels % 2)
        assert torch.equal(after.pixels, before.pixels)
    assert parity[2] == ["even", "odd"]


def test_transforms_that_a_users_class_sets_are_applied(digits_on_disk):
    digits, inverted = load(digits_on_disk), own(digits_on_disk, Inverted)
    for before, after in zip(digits[:2], inverted[:2], strict=True):
        assert torch.equal(after.labels, 9 - before.labels)
        assert torch.equal(after.pixels, 255 - before.pixels)


def test_a_users_length_counts(digits_on_disk):
    train, test, _ = own(digits_on_disk, Half)
    assert (len(train.pixels), len(train.labels), len(test.labels)) == (200, 200, 50)


@pytest.mark.parametrize("kind", [Noisy, NoisyTest])
def test_a_random_getitem_is_refused_with_the_place_for_augmentation(digits_on_disk, kind):
    with pytest.raises(
        UserError, match=rf"{kind.__name__} gives another sample \d+ when it is read again.*data\.augment"
    ):
        own(digits_on_disk, kind)


def test_a_class_that_changes_only_its_arrays_is_read_the_short_way(digits_on_disk, monkeypatch):
    monkeypatch.setattr("gaplab.data.datasets._read", None)
    train, _, _ = own(digits_on_disk, Filtered)
    assert train.labels.unique().tolist() == [0, 1]


def test_arrays_that_are_not_what_is_read_are_not_used(digits_on_disk, monkeypatch):
    # as QMNIST, whose targets have eight columns, and whatever torchvision comes to store
    monkeypatch.setattr(datasets.MNIST, "targets", property(lambda self: (self.labels + 1) % 10), raising=False)
    monkeypatch.setattr(datasets.MNIST, "__init__", fake_init)
    found = to_tensors(datasets.MNIST(None))
    assert found.labels.tolist() == [0, 1]


def test_classes_without_a_training_picture_are_named(digits_on_disk):
    train, test, classes = own(digits_on_disk, Filtered)
    (line,) = notes_on(train, test, classes, "mine")
    assert line == "mine: 8 of its 10 `classes` have no training picture: 2, 3, 4, 5, 6, …"


class Given(Dataset):
    """Samples as they are given."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


GREY = np.zeros((5, 6), np.uint8)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ((GREY, "3"), "gives sample 0 the label '3', not a whole number"),
        ((GREY, 0.7), "the label 0.7, not a whole number"),
        ((GREY, torch.tensor(0.7)), r"the label tensor\(0.7"),
        ((GREY, [0, 1, 0]), r"the label \[0, 1, 0\]"),
        ((GREY / 255, 3), "torch.float64 .* not uint8 pictures; return PIL .* without ToTensor"),
        ((Image.new("P", (6, 5)), 3), "PIL pictures of mode P"),
        ((Image.new("1", (6, 5)), 3), "PIL pictures of mode 1"),
        ((torch.zeros(32, 32, 3, dtype=torch.uint8), 0), r"channels in the wrong place: tensors are \(C, H, W\)"),
        ((np.zeros((3, 32, 32), np.uint8), 0), r"channels in the wrong place"),
    ],
)
def test_samples_that_would_be_misread_are_refused(sample, reason):
    with pytest.raises(UserError, match=rf"data\._target_: Given .*{reason}"):
        to_tensors(Given(sample, sample))


@pytest.mark.parametrize("label", [3, True, np.int16(3), np.array([3]), torch.tensor(3), torch.tensor([3])])
def test_labels_may_be_any_whole_number(label):
    found = to_tensors(Given((torch.zeros(5, 6, dtype=torch.uint8), label)))
    assert found.pixels.shape == (1, 1, 5, 6)
    assert found.labels.tolist() == [int(np.ravel(label)[0])]


class Two(Given):
    """The classes and the pictures of a part."""

    def __init__(self, classes, side):
        super().__init__((np.zeros((side, side), np.uint8), 0), (np.zeros((side, side), np.uint8), 1))
        self.classes = classes


@pytest.mark.parametrize(
    ("classes", "side", "reason"),
    [
        (["b", "a"], 4, r"names other classes in its training part, \['a', 'b'\], than in its test part, \['b', 'a'\]"),
        (["a", "b"], 5, r"training pictures of \(1, 4, 4\), test ones of \(1, 5, 5\)"),
    ],
)
def test_parts_that_do_not_match_are_refused(tmp_path, classes, side, reason):
    kwargs = {"classes": ["a", "b"], "side": 4}, {"classes": classes, "side": side}
    with pytest.raises(UserError, match=reason):
        load(tmp_path, f"{__name__}.Two", *kwargs, allowed=[__name__.partition(".")[0]])


def test_statistics_come_from_the_train_split_alone():
    data = build_datamodule(composed(*SMALL, "data.train_size=500").data, seed=0)
    train = data.splits["train"]
    pixels = train.source.pixels[train.indices].double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0), rtol=0, atol=1e-12)
    centred = build_datamodule(composed(*SMALL, "data.train_size=500", "data.normalize=center").data, seed=0)
    assert torch.equal(centred.mean, data.mean)
    assert centred.std.tolist() == [1.0]


def test_a_sample_is_the_same_pictures_every_time_spread_over_the_split():
    data = build_datamodule(composed(*SMALL, "data.train_size=700", "data.valid_size=100").data, seed=0)
    train = data.splits["train"]
    assert torch.equal(data.sample("train", 70), train.source.pixels[train.indices[::10]])
    assert torch.equal(data.sample("train", 70), data.sample("train", 70))
    assert data.sample("valid", 256).shape == (100, 1, 28, 28)


def test_splits_of_an_earlier_attempt_are_kept_and_others_end_the_run(tmp_path):
    keys = ["data.train_size=100", "data.valid_size=50"]
    data, other = (build_datamodule(composed(*SMALL, *keys).data, seed) for seed in (0, 1))
    path = tmp_path / "splits.npz"
    data.save_splits(path)
    first = path.read_bytes()
    data.save_splits(path)
    with pytest.raises(
        UserError, match=r"splits\.npz: the run was trained on other samples than its config selects now"
    ):
        other.save_splits(path)
    assert path.read_bytes() == first
    path.write_bytes(first[:300])
    with pytest.raises(UserError, match=r"splits\.npz: cannot be read"):
        data.save_splits(path)
    assert [file.name for file in tmp_path.iterdir()] == ["splits.npz"]


def test_every_sample_of_each_split_is_read_once():
    data = build_datamodule(
        composed(*SMALL, "data.train_size=1001", "data.valid_size=333", "data.label_noise=0.5").data, seed=0
    )
    labels = {name: torch.cat([labels for _, labels in data.batches(name)]) for name in data.splits}
    assert {name: len(found) for name, found in labels.items()} == {"train": 1001, "valid": 333, "test": 2000}
    trained = torch.cat([labels for chunk in data.train_dataloader() for _, labels in chunk])
    assert torch.bincount(trained).tolist() == torch.bincount(labels["train"]).tolist()  # the noise is in both
    clean = data.splits["train"].source.labels[data.splits["train"].indices]
    assert int((clean != labels["train"]).sum()) == 500
