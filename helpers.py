"""Small general tools: seeds, devices, evaluation mode, ratios and layer names."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn

from errors import ConfigError

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images [N, C, H, W], labels int64 [N]) a batch."""


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on the run's seed and a name alone, never on how often a generator was called."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for one named purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, name))


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one; a device that is not there is a ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"device: {device}; this machine has {count} CUDA devices, use device=cpu or device=auto")
    return chosen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside the block; every submodule's own mode is put back after it, exception or not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself where its tensors are on the device, else a copy there."""
    device = torch.device(device)
    tensors = (*model.parameters(), *model.buffers())
    if all(t.device.type == device.type and device.index in (None, t.device.index) for t in tensors):
        return model
    return copy.deepcopy(model).to(device)


def share_of(ratio: float, count: int) -> int:
    """floor(count * ratio) with the ratio read as the decimal it was written as: 0.29 of 100 is 29, not 28."""
    return math.floor(Fraction(repr(float(ratio))) * count)


def filter_pruning_indices_for_resnet(indices: dict[str, list[int]], model_name: str) -> dict[str, list[int]]:
    """Leave out what a torchvision ResNet adds to its residual stream: each block's last convolution and shortcut.

    This is the `skip` policy said in layer names. `structure.ModelGraph` derives the same from any model's graph; the
    tests hold one against the other.

    Args:
        indices: layer name -> filters to remove.
        model_name: `resnet18`, `resnet34` (two convolutions a block) or `resnet50`, `resnet101`, `resnet152` (three).

    Returns:
        A new dict; the argument is unchanged.

    Raises:
        ConfigError: the name is not one of these ResNets.
    """
    last_convs = dict.fromkeys(("resnet18", "resnet34"), "conv2") | dict.fromkeys(
        ("resnet50", "resnet101", "resnet152"), "conv3"
    )
    if model_name not in last_convs:
        raise ConfigError(f"model name: {model_name!r} is not a torchvision ResNet; valid: {', '.join(last_convs)}")
    last = last_convs[model_name]

    def on_the_stream(layer: str) -> bool:
        parts = layer.split(".")
        # Without a shortcut convolution in the first block, the stem's own output is what the first add receives.
        stem = layer == "conv1" and last == "conv2"
        return stem or ("." in layer and parts[-1] == last) or "downsample" in parts

    return {layer: list(filters) for layer, filters in indices.items() if not on_the_stream(layer)}
