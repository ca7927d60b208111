"""All that is measured of a network, together: one reading of the data, the same images and engines for all."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import metrics
from costs import count_macs, count_parameters, file_bytes, weight_bytes
from errors import BenchmarkError
from latency import PairedTimes
from metrics import Bench, evaluate, footprint_of, measure_inference_time_and_accuracy
from tests.nets import small_net

CPU = torch.device("cpu")


def latency(**changes):
    plan = {"repeats": 6, "warmup": 1, "seconds": 10.0, "threads": 1, "batch_sizes": (1, "test")}
    return SimpleNamespace(**plan | changes)


def images(count=4, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batches():
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return [(images(4), labels[:4]), (images(2, seed=2), labels[4:])]


@pytest.fixture
def bench():
    with Bench(small_net().eval(), images(), device=CPU, latency=latency(), onnx=False, seed=0) as found:
        yield found


def test_everything_is_measured_on_one_reading_of_the_data(bench):
    model, readings = small_net(), []

    def loader():
        readings.append(1)
        yield from batches()

    measured = measure_inference_time_and_accuracy(model, loader(), 4, bench)
    assert readings == [1]
    assert measured.counts == evaluate(model, batches(), 4, CPU) and sum(measured.counts.total) == 6
    assert set(measured.times) == {("pytorch", 1), ("pytorch", 4)} and measured.threads == 1
    assert all(len(pairs.model_ms) == len(pairs.dense_ms) == 6 for pairs in measured.times.values())
    footprint = measured.footprint
    assert footprint.macs == 36 * 8 * 27 + 8 * 4
    assert footprint.params == count_parameters(model) == 8 * 27 + 8 + 16 + 8 * 4 + 4
    assert (footprint.size_bytes, footprint.weight_bytes) == (file_bytes(model), weight_bytes(model))
    assert footprint.activation_bytes == 4 * (8 * 36 + 4)
    assert footprint.forward_peak_bytes is None and footprint.forward_batch_size == 4  # too little to be measured
    assert measured.onnx is None
    assert [text for text in measured.warnings if "latency" not in text] == [
        "memory of a forward pass: not measured, it is below 1 MiB"
    ]
    assert model.training and not model[0].weight.is_inference()


def test_onnx_runtime_measures_the_same_network():
    model = small_net().eval()
    with Bench(small_net().eval(), images(), device=CPU, latency=latency(), onnx=True, seed=0) as bench:
        measured = measure_inference_time_and_accuracy(model, iter(batches()), 4, bench)
    assert set(measured.times) == {(engine, size) for engine in ("pytorch", "onnxruntime") for size in (1, 4)}
    onnx = measured.onnx
    assert onnx.counts == measured.counts and onnx.exporter == "current" and onnx.difference < 1e-5
    assert onnx.provider == "CPUExecutionProvider" and len(onnx.content) > measured.footprint.weight_bytes


class Singular(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(torch.linalg.svdvals(self.conv(x).flatten(2)))


def test_a_network_that_is_not_exported_keeps_pytorchs_figures(caplog):
    with Bench(small_net().eval(), images(), device=CPU, latency=latency(), onnx=True, seed=0) as bench:
        measured = measure_inference_time_and_accuracy(Singular(), batches(), 4, bench)
    assert measured.onnx.exporter == "none" and measured.onnx.counts is None
    assert set(measured.times) == {("pytorch", 1), ("pytorch", 4)}
    (told,) = [text for text in measured.warnings if text.startswith("ONNX")]
    assert "cannot be exported" in told and told.endswith("PyTorch's figures stand alone") and told in caplog.text


def test_a_dense_network_that_is_not_exported_leaves_no_pairs_in_onnx(caplog):
    with Bench(Singular().eval(), images(), device=CPU, latency=latency(), onnx=True, seed=0) as bench:
        for _ in range(2):
            measured = measure_inference_time_and_accuracy(small_net().eval(), batches(), 4, bench)
    assert measured.onnx.exporter == "current" and measured.onnx.counts == measured.counts
    assert {engine for engine, _ in measured.times} == {"pytorch"}
    assert any("nothing to be timed beside" in text for text in measured.warnings)
    assert caplog.text.count("PyTorch's figures stand alone") == 1  # it is not tried again for every network


def test_a_footprint_that_is_known_is_not_measured_again(bench, monkeypatch):
    known = footprint_of(small_net(), bench, 1)
    monkeypatch.setattr(metrics, "footprint_of", lambda *_: 1 / 0)
    measured = measure_inference_time_and_accuracy(small_net(), batches(), 4, bench, footprint=known)
    assert measured.footprint is known


def test_what_cannot_be_found_out_is_none_with_the_reason(bench, monkeypatch):
    def fails(*_):
        raise BenchmarkError("no")

    monkeypatch.setattr(metrics, "count_macs", fails)
    monkeypatch.setattr(bench.memory, "peak_bytes", fails)
    measured = measure_inference_time_and_accuracy(small_net(), batches(), 4, bench)
    found = measured.footprint
    assert (found.macs, found.activation_bytes, found.forward_peak_bytes) == (None, None, None)
    assert measured.warnings[:2] == ("no", "no")
    assert sum(measured.counts.total) == 6


def test_times_that_say_nothing_are_warned_of(monkeypatch):
    monkeypatch.setattr(metrics, "others", lambda: 0)  # whoever else is at work on this machine
    with Bench(small_net(), images(), device=CPU, latency=latency(repeats=2), onnx=False, seed=0) as bench:
        measured = measure_inference_time_and_accuracy(small_net(), batches(), 4, bench)
    told = [text for text in measured.warnings if text.startswith("latency, pytorch, batch of")]
    assert len(told) == 2 and all("says nothing, only 2 pairs of passes" in text for text in told)


def test_noise_names_its_cause():
    spread = PairedTimes((1.0,) * 20, (0.5, 1.5) * 10, steady=True)
    unsteady = PairedTimes((1.0,) * 20, (1.0,) * 20, steady=False)
    fine = PairedTimes((1.0,) * 20, (0.5,) * 20, steady=True)
    told = metrics._noise({("pytorch", 1): spread, ("pytorch", 8): unsteady, ("onnxruntime", 8): fine})
    assert len(told) == 2 and "the times spread too far" in told[0] and "never got steady" in told[1]


def test_macs_are_counted_at_the_size_of_the_images(bench):
    assert footprint_of(small_net(), bench, 1).macs == count_macs(small_net(), (3, 8, 8)).macs
