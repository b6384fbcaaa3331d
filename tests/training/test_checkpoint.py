import os
import subprocess
import zipfile

import pytest
import torch

from gaplab.errors import UserError
from gaplab.training.checkpoint import ChecksumIO, let_last_be_best
from gaplab.training.reader import read_checkpoint

VALUES = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 2, "name": "é"}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_comes_back_and_its_checksum_is_sha256sums(tmp_path):
    ChecksumIO().save_checkpoint(VALUES, tmp_path / "sub" / "best.ckpt")
    found = read_checkpoint(tmp_path / "sub" / "best.ckpt")
    assert torch.equal(found["state_dict"]["weight"], VALUES["state_dict"]["weight"])
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["best.ckpt", "best.ckpt.sha256"]
    subprocess.run(["sha256sum", "--check", "--quiet", "best.ckpt.sha256"], cwd=tmp_path / "sub", check=True)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "best.ckpt"
    ChecksumIO().save_checkpoint(VALUES, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"best\.ckpt: damaged"):
        read_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"state_dict": Bomb(str(tmp_path / "exploded"))}, tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match=r"bomb\.ckpt: holds more than plain values"):
        read_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    ChecksumIO().save_checkpoint(VALUES, path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gaplab.training.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ChecksumIO().save_checkpoint(VALUES | {"epoch": 3}, path)
    assert read_checkpoint(path)["epoch"] == 2
    assert sorted(found.name for found in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_a_best_checkpoint_becomes_the_last_one_too(tmp_path):
    for name, epoch in (("last", 1), ("best", 2)):
        ChecksumIO().save_checkpoint(VALUES | {"epoch": epoch}, tmp_path / f"{name}.ckpt")
    let_last_be_best(tmp_path)
    found = {name: read_checkpoint(tmp_path / f"{name}.ckpt")["epoch"] for name in ("previous", "last", "best")}
    assert found == {"previous": 1, "last": 2, "best": 2}
    subprocess.run(["sha256sum", "--check", "--quiet", "last.ckpt.sha256"], cwd=tmp_path, check=True)
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    assert read_checkpoint(tmp_path / "best.ckpt")["epoch"] == 2  # a file of its own
    assert len(list(tmp_path.iterdir())) == 6


def test_only_stored_entries_are_read(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save(VALUES, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data/1", bytes(10_000_000))
    with pytest.raises(UserError, match=r"bomb\.ckpt: has compressed entries"):
        read_checkpoint(path)


def test_what_is_no_archive_with_named_values_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(VALUES, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint, or cut off"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint, it holds no named values"):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"gone\.ckpt: no such file"):
        read_checkpoint(tmp_path / "gone.ckpt")
