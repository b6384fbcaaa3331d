"""What a figure shows is what was measured."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL
from matplotlib import rc_context, rcParams

from gaplab import figures
from gaplab.config import PROJECT

NAMES = (
    "train/acc", "valid/acc", "train/acc_running", "gap/acc", "gap/acc_low", "gap/acc_high", "train/loss", "valid/loss"
)  # fmt: skip
HISTORY = [
    dict(zip(NAMES, values, strict=True))
    for values in ((0.9, 0.88, 0.8, 0.02, 0.01, 0.03, 0.3, 0.4), (0.99, 0.9, 0.95, 0.09, 0.08, 0.1, 0.1, 0.6))
]


def test_learning_curves_show_every_epoch_the_gap_in_pp_and_the_loss():
    upper, middle, lower = figures.learning_curves(HISTORY, 2, "a run").axes
    curves = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert curves["train"] == [0.9, 0.99]
    assert curves["valid"] == [0.88, 0.9]
    assert np.allclose(middle.lines[0].get_ydata(), [2, 9])
    losses = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert losses == {"train": [0.3, 0.1], "valid": [0.4, 0.6]}
    assert "best valid: epoch 2" in curves


def test_learning_curves_under_label_noise_show_the_clean_labels():
    clean = ("train/acc_clean", "gap/acc_clean", "gap/acc_clean_low", "gap/acc_clean_high", "train/loss_clean")
    history = [row | dict(zip(clean, (0.95, 0.05, 0.04, 0.06, 0.2), strict=True)) for row in HISTORY]
    upper, middle, lower = figures.learning_curves(history, 2, "a run").axes
    curves = {line.get_label(): list(line.get_ydata()) for line in upper.lines}
    assert curves["train, clean labels"] == [0.95, 0.95]
    assert "train" not in curves
    assert np.allclose(middle.lines[0].get_ydata(), [5, 5])
    assert list(lower.lines[0].get_ydata()) == [0.2, 0.2]


def test_confusion_matrix_has_true_classes_in_rows():
    axes = figures.confusion_matrix(np.array([[5, 1], [0, 7]]), ["cat", "dog"], "a run").axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "5"),
        ((1, 0), "1"),
        ((1, 1), "7"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]


def test_worst_mistakes_name_truth_answer_and_probability_and_may_be_none():
    images = np.zeros((1, 3, 4, 4), np.uint8)
    drawn = figures.worst_mistakes(images, ["cat"], ["dog"], np.array([0.987]), "a run")
    assert drawn.axes[0].get_title() == "true: cat\npredicted: dog\n98.7 % sure"
    assert "none" in figures.worst_mistakes(images[:0], [], [], np.array([]), "a run").get_suptitle()


def test_normalization_panels_state_the_statistics():
    images = np.array([0, 255] * 8, np.uint8).reshape(4, 1, 2, 2)
    drawn = figures.normalization(images, np.array([0.5]), np.array([0.5]))
    labels = [axes.get_xlabel() for axes in drawn.axes if axes.get_xlabel()]
    assert labels == ["mean 0.500, sd 0.500", "mean 0.000, sd 0.500", "mean 0.000, sd 1.000"]


@pytest.mark.parametrize(("layers", "shown"), [(1, [1]), (3, [1, 2, 3]), (19, [1, 5, 8, 12, 15, 19])])
def test_activations_show_percentiles_of_at_most_six_layers_one_unit_and_the_dead(layers, shown):
    names = [f"act/{layer}/{name}" for layer in range(1, layers + 1) for name in ("p15", "p50", "p85", "dead")]
    names += [f"act/unit/{name}" for name in ("p15", "p50", "p85")]
    looks = [(step, {name: number / 100 + step for number, name in enumerate(names)}) for step in (0, 5, 10)]
    *panels, dead = [axes for axes in figures.activations(looks, "a run").axes if axes.get_visible()]
    titles = [f"layer {layer} of {layers}" for layer in shown]
    assert [axes.get_title() for axes in panels] == [*titles, "one unit of the last layer"]
    assert panels[len(shown) - 1].lines[0].get_xydata().tolist() == [
        [step, values[f"act/{layers}/p50"]] for step, values in looks
    ]
    assert [line.get_label() for line in dead.lines] == [f"layer {layer}" for layer in shown]
    assert np.allclose(dead.lines[0].get_ydata(), [100 * values["act/1/dead"] for _, values in looks])


@pytest.mark.parametrize("name", [r"$\frac{$", "$x^2$", "a\nb", "😀", r"\$ $"])
def test_names_are_written_as_they_are(tmp_path, name):
    figure = figures.confusion_matrix(np.eye(2, dtype=np.int64), [name, "b"], name)
    assert figures.save_figure(lambda: figure, tmp_path / "a.png")
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [name, "b"]
    assert not any(text.get_parse_math() for text in [*labels, figure.axes[0].title])


def test_the_ticks_of_a_log_axis_stay_powers(tmp_path):
    images = np.zeros((4, 1, 8, 8), np.uint8)
    figure = figures.normalization(images, np.zeros(1), np.ones(1))
    assert figures.save_figure(lambda: figure, tmp_path / "a.png")
    assert all(label.get_parse_math() for label in figure.axes[3].get_yticklabels())


def test_each_strip_of_the_normalization_uses_the_whole_grey_scale():
    images = np.array([0, 255] * 8, np.uint8).reshape(4, 1, 2, 2)
    drawn = figures.normalization(images, np.array([0.5]), np.array([0.1]))
    strips = [image for axes in drawn.axes for image in axes.get_images()]
    assert [(strip.get_array().min(), strip.get_array().max()) for strip in strips] == [(0, 254)] * 3
    assert drawn.axes[2].get_title() == "standard scores\nblack -5.00, white 5.00"


def test_the_matplotlibrc_of_a_user_does_not_apply(tmp_path):
    mine = {"text.usetex": True, "font.size": 40, "savefig.bbox": "tight", "axes.prop_cycle": "cycler('color', ['r'])"}
    assert figures.save_figure(lambda: figures.learning_curves(HISTORY, 2, "$a$"), tmp_path / "plain.png")
    with rc_context(mine):
        assert figures.save_figure(lambda: figures.learning_curves(HISTORY, 2, "$a$"), tmp_path / "mine.png")
        assert rcParams["font.size"] == 40  # the user's own figures keep it
    assert (tmp_path / "mine.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_figure_that_cannot_be_drawn_costs_a_line_and_no_other_figure(tmp_path, capsys):
    def fail():
        raise RuntimeError("no such font\nsecond line")

    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "bad.png").write_text("of an earlier attempt")
    drawings = {"bad": fail, "good": lambda: figures.learning_curves(HISTORY, 2, "a run")}
    assert figures.save_figures(tmp_path / "figures", drawings) == [tmp_path / "figures" / "good.png"]
    assert capsys.readouterr().err == "bad.png could not be drawn: no such font\n"
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["good.png"]


@pytest.mark.full
def test_a_run_finishes_whatever_matplotlib_is_set_to(tmp_path, monkeypatch):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: oops\n")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "no such backend")
    small = [key for key in SMALL if key != "figures=false"]
    words = [*small, "trainer.max_epochs=1", f"paths.outputs={tmp_path}"]
    done = subprocess.run([sys.executable, "src/train.py", *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be drawn" not in done.stderr
    assert len(list(tmp_path.glob("runs/*/figures/*.png"))) == 4
