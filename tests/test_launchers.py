"""Sweeps whose runs are other processes: of this machine, or jobs of a cluster that this machine plays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import joblib
import pytest

import neighbours
from benchmarks.launchers import SweepParts, run_parts
from records import read_records
from run_status import read_status
from runs import read_sweep
from tests.formats import IMAGENETTE_WNIDS, write_image_folder
from tests.test_main import MAIN

SMALL = ["device=cpu", "dataset.samples_per_class=20", "training.epochs=2", "training.retrain_epochs=1",
         "latency.repeats=1", "latency.warmup=0", "latency.batch_sizes=[1]", "pruning.pruning_ratio=[0.5]"]  # fmt: skip
SLURM = Path(__file__).parent / "cluster" / "slurm.sh"
JOBS = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=2", "hydra.launcher.stderr_to_stdout=true"]  # fmt: skip

SHARE = max(1, joblib.cpu_count() // 2)  # of the cores, for each of two runs, as joblib.yaml says


def sweep(folder: Path, *overrides: str, **more: str | None) -> subprocess.Popen:
    """`more`: of the environment; None takes a variable out of it."""
    environment = {name: v for name, v in (os.environ | {"OMP_NUM_THREADS": "1"} | more).items() if v is not None}
    command = [sys.executable, str(MAIN), "-m", *SMALL, *overrides, f"hydra.sweep.dir={folder / 'sweep'}"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, f"cache_dir={folder / 'cache'}"], cwd=folder, stdout=output, stderr=output,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's child would ignore it
        )  # fmt: skip


def states(folder: Path) -> dict[str, str]:
    found = {path.name.split("-")[0]: read_status(path) for path in (folder / "sweep").glob("*-*")}
    return {name: "stopped" if status.stopped else status.state for name, status in found.items() if status}


def said(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")


def test_joblib_runs_two_at_a_time_and_tells_of_the_one_that_fails(tmp_path):
    """Each is a process of its own; what it says of its end reaches the table and the exit code."""
    process = sweep(tmp_path, "hydra/launcher=joblib", "pruning=ocap,random", "dataset=digits,gtsrb",
                    f"dataset.root={tmp_path}/none", OMP_NUM_THREADS=None)  # fmt: skip
    assert process.wait() == 1 and "Traceback" not in said(tmp_path), said(tmp_path)[-3000:]
    found = read_sweep(tmp_path / "sweep")
    assert sorted(run.records[0].method for run in found.runs) == ["ocap", "random"]
    failed = [problem for problem in found.problems if ": failed: " in problem]
    assert len(failed) == 2 and all(f"{tmp_path}/none" in problem for problem in failed)
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1
    assert [run.environment["torch_threads"] for run in found.runs] == 2 * [SHARE]
    assert {run.environment["variables"]["OMP_NUM_THREADS"] for run in found.runs} == {str(SHARE)}
    # both digits runs were timed while another process was at a run, or by themselves: it is said which
    timed = [timing for run in found.runs for record in run.records for timing in record.times]
    assert timed and all(timing.noisy for timing in timed)  # one pair of passes says nothing anyway


def test_a_sweeps_time_is_taken_apart(tmp_path):
    """Two processes of two runs each: one trains, the other waits for it."""
    began = datetime(2026, 1, 2, 3, 4, 5).timestamp()
    first = 0.0, 3.0, "kept for later runs: x.pt", 9.0, 20.0  # seconds after that: began, loaded, dense network, done
    for number, (pid, (start, loaded, how, ready, end)) in enumerate(
        [(7, first), (8, (1.0, 5.0, "reused, nothing is trained: x.pt", 9.5, 22.0)),
         (7, (20.5, 20.6, "reused, nothing is trained: x.pt", 20.7, 30.0)),
         (8, (22.5, 22.6, "reused, nothing is trained: x.pt", 22.7, 34.0))]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        status = {"state": "done", "identity": "x", "pid": pid, "began": began + start, "seconds": end - start}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "environment.json").write_text('{"torch_threads": 1}')
        lines = [(loaded, "__main__", "digits: 9 training, 1 validation and 5 test images"),
                 (loaded, "locks", "Another process is training resnet18; waiting for it ..."),
                 (ready, "cache", f"Dense model {how}")]  # fmt: skip
        dated = [(f"{datetime.fromtimestamp(began + at):%Y-%m-%d %H:%M:%S,%f}"[:-3], *said) for at, *said in lines]
        text = "".join(f"{at} INFO {name}: {said}\n" for at, name, said in dated)
        (folder / "main.log").write_text(text + "a line of a longer message\n")
    sweep = SweepParts(tuple(run_parts(tmp_path / str(number)) for number in range(4)), began - 2, began + 37)
    assert sorted(run.pid for run in sweep.processes) == [7, 8]
    assert list(sweep.figures().values()) == pytest.approx([2, 3.5, 0.1, 6, 4.5, 11.15, 11 + 12.5 + 9.3 + 11.3, 3, 39])


@pytest.mark.slow
def test_joblibs_processes_may_have_data_workers_more_threads_and_processes_that_train(tmp_path):
    write_image_folder(tmp_path / "data", IMAGENETTE_WNIDS, images_per_class=4)
    process = sweep(
        tmp_path, "hydra/launcher=joblib", "dataset=imagenette", f"dataset.root={tmp_path}/data", "seed=1,2",
        "dataset.num_workers=1", "dataset.image_size=64", "dataset.samples_per_class=4", "training.batch_size_train=8",
        "num_pruning_samples=3", "training.processes=2", "training.epochs=1", "selected_classes=[0,1,2]",
        OMP_NUM_THREADS=str(SHARE + 1),
    )  # fmt: skip
    assert process.wait() == 0, said(tmp_path)[-3000:]
    runs = read_sweep(tmp_path / "sweep").runs
    assert [run.environment["torch_threads"] for run in runs] == 2 * [SHARE + 1]


@pytest.mark.slow
def test_submitit_on_this_machine(tmp_path):
    assert sweep(tmp_path, "hydra/launcher=submitit_local", "pruning=ocap,random").wait() == 0, said(tmp_path)[-3000:]
    found = read_sweep(tmp_path / "sweep")
    assert len(found.runs) == 2 and not found.problems


def test_who_is_at_work_is_seen_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import sys, neighbours\nwith neighbours.at_work():\n    print('here', flush=True)\n    sys.stdin.read()"
    assert neighbours.others() == 0
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=MAIN.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "here\n"
        assert neighbours.others() == 1
        other.kill()
    assert neighbours.others() == 0  # whoever was killed does not count
    with neighbours.at_work():
        assert neighbours.others() == 0
    assert not list(tmp_path.glob("*/*"))


@pytest.fixture
def cluster(tmp_path):
    """The environment in which SLURM's commands find a cluster of one node."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root, and Debian's packages slurm-wlm and munge")
    folder = tmp_path / "slurm"
    subprocess.run(["bash", str(SLURM), "start", str(folder)], check=True)
    yield {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", str(SLURM), "stop", str(folder)], check=True)


@pytest.mark.slow
def test_a_slurm_sweep_survives_a_cancelled_job(tmp_path, cluster):
    """One of the jobs is cancelled, one fails; the same command submits what is missing, and the table is whole."""
    swept = ["pruning=ocap,random,ln_structured", *JOBS]
    waiting = sweep(tmp_path, *swept, **cluster)
    deadline = time.monotonic() + 240
    while states(tmp_path).get("ocap") != "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    queue = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"], env=os.environ | cluster, capture_output=True, text=True
    )
    (first,) = [job for job in queue.stdout.split() if job.endswith("_0")]
    subprocess.run(["scancel", first], env=os.environ | cluster, check=True)
    while list(states(tmp_path).values()).count("done") < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    while states(tmp_path)["ocap"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert states(tmp_path) == {"ocap": "stopped", "random": "done", "ln_structured": "done"}
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(60) in (1, 130)
    assert sweep(tmp_path, *swept, **cluster).wait() == 0, said(tmp_path)[-3000:]
    found = read_sweep(tmp_path / "sweep")
    assert sorted(run.records[0].method for run in found.runs) == ["ln_structured", "ocap", "random"]
    assert not found.problems and {status for status in states(tmp_path).values()} == {"done"}
    assert "not begun" not in (tmp_path / "sweep/comparison.md").read_text()


@pytest.mark.slow
def test_a_slurm_job_that_is_preempted_is_requeued_and_goes_on(tmp_path, cluster):
    """The signal that comes before its time is over: the same job starts again and takes up its run."""
    process = sweep(tmp_path, "pruning=ocap", *JOBS, **cluster)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "sweep").glob("*/records.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder,) = (path.parent for path in (tmp_path / "sweep").glob("*/records.jsonl"))
    first = read_records(folder / "records.jsonl")
    slurm = {"env": os.environ | cluster, "check": True, "capture_output": True, "text": True}
    (job,) = subprocess.run(["squeue", "--noheader", "--array", "--format=%i"], **slurm).stdout.split()
    subprocess.run(["scancel", "--signal=USR2", job], **slurm)
    while states(tmp_path)["ocap"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states(tmp_path) == {"ocap": "stopped"}  # not failed: it is to go on
    assert process.wait(240) == 0, said(tmp_path)[-3000:]
    status = read_status(folder)
    assert (status.state, status.attempts) == ("done", 2)
    assert read_records(folder / "records.jsonl")[: len(first)] == first


@pytest.mark.slow
def test_a_slurm_job_that_fails_leaves_the_others_whole(tmp_path, cluster):
    process = sweep(
        tmp_path, "pruning=random", "dataset=cifar10,digits", f"dataset.root={tmp_path}/none", *JOBS, **cluster
    )
    assert process.wait() == 1
    found = read_sweep(tmp_path / "sweep")
    assert len(found.runs) == 1 and any(": failed: " in problem and "/none" in problem for problem in found.problems)
    assert f"{tmp_path}/none" in (tmp_path / "sweep/comparison.md").read_text()
