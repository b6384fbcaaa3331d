"""What one would write first: Lightning's loop, its MLflow logger, torchvision's MNIST. `python minimal.py <folder>`

Prints the unix time at which its first optimizer step begins. It exists to be measured against.
"""

import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import MLFlowLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets

FOLDER = Path(sys.argv[1])
DATA = Path(__file__).resolve().parents[1] / "data"


class Minimal(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in ((784, 64), (64, 128), (128, 64)):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        loss = F.cross_entropy(self.body(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        self.log("valid/acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_train_batch_start(self, *_: object) -> None:
        if self.trainer.global_step == 0:
            print(time.time(), flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


samples = datasets.MNIST(DATA, train=True, download=True)
images = (samples.data[:, None].float() / 255 - 0.1307) / 0.3081
data = TensorDataset(images, samples.targets)
train, valid = torch.utils.data.random_split(data, [55_000, 5_000], torch.Generator().manual_seed(0))
logger = MLFlowLogger("minimal", tracking_uri=f"sqlite:///{FOLDER}/mlflow.db", artifact_location=str(FOLDER))
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=1,
    logger=logger,
    default_root_dir=FOLDER,
    enable_progress_bar=False,
    num_sanity_val_steps=0,
)
trainer.fit(Minimal(), DataLoader(train, 128, shuffle=True), DataLoader(valid, 1000))
