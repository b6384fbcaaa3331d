from functools import partial
from typing import Any

import pytest
import torch
from tests.conftest import assert_refused, composed, train_py

from gaplab.errors import UserError
from gaplab.training import captured, classifier
from gaplab.training.captured import WARM_UP, CapturedStep


@pytest.fixture
def graphs(monkeypatch):
    """Captures that hold the work and run it again at each replay: what a GPU's graph does, without a GPU."""
    taken: list[int] = []

    def capture(work):
        taken.append(0)

        def replay():
            taken[-1] += 1
            return work()

        return replay

    monkeypatch.setattr("gaplab.config._check_compile", lambda trainer: None)
    monkeypatch.setattr(classifier, "CapturedStep", partial(CapturedStep, capture=capture))
    return taken


def weights(folder) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


SMALL_CNN = ["model.widths=[4,8]", "model.hidden_dims=[16]"]
EXACT = "optimizer.lr=0.0009765625"  # in float32 too


@pytest.mark.parametrize(
    ("words", "exact"),
    [
        (["optimizer=adamw", EXACT, "model.dropout=0.3", "trainer.gradient_clip_val=0.5"], True),
        (["model=cnn", *SMALL_CNN, EXACT, "data.augment=crop_flip", "trainer.precision=bf16-mixed"], True),
        (["optimizer=sgd", "optimizer.weight_decay=0.01", "scheduler=one_cycle"], False),
    ],
)
def test_a_captured_step_gives_the_weights_of_an_eager_one(run, graphs, words, exact):
    words += ["model.bn=true", "trainer.max_epochs=3", "data.train_size=700"]
    eager, eager_folder = run(*words)
    assert graphs == []
    found, folder = run("trainer.compile=true", *words)
    assert graphs == [5 * 3 - WARM_UP]  # and each epoch's last mini-batch, which is smaller, ran as it is
    assert found["steps"] == eager["steps"] == 18
    assert found["train_loss"] == (eager["train_loss"] if exact else pytest.approx(eager["train_loss"], rel=1e-3))
    before, after = weights(eager_folder), weights(folder)
    torch.testing.assert_close(before, after, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert type(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]) is float


def test_outputs_are_kept_from_the_next_replay():
    static = torch.zeros(1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def step(images, labels):
        static.add_(images.sum())
        return static, labels

    captured_step = CapturedStep(step, [optimizer], capture=lambda work: work)
    found = [captured_step(torch.ones(2), torch.ones(2))[0] for _ in range(WARM_UP + 2)]
    assert float(found[-2]) == 2 * (WARM_UP + 1)
    assert float(found[-1]) == 2 * (WARM_UP + 2)


def test_a_smaller_batch_first_as_after_a_resume_changes_nothing():
    captures = []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    seen = []

    def step(images, labels):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        return images.sum(), labels

    step_or_graph = CapturedStep(step, [optimizer], capture=lambda work: captures.append(work) or work)
    for size in [3, *[4] * (WARM_UP + 1)]:
        step_or_graph(torch.ones(size), torch.ones(size))
    assert len(captures) == 1
    assert set(seen) == {float(torch.tensor(0.1))}  # float32's 0.1, captured or not
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_without_a_gpu_it_is_refused_in_one_line():
    for words in (["trainer.accelerator=cpu"], []):
        assert_refused(train_py("trainer.compile=true", *words), "trainer.compile=true: needs a GPU")


def test_what_a_graph_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr("gaplab.config.cuda_devices", lambda: 2)
    assert composed("trainer.compile=true").trainer.compile
    for word in ("trainer.devices=2", "trainer.accumulate_grad_batches=2", "trainer.log_activations_every=5"):
        with pytest.raises(UserError, match=r"trainer\.compile=true"):
            composed("trainer.compile=true", word)


def test_an_optimizer_that_no_graph_can_hold_is_refused(run, graphs):
    with pytest.raises(UserError, match=r"trainer\.compile=true: torch\.optim\.Adagrad is not made for CUDA graphs"):
        run("trainer.compile=true", "optimizer=sgd", "optimizer._target_=torch.optim.Adagrad", "optimizer.momentum=0.9")


def test_a_capture_asks_for_a_graph_of_this_thread_alone(monkeypatch):
    asked = []

    class Graph:
        def replay(self):
            asked.append("replay")

    class capturing:  # noqa: N801 (stands for torch.cuda.graph)
        def __init__(self, graph, **words):
            asked.append(words)

        def __enter__(self):
            asked.append("begin")

        def __exit__(self, *error):
            asked.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    outputs = (torch.zeros(1), torch.zeros(1))
    assert captured.cuda_graph(lambda: outputs)() is outputs
    assert asked == [{"capture_error_mode": "thread_local"}, "begin", "end", "replay"]
