"""The trained dense model: trained once, kept on disk under a name that its making decides, and checked when read."""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from disk import clear_leftovers, replace_whole
from errors import BenchmarkError
from helpers import derive_seed
from locks import locked
from models import get_model, model_from_state
from training import EpochRow, fit, training_plan

T = TypeVar("T")
log = logging.getLogger(__name__)

# Raise it when the code changes what training makes of the same settings, or what a file holds.
FORMAT_VERSION = 1
MAGIC = b"%s of the filter-pruning benchmark, sha256 "  # of what
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
    key = config_key(facts)
    if not settings.training.train:
        return _given_model(settings, device, key)
    path = Path(settings.cache_dir, f"{settings.dataset.name}-{settings.model.name}-{key[:16]}.pt")
    return made_once(
        path,
        lambda: _from_cache(path, settings, facts, device),
        lambda: _train(path, settings, facts, factory, device),
        f"training {settings.model.name}",
    )


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


def config_key(facts: dict[str, Any]) -> str:
    """The sha256 of the facts, in hexadecimal: the same for the same facts, in whatever order they are given."""
    return hashlib.sha256(_canonical(facts).encode()).hexdigest()


def made_once(path: Path, read: Callable[[], T | None], make: Callable[[], T], doing: str) -> T:
    """What `read` finds at `path`, or else what `make` makes and leaves there: of several processes one makes it, the
    others wait and read. `doing`: what making it is, for those who wait."""
    seen = _version_of(path)
    if (found := read()) is not None:
        return found
    with locked(path.parent / "locks" / f"{path.name}.lock", doing):
        clear_leftovers(path)
        if _version_of(path) != seen and (found := read()) is not None:
            return found
        return make()


def _version_of(path: Path) -> tuple[int, ...] | None:
    """Tells a file from the one that replaces it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def save_checked(path: Path, content: dict[str, Any], what: bytes = b"dense model") -> None:
    """Write `content` to `path`, behind its checksum, whole or not at all. Raises OSError."""
    payload = io.BytesIO()
    torch.save(content, payload)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256(payload.getbuffer()).hexdigest().encode()
    replace_whole(path, MAGIC % what + checksum + b"\n" + payload.getbuffer())


def load_checked(path: Path, what: bytes = b"dense model") -> dict[str, Any]:
    """What `save_checked` wrote, on the CPU. Raises OSError, or ValueError with the reason when it is not intact."""
    magic = MAGIC % what
    with path.open("rb") as file:
        header = file.readline(len(magic) + 65)  # bounded: a foreign file may be one long line
        payload = file.read()
    if not header.startswith(magic):
        raise ValueError("it is empty, or no file of this benchmark")
    if hashlib.sha256(payload).hexdigest().encode() + b"\n" != header.removeprefix(magic):
        raise ValueError("it is damaged or incomplete, its checksum does not match")
    return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")


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


def _from_cache(path: Path, settings: Any, facts: dict[str, Any], device: torch.device) -> DenseModel | None:
    """The model in the file, or None: there is no file, or it was refused with a warning."""
    try:
        content = load_checked(path)
        if content["facts"] != _canonical(facts):
            raise ValueError("it was made by other settings")
        wanted = settings.model
        model = model_from_state(
            wanted.name, settings.dataset.num_classes, content["state"], small_input_stem=wanted.small_input_stem
        )
        history = [EpochRow(**row) for row in content["history"]]
        seconds = float(content["seconds"])
    except FileNotFoundError:
        return None
    except Exception as error:  # an intact checksum over foreign content can fail in any of these steps
        log.warning("Cached dense model %s is not used, the model is trained again: %s", path, error)
        return None
    log.info("Dense model reused, nothing is trained: %s (its training took %.0f s)", path, seconds)
    return DenseModel(model.to(device), history, seconds, "cache", config_key(facts))


def _train(path: Path, settings: Any, facts: dict[str, Any], factory: Any, device: torch.device) -> DenseModel:
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
    state: dict[str, Tensor] = {name: value.cpu() for name, value in result.model.state_dict().items()}
    history = [asdict(row) for row in result.history]
    content = {"facts": _canonical(facts), "state": state, "history": history, "seconds": result.seconds}
    try:
        save_checked(path, content)
        log.info("Dense model kept for later runs: %s", path)
    except OSError as error:
        log.warning("Dense model is not kept, the next run trains it again: %s cannot be written (%s)", path, error)
    return DenseModel(result.model, result.history, result.seconds, "trained", config_key(facts))


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
