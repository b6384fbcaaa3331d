"""A disk that is full or read-only at any instant of a save, of logging, of the end: the last good checkpoint survives,
the message says what to free, and with room again the run comes to what the undisturbed one does."""

import errno
import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SMALL, composed
from killing import STAGES, differences, run_forked, wait_for

from gaplab.tracking.journal import Tracker
from gaplab.training import checkpoint
from gaplab.training.checkpoint import newest_checkpoint

RUN = [*SMALL, "model.bn=true", "model.dropout=0.3", "data.batch_size=40", "trainer.max_epochs=4", "trainer.threads=1"]
SAVES = [1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41]
WRITES = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of 8 MB."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert wait_for(run_forked(composed(*RUN), folder)) == 0
    return folder


@pytest.fixture(scope="module")
def counts():
    found = {"full": 0, "lost": 0, "equal": 0}
    yield found
    print(
        "\n{full} runs met a full disk, {lost} good checkpoints lost, {equal} equal to the bit afterwards".format(
            **found
        )
    )


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def at_call(number: int, names: tuple[tuple[object, str], ...], then) -> None:
    """Call `then` before the `number`-th call of any of `names`."""
    left = [number]
    for owner, name in names:
        original = getattr(owner, name)

        def called(*args, original=original, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                then()
            return original(*args, **kwargs)

        setattr(owner, name, called)


def in_a_save(number: int, then):
    owners = [(os if "." in stage else checkpoint, stage.rpartition(".")[2]) for stage in STAGES]
    return lambda: at_call(number, tuple(owners), then)


def while_logging(number: int, then):
    return lambda: at_call(number, ((Tracker, "_write"),), then)


@pytest.mark.parametrize(
    ("where", "number"), [(in_a_save, number) for number in SAVES] + [(while_logging, number) for number in WRITES]
)
def test_a_full_disk_costs_no_good_checkpoint(where, number: int, disk: Path, reference: Path, counts, tmp_path):
    for path in sorted(disk.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder = disk / "run"
    config = composed(*RUN)
    said = tmp_path / "said"
    status = wait_for(run_forked(config, folder, where(number, lambda: fill(disk)), said))
    output = said.read_text()
    assert (disk / "filler").exists()
    counts["full"] += 1
    if status != 0:  # a disk that is full at the very end may be noticed by nothing
        path, wrong = newest_checkpoint(folder / "checkpoints")
        complete = [one for one in (folder / "checkpoints").glob("[a-z]*.ckpt") if one.name != "best.ckpt"]
        counts["lost"] += bool(wrong) or (path is None and bool(complete))
        assert wrong == []
        assert "the disk is full" in output or "cannot be written" in output
        assert "free some, then go on with resume=" in output or where is while_logging
    (disk / "filler").unlink()
    assert wait_for(run_forked(config, folder, output=said)) == 0, said.read_text()
    assert differences(folder, reference) == []
    counts["equal"] += 1


@pytest.mark.parametrize("number", [6, 9, 12, 18])
def test_a_disk_that_becomes_read_only(number: int, tmp_path: Path, reference: Path):
    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    folder = tmp_path / "run"
    assert wait_for(run_forked(composed(*RUN), folder, in_a_save(number, refuse))) == 1
    output = (tmp_path / "run.out").read_text()
    assert "the disk has become read-only; make it writable, then go on with resume=" in output
    assert json.loads((folder / "result.json").read_text())["status"] == "FAILED"
    assert newest_checkpoint(folder / "checkpoints")[1] == []
    assert wait_for(run_forked(composed(*RUN), folder)) == 0
    assert differences(folder, reference) == []


def test_a_killed_run_leaves_no_debris_behind(tmp_path: Path):
    folder = tmp_path / "run"
    kill = in_a_save(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert wait_for(run_forked(composed(*RUN), folder, kill)) == -signal.SIGKILL
    assert wait_for(run_forked(composed(*RUN), folder)) == 0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    stems = ("last", "previous", "best")
    assert names == {f"{stem}.ckpt{end}" for stem in stems for end in ("", ".sha256")}
