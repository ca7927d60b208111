"""How long a forward pass takes beside that of another network: timed in turn, so that what slows one slows both."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from helpers import generator, placed
from intervals import FEWEST_PAIRS, paired_ratio

# torch.utils.benchmark would time one statement after the other, and its clock waits for the current device alone.
Clock = Callable[[], float]
"""Seconds, once everything that was begun is done."""
Pass = Callable[[], object]
"""One forward pass of a batch that is in place already."""

STEADY_WITHIN = 0.05  # two windows of warm-up passes whose medians differ by no more are called steady
WINDOW = 3
LONGEST_WARMUP = 30
# Two copies of one network were seen to differ by about so much for as long as they live: where their weights come to
# lie in memory is a matter of luck (Mytkowicz et al., ASPLOS 2009).
PLACEMENT = 0.01
WIDEST_INTERVAL = 0.2  # as a share of the ratio; a wider one says nothing
# Seconds. A shorter pass is timed right after an untimed one of the same network, as it would run by itself: its own
# weights in the cache, not the other's. Otherwise whichever network the cache happens to favour stays ahead, in every
# pair of a measurement: a network against itself was seen to be 5 % faster, with 1.0 outside of the interval. In a
# longer pass the weights are read once for much computation.
SETTLED_BELOW = 0.1


@dataclass(frozen=True)
class PairedTimes:
    """Milliseconds of passes of two networks, entry i of both measured one after the other.

    steady: they no longer got faster when the warm-up ended; without a warm-up nobody looked, and it is true.
    others: runs of the benchmark that were at work on the same machine.
    """

    dense_ms: tuple[float, ...]
    model_ms: tuple[float, ...]
    steady: bool
    others: int = 0

    @property
    def median_ms(self) -> float:
        return float(np.median(self.model_ms))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.model_ms, 95))

    @property
    def dense_median_ms(self) -> float:
        return float(np.median(self.dense_ms))

    def ratio(self) -> tuple[float, float, float]:
        """Time of the model as a share of the dense network's, and its interval.

        That of `intervals.paired_ratio`, widened by `PLACEMENT`, which no number of pairs can see.
        """
        ratio, low, high = paired_ratio(self.dense_ms, self.model_ms)
        return ratio, low / (1 + PLACEMENT), high * (1 + PLACEMENT)

    @property
    def few(self) -> bool:
        return len(self.model_ms) < FEWEST_PAIRS

    @property
    def noisy(self) -> bool:
        """Whether the times spread too far, or are too few, to say anything."""
        ratio, low, high = self.ratio()
        return not self.steady or self.others > 0 or self.few or high - low > WIDEST_INTERVAL * ratio


def time_in_pairs(
    dense: Pass,
    model: Pass,
    *,
    repeats: int,
    warmup: int,
    seconds: float,
    seed: int,
    clock: Clock = time.perf_counter,
) -> PairedTimes:
    """Time both passes `repeats` times, one after the other, after at least `warmup` untimed passes of each.

    Which comes first in a pair is drawn anew each time. Of a network against itself the sign of every difference is
    then a fair coin, however the machine's load rises and falls, and the interval of their ratio keeps its promise.
    Short passes are each preceded by an untimed one of the same network, see `SETTLED_BELOW`. After `seconds` no more
    pairs are begun, once there are enough for an interval. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be 1 or more and warmup 0 or more, not {repeats} and {warmup}")
    steady = all([_warm_up(run, warmup, seconds / 4, clock) for run in (dense, model)])
    first = torch.randint(2, (repeats,), generator=generator(seed, "order of pairs")).tolist()
    times, start = ([], []), clock()
    for pair, turn in enumerate(first):
        if pair >= FEWEST_PAIRS and clock() - start > seconds:
            break
        for which in (turn, 1 - turn):
            run = (dense, model)[which]
            if not times[which] or min(times[which]) < SETTLED_BELOW * 1e3:
                run()
            times[which].append(_milliseconds(run, clock))
    return PairedTimes(tuple(times[0]), tuple(times[1]), steady)


def _warm_up(run: Pass, least: int, seconds: float, clock: Clock) -> bool:
    """Run until the passes no longer get faster; whether they came to that. With `least` 0, not at all."""
    if least == 0:
        return True
    times = [_milliseconds(run, clock) for _ in range(max(least, 2))]
    while True:
        window = min(WINDOW, len(times) // 2)
        before, now = median(times[-2 * window : -window]), median(times[-window:])
        in_time = sum(times) < seconds * 1e3
        if now >= (1 - STEADY_WITHIN) * before and (window == WINDOW or not in_time):
            return True
        if len(times) >= LONGEST_WARMUP or not in_time:
            return False
        times.append(_milliseconds(run, clock))


def _milliseconds(run: Pass, clock: Clock) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3


def clock_of(device: torch.device) -> Clock:
    """A clock that waits for what was queued on this device; the CPU queues nothing."""
    if torch.device(device).type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def laid_out(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, in eval mode, with channels_last convolution weights, whatever the model came in.

    Two models then differ by their shapes alone. The copy shares no weight with the original: a network against itself
    must not find its weights in the cache because its twin has just used them.
    """
    return copy.deepcopy(placed(model, device)).eval().to(memory_format=torch.channels_last)


def torch_pass(model: nn.Module, batch: Tensor) -> Pass:
    """A forward pass of `batch` [B, 3, H, W] by PyTorch; what `model` is run on is on its device already."""
    batch = batch.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(batch)

    return run


def batch_of(images: Tensor, size: int) -> Tensor:
    """[size, 3, H, W]: the first of these images [B, 3, H, W], again from the first on where they do not suffice."""
    return images[torch.arange(size) % len(images)]


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """So many threads for PyTorch inside the block, None being those it has; yields the number."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def distinct(sizes: Sequence[int | str], test_batch: int) -> list[int]:
    """Batch sizes with the word `test` put in figures, each once, ascending."""
    return sorted({test_batch if size == "test" else size for size in sizes})
