"""The processes that train one network together, each on a device of its own: who this one is, and what they agree on.

"Rank" is torch.distributed's word for the number of such a process. With one process all of this is trivial, and
torch.distributed is not touched.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gaplab.errors import TrainingError

T = TypeVar("T")
FAILED = "failed"  # key of the store under which a rank that torchrun or srun started says why it ends


@dataclass(frozen=True)
class Ranks:
    """This process among `size` others.

    Attributes:
        rank: from 0.
        size: how many there are.
        store: where they meet, torch's; None with one process.
        patience: for those who are late to meet, while each is busy by itself.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    patience: timedelta = timedelta()

    def meet(self, place: str) -> None:
        """Wait for all to come to `place`. Raises TrainingError that names who did not."""
        if self.size == 1:
            return
        self.store.set(f"{place}/{self.rank}", "")
        here = [f"{place}/{rank}" for rank in range(self.size)]
        begun, patience = time.monotonic(), self.patience.total_seconds()
        while not self.store.check(here):
            if self.store.check([FAILED]):
                raise TrainingError(f"another rank failed before it came to {place}")
            if time.monotonic() - begun < patience:
                with suppress(RuntimeError):
                    self.store.wait(here, timedelta(seconds=min(1.0, patience)))
                continue
            late = ", ".join(f"rank {rank}" for rank, name in enumerate(here) if not self.store.check([name]))
            waited = f"waited {self.patience.total_seconds():g} s for {late}"
            raise TrainingError(f"{waited} ({place}; trainer.join_timeout_s)")

    def share(self, samples: Tensor) -> Tensor:
        """This process's part of (N, …): (n, …), contiguous, the parts' sizes differing by one at most."""
        return samples if self.size == 1 else samples.tensor_split(self.size)[self.rank]

    def first(self, count: int) -> int:
        """Place of the first of this process's samples among `count`."""
        return self.rank * (count // self.size) + min(self.rank, count % self.size)

    def total(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64: exact for counts below 2^53."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def everyones(self, value: T) -> list[T]:
        """The processes' values, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


ALONE = Ranks()
