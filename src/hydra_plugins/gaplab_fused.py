"""A sweep's jobs in groups that are trained as one, `hydra/launcher=fused`, and the rest one by one."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig

if TYPE_CHECKING:
    from gaplab.config import Config, Optimizer

FEW = 8  # jobs of a kind: fewer are done before a trial on several cores is


@dataclass
class FusedLauncherConf:
    _target_: str = MISSING
    replicas: int | None = MISSING
    n_jobs: int | None = MISSING


ConfigStore.instance().store(group="schema", name="FusedLauncherConf", node=FusedLauncherConf, provider="gaplab")


class FusedLauncher(Launcher):
    """Trains the saved jobs of a sweep in groups of one kind, in processes of this machine.

    Args:
        replicas: jobs in a group, at most; None for as many as a trial finds fastest.
        n_jobs: processes; None for as many as the cores hold, or one a GPU.
    """

    def __init__(self, replicas: int | None, n_jobs: int | None) -> None:
        self._replicas = replicas
        self._n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises UserError."""
        from gaplab.config import PROCESSES_PER_CORE
        from gaplab.errors import UserError
        from gaplab.machine import usable_cores

        most = PROCESSES_PER_CORE * usable_cores()
        for name, wanted, limit in (("replicas", self._replicas, 10_000), ("n_jobs", self._n_jobs, most)):
            if wanted is not None and not 1 <= wanted <= limit:
                raise UserError(f"hydra.launcher.{name}={wanted}: must be a number in [1, {limit}], or null")
        self._sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs in the folders that `job_overrides` name. Raises what joblib does when a process is gone."""
        from joblib import Parallel, delayed

        from gaplab import config as configs
        from gaplab import fusing

        folders = [self._sweep / name for (name,) in job_overrides]
        if len(folders) == 1:  # a pool would take seconds to start
            return [_returned(_run_one(folders[0], in_here=True).get(str(folders[0])))]
        jobs = [configs.load(folder / "config.yaml") for folder in folders]
        processes = self._n_jobs or _processes(jobs)
        pool: Any = Parallel(processes, backend="loky", batch_size=1)
        with pool:
            groups = fusing.groups(jobs)
            least = 2 if self._replicas or processes == 1 else FEW
            several = [group for group in groups if len(group) >= least]
            plans = pool(
                [
                    delayed(_plan)(
                        str(folders[group[0]]), [jobs[place].optimizer for place in group], self._replicas, processes
                    )
                    for group in several
                ]
                + [delayed(_get_ready)() for _ in range(processes - len(several)) if several]
            )
            most = {tuple(group): plan for group, plan in zip(several, plans, strict=False)}
            for reason, count in Counter(filter(None, map(fusing.refusal, jobs))).items():
                print(f"{count} run{'s' * (count > 1)}: one by one, for {reason}", flush=True)
            tasks: list[list[Path]] = []
            lost: dict[str, str] = {}
            for group in groups:
                few = f"{fusing.label(jobs[group[0]], len(group))}: one by one, too few for a trial"
                replicas, said = most.get(tuple(group), (1, few))
                if replicas == 0:
                    lost |= dict.fromkeys((str(folders[place]) for place in group), said)
                    continue
                if len(group) > 1:
                    print(said, flush=True)
                sizes = iter(fusing.shares(len(group), replicas, processes))
                places = iter(group)
                tasks += [[folders[next(places)] for _ in range(size)] for size in sizes]
            tasks.sort(key=len, reverse=True)  # the long ones first
            for problems in pool(delayed(_run)([str(folder) for folder in task], os.getpid()) for task in tasks):
                lost |= problems
        return [_returned(lost.get(str(folder))) for folder in folders]


def _processes(jobs: "Sequence[Config]") -> int:
    from gaplab.config import cuda_devices
    from gaplab.machine import usable_cores

    if (gpus := cuda_devices()) and any(job.trainer.accelerator != "cpu" for job in jobs):
        return min(gpus, len(jobs))
    return max(1, usable_cores() // max((job.trainer.threads or 1) * job.trainer.devices for job in jobs))


def _returned(problem: str | None) -> JobReturn:
    from gaplab.errors import TrainingError

    if problem is None:
        return JobReturn(status=JobStatus.COMPLETED)
    return JobReturn(status=JobStatus.FAILED, _return_value=TrainingError(problem))


def _plan(folder: str, optimizers: "Sequence[Optimizer]", replicas: int | None, processes: int) -> tuple[int, str]:
    """As `trial.plan`; one by one where the job in `folder` is at fault, which then says so itself."""
    from gaplab import config as configs
    from gaplab import trial
    from gaplab.errors import TrainingError, UserError
    from gaplab.machine import take_a_gpu

    if processes > 1:
        take_a_gpu()
    try:
        return trial.plan(configs.load(Path(folder) / "config.yaml"), optimizers, replicas, processes)
    except (UserError, TrainingError) as error:
        return 1, f"{len(optimizers)} jobs like {Path(folder).name}: one by one, for there is no trial ({error})"


def _get_ready() -> None:
    """Import what takes seconds, while another process finds out how many jobs to train as one."""
    from gaplab import together  # noqa: F401


def _run(folders: list[str], writer: int) -> dict[str, str]:
    """The task; what kept jobs from their end, as plain text. `writer` is the sweep's process: joblib runs the tasks of
    a pool of one in it, where Ctrl-C is to be heard."""
    from gaplab import sweep

    in_here = os.getpid() == writer
    if len(folders) == 1:
        return _run_one(Path(folders[0]), in_here)
    return {str(folder): problem for folder, problem in sweep.run_together(list(map(Path, folders)), in_here).items()}


def _run_one(folder: Path, in_here: bool) -> dict[str, str]:
    from gaplab import cli, sweep

    try:
        sweep.run_saved(folder, in_here)
    except Exception as error:
        return {str(folder): cli.explain(error)}
    return {}
