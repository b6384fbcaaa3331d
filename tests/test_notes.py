"""Descriptions: what people typed stays as it is, and a tag's length is kept."""

from gaplab import notes
from gaplab.result import RunResult


def test_names_are_shown_as_they_are():
    assert notes.code("model.init=a`b") == "``model.init=a`b``"
    assert notes.code("`a`\nb") == "`` `a` b ``"
    assert notes.escaped("*bold* [link](x) <img> a|b _c_") == r"\*bold\* \[link\](x) \<img\> a\|b \_c\_"
    assert notes.table(["a", "b"], [["x|y", r"p\|q"]]).splitlines()[2] == r"| x\|y&emsp; | p\|q&emsp; |"


def test_what_was_asked_names_factors_seeds_claim_and_command():
    text = notes.asked(
        "mlp on mnist, 10 epochs",
        {"model.bn": ["false", "true"], "model.init": ["a|b"]},
        [0, 1, 2, 5],
        8,
        "python src/train.py -m model.bn=false,true",
        "Does it?",
        "overfitting",
    )
    assert "**Does it?** (claim `overfitting`)" in text
    assert r"| `model.init`&emsp; | `a\|b`&emsp; |" in text
    assert "8 runs of mlp on mnist, 10 epochs: every condition with seeds 0, 1, 2, 5." in text
    assert text.endswith("`python src/train.py -m model.bn=false,true`")
    assert "one condition with seed 3" in notes.asked("mlp on mnist", {}, [3], 1, "python")


def test_a_description_is_never_longer_than_mlflow_takes_and_keeps_the_question():
    found = "\n".join(f"- line {number} " + "x" * 90 for number in range(200))
    whole = notes.joined(found, "the question")
    assert len(whole) <= notes.LONGEST
    assert "… cut here; the report has all of it" in whole
    assert notes.asked_of(whole) == "the question"
    assert whole.startswith("- line 0 ")
    assert len(notes.joined(found, "x" * 9000)) <= notes.LONGEST
    assert notes.asked_of("written by an older version") == ""


def test_failed_jobs_are_counted_and_told():
    text = notes.counts({f"{number}_a": "out of *memory*" for number in range(20)}, 24)
    assert text.startswith("4 of 24 runs finished.")
    assert r"- `0_a`: out of \*memory\*" in text
    assert "… and 8 more" in text


def test_a_run_says_its_gap_with_the_interval_and_what_ended_it():
    values = {"train_acc": 0.99, "valid_acc": 0.97, "gap_acc": 0.02, "gap_acc_low": 0.015, "gap_acc_high": 0.025}
    result = RunResult("r", "FINISHED", 0, "c", "h", epochs=10, test_acc=0.965, best=values | {"epoch": 7}, **values)
    text = notes.of_run(vars(result))
    assert text.startswith("**Gap +2.00 pp [+1.50, +2.50]** after 10 epochs")
    assert "| best valid&emsp; | 7&emsp; | 0.9900&emsp; | 0.9700&emsp; |" in text
    assert "0.9650" in text
    lost = RunResult("r", "FAILED", 0, "c", "h", error="the loss is nan at step 3")
    assert notes.of_run(vars(lost)) == "**FAILED** the loss is nan at step 3"


def test_a_run_under_label_noise_shows_its_gap_against_the_labels_without_it_and_its_notes():
    values = {"train_acc": 0.7, "valid_acc": 0.97, "gap_acc": -0.27, "gap_acc_low": -0.3, "gap_acc_high": -0.25}
    clean = {"train_acc_clean": 0.99, "gap_acc_clean": 0.02, "gap_acc_clean_low": 0.01, "gap_acc_clean_high": 0.03}
    both = values | clean
    result = RunResult("r", "FINISHED", 0, "c", "h", epochs=10, best=both | {"epoch": 7}, notes=["few *steps*"], **both)
    text = notes.of_run(vars(result))
    assert text.startswith(
        "**Gap +2.00 pp [+1.00, +3.00]** after 10 epochs, with its 95 % interval, against the labels"
    )
    assert "| best valid&emsp; | 7&emsp; | 0.7000&emsp; | 0.9700&emsp; | -27.00&emsp; |" in text
    assert "| best valid, clean labels&emsp; | 7&emsp; | 0.9900&emsp; | 0.9700&emsp; | +2.00&emsp; |" in text
    assert text.endswith(r"Note: few \*steps\*")
