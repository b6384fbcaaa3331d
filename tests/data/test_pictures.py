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
from gaplab.data.pictures import Streamed, decode, few_levels, find_pictures
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
    pixels, _ = decode(path, 8, channels)
    assert pixels.shape == (channels, 8, 8)
    if channels == 3:
        assert pixels[:, 4, 4].tolist() == list(expected)
    else:
        assert int(pixels[0, 4, 4]) == pytest.approx(np.dot(expected, [0.299, 0.587, 0.114]), abs=1)


def test_palette_transparency_is_laid_on_white(tmp_path):
    picture = Image.new("P", (9, 9), 0)
    picture.putpalette([10, 20, 30] * 256)
    picture.save(tmp_path / "a.png", transparency=0)
    assert decode(tmp_path / "a.png", 8, 3)[0].unique().tolist() == [255]


def test_the_camera_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.repeat(np.array([[0], [255]], dtype=np.uint8), 8, axis=0).repeat(16, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert int(decode(tmp_path / "a.png", 8, 1)[0][0, 0, 0]) == 255


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
    (root / "val" / "birch").mkdir(parents=True)
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
    with pytest.raises(UserError, match="no class folders; expected one sub-folder"):
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
    assert [reasons for _, _, reasons in batches] == [("",), ("",)]
    assert torch.equal(torch.cat([images for images, _, _ in batches])[1], decode(files[1], 16, 3)[0])


def tiff(values, photometric=1, bits=None):
    """A grey TIFF that stores `values` as they are, in one strip; no library in use writes all kinds."""
    bits = bits or 8 * values.dtype.itemsize
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<4sI", b"II*\0", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


GREY = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "i4"])
def test_grey_of_every_sample_format_keeps_its_values(tmp_path, kind):
    stored = GREY * 257 if kind == "u2" else GREY
    (tmp_path / "a.tif").write_bytes(tiff(stored.astype(kind)))
    pixels, largest = decode(tmp_path / "a.tif", 16, 1)
    assert torch.equal(pixels[0], torch.from_numpy(GREY.astype(np.uint8)))
    assert largest == (255 if kind == "u2" else -1)


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_white_is_zero_is_undone(tmp_path, kind):
    (tmp_path / "a.tif").write_bytes(tiff((GREY * (257 if kind == "u2" else 1)).astype(kind), photometric=0))
    assert torch.equal(decode(tmp_path / "a.tif", 16, 1)[0][0], torch.from_numpy(255 - GREY.astype(np.uint8)))


def test_12_bits_keep_their_upper_8(tmp_path):
    packed = np.array([[0x12, 0x3F, 0xF0] * 2] * 4, dtype=np.uint8)  # 0x123, 0xff0
    content = tiff(packed, bits=12).replace(struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 4))
    (tmp_path / "a.tif").write_bytes(content)
    assert decode(tmp_path / "a.tif", 4, 1)[0].unique().tolist() == [0x12, 0xFF]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (GREY.astype("f4"), "floating-point pixels have no defined range; save it with 8 or 16 bits"),
        ((GREY - 1).astype("i2"), "16-bit integers from -1 to 254 have no defined range"),
        ((GREY + 1).astype("i4"), "32-bit integers from 1 to 256 have no defined range"),
        (np.full((4, 4), 3_000_000_000, "u4"), "32-bit integers from 3000000000 to 3000000000"),
        ((GREY - 128).astype("i1"), "negative pixels"),
    ],
)
def test_values_without_a_defined_range_are_refused(picture_folder, values, reason):
    (picture_folder / "дубы" / "x.tif").write_bytes(tiff(values))
    with pytest.raises(UserError, match=rf"unreadable pictures: .*x\.tif \({reason}"):
        module(picture_folder)


@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_pictures_that_would_be_black_are_refused(tmp_path, caplog, colour):
    def root(factor):
        for name in ("a", "b"):
            (tmp_path / str(factor) / name).mkdir(parents=True)
            for number in range(5):
                content = tiff((GREY * factor).astype("u2"))
                if colour:  # no library in use writes 16-bit colour: 48 bits of a PNG, by hand
                    content = colour_png(GREY * factor)
                (tmp_path / str(factor) / name / f"{number}.{'png' if colour else 'tif'}").write_bytes(content)
        return tmp_path / str(factor)

    with pytest.raises(
        UserError, match=r"10 pictures with 16 bits .* above 255 of 65535, .* 1 of 256 .* by 256, or save"
    ):
        module(root(1))
    with pytest.raises(UserError, match=r"above 4095 of 65535, which leaves 16 of 256 levels; multiply .* by 16"):
        module(root(16))
    assert "16 bits" not in caplog.text
    assert module(root(64)).splits["train"].source.digest()
    assert "10 pictures with 16 bits have no value above 16383 of 65535, which leaves 64 of 256 levels" in caplog.text
    caplog.clear()
    module(root(257))
    assert "16 bits" not in caplog.text


def colour_png(values):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    rows = np.repeat(values.astype(">u2")[..., None], 3, axis=2).reshape(height, -1)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def test_levels_are_counted_over_16_bit_pictures_alone():
    assert few_levels([-1, -1]) == (256, "")
    assert few_levels([-1, 3, 9])[0] == 10


def test_pictures_of_a_single_colour_are_counted(picture_folder, caplog):
    for number in range(3):
        Image.new("RGB", (20, 20), (200, 10, number)).save(picture_folder / "дубы" / f"plain{number}.png")
    module(picture_folder)
    assert "3 of 83 pictures are of a single colour, or nearly" in caplog.text


def fill(root, *folders, count=2):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(GREY.astype(np.uint8)).save(root / folder / f"{number}.PNG")
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing", None),
        ("TRAIN", "Eval", "dev"),
        ("training_set", "test_set", "Validation-Set"),
        ("seg_train", "seg_test", None),
        ("train-images", "test images", "VAL"),
    ],
)
def test_parts_are_known_by_any_usual_name(tmp_path, names):
    given = {part: name for part, name in zip(("train", "test", "valid"), names, strict=True) if name}
    fill(tmp_path, *(f"{name}/{label}" for name in given.values() for label in ("cat", "dog")))
    found = find_pictures(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert {part: found.parts.count(part) for part in given} == dict.fromkeys(given, 4)
    assert found.notes == []


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (("train/a", "Training/a"), "Training/ and train/ are both named as the train part; rename or move one"),
        (("train/a", "train/b", "val/a", "dev/a"), "dev/ and val/ are both named as the valid part"),
        (("Testing/a", "Testing/b", "more"), "Testing/ is named as the test part, and no folder as the training part"),
        (
            ("train/wagon", "train/engine", "bus", "car"),
            "train/ is named as the training part, and bus/, car/ beside it",
        ),
        (("Training", "Testing"), "Training: no class folders; expected one sub-folder of pictures for each class"),
    ],
)
def test_parts_that_are_ambiguous_are_refused(tmp_path, folders, reason):
    with pytest.raises(UserError, match=reason):
        find_pictures(fill(tmp_path, *folders))


def test_classes_may_have_the_names_of_parts(tmp_path):
    assert find_pictures(fill(tmp_path, "bus", "train", "crash-test")).classes == ["bus", "crash-test", "train"]


def test_folders_and_files_of_the_system_are_no_classes_and_no_pictures(tmp_path):
    fill(tmp_path, "cat", "dog", "__MACOSX/cat", "@eaDir", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "dog/@eaDir")
    for name in ("._0.PNG", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "cat" / name).write_bytes(b"no picture")
    found = find_pictures(tmp_path)
    assert (found.classes, found.labels, found.notes) == (["cat", "dog"], [0, 0, 1, 1], [])


def test_what_is_not_read_is_counted_by_its_kind(tmp_path, caplog):
    fill(tmp_path, "train/cat", "train/dog", "test", "unlabelled")
    for number in range(3):
        (tmp_path / "train" / "cat" / f"{number}.HEIC").write_bytes(b"")
    (tmp_path / "train" / "dog" / "notes").write_text("")
    (tmp_path / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "train" / "dog" / "link").symlink_to("../cat")
    module(tmp_path, "data.valid_size=2")
    assert (
        "not read: 3 .heic, 2 in no class folder, 1 broken links, pipes or devices, 1 links to folders, 1 without a "
        "suffix; convert pictures among them to PNG or JPEG"
    ) in caplog.text
    assert "not read: unlabelled/ beside the folders of the parts" in caplog.text
    assert "test: no class folder with pictures, so there is no test part" in caplog.text


def test_a_class_whose_pictures_cannot_be_read_names_their_kind(tmp_path):
    fill(tmp_path, "cat", "dog", count=1)
    (tmp_path / "dog" / "0.PNG").rename(tmp_path / "dog" / "0.heic")
    with pytest.raises(UserError, match=r"dog: no picture in this class folder \(.*\); it holds 1 \.heic"):
        find_pictures(tmp_path)


def test_a_valid_size_beside_a_validation_part_is_told_to_be_unused(tmp_path, caplog):
    fill(tmp_path, "train/cat", "train/dog", "valid/cat", "valid/dog")
    module(tmp_path)
    assert "data.valid_size" not in caplog.text
    module(tmp_path, "data.valid_size=0.2")
    assert "data.valid_size=0.2 is not used" in caplog.text


def test_the_digest_of_streamed_pictures_is_that_of_resident_ones(picture_folder):
    (picture_folder / "дубы" / "broken.png").write_text("no picture")
    streamed, resident = (
        module(picture_folder, "data.skip_broken=true", f"data.memory_budget_gb={budget}").splits["train"].source
        for budget in (0, 1)
    )
    assert isinstance(streamed, Streamed)
    assert streamed.digest() == resident.digest()


@pytest.mark.parametrize("budget", [0, 1])
def test_the_digest_changes_with_pixels_order_and_labels(tmp_path, budget):
    def digest(*folders):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, values in zip("aabb", folders, strict=True):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / name / f"{len(list((root / name).iterdir()))}.png")
        keys = [f"data.memory_budget_gb={budget}", "data.valid_size=1"]
        return module(root, *keys).splits["train"].source.digest()

    one = GREY.astype(np.uint8)
    others = [one[::-1], one[:, ::-1], one.T]  # the sums of values and of squares are the same
    found = [digest(one, other, one, one) for other in [one, *map(np.ascontiguousarray, others)]]
    found.append(digest(np.ascontiguousarray(others[0]), one, one, one))
    found.append(digest(one, one, one, np.ascontiguousarray(others[0])))
    assert len(set(found)) == 6


def test_splits_and_classes_are_described_in_two_lines(picture_folder, tmp_path):
    assert module(picture_folder).describe() == [
        "data    image_folder 3x16x16: train 72, valid 8, no test",
        "classes 2 in train, 36 each: дубы (36), ясень & co (36)",
    ]
    many = module(fill(tmp_path / "many", *(f"class {number:02}" for number in range(30))), "data.valid_size=30")
    assert many.describe()[1].endswith(
        "30 in train, 1 each: class 00 (1), class 01 (1), class 02 (1), class 03 (1), "
        "class 04 (1), class 05 (1), class 06 (1), …, class 29 (1)"
    )
