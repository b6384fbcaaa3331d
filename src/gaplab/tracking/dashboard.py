"""What MLflow's own pages show of gaplab's runs: a description of the experiment, and two views of its list.

MLflow keeps columns and charts in each browser, and a view that is saved for all in a tag of the experiment,
`mlflow.sharedViewState.<key>`, which the page opens with `?viewStateShareKey=<key>` and offers under "Views". Its value
is JSON: `name`, `createdAt` and `updatedAt` in milliseconds, and `state`, a string of JSON in turn. MLflow's button
"Save as new view" deflates the state; its pages read it as it is too, and so can people. Known of MLflow 3.17.2; a
state that another version does not understand leaves its usual page.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from gaplab.notes import NOTE, table

VIEW = "mlflow.sharedViewState."
MADE_MS = 1_795_600_000_000  # both times of a view: one that a person overwrote has another `updatedAt`

QUESTION = (
    "How large is the overfitting gap, which of BatchNorm, Dropout and the initializer closes it, and is the "
    "difference real or noise?"
)
READING = (
    "A sweep is one row, and **+** opens its runs below it; its own page says what was asked and what was found. "
    "**Views**, at the top, has *gaplab: runs* and *gaplab: conditions*, whose curves are means over seeds. One seed "
    "is no finding: `python src/report.py` compares the conditions of a sweep, and its page is among the sweep's "
    "artifacts."
)
MEANING = {
    "`train/acc`, `valid/acc`": "accuracy over *every* sample of the split, both with the *same* weights, in eval "
    "mode, without augmentation, at the end of the last epoch",
    "`gap/acc_pp`": "the overfitting gap, `train/acc − valid/acc`, in percentage points (pp); `gap/acc_low_pp` and "
    "`gap/acc_high_pp` are its 95 % interval. `gap/acc` and the others without `_pp` are the same as fractions",
    "`data`": "the data set and how many samples each split has: compare gaps of runs on the same data alone",
    "`train/acc_clean`, `gap/acc_clean`": "under `data.label_noise`: counted against the labels without noise, where "
    "`train/acc` and `gap/acc` count the labels that the network is trained on",
    "`test/acc`": "read once, at the end, with the weights of the epoch that has the best `valid/acc`",
    "`best/…`": "the same figures, of that epoch",
    "`train/acc_running`": "what most tools call train accuracy: averaged over the mini-batches of an epoch while the "
    "weights move; never used for the gap",
    "`model.bn`, `model.dropout`, `model.init`, `seed`": "what was varied; runs that differ in `seed` alone are "
    "replicates",
}
COLUMNS = (
    "metrics.`train/acc`", "metrics.`valid/acc`", "metrics.`gap/acc_pp`", "metrics.`test/acc`",
    "params.`model.bn`", "params.`model.dropout`", "params.`model.init`", "params.`seed`",
    "tags.`data`",
)  # fmt: skip
WIDTHS = {
    "attributes.`Run Name`": 240,
    "metrics.`train/acc`": 95,
    "metrics.`valid/acc`": 95,
    "metrics.`gap/acc_pp`": 105,
    "metrics.`test/acc`": 95,
    "params.`model.bn`": 90,
    "params.`model.dropout`": 125,
    "params.`model.init`": 125,
    "params.`seed`": 70,
    "tags.`data`": 250,
}
GROUPED_BY = ("arm", "data", "sweep", "condition")  # tags; the first two are for people
MATTER, END = "Train, valid and gap", "Test, valid and gap at the end"
CHARTS = (
    (MATTER, "LINE", "train/acc"), (MATTER, "LINE", "valid/acc"), (MATTER, "LINE", "gap/acc_pp"),
    (END, "BAR", "test/acc"), (END, "BAR", "valid/acc"), (END, "BAR", "gap/acc_pp"),
    ("Loss", "LINE", "train/loss"), ("Loss", "LINE", "valid/loss"), ("Loss", "LINE", "gap/loss"),
)  # fmt: skip
FOLDED = (
    "gap", "train", "test", "valid", "best", "best/gap", "best/train", "best/valid", "sweep", "time", "bn",
    "Model metrics", "System metrics",
)  # fmt: skip


def views() -> dict[str, str]:
    """The tags of the experiment that are its views."""
    conditions = {
        "searchFilter": "params.`seed` LIKE '%'",  # not the sweeps, which would be groups of their own;
        "orderByKey": "tags.`data`",  # those that can be compared beside each other
        "groupBy": _grouped(),
        "runsHiddenMode": "SHOW_ALL",
    }
    return {
        f"{VIEW}gaplab": _view("gaplab: runs", _state()),
        f"{VIEW}gaplab-conditions": _view("gaplab: conditions", _state() | conditions),
    }


def missing(tags: Mapping[str, str]) -> dict[str, str]:
    """What is to be set on an experiment that has `tags`: never what a person wrote or saved."""
    wanted = {name: value for name, value in views().items() if _is_ours(tags.get(name)) and tags.get(name) != value}
    return wanted if tags.get(NOTE) else {NOTE: description()} | wanted


def description() -> str:
    """Of the experiment."""
    return f"**{QUESTION}**\n\n{READING}\n\n{table(['column', 'what it is'], map(list, MEANING.items()))}"


def addresses(server: str, experiment: str) -> dict[str, str]:
    """Where each view is to be seen, by its name."""
    page = f"{server}/#/experiments/{experiment}/runs?"
    common = {"workflowType": "machine_learning"}
    return {
        "runs": page + urlencode(common | {"viewStateShareKey": "gaplab"}),
        "conditions": page + urlencode(common | {"compareRunsMode": "CHART", "viewStateShareKey": "gaplab-conditions"}),
    }


def _is_ours(value: str | None) -> bool:
    """Whether a view is absent or as some gaplab made it."""
    try:
        found = json.loads(value) if value else {"updatedAt": MADE_MS}
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("updatedAt") == found.get("createdAt", MADE_MS)


def _view(name: str, state: dict[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": MADE_MS, "updatedAt": MADE_MS, "state": json.dumps(state)})


def _state() -> dict[str, Any]:
    """Newest first, the columns that matter, the charts that matter."""
    opened = list(dict.fromkeys(section for section, _, _ in CHARTS))
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": ["attributes.`Run Name`", *COLUMNS],
        "columnWidths": WIDTHS,
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": [_chart(*one) for one in CHARTS],
        "compareRunSections": [_section(name, name in opened) for name in (*opened, *FOLDED)],
        "isAccordionReordered": True,  # else sections stand in the order of their names
        "hideEmptyCharts": True,
        "useGroupedValuesInCharts": True,
    }


def _chart(section: str, kind: str, metric: str) -> dict[str, Any]:
    line = {
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "selectedXAxisMetricKey": "",
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
    return {
        "uuid": f"{kind} {metric}",
        "type": kind,
        "metricKey": metric,
        "displayName": metric,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    } | (line if kind == "LINE" else {})


def _section(name: str, opened: bool) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": opened, "isReordered": True, "deleted": False, "isGenerated": False}


def _grouped() -> dict[str, Any]:
    keys = [{"mode": "tag", "groupByData": name} for name in GROUPED_BY]
    return {"aggregateFunction": "average", "groupByKeys": keys}
