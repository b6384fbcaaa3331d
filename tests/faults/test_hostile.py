"""Files made to harm whoever reads them: each is refused in one line that names it, or left out with a word.

Nothing in them is executed: each that could would make `canary`. Nothing is written outside the folder that they lie
in: everything else is compared before and after.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import socket
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image
from processes import train_py
from scipy.io import savemat
from torchvision import datasets

from gaplab import config as configs
from gaplab import sweep
from gaplab.analysis.report import report
from gaplab.data.datasets import load_dataset
from gaplab.data.pictures import PictureFiles, find_pictures, load_pictures
from gaplab.errors import UserError
from gaplab.foreign import check_words
from gaplab.targets import load_class
from gaplab.training.reader import read_checkpoint

Act = Callable[[], Any]
CASES: dict[str, tuple[Callable[[Path, Path], Act], str]] = {}
PASSED: list[str] = []
PEAK_KB = 1_000_000


def hostile(said: str) -> Callable[[Callable[[Path, Path], Act]], None]:
    """Registers a function that makes files in a folder, given the path of the canary too, and returns the way in which
    a user would read them. `said` must be in the line that comes of it."""

    def register(make: Callable[[Path, Path], Act]) -> None:
        CASES[make.__name__] = make, said

    return register


def snapshot(root: Path, apart: Path) -> dict[str, Any]:
    """What lies below `root` but not below `apart`: kind, permissions, and content or aim."""
    found: dict[str, Any] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != apart]
        for name in (*folders, *names):
            path = Path(folder, name)
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = path.lstat().st_mode, content
    return found


@pytest.fixture(scope="module", autouse=True)
def _summary(request: pytest.FixtureRequest):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{len(PASSED)} hostile files: 0 executed, 0 written outside")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < PEAK_KB, f"{grown / 1e6:.1f} GB"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)


class Bomb:
    """A pickle of it makes the canary where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


# --- pictures


def read_pictures(root: Path) -> str:
    _, folder, broken = load_pictures(find_pictures(root), 16, 3, False, 1.0, 0)
    return f"{len(folder.files)} pictures read, {len(broken)} broken"


def two_classes(root: Path) -> Path:
    """Six honest pictures; the folder of one class."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 12), (number, 0, 0)).save(root / name / f"{number}.png")
    return root / "cat"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(width: int, height: int, tile: int) -> bytes:
    """Little-endian, grey, one tile of claimed sides."""
    tags = {
        256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 2**31,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + zlib.compress(bytes(100_000))


PROGRAM = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n({}) (w) file closefile\nshowpage\n"


def one_picture(name: str, content: bytes | Callable[[Path], bytes]) -> Callable[[Path, Path], Act]:
    def make(inside: Path, canary: Path) -> Act:
        (two_classes(inside) / name).write_bytes(content if isinstance(content, bytes) else content(canary))
        return lambda: read_pictures(inside)

    return make


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


GIF_65535 = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;"
PICTURES: dict[str, tuple[str, bytes | Callable[[Path], bytes], str]] = {
    "a_picture_of_one_pixel": ("x.png", encoded(Image.new("L", (1, 1)), "PNG"), "x.png (1 x 1 pixels; sides are"),
    "a_picture_of_60000_by_2": ("x.png", encoded(Image.new("1", (60_000, 2)), "PNG"), "x.png (60000 x 2 pixels"),
    "a_png_of_60000_by_60000": ("x.png", png(60_000, 60_000), "x.png (Image size (3600000000 pixels) exceeds"),
    "a_decompression_bomb": (
        "x.png", encoded(Image.new("1", (20_000, 20_000)), "PNG"), "x.png (Image size (400000000 pixels) exceeds",
    ),
    "a_gif_of_65535_by_65535": ("x.gif", GIF_65535, "x.gif (Image size"),
    "a_tiff_of_60000_by_60000": ("x.tif", tiff(60_000, 60_000, 16), "x.tif (Image size"),
    "a_tiff_with_a_tile_of_2_gb": ("x.tif", tiff(16, 16, 2**31 - 16), "x.tif ("),
    "a_png_whose_text_unpacks_to_50_mb": (
        "x.png",
        png(10, 10, *(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 9)),)),
        "x.png (Decompressed data too large",
    ),
    "a_program_called_png": ("x.png", lambda canary: PROGRAM.format(canary).encode(), "x.png (cannot identify"),
    "a_program_called_gif_with_a_preview": (
        "x.gif",
        lambda canary: b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 200) + bytes(20) + PROGRAM.format(canary).encode(),
        "x.gif (cannot identify",
    ),
    "a_wmf_called_jpg": ("x.jpg", b"\xd7\xcd\xc6\x9a" + bytes(60), "x.jpg (cannot identify"),
    "a_text_called_jpg": ("x.jpg", b"GIF87a is no picture", "x.jpg (cannot identify"),
    "a_jpeg_that_is_cut_off": (
        "x.jpg", encoded(Image.effect_noise((300, 300), 90), "JPEG")[:5000], "x.jpg (image file is truncated",
    ),
    "a_png_without_a_header": ("x.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0"), "x.png ("),
    "a_jpeg_whose_name_clears_the_screen": ("\x1b[2Jx.jpg", b"no picture", r"\x1b[2Jx.jpg ("),
    "a_jpeg_with_a_line_end_in_its_name": ("a\nb.jpg", b"no picture", r"a\nb.jpg ("),
}  # fmt: skip
for _name, (_file, _content, _said) in PICTURES.items():
    CASES[_name] = one_picture(_file, _content), _said


@hostile("cat/x.png: a link out of data.root, to ")
def a_picture_that_is_a_link_out(inside: Path, canary: Path) -> Act:
    Image.new("L", (9, 9)).save(canary.parent / "secret.png")
    (two_classes(inside) / "x.png").symlink_to(canary.parent / "secret.png")
    return lambda: read_pictures(inside)


@hostile("cat/x.png: a link out of data.root, to /dev/zero")
def a_picture_that_is_a_device(inside: Path, canary: Path) -> Act:
    (two_classes(inside) / "x.png").symlink_to("/dev/zero")
    return lambda: read_pictures(inside)


@hostile("emu: a link out of data.root, to ")
def a_class_that_is_a_link_out(inside: Path, canary: Path) -> Act:
    two_classes(inside)
    (inside / "emu").symlink_to(canary.parent)
    return lambda: read_pictures(inside)


@hostile("train: a link out of data.root, to ")
def a_part_that_is_a_link_out(inside: Path, canary: Path) -> Act:
    two_classes(inside)
    (inside / "train").symlink_to("../outside")
    return lambda: read_pictures(inside)


@hostile("cat/deeper: a link out of data.root, to /")
def a_folder_in_a_class_that_is_a_link_out(inside: Path, canary: Path) -> Act:
    (two_classes(inside) / "deeper").symlink_to("/")
    return lambda: read_pictures(inside)


@hostile("6 pictures read")
def links_in_a_circle(inside: Path, canary: Path) -> Act:
    cat = two_classes(inside)
    (cat / "self.png").symlink_to("self.png")
    (cat / "up").symlink_to("..")
    (cat / "one").symlink_to("two")
    (cat / "two").symlink_to("one")
    return lambda: read_pictures(inside)


@hostile("6 pictures read")
def pipes_and_sockets_called_png(inside: Path, canary: Path) -> Act:
    cat = two_classes(inside)
    os.mkfifo(cat / "pipe.png")
    with contextlib.chdir(cat), socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.png")
    return lambda: read_pictures(inside)


@hostile(r"cat/\udcff\udcfe.png: its name is not UTF-8")
def a_picture_whose_name_is_not_text(inside: Path, canary: Path) -> Act:
    Image.new("L", (9, 9)).save(two_classes(inside) / os.fsdecode(b"\xff\xfe.png"))
    return lambda: read_pictures(inside)


@hostile(r"\udcff: its name is not UTF-8")
def a_class_whose_name_is_not_text(inside: Path, canary: Path) -> Act:
    two_classes(inside).rename(inside / os.fsdecode(b"\xff"))
    return lambda: read_pictures(inside)


@hostile("more than 100 folders deep")
def folders_within_folders(inside: Path, canary: Path) -> Act:
    (two_classes(inside) / Path(*["a"] * 150)).mkdir(parents=True)
    return lambda: read_pictures(inside)


@hostile("of 240 were readable")
def pictures_with_wrong_bytes(inside: Path, canary: Path) -> Act:
    """Of every kind, with bytes changed at random and with a piece missing: no decoder's error gets through."""
    draw = random.Random(0)
    picture = Image.effect_noise((40, 30), 80)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"):
        whole = encoded(picture, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
        for number in range(30):
            broken = bytearray(whole)
            for _ in range(1 + number % 8):
                broken[draw.randrange(min(len(broken), 60 + 30 * number))] = draw.randrange(256)
            inside.mkdir(exist_ok=True)
            (inside / f"{number}.{kind}").write_bytes(broken[: draw.choice([len(broken), len(broken) // 2])])

    def act() -> str:
        files = PictureFiles(sorted(inside.iterdir()), 16, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reasons = [files[number][-1] for number in range(len(files))]
        assert not any("\n" in reason for reason in reasons)
        return f"{reasons.count('')} of {len(reasons)} were readable"

    return act


# --- archives and data sets


def read_dataset(root: Path, name: str, train: dict[str, Any], test: dict[str, Any]) -> Act:
    return lambda: load_dataset(f"torchvision.datasets.{name}", str(root), train, test, ["torchvision"])


def read_mnist(root: Path) -> Act:
    return read_dataset(root, "MNIST", {"train": True}, {"train": False})


def read_cifar(root: Path) -> Act:
    return read_dataset(root, "CIFAR10", {"train": True}, {"train": False})


def idx(*dims: int, content: bytes = b"", kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(dims)}I", 0, 0, kind, len(dims), *dims) + content


def mnist(root: Path, **files: bytes) -> Act:
    """20 honest pictures of each part, some files of them replaced."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(20, 28, 28, content=bytes(20 * 784)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(20, content=bytes(range(10)) * 2))
    for name, content in files.items():
        (raw / f"train-{name}-ubyte").write_bytes(content)
    return read_mnist(root)


MNIST_FILES = {
    "mnist_pictures_of_an_unknown_kind": ({"images-idx3": idx(20, 28, 28, content=bytes(15680), kind=10)}, "MNIST is"),
    "mnist_pictures_with_a_wrong_header": ({"images-idx3": b"\xff" * 100}, "MNIST is neither there in a readable"),
    "mnist_pictures_that_claim_64_gb": ({"images-idx3": idx(2**20, 256, 256, content=bytes(99))}, "MNIST is neither"),
    "mnist_pictures_that_are_cut_off": ({"images-idx3": idx(20, 28, 28, content=bytes(99))}, "MNIST is neither"),
    "mnist_pictures_that_are_empty": ({"images-idx3": b""}, "MNIST is neither there in a readable form"),
    "mnist_without_a_picture": (
        {"images-idx3": idx(0, 28, 28, content=b"\0"), "labels-idx1": idx(0, content=b"\0")}, "MNIST",
    ),
    "mnist_labels_beyond_the_classes": (
        {"labels-idx1": idx(20, content=b"\xff" * 20)}, "MNIST has labels from 255 to 255, and 10 classes",
    ),
    "mnist_with_fewer_labels_than_pictures": (
        {"labels-idx1": idx(10, content=bytes(10))}, "MNIST holds 20 pictures and 10 labels",
    ),
}  # fmt: skip
for _name, (_files, _said) in MNIST_FILES.items():
    CASES[_name] = (lambda files: lambda inside, canary: mnist(inside, **files))(_files), _said


@hostile("training.pt: data without a checksum")
def mnist_as_a_pickle_of_old(inside: Path, canary: Path) -> Act:
    act = mnist(inside)
    processed = inside / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(pickle.dumps(Bomb(canary)))
    return act


@hostile("CIFAR10 is neither there in a readable form nor to be downloaded")
def cifar_pickles_that_run_code(inside: Path, canary: Path) -> Act:
    folder = inside / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    return read_cifar(inside)


def cifar_archive(inside: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    inside.mkdir(parents=True, exist_ok=True)
    path = inside / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@hostile("cifar-10-python.tar.gz: damaged, its MD5 sum is ")
def an_archive_that_is_another(inside: Path, canary: Path) -> Act:
    cifar_archive(inside, (tarfile.TarInfo("../outside/canary"), b"x"))
    return read_cifar(inside)


def unpacked_although(path: Path) -> Act:
    """As if the published MD5 sum were that of the hostile archive: what the unpacking itself refuses."""

    def act() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
            read_cifar(path.parent)()

    return act


@hostile("outside the destination")
def an_archive_with_a_path_that_leads_out(inside: Path, canary: Path) -> Act:
    return unpacked_although(cifar_archive(inside, (tarfile.TarInfo("../outside/canary"), b"x")))


@hostile("outside the destination")
def an_archive_with_a_link_that_leads_out(inside: Path, canary: Path) -> Act:
    link = tarfile.TarInfo("way")
    link.type, link.linkname = tarfile.SYMTYPE, "../outside"
    return unpacked_although(cifar_archive(inside, (link, b""), (tarfile.TarInfo("way/canary"), b"x")))


@hostile("CIFAR10 is neither there")
def an_archive_with_an_absolute_path(inside: Path, canary: Path) -> Act:
    return unpacked_although(cifar_archive(inside, (tarfile.TarInfo(str(canary)), b"x")))


def svhn(inside: Path, content: dict[str, Any]) -> Act:
    inside.mkdir()
    sums = {}
    for part in ("train", "test"):
        savemat(inside / f"{part}_32x32.mat", content)
        sums[part] = ["", f"{part}_32x32.mat", hashlib.md5((inside / f"{part}_32x32.mat").read_bytes()).hexdigest()]

    def act() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets.SVHN, "split_list", sums)
            read_dataset(inside, "SVHN", {"split": "train"}, {"split": "test"})()

    return act


@hostile("SVHN")
def an_svhn_file_of_objects(inside: Path, canary: Path) -> Act:
    objects = np.empty((32, 32, 3, 2), dtype=object)
    objects[:] = "x"
    return svhn(inside, {"X": objects, "y": np.array([[1], [2]])})


@hostile("SVHN holds 5 pictures and 2 labels")
def an_svhn_file_with_too_few_labels(inside: Path, canary: Path) -> Act:
    return svhn(inside, {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.array([[1], [2]])})


@hostile("train_32x32.mat: damaged, its MD5 sum is ")
def an_svhn_file_that_is_another(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    savemat(inside / "train_32x32.mat", {"X": np.zeros((32, 32, 3, 5), np.uint8), "y": np.zeros(5)})
    return read_dataset(inside, "SVHN", {"split": "train"}, {"split": "test"})


# --- checkpoints


class BombTensor(torch.Tensor):
    canary = ""

    def __reduce_ex__(self, _protocol: int) -> Any:
        return os.mkdir, (self.canary,)


class Evaluated:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.canary)!r})",)


def checkpoint(inside: Path, values: Any, **options: Any) -> Path:
    inside.mkdir(parents=True, exist_ok=True)
    torch.save(values, inside / "best.ckpt", **options)
    return inside / "best.ckpt"


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> Act:
    """The same archive with other entries: `data_pkl` for `data.pkl`."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, old in content.items():
            archive.writestr(name, changed.get(name.rpartition("/")[2].replace(".", "_"), old))
    return lambda: read_checkpoint(path)


HONEST = {"state_dict": {"weight": torch.zeros(3)}}


@hostile("best.ckpt: holds more than plain values")
def a_checkpoint_that_runs_code(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, {"state_dict": Bomb(canary)})
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: holds more than plain values")
def a_checkpoint_that_is_evaluated(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST | {"epoch": Evaluated(canary)})
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: holds more than plain values")
def a_checkpoint_with_code_in_a_tensor(inside: Path, canary: Path) -> Act:
    tensor = torch.zeros(2).as_subclass(BombTensor)
    tensor.canary = str(canary)
    path = checkpoint(inside, {"state_dict": {"weight": tensor}})
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: not a checkpoint, or cut off")
def a_checkpoint_in_the_old_format(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, {"state_dict": Bomb(canary)}, _use_new_zipfile_serialization=False)
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: not a checkpoint, or cut off")
def a_checkpoint_that_is_a_pickle(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    (inside / "best.ckpt").write_bytes(pickle.dumps(Bomb(canary)))
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: ")
def a_checkpoint_that_is_a_program(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(inside / "best.ckpt"))
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: has compressed entries")
def a_checkpoint_that_unpacks_to_gigabytes(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("best/data/1", "w") as entry:
        for _ in range(200):
            entry.write(bytes(1_000_000))
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: its entries overlap")
def a_checkpoint_whose_entries_overlap(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, {"state_dict": {"weight": torch.zeros(50_000)}})
    with zipfile.ZipFile(path, "a") as archive:
        big = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
        archive.filelist += [big] * 50
        archive._didModify = True
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: the entry ../../outside/canary leads out of it")
def a_checkpoint_with_a_path_that_leads_out(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside/canary", b"x")
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: cannot be read (")
def a_checkpoint_that_claims_more_than_it_has(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("best/data.pkl")
    return rezipped(path, data_pkl=re.sub(rb"(cpuq.)K\x03", lambda found: found[1] + b"M\xff\xff", pickled))


@hostile("best.ckpt: ")
def a_checkpoint_that_asks_for_4_tb(inside: Path, canary: Path) -> Act:
    asked = b"\x80\x02ctorch\nTensor\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."
    return rezipped(checkpoint(inside, HONEST), data_pkl=asked)


@hostile("best.ckpt: cannot be read (KeyError")
def a_checkpoint_of_wrong_instructions(inside: Path, canary: Path) -> Act:
    return rezipped(checkpoint(inside, HONEST), data_pkl=b"\x80\x02j\xff\xff\xff\xff.")


@hostile("best.ckpt: a link, to ")
def a_checkpoint_that_is_a_link(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    torch.save(HONEST, canary.parent / "secret.ckpt")
    (inside / "best.ckpt").symlink_to(canary.parent / "secret.ckpt")
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: not a checkpoint, or cut off")
def a_checkpoint_that_is_cut_off(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    path.write_bytes(path.read_bytes()[:-30])
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: damaged, it does not have the checksum in best.ckpt.sha256")
def a_checkpoint_with_another_checksum(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    path.with_name("best.ckpt.sha256").write_bytes(b"\xff" * 64 + b"  best.ckpt\n")
    return lambda: read_checkpoint(path)


@hostile("best.ckpt.sha256: not a file")
def a_checkpoint_whose_checksum_is_a_pipe(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, HONEST)
    os.mkfifo(path.with_name("best.ckpt.sha256"))
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: not a checkpoint, or cut off")
def a_checkpoint_that_is_empty(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    (inside / "best.ckpt").touch()
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: not a file")
def a_checkpoint_that_is_a_folder(inside: Path, canary: Path) -> Act:
    (inside / "best.ckpt").mkdir(parents=True)
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: not a file")
def a_checkpoint_that_is_a_pipe(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    os.mkfifo(inside / "best.ckpt")
    return lambda: read_checkpoint(inside / "best.ckpt")


@hostile("best.ckpt: not a checkpoint, it holds no named values")
def a_checkpoint_that_is_a_list(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, [torch.zeros(3)])
    return lambda: read_checkpoint(path)


@hostile("best.ckpt: not a checkpoint, its state_dict")
def a_checkpoint_whose_weights_are_a_list(inside: Path, canary: Path) -> Act:
    path = checkpoint(inside, {"state_dict": [torch.zeros(3)]})
    return lambda: read_checkpoint(path)


# --- configs that were saved


def saved_config(inside: Path, text: str) -> Act:
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "config.yaml").write_text(text)
    return lambda: configs.load(inside / "config.yaml")


def honest_config() -> str:
    return configs.to_yaml(composed("tracking=none"))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]\n" for above, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{above}'] * 9)}]}}\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SAVED: dict[str, tuple[Callable[[Path], str], str]] = {
    "a_config_whose_tag_runs_code": (
        lambda canary: f"defaults: []\nname: !!python/object/apply:os.mkdir ['{canary}']\n",
        "config.yaml: the tag tag:yaml.org,2002:python/object/apply:os.mkdir would make an object",
    ),
    "a_config_whose_tag_is_of_omegaconf": (
        lambda _: "defaults: []\nname: !!python/object/apply:pathlib.PosixPath [x]\n", "config.yaml: the tag ",
    ),
    "a_config_that_names_os_system": (
        lambda _: honest_config().replace("gaplab.nn.mlp.MLP", "os.system"),
        "config.yaml: model._target_=os.system: package 'os' is not in allowed_targets",
    ),
    "a_config_that_reads_the_environment": (
        lambda _: honest_config().replace("name: null", "name: ${oc.env:HOME}"),
        "config.yaml: ${oc.env:HOME} is still to be filled in",
    ),
    "a_config_that_refers_to_itself": (
        lambda _: honest_config().replace("name: null", "name: ${name}"), "config.yaml: ${name} is still",
    ),
    "a_config_of_a_billion_laughs": (lambda _: f"defaults: []\n{LAUGHS}", "config.yaml: more than 100000 values"),
    "a_config_of_a_billion_merges": (lambda _: f"defaults: []\n{MERGED}", "config.yaml: more than 100000 values"),
    "a_config_within_itself": (lambda _: "defaults: &a [*a]", "config.yaml: the alias a contains itself"),
    "a_config_nested_10000_deep": (lambda _: "[" * 10_000 + "]" * 10_000, "config.yaml: nested more than 32 levels"),
    "a_config_with_too_large_a_number": (
        lambda _: honest_config().replace("seed: 0", f"seed: 1{'0' * 400}"), "config.yaml: seed=1000",
    ),
    "a_config_of_an_unknown_schema": (
        lambda _: "defaults: [{schema@model: Nope}]", "config.yaml: not a config that gaplab wrote",
    ),
    "a_config_with_a_schema_of_another_group": (
        lambda _: "defaults: [{schema@model: SGD}]", "config.yaml: not a config that gaplab wrote",
    ),
    "a_config_of_wrong_types": (
        lambda _: "defaults: [{1: [2]}, [3], null, true]\nmodel: 5\n", "config.yaml: not a config that gaplab wrote",
    ),
    "a_config_that_is_a_number": (lambda _: "5", "config.yaml: not a config that gaplab wrote"),
}  # fmt: skip
for _name, (_text, _said) in SAVED.items():
    CASES[_name] = (lambda text: lambda inside, canary: saved_config(inside, text(canary)))(_text), _said


@hostile("config.yaml: 100.0 MB, more than the 4 MB that are read")
def a_config_of_100_mb(inside: Path, canary: Path) -> Act:
    act = saved_config(inside, "")
    os.truncate(inside / "config.yaml", 100_000_000)  # takes no room on the disk
    return act


@hostile("config.yaml: cannot be read (not UTF-8 text)")
def a_config_that_is_not_text(inside: Path, canary: Path) -> Act:
    act = saved_config(inside, "")
    (inside / "config.yaml").write_bytes(b"defaults: \xff\xfe\n")
    return act


@hostile("config.yaml: not a file")
def a_config_that_is_a_pipe(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    os.mkfifo(inside / "config.yaml")
    return lambda: configs.load(inside / "config.yaml")


def built(inside: Path, target: str) -> Act:
    load = saved_config(inside, honest_config().replace("gaplab.nn.mlp.MLP", target))

    def act() -> None:
        config = load()
        load_class(config.model._target_, config.allowed_targets, torch.nn.Module, "model._target_")

    return act


@hostile("model._target_=torch.hub.load: not a subclass of torch.nn")
def a_config_that_names_a_function(inside: Path, canary: Path) -> Act:
    return built(inside, "torch.hub.load")


@hostile("model._target_=torch.serialization.os.system: ")
def a_config_that_names_an_alias_into_another_module(inside: Path, canary: Path) -> Act:
    return built(inside, "torch.serialization.os.system")


@hostile("run 1 of http://elsewhere: allowed_targets=[os]: said by a file")
def a_config_of_a_server_that_allows_what_it_names(inside: Path, canary: Path) -> Act:
    raw = honest_config().replace("gaplab.nn.mlp.MLP", "os.system")
    raw = raw[: raw.index("allowed_targets:")] + "allowed_targets: [os]\n"
    raw = raw.replace("torch.optim.Adam", "os.Adam").replace("torchvision.datasets.MNIST", "os.MNIST")
    return lambda: configs.loads(raw, "run 1 of http://elsewhere")


@hostile("run 1 of http://elsewhere: the tag ")
def a_config_of_a_server_whose_tag_runs_code(inside: Path, canary: Path) -> Act:
    return lambda: configs.loads(f"!!python/object/apply:os.mkdir ['{canary}']", "run 1 of http://elsewhere")


# --- folders of configs

DEFAULTS = "defaults: [schema, {schema@model: MLP}, {x: y}, hydra/settings, _self_, override hydra/sweeper: gaplab]\n"


def config_folder(inside: Path, **files: str) -> Act:
    (inside / "x").mkdir(parents=True)
    (inside / "x" / "y.yaml").write_text(files.pop("y", "# @package _global_\n{}"))
    (inside / "config.yaml").write_text(files.pop("config", DEFAULTS))
    for name, text in files.items():
        path = inside / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return lambda: check_words(["--config-dir", str(inside), "--config-name", "config"])


CALL = "_target_: os.mkdir, path: {}"
FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "a_callback": ({"config": DEFAULTS + "hydra: {{callbacks: {{x: {{" + CALL + "}}}}}}\n"}, "sets hydra.callbacks"),
    "a_callback_by_a_package": (
        {"y": "# @package hydra.callbacks.x\n" + CALL.replace(", ", "\n") + "\n"}, "sets hydra.callbacks",
    ),
    "a_callback_by_the_defaults": (
        {"y": "x: {{" + CALL + "}}\n", "config": DEFAULTS.replace("{x: y}", "{{x@hydra.callbacks: y}}")
            .replace("{schema@model: MLP}", "{{schema@model: MLP}}")},
        "sets hydra.callbacks",
    ),
    "a_callback_by_reference": (
        {"y": "# @package hydra\ncallbacks: ${{model.kwargs}}\n",
         "config": DEFAULTS.replace("{", "{{").replace("}", "}}") + "model: {{kwargs: {{x: {{" + CALL + "}}}}}}\n"},
        "sets hydra.callbacks",
    ),
    "a_trusted_package_as_if_typed": (
        {"y": "# @package hydra.overrides\ntask: ['allowed_targets=[os]']\n"}, "sets hydra.overrides",
    ),
    "a_logging_handler": (
        {"hydra__job_logging__evil": "version: 1\nhandlers: {{x: {{(): os.mkdir, path: {}}}}}\n",
         "config": DEFAULTS.replace("{", "{{").replace("}", "}}").replace("]", ", override hydra/job_logging: evil]")},
        "sets hydra.job_logging",
    ),
    "a_logging_handler_by_a_package": (
        {"y": "# @package hydra.job_logging.handlers.x\n(): os.mkdir\npath: {}\n"}, "sets hydra.job_logging",
    ),
    "a_folder_to_run_in": (
        {"config": DEFAULTS.replace("{", "{{").replace("}", "}}") + "hydra: {{run: {{dir: {}}}}}\n"}, "sets hydra.run",
    ),
    "a_log_file_elsewhere": ({"y": "# @package hydra.job\nname: {}\n"}, "sets hydra.job"),
    "an_environment_variable": ({"y": "# @package hydra.job.env_set\nLD_PRELOAD: {}\n"}, "sets hydra.job"),
    "a_module_to_search": (
        {"config": DEFAULTS.replace("{", "{{").replace("}", "}}") + "hydra: {{searchpath: ['pkg://this']}}\n"},
        "sets hydra.searchpath",
    ),
    "a_launcher": (
        {"hydra__launcher__evil": CALL.replace(", ", "\n"),
         "config": DEFAULTS.replace("{", "{{").replace("}", "}}").replace("]", ", override hydra/launcher: evil]")},
        "sets hydra.launcher",
    ),
    "a_class_in_the_sweep": (
        {"y": "# @package hydra.sweeper.params\n" + CALL.replace(", ", "\n") + "\n"}, "sets hydra.sweeper",
    ),
    "a_tag": ({"y": "!!python/object/apply:os.mkdir ['{}']\n"}, "y.yaml: the tag "),
    "a_billion_laughs": ({"y": LAUGHS}, "y.yaml: more than 100000 values"),
}  # fmt: skip


def _folder_case(files: dict[str, str]) -> Callable[[Path, Path], Act]:
    def make(inside: Path, canary: Path) -> Act:
        filled = {
            name: text.replace("{}", str(canary)).replace("{{", "{").replace("}}", "}") for name, text in files.items()
        }
        return config_folder(inside, **filled)

    return make


for _name, (_texts, _said) in FOLDERS.items():
    CASES[f"a_config_folder_with_{_name}"] = _folder_case(_texts), _said


@hostile("y.yaml: the tag ")
def a_config_folder_behind_a_link(inside: Path, canary: Path) -> Act:
    (canary.parent / "linked").mkdir()
    (canary.parent / "linked" / "y.yaml").write_text(f"!!python/object/apply:os.mkdir ['{canary}']\n")
    act = config_folder(inside)
    (inside / "z").symlink_to(canary.parent / "linked")
    return act


@hostile("error: --experimental-rerun: reads a pickle")
def a_pickled_job_to_run_again(inside: Path, canary: Path) -> Act:
    inside.mkdir()
    (inside / "config.pickle").write_bytes(pickle.dumps(Bomb(canary)))
    return lambda: refused_by_the_command("--experimental-rerun", str(inside / "config.pickle"))


@hostile("sets hydra.callbacks")
def a_config_folder_given_to_the_command(inside: Path, canary: Path) -> Act:
    config_folder(inside, y=f"# @package hydra.callbacks.x\n_target_: pathlib.Path.mkdir\n_args_: ['{canary}']\n")
    return lambda: refused_by_the_command("--config-d", str(inside), "--config-name", "config")


def refused_by_the_command(*words: str) -> str:
    done = train_py(*words, cwd=Path.cwd())
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# --- sweeps


def small_sweep(inside: Path, count: int = 4) -> Path:
    """A sweep's folder as its jobs leave it, without training: two conditions, their seeds."""
    folder = inside / "sweeps" / "2026-01-01_00-00-00_x_000000"
    jobs = []
    for number in range(count):
        config = composed("tracking=none", f"model.bn={str(bool(number % 2)).lower()}", f"seed={number // 2}")
        job = folder / f"{number}_job"
        job.mkdir(parents=True)
        (job / "config.yaml").write_text(configs.to_yaml(config))
        metrics = dict.fromkeys(("train/acc", "valid/acc", "gap/acc", "train/acc_running"), 0.9 + 0.01 * number)
        events: list[dict[str, Any]] = [
            {"event": "run", "name": job.name},
            {"event": "params", "values": {k: str(v) for k, v in configs.flatten(config).items()}},
            {"event": "metrics", "step": 1, "values": metrics},
            {"event": "metrics", "step": 2, "values": metrics},
            {"event": "finish", "status": "FINISHED"},
        ]
        (job / "journal.jsonl").write_text("".join(json.dumps({"time": 0} | event) + "\n" for event in events))
        (job / "result.json").write_text(json.dumps({"status": "FINISHED", "run_id": f"{number:032x}"}))
        jobs.append({"folder": job.name, "overrides": []})
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return folder


JOB_FOLDERS: dict[str, tuple[Any, str]] = {
    "a_sweep_with_a_job_outside": ("../../../outside", "is not the folder of a job inside this sweep"),
    "a_sweep_with_a_job_at_an_absolute_path": ("/etc", "'/etc' is not the folder of a job"),
    "a_sweep_with_itself_as_a_job": (".", "'.' is not the folder of a job"),
    "a_sweep_with_its_parent_as_a_job": ("..", "'..' is not the folder of a job"),
    "a_sweep_with_a_job_without_a_name": ("", "'' is not the folder of a job"),
    "a_sweep_with_a_job_in_a_job": ("0_job/checkpoints", "is not the folder of a job"),
    "a_sweep_with_a_hidden_job": (".git", "'.git' is not the folder of a job"),
    "a_sweep_with_a_number_for_a_job": (5, "'5' is not the folder of a job"),
    "a_sweep_with_a_line_end_in_a_job": ("0_job\n", r"'0_job\\n' is not the folder of a job"),
    "a_sweep_with_a_job_twice": ("0_job", "'0_job' is not the folder of a job"),
}


def _sweep_case(name: Any) -> Callable[[Path, Path], Act]:
    def make(inside: Path, canary: Path) -> Act:
        folder = small_sweep(inside, 2)
        description = json.loads((folder / "sweep.json").read_text())
        description["jobs"].append({"folder": name, "overrides": []})
        (folder / "sweep.json").write_text(json.dumps(description))

        def act() -> None:
            with pytest.raises(UserError, match="is not the folder of a job"):
                report(configs.Report(paths=configs.Paths(str(inside))))
            sweep.saved_jobs(folder)

        return act

    return make


for _name, (_folder, _said) in JOB_FOLDERS.items():
    CASES[_name] = _sweep_case(_folder), _said


@hostile("1_job: a link, to ")
def a_sweep_whose_job_is_a_link_out(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    shutil.copytree(folder / "1_job", canary.parent / "mine")
    shutil.rmtree(folder / "1_job")
    (folder / "1_job").symlink_to(canary.parent / "mine")
    return lambda: sweep.saved_jobs(folder)


@hostile("1_job/journal.jsonl: a link, to ")
def a_sweep_whose_journal_is_a_link_out(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    (folder / "1_job" / "journal.jsonl").unlink()
    (folder / "1_job" / "journal.jsonl").symlink_to(canary)
    return lambda: sweep.saved_jobs(folder)


@hostile("sweep.json: cannot be read")
def a_sweep_nested_too_deep(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside, 1)
    (folder / "sweep.json").write_text('{"jobs": ' + "[" * 100_000 + "]" * 100_000 + "}")
    return lambda: sweep.saved_jobs(folder)


@hostile("sweep.json: the overrides of 0_job are no list of words")
def a_sweep_with_wrong_overrides(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside, 1)
    (folder / "sweep.json").write_text(json.dumps({"jobs": [{"folder": "0_job", "overrides": {"a": 1}}]}))
    return lambda: sweep.saved_jobs(folder)


# --- what a report reads


def reported(inside: Path) -> str:
    """The terminal's text, and the page below it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        folder = report(configs.Report(paths=configs.Paths(str(inside))))
    page = (folder / "report.html").read_text()
    json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "<script" not in page
    assert "\x1b" not in text.getvalue() + page
    return text.getvalue() + page


def with_journal(inside: Path, *lines: Any, params: dict[str, str] | None = None) -> Act:
    """Some lines more in the journal of a run, and other parameters."""
    folder = small_sweep(inside) / "1_job"
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    events[1]["values"] |= params or {}
    raw = [json.dumps(event).encode() for event in events]
    raw += [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "journal.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return lambda: reported(inside)


@hostile("4 runs")
def a_journal_of_everything_but_events(inside: Path, canary: Path) -> Act:
    return with_journal(
        inside, 5, [1], None, "x", {}, {"event": 5}, {"event": "metrics"},
        {"event": "metrics", "step": "x", "values": 1},
        {"event": "params", "values": [1]}, {"event": "dataset", "digest": 5, "profile": None}, {"event": "child"},
        {"event": "dataset", "digest": "d", "profile": {"classes": "many"}}, {"event": "tags", "values": None},
        b"[" * 100_000, b"\xff\xfe\x00\x1b", b'{"event": "metrics", "step": 1' + b"0" * 5000 + b', "values": {}}',
    )  # fmt: skip


@hostile("4 runs")
def a_journal_of_wrong_numbers(inside: Path, canary: Path) -> Act:
    numbers = ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1" + "0" * 400, "true", '"x"', "null", "[]"]
    lines = [f'{{"event": "metrics", "step": 2, "values": {{"gap/acc": {one}}}}}'.encode() for one in numbers]
    steps = ["-1", "1e3", "NaN", "1" + "0" * 30]
    lines += [f'{{"event": "metrics", "step": {one}, "values": {{"gap/acc": 1}}}}'.encode() for one in steps]
    return with_journal(inside, *lines)


SCRIPT = '<script>alert(1)</script><img src=x onerror="alert(1)">'
MARKUP = r"[red]x[/blue] \x1b $\frac{1}$ \[ [link=http://elsewhere]y[/link]"


@hostile("&lt;script&gt;alert(1)&lt;/script&gt;")
def a_run_with_html_in_its_settings(inside: Path, canary: Path) -> Act:
    return with_journal(
        inside, {"event": "metrics", "step": 2, "values": {SCRIPT: 1.0}},
        params={"model.init": SCRIPT, "data.name": SCRIPT, f"model.{SCRIPT}": "1"},
    )  # fmt: skip


@hostile(r"[red]x[/blue] \x1b")
def a_run_with_markup_in_its_settings(inside: Path, canary: Path) -> Act:
    return with_journal(inside, params={"model.init": MARKUP, "data.name": MARKUP, f"model.{MARKUP}": "1"})


@hostile(r"\x1b[2J\x1b]0;owned\x07")
def a_run_that_speaks_to_the_terminal(inside: Path, canary: Path) -> Act:
    return with_journal(inside, params={"model.init": "\x1b[2J\x1b]0;owned\x07\u202e\n"})


@hostile("left out, unreadable: ")
def a_run_whose_seed_is_no_number(inside: Path, canary: Path) -> Act:
    return with_journal(inside, params={"seed": "9" * 50})


@hostile("2 runs")
def runs_without_journal_whose_configs_are_hostile(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    for name, text in {"0_job": f"!!python/object/apply:os.mkdir ['{canary}']", "1_job": LAUGHS}.items():
        (folder / name / "journal.jsonl").unlink()
        (folder / name / "config.yaml").write_text(text)
    return lambda: reported(inside)


@hostile("4 runs")
def results_of_wrong_types(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    (folder / "0_job" / "result.json").write_text("[" * 100_000)
    (folder / "1_job" / "result.json").write_bytes(b"\xff\x00")
    (folder / "2_job" / "result.json").write_text('{"status": [1], "error": {"a": 1}, "run_id": 5, "diverged": "x"}')
    (folder / "2_job" / "mlflow.json").write_text('{"run_id": [5]}')
    (folder / "3_job" / "result.json").write_text('{"status": "FAILED", "error": "\\u001b[31m<script>\\n[/x]"}')
    extra = folder / "0_job"
    (extra / "result.json").write_text('{"status": "FINISHED", "train_acc": NaN, "gap_acc": "x", "best": 5}')
    return lambda: reported(inside)


@hostile("report: a link, to ")
def a_report_folder_that_is_a_link_out(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    (canary.parent / "mine").mkdir()
    (folder / "report").symlink_to(canary.parent / "mine")
    return lambda: reported(inside)


@hostile("not logged to MLflow: the sweep is in sqlite:////")
def a_sweep_that_names_a_database_elsewhere(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside)
    event = {"time": 0, "event": "run", "name": "x", "uri": f"sqlite:///{canary}", "experiment": "x", "artifacts": None}
    (folder / "journal.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "mlflow.json").write_text('{"run_id": "1", "sent": 0}')
    return lambda: reported(inside)


@hostile("4 runs")
def report_files_that_are_links_out(inside: Path, canary: Path) -> Act:
    folder = small_sweep(inside) / "report"
    folder.mkdir()
    for name in ("runs.csv", "report.html", ".report.html", "report.json", ".report.json", "conditions.png"):
        (folder / name).symlink_to(canary)
    return lambda: reported(inside)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    monkeypatch.chdir(outside)
    make, said = CASES[name]
    act = make(inside, outside / "canary")
    before = snapshot(tmp_path, inside)
    try:
        line = str(act())
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1, line
        assert "\x1b" not in line
    assert said in line
    assert not (outside / "canary").exists()
    assert snapshot(tmp_path, inside) == before
    PASSED.append(name)
