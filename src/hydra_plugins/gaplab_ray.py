"""A sweep's jobs as tasks of Ray, `hydra/launcher=ray`: Ray gives each its CPUs and GPUs."""

import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig

POLL_S = 0.2
STOP_WAIT_S = 60.0  # for running jobs to save their checkpoints
OBJECT_STORE_BYTES = 100_000_000  # nearly nothing goes through it; Ray would take a third of the memory


@dataclass
class RayLauncherConf:
    _target_: str = MISSING
    address: str | None = MISSING
    num_cpus: float = MISSING
    num_gpus: float = MISSING


ConfigStore.instance().store(group="schema", name="RayLauncherConf", node=RayLauncherConf, provider="gaplab")


class RayLauncher(Launcher):
    """Runs the saved jobs of a sweep as Ray tasks, on a cluster or on this machine.

    Args:
        address: of the cluster; None starts Ray here, until the sweep ends.
        num_cpus, num_gpus: of each job; GPUs may be shared, as 0.5.
    """

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float) -> None:
        self._address = address
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises UserError where Ray is not installed, and for more than this machine has."""
        from gaplab.config import cuda_devices
        from gaplab.errors import UserError
        from gaplab.machine import usable_cores

        if importlib.util.find_spec("ray") is None:
            raise UserError("hydra/launcher=ray: Ray is not installed; install it with pip install -e '.[ray]'")
        here = {"num_cpus": usable_cores(), "num_gpus": cuda_devices()}
        for name, wanted in self._resources.items():
            least = 0.01 if name == "num_cpus" else 0
            most = here[name] if self._address is None else float("inf")
            if not least <= wanted <= most:
                limit = f"; there are {here[name]} here" if wanted > most else f"; must be {least} or more"
                raise UserError(f"hydra.launcher.{name}={wanted:g}{limit}")
        self._sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs in the folders that `job_overrides` name. Raises what Ray does when a cluster is not there."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from gaplab import interrupt

        ray: Any = importlib.import_module("ray")
        own: dict[str, Any] = (
            {} if self._address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        )
        try:
            ray.init(self._address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
            interrupt.reclaim()
            # a job that died may have taken its machine's memory with it, so that it is not tried again
            task = ray.remote(max_retries=0, **self._resources)(_run)
            without_gpu = self._resources["num_gpus"] == 0
            jobs = [task.remote(str(self._sweep / name), without_gpu) for (name,) in job_overrides]
            try:
                _wait(ray, jobs)
            except BaseException:
                for job in jobs:  # those that run go on until they have saved
                    ray.cancel(job)
                _wait(ray, jobs, STOP_WAIT_S)
                raise
            return [_returned(ray, job) for job in jobs]
        finally:
            ray.shutdown()


def _wait(ray: Any, jobs: list[Any], limit_s: float = float("inf")) -> None:
    """Until the jobs have ended; asleep in Python, for Ray's own waiting does not let a signal's handler raise."""
    deadline = time.monotonic() + limit_s
    while len(ray.wait(jobs, num_returns=len(jobs), timeout=0)[0]) < len(jobs) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _returned(ray: Any, job: Any) -> JobReturn:
    from gaplab.errors import TrainingError

    try:
        problem = ray.get(job)
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        problem = f"Ray: {type(error).__name__}: {first}"
    if problem is None:
        return JobReturn(status=JobStatus.COMPLETED)
    return JobReturn(status=JobStatus.FAILED, _return_value=TrainingError(problem))


def _run(folder: str, without_gpu: bool) -> str | None:
    """The task; what kept the job from its end, as plain text that any driver can read."""
    if without_gpu:  # Ray leaves it the driver's
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gaplab import cli, interrupt, sweep

    try:
        sweep.run_saved(Path(folder))
    except interrupt.Interrupted:
        return "interrupted"
    except Exception as error:
        return cli.explain(error)
    return None
