"""An optimizer step as one CUDA graph: the GPU is given some hundred small kernels by a single call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Outputs = tuple[Tensor, Tensor]

WARM_UP = 3  # steps


def cuda_graph(work: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Capture the kernels that `work` starts, without running them; each call runs them, into the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


class CapturedStep:
    """`step`, captured once: images and labels -> two tensors.

    Results are those of `step`, but that learning rates are rounded to float32. The first steps run as they are, on a
    stream of their own, and find the memory that they keep (moments, workspaces); then comes the capture. Mini-batches
    smaller than the largest so far run as they are. What `step` reads from Python is frozen by the capture, but for the
    learning rates.

    Args:
        step: forward, backward and update, without any number that Python would have to wait for.
        optimizers: those that `step` uses; their learning rates may change between steps.
        capture: `cuda_graph`, or what stands for it where there is no GPU.

    References:
        PyTorch documentation, "CUDA semantics", section "CUDA Graphs", whole-network capture.
    """

    def __init__(
        self,
        step: Step,
        optimizers: Sequence[Optimizer],
        capture: Callable[[Callable[[], Outputs]], Any] = cuda_graph,
    ) -> None:
        self._step = step
        self._groups: list[dict[str, Any]] = [group for one in optimizers for group in one.param_groups]
        self._capture = capture
        self._replay: Callable[[], Outputs] | None = None
        self._numbers: list[float] = []  # that are in `_rates`, and one by one in `_lrs`
        self._rates = torch.zeros(len(self._groups), device=self._groups[0]["params"][0].device)
        self._lrs = self._rates.unbind()
        self._images = self._labels = torch.empty(0)
        self._seen = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Outputs:
        self._take_lrs()
        if labels.numel() > self._labels.numel():
            self._images, self._labels = images.clone(), labels.clone()
            self._seen, self._replay = 0, None
        if labels.shape != self._labels.shape:
            return self._with_lrs_in_tensors(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._seen += 1
        if self._seen <= WARM_UP:
            return self._aside(images.device)
        if self._replay is None:
            torch.clear_autocast_cache()  # what is in there would be frozen
            self._replay = self._capture(lambda: self._with_lrs_in_tensors(self._images, self._labels))
        first, second = self._replay()
        return first.clone(), second.clone()

    def _take_lrs(self) -> None:
        numbers = [float(group["lr"]) for group in self._groups]
        if numbers != self._numbers:
            self._rates.copy_(torch.tensor(numbers), non_blocking=True)
            self._numbers = numbers

    def _aside(self, device: torch.device) -> Outputs:
        if device.type != "cuda":
            return self._with_lrs_in_tensors(self._images, self._labels)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            outputs = self._with_lrs_in_tensors(self._images, self._labels)
        torch.cuda.current_stream(device).wait_stream(stream)
        return outputs

    def _with_lrs_in_tensors(self, images: Tensor, labels: Tensor) -> Outputs:
        """In steps that are not captured, too: a run that goes on has other ones of these, and the same numbers."""
        numbers = [group["lr"] for group in self._groups]
        try:
            for group, lr in zip(self._groups, self._lrs, strict=True):
                group["lr"] = lr
            return self._step(images, labels)
        finally:
            for group, number in zip(self._groups, numbers, strict=True):
                group["lr"] = number
