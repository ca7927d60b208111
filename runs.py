"""The runs below a folder, read from what each left behind: whole records count, whatever is not whole is named."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from errors import BenchmarkError
from records import Record, scan_records
from run_status import STATUS, read_status

RECORDS = "records.jsonl"


@dataclass(frozen=True)
class Run:
    """One run's folder. `name` is its path below the root; `overrides` what its command line said."""

    path: Path
    name: str
    records: tuple[Record, ...]
    selections: dict[float, dict[str, tuple[int, ...]]]
    environment: dict[str, Any]
    overrides: tuple[str, ...] | None

    @property
    def command(self) -> str | None:
        return None if self.overrides is None else shlex.join(["python", "main.py", *self.overrides])


@dataclass(frozen=True)
class Sweep:
    """All runs below `root`, and a sentence for each thing that is missing or was not read."""

    root: Path
    runs: tuple[Run, ...]
    problems: tuple[str, ...]

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for run in self.runs for record in run.records)


def read_sweep(root: str | Path) -> Sweep:
    """Read every records.jsonl in and below `root`.

    Of several runs of one configuration the one that got furthest counts, the last among equals. Where runs of one
    variant, classes and seed differ in another setting, what their command lines say of it becomes part of the
    variant's name.

    Raises BenchmarkError where there is not one whole record.
    """
    root = Path(root)
    problems: list[str] = []
    found = []
    for path in sorted(root.glob(f"**/{RECORDS}"), key=_by_number):
        try:
            found.append(_read_run(root, path.parent, problems))
        except BenchmarkError as error:
            problems.append(f"{_name(root, path.parent)}: {error}")
    runs = _set_apart(_without_duplicates([run for run in found if run.records], problems), problems)
    if not runs:
        told = "".join(f"\n  {problem}" for problem in problems)
        raise BenchmarkError(
            f"{root}: not one whole record in or below it; give the folder of a run or of a sweep, as "
            f"outputs/DATE/TIME or multirun/NAME{told}"
        )
    problems += _other_origins(runs)
    problems += _unfinished(root, {run.path: len(run.records) for run in found})
    problems += _gaps([record for run in runs for record in run.records])
    return Sweep(root, tuple(runs), tuple(problems))


def _other_origins(runs: Sequence[Run]) -> list[str]:
    """Where runs that would be paired did not start from one dense network and the same images."""
    images: dict[tuple, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    networks: dict[tuple, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        first = run.records[0]
        place = task_of(first), first.model, first.seed, shaping(first, "dense")
        if first.images is not None:
            images[place][first.images].append(run.name)
        if first.dense_weights is not None:
            networks[place][first.dense_weights].append(run.name)
    told = {place: f"{len(found)} sets of images in its runs ({_examples(found)})" for place, found in images.items()
            if len(found) > 1}  # fmt: skip
    for place, found in networks.items():
        if len(found) > 1 and place not in told:
            told[place] = (
                f"{len(found)} dense networks in its runs ({_examples(found)}); other weights, or training on another "
                "machine, with another version or number of threads, make others"
            )
    return [
        f"{task}, {model}, seed {seed}: {what}; what is compared across them is no pair"
        for (task, model, seed, _), what in told.items()
    ]


def _examples(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{digest[:8]} in {len(names)}, as {names[0]}" for digest, names in found.items())


def _unfinished(root: Path, recorded: dict[Path, int]) -> list[str]:
    """What the status files say of runs that are not done, and which folders have neither records nor a status."""
    problems, known, queued = [], set(), 0
    for path in sorted(root.glob(f"**/{STATUS}"), key=_by_number):
        if (status := read_status(path.parent)) is None:
            continue
        known.add(path.parent)
        name, some = _name(root, path.parent), "" if path.parent not in recorded else ", after some results"
        queued += status.state == "queued"
        if status.state == "failed":
            problems.append(f"{name}: failed{some}: {status.reason}")
        elif status.state == "running" and not status.records:  # else all is measured, and it writes its report
            problems.append(f"{name}: {'stopped' if status.stopped else 'under way'}{some}")
        elif status.state == "done" and (left := recorded.get(path.parent, 0)) < max(status.records, 1):
            problems.append(f"{name}: done, but {_gone(left, status.records)}; the same command measures them again")
    problems += [f"{queued} {'run has' if queued == 1 else 'runs have'} not begun"] * (queued > 0)
    for config in sorted(root.glob("**/.hydra"), key=_by_number):
        if config.parent not in recorded.keys() | known:
            problems.append(f"{_name(root, config.parent)}: has no record yet; it failed, or is under way")
    return problems


def _gone(left: int, written: int) -> str:
    return f"only {left} of its {written} records are there" if left else "its records are gone"


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Folders 2 and 10 in the order of their numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts]


def _name(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _read_run(root: Path, path: Path, problems: list[str]) -> Run:
    name = _name(root, path)
    records, unread = scan_records(path / RECORDS)
    lines: dict[str, list[str]] = defaultdict(list)  # by reason: a whole file of another version is one line to read
    for problem in unread:
        lines[problem.partition(": ")[2]].append(problem)
    for first, *others in lines.values():
        problems.append(f"{name}: {RECORDS}, {first}" + (f" (and {len(others)} lines more)" if others else ""))
    if not records and not unread:
        problems.append(f"{name}: {RECORDS} is empty; the run failed, or is under way")
    shown = shown_run(records, path)
    if (others := len({record.run_id for record in records}) - 1) > 0:
        told = f"{others} other {'run' if others == 1 else 'runs'}, shown is {shown[0].run_id}, {len(shown)} records"
        problems.append(f"{name}: {RECORDS} holds {told}")
    selections = _read(name, path / "selections.json", _selections, problems)
    environment = _read(name, path / "environment.json", _mapping, problems)
    overrides = _read(name, path / ".hydra" / "overrides.yaml", _overrides, problems)
    return Run(path, name, tuple(shown), selections or {}, environment or {}, overrides)


def shown_run(records: Sequence[Record], run_dir: Path) -> list[Record]:
    """Of the runs recorded in one folder, the one that counts.

    The one that its status says is measured to the end; else, of the last one's configuration, the one that got
    furthest, and of equals the last.
    """
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[record.run_id].append(record)
    if len(runs) < 2:
        return list(records)
    status = read_status(run_dir)
    if status is not None and status.records and status.run_id in runs:
        return runs[status.run_id]
    same = [run for run in runs.values() if run[0].config_hash == records[-1].config_hash]
    return max(reversed(same), key=len)


def _read(name: str, path: Path, parse: Any, problems: list[str]) -> Any:
    """What `parse` makes of a file; None, and a problem told, where there is none or it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError:
        problems.append(f"{name}: has no {path.name}")
    except Exception:  # whatever the parsers raise on damaged files
        problems.append(f"{name}: {path.name} is damaged and was not read")
    return None


def _selections(text: str) -> dict[float, dict[str, tuple[int, ...]]]:
    blocks = json.loads(text)
    return {
        float(block["ratio"]): {layer: tuple(map(int, filters)) for layer, filters in block["filters_removed"].items()}
        for block in blocks
    }


def _mapping(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a mapping")
    return content


def _overrides(text: str) -> tuple[str, ...]:
    return tuple(map(str, OmegaConf.to_container(OmegaConf.create(text))))


def _without_duplicates(runs: Sequence[Run], problems: list[str]) -> list[Run]:
    """Of the runs that share a configuration, the one that got furthest."""
    same: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        first = run.records[0]
        same[first.config_hash, first.selected_classes].append(run)
    kept = []
    for alike in same.values():
        best = max(alike, key=_progress)
        kept.append(best)
        problems += [
            f"{run.name}: same configuration as {best.name}{_behind(run, best)}, left out"
            for run in alike
            if run is not best
        ]
    return sorted(kept, key=lambda run: runs.index(run))


def _progress(run: Run) -> tuple[int, bool, str]:
    """Orders runs by how far they got, and equal ones by when they began: run ids begin with the time."""
    measured = {(record.stage, record.ratio, record.target) for record in run.records}
    status = read_status(run.path)
    return len(measured), status is not None and status.state == "done", run.records[0].run_id


def _behind(run: Run, other: Run) -> str:
    (measured, done, _), (more, finished, _) = _progress(run), _progress(other)
    if measured < more:
        return f", but {measured} of its {more} results"
    return ", but not done" if done < finished else ""


# What is no part of a variant: where things go, what is measured, and what says which block or target it is.
_NO_SETTING = {"cache_dir", "dataset.download", "dataset.num_workers", "hydra", "latency", "log_results",
               "pruning.pruning_ratio", "pruning.target", "resume", "run_name", "sampling_seed",
               "save_pruned_models", "seed", "selected_classes", "subset", "sweep", "wandb"}  # fmt: skip
_PLACE = "dataset.root"  # a setting only where other images are found there
_OF_IMAGES = {"dataset", "dataset_training", "experiment"}  # where settings stand that say which images are read


def _set_apart(runs: Sequence[Run], problems: list[str]) -> list[Run]:
    """No two runs in one place of the comparison: they are told apart by settings, or all but one are left out."""
    varied: dict[tuple, set[str]] = defaultdict(set)
    for place, alike in _places(runs).items():
        varied[place[:3]] |= _differing(alike)
    for alike in _same_task(runs).values():
        for key in _differing(alike) - _IN_A_RECORD:
            for run in alike:
                first = run.records[0]
                if f" {key.rpartition('.')[2]}=" not in first.variant:  # else its name says it already
                    varied[first.dataset, first.model, first.variant].add(key)
    named = []
    for run in runs:
        first, told = run.records[0], _told(run)
        keys = sorted(varied[first.dataset, first.model, first.variant] & told.keys())
        settings = tuple(f"{key}={told[key]}" for key in keys)
        variant = " ".join([first.variant, *settings])
        records = tuple(replace(record, variant=variant, told_apart_by=settings) for record in run.records)
        named.append(replace(run, records=records))
    lost = {}
    for place, alike in _places(named).items():
        best = max(alike, key=_progress)
        lost |= {
            run.name: f"{place[2]} on the same classes and seed as {best.name}" for run in alike if run is not best
        }
    problems += [
        f"{name}: {same}, and nothing that its command line says tells them apart, left out"
        for name, same in lost.items()
    ]
    return [run for run in named if run.name not in lost]


def _differing(runs: Sequence[Run]) -> set[str]:
    """The settings in which these runs differ, as their command lines say."""
    told = [_told(run) for run in runs]
    differing = {key for key in set().union(*told) if len({settings.get(key) for settings in told}) > 1}
    return differing if _PLACE in differing and _read_other_images(runs) else differing - {_PLACE}


def _read_other_images(runs: Iterable[Run]) -> bool:
    """Whether two of one seed and the same other settings of the dataset did, as far as their records tell."""
    images: dict[tuple, set[str]] = defaultdict(set)
    for run in runs:
        first = run.records[0]
        others = {key: v for key, v in _told(run).items() if key.partition(".")[0] in _OF_IMAGES and key != _PLACE}
        if first.images is not None:
            images[first.seed, tuple(sorted(others.items()))].add(first.images)
    return any(len(found) > 1 for found in images.values())


# What every record says by itself, and comparisons and variants are made by.
_IN_A_RECORD = {"dataset", "model", "pruning", "pruning.match", "pruning.scoring_classes",
                "pruning.pruning_scope", "pruning.scores_path"}  # fmt: skip


def _same_task(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[task_of(run.records[0]), run.records[0].model].append(run)
    return found


def _places(runs: Iterable[Run]) -> dict[tuple, list[Run]]:
    """Where the comparison puts the results of runs, as far as more than one are put there."""
    found: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        for place in dict.fromkeys(
            (r.dataset, r.model, r.variant, block_of(r), r.stage, r.match, r.ratio if r.target is None else r.target)
            for r in run.records
            if r.stage != "dense" and r.ratio > 0
        ):
            found[place].append(run)
    return {place: alike for place, alike in found.items() if len(alike) > 1}


# Where the settings of the network stand that nothing is removed from, and those of them that only retraining reads.
_OF_THE_NETWORK = {"dataset", "dataset_training", "device", "experiment", "model", "model_training", "training"}
_OF_RETRAINING = {"training.retrain_epochs", "training.lr_retrain"}
_OF_NO_CONTROL = {"training.retrain_after_pruning", "training.train_pruned_from_scratch", "model.skip_first_layers"}


def shaping(record: Record, stage: str) -> tuple[str, ...]:
    """Of the settings that tell a variant's runs apart, those that shape the network of a stage with nothing removed.

    What a method is told, and which images it scores on, does not; see `read_sweep` for what these settings are.
    """
    keys = {word: word.partition("=")[0] for word in record.told_apart_by}
    without = _OF_NO_CONTROL if stage == "retrained" else _OF_NO_CONTROL | _OF_RETRAINING
    return tuple(w for w, key in keys.items() if key.partition(".")[0] in _OF_THE_NETWORK and key not in without)


def _told(run: Run) -> dict[str, str]:
    """The settings on a run's command line, as far as they are of the result."""
    pairs = (override.lstrip("+~").partition("=") for override in run.overrides or ())
    return {key: value for key, _, value in pairs if not {key, key.partition(".")[0]} & _NO_SETTING}


def block_of(record: Record) -> tuple[tuple[int, ...], int, int]:
    """What has to be equal for two runs to be a pair: the classes, the seed, and the seed of the scoring images."""
    return tuple(sorted(record.selected_classes)), record.seed, record.sampling_seed


def task_of(record: Record) -> str:
    """What the network is to do: accuracies on more classes, or on classes chosen to be alike, are not comparable."""
    count, rule = len(record.selected_classes), "" if record.subset == "given" else f"{record.subset} "
    return f"{record.dataset}, {count} {rule}{'class' if count == 1 else 'classes'}"


def _gaps(records: Iterable[Record]) -> list[str]:
    """What some variants or blocks of a task and model have and others lack: seeds, classes, targets, stages."""
    cells: dict[tuple, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    blocks: dict[tuple, set] = defaultdict(set)
    for record in records:
        panel = task_of(record), record.model
        blocks[panel].add(block_of(record))  # also where nothing is pruned yet
        if record.stage != "dense" and record.ratio > 0:
            level = record.ratio if record.target is None else record.target
            cell = (block_of(record), record.match, level if record.match else None, record.stage)
            cells[panel][record.variant].add(cell)
    problems = []
    for panel, variants in cells.items():
        everything = set().union(*variants.values())
        for variant, has in variants.items():
            problems += _lacking(variant, panel, everything - has, len(everything), "others")
        crossed = {(block, *place) for block in blocks[panel] for _, *place in everything}
        problems += _lacking("every variant", panel, crossed - everything, len(crossed), "other seeds or classes")
    return problems


def _lacking(who: str, panel: tuple[str, str], lacking: set[tuple], of: int, others: str) -> list[str]:
    """One sentence on the cells, each with its block first, or none where nothing is lacking."""
    if not lacking:
        return []
    (classes, seed, _), *rest = sorted({cell[0] for cell in lacking})
    more = f" and {len(rest)} more" if rest else ""
    return [
        f"{who} on {', '.join(panel)}: lacks {len(lacking)} of {of} results that {others} have "
        f"(seed {seed}, classes {', '.join(map(str, classes))}{more})"
    ]
