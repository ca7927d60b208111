"""What a pruned network becomes when it is trained further, or, with its weights drawn anew, from the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from baselines import MeasuredFit, shared_retraining
from batch_loaders import Relabelled
from data_factory import DataLoaderFactory, SubsetLoaders
from helpers import derive_seed
from memory import peak_memory
from models import drawn_anew, replace_head
from settings import Settings
from training import EpochRow, FitResult, fit, retraining_plan, training_plan, validate


@dataclass(frozen=True)
class Retrained:
    """costs: by the names of a record. notes: what a reader of the record should know."""

    model: nn.Module
    history: list[EpochRow]
    costs: dict[str, Any]
    notes: tuple[str, ...]


class Retraining:
    """Trains pruned networks on the images of the selected classes, as the settings say."""

    def __init__(self, settings: Settings, factory: DataLoaderFactory, loaders: SubsetLoaders, device: torch.device):
        self.settings, self.factory, self.loaders, self.device = settings, factory, loaders, device

    def retrained(self, pruned: nn.Module, ratio: float, untouched: bool) -> Retrained:
        """`pruned` trained further. untouched: nothing was removed, so that the result is shared by all methods.

        Logits are in the order of the class indices while it trains: sums over them round by their order, so that a
        list in another order would otherwise train another network.
        """
        train, validation, classes = self.loaders.train, self.loaders.validation, self.settings.selected_classes
        before = validate(pruned, validation, self.device).accuracy
        order = sorted(range(len(classes)), key=classes.__getitem__)
        reordered = self.settings.replace_last_layer and order != sorted(order)
        if reordered:
            places = torch.tensor(order).argsort()
            train, validation = Relabelled(train, places), Relabelled(validation, places)
            pruned = replace_head(pruned, order)
        plan = retraining_plan(self.settings.training)

        def retrain() -> MeasuredFit:
            seed = derive_seed(self.settings.seed, "retraining")
            with peak_memory(self.device) as peak:
                result = fit(
                    pruned, train, validation, plan, device=self.device, seed=seed,
                    description=f"retraining at ratio {ratio:g}",
                )  # fmt: skip
            return MeasuredFit(result, peak.bytes if plan.processes == 1 else None)

        shared = self.settings, self.factory, pruned, self.device, plan
        made = shared_retraining(*shared, retrain) if untouched else retrain()
        result = made.result
        after = result.history[result.best_epoch - 1].validation_accuracy if result.history else before
        fell = f"retraining lowered the accuracy on validation images, from {before:.4f} to {after:.4f}"
        costs = {
            "retraining_seconds": result.seconds,
            "retraining_images": self.loaders.train.num_images * len(result.history),
            "retraining_peak_bytes": made.peak_bytes,
        }
        notes = [fell] if after < before else []
        if plan.processes > 1:
            notes.append("memory of retraining: not measured, it is that of several processes")
        model = replace_head(result.model, places.tolist()) if reordered else result.model
        return Retrained(model, result.history, costs, tuple(notes))

    def from_scratch(self, pruned: nn.Module, ratio: float) -> FitResult:
        """The architecture of `pruned`, its weights drawn anew, trained as the dense network was."""
        seed = derive_seed(self.settings.seed, "scratch")
        return fit(
            drawn_anew(pruned, seed),
            self.loaders.train,
            self.loaders.validation,
            training_plan(self.settings.training),
            device=self.device,
            description=f"from scratch at ratio {ratio:g}",
            seed=seed,
        )
