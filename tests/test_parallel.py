"""Training that several processes share: what one process would have made, in float64 to the last digits."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from torch import nn

from errors import BenchmarkError, ConfigError
from parallel import FOLDER, SyncedBatchNorm2d, in_processes, require, with_synced_batchnorm
from records import read_records
from tests.processes import living
from tests.test_main import job
from tests.test_training import PLAN, Batches
from training import fit

CPU = torch.device("cpu")


class Parts(Batches):
    """`Batches` that can be cut up as a loader of the benchmark can."""

    def part(self, rank, size, device):
        other = Parts.__new__(Parts)
        other.parts = [tuple(tensor.tensor_split(size)[rank] for tensor in batch) for batch in self.parts]
        other.parts = [batch for batch in other.parts if len(batch[0])]
        other.epochs = []
        return other


def data(count, size, batches, seed):
    """Images in float64 whose class is their brightest channel."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 0.5
    return Parts(images, labels, batches)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 4, 3, stride=2), nn.BatchNorm2d(4, momentum=None, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 4, 3),
    ).double()  # fmt: skip


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=3).double()


def trained(model, size, processes, **plan):
    train, validation = data(22, size, [8, 7, 7], 0), data(13, size, [6, 6, 1], 1)
    plan = dataclasses.replace(PLAN, processes=processes, **plan)
    return fit(model, train, validation, plan, device=CPU, description="test", seed=1)


@pytest.mark.parametrize(
    "build, size, processes, optimizer",
    [
        (small_net, 8, 2, "sgd"),
        pytest.param(small_net, 8, 3, "adamw", marks=pytest.mark.slow),
        pytest.param(resnet, 32, 2, "sgd", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_network_of_one(build, size, processes, optimizer):
    """The same global batches, cut into unequal parts: weights, statistics and every figure agree in float64."""
    model = build()
    alone, shared = (trained(model, size, count, optimizer=optimizer) for count in (1, processes))
    assert len(shared.history) == 3 and shared.best_epoch == alone.best_epoch
    for one, other in zip(alone.history, shared.history, strict=True):
        assert other.train_accuracy == one.train_accuracy and other.validation_accuracy == one.validation_accuracy
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-9)
        assert other.validation_loss == pytest.approx(one.validation_loss, rel=1e-9)
    expected = alone.model.state_dict()
    for name, value in shared.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)
    assert type(shared.model) is type(model) and not any(module.training for module in shared.model.modules())
    assert not any(isinstance(module, SyncedBatchNorm2d) for module in shared.model.modules())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synced_batchnorm_alone_is_batchnorm(affine, momentum, tmp_path):
    """Outputs, gradients and running statistics, in a group of one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "meeting"), 1), rank=0, world_size=1
    )
    try:
        images = torch.randn(6, 4, 5, 5, dtype=torch.float64)
        plain = nn.Sequential(nn.BatchNorm2d(4, affine=affine, momentum=momentum)).double()
        synced = with_synced_batchnorm(nn.Sequential(nn.BatchNorm2d(4, affine=affine, momentum=momentum)).double(), CPU)
        assert isinstance(synced[0], SyncedBatchNorm2d)
        for _ in range(3):
            inputs = [images.clone().requires_grad_() for _ in range(2)]
            outputs = [model(given) for model, given in zip((plain, synced), inputs, strict=True)]
            torch.testing.assert_close(outputs[0], outputs[1])
            for output in outputs:
                (output**3).sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
            images = images * 2 + 1
        for one, other in zip(plain.state_dict().values(), synced.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(plain.eval()(images), synced.eval()(images))
    finally:
        torch.distributed.destroy_process_group()


def fails(crew, rank):
    if crew.rank == rank:
        raise BenchmarkError("a file cannot be read")
    crew.summed(torch.ones(1))  # would wait for ever for the other
    return {}


def dies(crew):
    os.kill(os.getpid(), signal.SIGKILL) if crew.rank == 1 else crew.summed(torch.ones(1))


def breaks(crew):
    raise ZeroDivisionError("a bug") if crew.rank else BenchmarkError("said by the first")


def tells(crew, value):
    return {"rank": crew.rank, "sum": crew.summed(value + crew.rank), "threads": torch.get_num_threads()}


def test_the_first_process_answers_for_all():
    threads = torch.get_num_threads()
    found = in_processes(tells, [torch.tensor([1.0, 2.0])], processes=2, device=CPU)
    assert found["rank"] == 0 and found["sum"].tolist() == [3.0, 5.0] and found["threads"] == max(1, threads // 2)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_process_is_the_error(rank):
    with pytest.raises(BenchmarkError, match="^a file cannot be read$"):
        in_processes(fails, [rank], processes=2, device=CPU)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told():
    with pytest.raises(BenchmarkError, match="training.processes: 2; one of them ended early, by signal SIGKILL"):
        in_processes(dies, [], processes=2, device=CPU)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all():
    with pytest.raises(BenchmarkError, match="loss: nan in epoch"):
        trained(small_net(), 8, 2, lr=1e300)


def test_more_gpus_than_there_are():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="training.processes: 2; from cuda:0 on this machine has 0 CUDA devices"):
            require(torch.device("cuda"), 2)
    require(torch.device("cpu"), 64)
    require(torch.device("cuda"), 1)  # `resolve_device` speaks of a single one


ENDLESS = """
import os, time
import torch
from parallel import in_processes
def waits(crew):
    os.write(1, b"here\\n")  # whole, whoever else writes
    while True:
        time.sleep(0.1)
if __name__ == "__main__":
    in_processes(waits, [], processes=2, device=torch.device("cpu"))
"""


@pytest.mark.parametrize(
    ("end", "interrupts"),
    [
        (signal.SIGKILL, signal.SIG_IGN),  # as a shell has it for its jobs in the background
        pytest.param(signal.SIGKILL, signal.SIG_DFL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, signal.SIG_DFL, marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_its_parent(end, interrupts, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "endless.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    process.send_signal(end)
    process.wait(30)
    deadline = time.monotonic() + 20
    while (left := living(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stdout.close()
    assert not left
    in_processes(tells, [torch.zeros(1)], processes=1, device=CPU)
    assert not list(Path(tempfile.gettempdir()).glob(f"{FOLDER}{process.pid}-*"))  # nor does its folder, for long


@pytest.mark.slow
def test_a_whole_run_on_two_processes(tmp_path):
    """Training, retraining and a network from scratch, at rates so low that rounding is not made much of."""
    settings = ["training.train_pruned_from_scratch=true", "pruning.pruning_ratio=[0.5]", "pruning=random",
                "training.lr=1e-5", "training.lr_retrain=1e-5"]  # fmt: skip
    one, two = (job(tmp_path, f"{n}", f"training.processes={n}", *settings) for n in (1, 2))
    assert [(r.stage, r.ratio) for r in one] == [(r.stage, r.ratio) for r in two]
    assert read_records(tmp_path / "2" / "records.jsonl") == two
    with numpy.load(tmp_path / "1/confusion.npz") as mine, numpy.load(tmp_path / "2/confusion.npz") as theirs:
        for name in mine.files:  # of 60 to 200 images, those on the edge between two classes
            assert abs(mine[name] - theirs[name]).sum() <= 0.04 * mine[name].sum()
    assert any("memory of retraining: not measured" in text for record in two for text in record.warnings)
    assert all(record.retraining_peak_bytes is None for record in two)


@pytest.mark.slow
def test_too_small_a_batch_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("training.in_processes", None)
    with pytest.raises(BenchmarkError, match="training.processes: 12; a batch of [78] images leaves some without any"):
        job(tmp_path, "run", "training.processes=12", "training.batch_size_train=8")


@pytest.mark.slow
def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for work, given in ((fails, [1]), (dies, []), (breaks, [])):
        with pytest.raises(BenchmarkError):
            in_processes(work, given, processes=2, device=CPU)
        assert not list(tmp_path.iterdir())
