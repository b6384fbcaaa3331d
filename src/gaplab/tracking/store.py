"""Runs read back from an MLflow store. MLflow takes seconds to import, so this is imported where it is used."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gaplab.errors import UserError
from gaplab.tracking.environment import settle

# a person waits: a server that does not answer is told of within 10 s
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
CURVES = ("train/acc", "valid/acc", "gap/acc", "train/acc_running", "train/acc_clean", "gap/acc_clean")


def connect(uri: str) -> Any:
    """A client of the store at `uri` that does not wait long. Raises UserError when there is no such SQLite store."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"tracking.uri={uri}: no such store; a run with tracking makes it")
    settle()
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def read_children(uri: str, parent: str) -> tuple[str, str, list[dict[str, Any]], int]:
    """The name of a sweep's run, its overrides, its runs that are not deleted in the order of their start, and how many
    are deleted.

    Raises UserError when it is not there, is deleted or has no runs.
    """
    from mlflow.entities import ViewType

    client = connect(uri)
    run = _get(client, parent)
    if isinstance(run, str):
        raise UserError(f"sweep={parent}: {run}")
    wanted = f"tags.mlflow.parentRunId = '{parent}'"
    found, token = [], None
    while True:
        page = client.search_runs(
            [run.info.experiment_id], wanted, ViewType.ALL, 1000, ["attributes.start_time ASC"], token
        )
        found += list(page)
        token = page.token
        if not token:
            break
    alive = [one for one in found if one.info.lifecycle_stage == "active"]
    if not alive:
        raise UserError(f"sweep={parent}: has no runs in MLflow")
    return run.info.run_name, run.data.tags.get("overrides", ""), _whole(client, alive), len(found) - len(alive)


def read_runs(uri: str, ids: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Those of `ids` that are there, and for each other one why not."""
    client = connect(uri)
    runs = {one: _get(client, one) for one in ids}
    missing = {one: run for one, run in runs.items() if isinstance(run, str)}
    return _whole(client, [run for run in runs.values() if not isinstance(run, str)]), missing


def _get(client: Any, run_id: str) -> Any:
    """A run, or why it cannot be had."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        return f"MLflow does not have it ({str(error).partition(chr(10))[0]})"
    return run if run.info.lifecycle_stage == "active" else "deleted in MLflow"


def _whole(client: Any, runs: list[Any]) -> list[dict[str, Any]]:
    def history(run: Any) -> dict[str, dict[int, float]]:
        names = [name for name in run.data.metrics if name in CURVES or name.startswith("act/")]
        return {
            name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
            for name in names
        }

    with ThreadPoolExecutor(4) as pool:
        histories = list(pool.map(history, runs))
    return [
        {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "status": run.info.status,
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": run.data.metrics,
            "history": curves,
        }
        | _dataset(run)
        for run, curves in zip(runs, histories, strict=True)
    ]


def _dataset(run: Any) -> dict[str, Any]:
    for given in run.inputs.dataset_inputs:
        root = json.loads(given.dataset.source or "{}").get("uri")
        return {"digest": given.dataset.digest, "profile": json.loads(given.dataset.profile or "{}"), "root": root}
    return {}


def download(uri: str, run_id: str, names: list[str], target: Path) -> None:
    """Some artifacts of a run, by their names, into the folder `target`. Raises UserError."""
    client = connect(uri)
    run = _get(client, run_id)
    if isinstance(run, str):
        raise UserError(f"run={run_id}: {run}")
    for name in names:
        try:
            client.download_artifacts(run_id, name, str(target))
        except Exception as error:  # of MLflow, the network, the disk
            raise UserError(f"run={run_id}: MLflow does not give {name} ({str(error).partition(chr(10))[0]})") from None


def add_to_run(uri: str, run_id: str, metrics: dict[str, float], step: int, files: list[Path], folder: str) -> None:
    """Log figures and files to a run that has ended, in the folder `folder` of its artifacts. Raises UserError."""
    client = connect(uri)
    run = _get(client, run_id)
    if isinstance(run, str):
        raise UserError(f"run={run_id}: {run}")
    try:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, step=step, synchronous=True)
        for file in files:
            client.log_artifact(run_id, str(file), folder)
    except Exception as error:  # of MLflow, the network, the disk
        raise UserError(
            f"run={run_id}: MLflow does not take the evaluation ({str(error).partition(chr(10))[0]})"
        ) from None
