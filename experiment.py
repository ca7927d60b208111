"""One dense network and what becomes of it: every ratio pruned, measured, retrained, measured, and recorded at once."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from batch_loaders import Relabelled
from cache import DenseModel
from data_factory import DataLoaderFactory
from errors import BenchmarkError
from filter_selection import FilterIndices
from helpers import derive_seed
from metrics import Measurement, measure_inference_time_and_accuracy
from models import replace_head
from pruner import Pruner
from records import Record, append_record, config_hash
from selection import PruningSelection
from settings import Settings
from structure import ModelGraph
from training import fit, retraining_plan, validate

log = logging.getLogger(__name__)


class Experiment:
    """Measures a dense network and its pruned forms on equal terms; each record is on disk before the next begins.

    Args:
        settings: the checked configuration.
        factory: the data.
        device: where everything runs.
        run_dir: records.jsonl is appended to here.
        selector: which filters go, and which layers are left out.
        dense: the trained network and where it is from.
        graph: its graph.
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
    ):
        self.settings = settings
        self.factory = factory
        self.device = device
        self.path = run_dir / "records.jsonl"
        self.left_out = left_out = selector.left_out(graph)
        self.selector = selector
        self.dense = dense
        self.graph = graph
        self.loaders = factory.get_subset_dataloaders()
        self.widths = {layer: graph.conv(layer).out_channels for layer in graph.convs}
        self.prunable = sum(width for layer, width in self.widths.items() if layer not in left_out)
        self.scoring_seconds = 0.0
        self.records: list[Record] = []
        fingerprint = config_hash(settings)
        self.identity = {
            "run_id": f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{fingerprint[:8]}",
            "config_hash": fingerprint,
            "seed": settings.seed,
            "method": settings.pruning.name,
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
            "training_seconds": dense.training_seconds,
        }

    def measure_dense(self) -> None:
        """The dense network with all logits, on the test images of all classes, the selected ones among them."""
        log.info("Measuring the dense network ...")
        measured = measure_inference_time_and_accuracy(
            self.dense.model,
            self.factory.get_dataloaders().test,
            num_classes=len(self.settings.class_names),
            device=self.device,
            repeats=self.settings.latency.repeats,
            warmup=self.settings.latency.warmup,
            latency_batch=self._latency_batch(),
        )
        self.reference = measured
        self._record(self.dense.model, measured, stage="dense", ratio=0.0, indices={}, head="all")

    def measure_ratio(self, ratio: float, indices: FilterIndices, pruner: Pruner) -> None:
        """Remove, measure, and, where the configuration asks for it, retrain and measure again."""
        removed = sum(map(len, indices.values()))
        log.info("Ratio %g: removing %d of %d prunable filters ...", ratio, removed, self.prunable)
        notes = list(filter(None, [self.selector.shortfall(self.graph, ratio, indices)]))
        start = time.perf_counter()
        pruned, difference = pruner.prune_and_prove(indices)  # the proof is a part of what a removal costs here
        if self.settings.replace_last_layer:
            pruned = replace_head(pruned, self.settings.selected_classes)
        costs = {"removal_seconds": time.perf_counter() - start, "difference_from_masked": difference}
        common = {"ratio": ratio, "indices": indices, "head": self._head()}
        self._record(pruned, self._measure(pruned), stage="pruned", notes=notes, **common, **costs)
        if self.settings.training.retrain_after_pruning:
            retrained, seconds, fell = self._retrained(pruned, ratio)
            costs["retraining_seconds"] = seconds
            notes = [*notes, fell] if fell else notes
            self._record(retrained, self._measure(retrained), stage="retrained", notes=notes, **common, **costs)

    def _retrained(self, pruned: nn.Module, ratio: float) -> tuple[nn.Module, float, str | None]:
        """The retrained network, the seconds, and a word where the validation images say that it got worse.

        Logits are in the order of the class indices while it trains: sums over them round by their order, so that a
        list in another order would otherwise train another network.
        """
        train, validation = self.loaders.train, self.loaders.validation
        before = validate(pruned, validation, self.device).accuracy
        order = sorted(range(len(self.settings.selected_classes)), key=self.settings.selected_classes.__getitem__)
        reordered = self._head() == "selected" and order != sorted(order)
        if reordered:
            places = torch.tensor(order).argsort()
            train, validation = Relabelled(train, places), Relabelled(validation, places)
            pruned = replace_head(pruned, order)
        result = fit(
            pruned,
            train,
            validation,
            retraining_plan(self.settings.training),
            device=self.device,
            description=f"retraining at ratio {ratio:g}",
            seed=derive_seed(self.settings.seed, "retraining"),
        )
        model = replace_head(result.model, places.tolist()) if reordered else result.model
        after = result.history[result.best_epoch - 1].validation_accuracy if result.history else before
        fell = f"retraining lowered the accuracy on validation images, from {before:.4f} to {after:.4f}"
        return model, result.seconds, fell if after < before else None

    def _saved(self, model: nn.Module, stage: str, ratio: float, head: str) -> tuple[list[str], list[str]]:
        """The files that a pruned network was written to, where that is asked for, and what kept it from ONNX."""
        if not self.settings.save_pruned_models or stage == "dense":
            return [], []
        from export import export_onnx, save_pruned_model, structure_of  # ONNX Runtime's exporters take a second

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
        folder, name = self.path.parent / "models", f"{stage}_{ratio!r}"
        save_pruned_model(folder / f"{name}.npz", model, structure)
        try:
            export_onnx(folder / f"{name}.onnx", model, self.factory.input_shape)
        except BenchmarkError as error:
            return [f"models/{name}.npz"], [str(error)]
        return [f"models/{name}.npz", f"models/{name}.onnx"], []

    def _without_rivals(self, head: str) -> list[str]:
        single = head == "selected" and len(self.settings.selected_classes) == 1
        return ["a head of one class has no other to confuse it with: its accuracy is 1 whatever was removed"] * single

    def _head(self) -> str:
        return "selected" if self.settings.replace_last_layer else "all"

    def _latency_batch(self) -> torch.Tensor:
        """The first test batch of the selected classes: every network of a run is timed on the same images."""
        return next(iter(self.loaders.test))[0]

    def _measure(self, model: nn.Module) -> Measurement:
        classes = self.settings.selected_classes if self._head() == "selected" else self.settings.class_names
        return measure_inference_time_and_accuracy(
            model,
            self.loaders.test,
            num_classes=len(classes),
            device=self.device,
            repeats=self.settings.latency.repeats,
            warmup=self.settings.latency.warmup,
        )

    def _record(
        self,
        model: nn.Module,
        measured: Measurement,
        *,
        stage: str,
        ratio: float,
        indices: FilterIndices,
        head: str,
        notes: list[str] | None = None,
        **costs: float,
    ) -> None:
        """Turn a measurement into a record, append it to the file, and keep it."""
        counts = measured.counts
        everywhere = counts.accuracy if stage == "dense" else None
        if head == "all":
            counts = counts.subset(self.settings.selected_classes)
        names = self.identity["class_names"]
        saved, trouble = self._saved(model, stage, ratio, head)
        removed = sum(map(len, indices.values()))
        dense = self.reference
        record = Record(
            **self.identity,
            stage=stage,
            head=head,
            ratio=ratio,
            achieved_ratio=removed / self.prunable,
            filters_removed=removed,
            accuracy=counts.accuracy,
            accuracy_all_classes=everywhere,
            worst_class_accuracy=counts.worst,
            accuracy_per_class=dict(zip(names, counts.per_class, strict=True)),
            images_per_class=dict(zip(names, counts.total, strict=True)),
            macs=measured.macs,
            macs_ratio=measured.macs / dense.macs if measured.macs and dense.macs else None,
            params=measured.params,
            params_ratio=measured.params / dense.params,
            size_bytes=measured.size_bytes,
            size_ratio=measured.size_bytes / dense.size_bytes,
            latency_ms_median=measured.latency.median_ms,
            latency_ms_p95=measured.latency.p95_ms,
            latency_batch_size=measured.latency.batch_size,
            scoring_seconds=None if stage == "dense" else self.scoring_seconds,
            filters_chosen_per_layer={layer: len(filters) for layer, filters in indices.items() if filters},
            filters_kept_per_layer={layer: model.get_submodule(layer).out_channels for layer in self.widths},
            warnings=[
                *(*self.factory.warnings, *(notes or []), *self._without_rivals(head)),
                *(*measured.warnings, *trouble),
            ],
            saved_as=saved,
            **costs,
        )
        append_record(self.path, record)
        self.records.append(record)
