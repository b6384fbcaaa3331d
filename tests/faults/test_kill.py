"""SIGKILL at any instant, in a save too, and again later: what comes out is the undisturbed run, to the bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import SMALL, composed
from killing import STAGES, die_at_stage, differences, run_forked, wait_for

NETWORKS = {
    "mlp": ["model=mlp", "optimizer=adam", "data.train_size=3000"],
    "cnn": ["model=cnn", "model.widths=[8,8]", "model.hidden_dims=[32]", "optimizer=sgd", "optimizer.lr=0.05"],
    "resnet": ["model=resnet", "model.depth=8", "model.widths=[4,8,8]", "optimizer=adamw", "data.train_size=600"],
}
TOGGLES = [
    "model.bn=true", "model.dropout=0.2", "data.augment=crop_flip", "data.batch_size=40", "trainer.max_epochs=4",
    "scheduler=one_cycle", "trainer.early_stopping=3", "trainer.log_activations_every=20", "checkpoint.every_s=0.1",
    "trainer.threads=1",
]  # fmt: skip
AT_RANDOM, IN_A_SAVE = 14, 10


@pytest.fixture(scope="module")
def kills():
    """Counts, printed at the end."""
    counts = {"killed": 0, "runs": 0, "resumed": 0, "equal": 0}
    yield counts
    print(
        "\n{runs} runs killed {killed} times, {resumed} gone on with to their end, {equal} equal to the bit".format(
            **counts
        )
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_a_killed_run_comes_to_what_the_undisturbed_one_does(network: str, tmp_path: Path, kills):
    config = composed(*SMALL, f"paths.outputs={tmp_path}", *NETWORKS[network], *TOGGLES)
    reference = tmp_path / "reference"
    begin = time.monotonic()
    assert wait_for(run_forked(config, reference)) == 0, (tmp_path / "reference.out").read_text()
    whole = time.monotonic() - begin
    draw = random.Random(network)
    for trial in range(AT_RANDOM + IN_A_SAVE):
        folder = tmp_path / f"run{trial}"
        kills["runs"] += 1
        for _ in range(1 + trial % 2):  # every second one twice
            if trial < AT_RANDOM:
                child = run_forked(config, folder)
                time.sleep(draw.uniform(0, whole))
                os.kill(child, signal.SIGKILL)
                status = wait_for(child)
            else:
                status = wait_for(run_forked(config, folder, die_at_stage(draw.randrange(1, 12 * len(STAGES)))))
            kills["killed"] += status == -signal.SIGKILL
        output = tmp_path / f"run{trial}.out"
        assert wait_for(run_forked(config, folder)) == 0, output.read_text()
        kills["resumed"] += 1
        assert differences(folder, reference) == [], output.read_text()
        kills["equal"] += 1
