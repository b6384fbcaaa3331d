import json
import math

from conftest import composed

from gaplab.tracking.journal import Tracker


def events(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_the_journal_holds_everything_in_order(tmp_path):
    tracker = Tracker(tmp_path, composed("tracking=none").tracking, "a run", {"condition": "c"})
    tracker.params({"model.bn": True, "seed": 3})
    tracker.metrics({"gap/acc": 0.25}, step=1)
    tracker.artifact(tmp_path / "é.png", "figures")
    assert [event["event"] for event in events(tmp_path)] == ["run", "tags", "params", "metrics", "artifact"]  # at once
    assert tracker.finish("FINISHED") is None
    found = events(tmp_path)
    assert found[0]["name"] == "a run"
    assert found[2]["values"] == {"model.bn": "True", "seed": "3"}
    assert (found[3]["step"], found[3]["values"]) == (1, {"gap/acc": 0.25})
    assert found[-1]["status"] == "FINISHED"
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)


def test_non_finite_metrics_become_a_tag(tmp_path):
    tracker = Tracker(tmp_path, composed("tracking=none").tracking, "a run", {})
    tracker.metrics({"train/loss": math.inf, "valid/loss": math.nan, "lr": 0.1}, step=4)
    tracker.finish("FINISHED")
    assert events(tmp_path)[-3]["values"] == {"lr": 0.1}
    assert events(tmp_path)[-2]["values"] == {"nonfinite/train/loss": "4", "nonfinite/valid/loss": "4"}
