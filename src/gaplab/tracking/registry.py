"""Models in MLflow: logged to their run, versions in the registry, and back again.

MLflow takes seconds to import, so this is imported where it is used.
"""

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn

from gaplab.config import masked
from gaplab.errors import UserError
from gaplab.files import check_yaml, plain, read_text
from gaplab.tracking.environment import settle
from gaplab.tracking.mlflow import is_permanent, reason
from gaplab.tracking.store import connect

__all__ = ["is_permanent", "reason"]

NAME = "model"
WEIGHTS = "gaplab.weights"  # tag of a logged model: SHA-256 of the checkpoint that it was made of
CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPIONS = "gaplab.champions"  # tag of the registered model: the versions that were champion, the newest last
OWN_NAME = "gaplab.name"  # tag of the registered model: the name that it was made with
SHOWN = (
    "train/acc", "valid/acc", "gap/acc", "gap/acc_low", "gap/acc_high", "gap/acc_pp", "train/acc_clean",
    "gap/acc_clean", "gap/acc_clean_low", "gap/acc_clean_high", "valid/loss", "test/acc",
)  # fmt: skip


def log_model(
    uri: str,
    model: nn.Module,
    example: np.ndarray,
    run_id: str,
    step: int,
    weights: str,
    files: Sequence[Path],
    verify: Callable[[nn.Module, nn.Module, np.ndarray], None],
) -> str:
    """Log a model to its run; its id. One that is logged already is left as it is.

    Args:
        uri: of the tracking store.
        model: uint8 (B, C, H, W) -> probabilities float32 (B, K), in eval mode.
        example: uint8 (B, C, H, W) with B of at least 2.
        run_id: of an active run.
        step: epoch that the weights are of.
        weights: SHA-256 of the checkpoint that they are from; a run that went on has others than it had.
        files: to lie beside the model, in `extra_files/`.
        verify: called with the model read back, the model, and the example, before anything is sent; it raises.

    Raises UserError when the model cannot be exported, and whatever MLflow or the network come up with.
    """
    settle()
    with _quiet():
        import mlflow.pytorch
        from mlflow import MlflowClient
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = MlflowClient(uri, uri)
        run = client.get_run(run_id)
        if (known := logged_model(client, run, weights)) is not None:
            return known
        logged = client.create_logged_model(
            run.info.experiment_id, NAME, run_id, {WEIGHTS: weights}, run.data.params, "classifier"
        )
        try:
            with tempfile.TemporaryDirectory(prefix="gaplab-") as parent:
                path = Path(parent) / "model"
                about = Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                )
                _save(model, example, path, about, files)
                verify(mlflow.pytorch.load_model(str(path)), model, example)
                client.log_model_artifacts(logged.model_id, str(path))
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
            _measure(client, run_id, logged.model_id, step)
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)


def logged_model(client: Any, run: Any, weights: str | None = None) -> str | None:
    """The id of the model that a run has logged, or None; with `weights`, only one of that checkpoint."""
    wanted = f"source_run_id = '{run.info.run_id}' AND name = '{NAME}'"
    for found in client.search_logged_models([run.info.experiment_id], wanted):
        if found.status == "READY" and weights in (None, found.tags.get(WEIGHTS)):
            return str(found.model_id)
    return None


def _save(model: nn.Module, example: np.ndarray, path: Path, about: Any, files: Sequence[Path]) -> None:
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    with torch.no_grad():
        answers = model(torch.from_numpy(example)).numpy()
    versions = {name: metadata.version(name).partition("+")[0] for name in ("torch", "mlflow", "numpy")}
    try:
        mlflow.pytorch.save_model(
            model,
            path,
            mlflow_model=about,
            signature=infer_signature(example, answers),
            input_example=example,
            pip_requirements=[f"{name}=={version}" for name, version in versions.items()],
            extra_files=[str(file) for file in files],
            serialization_format="pt2",
        )
    except Exception as error:  # torch.export has dozens of kinds
        line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.export cannot take this network ({type(error).__name__}: {plain(line)[:200]})"
        ) from error


def _measure(client: Any, run_id: str, model_id: str, step: int) -> None:
    """Show the figures of the run at `step`, and those of the whole run, with the model too."""
    from mlflow.entities import Metric

    found = []
    for name in SHOWN:
        points = client.get_metric_history(run_id, name)
        chosen = [point for point in points if point.step == step] or points[-1:]
        found += [
            Metric(name, point.value, point.timestamp, point.step, model_id=model_id, run_id=run_id)
            for point in chosen[:1]
        ]
    client.log_batch(run_id, metrics=found, synchronous=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and torch.export talk of what is none of a person's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        yield


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        number: from 1.
        run_id: of the run that trained it.
        source: address of the logged model.
        aliases: `champion`, `challenger` and whatever people gave it.
        tags: the gate's decision and its figures, as text.
    """

    number: int
    run_id: str
    source: str
    aliases: list[str]
    tags: dict[str, str]


class Registry:
    """The versions of one registered model. Raises UserError for what is not there, or when MLflow cannot be reached.

    Args:
        uri: of the tracking store.
        name: of the model.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name
        self._client = _connect(uri)

    def versions(self) -> list[Version]:
        """All of them, the oldest first; none when there is no such model."""
        with _told(self.uri):
            if self._model() is None:
                return []
            found = self._client.search_model_versions(f"name = '{self.name}'")
            whole = [self._client.get_model_version(self.name, one.version) for one in found]  # those have aliases
        return sorted(map(_version, whole), key=lambda one: one.number)

    def version(self, number: int) -> Version:
        for one in self.versions():
            if one.number == number:
                return one
        known = ", ".join(str(one.number) for one in self.versions()) or "none"
        raise UserError(f"version={number}: {self.name} has no such version; known: {known}")

    def champion(self) -> Version | None:
        return next((one for one in self.versions() if CHAMPION in one.aliases), None)

    def last_champion(self, candidate: Version | None = None) -> tuple[Version | None, str]:
        """The champion, or else the newest former one that still exists and is not `candidate`; None without any.

        And a sentence on what became of the champion: empty while there is one, and when there never was.
        """
        versions = {version.number: version for version in self.versions()}
        champion = next((version for version in versions.values() if CHAMPION in version.aliases), None)
        with _told(self.uri):
            past = [] if champion else self._champions()
        if not past:
            return champion, ""
        missing = f"version {past[-1]} was champion, and " + (
            "its alias was removed in MLflow" if past[-1] in versions else "was deleted in MLflow"
        )
        if candidate is not None:
            versions.pop(candidate.number, None)
        return next((versions[number] for number in reversed(past) if number in versions), None), missing

    def logged(self, run_id: str, weights: str | None = None) -> str | None:
        """The id of the model that a run has logged, or None; with `weights`, only one of that checkpoint."""
        with _told(self.uri):
            return logged_model(self._client, self._client.get_run(run_id), weights)

    def add(self, model_id: str, run_id: str, description: str) -> Version:
        """A version of a logged model, and `challenger`; the one that there is if it has been added before."""
        source = f"models:/{model_id}"
        if known := [one for one in self.versions() if one.source.endswith(model_id)]:
            return known[-1]
        with _told(self.uri):
            if self._model() is None:
                self._client.create_registered_model(
                    self.name, {OWN_NAME: self.name}, "Image classifiers whose overfitting gap gaplab has measured."
                )
            made = self._client.create_model_version(
                self.name, source, run_id, description=description[:4900], model_id=model_id
            )
            self._client.set_registered_model_alias(self.name, CHALLENGER, made.version)
        return self.version(int(made.version))

    def describe(self, version: Version, tags: dict[str, str]) -> None:
        with _told(self.uri):
            for name, value in tags.items():
                self._client.set_model_version_tag(self.name, str(version.number), name, value[:4900])

    def crown(self, version: Version) -> None:
        """Make it champion; it is no challenger any more."""
        now = self.champion()
        with _told(self.uri):
            newest = [now.number] if now and now.number != version.number else []  # it may have been chosen by hand
            newest.append(version.number)
            self._remember([number for number in self._champions() if number not in newest] + newest)
            self._client.set_registered_model_alias(self.name, CHAMPION, str(version.number))
            if CHALLENGER in version.aliases:
                self._client.delete_registered_model_alias(self.name, CHALLENGER)

    def roll_back(self) -> tuple[Version | None, Version, list[str]]:
        """Make the newest former champion champion again whose model can still be read.

        The champion that was, None if it is gone; the new one; and why newer ones were passed over.
        """
        now = self.champion()
        with _told(self.uri):
            past = self._champions()
        if now is None and not past:
            raise UserError(f"rollback: {self.name} has no champion")
        if now is not None and now.number in past:
            past = past[: past.index(now.number)]
        versions = {version.number: version for version in self.versions()}
        problems = []
        for index, number in reversed(list(enumerate(past))):
            if number not in versions:
                continue
            try:
                with tempfile.TemporaryDirectory(prefix="gaplab-") as target:
                    download(f"models:/{self.name}/{number}", self.uri, Path(target))
            except UserError as error:
                problems.append(f"passed over version {number}: {error}")
                continue
            with _told(self.uri):
                self._remember(past[: index + 1])
                self._client.set_registered_model_alias(self.name, CHAMPION, str(number))
            return now, versions[number], problems
        before = (
            f"there was no champion before version {now.number} of {self.name}"
            if now
            else f"no former champion of {self.name} is left in MLflow"
        )
        raise UserError(f"rollback: {'; '.join([before, *problems])}")

    def _champions(self) -> list[int]:
        model = self._model()
        text = model.tags.get(CHAMPIONS, "") if model is not None else ""
        return [int(one) for one in text.split(",") if one.isdecimal()]

    def _remember(self, champions: list[int]) -> None:
        for name, value in (OWN_NAME, self.name), (CHAMPIONS, ",".join(map(str, champions[-1000:]))):
            self._client.set_registered_model_tag(self.name, name, value)

    def _model(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        for renamed in self._client.search_registered_models(f"tags.`{OWN_NAME}` = '{self.name}'"):
            new_name = plain(renamed.name)
            raise UserError(
                f"{self.name} was renamed {new_name} in MLflow; use tracking.registered_model={new_name}, or, to begin "
                f"another {self.name}, delete the tag {OWN_NAME} of {new_name}"
            )
        return None


def _connect(uri: str) -> Any:
    client = connect(uri)
    import mlflow

    mlflow.set_registry_uri(uri)
    mlflow.set_tracking_uri(uri)  # addresses of models are looked up there, whatever a client was given
    return client


def _version(found: Any) -> Version:
    return Version(int(found.version), found.run_id or "", found.source or "", list(found.aliases), dict(found.tags))


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """What MLflow and the network come up with, as one line."""
    with _quiet():
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"tracking.uri={masked(uri)}: {reason(error, uri)}") from error


def download(address: str, uri: str, target: Path) -> tuple[Path, str | None]:
    """The folder of a model, brought into `target`, and the id of its run.

    Args:
        address: `models:/<name>@<alias>`, `models:/<name>/<version>` or `models:/<model id>`.
        uri: of the tracking store.
        target: an existing folder.

    Raises UserError when it is not there, or is no model that gaplab has logged.
    """
    if not re.fullmatch(r"models:/(m-[0-9a-f]+|[^/:@]+(@[\w.-]+|/[1-9][0-9]*))", address):
        raise UserError(
            f"{plain(address)}: not the address of a model; expected models:/<name>@<alias> or models:/<name>/<version>"
        )
    client = _connect(uri)
    with _quiet():
        import mlflow

        try:
            run_id = _run_of(client, address.removeprefix("models:/"))
            path = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(target)))
        except Exception as error:  # of MLflow, the network, the disk
            raise UserError(f"{plain(address)}: {reason(error, uri)}") from error
    if not _is_ours(path):
        raise UserError(f"{plain(address)}: not a model that gaplab has logged")
    return path, run_id


def _is_ours(path: Path) -> bool:
    """Whether it is of the kind that gaplab logs: MLflow's own code loads it, and it brings no module along."""
    try:
        check_yaml(text := read_text(path / "MLmodel"), "MLmodel", resolved=True)
        flavors = yaml.safe_load(text)["flavors"]
        ours, general = flavors["pytorch"], flavors["python_function"]
        return (
            set(flavors) == {"pytorch", "python_function"}
            and general["loader_module"] == "mlflow.pytorch"
            and ours["model_data"] == general["data"] == "data"
            and not ours.get("code")
            and not general.get("code")
            and [one.name for one in (path / "data").iterdir()] == ["model.pt2"]
            and (path / "extra_files" / "facts.json").is_file()
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return False


def fetch(address: str, uri: str, target: Path) -> tuple[nn.Module, Path, str | None]:
    """A model, uint8 (B, C, H, W) -> probabilities (B, K), its folder and its run's id; as `download`.

    Nothing is unpickled and no module of its own imported; but torch evaluates the sizes and guards in an exported
    graph, so its author must be somebody you trust.
    """
    path, run_id = download(address, uri, target)
    with _quiet():
        import mlflow

        try:
            return mlflow.pytorch.load_model(str(path)), path, run_id
        except Exception as error:  # of torch, or a file that is made to break it
            raise UserError(f"{plain(address)}: {reason(error, uri)}") from error


def _run_of(client: Any, name: str) -> str | None:
    if name.startswith("m-") and "/" not in name:
        found = client.get_logged_model(name).source_run_id
    elif "@" in name:
        found = client.get_model_version_by_alias(*name.split("@")).run_id
    else:
        found = client.get_model_version(*name.split("/")).run_id
    return found or None
