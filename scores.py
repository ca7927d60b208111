"""Scores on disk: what a run scored, with all that shaped it: other ratios of the same scores need no new pass."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from disk import write_whole
from environment import code_digest
from errors import ConfigError
from filter_selection import Scores
from kept import Kind, kept, key_of
from memory import peak_memory
from selection import PruningSelection
from structure import ModelGraph

log = logging.getLogger(__name__)

KEY = "pruning.scores_path"
VERSION = 1  # raised when a formula changes, so that scores of the old one are not taken for those of the new
NUMBERS = (torch.float32, torch.float64, torch.int64)
NO_SCORES = torch.empty(0)
COSTS = ("scoring_seconds", "scoring_images", "scoring_peak_bytes")  # no facts: they shaped no score
Scored = tuple[Scores, dict[str, Any]]  # and what scoring cost, by the names above
FACTS = "facts.json"  # no name of a layer: it would have to be a module called `json` in one called `facts`


def obtain_scores(
    settings: Any, selector: PruningSelection, graph: ModelGraph, factory: Any, run_dir: Path
) -> tuple[Scores, dict[str, Any]]:
    """The scores of all prunable layers and what scoring cost, kept as `scores.npz` in the run directory.

    The costs: seconds, images read, and the most memory in use. Runs that differ in what comes after the scores alone
    score once: the first keeps them in `settings.cache_dir`, the costs among them, and the others wait for it. With
    `pruning.scores_path` all are read from there.

    Raises:
        BenchmarkError: as `Criterion.score` does.
        ConfigError: the file is no scores file, was shaped otherwise, or lacks a layer.
    """
    facts = shaping_facts(settings, selector, graph, factory)
    given = settings.pruning.scores_path
    if given is not None:
        scores, made_with = load_scores(given)
        widths = {layer: graph.conv(layer).out_channels for layer in selector.layers(graph)}
        scores = _fitting(scores, made_with, facts, widths, given)
        costs = {name: made_with.get(name) for name in COSTS}
        log.info("Scores reused, nothing is scored: %s%s", given, _took((scores, costs)))
    else:
        key = _cache_key(settings, facts, selector, graph)
        name = f"{settings.pruning.name}-{settings.dataset.name}-{settings.model.name}-{key[:16]}.scores"
        doing = f"scoring with {settings.pruning.name}"
        scores, costs = kept(SCORES, Path(settings.cache_dir, name), key, lambda: _scored(selector, graph), doing)
    save_scores(run_dir / "scores.npz", scores, facts | costs)
    return scores, costs


def _scored(selector: PruningSelection, graph: ModelGraph) -> Scored:
    log.info("Scoring %d layers with %s ...", len(selector.layers(graph)), selector.criterion.name)
    images = selector.batches.num_images if selector.criterion.needs_data else 0
    with peak_memory(next(graph.model.parameters()).device) as peak:
        start = time.perf_counter()
        scores = selector.score(graph)
        seconds = time.perf_counter() - start
    return scores, dict(zip(COSTS, (seconds, images, peak.bytes), strict=True))


def _took(scored: Scored) -> str:
    return f" (scoring took {scored[1]['scoring_seconds']:.1f} s)"


SCORES: Kind[Scored] = Kind(
    "scores",
    "nothing is scored",
    lambda scored: {"scores": scored[0], "costs": scored[1]},
    lambda content: (dict(content["scores"]), {name: content["costs"][name] for name in COSTS}),
    _took,
)


def _cache_key(settings: Any, facts: dict[str, Any], selector: PruningSelection, graph: ModelGraph) -> str:
    """Stands for all that shapes the scores, down to the last bit: a criterion that was edited scores anew."""
    device = next(graph.model.parameters()).device.type
    more = {
        "layers": selector.layers(graph),
        "batch_size": settings.training.batch_size_test,  # sums over a batch round by its size
        "device": [device, torch.get_num_threads() if device == "cpu" else None],  # and by the number of threads
        "packages": [torch.__version__, metadata.version("torch-pruning")],
        "code": [code_digest(), _source(type(selector.criterion))],
    }
    return key_of([facts, more])


def _source(criterion: type) -> str:
    """The text of the file of a criterion, which may be the user's own; one typed into a console is never the same."""
    try:
        return Path(inspect.getfile(criterion)).read_text()
    except (OSError, TypeError):
        return uuid.uuid4().hex


def shaping_facts(settings: Any, selector: PruningSelection, graph: ModelGraph, factory: Any) -> dict[str, Any]:
    """Everything that a layer's scores depend on, as JSON can hold it, under the names of the settings.

    Neither the ratios, the scope and the floor, which come after the scores, nor the order of `selected_classes`.
    """
    pruning = settings.pruning
    facts = {"version": VERSION, "pruning.name": pruning.name}
    facts |= {f"pruning.{key}": value for key, value in pruning.options.items()}
    facts |= {"seed": settings.seed, "model.name": settings.model.name, "weights (sha256)": weights_digest(graph.model)}
    if selector.criterion.needs_data:
        facts |= {
            "pruning.scoring_classes": pruning.scoring_classes,
            "sampling_seed": settings.sampling_seed,
            "num_pruning_samples": settings.num_pruning_samples,
            "dataset.name": settings.dataset.name,
            "images (sha256)": factory.fingerprint(),
        }
        if pruning.scoring_classes != "all":
            facts["selected_classes"] = sorted(settings.selected_classes)
    return json.loads(json.dumps(facts))


def weights_digest(model: nn.Module) -> str:
    """The sha256, in hexadecimal, of all parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        # As bytes, whatever the type (numpy knows no bfloat16) and the memory format.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_scores(path: Path, scores: Scores, facts: dict[str, Any]) -> None:
    """An npz file of one array a layer and the facts as JSON. Raises BenchmarkError where it cannot be written."""
    content = io.BytesIO()
    arrays = {layer: values.numpy() for layer, values in scores.items()}
    np.savez(content, **arrays, **{FACTS: np.array(json.dumps(facts))})
    write_whole(path, content.getvalue())


def load_scores(path: str | Path) -> tuple[Scores, dict[str, Any]]:
    """What `save_scores` wrote. Raises ConfigError for a file that cannot be read or is none of its making."""
    try:
        content = io.BytesIO(Path(path).read_bytes())  # np.load leaves a damaged file open
        with np.load(content, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays[FACTS]))
            scores = {layer: torch.from_numpy(arrays[layer]) for layer in arrays.files if layer != FACTS}
        facts["scoring_seconds"] = float(facts["scoring_seconds"])
        numbers = all(values.dtype in NUMBERS for values in scores.values())
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged and foreign files
        raise ConfigError(f"{KEY}: {path}; is not the scores.npz of a run, or is damaged") from error
    if not numbers:
        raise ConfigError(f"{KEY}: {path}; is not the scores.npz of a run, its arrays are of another type")
    return scores, facts


def _fitting(scores: Scores, made_with: dict, wanted: dict, widths: dict[str, int], path: str) -> Scores:
    """The scores of the layers in `widths`, once everything that shaped them is what this run would have."""
    for fact in wanted | made_with:
        if fact not in COSTS and made_with.get(fact) != wanted.get(fact):
            raise ConfigError(
                f"{KEY}: {path}; was made with {fact}={_told(made_with, fact)}, this run has {_told(wanted, fact)}; "
                f"leave {KEY} out to score anew"
            )
    missing = [layer for layer in widths if scores.get(layer, NO_SCORES).shape[:1] != (widths[layer],)]
    if missing:
        raise ConfigError(
            f"{KEY}: {path}; has no scores of {missing[0]}, which this run prunes; was it made with another "
            "model.skip_first_layers?"
        )
    for layer in widths:
        if not scores[layer].isfinite().all():
            raise ConfigError(f"{KEY}: {path}; scores of {layer} are not finite; leave {KEY} out to score anew")
    return {layer: scores[layer] for layer in widths}


def _told(facts: dict[str, Any], fact: str) -> str:
    if fact not in facts:
        return "none"
    return f"{facts[fact][:12]}..." if "sha256" in fact else json.dumps(facts[fact])
