"""One dense network and what becomes of it: every ratio pruned, measured, retrained, measured, and recorded at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accuracy import ClassCounts, evaluate
from baselines import shared_counts
from bookkeeping import accuracy_fields, footprint_in, size_fields, timings
from budgets import Budgeted, find_ratios, removed_share
from cache import DenseModel
from data_factory import DataLoaderFactory, sampling_seed
from disk import read_arrays, write_arrays, write_whole
from errors import BenchmarkError
from filter_selection import FilterIndices
from memory import peak_memory
from metrics import Bench, Footprint, Measurement, measure_inference_time_and_accuracy
from models import replace_head
from pruner import Pruner
from record_checks import TOLERANCE, left_of
from records import Record, append_record, config_hash
from retraining import Retraining
from scores import weights_digest
from selection import PruningSelection
from settings import Settings
from structure import ModelGraph
from subsets import alike, soft_confusion
from tracking import Tracker

log = logging.getLogger(__name__)


def choose_classes(
    settings: Settings, factory: DataLoaderFactory, model: nn.Module, device: torch.device
) -> tuple[Settings, DataLoaderFactory]:
    """Both with the classes that `subset` asks for, by what the dense network makes of the validation images."""
    rule = settings.subset.rule
    confusion = soft_confusion(model, factory.get_dataloaders().validation, len(settings.class_names), device)
    classes = alike(confusion, settings.subset.size, rule)
    log.info("Classes that are %s to the dense network: %s", rule, ", ".join(settings.class_names[c] for c in classes))
    settings = replace(settings, selected_classes=classes)
    return settings, factory.selecting(settings)


class Experiment:
    """Measures a dense network and its pruned forms on equal terms; each record is on disk before the next begins.

    A context manager, since measuring keeps a process.

    Args:
        settings: the checked configuration.
        factory: the data.
        device: where everything runs.
        run_dir: records.jsonl is appended to here.
        selector: which filters go, and which layers are left out.
        dense: the trained network and where it is from.
        graph: its graph.
        environment_hash: of environment.json.
        tracker: is told of what happens.
        run_id: of the records.
        earlier: records of the same run by a process that did not finish it: what they hold is not measured again.
    """

    def __init__(
        self,
        settings: Settings,
        factory: DataLoaderFactory,
        device: torch.device,
        run_dir: Path,
        selector: PruningSelection,
        dense: DenseModel,
        graph: ModelGraph,
        environment_hash: str,
        tracker: Tracker,
        *,
        run_id: str,
        earlier: Sequence[Record] = (),
    ):
        self.settings = settings
        self.factory = factory
        self.device = device
        self.run_dir = run_dir
        self.left_out = left_out = selector.left_out(graph)
        self.selector = selector
        self.dense = dense
        self.graph = graph
        self.tracker = tracker
        self.loaders = factory.get_subset_dataloaders()
        self.retraining = Retraining(settings, factory, self.loaders, device)
        self.widths = {layer: graph.conv(layer).out_channels for layer in graph.convs}
        self.prunable = sum(width for layer, width in self.widths.items() if layer not in left_out)
        self.scoring_costs: dict[str, Any] = {}
        self.records: list[Record] = []
        self.earlier = {(record.stage, record.ratio, record.target): record for record in earlier}
        # Of latency.npz and confusion.npz, which are written anew with each record.
        self.samples: dict[str, Any] = read_arrays(run_dir / "latency.npz") if earlier else {}
        self.confusions: dict[str, Any] = read_arrays(run_dir / "confusion.npz") if earlier else {}
        # The first test batch of the selected classes: every network of a run is timed on the same images.
        images = next(iter(self.loaders.test))[0]
        self.bench = Bench(
            dense.model,
            images,
            device=device,
            latency=settings.latency,
            onnx=settings.inference_with_onnx,
            seed=settings.seed,
        )
        self.identity = {
            "run_id": run_id,
            "config_hash": config_hash(settings),
            "environment_hash": environment_hash,
            "seed": settings.seed,
            "method": settings.pruning.name,
            "variant": settings.variant,
            "scope": settings.pruning.pruning_scope,
            "scoring_classes": settings.pruning.scoring_classes if selector.criterion.needs_data else None,
            "num_pruning_samples": settings.num_pruning_samples,
            "sampling_seed": sampling_seed(settings),
            "subset": settings.subset.rule,
            "match": settings.pruning.match,
            "dataset": settings.dataset.name,
            "model": settings.model.name,
            "selected_classes": settings.selected_classes,
            "class_names": [settings.class_names[index] for index in settings.selected_classes],
            "filters_prunable": self.prunable,
            "filters_total": sum(self.widths.values()),
            "pruner": settings.pruning.pruner,
            "residual": settings.pruning.residual,
            "min_filters": settings.pruning.min_filters,
            "round_to": settings.pruning.round_to,
            "widths_dense": self.widths,
            "layers_left_out": [layer for layer in graph.convs if layer in left_out],
            "dense_weights": weights_digest(dense.model),
            "images": factory.fingerprint(),
            "training_seconds": dense.training_seconds,
        }

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *error: object) -> None:
        self.bench.__exit__(*error)

    def measure_dense(self) -> None:
        """The dense network with all logits, on the test images of all classes, the selected ones among them."""
        if known := self.earlier.get(("dense", 0.0, None)):
            self.reference = footprint_in(known)
            self.records.append(known)
            return
        log.info("Measuring the dense network ...")
        model, test, classes = self.dense.model, self.factory.get_dataloaders().test, len(self.settings.class_names)

        def count() -> ClassCounts:
            return shared_counts(
                self.settings, self.factory, model, self.device, partial(evaluate, model, test, classes, self.device)
            )

        measured = measure_inference_time_and_accuracy(model, test, classes, self.bench, count=count)
        self.reference = measured.footprint
        self._record(self.dense.model, measured, stage="dense", ratio=0.0, indices={}, head="all")

    def budgeted(self, choose: Callable[[float], FilterIndices], pruner: Pruner) -> list[Budgeted]:
        """The ratios at which the targets of `pruning.match` are met; `choose`: ratio -> filters to remove."""
        match, targets = self.settings.pruning.match, self.settings.pruning.target
        known = {
            r.target: _found(r, choose(r.ratio)) for r in self.earlier.values() if r.stage == "pruned" and r.target
        }
        target = [share for share in targets if share not in known]
        log.info("Looking for the ratios that remove %s of %s ...", ", ".join(f"{t:g}" for t in target), match)
        if match == "latency":
            removed = self._latency_removed(pruner)
        else:
            classes = len(self.settings.selected_classes) if self.settings.replace_last_layer else None
            removed = removed_share(match, self.graph, classes, self.prunable)
        found = {one.target: one for one in find_ratios(choose, removed, target, match)} | known
        return [found[share] for share in targets]

    def _latency_removed(self, pruner: Pruner) -> Callable[[FilterIndices], float]:
        """The share of the latency that goes, as the records tell it, of the largest batch: built and timed."""

        def removed(indices: FilterIndices) -> float:
            times = self.bench.times("pytorch", self.bench.torch_passes(self._pruned(indices, pruner)[0]))
            return 1 - times[max(times)].ratio()[0]

        return removed

    def _pruned(self, indices: FilterIndices, pruner: Pruner) -> tuple[nn.Module, float]:
        pruned, difference = pruner.prune_and_prove(indices)  # the proof is a part of what a removal costs here
        if self.settings.replace_last_layer:
            pruned = replace_head(pruned, self.settings.selected_classes)
        return pruned, difference

    def measure_ratio(
        self, ratio: float, indices: FilterIndices, pruner: Pruner, budgeted: Budgeted | None = None
    ) -> None:
        """Remove, measure, and, where the configuration asks for it, retrain and measure again.

        budgeted: the target that the ratio was found for.
        """
        target = budgeted and budgeted.target
        known = {stage: self.earlier.get((stage, ratio, target)) for stage in self._stages()}
        first, second = known["pruned"], known.get("retrained")
        if all(known.values()):
            self.records += known.values()
            self.tracker.ratio(self.records[0], first, second)
            return
        removed = sum(map(len, indices.values()))
        log.info("Ratio %g: removing %d of %d prunable filters ...", ratio, removed, self.prunable)
        short = budgeted.note if budgeted else self.selector.shortfall(self.graph, ratio, indices)
        notes = [short] if short else []
        with peak_memory(self.device) as peak:
            start = time.perf_counter()
            pruned, difference = self._pruned(indices, pruner)
            seconds = time.perf_counter() - start
        costs = self.scoring_costs | {"removal_seconds": seconds, "removal_peak_bytes": peak.bytes}
        costs["difference_from_masked"] = difference
        common = {"ratio": ratio, "indices": indices, "head": self._head(), "target": target}
        if first:
            self.records.append(first)
            costs |= {name: getattr(first, name) for name in costs}
            footprint = footprint_in(first)
        else:
            measured = self._measure(pruned)
            footprint = measured.footprint
            first = self._record(pruned, measured, stage="pruned", notes=notes, **common, **costs)
        if self.settings.training.retrain_after_pruning and second:
            self.records.append(second)
        elif self.settings.training.retrain_after_pruning:
            made = self.retraining.retrained(pruned, ratio, untouched=removed == 0)
            self.tracker.curve(f"retraining/ratio_{ratio:g}", made.history)
            notes = [*notes, *made.notes]
            # The same shapes: what follows from them is known.
            measured = self._measure(made.model, footprint=footprint)
            second = self._record(made.model, measured, stage="retrained", notes=notes, **common, **costs, **made.costs)
        self.tracker.ratio(self.records[0], first, second)
        if self.settings.training.train_pruned_from_scratch:
            self._train_from_scratch(pruned, footprint, common)

    def _stages(self) -> list[str]:
        """What is recorded of each ratio, in this order."""
        training = self.settings.training
        more = {"retrained": training.retrain_after_pruning, "scratch": training.train_pruned_from_scratch}
        return ["pruned", *(stage for stage, wanted in more.items() if wanted)]

    def _train_from_scratch(self, pruned: nn.Module, footprint: Footprint, common: dict[str, Any]) -> None:
        """The control that tells what the weights left are worth."""
        result = self.retraining.from_scratch(pruned, common["ratio"])
        self.tracker.curve(f"scratch/ratio_{common['ratio']:g}", result.history)
        measured = self._measure(result.model, footprint=footprint)
        self._record(result.model, measured, stage="scratch", scratch_seconds=result.seconds, **common)

    def _saved(
        self, model: nn.Module, measured: Measurement, stage: str, ratio: float, head: str
    ) -> tuple[list[str], list[str]]:
        """The files that a pruned network was written to, where that is asked for, and what kept it from ONNX."""
        if not self.settings.save_pruned_models or stage == "dense":
            return [], []
        from export import save_pruned_model, structure_of
        from onnx_network import exported, told  # takes a second

        indices = self.settings.selected_classes if head == "selected" else range(len(self.settings.class_names))
        structure = structure_of(
            model,
            architecture=self.settings.model.name,
            num_classes=len(self.settings.class_names),
            small_input_stem=self.settings.model.small_input_stem,
            class_names=[self.settings.class_names[index] for index in indices],
            class_indices=list(indices),
            input_shape=self.factory.input_shape,
            mean=self.factory.mean,
            std=self.factory.std,
            provenance={
                **{key: self.identity[key] for key in ("run_id", "config_hash", "method", "dataset", "seed")},
                **{"stage": stage, "ratio": ratio, "torch": torch.__version__, "dense_weights": self.dense.key},
            },
        )
        folder, name = self.run_dir / "models", f"{stage}_{ratio!r}"
        save_pruned_model(folder / f"{name}.npz", model, structure)
        saved, trouble = [f"models/{name}.npz"], []
        content = measured.onnx and measured.onnx.content
        if measured.onnx is None:
            try:
                made = exported(model, self.factory.input_shape, self.bench.images)
                content, trouble = made.content, told(made)
            except BenchmarkError as error:
                trouble.append(f"ONNX: {error}; {name} is kept as .npz alone")
            for text in trouble:
                log.warning(text)
        if content is not None:
            write_whole(folder / f"{name}.onnx", content)
            saved.append(f"models/{name}.onnx")
        return saved, trouble

    def _without_rivals(self, head: str) -> list[str]:
        single = head == "selected" and len(self.settings.selected_classes) == 1
        return ["a head of one class has no other to confuse it with: its accuracy is 1 whatever was removed"] * single

    def _head(self) -> str:
        return "selected" if self.settings.replace_last_layer else "all"

    def _measure(self, model: nn.Module, **known: Any) -> Measurement:
        classes = self.settings.selected_classes if self._head() == "selected" else self.settings.class_names
        return measure_inference_time_and_accuracy(model, self.loaders.test, len(classes), self.bench, **known)

    def _record(
        self,
        model: nn.Module,
        measured: Measurement,
        *,
        stage: str,
        ratio: float,
        indices: FilterIndices,
        head: str,
        notes: Sequence[str] = (),
        target: float | None = None,
        **costs: Any,
    ) -> Record:
        """Turn a measurement into a record, append it to the file, and keep it; its raw figures are on disk before."""
        saved, trouble = self._saved(model, measured, stage, ratio, head)
        self._keep_samples(measured, f"{stage}_{ratio!r}")
        removed = sum(map(len, indices.values()))
        sizes, times = size_fields(measured.footprint, self.reference), timings(measured)
        reached = None
        if target is not None:
            match, achieved = self.settings.pruning.match, removed / self.prunable
            reached = 1 - left_of(match, sizes["macs_ratio"], sizes["params_ratio"], achieved, times)
            if abs(reached - target) > TOLERANCE and not notes:
                notes = [f"target {target:g} of {match} is not met by the network measured: {reached:.3f} is gone"]
        record = Record(
            **self.identity,
            target=target,
            reached=reached,
            stage=stage,
            head=head,
            ratio=ratio,
            achieved_ratio=removed / self.prunable,
            filters_removed=removed,
            **accuracy_fields(measured, stage, head, self.settings.selected_classes, self.identity["class_names"]),
            **sizes,
            times=times,
            filters_chosen_per_layer={layer: len(filters) for layer, filters in indices.items() if filters},
            filters_kept_per_layer={layer: model.get_submodule(layer).out_channels for layer in self.widths},
            warnings=[
                *(*self.factory.warnings, *notes, *self._without_rivals(head)),
                *(*measured.warnings, *trouble),
            ],
            saved_as=saved,
            **costs,
        )
        append_record(self.run_dir / "records.jsonl", record)
        self.records.append(record)
        return record

    def _keep_samples(self, measured: Measurement, name: str) -> None:
        """Raw times into latency.npz and the confusion matrix into confusion.npz, with those of the records before."""
        for (engine, size), pairs in measured.times.items():
            place = f"{name}/{engine}/batch_{size}"
            self.samples |= {f"{place}/dense_ms": pairs.dense_ms, f"{place}/model_ms": pairs.model_ms}
        self.confusions[name] = measured.counts.confusion
        write_arrays(self.run_dir / "latency.npz", self.samples)
        write_arrays(self.run_dir / "confusion.npz", self.confusions)


def _found(record: Record, indices: FilterIndices) -> Budgeted:
    """What was found for a target, as the record of it tells."""
    note = next((text for text in record.warnings if text.startswith(f"target {record.target:g} of ")), None)
    return Budgeted(record.target, record.ratio, indices, record.reached, note)
