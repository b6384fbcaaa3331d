import io
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import composed
from PIL import Image

from gaplab.data import pictures
from gaplab.data.datamodule import build_datamodule
from gaplab.data.pictures import Streamed, decode, find_pictures
from gaplab.data.resident import Resident
from gaplab.errors import UserError


def module(root, *overrides):
    config = composed("data=image_folder", f"data.root='{root}'", "data.workers=0", "data.image_size=16", *overrides)
    return build_datamodule(config.data, seed=0)


def picture_of(width, height):
    """A PNG whose header has that size, and nothing else."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("RGB", (200, 100, 0), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("LA", (200, 255), (200, 200, 200)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 200 * 256 + 77, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_is_decoded_to_its_colour(tmp_path, mode, colour, expected, channels):
    path = tmp_path / f"é {mode.replace(';', '')}.{'png' if mode != 'CMYK' else 'tif'}"
    Image.new(mode, (30, 11), colour).save(path)
    pixels = decode(path, 8, channels)
    assert pixels.shape == (channels, 8, 8)
    if channels == 3:
        assert pixels[:, 4, 4].tolist() == list(expected)
    else:
        assert int(pixels[0, 4, 4]) == pytest.approx(np.dot(expected, [0.299, 0.587, 0.114]), abs=1)


def test_palette_transparency_is_laid_on_white(tmp_path):
    picture = Image.new("P", (9, 9), 0)
    picture.putpalette([10, 20, 30] * 256)
    picture.save(tmp_path / "a.png", transparency=0)
    assert decode(tmp_path / "a.png", 8, 3).unique().tolist() == [255]


def test_the_camera_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.repeat(np.array([[0], [255]], dtype=np.uint8), 8, axis=0).repeat(16, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert int(decode(tmp_path / "a.png", 8, 1)[0, 0, 0]) == 255


def test_a_plain_folder_is_split_and_has_no_test_part(picture_folder):
    data = module(picture_folder)
    assert data.classes == ["дубы", "ясень & co"]
    assert {name: len(part.indices) for name, part in data.splits.items()} == {"train": 72, "valid": 8}
    assert data.in_shape == (3, 16, 16)


def test_parts_of_the_folder_are_the_splits(picture_folder, tmp_path):
    root = tmp_path / "parts"
    for part, numbers in {"train": range(30), "val": range(30, 35), "test": range(35, 40)}.items():
        for folder in picture_folder.iterdir():
            (root / part / folder.name).mkdir(parents=True)
            for number in numbers:
                source = next(folder.glob(f"n° {number}.*"))
                (root / part / folder.name / source.name).write_bytes(source.read_bytes())
    data = module(root)
    assert {name: len(part.indices) for name, part in data.splits.items()} == {"train": 60, "valid": 10, "test": 10}
    assert len(module(root, "data.train_size=20").splits["train"].indices) == 20
    (root / "valid" / "birch").mkdir(parents=True)
    with pytest.raises(UserError, match="birch: a class that train/ does not have"):
        module(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_pictures_are_the_resident_ones(picture_folder, workers):
    resident = module(picture_folder)
    streamed = module(picture_folder, "data.memory_budget_gb=0", f"data.workers={workers}")
    assert isinstance(resident.splits["train"].source, Resident)
    assert isinstance(streamed.splits["train"].source, Streamed)
    torch.testing.assert_close(resident.mean, streamed.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(resident.std, streamed.std, rtol=0, atol=1e-12)
    for one, other in zip(resident.batches("train"), streamed.batches("train"), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_unreadable_pictures_are_listed_and_stop_the_run_unless_skipped(picture_folder):
    broken = picture_folder / "дубы" / "broken.png"
    broken.write_bytes(next(picture_folder.glob("дубы/*.png")).read_bytes()[:60])
    (picture_folder / "дубы" / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"unreadable pictures: .*broken\.png .*text\.jpg .*data\.skip_broken=true"):
        module(picture_folder)
    for budget in (0, 1):
        data = module(picture_folder, "data.skip_broken=true", f"data.memory_budget_gb={budget}")
        assert sum(len(part.indices) for part in data.splits.values()) == 80


def test_folders_that_cannot_be_classified_are_refused(picture_folder, tmp_path):
    (picture_folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no picture in this class folder"):
        find_pictures(picture_folder)
    single = tmp_path / "single"
    (single / "only").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a single class \(only\)"):
        find_pictures(single)
    with pytest.raises(UserError, match="empty; expected one sub-folder"):
        find_pictures(single / "only")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # a program, for Ghostscript
        (picture_of(1, 9), "1 x 9 pixels; sides are 2 to 30000"),
        (picture_of(60_000, 2), "60000 x 2 pixels"),
        (picture_of(20_000, 20_000), "exceeds limit"),
    ],
)
def test_what_is_no_picture_of_a_usual_kind_and_size_is_unreadable(picture_folder, content, reason):
    (picture_folder / "дубы" / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"unreadable pictures: .*x\.png \(.*{reason}"):
        module(picture_folder)


@pytest.mark.parametrize("name", ["дубы/x.png", "дубы/deeper", "birch", "train"])
def test_a_link_out_of_the_folder_is_refused(picture_folder, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (picture_folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name}: a link out of data.root, to .*/outside"):
        find_pictures(picture_folder)


def test_links_within_the_folder_and_to_it_are_followed(picture_folder, tmp_path):
    (picture_folder / "copy").symlink_to("дубы")
    (picture_folder / "дубы" / "again.png").symlink_to("n° 0.png")
    (picture_folder / "дубы" / "circle.png").symlink_to("circle.png")
    (tmp_path / "link").symlink_to(picture_folder)
    found = find_pictures(tmp_path / "link")
    assert [found.labels.count(label) for label in range(3)] == [41, 41, 40]
    assert found.classes == ["copy", "дубы", "ясень & co"]


def test_pictures_come_in_the_order_of_their_paths(picture_folder):
    folder = picture_folder / "дубы"
    for name in ("a/b.png", "a b/c.png", "a.png", "a/a/d.PNG", "ä.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(next(folder.glob("n*.png")).read_bytes())
    found = [path for path in find_pictures(picture_folder).files if folder in path.parents]
    assert found == sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_name_that_is_not_text_is_refused(picture_folder):
    (picture_folder / os.fsdecode(b"\xff")).mkdir()
    with pytest.raises(UserError, match=r"\\udcff: its name is not UTF-8"):
        find_pictures(picture_folder)


def test_a_crop_that_could_leave_the_picture_is_refused(picture_folder):
    assert module(picture_folder, "data.augment=crop", "data.crop_padding=15")
    with pytest.raises(UserError, match=r"data\.crop_padding=16: must be below 16, the side of the pictures"):
        module(picture_folder, "data.augment=crop_flip", "data.crop_padding=16")


def test_more_workers_than_cores_are_not_started(monkeypatch):
    monkeypatch.setattr(pictures, "usable_cores", lambda: 1)
    loader = pictures._loader(pictures.PictureFiles([], 8, 3), [[0], [1], [2]], workers=256)
    assert loader.num_workers == 1


def test_pictures_are_decoded_by_worker_processes_inside_a_worker_process_of_joblib(picture_folder):
    import joblib.externals.loky.backend.context  # noqa: F401 (registers the start method)

    files = find_pictures(picture_folder).files[:2]
    multiprocessing.set_start_method("loky", force=True)  # as in every process of `hydra/launcher=joblib` and `fused`
    try:
        batches = list(pictures._loader(pictures.PictureFiles(files, 16, 3), [[0], [1]], workers=1))
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert [reasons for _, reasons in batches] == [("",), ("",)]
    assert torch.equal(torch.cat([images for images, _ in batches])[1], decode(files[1], 16, 3))
