"""A pruned network as a file of its own, with what it takes to build it again.

The file is a NumPy archive of plain arrays, the weights under their names and one JSON text with the structure. Nothing
in it is pickled, so reading one runs no code, and the dense weights are not needed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disk import write_whole
from errors import BenchmarkError
from models import ARCHITECTURES, build
from scatter import SOURCES, put_back

STRUCTURE = "structure.json"  # no name of a weight: it would have to be `json` of a module called `structure`
FORMAT = 1
PLAIN = {"device": "meta", "memory_format": torch.contiguous_format}


@dataclass(frozen=True)
class Structure:
    """What a saved network is, beside its weights.

    Attributes:
        architecture: the torchvision name, with `num_classes` of its dense head and whether it has `small_input_stem`.
        widths: convolution -> filters that it has left.
        class_names, class_indices: logit -> the class that it speaks for; of a head that was not replaced, all.
        input_shape: (C, H, W) of one image.
        mean, std: per channel, what pixels in [0, 1] are normalised by.
        strides: weight -> its strides in memory, where they are not the plain ones: another layout rounds otherwise.
        provenance: where it is from: run, method, ratio, versions.
    """

    architecture: str
    num_classes: int
    small_input_stem: bool
    widths: dict[str, int]
    class_names: tuple[str, ...]
    class_indices: tuple[int, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    strides: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]


def structure_of(model: nn.Module, **facts: Any) -> Structure:
    """The structure of `model`; `facts` are the attributes that cannot be read off it."""
    weights = model.state_dict()
    strides = {name: w.stride() for name, w in weights.items() if w.stride() != torch.empty_like(w, **PLAIN).stride()}
    widths = {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return Structure(widths=widths, strides=strides, **facts)


def save_pruned_model(path: str | Path, model: nn.Module, structure: Structure) -> None:
    """Write the network to one file, whole or not at all. Raises BenchmarkError where the disk refuses it."""
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in model.state_dict().items()}
    text = json.dumps({"format": FORMAT, **asdict(structure)}, ensure_ascii=False, allow_nan=False)
    content = io.BytesIO()
    np.savez(content, **{STRUCTURE: np.array(text)}, **arrays)
    write_whole(path, content.getvalue())


def load_pruned_model(path: str | Path) -> nn.Module:
    """The network of `save_pruned_model`, on the CPU, in evaluation mode; its outputs are the same bit for bit.

    Raises BenchmarkError: no such file, not one of these, damaged, or weights that do not fit its structure.
    """
    structure, state = _read(path)
    with _refusing(path, "its weights do not fit its structure"):
        with torch.device("meta"):
            model = build(structure.architecture, structure.num_classes, structure.small_input_stem).eval()
        for name, module in model.named_modules():
            _fill(module, f"{name}." if name else "", state)
        if state:
            raise ValueError(f"{next(iter(state))} is no weight of {structure.architecture}")
        widths = {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
        if widths != structure.widths:
            raise ValueError("the widths are others")
        with torch.inference_mode():
            logits = model(torch.zeros(1, *structure.input_shape, dtype=next(model.parameters()).dtype))
        if logits.shape != (1, len(structure.class_names)):
            raise ValueError(f"it has {tuple(logits.shape)} logits for {len(structure.class_names)} classes")
    return model


def read_structure(path: str | Path) -> Structure:
    """What the file says of its network. Raises BenchmarkError as `load_pruned_model` does."""
    return _read(path)[0]


def _read(path: str | Path) -> tuple[Structure, dict[str, Tensor]]:
    with _refusing(path, "is no saved network of this benchmark, or is damaged"):
        content = io.BytesIO(Path(path).read_bytes())  # np.load leaves a damaged file open
        with np.load(content, allow_pickle=False) as arrays:
            values = json.loads(str(arrays[STRUCTURE]))
            state = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != STRUCTURE}
        if values.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        if values.keys() != {field.name for field in fields(Structure)}:
            raise ValueError("its structure is not whole")
        lists = ("class_names", "class_indices", "input_shape", "mean", "std")
        for name, strides in values["strides"].items():
            state[name] = _laid_out(state[name], tuple(strides))
        if not all(isinstance(values[name], list) for name in lists):
            raise ValueError("its structure is not whole")
        structure = Structure(**values | {name: tuple(values[name]) for name in lists})
        _check(structure, state)
    return structure, state


def _check(structure: Structure, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for what cannot all be true of one network."""
    if structure.architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {structure.architecture!r} is none of {', '.join(ARCHITECTURES)}")
    if len(structure.class_indices) != len(structure.class_names) or not all(
        isinstance(name, str) for name in structure.class_names
    ):
        raise ValueError("class_names and class_indices do not fit each other")
    channels = (*structure.mean, *structure.std)
    if len(structure.mean) != len(structure.std) or not all(isinstance(value, float | int) for value in channels):
        raise ValueError("mean and std do not fit each other")
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
        made = int(value.max()) if name.endswith(f".{SOURCES}") else 0
        if made and value[value < made].tolist() != list(range(made)):
            raise ValueError(f"{name} is not in the order of its filters")


def _laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    laid_out = torch.empty_strided(value.shape, strides, device="meta")
    if sorted(strides) != sorted(value.stride()) and not laid_out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"strides {list(strides)} are no layout of {list(value.shape)}")
    return torch.empty_strided(value.shape, strides, dtype=value.dtype).copy_(value)


@contextlib.contextmanager
def _refusing(path: str | Path, reason: str):
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # numpy, zipfile, json and torch raise a dozen types on damaged and foreign files
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchmarkError(f"{path}: {reason} ({why})") from error


def _fill(module: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    """Take the module's own weights out of `state` and make it as wide as they are."""
    dense = {**module._parameters, **module._buffers}
    depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
    for name, before in dense.items():
        if before is None:
            continue
        if f"{prefix}{name}" not in state:
            raise ValueError(f"{prefix}{name} is missing")
        value = state.pop(f"{prefix}{name}")
        same_kernel = value.shape[2:] == before.shape[2:]
        narrower = value.dim() == before.dim() and all(a <= b for a, b in zip(value.shape, before.shape, strict=True))
        if not (same_kernel and narrower) or value.dtype.is_floating_point != before.dtype.is_floating_point:
            raise ValueError(f"{prefix}{name} is {list(value.shape)} in the file, {list(before.shape)} when dense")
        setattr(module, name, nn.Parameter(value) if name in module._parameters else value)
    if isinstance(module, nn.Conv2d):
        module.out_channels = len(module.weight)
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.running_mean)
    if (sources := state.pop(f"{prefix}{SOURCES}", None)) is not None:
        put_back(module, sources)
