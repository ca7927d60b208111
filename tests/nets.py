"""Small networks and scoring images for the proofs, in float64 unless a test asks for less."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 8, 8)
CLASSES = 4


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics drawn from `seed`; float64, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.normal_(1, 0.3, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model.double().eval()


class Residual(nn.Module):
    """Conv-BN-ReLU in place, stride, a residual block with a shortcut and an in-place add, one linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 7, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(7)
        self.shortcut = nn.Conv2d(6, 7, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.fc(self.relu(out).mean((2, 3)))


class Plain(nn.Module):
    """The manner of VGG: convolutions with bias, ReLU in place, max pooling, a flatten of several pixels."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(8, 7, 3, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(28, 9), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(9, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Mixed(nn.Module):
    """What the other two lack: BatchNorm before an in-place LeakyReLU, groups, dilation, uneven stride and padding, no
    consumer that is an activation, parallel branches, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, (3, 1), padding=(2, 0))
        self.bn = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding="same", bias=False)
        self.grouped_bn = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 3, 3, stride=(2, 1), dilation=2, padding=2)
        self.right = nn.Conv2d(4, 5, 2, stride=(2, 1), padding_mode="reflect", padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn(self.stem(x)), 0.2, inplace=True)
        x = F.relu6(self.grouped_bn(self.grouped(x)), inplace=True)
        left, right = self.left(x), self.right(x)[:, :, :5, :8]
        return self.fc(F.adaptive_avg_pool2d(F.hardswish(torch.cat((left, right), 1)), 1).flatten(1))


# Network -> convolution -> module whose output is its filters' response, by hand.
NETS = {
    "residual": (Residual, {"stem": "stem_bn", "conv1": "bn1", "conv2": "bn2", "shortcut": "shortcut"}),
    "plain": (Plain, {"features.0": "features.1", "features.3": "features.4", "features.5": "features.6"}),
    "mixed": (Mixed, {"stem": "bn", "grouped": "grouped_bn", "left": "left", "right": "right"}),
}


def images_and_labels(count: int = 13, seed: int = 1, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """float64 [count, *shape] and labels [count] out of 0, 2 and 3, in no order: class 1 has no image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    labels = torch.tensor([3, 0, 2, 2, 0, 3, 0, 2, 0, 0, 3])
    return images, labels.repeat(count // len(labels) + 1)[:count]


def batches(images: Tensor, labels: Tensor, batch_size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Cut into batches, the last one as short as it comes out; None: all in one."""
    size = batch_size or len(images)
    return list(zip(images.split(size), labels.split(size), strict=True))


def small_net() -> nn.Sequential:
    """Of everything that behaves otherwise in training: float32, in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
