"""Which images belong to which part: stratified, seeded, and independent of what was drawn before."""

from collections.abc import Iterator

import torch
from torch import Tensor

from helpers import generator


def rows_by_class(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(class, its rows in ascending order) for each class that occurs in labels [N], ascending."""
    classes, counts = labels.unique(return_counts=True)
    rows = torch.argsort(labels, stable=True)
    yield from zip(classes.tolist(), rows.split(counts.tolist()), strict=True)


def stratified_split(
    labels: Tensor, fraction: float, seed: int, name: str, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(rows that stay, rows split off), both ascending; of each class the fraction, but at least one, is split off.

    groups: int64 [N]; the rows of a group stay together, and groups are split off until the fraction is reached. The
    last group of a class always stays, so a class of one image (or one group) has nothing split off.
    """
    groups = torch.arange(len(labels)) if groups is None else groups
    is_off = torch.zeros(len(labels), dtype=torch.bool)
    for label, rows in rows_by_class(labels):
        members = groups[rows]
        candidates, sizes = members.unique(return_counts=True)
        order = torch.randperm(len(candidates), generator=generator(seed, f"{name}/{label}"))
        sizes = sizes[order]
        off_before = sizes.cumsum(0) - sizes
        taken = candidates[order][:-1][off_before[:-1] < max(1, round(fraction * len(rows)))]
        is_off[rows[torch.isin(members, taken)]] = True
    return (~is_off).nonzero()[:, 0], is_off.nonzero()[:, 0]


def pick_per_class(labels: Tensor, count: int, seed: int, name: str) -> Tensor:
    """Ascending rows, of each class at most `count`, drawn at random. More rows of a class contain fewer of it."""
    picked = [pick(rows, count, seed, f"{name}/{label}") for label, rows in rows_by_class(labels)]
    return torch.cat(picked).sort().values


def pick(rows: Tensor, count: int, seed: int, name: str) -> Tensor:
    """At most `count` of `rows`, drawn at random, ascending."""
    return rows[torch.randperm(len(rows), generator=generator(seed, name))[:count]].sort().values
