"""The views that MLflow's pages are given; that they show what they should is seen by tests/ui."""

import json

from gaplab.notes import NOTE
from gaplab.tracking import dashboard

RUNS = f"{dashboard.VIEW}gaplab"
LONGEST = 20_000  # characters of an experiment's tag


def test_a_view_is_as_mlflow_saves_one():
    views = dashboard.views()
    assert set(views) == {RUNS, f"{RUNS}-conditions"}
    for value in views.values():
        saved = json.loads(value)
        assert (type(saved["name"]), type(saved["createdAt"]), type(saved["state"])) == (str, int, str)
        state = json.loads(saved["state"])
        assert state["selectedColumns"] == list(dashboard.COLUMNS)
        assert [one["metricKey"] for one in state["compareRunCharts"][:3]] == ["train/acc", "valid/acc", "gap/acc_pp"]
        sections = {one["uuid"] for one in state["compareRunSections"]}
        assert {one["metricSectionId"] for one in state["compareRunCharts"]} <= sections
        assert len({one["uuid"] for one in state["compareRunCharts"]}) == len(state["compareRunCharts"])
        assert len(value) < LONGEST


def test_nothing_is_missing_where_all_is_set():
    everything = dashboard.missing({})
    assert set(everything) == {NOTE, *dashboard.views()}
    assert "train/acc_running" in everything[NOTE]
    assert dashboard.missing(everything) == {}


def test_what_an_older_version_made_is_renewed_and_what_a_person_made_is_not():
    older = json.dumps({"name": "gaplab: runs", "createdAt": 1, "updatedAt": 1, "state": "{}"})
    overwritten = json.dumps({"name": "gaplab: runs", "createdAt": 1, "updatedAt": 2, "state": "{}"})
    tags = dashboard.missing({}) | {f"{dashboard.VIEW}mine": "whatever"}
    assert set(dashboard.missing(tags | {RUNS: older})) == {RUNS}
    for kept in (overwritten, "deflate;abc", "[]"):
        assert dashboard.missing(tags | {RUNS: kept}) == {}
    assert dashboard.missing(tags | {NOTE: "my own words"}) == {}
