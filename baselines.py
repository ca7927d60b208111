"""What the methods of one seed and subset share: the dense network's answers, and its retraining with nothing removed.

Both are the same for every method that is compared with them, so that one run of a sweep makes them for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from accuracy import ClassCounts
from data_factory import DataLoaderFactory
from environment import code_digest
from kept import Kind, kept, key_of
from scores import weights_digest
from settings import Settings
from training import EpochRow, FitPlan, FitResult


@dataclass(frozen=True)
class MeasuredFit:
    """What a training came to, and the most memory in use meanwhile."""

    result: FitResult
    peak_bytes: int | None


def shared_counts(
    settings: Settings, factory: DataLoaderFactory, model: nn.Module, device: torch.device,
    count: Callable[[], ClassCounts],
) -> ClassCounts:  # fmt: skip
    """What `count()` finds of `model` on the test images of all classes, from the cache where it is there."""
    key = key_of(_facts(settings, factory, model, device))
    path = Path(settings.cache_dir, f"{settings.dataset.name}-{settings.model.name}-{key[:16]}.answers")
    return kept(ANSWERS, path, key, count, f"counting the answers of {settings.model.name}")


def shared_retraining(
    settings: Settings, factory: DataLoaderFactory, model: nn.Module, device: torch.device, plan: FitPlan,
    retrain: Callable[[], MeasuredFit],
) -> MeasuredFit:  # fmt: skip
    """What `retrain()` makes of `model`, from which nothing is removed, from the cache where it is there."""
    more = {
        "plan": asdict(plan),
        "selected_classes": sorted(settings.selected_classes),
        "replace_last_layer": settings.replace_last_layer,
        "batch_size_train": settings.training.batch_size_train,
        "augmentation": settings.training.use_data_augmentation,
    }
    key = key_of(_facts(settings, factory, model, device) | more)

    def unpack(content: dict[str, Any]) -> MeasuredFit:
        retrained = copy.deepcopy(model)
        retrained.load_state_dict(content["state"])
        history = [EpochRow(**row) for row in content["history"]]
        result = FitResult(retrained.eval(), history, int(content["best_epoch"]), float(content["seconds"]))
        return MeasuredFit(result, content["peak_bytes"])

    kind = Kind("retrained dense model", "nothing is retrained", _pack, unpack)
    path = Path(settings.cache_dir, f"{settings.dataset.name}-{settings.model.name}-{key[:16]}.retrained")
    return kept(kind, path, key, retrain, f"retraining {settings.model.name}")


def _pack(retrained: MeasuredFit) -> dict[str, Any]:
    result = retrained.result
    return {
        "state": {name: value.cpu() for name, value in result.model.state_dict().items()},
        "history": [asdict(row) for row in result.history],
        "best_epoch": result.best_epoch,
        "seconds": result.seconds,
        "peak_bytes": retrained.peak_bytes,
    }


def _facts(settings: Settings, factory: DataLoaderFactory, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """All that a figure of `model` on these images depends on; code that was edited has figures of its own."""
    return {
        "code": code_digest(),
        "torch": [torch.__version__, torchvision.__version__],
        "device": [device.type, torch.get_num_threads() if device.type == "cpu" else None],  # sums round by it
        "model": [settings.model.name, settings.model.small_input_stem],
        "weights": weights_digest(model),
        "images": factory.fingerprint(),
        "seed": settings.seed,
        "batch_size_test": settings.training.batch_size_test,  # sums over a batch round by its size
    }


def _counts(content: dict[str, Any]) -> ClassCounts:
    top5 = content["top5"]
    return ClassCounts(
        tuple(content["correct"]), tuple(content["total"]), None if top5 is None else tuple(top5),
        content["confusion"].numpy(),
    )  # fmt: skip


ANSWERS: Kind[ClassCounts] = Kind(
    "answers of the dense model",
    "no test image is read",
    lambda counts: {
        "correct": list(counts.correct),
        "total": list(counts.total),
        "top5": None if counts.top5 is None else list(counts.top5),
        "confusion": torch.from_numpy(counts.confusion),
    },
    _counts,
)
