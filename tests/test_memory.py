"""Peak memory against what a pass is known to allocate, and against torch's own record of its allocations."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

import memory
from errors import BenchmarkError
from filter_selection import get_criterion
from memory import ForwardMemory, peak_memory
from models import get_model
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph
from tests.nets import Residual

CPU = torch.device("cpu")
MIB = 2**20
LARGE = nn.Conv2d(3, 64, 1)
linux = pytest.mark.skipif(not memory.CLEAR.exists(), reason="reads /proc, which only Linux has")


@pytest.fixture(scope="module")
def bench():
    with ForwardMemory(CPU) as found:
        yield found


def allocated_peak(model: nn.Module, shape: tuple[int, ...]) -> int:
    """The most that torch's allocator had given out during a pass, summed up from every allocation and release."""
    model = model.eval().to(memory_format=torch.channels_last)
    images = torch.ones(shape).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(images)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@linux
def test_a_pass_of_known_allocations(bench):
    """One output of 8 x 64 x 128 x 128 floats, changed in place: 32 MiB."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(inplace=True))
    assert bench.peak_bytes(model, (3, 128, 128), 8, 2) == pytest.approx(32 * MIB, rel=0.03)
    twice = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU())  # out of place: both are there at once
    assert bench.peak_bytes(twice, (3, 128, 128), 8, 2) == pytest.approx(64 * MIB, rel=0.03)


@linux
@pytest.mark.parametrize("name, batch", [("resnet18", 108), ("mobilenet_v2", 32)])
def test_a_pass_takes_what_torch_says_it_allocates(bench, name, batch):
    model = getattr(torchvision.models, name)(weights=None)
    found = bench.peak_bytes(model, (3, 64, 64), batch, 2)
    assert found == pytest.approx(allocated_peak(model, (batch, 3, 64, 64)), rel=0.03)
    assert bench.peak_bytes(model, (3, 64, 64), batch, 2) == pytest.approx(found, rel=0.01)  # and says so again


@linux
def test_a_network_whose_outputs_are_put_back_is_measured_too(bench):
    shape = (3, 32, 32)
    graph = ModelGraph(get_model("resnet18", 10), shape, "scatter")
    [indices] = PruningSelection(get_criterion("random"), (0.5,), shape).select(graph).values()
    pruned = get_pruner("structure", graph).prune(indices)
    assert bench.peak_bytes(pruned, shape, 64, 2) == pytest.approx(allocated_peak(pruned, (64, *shape)), rel=0.05)


@linux
def test_neither_weights_nor_mode_of_the_model_are_touched(bench):
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bench.peak_bytes(model, (3, 64, 64), 8, 1)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@linux
def test_a_pass_that_fails_is_one_message_and_the_next_is_measured(bench):
    with pytest.raises(BenchmarkError, match="memory of a forward pass: not measured .RuntimeError"):
        bench.peak_bytes(nn.Conv2d(5, 4, 1), (3, 8, 8), 1, 1)
    assert bench.peak_bytes(nn.Conv2d(3, 64, 1), (3, 128, 128), 1, 1) > 3 * MIB


@linux
def test_what_is_lost_among_pages_is_not_measured(bench):
    with pytest.raises(BenchmarkError, match="below 1 MiB"):
        bench.peak_bytes(nn.Conv2d(3, 4, 1), (3, 8, 8), 1, 1)


@linux
def test_a_model_that_cannot_be_sent_is_one_message(bench):
    class Local(nn.Conv2d):  # no other process finds this class
        pass

    with pytest.raises(BenchmarkError, match="memory of a forward pass: not measured"):
        bench.peak_bytes(Local(3, 4, 1), (3, 8, 8), 1, 1)


@linux
def test_a_process_that_dies_is_one_message_and_the_next_is_started():
    with ForwardMemory(CPU) as found:
        found.peak_bytes(LARGE, (3, 128, 128), 1, 1)
        found._process.kill()
        with pytest.raises(BenchmarkError, match="not measured"):
            found.peak_bytes(LARGE, (3, 128, 128), 1, 1)
        assert found.peak_bytes(LARGE, (3, 128, 128), 1, 1) > 3 * MIB
        process = found._process
    assert process.poll() is not None  # and none is left behind


@linux
def test_a_process_that_hangs_is_given_up(monkeypatch):
    with ForwardMemory(CPU) as found:
        found.peak_bytes(LARGE, (3, 128, 128), 1, 1)
        monkeypatch.setattr(memory, "PATIENCE", 1.0)
        process = found._process
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(BenchmarkError, match="not measured .TimeoutError: no answer within 1 s"):
            found.peak_bytes(LARGE, (3, 128, 128), 1, 1)
        assert process.poll() is not None


@linux
def test_what_anything_prints_does_not_get_between_the_answers(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('x' * 1000)")
    monkeypatch.syspath_prepend(tmp_path)
    with ForwardMemory(CPU) as found:
        assert found.peak_bytes(LARGE, (3, 128, 128), 1, 1) > 3 * MIB


def test_without_proc_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    with ForwardMemory(CPU) as found, pytest.raises(BenchmarkError, match="this system has no /proc"):
        found.peak_bytes(nn.Conv2d(3, 4, 1), (3, 8, 8), 1, 1)
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


@linux
def test_the_peak_of_a_step_is_that_of_the_process():
    """In a process of its own: 300 MiB that come and go, then a step that takes nothing."""
    code = """
import torch
from memory import peak_memory
steps = []
for amount in (0, 300, 0):
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(amount * 2**18)
    steps.append(peak.bytes)
print(*steps)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".")
    before, during, after = map(int, done.stdout.split())
    assert during - before == pytest.approx(300 * MIB, rel=0.03)
    assert after - before < 10 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_allocator_answers():
    device = torch.device("cuda")
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(inplace=True)).to(device)
    with ForwardMemory(device) as found:
        assert found.peak_bytes(model, (3, 128, 128), 8, 2) >= 32 * MIB
