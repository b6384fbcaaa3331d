"""What a run prints at its end, and the notes on accuracies that mean less than they seem to."""

import io
from dataclasses import replace

import pytest
from conftest import composed
from rich.console import Console

from gaplab.result import RunResult, cautions, print_summary

RESULT = RunResult("r", "FINISHED", 0, "c", "h", epochs=10)
COUNTS = {"train": [900, 100], "valid": [25, 1]}


def noted(result: RunResult = RESULT, counts: dict = COUNTS, momentum: float | None = None, batches: int = 100) -> list:
    return cautions(result, ["oak", "ash"], counts, momentum, batches)


def test_few_steps_for_the_running_statistics_are_noted_with_the_share_of_their_initial_values():
    (note,) = noted(momentum=0.1, batches=10)
    assert "after 10 mini-batches" in note
    assert "(momentum 0.1) still hold 35 % of their initial values" in note  # 0.9 ** 10
    assert noted(momentum=0.1, batches=43)  # 1.08 %
    assert not noted(momentum=0.1, batches=44)  # 0.97 %
    assert not noted(momentum=None, batches=1)
    assert not noted(momentum=1.0, batches=1)


@pytest.mark.parametrize(
    ("correct", "total", "said"),
    [
        (25, 26, "valid accuracy 0.9615 is no higher than 0.9615, which a network that always answers oak"),
        (20, 26, "valid accuracy 0.7692 is no higher than 0.9615"),
        (26, 26, "valid accuracy 1.0000 is not distinguishable from 0.9615"),
    ],
)
def test_an_accuracy_at_the_rate_of_the_largest_class_is_noted_with_both_numbers(correct, total, said):
    (note,) = noted(replace(RESULT, valid_acc=correct / total))
    assert said in note


def test_an_accuracy_above_that_rate_is_not_and_test_is_compared_with_its_own_classes():
    counts = {"train": [60, 40], "valid": [600, 400], "test": [700, 300]}
    result = replace(RESULT, valid_acc=0.65, test_acc=0.71)
    (note,) = noted(result, counts)
    assert "test accuracy 0.7100 is not distinguishable from 0.7000" in note
    assert not noted(replace(result, test_acc=0.75), counts)


def test_a_class_that_a_split_has_not_is_noted_before_anything_is_trained():
    assert noted(counts={"train": [9, 3], "valid": [3, 0]}) == ["the valid split has no sample of ash"]
    assert noted(counts={"train": [9, 0], "valid": [3, 1]}) == ["the train split has no sample of ash"]
    many = cautions(RESULT, [f"n{i}\x1b" for i in range(9)], {"train": [1] * 9, "valid": [1] + [0] * 8}, None, 1)
    assert many == [r"the valid split has no sample of n1\x1b, n2\x1b, n3\x1b and 5 more"]


def shown(result: RunResult, *overrides: str) -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=80), result, composed(*overrides))
    return file.getvalue()


def test_the_table_under_label_noise_has_rows_that_count_the_labels_without_it():
    values = {"train_acc": 0.7, "valid_acc": 0.95, "gap_acc": -0.25, "gap_acc_low": -0.31, "gap_acc_high": -0.2}
    clean = {"train_acc_clean": 0.97, "gap_acc_clean": 0.02, "gap_acc_clean_low": 0.01, "gap_acc_clean_high": 0.04}
    noisy = replace(RESULT, test_acc=0.94, best=values | clean | {"epoch": 7}, **values, **clean, notes=["[b] few"])
    text = shown(noisy, "data.label_noise=0.3")
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("best", "last", "clean"))]
    assert rows[0] == ["best", "valid", "7", "0.7000", "0.9500", "-25.00", "[-31.00,", "-20.00]", "0.9400"]
    assert rows[1] == rows[3] == ["clean", "labels", "0.9700", "0.9500", "+2.00", "[+1.00,", "+4.00]"]
    assert "data.label_noise=0.3: train and gap count the labels that the network is trained on" in text
    assert "note: [b] few\n" in text
    assert "clean" not in shown(replace(RESULT, best=values | {"epoch": 7}, **values))
