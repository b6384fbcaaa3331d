"""torchvision's ResNet family, with gaplab's toggles."""

from torch import Tensor, nn
from torchvision import models

from gaplab.nn.blocks import Layers


class TorchvisionResNet(nn.Module):
    """`torchvision.models.<arch>` built through its `norm_layer`: (B, C, H, W) -> logits (B, K).

    Dropout stands before the last layer. With `bn_position=after_activation`, every convolution is followed by its
    activation and then its normalization, and nothing follows the addition. Convolutions without a normalization
    directly behind them get the bias that torchvision leaves out.
    """

    def __init__(self, in_shape: tuple[int, int, int], num_classes: int, layers: Layers, arch: str) -> None:
        super().__init__()
        net: models.ResNet = getattr(models, arch)(num_classes=num_classes, norm_layer=layers.behind_conv)
        net.conv1 = nn.Conv2d(in_shape[0], 64, kernel_size=7, stride=2, padding=3, bias=False)
        net.fc = nn.Sequential(layers.dropout(), net.fc)
        for module in list(net.modules()):
            if isinstance(module, nn.Conv2d):
                layers.add_bias_(module)
            elif hasattr(module, "relu"):
                module.relu = layers.behind_norm()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
