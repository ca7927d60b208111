"""What Hydra's launchers and its sweeper can be told, and what their errors mean: theirs would be tracebacks."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from errors import ConfigError
from schema import Matches, Within, convert

COUNT = r"[1-9]\d{0,8}"
KINDS: dict[str, Any] = {
    "sweeper.max_batch_size": Annotated[int, Within(1)] | None,
    "launcher.n_jobs": Annotated[str, Matches(rf"-?{COUNT}", "a number of runs, or -1 for as many as cores")],
    "launcher.batch_size": Annotated[str, Matches(rf"auto|{COUNT}", "auto or a number of runs")],
    "launcher.pre_dispatch": Annotated[
        str,
        Matches(rf"all|{COUNT}|({COUNT} ?\* ?)?n_jobs( ?\* ?{COUNT})?", "all, a number of runs, n_jobs or 2*n_jobs"),
    ],
    "launcher.timeout": Annotated[float, Within(0, above_low=True)] | None,
}
ENDED = {"TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError", "FailedJobError"}


def check_launcher(hydra_config: DictConfig) -> None:
    """Raise ConfigError for a setting of the chosen launcher or sweeper that it could not work with."""
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
