"""The networks that the experiments train: logistic regression, a convnet and a residual network.

None has batch normalisation: it would couple the examples of a batch, which then have no gradients of their own.
"""

from torch import Tensor, nn


def logistic_regression(channels: int, side: int) -> nn.Module:
    """One output for two classes: a generalised linear model, so that theorem 1 of the arXiv version applies to it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 1, bias=False), nn.Flatten(0))


def convnet(channels: int, side: int, *, width: int = 16, classes: int = 10) -> nn.Module:
    """Two convolutions with pooling and two fully connected layers: a small cuda-convnet."""
    net = nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, classes),
    )
    return net.apply(kaiming)


def residual_network(channels: int, side: int, *, width: int = 16, classes: int = 10) -> nn.Module:
    """Three residual blocks after a stride of two, with group normalisation: a small ResNet."""
    net = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2 if side > 8 else 1, padding=1),
        *(Residual(width) for _ in range(3)),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, classes),
    )
    return net.apply(kaiming)


def kaiming(layer: nn.Module) -> None:
    """Start without the plateau that torch's default costs plain SGD."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


NETWORKS = {
    "logistic regression": logistic_regression,
    "convnet": convnet,
    "residual network": residual_network,
}
