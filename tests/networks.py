"""Networks that the tests build, and two of a user's own."""

import torch
from torch import nn

from gaplab.nn.build import build_network

MODEL = {
    "name": "x", "bn": False, "bn_position": "before_activation", "bn_momentum": 0.1, "bn_eps": 1e-5, "dropout": 0.0,
    "activation": "relu", "init": "kaiming_normal", "init_gain": 1.0, "init_std": 0.05, "kwargs": {},
}  # fmt: skip
NETWORKS = {
    "mlp": {"_target_": "gaplab.nn.mlp.MLP", "hidden_dims": [32, 16]},
    "cnn": {"_target_": "gaplab.nn.cnn.CNN", "widths": [8, 8], "hidden_dims": [16]},
    "resnet8": {"_target_": "gaplab.nn.resnet.ResNet", "depth": 8, "widths": [4, 8, 8]},
    "resnet18": {"_target_": "gaplab.nn.resnet.ResNet", "depth": 18, "widths": [4, 4, 8, 8]},
    "torchvision": {"_target_": "gaplab.nn.torchvision.TorchvisionResNet", "arch": "resnet18"},
}
IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(name: str, **toggles: object) -> nn.Module:
    return build_network(MODEL | NETWORKS[name] | toggles, (3, 32, 32), 10)


class Own(nn.Module):
    """A user's network, with its toggles."""

    def __init__(self, num_classes, layers, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), layers.dense_block(12, width), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.net(x)


class Untoggled(nn.Module):
    """A user's network without."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Choosy(nn.Module):
    """A user's network whose way depends on what it sees, so that no graph can be made of it."""

    def __init__(self, in_shape, num_classes):
        super().__init__()
        self.head = nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.mean() > 0 else -self.head(x.flatten(1))


class Pretrained(nn.Module):
    """A user's network that comes with weights: a frozen part with BatchNorm in eval mode, and new layers."""

    def __init__(self, in_shape, num_classes, frozen=False):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], 8), nn.BatchNorm1d(8)
        )
        self.backbone.requires_grad_(False).eval()
        self.backbone[1].weight.data.copy_(torch.arange(self.backbone[1].weight.numel()).view(8, -1) % 7 - 3)
        self.conv, self.norm = nn.Conv2d(in_shape[0], 2, 3), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, num_classes)
        self.head.weight.data.fill_(0.5)
        if frozen:
            self.requires_grad_(False)

    def forward(self, x):
        taken = self.conv(x[:, :, :4, :4]).view(len(x), -1)  # (B, 8), of contiguous tensors alone
        return self.head(self.norm(self.backbone(x) + taken))
