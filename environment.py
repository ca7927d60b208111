"""Where and with what a run was made: versions, processor, threads, GPU, the code's commit, the config's hash."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "torch-pruning", "hydra-core", "omegaconf", "fvcore", "numpy", "scikit-learn", "pillow"),
    *("matplotlib", "tqdm", "onnx", "onnxruntime", "onnxscript", "wandb"),
)
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # they decide how fast the CPU is
CODE = Path(__file__).resolve().parent


def environment(settings: Any, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A plain dict for environment.json; what does not exist or cannot be found out is None.

    `settings` (dataclass or dict) enters by its hash and its device, `data` as it is. Imports torch, which answers for
    threads and GPUs. The entry `hash` stands for all others but the time and the configuration: runs that share it were
    made alike. Raises ConfigError for a device that is not there.
    """
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_hash": config_hash(settings),
        **code_version(CODE),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device(settings),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "gpu": gpus[0] if gpus else None,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "gpu_driver": _first_line("/proc/driver/nvidia/version"),
        "data": dict(data) if data is not None else None,
    }
    alike = {key: value for key, value in found.items() if key not in ("time_utc", "config_hash")}
    return found | {"hash": config_hash(alike)}


def config_hash(settings: Any) -> str:
    """SHA-256, in hex, of a dataclass or dict as canonical JSON: sorted keys, no spaces, tuples like lists.

    The same for a setting however its file orders the keys. Raises TypeError for a value that is not plain.
    """
    canonical = json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"config: {value!r} of type {type(value).__name__} has no canonical form")


def code_version(folder: Path) -> dict[str, Any]:
    """git_commit of the checkout that the code in `folder` belongs to, git_dirty where the code differs from it.

    Both are None outside a checkout.
    """
    # A checkout may merely surround a copy of the code: only one that tracks this file has the code's commit.
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return {"git_commit": None, "git_dirty": None}
    changed = _git(folder, "status", "--porcelain", "--", "*.py", "*.yaml", "requirements*.txt")
    return {"git_commit": commit, "git_dirty": changed != ""}


@cache
def code_digest() -> str:
    """SHA-256, in hex, of all modules of the benchmark: what they compute may change when any of them does."""
    digest = hashlib.sha256()
    for path in sorted([*CODE.glob("*.py"), *CODE.glob("filter_selection/*.py")]):
        digest.update(f"{path.relative_to(CODE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, or None where it fails; its own variables, set within hooks, would name another repository."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(settings: Any) -> str | None:
    """What settings.device stands for on this machine: cpu, or cuda with the GPU's name; None without the setting."""
    import torch

    from helpers import resolve_device

    wanted = settings.get("device") if isinstance(settings, Mapping) else getattr(settings, "device", None)
    if wanted is None:
        return None
    device = resolve_device(wanted)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _first_line(path: str) -> str | None:
    """Of a file in which the system tells something about itself."""
    try:
        return next(iter(Path(path).read_text().splitlines()), "").strip() or None
    except OSError:
        return None


def _cpu_model() -> str | None:
    """The processor's name as Linux reports it, elsewhere as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None
