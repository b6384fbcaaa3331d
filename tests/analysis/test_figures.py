"""What the figures of a sweep show is what its runs say, and what is missing does not break them."""

import random
from itertools import product

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from gaplab import stats
from gaplab.analysis import figures
from gaplab.analysis.compare import Section, sections
from gaplab.analysis.runs import Run

METRICS = ["gap/acc", "valid/acc"]
GRID = {"model.bn": ["false", "true"], "model.dropout": ["0", "0.5"], "model.init": ["xavier", "kaiming", "lsuv"]}
NUMBERS = {"model.bn": ["false", "true"], "model.dropout": ["0", "0.5"], "optimizer.lr": ["0.01", "0.1", "1"]}
LETTERS = [*"abcdefghijklmnopqr"]


def build_run(settings, seed, *, epochs=4, status="FINISHED", diverged=False, looks=False, valid=0.97):
    """Valid accuracy grows by 0.01 an epoch up to `valid` plus noise, the gap is 0.02 and the running one 0.01."""
    last = valid + random.Random(f"{settings} {seed}").gauss(0, 0.001)
    history = {"valid/acc": {epoch: last - 0.01 * (epochs - epoch) for epoch in range(1, epochs + 1)}}
    for name, more in (("train/acc", 0.02), ("train/acc_running", 0.01)):
        history[name] = {epoch: value + more for epoch, value in history["valid/acc"].items()}
        history[name.replace("acc", "loss")] = {epoch: 1 - value for epoch, value in history[name].items()}
    history["valid/loss"] = {epoch: 1 - value for epoch, value in history["valid/acc"].items()}
    history["gap/acc"] = dict.fromkeys(history["valid/acc"], 0.02)
    metrics = {name: values[epochs] for name, values in history.items()} if status == "FINISHED" else {}
    if looks:
        for level, value in (("p15", -1.0), ("p50", 0.0), ("p85", 1.0)):
            history[f"act/unit/{level}"] = dict.fromkeys(range(0, 100 * epochs + 1, 50), value + seed)
    fixed = {"data.name": "mnist", "data.valid_size": "10000", "model.name": "mlp"}
    return Run(f"{settings} {seed}", seed, status, fixed | settings, metrics, history, diverged)


def build_section(factors, seeds=range(6), lost=None, **options) -> Section:
    """`lost(settings, seed)` gives other options for some runs, or None."""
    runs = []
    for levels in product(*factors.values()):
        settings = dict(zip(factors, levels, strict=True))
        runs += [build_run(settings, seed, **options | ((lost and lost(settings, seed)) or {})) for seed in seeds]
    return sections(runs, METRICS, 0.002)[0]


def some_lost(settings, seed):
    if settings["model.bn"] == "false" and settings["optimizer.lr"] == "1":
        return {"status": "FAILED", "diverged": True, "epochs": 1}
    if settings["model.bn"] == "false" and settings["optimizer.lr"] == "0.1" and seed < 2:
        return [{"status": "FAILED", "diverged": True}, {"status": "RUNNING"}][seed]
    return {"valid": 0.1} if settings["model.dropout"] == "0.5" and settings["optimizer.lr"] == "0.01" else None


SECTIONS = {
    "three factors": lambda: build_section(GRID),
    "one condition": lambda: build_section({}, looks=True),
    "one run": lambda: build_section({}, [3]),
    "one seed": lambda: build_section(GRID, [3], looks=True),
    "two seeds, one epoch": lambda: build_section({"model.bn": ["false", "true"]}, [0, 1], epochs=1, looks=True),
    "no run finished": lambda: build_section(GRID, [0], looks=True, status="FAILED", diverged=True, epochs=2),
    "some lost, some at chance": lambda: build_section(NUMBERS, lost=some_lost, looks=True),
    "36 conditions": lambda: build_section({"a": LETTERS, "b": ["x", "y with a very long name indeed"]}, [0, 1]),
    "18 numbers": lambda: build_section({"lr": [f"{2.0**-k}" for k in range(18)]}, [0, 1]),
    "perfect": lambda: build_section({"data.name": ["a"], "model.bn": ["true", "false"]}, [0], valid=0.98, epochs=2),
}


def dots(axes):
    return np.concatenate([one.get_offsets() for one in axes.collections if isinstance(one, PathCollection)])


def texts(figure):
    return " ".join(
        [figure.get_suptitle(), *(text.get_text() for legend in figure.legends for text in legend.get_texts())]
        + [axes.get_title() for axes in figure.axes]
    )


def lines(axes, style="-"):
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata()) > 1]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_figure_that_makes_sense_is_drawn(name):
    for draw in figures.drawings(SECTIONS[name](), METRICS).values():
        figure = draw()
        assert isinstance(figure, Figure)
        figure.set_dpi(20)
        figure.canvas.draw()
        assert figure.get_suptitle()


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("three factors", "conditions learning_curves loss_curves interaction honest_vs_running"),
        ("one condition", "conditions learning_curves loss_curves honest_vs_running activations"),
        ("two seeds, one epoch", "conditions honest_vs_running activations"),
        ("no run finished", "activations"),
        (
            "some lost, some at chance",
            "conditions learning_curves loss_curves interaction heat_map honest_vs_running activations",
        ),
    ],
)
def test_only_figures_that_make_sense_are_offered(name, names):
    assert " ".join(figures.drawings(SECTIONS[name](), METRICS)) == names


def test_conditions_show_every_seed_and_the_interval_of_the_mean():
    section = build_section(GRID)
    gap, valid = figures.conditions(section, METRICS).axes
    assert len(dots(gap)) == len(dots(valid)) == 72
    values = {100 * value for one in section.conditions for value in one.values["valid/acc"].values()}
    assert np.allclose(sorted(dots(valid)[:, 0]), sorted(values))
    ends = [list(line.get_xdata()) for line in lines(valid)]
    found = [stats.estimate([100 * value for value in one.values["valid/acc"].values()]) for one in section.conditions]
    assert np.allclose(ends, [(one.low, one.high) for one in found])
    labels = [label.get_text() for label in gap.get_yticklabels()]
    assert labels[0] == "bn=false dropout=0 init=xavier (reference)"
    assert labels[1] == "bn=false dropout=0 init=kaiming"


def test_conditions_count_what_is_lost_and_spread_the_good_ones_beside_chance():
    section = build_section(NUMBERS, lost=some_lost)
    gap, valid = figures.conditions(section, METRICS).axes
    assert len(dots(gap)) == sum(run.status == "FINISHED" for run in section.runs)
    labels = " ".join(
        label.get_text().replace("\n", " ").replace(figures.NO_BREAK, " ") for label in gap.get_yticklabels()
    )
    assert "lr=1 (6 of 6 diverged)" in labels
    assert "lr=0.1 (1 of 6 diverged, 1 of 6 unfinished)" in labels
    place = valid.transAxes.inverted().transform(valid.transData.transform([[10, 0], [97, 0], [98, 0]]))[:, 0]
    assert place[2] - place[1] > 0.05 * (place[1] - place[0])  # on a linear axis 0.01
    assert place[0] >= 0


def test_learning_curves_are_means_over_seeds_in_a_band():
    section = build_section(GRID)
    panels = figures.learning_curves(section).axes
    assert len(panels) == 6
    assert len(lines(panels[0])) == len(lines(panels[0], "--")) == 2
    runs = section.conditions[0].runs
    expected = [100 * np.mean([run.history["valid/acc"][epoch] for run in runs]) for epoch in (1, 2, 3, 4)]
    assert any(np.allclose(line.get_ydata(), expected) for line in lines(panels[0]))
    band = panels[0].collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), 100 * max(run.metrics["valid/acc"] for run in runs))


def test_learning_curves_end_where_the_first_seed_stops_and_say_who_is_missing():
    section = build_section(NUMBERS, lost=lambda s, seed: {"epochs": 2} if seed == 5 else some_lost(s, seed))
    figure = figures.learning_curves(section)
    assert {tuple(line.get_xdata()) for axes in figure.axes for line in lines(axes)} == {(1, 2)}
    assert "dropout=0 lr=1\nbn=false: 1 of 6 seeds" in texts(figure)


def test_too_many_panels_are_pooled_or_cut_and_the_title_says_so():
    pooled = figures.learning_curves(
        build_section({"a": LETTERS[:6], "b": LETTERS[:5], "c": ["x", "y"]}, [0], epochs=2)
    )
    assert len(pooled.axes) == 6
    assert "means over b" in texts(pooled)
    assert "the first 16 of 18" in texts(figures.learning_curves(build_section({"a": LETTERS}, [0], epochs=2)))


def bn_with_dropout_only(settings, _):
    return {"valid": 0.9} if settings["model.bn"] == "true" and settings["model.dropout"] == "0.5" else None


def test_interaction_averages_within_each_seed_before_the_interval():
    section = build_section(GRID, lost=bn_with_dropout_only)
    valid = figures.interaction(section).axes[1]
    members = [one for one in section.conditions if one.levels[:2] == ("true", "0.5")]
    per_seed = [100 * np.mean([one.values["valid/acc"][seed] for one in members]) for seed in range(6)]
    found = stats.estimate(per_seed)
    assert any(np.allclose(line.get_ydata(), [found.low, found.high]) for line in lines(valid))
    curves = {line.get_label(): line for line in lines(valid) if line.get_label() in ("false", "true")}
    assert list(curves["true"].get_xdata()) == [0, 0.5]
    assert np.isclose(curves["true"].get_ydata()[1], found.mean)


def test_interaction_shows_the_two_factors_that_interact():
    def crossing(settings, _):
        return {"valid": 0.9} if (settings["model.dropout"], settings["model.init"]) == ("0.5", "lsuv") else None

    gap, valid = figures.interaction(build_section(GRID, lost=crossing)).axes
    assert gap.get_xlabel() == "init"
    assert {line.get_label() for line in lines(valid)} >= {"0", "0.5"}
    assert figures.interaction(build_section(GRID, lost=bn_with_dropout_only)).axes[0].get_xlabel() == "dropout"


@pytest.mark.parametrize("seeds", [range(2), range(6)])
def test_no_interval_leaves_its_panel_or_what_an_accuracy_can_be(seeds):
    section = build_section(GRID, seeds, valid=0.9985)
    for figure in (figures.conditions(section, METRICS), figures.interaction(section, METRICS)):
        for axes in figure.axes:
            across, up = axes.get_xlim(), sorted(axes.get_ylim())
            for line in lines(axes):
                assert across[0] <= min(line.get_xdata()) <= max(line.get_xdata()) <= across[1]
                assert up[0] <= min(line.get_ydata()) <= max(line.get_ydata()) <= up[1]
    valid = figures.conditions(section, METRICS).axes[1]
    assert max(end for line in lines(valid) for end in line.get_xdata()) <= 100


def test_learning_curves_are_linear_so_that_the_distance_is_the_gap():
    section = build_section(
        {"model.dropout": ["0", "0.5"]}, lost=lambda s, _: {"valid": 0.5 + float(s["model.dropout"])}
    )
    assert [axes.get_yscale() for axes in figures.learning_curves(section).axes] == ["linear"]
    losses = figures.learning_curves(section, "loss").axes[0]
    assert losses.get_ylabel() == "loss, nats"
    assert all(0 < value < 1 for line in lines(losses) for value in line.get_ydata())  # not in percent


def test_under_label_noise_learning_curves_count_train_against_the_true_labels():
    section = build_section({"data.label_noise": ["0.0", "0.3"]})
    for run in section.runs:
        if run.settings["data.label_noise"] == "0.3":
            run.history["train/acc_clean"] = dict.fromkeys(run.history["train/acc"], 0.5)
    section.gap = "gap/acc_clean"
    figure = figures.learning_curves(section)
    ends = {round(float(line.get_ydata()[-1])) for line in lines(figure.axes[0], "--")}
    assert ends == {50, 99}
    assert "against the true labels" in texts(figure)
    assert "honest_vs_running" not in figures.drawings(section, METRICS)
    for run in section.runs:
        run.history.pop("train/acc_clean", None)  # of a run that is older than it: none is drawn instead
    assert {float(line.get_ydata()[-1]) > 98 for line in lines(figures.learning_curves(section).axes[0], "--")} == {
        True
    }


def test_interaction_takes_a_logarithmic_axis_and_marks_points_that_lack_runs():
    figure = figures.interaction(build_section(NUMBERS, lost=some_lost))
    assert figure.axes[0].get_xscale() == "log"
    assert "means over dropout" in texts(figure)
    assert "hollow: some runs are missing" in texts(figure)
    hollow = [line for line in figure.axes[1].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata()[0] for line in hollow] == [0.1]  # at 1 there is none to draw


def test_heat_map_has_a_panel_for_each_level_of_a_boolean_and_a_number_in_each_cell():
    section = build_section(NUMBERS, lost=some_lost)
    without, with_bn = figures.heat_map(section).axes
    cells = {text.get_position(): text.get_text() for text in without.texts}
    assert len(cells) == len(with_bn.texts) == 6
    mean = np.mean(list(section.conditions[0].values["valid/acc"].values()))
    assert cells[0, 0] == f"{100 * mean:.2f}"
    assert cells[1, 0].endswith("4 of 6")
    assert cells[2, 0] == "–"
    assert with_bn.get_title() == "bn=true"


def test_honest_gap_lies_across_and_the_running_one_up():
    figure = figures.honest_vs_running(build_section(GRID))
    assert len(dots(figure.axes[0])) == 72
    assert np.allclose(dots(figure.axes[0]), [2, 1])
    assert "dropout=0.5: off by −1.00 pp on average" in texts(figure)


def test_activations_show_the_smallest_seed_with_and_without_batchnorm():
    section = build_section({"model.init": ["a", "b"], "model.bn": ["true", "false"]}, [2, 1, 3], looks=True)
    for run in section.runs:
        if run.settings["model.bn"] == "true":
            run.history["act/unit/p85"] = dict.fromkeys(run.history["act/unit/p85"], 70.0)
    figure = figures.activations(section)
    accuracy, without, with_bn = figure.axes
    assert [list(line.get_xdata()) for line in lines(accuracy)] == [[100, 200, 300, 400]] * 2
    assert [set(line.get_ydata()) for line in without.lines[:3]] == [{0}, {1}, {2}]  # percentiles plus the seed
    assert list(without.lines[0].get_xdata()) == list(range(0, 401, 50))
    assert without.get_title() == "(b) without BatchNorm: init=a bn=false, seed\N{NO-BREAK SPACE}1"
    assert with_bn.get_title().startswith("(c) with BatchNorm")
    assert without.get_ylim() == with_bn.get_ylim()
    assert with_bn.get_ylim()[1] > 70  # nothing is cut off


def test_activations_of_a_diverged_run_say_so():
    figure = figures.activations(build_section(GRID, [0], looks=True, status="FAILED", diverged=True))
    assert "(diverged)" in texts(figure)


def test_interaction_shows_a_pair_that_was_crossed():
    crossed = [build_run(dict(zip(GRID, (*pair, "xavier"), strict=True)), 0) for pair in product(*[*GRID.values()][:2])]
    others = [build_run(dict(zip(GRID, ("false", "0", init), strict=True)), 0) for init in ("kaiming", "lsuv")]
    assert figures.interaction(sections(crossed + others, METRICS, 0.002)[0]).axes[0].get_xlabel() == "dropout"
