"""What is said of a picture is what the network says of its pixels."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import assert_refused, typed
from PIL import Image

from gaplab import config as configs
from gaplab.errors import UserError
from gaplab.prediction import find_files, predict
from gaplab.trained import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """Twelve digits as PNG, their names and their pixels."""
    root = tmp_path_factory.mktemp("pictures (of digits)")
    for number, pixels in enumerate(digits[0][:12]):
        Image.fromarray(pixels[0].numpy()).save(root / f"{number:02}.png")
    return root, digits[0][:12]


@pytest.fixture(scope="module")
def expected(trained_runs, folder):
    network = load_run(str(trained_runs[0]), trained_runs[0].parents[1], None)
    return network.probabilities(folder[1]).topk(3)


def predict_py(trained_runs, *words, stdin=""):
    where = [f"run={trained_runs[0]}", f"paths.outputs={trained_runs[0].parents[1]}", "tracking=none"]
    return typed("predict", *where, *words, stdin=stdin)


def test_a_folder_as_json(trained_runs, folder, expected):
    done = predict_py(trained_runs, f"images={folder[0]}", "format=json", "batch_size=5")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = json.loads(done.stdout)
    assert [row["file"] for row in rows] == [str(folder[0] / f"{number:02}.png") for number in range(12)]
    for row, values, places in zip(rows, *expected, strict=True):
        assert [one["class"] for one in row["predictions"]] == [str(int(place)) for place in places]
        assert np.allclose([one["probability"] for one in row["predictions"]], values, atol=1e-6)


def test_a_pattern_as_csv_in_a_file(trained_runs, folder, expected, tmp_path):
    words = [f"images={folder[0]}/0*.png", "format=csv", "top_k=1", f"output={tmp_path / 'answers.csv'}"]
    done = predict_py(trained_runs, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = list(csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text())))
    assert [row["class"] for row in rows] == [str(int(place)) for place in expected.indices[:10, 0]]
    assert float(rows[0]["probability"]) == pytest.approx(float(expected.values[0, 0]), abs=1e-6)


def test_names_on_stdin_as_a_table_and_bad_pictures_left_out_by_name(trained_runs, folder, expected, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    names = [str(folder[0] / "03.png"), str(tmp_path / "bad.png"), str(tmp_path / "gone.png")]
    done = predict_py(trained_runs, "images=-", stdin="\n".join(names))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    answer = f"{int(expected.indices[3, 0])}  {100 * float(expected.values[3, 0]):.1f} %"
    assert " ".join(lines[1].split()).startswith(f"{names[0]} {' '.join(answer.split())}")
    assert done.stderr.splitlines()[1:] == [
        f"left out: {names[2]} (no such file)",
        "2 of 3 pictures left out",
    ]
    assert f"left out: {names[1]} (cannot identify image file" in done.stderr


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1"])
def test_any_mode(trained_runs, folder, tmp_path, capsys, mode):
    pixels = (folder[1][:1] > 127).to(torch.uint8).mul(255)  # black and white survives every mode
    Image.fromarray(pixels[0, 0].numpy()).convert("RGB").convert(mode).save(tmp_path / "one.tif")
    outputs = trained_runs[0].parents[1]
    settings = configs.Predict(run="run0", images=str(tmp_path / "one.tif"), format="json")
    settings.paths.outputs = str(outputs)
    predict(settings)
    ((first, *_),) = (row["predictions"] for row in json.loads(capsys.readouterr().out))
    value, place = load_run("run0", outputs, None).probabilities(pixels).max(1)
    assert (first["class"], first["probability"]) == (str(int(place)), pytest.approx(float(value), abs=1e-6))


def test_files_in_the_order_that_they_were_typed(tmp_path):
    for name in ("b.png", "a.png", "c/d.jpg", "c/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_files([str(tmp_path / "b.png"), str(tmp_path)])
    assert [name.removeprefix(f"{tmp_path}/") for name in found] == ["b.png", "a.png", "b.png", "c/d.jpg"]
    assert find_files(f"{tmp_path}/**/*.jpg") == [str(tmp_path / "c" / "d.jpg")]
    for bad, said in ((f"{tmp_path}/*.gif", "nothing matches"), (f"{tmp_path}/x.png", "no such file or folder")):
        with pytest.raises(UserError, match=said):
            find_files(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in this folder"):
        find_files(str(tmp_path / "empty"))


def test_a_folder_is_read_without_files_of_the_system_and_the_others_are_counted(tmp_path, capsys):
    for name in (
        "a.PNG",
        "._a.png",
        "__MACOSX/a.png",
        ".ipynb_checkpoints/a.png",
        "x/b.heic",
        "c.heic",
        "d",
        "Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_files(str(tmp_path)) == [str(tmp_path / "a.PNG")]
    assert capsys.readouterr().err == "not read: 2 .heic, 1 without a suffix\n"


def test_a_16_bit_picture_that_becomes_black_is_noted(trained_runs, folder, tmp_path, capsys):
    for name, factor in (("low", 1), ("full", 257)):
        Image.fromarray(folder[1][0, 0].numpy().astype(np.uint16) * np.uint16(factor)).save(tmp_path / f"{name}.png")
        settings = configs.Predict(run="run0", images=str(tmp_path / f"{name}.png"))
        settings.paths.outputs = str(trained_runs[0].parents[1])
        predict(settings)
        err = capsys.readouterr().err
        assert ("note: 1 pictures with 16 bits have no value above 255 of 65535" in err) == (name == "low")


def test_bad_input_is_one_line(trained_runs, tmp_path):
    for images, said in ((None, "a value is needed"), ([], "a value is needed"), ("\0", "cannot be a folder")):
        with pytest.raises(UserError, match=said):
            find_files(images)
    assert_refused(predict_py(trained_runs, "images=(no) such.png"), "images=(no) such.png: no such file or folder")
    (tmp_path / "bad.png").write_text("no picture")
    done = predict_py(trained_runs, f"images={tmp_path}/bad.png")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: images: none of 1 pictures could be read"
