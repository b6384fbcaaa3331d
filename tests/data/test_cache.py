import gzip
import hashlib
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from conftest import composed
from killing import differences
from PIL import Image
from torchvision import datasets

from gaplab.data import cache as caches
from gaplab.data import datamodule
from gaplab.data.cache import KEPT, cached
from gaplab.data.datamodule import build_datamodule
from gaplab.data.resident import Resident


@pytest.fixture
def calls(monkeypatch):
    """How often data were decoded."""
    found = []
    for name in ("load_dataset", "load_pictures"):
        original = getattr(datamodule, name)
        monkeypatch.setattr(datamodule, name, lambda *args, load=original: found.append(0) or load(*args))
    return found


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """The root of 40 + 20 small pictures in the archives of MNIST."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte.gz", pixels), (f"{part}-labels-idx1-ubyte.gz", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
            content = gzip.compress(header + array.tobytes())
            (raw / name).write_bytes(content)
            resources.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return tmp_path / "data"


def of_mnist(root, cache):
    keys = ["data.num_train=null", "data.train_size=20", "data.valid_size=10"]
    return build_datamodule(composed(f"data.root={root}", *keys).data, seed=0, cache=cache)


def of_folder(root, cache, *overrides):
    keys = ["data=image_folder", f"data.root='{root}'", "data.workers=0", "data.image_size=16", *overrides]
    return build_datamodule(composed(*keys).data, seed=0, cache=cache)


def entries(cache):
    return [path for path in cache.glob("*") if path.is_dir()]


def assert_same(one, other):
    assert one.classes == other.classes
    assert torch.equal(one.mean, other.mean)
    for name, part in one.splits.items():
        assert torch.equal(part.indices, other.splits[name].indices)
        assert torch.equal(part.source.pixels, other.splits[name].source.pixels)
        assert torch.equal(part.source.labels, other.splits[name].source.labels)
        assert part.source.digest() == other.splits[name].source.digest()


def made(number=0, count=3):
    return [Resident(torch.full((count, 1, 2, 2), number, dtype=torch.uint8), torch.arange(count) % 2)], {
        "classes": ["a", "b"]
    }


@pytest.fixture
def entry(tmp_path):
    """The folder of one entry, and a function that asks for it: what it gives, and whether that was made anew."""
    (tmp_path / "file").write_text("x")

    def ask():
        fresh = []
        sources, names = cached(
            tmp_path / "cache", [], tmp_path, lambda: [tmp_path / "file"], lambda: fresh.append(0) or made(7)
        )
        assert names == {"classes": ["a", "b"]}
        assert torch.equal(sources[0].pixels, made(7)[0][0].pixels)
        assert torch.equal(sources[0].labels, made(7)[0][0].labels)
        return bool(fresh)

    assert ask()
    (folder,) = entries(tmp_path / "cache")
    return folder, ask


def test_a_second_run_decodes_nothing_and_has_the_same_bits(mnist, tmp_path, calls, monkeypatch):
    plain = of_mnist(mnist, None)
    for path in (mnist / "MNIST" / "raw").glob("*ubyte"):
        path.unlink()  # so that the first run unpacks
    first = of_mnist(mnist, tmp_path / "cache")
    assert len(calls) == 2
    monkeypatch.setattr(datasets.MNIST, "__init__", None)
    second = of_mnist(mnist, tmp_path / "cache")
    assert len(calls) == 2
    assert_same(plain, first)
    assert_same(plain, second)


def test_a_folder_comes_back_without_its_broken_pictures(picture_folder, tmp_path, calls, caplog):
    (picture_folder / "дубы" / "broken.png").write_text("no picture")
    found = [of_folder(picture_folder, cache, "data.skip_broken=true") for cache in (None, *[tmp_path / "cache"] * 2)]
    assert len(calls) == 2
    assert caplog.text.count("left out") == 3
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_streamed_pictures_are_not_kept(picture_folder, tmp_path):
    of_folder(picture_folder, tmp_path / "cache", "data.memory_budget_gb=0")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["content", "added", "removed", "time", "rewritten", "size", "channels"])
def test_whatever_decides_the_pixels_makes_another_entry(picture_folder, tmp_path, calls, change):
    of_folder(picture_folder, tmp_path / "cache")
    one = min((picture_folder / "дубы").glob("*.png"))
    keys = []
    if change == "content":
        Image.new("L", (20, 20)).save(one)
    elif change == "added":
        shutil.copy(one, one.with_name("new.png"))
    elif change == "removed":
        one.unlink()
    elif change == "time":
        os.utime(one)
    elif change == "rewritten":  # with its time put back, as tools that copy or unpack do
        before = one.stat()
        one.write_bytes(one.read_bytes())
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        keys = ["data.image_size=20"] if change == "size" else ["data.channels=1"]
    of_folder(picture_folder, tmp_path / "cache", *keys)
    assert len(calls) == 2


def test_files_that_change_while_they_are_read_are_not_kept(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    cached(tmp_path / "cache", [], tmp_path, lambda: [path], lambda: (path.write_text("other"), made())[1])
    assert entries(tmp_path / "cache") == []


def test_a_data_set_of_ones_own_is_not_kept(tmp_path):
    fresh = []
    for _ in range(2):
        cached(tmp_path / "cache", [], tmp_path, lambda: [], lambda: fresh.append(0) or made())
    assert len(fresh) == 2


def flip(folder):
    content = bytearray((folder / "pixels.bin").read_bytes())
    content[5] ^= 1
    (folder / "pixels.bin").write_bytes(content)


DAMAGES = {
    "a bit": flip,
    "cut off": lambda folder: os.truncate(folder / "pixels.bin", 9),
    "no pixels": lambda folder: (folder / "pixels.bin").unlink(),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "no json": lambda folder: (folder / "index.json").write_text("{"),
    "a list": lambda folder: (folder / "index.json").write_text("[]"),
    "a class name": lambda folder: (folder / "index.json").write_text(
        (folder / "index.json").read_text().replace('"a"', '"c"')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew_with_a_word(entry, caplog, damage):
    folder, ask = entry
    DAMAGES[damage](folder)
    assert ask()
    assert len(caplog.records) == 1
    assert not ask()


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": [[10**15, 3, 1024, 1024]]},
        {"shapes": [[3, 1, 2]]},
        {"shapes": [[True, 36, 1, 1]]},
        {"shapes": [[-3, 1, -2, 2]]},
        {"shapes": [[3.0, 1, 2, 2]]},
        {"shapes": 5},
        {"shapes": ["abcd"]},
        {"shapes": None, "digests": {}},
        {"shapes": [[3, 1, 2, 2], [1, 1, 1, 1]]},
        {"digests": []},
        {"digests": [None]},
        {"names": []},
        {"names": {"classes": "ab"}},
        {"names": {"classes": ["a", 5]}},
        {"names": {"classes": ["a"]}},  # fewer than labels
        {"names": {}},
    ],
)
def test_an_index_made_up_by_somebody_is_refused(entry, caplog, change):
    folder, ask = entry
    index = json.loads((folder / "index.json").read_text()) | change
    del index["checksum"]
    index["checksum"] = caches._hash([folder.name, index])
    (folder / "index.json").write_text(json.dumps(index))
    assert ask()
    assert len(caplog.records) == 1
    assert not ask()


def test_an_entry_under_another_name_is_refused(entry, tmp_path, caplog):
    folder, ask = entry
    (tmp_path / "file").write_text("other")
    assert ask()
    (other,) = (path for path in entries(folder.parent) if path != folder)
    shutil.rmtree(other)
    shutil.copytree(folder, other)
    assert ask()
    assert len(caplog.records) == 1


def fail(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["os.fsync", "os.rename", "shutil.disk_usage", "pathlib.Path.mkdir"])
def test_a_full_disk_is_done_without_and_keeps_nothing(tmp_path, monkeypatch, caplog, name):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(name, fail)
    sources, _ = cached(tmp_path / "cache", [], tmp_path, lambda: [tmp_path / "file"], made)
    assert len(sources[0].labels) == 3
    assert entries(tmp_path / "cache") == []
    assert caplog.text == ""


def test_the_last_room_on_a_disk_is_left_to_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 50))
    cached(tmp_path / "cache", [], tmp_path, lambda: [tmp_path / "file"], made)
    assert entries(tmp_path / "cache") == []


def test_a_file_in_the_place_of_the_folder_is_done_without(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        assert cached(tmp_path / "cache", [], tmp_path, lambda: [tmp_path / "cache"], made)
    assert (tmp_path / "cache").read_text() == "in the way"


@pytest.mark.parametrize("locks", [True, False])
def test_of_several_at_once_one_decodes_and_all_have_the_same(tmp_path, monkeypatch, locks):
    (tmp_path / "file").write_text("x")
    if not locks:
        monkeypatch.setattr("filelock.FileLock.acquire", fail)
    fresh, found, barrier = [], [], threading.Barrier(6)

    def work():
        barrier.wait()
        found.append(
            cached(
                tmp_path / "cache",
                [],
                tmp_path,
                lambda: [tmp_path / "file"],
                lambda: fresh.append(0) or made(9, 5000),
            )
        )

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len({sources[0].digest() for sources, _ in found}) == 1
    assert len(fresh) == 1 or not locks
    assert len(entries(tmp_path / "cache")) == 1


def test_the_entries_used_last_are_kept(tmp_path):
    (tmp_path / "file").write_text("x")
    fresh = []

    def ask(number):
        cached(
            tmp_path / "cache",
            [number],
            tmp_path,
            lambda: [tmp_path / "file"],
            lambda: fresh.append(number) or made(number),
        )

    for number in range(KEPT):
        ask(number)
    ask(0)
    mapped, _ = cached(tmp_path / "cache", [1], tmp_path, lambda: [tmp_path / "file"], made)
    for folder in entries(tmp_path / "cache"):
        if json.loads((folder / "index.json").read_text())["digests"] == [mapped[0].digest()]:
            os.utime(folder, (1, 1))
    ask(KEPT)
    assert len(entries(tmp_path / "cache")) == KEPT
    assert torch.equal(mapped[0].pixels, made(1)[0][0].pixels)  # whoever has it mapped keeps it
    fresh.clear()
    ask(0)
    ask(KEPT)
    assert fresh == []
    ask(1)
    assert fresh == [1]


def test_folders_that_others_are_writing_do_not_push_an_entry_out(entry, tmp_path):
    folder, ask = entry
    for number in range(2 * KEPT):
        (tmp_path / "cache" / f"{folder.name}-{number:032x}").mkdir()
    os.utime(folder, (1, 1))
    cached(tmp_path / "cache", ["another"], tmp_path, lambda: [tmp_path / "file"], made)
    assert not ask()
    assert len(entries(tmp_path / "cache")) == 2 * KEPT + 2


def test_what_a_killed_writer_left_is_dropped_after_a_day(entry, tmp_path):
    folder, ask = entry
    left = tmp_path / "cache" / f"{folder.name}-{0:032x}"
    left.mkdir()
    for hours, there in ((23, True), (25, False)):
        os.utime(left, (time.time() - hours * 3600,) * 2)
        cached(tmp_path / "cache", [hours], tmp_path, lambda: [tmp_path / "file"], made)
        assert left.exists() == there
    assert not ask()


def test_what_is_written_to_the_pixels_stays_in_memory(entry, tmp_path):
    folder, ask = entry
    sources, _ = cached(tmp_path / "cache", [], tmp_path, lambda: [tmp_path / "file"], made)
    sources[0].pixels.zero_()
    assert not ask()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "pixels.bin"]


def test_a_run_is_the_same_with_a_cache_and_without(run, monkeypatch, calls):
    keys = ["model.bn=true", "data.train_size=300", "data.valid_size=100", "data.augment=flip", "data.label_noise=0.1"]
    (_, first), (_, second) = run(*keys), run(*keys)
    assert len(calls) == 1
    monkeypatch.setattr("gaplab.worker.build_datamodule", lambda *args: build_datamodule(*args[:6]))
    _, without = run(*keys)
    assert len(calls) == 2
    assert differences(first, without) == []
    assert differences(second, without) == []
