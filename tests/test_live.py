"""What a sweep shows: counts, the best so far, and the table at its end."""

import io
import json
from pathlib import Path

from rich.console import Console

from gaplab.live import LiveView, epochs_done, print_outcome

RESULT = {"train_acc": 0.99, "valid_acc": 0.97, "gap_acc": 0.02, "test_acc": 0.96, "total_s": 3.0, "error": None}


def job(sweep: Path, name: str, status: str | None, valid: float = 0.97, epochs: int = 0) -> Path:
    folder = sweep / name
    folder.mkdir(parents=True)
    if epochs:
        (folder / "splits.npz").touch()
        events = [{"event": "metrics", "step": step + 1, "values": {"valid/acc": 0}} for step in range(epochs)]
        events.insert(1, {"event": "run"})  # gone on with
        (folder / "journal.jsonl").write_text("".join(json.dumps(event | {"time": 1}) + "\n" for event in events))
    if status:
        result = RESULT | {"status": status, "valid_acc": valid, "best": {"valid_acc": valid}}
        if status == "FAILED":
            result |= {"error": "the loss is nan at step 3", "best": None}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_terminal_shows_counts_time_left_and_the_best(tmp_path: Path):
    folders = [
        job(tmp_path, "0_a", "FINISHED", 0.97),
        job(tmp_path, "1_b", "FINISHED", 0.98),
        job(tmp_path, "2_c", "FAILED"),
        job(tmp_path, "3_d", None, epochs=2),
        job(tmp_path, "4_e", None),
    ]
    out = io.StringIO()
    with LiveView(Console(file=out, force_terminal=True, width=120), folders, [4] * 5):
        pass
    text = out.getvalue()
    assert "2 done, 1 running, " in text
    assert "1 failed" in text
    assert ", 1 waiting " in text
    assert " left" in text
    assert "3_d  epoch 2/4" in text
    assert "best valid accuracy so far 0.9800: 1_b" in text
    assert epochs_done(folders[3]) == 2


def test_elsewhere_each_ended_job_is_a_line(tmp_path: Path):
    folders = [job(tmp_path, "0_a", "FINISHED"), job(tmp_path, "1_b", "FAILED"), job(tmp_path, "2_c", None)]
    out = io.StringIO()
    with LiveView(Console(file=out, width=120), folders, [4] * 3):
        pass
    assert out.getvalue().splitlines() == [
        "1/3  0_a  train 0.9900  valid 0.9700  gap +2.00 pp  3.0 s",
        "2/3  1_b  FAILED: the loss is nan at step 3",
    ]


def test_the_outcome_has_a_row_for_each_condition_and_says_what_to_type():
    out = io.StringIO()
    results = [RESULT | {"status": "FINISHED", "valid_acc": value} for value in (0.97, 0.98)]
    results += [{}, RESULT | {"status": "FAILED", "error": "out of memory"}]
    results[0] |= {"notes": ["few steps"]}
    labels, names = ["bn=false", "bn=false", "bn=true", "bn=true"], ["0_a", "1_b", "2_c", "3_d"]
    failed = [False, False, True, True]
    print_outcome(
        Console(file=out, width=120), names, labels, results, failed, "train -m sweep.resume=x", "report sweep=x", None
    )
    text = out.getvalue()
    assert "not finished" in text
    assert "0.9750 ± 0.0071" in text
    assert "note: few steps (1 of 4 jobs)" in text
    assert "clean" not in text
    assert "2_c  not run" in text
    assert "3_d  FAILED: out of memory" in text
    assert "go on     train -m sweep.resume=x\nnext      report sweep=x" in text


def test_the_outcome_under_label_noise_counts_the_labels_without_it():
    out = io.StringIO()
    result = RESULT | {"status": "FINISHED", "train_acc_clean": 0.995, "gap_acc_clean": 0.025}
    print_outcome(Console(file=out, width=120), ["0_a"], ["bn=false"], [result], [False], "resume", "report", None)
    assert "0.9950" in out.getvalue()
    assert "2.50" in out.getvalue()
    assert "data.label_noise: train and gap count the labels without noise" in out.getvalue()
