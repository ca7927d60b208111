"""The way from a command line to jobs: every configuration is checked before torch is imported or a directory made.

`launch` adds to `hydra.main` what a user should see of an error: one message, an exit code, and a sweep that goes on.
"""

import argparse
import difflib
import errno
import functools
import itertools
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import get_overrides_dirname  # as the next: Hydra's only one; it is pinned
from hydra._internal.utils import get_args_parser  # the one parser of Hydra's flags
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_places import require_dataset
from environment import CODE
from errors import BenchmarkError, ConfigError
from identity import LENGTH, register_resolvers, run_identity
from launchers import check_launcher, explain_launcher, require_launcher
from schema import listed, show
from settings import CONFIG_DIR, check
from sweep_plan import Plan, PlannedRun, dry_run

# Here, since whoever runs a job imports this module, in whatever process.
register_resolvers()
# Files of config/hydra/launcher have the names of the plugins' own: they are their choices with words added.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
VERSION_BASE = "1.3"
CONFIG_NAME = "config"
# Of a larger sweep, only so many jobs are checked that each value is met: checking takes about 10 ms a job.
MAX_JOBS_CHECKED = 256
# Of a larger one nobody is told beforehand which runs there will be; each has a status from when it begins.
MAX_JOBS_PLANNED = 4096
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
                errno.ELOOP}  # fmt: skip


def launch(run: Callable[[DictConfig], Any]) -> int:
    """Run the jobs that the command line asks for; returns the exit code.

    A job that fails on something the user can mend is reported in one message, and the next job of a sweep starts.
    HYDRA_FULL_ERROR=1 shows the traceback instead.
    """
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures: list[str] = []

    @functools.wraps(run)
    def job(cfg: DictConfig) -> None:
        try:
            run(cfg)
        except Exception as error:
            message = explain(error)
            if full_error or (message is None and not _in_sweep()):
                raise
            if message is None:  # a bug: its traceback is worth more than the other runs are, but not their loss
                logging.getLogger().exception(_job_label())
                message = f"{type(error).__name__}: {error}"
            failures.append(message)
            logging.getLogger().error(_job_label() + message)

    logging.raiseExceptions = full_error  # on a full disk the log file fails as well: the console has the message
    # The jobs of a launcher are processes of their own, which have to find these modules.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    if threads := os.environ.get("OMP_NUM_THREADS"):  # PyTorch goes by MKL's, which joblib sets where it is not set
        os.environ.setdefault("MKL_NUM_THREADS", threads.split(",")[0])
    planned = None
    try:
        planned = check_arguments(sys.argv[1:])
        if planned is not None and planned.dry_run:
            print(dry_run(planned.runs))
            return 0
        SweepReport.plan = planned
        with _errors_passed_on():
            hydra.main(version_base=VERSION_BASE, config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)(job)()
        return 1 if failures or (planned is not None and planned.failed()) else 0
    except KeyboardInterrupt:
        if full_error:
            raise
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = explain(error)
        if full_error or message is None:
            raise
        print(message, file=sys.stderr)
        return 1


class SweepReport(Callback):
    """Queues the runs of a sweep, and compares them once they are through; config/config.yaml names it."""

    plan: Plan | None = None  # of the one sweep of this process

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if self.plan is None:
            return
        try:
            self.plan.begin(Path(config.hydra.sweep.dir))
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from error  # of any other exception Hydra would make a warning

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        import report

        if any(Path(config.hydra.sweep.dir).glob(f"*/**/{report.RECORDS}")):  # else every job has said why it failed
            report.main([config.hydra.sweep.dir])


@contextmanager
def _errors_passed_on() -> Iterator[None]:
    """Let Hydra raise its errors, which it would otherwise print itself, with a traceback, and exit."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _job_label() -> str:
    """Which job of a sweep speaks; nothing for a single run."""
    return f"[{' '.join(HydraConfig.get().overrides.task)}] " if _in_sweep() else ""


def _in_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def explain(error: BaseException) -> str | None:
    """The one message for an error that the user can mend; None for any other, which is a bug."""
    if isinstance(error, BenchmarkError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read; write key=value, a list as key=[a,b], "
            "a value with special characters as 'key=\"value\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _no_such_choice(error.missing_cfg_file, error.options)
    if taken_out := re.match(r"Error resolving interpolation '\$\{(\w+)\}'", str(error)):  # ~model: others follow it
        return f"{taken_out[1]}.name: missing; choose with {taken_out[1]}=NAME"
    if isinstance(error, HydraException | OmegaConfBaseException):
        # Hydra says which override it is, and the error behind it says why
        parts = dict.fromkeys(" ".join(str(part).split()) for part in (error, error.__cause__) if part is not None)
        return "; ".join(part for part in parts if part)
    return explain_launcher(error) or _short_of_memory(error) or _disk_problem(error)


def _short_of_memory(error: BaseException) -> str | None:
    said = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not re.search(
        r"(can't|cannot) allocate memory|out of memory", said, re.I
    ):
        return None
    return (
        f"memory: {said[:200] or 'there is too little'}; take fewer images at a time (training.batch_size_train, "
        "training.batch_size_test, latency.batch_sizes) or a smaller dataset.image_size"
    )


def _no_such_choice(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    nearest = difflib.get_close_matches(name, options, n=1)
    hint = f", did you mean {group}={nearest[0]}?" if nearest else "."
    return f"{group}: {name}; no such choice{hint} Choices: {listed(options)}"


def _disk_problem(error: BaseException) -> str | None:
    link: BaseException | None = error
    while link is not None:
        # what a library makes of a full disk hides the cause; a refused access counts only where nothing hides it
        plain = link is error or str(error).startswith("Unable to configure handler")  # of the log file
        if isinstance(link, OSError) and (
            link.errno in DISK_FULL or (plain and (link.errno in NOT_WRITABLE or _in_making_a_folder(link)))
        ):
            place = HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "the run's directory"
            advice = "free some space" if link.errno in DISK_FULL else "make it accessible"
            return f"{link.filename or place}: {os.strerror(link.errno)}; {advice}, or choose another place"
        link = link.__cause__ or link.__context__
    return None


def _in_making_a_folder(error: OSError) -> bool:
    """Whether a folder could not be made: below /proc, for one, that is answered by `no such file`."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].name in ("mkdir", "makedirs")


def check_arguments(arguments: Sequence[str]) -> Plan | None:
    """Compose and check every job that the arguments ask for; raises ConfigError or Hydra's own for the first fault.

    Returns what a sweep will do; None for a single run, and for flags that run no job (--help, --cfg, ...) or that look
    for the configuration elsewhere, on which it says nothing.
    """
    flags = _parse_flags(arguments)
    shows_something = flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion
    if shows_something or flags.config_path or flags.config_dir or flags.experimental_rerun:
        return None
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), job_name="main", version_base=VERSION_BASE):
            return _check_jobs(flags.overrides, flags.multirun, flags.config_name or CONFIG_NAME)
    finally:
        HydraConfig.instance().cfg = None


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise ConfigError(f"command line: {message}; flags are listed by --hydra-help, and -m stands first or last")

    parser = get_args_parser()
    parser.error = refuse  # instead of printing the usage of every flag
    flags = parser.parse_args(arguments)
    if sum(map(bool, (flags.run, flags.multirun, flags.cfg, flags.info, flags.shell_completion))) > 1:
        refuse("--run, --multirun, --cfg, --info and --shell-completion exclude each other")
    return flags


def _check_jobs(arguments: list[str], multirun: bool, config_name: str) -> Plan | None:
    parser = OverridesParser.create(_config_loader())
    if unread := [argument for argument in arguments if argument.startswith("=")]:
        raise ConfigError(f"{unread[0]}: cannot be read; write key=value")
    given = overrides = parser.parse_overrides(arguments)
    composer = _Composer(config_name)
    for value in itertools.chain.from_iterable(_values(override, parser) for override in overrides):
        composer.refuse_no_single_choice(value)
    hydra_config = composer.hydra_config([_values(override, parser)[0] for override in overrides])
    multirun = multirun or hydra_config.mode == RunMode.MULTIRUN
    for key in ("run.dir", "sweep.dir"):
        place = str(OmegaConf.select(hydra_config, key) or "").strip()
        if not place:
            raise ConfigError(f"hydra.{key}: empty; give the folder where a run's files are to go")
        if place.startswith("~"):
            raise ConfigError(f"hydra.{key}: {show(place)}; ~ would be a folder of that name, write the path out")
    if multirun:
        check_launcher(hydra_config)
        from_file = [f"{key}={value}" for key, value in (hydra_config.sweeper.get("params") or {}).items()]
        overrides = parser.parse_overrides(from_file) + overrides
    elif sweeps := [override for override in overrides if override.is_sweep_override()]:
        raise ConfigError(f"{sweeps[0].input_line}: several values; a list is written [a,b], a sweep needs --multirun")
    for job in _jobs([_values(override, parser) for override in overrides]):
        try:
            cfg = composer.compose(job)
            settings = check(cfg)
            composer.refuse_places_outside(job, cfg, multirun)
            if not multirun:  # of a sweep, only the jobs without their dataset are to fail
                require_dataset(settings.dataset)
        except (BenchmarkError, HydraException, OmegaConfBaseException) as error:
            if not multirun:
                raise
            raise ConfigError(f"[{' '.join(_task(job))}] {explain(error)}") from error
    if not multirun:
        if settings.sweep.dry_run:
            raise ConfigError("sweep.dry_run: true; lists the runs of a sweep, which needs --multirun")
        return None
    if not settings.sweep.dry_run:
        require_launcher(hydra_config)
    alternatives = [_values(override, parser) for override in overrides]
    sweep_dir = composer.sweep_dir([_values(override, parser)[0] for override in overrides], _task(given))
    if (count := math.prod(map(len, alternatives))) > MAX_JOBS_PLANNED:
        if settings.sweep.dry_run:
            raise ConfigError(f"sweep.dry_run: true; {count} runs are too many to list, {MAX_JOBS_PLANNED} at most")
        return Plan(sweep_dir, (), False, settings.resume)
    jobs = itertools.product(*alternatives)
    runs = tuple(composer.planned(number, job, sweep_dir) for number, job in enumerate(jobs))
    _refuse_shared_folders(runs)
    subdir = str(hydra_config.sweep._get_node("subdir")._value())
    settled = re.search(r"now:|job[.:]id", subdir) is None
    return Plan(sweep_dir, runs, settings.sweep.dry_run, settings.resume, settled)


def _refuse_shared_folders(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError where runs that differ would go into one folder, and all but one of them be lost."""
    first: dict[Path, PlannedRun] = {}
    for run in runs:
        other = first.setdefault(run.path, run)
        if other.identity != run.identity:
            both = f"[{' '.join(other.overrides)}] and [{' '.join(run.overrides)}]"
            raise ConfigError(f"hydra.sweep.subdir: {both} would share {run.path}; add -${{run_hash:}} to the name")


def _task(overrides: Iterable[Override]) -> list[str]:
    """What a command line says to the benchmark, and not to Hydra."""
    return [override.input_line for override in overrides if not override.is_hydra_override()]


def _as_swept(override: Override) -> Override:
    """As Hydra's sweeper writes it, with its own escapes."""
    return replace(override, input_line=f"{override.get_key_element()}={override.get_value_element_as_str()}")


def _values(override: Override, parser: OverridesParser) -> list[Override]:
    """One override for every value that `override` sweeps over."""
    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: a sweep needs single values, such as a,b or range(1,5)")
    key = override.get_key_element()
    values = [parser.parse_overrides([f"{key}={value}"])[0] for value in override.sweep_string_iterator()]
    if not values:
        raise ConfigError(f"{override.input_line}: a sweep without values")
    return values


def _jobs(alternatives: Sequence[Sequence[Override]]) -> Iterator[Sequence[Override]]:
    """The jobs of a sweep in Hydra's order; of a very large one, jobs in which every value comes up at least once."""
    if math.prod(map(len, alternatives)) <= MAX_JOBS_CHECKED:
        return itertools.product(*alternatives)
    longest = max(map(len, alternatives))
    return ([values[turn % len(values)] for values in alternatives] for turn in range(longest))


class _Composer:
    """Composes jobs, and each choice of groups only once: Hydra takes 0.1 s for that, a job of a sweep some 5 ms."""

    def __init__(self, config_name: str) -> None:
        self.config_name = config_name
        self.composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}
        self.is_group = functools.cache(lambda key: bool(_config_loader().get_group_options(key)))

    def refuse_no_single_choice(self, override: Override) -> None:
        """Hydra takes the last of a list of choices without a word, and stumbles over null."""
        key = override.key_or_group
        if override.type != OverrideType.CHANGE or not self.is_group(key):
            return
        value = override.value()
        if value is None or isinstance(value, list | dict):
            options = listed(_config_loader().get_group_options(key))
            several = f"; a sweep over several is written -m {key}=A,B" if value else ""
            raise ConfigError(f"{override.input_line}: one choice is needed, of {options}{several}")

    def hydra_config(self, job: Sequence[Override]) -> DictConfig:
        """Hydra's own part of the configuration of a job."""
        return self._composed(job)[0].hydra

    def compose(self, job: Sequence[Override]) -> DictConfig:
        """The configuration of a job, without Hydra's own part."""
        cfg = deepcopy(self._composed(job)[1])
        for override in filter(self._sets_a_value, job):
            # force_add: `check` has the better message for a key that does not exist, and no merging for other types
            key, value = override.key_or_group, override.value()
            merge = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(cfg, key))
            OmegaConf.update(cfg, key, value, merge=merge, force_add=True)
        return cfg

    def sweep_dir(self, job: Sequence[Override], task: Sequence[str]) -> Path:
        """Where the sweep that says `task` goes; `job` is any of its jobs."""
        full = deepcopy(self._composed(job)[0])
        OmegaConf.set_readonly(full.hydra, False)
        full.hydra.overrides.task = list(task)
        OmegaConf.clear_cache(full)
        return Path(str(full.hydra.sweep.dir))

    def planned(self, number: int, job: Sequence[Override], sweep_dir: Path) -> PlannedRun:
        """The run of the job with this number."""
        cfg = self.compose(job)
        identity = run_identity(cfg)
        told = tuple(text for text in _task(job) if not text.startswith(("resume=", "sweep.")))
        return PlannedRun(told, sweep_dir / self._text("sweep.subdir", number, job, cfg, identity), identity)

    def refuse_places_outside(self, job: Sequence[Override], cfg: DictConfig, multirun: bool) -> None:
        """Raise ConfigError for a name of Hydra's that leads out of the folder it stands for, a run's or a sweep's."""
        digits = "0" * LENGTH  # in the place of the run's hash, which leads nowhere
        owners = {"output_subdir": "run's"} | ({"sweep.subdir": "sweep's"} if multirun else {})
        for key, owner in owners.items():
            text = self._text(key, 0, job, cfg, digits)
            if os.path.isabs(text) or ".." in Path(text).parts:
                raise ConfigError(f"hydra.{key}: {show(text)}; leaves the {owner} folder, give a name without ..")
        if os.path.basename(name := self._text("job.name", 0, job, cfg, digits)) != name:
            raise ConfigError(f"hydra.job.name: {show(name)}; names the log file in the run's folder, leave out the /")

    def _text(self, key: str, number: int, job: Sequence[Override], cfg: DictConfig, identity: str) -> str:
        """What hydra.`key` says of this job; nothing where it is null."""
        full = self._composed(job)[0]
        group, _, name = key.rpartition(".")
        text = (full.hydra[group] if group else full.hydra)._get_node(name)._value()
        text = "" if text is None else str(text).replace("${run_hash:}", identity[:LENGTH])
        if "${" not in text:
            return text
        if not re.search(r"hydra|:", text):  # resolved without Hydra's own part, whose copy takes most of the time
            with open_dict(cfg):
                cfg.text_of_hydra = text
            return str(cfg.text_of_hydra)
        full = deepcopy(full)
        OmegaConf.set_readonly(full.hydra, False)
        full.hydra.job.num, full.hydra.job.id, full.hydra.overrides.task = number, str(number), _task(job)
        own = [_as_swept(override) for override in job if not override.is_hydra_override()]
        full.hydra.job.override_dirname = get_overrides_dirname(own, **full.hydra.job.config.override_dirname)
        with open_dict(full):
            full.merge_with(cfg)
        HydraConfig.instance().cfg = full  # where ${hydra:...} looks
        try:
            return str(OmegaConf.select(full.hydra, key))
        finally:
            HydraConfig.instance().cfg = self._composed(job)[0]

    def _composed(self, job: Sequence[Override]) -> tuple[DictConfig, DictConfig]:
        key = tuple(override.input_line for override in job if not self._sets_a_value(override))
        if key not in self.composed:
            try:
                full = hydra.compose(self.config_name, overrides=list(key), return_hydra_config=True)
            except (AssertionError, AttributeError, TypeError) as error:  # as of hydra.sweeper.params={...}
                raise ConfigError(f"{' '.join(key)}: Hydra cannot apply it ({error})") from error
            with open_dict(full.hydra):  # what Hydra fills in when a job starts
                full.hydra.job.num, full.hydra.job.id, full.hydra.runtime.output_dir = 0, "0", "."
            HydraConfig.instance().set_config(full)
            self.composed[key] = full, OmegaConf.masked_copy(full, [name for name in full if name != "hydra"])
        return self.composed[key]

    def _sets_a_value(self, override: Override) -> bool:
        """Whether this is a plain key=value for the benchmark: no choice of a group, no + or ~, nothing of Hydra's."""
        plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_hydra_override()
        return plain and not self.is_group(override.key_or_group)


def _config_loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()
