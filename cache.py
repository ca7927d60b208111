"""The trained dense model: trained once, kept on disk under a name that its making decides, and checked when read."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from errors import BenchmarkError
from helpers import derive_seed
from kept import Kind, kept, key_of
from models import get_model, model_from_state
from training import EpochRow, fit, training_plan

# Raise it when the code changes what training makes of the same settings, or what a file holds.
FORMAT_VERSION = 2
# Settings that the trained model does not depend on. A key that is not named here shapes it, so that a key added later
# is never overlooked; the files behind the two paths enter by their content.
WITHOUT_EFFECT = {
    "dataset": {"root", "num_workers", "download"},
    "model": {"pretrained_weights_path", "skip_first_layers"},
    "training": {
        "train",
        "batch_size_test",
        "retrain_after_pruning",
        "retrain_epochs",
        "lr_retrain",
        "train_pruned_from_scratch",
    },
}


@dataclass(frozen=True)
class DenseModel:
    """The unpruned model on its device, in eval mode, and where it is from.

    history and training_seconds are those of its training, also when that was an earlier run's; empty and 0.0 for
    weights taken as they are. source: "trained", "cache", "weights file" or "torchvision". key: 64 hexadecimal digits
    that stand for everything that shaped it.
    """

    model: nn.Module
    history: list[EpochRow]
    training_seconds: float
    source: str
    key: str


def dense_model(settings: Any, factory: Any, device: torch.device) -> DenseModel:
    """The dense model that the settings ask for: from the cache, trained now, or with given weights as they are.

    `factory` gives the data (`get_dataloaders`, `fingerprint`). A file in `settings.cache_dir` that is damaged, or made
    by other settings, is replaced with a warning; a disk that cannot be written costs a warning as well, and the model
    is used from memory. Raises BenchmarkError as `get_model` and `fit` do.
    """
    facts = shaping_facts(settings, factory.fingerprint(), device.type)
    key = key_of(facts)
    if not settings.training.train:
        return _given_model(settings, device, key)
    path = Path(settings.cache_dir, f"{settings.dataset.name}-{settings.model.name}-{key[:16]}.pt")
    make = partial(_trained, settings, facts, factory, device)
    return kept(_kind(settings, facts, device), path, key, make, f"training {settings.model.name}")


def shaping_facts(settings: Any, fingerprint: str, device_type: str) -> dict[str, Any]:
    """Everything that shapes the trained model, as JSON can hold it.

    The kind of device is part of it, since GPUs train in lower precision. Raises BenchmarkError for a weights file that
    cannot be read.
    """
    groups = {
        group: {key: value for key, value in vars(getattr(settings, group)).items() if key not in without_effect}
        for group, without_effect in WITHOUT_EFFECT.items()
    }
    # torchvision builds the networks and draws their first weights
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    made_with = {"format": FORMAT_VERSION, **versions, "device": device_type}
    weights = _file_digest(settings.model.pretrained_weights_path)
    return groups | made_with | {"seed": settings.seed, "data": fingerprint, "pretrained_weights": weights}


def _given_model(settings: Any, device: torch.device, key: str) -> DenseModel:
    from_file = settings.model.pretrained_weights_path is not None
    if not from_file and not settings.training.use_pretrained_model:
        raise BenchmarkError("training.train: false; give trained weights by model.pretrained_weights_path")
    model = _starting_model(settings).to(device)
    return DenseModel(model, [], 0.0, "weights file" if from_file else "torchvision", key)


def _starting_model(settings: Any) -> nn.Module:
    return get_model(
        settings.model.name,
        settings.dataset.num_classes,
        small_input_stem=settings.model.small_input_stem,
        use_pretrained_model=settings.training.use_pretrained_model,
        pretrained_weights_path=settings.model.pretrained_weights_path,
        seed=derive_seed(settings.seed, "initial weights"),
    )


def _kind(settings: Any, facts: dict[str, Any], device: torch.device) -> Kind[DenseModel]:
    """How a trained model goes into a file and comes back."""

    def pack(dense: DenseModel) -> dict[str, Any]:
        state: dict[str, Tensor] = {name: value.cpu() for name, value in dense.model.state_dict().items()}
        history = [asdict(row) for row in dense.history]
        return {"facts": _canonical(facts), "state": state, "history": history, "seconds": dense.training_seconds}

    def unpack(content: dict[str, Any]) -> DenseModel:
        if content["facts"] != _canonical(facts):
            raise ValueError("it was made by other settings")
        wanted = settings.model
        model = model_from_state(
            wanted.name, settings.dataset.num_classes, content["state"], small_input_stem=wanted.small_input_stem
        )
        history = [EpochRow(**row) for row in content["history"]]
        return DenseModel(model.to(device), history, float(content["seconds"]), "cache", key_of(facts))

    return Kind(
        "dense model", "nothing is trained", pack, unpack, lambda dense: f" (it took {dense.training_seconds:.0f} s)"
    )


def _trained(settings: Any, facts: dict[str, Any], factory: Any, device: torch.device) -> DenseModel:
    loaders = factory.get_dataloaders()
    result = fit(
        _starting_model(settings),
        loaders.train,
        loaders.validation,
        training_plan(settings.training),
        device=device,
        description="training",
        seed=derive_seed(settings.seed, "training"),
    )
    return DenseModel(result.model, result.history, result.seconds, "trained", key_of(facts))


def _canonical(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _file_digest(path: str | None) -> str | None:
    """The sha256 of a file's content, in hexadecimal; None without a file."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BenchmarkError(f"model.pretrained_weights_path: {path}; cannot be read ({error.strerror})") from error
