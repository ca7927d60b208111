"""What Hydra's launchers and its sweeper can be told, and what their errors mean: theirs would be tracebacks."""

from __future__ import annotations

import shutil
from types import NoneType
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from errors import ConfigError
from schema import Matches, Within, convert, show

COUNT = r"[1-9]\d{0,8}"
TERM = rf"({COUNT}|\d{{1,9}}\.\d{{1,9}}|n_jobs)"
POSITIVE = Annotated[int, Within(1)]
KINDS: dict[str, Any] = {
    "sweeper.max_batch_size": POSITIVE | None,
    "launcher.n_jobs": Annotated[str, Matches(rf"-?{COUNT}", "a number of runs, or -1 for as many as cores")],
    "launcher.batch_size": Annotated[str, Matches(rf"auto|{COUNT}", "auto or a number of runs")],
    "launcher.pre_dispatch": Annotated[
        str, Matches(rf"all|{TERM}( ?[-+*/]{{1,2}} ?{TERM})*", "all, a number of runs, n_jobs or as 2*n_jobs")
    ],
    "launcher.timeout": Annotated[float, Within(0, above_low=True)] | None,
    # Threads would share what is one a process: Hydra's configuration, PyTorch's number of threads, random states.
    "launcher.backend": Literal["loky"] | None,
    "launcher.prefer": Literal["processes"],
    "launcher.require": NoneType,
    "launcher.max_nbytes": Annotated[str, Matches(rf"{COUNT}[KMG]?", "a number of bytes, as 100M")] | None,
    "launcher.mmap_mode": Literal["r", "r+", "w+", "c"] | None,
    "launcher.timeout_min": POSITIVE,
    "launcher.cpus_per_task": POSITIVE | None,
    "launcher.gpus_per_node": Annotated[int, Within(0)] | None,
    "launcher.tasks_per_node": Literal[1],  # a run is one task
    "launcher.nodes": Literal[1],
    "launcher.mem_gb": POSITIVE | None,
    "launcher.array_parallelism": POSITIVE,
}
ENDED = {"TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError", "FailedJobError"}


def check_launcher(hydra_config: DictConfig) -> None:
    """Raise ConfigError for a setting of the chosen launcher or sweeper that it could not work with."""
    for group in ("launcher", "sweeper"):
        if not OmegaConf.is_dict(given := hydra_config.get(group)):
            raise ConfigError(f"hydra.{group}: {show(given)}; choose with hydra/{group}=NAME")
    for key, kind in KINDS.items():
        group, _, name = key.partition(".")
        if name in hydra_config[group]:
            convert(f"hydra.{key}", OmegaConf.select(hydra_config, key), kind)


def require_launcher(hydra_config: DictConfig) -> None:
    """Raise ConfigError where the chosen launcher finds nothing here that would run its jobs."""
    if str(hydra_config.launcher.get("_target_")).endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise ConfigError(
            "hydra/launcher: submitit_slurm; no SLURM here (srun is not to be found), start it on a node that submits "
            "jobs, or choose another: basic, joblib, submitit_local"
        )


def explain_launcher(error: BaseException) -> str | None:
    """The message for an error of a launcher's own; None for any other."""
    kind, said = type(error), " ".join(str(error).split())[:200]
    if kind.__module__.startswith("multiprocessing") and kind.__name__ == "TimeoutError":
        return (
            "hydra.launcher.timeout: a run took longer, and the sweep was ended; the same command goes on with what is "
            "missing, give more seconds or null"
        )
    if kind.__name__ == "FailedJobError" and said.startswith("sbatch"):
        return f"hydra/launcher: submitit_slurm; the cluster took no jobs ({said})"
    if kind.__name__ in ENDED:
        return f"a job's process ended before its run was done ({said}); the same command goes on with what is missing"
    return None
