"""Times that are taken in turn: what is known of a ratio by construction is found, whatever else the machine does."""

import contextlib
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from latency import (
    FEWEST_PAIRS,
    LONGEST_WARMUP,
    PairedTimes,
    batch_of,
    clock_of,
    distinct,
    laid_out,
    threads,
    time_in_pairs,
    torch_pass,
)
from models import get_model
from onnx_network import OnnxNetwork, exported
from tests.nets import small_net

CPU = torch.device("cpu")
PLAN = {"repeats": 8, "warmup": 0, "seconds": 60, "seed": 0}


def times(dense, model, steady=True):
    return PairedTimes(tuple(map(float, dense)), tuple(map(float, model)), steady)


class Machine:
    """A clock that moves only while something runs, and passes that take what is written down for them."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self):
        return self.now

    def running(self, name, milliseconds):
        def run():
            self.ran.append(name)
            self.now += (milliseconds(self) if callable(milliseconds) else milliseconds) / 1e3

        return run


def test_statistics():
    pairs = times([10] * 100, range(1, 101))
    assert pairs.median_ms == 50.5 and pairs.dense_median_ms == 10
    assert pairs.p95_ms == pytest.approx(95.05)  # linear interpolation between the 95th and 96th sample


def test_each_pass_is_timed_beside_one_of_the_dense_network():
    machine = Machine()
    pairs = time_in_pairs(machine.running("dense", 4), machine.running("model", 3), clock=machine, **PLAN)
    assert pairs.dense_ms == pytest.approx((4,) * 8) and pairs.model_ms == pytest.approx((3,) * 8)
    assert machine.ran[::2] == machine.ran[1::2]  # each after an untimed one of its own
    in_pairs = list(zip(machine.ran[::4], machine.ran[2::4], strict=True))
    assert len(in_pairs) == 8 and all(sorted(pair) == ["dense", "model"] for pair in in_pairs)
    assert len(set(in_pairs)) == 2  # now one first, now the other
    again = Machine()
    time_in_pairs(again.running("dense", 4), again.running("model", 3), clock=again, **PLAN)
    assert again.ran == machine.ran  # the order is the seed's


def test_drift_cancels():
    """The machine gets three times slower while it measures; a pass after the other would tell a ratio far off."""
    machine = Machine()
    dense, model = (
        machine.running(name, lambda machine, once=once: once * (1 + 2 * machine.now))
        for name, once in (("dense", 4), ("model", 3))
    )
    pairs = time_in_pairs(dense, model, clock=machine, **PLAN | {"repeats": 40})
    assert pairs.model_ms[-1] > 2.9 * pairs.model_ms[0]
    ratio, low, high = pairs.ratio()
    assert ratio == pytest.approx(0.75, rel=0.05) and low < 0.75 < high


def test_warm_up_goes_on_until_passes_no_longer_get_faster():
    machine = Machine()
    warming = machine.running("model", lambda machine: max(5, 30 - 2 * machine.ran.count("model")))
    pairs = time_in_pairs(machine.running("dense", 5), warming, clock=machine, **PLAN | {"warmup": 2})
    assert pairs.steady and pairs.model_ms == pytest.approx((5,) * 8)
    assert 16 + 12 < machine.ran.count("model") < 16 + LONGEST_WARMUP
    assert machine.ran.count("dense") == 16 + 6  # two windows of three, the same from the start


def test_passes_that_only_get_faster_are_not_called_steady():
    machine = Machine()
    warming = machine.running("model", lambda machine: 1000 * 0.9 ** machine.ran.count("model"))
    pairs = time_in_pairs(machine.running("dense", 5), warming, clock=machine, **PLAN | {"warmup": 3, "seconds": 1e9})
    assert not pairs.steady and pairs.noisy


def test_warm_up_may_be_left_out():
    machine = Machine()
    time_in_pairs(machine.running("dense", 5), machine.running("model", 5), clock=machine, **PLAN)
    assert len(machine.ran) == 32


def test_long_passes_end_in_time_with_enough_pairs_for_an_interval():
    machine = Machine()
    plan = {"repeats": 20, "warmup": 3, "seconds": 10, "seed": 0}
    pairs = time_in_pairs(machine.running("dense", 5000), machine.running("model", 4000), clock=machine, **plan)
    assert len(pairs.dense_ms) == len(pairs.model_ms) == FEWEST_PAIRS
    assert pairs.steady and machine.now < 6 * 9 + 4 * 9 + 1
    assert len(machine.ran) < 2 * (FEWEST_PAIRS + 1 + 4)  # no untimed passes between those that are long
    quick = Machine()
    pairs = time_in_pairs(quick.running("dense", 50), quick.running("model", 40), clock=quick, **plan)
    assert len(pairs.dense_ms) == 20


def test_the_interval_allows_for_where_weights_lie():
    assert times([1] * 20, [0.7] * 20).ratio() == pytest.approx((0.7, 0.7 / 1.01, 0.7 * 1.01))


@pytest.mark.parametrize(
    "pairs, noisy",
    [
        (times([1] * 20, [0.7] * 20), False),
        (times([1] * 5, [0.7] * 5), True),  # too few
        (times([1] * 20, [0.7] * 20, steady=False), True),
        (times([1] * 20, [0.5, 1.5] * 10), True),  # anything between a half and one and a half
        (times([1, 9] * 10, [0.7, 6.3] * 10), False),  # the machine's load, which both share
    ],
)
def test_times_that_say_nothing_are_flagged(pairs, noisy):
    assert pairs.noisy is noisy


@pytest.mark.parametrize("repeats, warmup", [(0, 1), (1, -1)])
def test_impossible_numbers_are_refused(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be"):
        time_in_pairs(int, int, repeats=repeats, warmup=warmup, seconds=1, seed=0)


def test_the_clock_of_an_accelerator_waits_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    clock_of(torch.device("cuda", 1))()
    assert waited == [torch.device("cuda", 1)]
    clock_of(CPU)()
    assert len(waited) == 1


def test_what_is_timed_is_a_channels_last_copy_in_inference_mode():
    model, seen = small_net().train(), []
    weight = model[0].weight
    watched = laid_out(model, CPU)
    watched[0].register_forward_hook(
        lambda module, inputs, _: seen.append(
            (
                module.weight.is_contiguous(memory_format=torch.channels_last),
                inputs[0].is_contiguous(memory_format=torch.channels_last),
                torch.is_inference_mode_enabled(),
                module.training,
            )
        )
    )
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(images)
    model.train()
    assert torch.allclose(torch_pass(watched, images)(), expected, atol=1e-6)
    assert seen == [(True, True, True, False)]
    assert model[0].weight is weight and weight.is_contiguous() and model.training
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert addresses.isdisjoint(parameter.data_ptr() for parameter in watched.parameters())


def test_batches_repeat_the_images_where_they_do_not_suffice():
    images = torch.arange(3.0).reshape(3, 1, 1, 1)
    assert batch_of(images, 2).flatten().tolist() == [0, 1]
    assert batch_of(images, 7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert distinct((1, "test", 8), 108) == [1, 8, 108]
    assert distinct(("test", 1), 1) == [1]


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(1) as count:
        assert count == torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
    with threads(None) as count:
        assert count == before


# A real machine


def convolutions(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(layers))).eval()


@contextlib.contextmanager
def a_core_kept_busy():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.slow
def test_twice_the_layers_take_twice_the_time_beside_a_busy_neighbour():
    images = torch.randn(4, 32, 32, 32)
    single, twice = (torch_pass(laid_out(convolutions(layers), CPU), images) for layers in (8, 16))
    with threads(1), a_core_kept_busy():
        pairs = time_in_pairs(single, twice, repeats=60, warmup=3, seconds=60, seed=0)
    assert pairs.ratio()[0] == pytest.approx(2, rel=0.1)


def passes(engine: str) -> list:
    """A network twice, and a batch of two images for both."""
    torch.manual_seed(0)
    model, images = get_model("resnet18", 10).eval(), torch.randn(2, 3, 32, 32)
    if engine == "pytorch":
        return [torch_pass(laid_out(model, CPU), images) for _ in range(2)]
    content = exported(model, (3, 32, 32)).content
    return [OnnxNetwork(content, CPU, threads=1).bound(images) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pytorch", "onnxruntime"])
@pytest.mark.parametrize("busy", [False, True])
def test_a_network_against_itself_gives_an_interval_with_1_in_95_of_100_repetitions(engine, busy, capsys):
    """Both are made anew every ten repetitions: where they lie in memory is a matter of luck too."""
    (first, second), held, widths, repetitions = passes(engine), 0, [], 200
    with threads(1), contextlib.ExitStack() as neighbours:
        for repetition in range(repetitions):
            first, second = passes(engine) if repetition % 10 == 9 else (first, second)
            plan = {"repeats": 20, "warmup": 3, "seconds": 60, "seed": repetition}
            if busy and repetition % 40 == 0:
                neighbours.enter_context(a_core_kept_busy())
            ratio, low, high = time_in_pairs(first, second, **plan).ratio()
            if repetition % 40 == 20:
                neighbours.close()
            held += low <= 1 <= high
            widths.append(high - low)
    with capsys.disabled():
        width = sorted(widths)[repetitions // 2]
        print(f"\n{engine}, busy {busy}: 1.0 in {held} of {repetitions} intervals, median width {width:.4f}")
    assert held >= 0.95 * repetitions
