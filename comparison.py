"""Who keeps more accuracy under one budget, and how sure that is: paired over class subsets and seeds.

The same subset of classes and the same seed give every method the same network and images, so that methods are
compared within such a block and differences are averaged over blocks. Needs no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from record_checks import TOLERANCE
from records import Record
from runs import block_of, shaping, task_of
from tables import headline

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_BLOCKS = 5  # of fewer, an interval would be a guess: two blocks that agree by chance give one of no width
FEWEST_SHARE = 0.5  # of the blocks that another variant has; with fewer, a variant would cost the others theirs
BUDGETS = {"macs": "MACs", "params": "parameters", "filters": "filters", "latency": "latency"}
STAGES = {"pruned": "before retraining", "retrained": "after retraining", "scratch": "trained from scratch"}

Block = tuple[tuple[int, ...], int, int]  # see `runs.block_of`


@dataclass(frozen=True, order=True)
class Setting:
    """One comparison: everything is equal but the variant. level: the target, or the ratio where none was matched."""

    task: str  # see `runs.task_of`
    model: str
    stage: str
    match: str | None
    level: float

    def __str__(self) -> str:
        return f"{self.task}, {self.model}, {self.budget}, {STAGES[self.stage]}"

    @property
    def budget(self) -> str:
        return f"{100 * self.level:g} % of {BUDGETS[self.match]} removed" if self.match else f"ratio {self.level:g}"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` blocks and its interval; low and high are None where the blocks are too few to tell any."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Standing:
    """How a variant does in one setting, on the blocks that all variants in it share.

    rank: best and worst place that the intervals leave open: 1 + how many lead it, and the number of variants less how
    many it leads; one leads another where the interval of their difference excludes 0. lead: accuracy less the
    reference's, within blocks; None where that is not there. unmet: records left out because their target was not
    reached. missing: blocks that others have.
    Ratios are shares of the dense network's, means over the blocks.
    """

    variant: str
    accuracy: Estimate
    worst_class: Estimate
    mean_rank: Estimate
    rank: tuple[int, int]
    lead: Estimate | None
    macs_ratio: float | None
    params_ratio: float
    latency_ratio: float | None
    scoring_seconds: float | None
    unmet: int
    missing: int


def met(record: Record) -> bool:
    """Whether the record is where it was meant to be: at its target, or at whatever ratio it was asked for."""
    return record.target is None or abs(record.reached - record.target) <= TOLERANCE


def setting_of(record: Record) -> Setting | None:
    """The comparison that a record enters; None for the controls that nothing was removed from."""
    if record.stage == "dense" or record.ratio == 0:
        return None
    level = record.ratio if record.target is None else record.target
    return Setting(task_of(record), record.model, record.stage, record.match, level)


def settings_of(records: Iterable[Record]) -> list[Setting]:
    """All comparisons, by task, model, budget and target, before retraining first."""
    found = {setting for record in records if (setting := setting_of(record)) is not None}
    order = list(STAGES)
    return sorted(found, key=lambda s: (s.task, s.model, s.match or "", s.level, order.index(s.stage)))


@dataclass(frozen=True)
class Cells:
    """The records of a setting by variant and block, as far as all variants share the blocks."""

    blocks: tuple[Block, ...]
    records: dict[str, tuple[Record, ...]]  # variant -> a record a block
    unmet: dict[str, int]
    missing: dict[str, int]
    left_out: tuple[str, ...]  # variants without enough blocks


def cells_of(records: Iterable[Record], setting: Setting) -> Cells:
    """The records that are compared in a setting; `left_out` have too few blocks to be among them."""
    found: dict[str, dict[Block, Record]] = defaultdict(dict)
    unmet: dict[str, int] = defaultdict(int)
    for record in records:
        if setting_of(record) == setting:
            found[record.variant]  # named, whatever becomes of it
            if met(record):
                found[record.variant][block_of(record)] = record
            else:
                unmet[record.variant] += 1
    everything = set().union(*found.values())
    most = max(map(len, found.values()), default=0)
    compared = {variant: blocks for variant, blocks in found.items() if blocks and len(blocks) >= FEWEST_SHARE * most}
    while not (shared := set(everything).intersection(*compared.values())) and len(compared) > 1:
        compared.pop(min(compared, key=lambda variant: (len(compared[variant]), variant)))
    blocks = tuple(sorted(shared))
    return Cells(
        blocks,
        {variant: tuple(compared[variant][block] for block in blocks) for variant in sorted(compared)},
        dict(unmet),
        {variant: len(everything) - len(found[variant]) - unmet[variant] for variant in found},
        tuple(sorted(found.keys() - compared.keys())),
    )


class Resampling:
    """Weights for means over blocks, the same for all figures of a setting, so that differences stay paired.

    Blocks are crossed, subsets of classes by seeds, and blocks that share either are not independent. Subsets and seeds
    are each drawn with replacement, and a block weighs the product of how often its two were drawn: the pigeonhole
    bootstrap (Owen, Annals of Applied Statistics 2007, 1:386). Where there is one subset or one seed, it is the plain
    bootstrap over the other.

    Intervals are percentiles, moved outwards as few draws demand (Hesterberg, The American Statistician 2015, 69:371,
    "expanded percentile"): as many as the fewer of subsets and seeds. With three of each that is all but the range of
    the blocks. Simulated, with effects of subset, seed and both of one size, they hold the truth in 0.96 of cases for 3
    by 3 and 0.98 for 5 by 5; in 0.89 for 3 by 2; in 0.87 and 0.95 where the subsets' effect is all. One subset or one
    seed says nothing of others.
    """

    def __init__(self, blocks: Sequence[Block]):
        subsets = sorted({block[0] for block in blocks})
        seeds = sorted({block[1] for block in blocks})
        generator = np.random.default_rng(0)
        weights = _drawn(generator, len(subsets))[:, [subsets.index(block[0]) for block in blocks]]
        weights = weights * _drawn(generator, len(seeds))[:, [seeds.index(block[1]) for block in blocks]]
        self.weights = weights[weights.sum(axis=1) > 0]  # where blocks are missing, a draw can hit none
        # Draws of scoring images are no seeds: whatever a seed does, all of its draws share.
        self.enough = len({block[:2] for block in blocks}) >= FEWEST_BLOCKS
        levels = min((count for count in (len(subsets), len(seeds)) if count > 1), default=2)
        self.tail = ndtr(stdtrit(levels - 1, (1 - LEVEL) / 2) * math.sqrt(levels / (levels - 1)))

    def mean(self, values: Sequence[float]) -> Estimate:
        """The mean over the blocks and its 95 % interval."""
        numbers = np.asarray(values, float)
        value = math.fsum(values) / len(values)
        if not self.enough:
            return Estimate(value, None, None, len(values))
        means = self.weights @ numbers / self.weights.sum(axis=1)
        low, high = np.quantile(means, (self.tail, 1 - self.tail))
        # Sums of equal numbers differ by rounding, and must not exclude their own mean.
        return Estimate(value, min(float(low), value), max(float(high), value), len(values))


def _drawn(generator: np.random.Generator, count: int) -> np.ndarray:
    """[RESAMPLES, count]: how often each of `count` was drawn in as many draws."""
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)


def standings(records: Iterable[Record], setting: Setting, reference: str = "random") -> list[Standing]:
    """The variants of a setting, the most accurate first; empty where no target was met.

    reference: the variant that `lead` is measured from.
    """
    cells = cells_of(records, setting)
    if not cells.blocks:
        return []
    resampling = Resampling(cells.blocks)
    accuracy = {variant: [record.accuracy for record in row] for variant, row in cells.records.items()}
    ranks = dict(
        zip(
            accuracy,
            np.array(ranked([list(row) for row in zip(*accuracy.values(), strict=True)])).T.tolist(),
            strict=True,
        )
    )
    found = []
    for variant, row in cells.records.items():
        better = [_difference(resampling, accuracy[other], accuracy[variant]).sign for other in accuracy]
        lead = reference in accuracy and variant != reference
        times = [timing.ratio for timing in map(headline, row) if timing is not None and not timing.noisy]
        found.append(
            Standing(
                variant=variant,
                accuracy=resampling.mean(accuracy[variant]),
                worst_class=resampling.mean([record.worst_class_accuracy for record in row]),
                mean_rank=resampling.mean(ranks[variant]),
                rank=(1 + better.count(1), len(accuracy) - better.count(-1)),
                lead=_difference(resampling, accuracy[variant], accuracy[reference]) if lead else None,
                macs_ratio=_mean([record.macs_ratio for record in row]),
                params_ratio=_mean([record.params_ratio for record in row]),
                latency_ratio=_mean(times),
                scoring_seconds=_mean([record.scoring_seconds for record in row]),
                unmet=cells.unmet.get(variant, 0),
                missing=cells.missing[variant],
            )
        )
    return sorted(found, key=lambda standing: (-standing.accuracy.value, standing.variant))


CONTROLS = {
    ("dense", "all"): "with all logits",
    ("pruned", "selected"): "with the replaced head",
    ("retrained", "selected"): "with that and the same retraining",
    ("retrained", "all"): "with the same retraining",  # replace_last_layer=false
}


def controls(records: Iterable[Record], setting: Setting) -> dict[str, Estimate]:
    """The accuracy of networks that nothing was removed from, by what was done to them, on the blocks of a setting.

    They are those of the runs of the variants compared. Runs of one block whose settings made the same network of it
    measured the same; where they did not, the mean counts, and by how much they differ is said. Settings that made
    another network are named, and have a control of their own. Only controls that every block has.
    """
    records = list(records)
    cells = cells_of(records, setting)
    if not cells.blocks:
        return {}
    found: dict[tuple, dict[Block, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        same = (task_of(r), r.model) == (setting.task, setting.model) and r.variant in cells.records
        if same and (r.stage, r.head) in CONTROLS and (r.stage == "dense" or r.ratio == 0):
            found[r.stage, r.head, shaping(r, r.stage)][block_of(r)].append(r.accuracy)
    resampling, order, told = Resampling(cells.blocks), list(CONTROLS), {}
    for stage, head, named in sorted(found, key=lambda key: (order.index(key[:2]), key[2])):
        values = found[stage, head, named]
        if set(cells.blocks) <= values.keys():
            told_apart = [*named, *_disagreement(values[block] for block in cells.blocks)]
            said = " ".join([CONTROLS[stage, head], *([f"({', '.join(told_apart)})"] if told_apart else [])])
            told[said] = resampling.mean([_mean(values[block]) for block in cells.blocks])
    return told


def _disagreement(blocks: Iterable[Sequence[float]]) -> list[str]:
    """By how many points the runs of one block differ that should have measured the same; nothing where none do."""
    widest = max(max(values) - min(values) for values in blocks)
    return [f"a mean over runs that differ by up to {100 * widest:.1f} points"] if widest > 0 else []


def difference(records: Iterable[Record], setting: Setting, variant: str, other: str) -> Estimate | None:
    """Accuracy of `variant` less that of `other`, within the blocks that all variants of the setting share."""
    cells = cells_of(records, setting)
    if not cells.blocks or not {variant, other} <= cells.records.keys():
        return None
    one, two = ([record.accuracy for record in cells.records[name]] for name in (variant, other))
    return _difference(Resampling(cells.blocks), one, two)


def _difference(resampling: Resampling, one: Sequence[float], other: Sequence[float]) -> Estimate:
    return resampling.mean([a - b for a, b in zip(one, other, strict=True)])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def ranked(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Ranks within each row, the largest value first, ties sharing their mean rank."""
    ranks = []
    for row in rows:
        ranks.append([1 + sum(v > value for v in row) + (sum(v == value for v in row) - 1) / 2 for value in row])
    return ranks


def friedman(records: Iterable[Record], setting: Setting) -> tuple[float, int] | None:
    """Friedman's statistic over blocks, corrected for ties, and its degrees of freedom; None for fewer than 3 variants.

    Large where ranks agree from block to block: chi-squared distributed if no variant differs from another.
    (Friedman, JASA 1937; ties as in Conover, Practical Nonparametric Statistics, section 5.8.)
    """
    cells = cells_of(records, setting)
    count, blocks = len(cells.records), len(cells.blocks)
    if count < 3 or blocks < 2:
        return None
    ranks = np.array(ranked(list(zip(*([r.accuracy for r in row] for row in cells.records.values()), strict=True))))
    spread = (ranks**2).sum() - blocks * count * (count + 1) ** 2 / 4
    if spread == 0:
        return None
    sums = ranks.sum(axis=0)
    return float((count - 1) * ((sums - blocks * (count + 1) / 2) ** 2).sum() / spread), count - 1


@dataclass(frozen=True)
class Area:
    """The mean accuracy of a variant over a range of MACs, shares of the dense network's."""

    variant: str
    accuracy: Estimate
    low: float
    high: float


def areas(records: Iterable[Record], task: str, model: str, stage: str) -> list[Area]:
    """Area under the accuracy-over-MACs curve, divided by its width; best first.

    A curve joins the records of one run by straight lines, ratio 0 among them; all are cut to the range that each of
    them covers, and compared on the blocks that all variants share. Empty where there is no such range.
    """
    curves: dict[str, dict[Block, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if (task_of(r), r.model, r.stage) == (task, model, stage) and r.macs_ratio is not None:
            curves[r.variant][block_of(r)].append((r.macs_ratio, r.accuracy))
    for blocks in curves.values():  # a run that was cut short would cut the range short for all
        longest = max(map(len, blocks.values()))
        for block in [block for block, line in blocks.items() if len(line) < longest]:
            del blocks[block]
    most = max(map(len, curves.values()), default=0)
    curves = {variant: blocks for variant, blocks in curves.items() if len(blocks) >= FEWEST_SHARE * most}
    shared = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    lines = {variant: [sorted(set(blocks[block])) for block in shared] for variant, blocks in curves.items()}
    ends = [(line[0][0], line[-1][0]) for row in lines.values() for line in row]
    low, high = max((start for start, _ in ends), default=0), min((end for _, end in ends), default=0)
    if not low < high:
        return []
    resampling = Resampling(shared)
    found = [
        Area(variant, resampling.mean([_area(line, low, high) for line in row]), low, high)
        for variant, row in lines.items()
    ]
    return sorted(found, key=lambda area: (-area.accuracy.value, area.variant))


def _area(line: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Mean height of a line of straight pieces between two places that it covers."""
    places, heights = zip(*line, strict=True)
    inside = [place for place in places if low < place < high]
    x = [low, *inside, high]
    y = np.interp(x, places, heights)
    pieces = ((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
    return float(math.fsum(pieces) / (high - low))
