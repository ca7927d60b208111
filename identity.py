"""What a run and a sweep are called: by a hash of what shapes their results, so that the same is known again."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from schema import flatten

VERSION = 1  # raised when the code gives other results for the same settings
# Settings that shape no result. A key that is not named here does, so that one added later is never overlooked.
WITHOUT_EFFECT = {"cache_dir", "log_results", "run_name", "wandb", "resume", "sweep", "dataset.num_workers",
                  "dataset.download"}  # fmt: skip
FILES = ("model.pretrained_weights_path", "pruning.scores_path", "pruning.matched_selections")  # by their content
LENGTH = 10  # hexadecimal digits in the name of a folder


def run_identity(cfg: DictConfig) -> str:
    """64 hexadecimal digits that stand for every setting that shapes a run's results, and the versions of torch.

    Files enter by their content, the images do not. The same for any order of the keys.
    """
    plain = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [name for name in cfg if name != "hydra"]), resolve=True)
    settings = {key: value for key, value in flatten(plain).items() if not _without_effect(key)}
    settings |= {key: _digest_at(settings[key]) for key in FILES if isinstance(settings.get(key), str)}
    versions = {name: metadata.version(name) for name in ("torch", "torchvision")}
    return _hash({"version": VERSION, "packages": versions, "settings": settings})


def sweep_name(overrides: Iterable[str]) -> str:
    """The experiment's name, and digits that stand for what else the command line says: the same command, again."""
    pairs = [text.lstrip("+~").partition("=") for text in overrides]
    experiment = next((value for key, _, value in pairs if key == "experiment"), "sweep")
    shaping = sorted(text for text, (key, *_) in zip(overrides, pairs, strict=True) if not _without_effect(key))
    name = re.sub(r"[^\w-]", "-", experiment)
    return f"{name}-{_hash(shaping)[:LENGTH]}"


def register_resolvers() -> None:
    """`${run_hash:}` and `${sweep_name:OVERRIDES}` in a configuration that Hydra has composed."""
    OmegaConf.register_new_resolver("run_hash", lambda _root_: run_identity(_root_)[:LENGTH], replace=True)
    # Kept once it is known: what Hydra composes for a job has the job's overrides, not those of the sweep.
    OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)


def _without_effect(key: str) -> bool:
    return key in WITHOUT_EFFECT or key.partition(".")[0] in WITHOUT_EFFECT


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest_at(path: str) -> str:
    path = os.path.expanduser(path)
    try:
        state = os.stat(path)
    except OSError:
        return path  # `check` has the message
    return _digest(path, state.st_size, state.st_mtime_ns)


@cache
def _digest(path: str, _size: int, _modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
