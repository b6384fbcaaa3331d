import io
from dataclasses import replace
from types import SimpleNamespace

import torch
from rich.console import Console

from gaplab.metrics import Score
from gaplab.training.gap import Epoch
from gaplab.training.progress import ProgressBar

EPOCH = Epoch(1, Score(990, 1000, 0.05), Score(95, 100, 0.2), 0.97, 0.001, 1.5, 0.2, 400.0)


def shown(terminal: bool, epoch: Epoch = EPOCH, width: int = 120) -> str:
    file = io.StringIO()
    bar = ProgressBar(Console(file=file, force_terminal=terminal, width=width))
    trainer = SimpleNamespace(num_training_batches=3, max_epochs=2, current_epoch=0)
    bar.on_train_start(trainer, None)
    bar.show(epoch, 2)
    trainer.current_epoch = 1
    bar.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.125)})
    bar.teardown(trainer, None, "fit")
    return file.getvalue()


def test_a_terminal_sees_epoch_loss_accuracies_and_gap_in_one_bar():
    assert "epoch 2/2" in shown(terminal=True)
    assert "loss 0.1250  train 0.9900  valid 0.9500  gap +4.00 pp" in shown(terminal=True)


def test_a_file_sees_one_line_an_epoch_without_control_characters():
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert text.startswith("epoch 1/2  loss 0.0500  train 0.9900  valid 0.9500  gap +4.00 pp [+1.")
    assert text.count("\n") == 1


def test_an_epoch_without_the_train_split_shows_the_rest():
    epoch = replace(EPOCH, train=None)
    assert shown(terminal=False, epoch=epoch) == "epoch 1/2  valid 0.9500  1.5 s\n"
    assert "loss 0.1250  valid 0.9500 " in shown(terminal=True, epoch=epoch)


def test_a_narrow_terminal_sees_whole_numbers():
    text = shown(terminal=True, width=40)
    assert "epoch 2/2 valid 0.9500  gap +4.00 pp" in text
    assert "…" not in text


def test_under_label_noise_an_epoch_shows_train_and_gap_of_the_clean_labels():
    train = Score(700, 1000, 1.5, clean=Score(980, 1000, 0.1))
    text = shown(terminal=False, epoch=replace(EPOCH, train=train))
    assert text.startswith("epoch 1/2  loss 1.5000  train 0.9800 (clean labels)  valid 0.9500  gap +3.00 pp [")
