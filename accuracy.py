"""How well a network classifies: one pass over the images, counted class by class, never averaged over batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from errors import BenchmarkError
from helpers import Batches, evaluating, placed

TOP5_FROM = 100  # logits; with fewer, five guesses say little


@dataclass(frozen=True)
class ClassCounts:
    """Images answered correctly and images seen, by class index; classes without images have a total of 0.

    Attributes:
        top5: images whose class is among the five highest logits; None with fewer than `TOP5_FROM` logits.
        confusion: int64 [classes, logits], images of each class (row) by their highest logit (column).
    """

    correct: tuple[int, ...]
    total: tuple[int, ...]
    top5: tuple[int, ...] | None = None
    confusion: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.correct) != len(self.total):
            raise ValueError(f"counts of {len(self.correct)} classes correct, of {len(self.total)} classes seen")
        if any(not 0 <= right <= seen for right, seen in zip(self.correct, self.total, strict=True)):
            raise ValueError(f"correct counts outside 0..total: {self.correct} of {self.total}")

    @property
    def accuracy(self) -> float:
        """Share of all images that are answered correctly."""
        return sum(self.correct) / self.images

    @property
    def images(self) -> int:
        if not sum(self.total):
            raise ValueError("no images were counted")
        return sum(self.total)

    @property
    def accuracy_top5(self) -> float | None:
        """Share of all images whose class is among the five highest logits."""
        return None if self.top5 is None else sum(self.top5) / self.images

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Accuracy of each class; None for a class without images."""
        return tuple(right / seen if seen else None for right, seen in zip(self.correct, self.total, strict=True))

    @property
    def worst(self) -> float:
        """Lowest accuracy among the classes that have images."""
        return min(self._shares())

    @property
    def balanced(self) -> float:
        """Mean of the accuracies of the classes that have images: each class weighs the same."""
        shares = self._shares()
        return sum(shares) / len(shares)

    def subset(self, classes: Sequence[int]) -> "ClassCounts":
        """Counts of these classes alone, in this order: what one pass over all images says about a few classes."""
        chosen = list(classes)
        return ClassCounts(
            tuple(self.correct[c] for c in chosen),
            tuple(self.total[c] for c in chosen),
            None if self.top5 is None else tuple(self.top5[c] for c in chosen),
            None if self.confusion is None else self.confusion[chosen],
        )

    def _shares(self) -> list[float]:
        return [share for share in self.per_class if share is not None]


def evaluate(model: nn.Module, loader: Batches, num_classes: int, device: torch.device) -> ClassCounts:
    """Count the images whose highest logit is their label, class by class.

    `loader` yields images [B, 3, H, W] and labels int64 [B], which index the `num_classes` logits; every image counts
    once, however short the last batch is. Raises BenchmarkError for no images, labels without a logit, another number
    of logits, and for logits that are not finite, whose highest value means nothing.
    """
    return evaluate_each([model], loader, num_classes, device)[0]


def evaluate_each(
    models: Sequence[nn.Module], loader: Batches, num_classes: int, device: torch.device
) -> list[ClassCounts]:
    """`evaluate` for several models on one reading of the images."""
    models = [placed(model, device) for model in models]
    answers: list[list[Tensor]] = [[] for _ in models]
    labels_seen: list[Tensor] = []
    for images, labels in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels_seen.append(labels)
        for model, seen in zip(models, answers, strict=True):
            with evaluating(model), torch.inference_mode():
                logits = model(images)
            if logits.shape != (len(labels), num_classes):
                needed = f"[{len(labels)}, {num_classes}], one logit a class, is needed"
                raise BenchmarkError(f"model output: shape {list(logits.shape)}; {needed}")
            seen.append(_answers(logits, labels.to(device, non_blocking=True)))
    if not labels_seen:
        raise BenchmarkError("evaluation: no images; every selected class needs at least one")
    labels = torch.cat(labels_seen).cpu()
    return [_counted(torch.cat(seen).cpu(), labels, num_classes) for seen in answers]


def _answers(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 [B, 3]: the class of the highest logit, whether all logits are finite, whether the label is in the top 5.

    Results stay on the device until the end: reading one here would make the device wait for every batch.
    """
    highest = logits.argmax(1)
    columns = [highest, logits.isfinite().all(1)]
    if logits.shape[1] >= TOP5_FROM:
        five = logits.topk(5, dim=1).indices
        # Of equal logits the two may choose others: what is right at once is right within five.
        columns.append((five == labels[:, None]).any(1) | (highest == labels))
    return torch.stack([column.long() for column in columns], dim=1)


def _counted(answers: Tensor, labels: Tensor, num_classes: int) -> ClassCounts:
    """Counts from what `_answers` gave [N, 2 or 3] and the labels [N], both on the CPU."""
    predictions, finite, *top5 = answers.unbind(1)
    if broken := int((finite == 0).sum()):
        raise BenchmarkError(
            f"model output: logits that are not finite for {broken} of {len(finite)} images; "
            "the weights have diverged or are damaged, train with a lower learning rate or give other weights"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise BenchmarkError(f"labels: {given}; a model with {num_classes} logits needs 0 to {num_classes - 1}")
    pairs = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    confusion = pairs.reshape(num_classes, num_classes)
    in_top5 = [torch.bincount(labels[inside == 1], minlength=num_classes).tolist() for inside in top5]
    return ClassCounts(
        tuple(confusion.diagonal().tolist()),
        tuple(confusion.sum(1).tolist()),
        tuple(in_top5[0]) if in_top5 else None,
        confusion.numpy(),
    )
