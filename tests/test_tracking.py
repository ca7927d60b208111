"""A dashboard holds what the records hold, and whatever becomes of it, the run goes on."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

import tracking
from tests.sample_records import run_records
from tests.wandb_file import read_run
from tracking import Tracker, WandbTracker, class_table, get_tracker, results_table, row
from training import EpochRow

ROOT = Path(tracking.__file__).parent
OPTIONS = {
    "mode": "offline", "project": "tests", "entity": None, "group": "all", "job_type": "sweep", "tags": ["a", "b"],
    "name": "one run",
}  # fmt: skip
CONFIG = {"seed": 42, "pruning": {"name": "ocap", "pruning_ratio": [0.25, 0.5]}}
HISTORY = [EpochRow(epoch, 1 / epoch, 0.5, 2 / epoch, 0.25 * epoch, 0.1, 3.5) for epoch in (1, 2)]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no config"))


def told(tracker, plots=()):
    """Everything a run tells; the records it told of."""
    rows = run_records(ratios=(0.25, 0.5))
    with tracker:
        tracker.curve("training", HISTORY)
        tracker.curve("retraining/ratio_0.5", HISTORY[:1])
        for pruned in rows[2::2]:
            tracker.ratio(rows[0], pruned, rows[rows.index(pruned) + 1])
        tracker.results(rows, plots, 12.5)
    return rows


def test_a_row_has_the_names_of_old_and_the_records_figures():
    dense, _, pruned, retrained, *_ = run_records(ratios=(0.25,))
    found = row(dense, pruned, retrained)
    expected = {
        "pruning_ratio": 0.25,
        "accuracy_before": dense.accuracy,
        "accuracy_after": retrained.accuracy,
        "accuracy_after_pruning": pruned.accuracy,
        "model_size_before": dense.size_bytes,
        "model_size_after": retrained.size_bytes,
        "model_size_ratio": retrained.size_bytes / dense.size_bytes,
        "parameter_ratio": retrained.params_ratio,
        "flops_before": dense.macs,
        "flops_after": retrained.macs,
        "flops_ratio": retrained.macs_ratio,
        "inference_time_batch_before": 12.5e-3,
        "inference_time_batch_after": retrained.time("pytorch", 128).median_ms / 1e3,
        "inference_time_batch_ratio": retrained.time("pytorch", 128).ratio,
        "pruning_time": 0.42 + 0.3125,
        "retraining_time": 6.75,
        "total_time": 0.42 + 0.3125 + 6.75,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    for figure in ("ratio", "ratio_low", "ratio_high", "noisy"):
        assert found[f"latency/pytorch_batch_1_{figure}"] == getattr(retrained.time("pytorch", 1), figure)
    without = row(dense, pruned, None)
    assert without["accuracy_after"] == pruned.accuracy and without["retraining_time"] == 0
    assert None not in found.values()


def test_a_run_is_read_back_from_its_file(tmp_path, caplog):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "accuracy.png")
    with caplog.at_level(logging.INFO):
        rows = told(WandbTracker(OPTIONS, tmp_path, CONFIG), [tmp_path / "accuracy.png"])
    found = read_run(tmp_path)
    assert found["run"].project == "tests" and found["run"].display_name == "one run"
    assert (found["run"].run_group, found["run"].job_type, list(found["run"].tags)) == ("all", "sweep", ["a", "b"])
    assert {name: found["config"][name] for name in CONFIG} == CONFIG
    history = found["history"]
    curve = [line["training/validation_accuracy"] for line in history if "training/epoch" in line]
    assert curve == [0.25, 0.5]
    sent = {f"{name}/{key}" for name in ("training", "retraining/ratio_0_5") for key in asdict(HISTORY[0])}
    sent |= {*row(rows[0], rows[2], rows[3]), "results", "classes", "plots/accuracy"}
    kept = {name for line in history for name in line if not name.startswith("_")}
    assert kept == sent  # and nothing that W&B made up of it
    ratios = [line for line in history if "pruning_ratio" in line]
    assert [line["pruning_ratio"] for line in ratios] == [0.25, 0.5]
    for line, pruned, retrained in zip(ratios, rows[2::2], rows[3::2], strict=True):
        assert {name: line[name] for name in row(rows[0], pruned, retrained)} == row(rows[0], pruned, retrained)
    columns, values = results_table(rows)
    assert found["tables"]["results"]["columns"] == columns and found["tables"]["results"]["data"] == values
    columns, values = class_table(rows)
    assert found["tables"]["classes"]["columns"] == columns and found["tables"]["classes"]["data"] == values
    final = {**row(rows[0], rows[-2], rows[-1]), "seconds": 12.5}
    assert {name: found["summary"][name] for name in final} == final
    with Image.open(found["images"]["plots/accuracy"]) as picture:
        assert picture.size == (40, 30)
    assert found["exit"] == 0
    assert "kept in " in caplog.text and "WARNING" not in caplog.text


def test_tables_hold_every_record():
    rows = run_records(ratios=(0.25, 0.5), classes=3)
    columns, values = results_table(rows)
    assert [line[columns.index("accuracy")] for line in values] == [record.accuracy for record in rows]
    assert {"training_seconds", "pytorch_batch_128_ratio", "pytorch_batch_1_noisy"} <= set(columns)
    assert "onnx_exporter" not in columns  # what no record has is left out
    columns, values = class_table(rows)
    assert len(values) == 3 * len(rows)
    assert values[0][columns.index("accuracy")] == rows[0].accuracy_per_class["class 0"]


def test_a_run_that_fails_is_marked_as_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), WandbTracker(OPTIONS, tmp_path, CONFIG) as tracker:
        tracker.curve("training", HISTORY)
        raise ZeroDivisionError
    assert read_run(tmp_path)["exit"] == 1


def test_a_run_that_is_killed_leaves_a_whole_file(tmp_path):
    code = (
        "import os, signal, sys, time; from pathlib import Path; from tests.test_tracking import *\n"
        "tracker = WandbTracker(OPTIONS, Path(sys.argv[1]), CONFIG); tracker.curve('training', HISTORY)\n"
        "while not list(Path(sys.argv[1]).glob('wandb/offline-run-*')): time.sleep(0.1)\n"
        "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while (found := read_run(tmp_path))["exit"] is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found["exit"] == 1 and len([line for line in found["history"] if "training/epoch" in line]) == 2


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_a_key_it_is_kept_offline(tmp_path, caplog):
    start = time.monotonic()
    told(WandbTracker(OPTIONS | {"mode": "online"}, tmp_path, CONFIG))
    assert time.monotonic() - start < 30
    (warning,) = warnings_of(caplog)
    assert "online did not work (No API key" in warning and "offline instead" in warning
    assert len(read_run(tmp_path)["history"]) >= 4


def test_without_a_network_it_is_kept_offline(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    start = time.monotonic()
    told(WandbTracker(OPTIONS | {"mode": "online"}, tmp_path, CONFIG))
    assert time.monotonic() - start < 30
    (warning,) = warnings_of(caplog)
    assert "online did not work" in warning
    assert len(read_run(tmp_path)["history"]) >= 4


def test_its_own_death_is_one_warning(tmp_path, caplog):
    tracker = WandbTracker(OPTIONS, tmp_path, CONFIG)
    os.kill(tracker._process.pid, signal.SIGKILL)
    tracker._process.wait()
    told(tracker)
    (warning,) = warnings_of(caplog)
    assert "its process ended with -9" in warning and "records.jsonl has every figure" in warning


def test_one_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    tracker = WandbTracker(OPTIONS, tmp_path, CONFIG)
    os.kill(tracker._process.pid, signal.SIGSTOP)
    process, start = tracker._process, time.monotonic()
    told(tracker)
    assert 0.9 < time.monotonic() - start < 5
    (warning,) = warnings_of(caplog)
    assert "still busy after 1 s and was stopped" in warning
    assert process.poll() is not None


def test_more_than_a_pipe_holds_does_not_wait_for_one_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    tracker = WandbTracker(OPTIONS, tmp_path, CONFIG)
    while not list(tmp_path.glob("wandb/offline-run-*")):  # W&B's own helper holds the pipe too, by then
        time.sleep(0.1)
    os.kill(tracker._process.pid, signal.SIGSTOP)
    start = time.monotonic()
    for _ in range(500):
        tracker.curve("training", HISTORY * 20)
    assert time.monotonic() - start < 5
    tracker.close(failed=False)
    assert time.monotonic() - start < 10


def test_a_full_disk_of_its_own_is_no_concern_of_the_run(tmp_path, caplog, monkeypatch, small_disk):
    monkeypatch.setenv("WANDB_DIR", str(small_disk))
    start = time.monotonic()
    tracker = WandbTracker(OPTIONS, tmp_path, CONFIG)
    for number in range(40):
        tracker.curve(f"retraining/{number}", HISTORY * 50)
    told(tracker)
    assert time.monotonic() - start < 30
    assert len(warnings_of(caplog)) == 1


def test_a_folder_that_cannot_be_written_is_no_concern_of_the_run(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file"))
    told(WandbTracker(OPTIONS, tmp_path, CONFIG))
    (warning,) = warnings_of(caplog)
    assert f"{tmp_path / 'file'} cannot be written, it writes to " in warning


def test_no_room_for_what_it_keeps_for_the_moment_is_no_concern_of_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking.tempfile, "tempdir", str(tmp_path / "none"))
    told(WandbTracker(OPTIONS, tmp_path, CONFIG))
    (warning,) = warnings_of(caplog)
    assert "cannot be started (No such file" in warning


def test_without_being_asked_nothing_is_imported_or_started(tmp_path):
    tracker = get_tracker(SimpleNamespace(log_results=False), tmp_path, CONFIG)
    assert type(tracker) is Tracker
    told(tracker)
    code = "import sys, tracking, experiment, main; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_another_tracker_is_one_class():
    class Notes(Tracker):
        lines = []

        def ratio(self, dense, pruned, retrained):
            self.lines.append((pruned.ratio, (retrained or pruned).accuracy))

    rows = told(Notes())
    assert Notes.lines == [(0.25, rows[3].accuracy), (0.5, rows[5].accuracy)]


def test_only_this_module_knows_wandb():
    used = [path.name for path in ROOT.glob("*.py") if "import wandb" in path.read_text()]
    assert used == ["tracking.py"]
