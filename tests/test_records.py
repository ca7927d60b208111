import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import records
from disk import write_json, write_whole
from errors import BenchmarkError
from records import (
    Record,
    append_record,
    read_records,
    write_csv,
    write_selections,
)
from tests.sample_records import fields_of, record, run_records, timing

ROOT = Path(__file__).resolve().parent.parent


# The record


@given(
    latency=st.floats(1e-200, 1e200),
    share=st.floats(1e-50, 1),
    seconds=st.floats(0, 1e300) | st.none(),
    size=st.integers(1, 2**80),
    texts=st.lists(st.text(), max_size=3),
)
def test_a_record_equals_what_is_read_back_from_its_line(latency, share, seconds, size, texts):
    first = record(
        times=[timing(1, latency, share)], forward_peak_bytes=size, macs_ratio=share, size_bytes=size,
        removal_seconds=seconds, warnings=texts, run_id="".join(texts),
    )  # fmt: skip
    line = first.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == first


def test_lists_and_numpy_numbers_become_plain_values():
    loose = {"selected_classes": [8, 3], "warnings": ["slow"], "macs": np.int64(5), "removal_seconds": np.float32(9)}
    given_loosely = record(**loose)
    plain = {"selected_classes": (8, 3), "warnings": ("slow",), "macs": 5, "removal_seconds": 9.0}
    assert given_loosely == record(**plain)
    assert type(given_loosely.macs) is int
    assert type(given_loosely.removal_seconds) is float
    assert Record.from_json(given_loosely.to_json()) == given_loosely


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().accuracy = 1.0


def test_the_callers_dicts_are_copied():
    fields = fields_of()
    stored = Record(**fields)
    fields["accuracy_per_class"]["eight"] = 0.0
    assert stored.accuracy_per_class["eight"] == 28 / 30


KEPT = fields_of()["filters_kept_per_layer"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "trained"}, "stage: 'trained'; one of dense, pruned, retrained"),
        ({"head": "some"}, "head: 'some'"),
        ({"ratio": 1.0}, "ratio: 1.0"),
        ({"ratio": -0.1}, "ratio: -0.1"),
        ({"ratio": True}, "ratio: True"),
        ({"seed": 1.5}, "seed: 1.5"),
        ({"seed": True}, "seed: True"),
        ({"method": None}, "method: None"),
        ({"accuracy": float("nan")}, "accuracy: nan; not a finite number"),
        ({"removal_seconds": float("inf")}, "removal_seconds: inf"),
        ({"times": [timing(), timing()]}, "times: .*each engine and batch size once"),
        ({"times": [1.0]}, "times: .*not timings"),
        ({"accuracy_low": 0.7}, "accuracy_low, accuracy_high: 0.7 to .*; they are 0.7"),
        ({"accuracy_top5": 0.8}, "accuracy_top5: 0.8 is below accuracy"),
        ({"balanced_accuracy": 0.84}, "balanced_accuracy: 0.84; it is 0.81"),
        ({"onnx_exporter": "old"}, "onnx_exporter: 'old'; one of current, legacy, none"),
        ({"onnx_exporter": "current"}, "with an exported network, only"),
        ({"onnx_accuracy": 0.5}, "with an exported network, only"),
        ({"forward_peak_bytes": -1}, "forward_peak_bytes: -1"),
        ({"weight_bytes": 0}, "weight_bytes: 0"),
        ({"selected_classes": (8, 8)}, "selected_classes"),
        ({"selected_classes": ()}, "selected_classes"),
        ({"class_names": ("eight",)}, "class_names"),
        ({"class_names": ("three", "eight")}, "in this order"),
        ({"accuracy_all_classes": 0.5}, "only the dense model"),
        ({"achieved_ratio": 0.25}, "achieved_ratio: 0.25; it is 0.5"),
        ({"filters_removed": 25, "achieved_ratio": 25 / 48}, "filters_removed: 25; the layers have lost only 24"),
        ({"filters_prunable": 20, "achieved_ratio": 1.2}, "24 removed of 20 prunable"),
        ({"filters_total": 47}, "48 prunable of 47"),
        ({"filters_kept_per_layer": {"conv1": 16}}, "not the same layers"),
        ({"filters_kept_per_layer": KEPT | {"conv1": 0}}, r"\['conv1'\] keep no filter"),
        ({"filters_kept_per_layer": KEPT | {"conv1": 17}}, "more than there were"),
        ({"layers_left_out": ("conv9",)}, "layers_left_out"),
        ({"filters_chosen_per_layer": {"layer1.conv1": 8}}, "filters_chosen_per_layer: 8 in all, not 24"),
        ({"filters_chosen_per_layer": {"layer1.conv1": 24}}, r"\['layer1.conv1'\] have not lost as many"),
        ({"difference_from_masked": -1e-9}, "difference_from_masked: -1e-09"),
        ({"accuracy": 0.82}, "accuracy: 0.82; it is 0.84"),
        ({"accuracy": (28 / 30 + 14 / 20) / 2}, "accuracy: 0.81"),  # a mean over classes of unequal size
        ({"worst_class_accuracy": 28 / 30}, "worst_class_accuracy"),
        ({"accuracy_per_class": {"eight": 0.9, "three": 0.71}}, r"three, 0.71 of 20, is no number of images"),
        ({"images_per_class": {"eight": 30, "three": 0}}, "three"),
        ({"macs": None}, "macs_ratio: without macs"),
        ({"macs": -1}, "macs: -1"),
        ({"params": 0}, "params: 0"),
        ({"scoring_seconds": -0.1}, "scoring_seconds: -0.1"),
    ],
)
def test_figures_that_cannot_all_be_true_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": "magic"}, "engine: 'magic'; one of pytorch, onnxruntime"),
        ({"p95_ms": 1.0}, "p95_ms: 1.0 is below the median"),
        ({"dense_median_ms": 0.0}, "dense_median_ms: 0.0"),
        ({"ratio_low": 0.9}, "ratio: 0.7.* is not within 0.9 to"),
        ({"pairs": 0}, "pairs: 0"),
        ({"noisy": 1}, "noisy: 1; not true or false"),
        ({"threads": 1.5}, "threads: 1.5"),
    ],
)
def test_times_that_cannot_all_be_true_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(timing(), **changes)
    line = json.loads(record().to_json())
    line["times"][0] |= changes
    with pytest.raises(ValueError, match=message):  # nor are they read
        Record.from_json(json.dumps(line))


def test_throughput_is_that_of_the_median():
    assert timing(128, 10.0, 0.5).images_per_second == 25_600
    with pytest.raises(ValueError, match="images_per_second: 1.0; it is"):
        dataclasses.replace(timing(), images_per_second=1.0)


def test_a_dense_model_has_all_its_filters():
    with pytest.raises(ValueError, match="stage dense: 24 filters are missing"):
        record("dense", filters_kept_per_layer=KEPT)


def test_what_was_not_measured_may_be_none():
    assert record(macs=None, macs_ratio=None, scoring_seconds=None, removal_seconds=None).macs is None


def test_a_record_without_a_field_is_refused():
    fields = fields_of()
    del fields["accuracy"]
    with pytest.raises(TypeError, match="accuracy"):
        Record(**fields)


# Lines on the disk


def test_appended_records_are_read_back_in_order(tmp_path):
    path, rows = tmp_path / "records.jsonl", run_records()
    for number, row in enumerate(rows, start=1):
        append_record(path, row)
        assert path.read_bytes().count(b"\n") == number
    assert read_records(path) == rows


def test_earlier_lines_are_never_touched(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("whatever was there\n")
    append_record(path, record())
    assert path.read_text() == "whatever was there\n" + record().to_json() + "\n"


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    append_record(path, record())
    assert synced == [path.stat().st_size]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_cut_short_is_left_out_and_the_next_run_goes_on(tmp_path, caplog, kept):
    path = tmp_path / "records.jsonl"
    whole = record(ratio=0.25)
    append_record(path, whole)
    with path.open("a") as file:
        file.write(record().to_json()[:kept])
    assert read_records(path) == [whole]
    assert "line 2: not read: cut short" in caplog.text
    append_record(path, whole)
    assert read_records(path) == [whole, whole]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"schema": 99}', "schema 99; this version reads schema 4"),
        ("{}", "schema None"),
        ("[1]", "not a record"),
        ('{"schema": 4, "run_id": "x"}', "missing"),
        (json.dumps(json.loads(record().to_json()) | {"surprise": 1}), "surprise"),
        (record().to_json().replace('"seed": 42', '"seed": "42"'), "seed: '42'"),
        (record().to_json().replace('"engine": "pytorch", ', ""), "engine"),
        (record().to_json().replace('"accuracy": 0.84', '"accuracy": NaN'), "accuracy: nan"),
    ],
)
def test_lines_that_are_no_record_are_named_and_the_others_read(tmp_path, caplog, line, reason):
    path = tmp_path / "records.jsonl"
    path.write_text(f"{record().to_json()}\n{line}\n{record('retrained').to_json()}\n")
    assert read_records(path) == [record(), record("retrained")]
    assert len(caplog.records) == 1
    assert "line 2: not read" in caplog.text and reason in caplog.text


def test_bytes_that_are_no_text_are_left_out(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xff\xfe\n" + record().to_json().encode() + b"\n")
    assert read_records(path) == [record()]
    assert "line 1" in caplog.text


def test_a_kill_between_or_in_appends_leaves_whole_records(tmp_path):
    code = (
        "import sys; from pathlib import Path; from records import append_record; "
        "from tests.sample_records import record\n"
        "while True: append_record(Path(sys.argv[1]), record())"
    )
    path = tmp_path / "records.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT) as writer:
        while not path.exists() or path.stat().st_size < 20_000:
            assert writer.poll() is None
        writer.kill()
    assert set(map(Record.to_json, read_records(path))) == {record().to_json()}


def test_a_disk_that_refuses_is_one_clear_error(tmp_path):
    for write in (append_record, write_csv, write_json):
        with pytest.raises(BenchmarkError, match="no/such/file: No such file"):
            write(tmp_path / "no/such/file", record() if write is append_record else [])
    with pytest.raises(BenchmarkError, match="No such file"):
        read_records(tmp_path / "missing.jsonl")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BenchmarkError, match="results.csv: No space left on device"):
        write_whole(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
    assert path.read_text() == "old"


# CSV and selections


def test_csv_has_a_row_a_record_and_the_raw_figures(tmp_path):
    path, rows = tmp_path / "results.csv", run_records()
    write_csv(path, rows)
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["stage"], float(row["ratio"])) for row in table] == [(row.stage, row.ratio) for row in rows]
    times = {name for name in table[0] if "_batch_" in name and name != "forward_batch_size"}
    assert set(table[0]) - times == {field.name for field in dataclasses.fields(Record)} - {"times"}
    for cells, row in zip(table, rows, strict=True):
        assert float(cells["accuracy"]) == row.accuracy
        assert json.loads(cells["accuracy_per_class"]) == row.accuracy_per_class
        assert json.loads(cells["filters_kept_per_layer"]) == row.filters_kept_per_layer
        assert json.loads(cells["class_names"]) == list(row.class_names)
        assert int(cells["macs"]) == row.macs
        assert cells["retraining_seconds"] == ("" if row.retraining_seconds is None else repr(row.retraining_seconds))


def test_csv_starts_with_the_columns_that_are_read_most(tmp_path):
    write_csv(tmp_path / "results.csv", [])
    assert (
        (tmp_path / "results.csv")
        .read_text()
        .startswith(
            "stage,ratio,achieved_ratio,accuracy,accuracy_low,accuracy_high,accuracy_all_classes,"
            "worst_class_accuracy,balanced_accuracy,accuracy_per_class,macs,macs_ratio,params,params_ratio,size_bytes,"
            "scoring_seconds,removal_seconds,retraining_seconds,run_id,"
        )
    )


def test_csv_has_a_column_for_each_time(tmp_path):
    rows = [record(), record(times=[timing(1, ratio=0.5, engine="onnxruntime"), timing(128, noisy=True)])]
    write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["pytorch_batch_1_median_ms"]) == rows[0].time("pytorch", 1).median_ms
    assert (first["onnxruntime_batch_1_ratio"], second["onnxruntime_batch_1_ratio"]) == ("", "0.5")
    assert (second["pytorch_batch_1_ratio"], second["pytorch_batch_128_noisy"]) == ("", "True")
    assert "times" not in first


def test_csv_keeps_names_with_commas_quotes_and_other_alphabets(tmp_path):
    names = ('a "b", c', "日本")
    shares = {"accuracy_per_class": dict(zip(names, (28 / 30, 14 / 20), strict=True))}
    images = {"images_per_class": dict(zip(names, (30, 20), strict=True))}
    write_csv(tmp_path / "results.csv", [record(class_names=names, **shares, **images)])
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert tuple(json.loads(row["accuracy_per_class"])) == names


def test_selections_keep_ratios_layers_and_indices(tmp_path):
    path = tmp_path / "selections.json"
    write_selections(path, {0.0: {}, 0.29: {"conv1": [0, 7], "layer1.conv2": []}, 0.5: {"conv1": np.array([1, 2])}})
    assert json.loads(path.read_text()) == [
        {"ratio": 0.0, "filters_removed": {}},
        {"ratio": 0.29, "filters_removed": {"conv1": [0, 7], "layer1.conv2": []}},
        {"ratio": 0.5, "filters_removed": {"conv1": [1, 2]}},
    ]
    assert '    "conv1": [0, 7],\n' in path.read_text()  # a layer a line


def test_no_selections_are_an_empty_list(tmp_path):
    write_selections(tmp_path / "selections.json", {})
    assert json.loads((tmp_path / "selections.json").read_text()) == []


# Where it ran


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.001


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    ratios: tuple[float, ...] = (0.5, 0.25)
    name: str | None = None
    options: Mapping = dataclasses.field(default_factory=lambda: MappingProxyType({"variant": "union"}))


def test_config_hash_is_pinned():
    """A change here makes new runs of an old config look like those of another one."""
    expected = "a02be6fcdc125e0a9de8d3d0d26cfc934321d0fd1fa83c2b78db36e477e00cd3"
    assert records.config_hash(Outer()) == expected
    plain = {"options": {"variant": "union"}, "name": None, "ratios": [0.5, 0.25], "inner": {"lr": 1e-3}}
    assert records.config_hash(plain) == expected


def test_config_hash_tells_settings_apart():
    hashes = {records.config_hash(Outer(**change)) for change in ({}, {"ratios": (0.25, 0.5)}, {"name": "None"})}
    assert len(hashes) == 3
    with pytest.raises(TypeError, match="object"):
        records.config_hash({"model": object()})


def test_environment_is_plain_json_and_names_what_ran(tmp_path):
    import torch

    found = records.environment(Outer())
    write_json(tmp_path / "environment.json", found)
    assert json.loads((tmp_path / "environment.json").read_text()) == found
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["config_hash"] == records.config_hash(Outer())
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["gpu"] is None or isinstance(found["gpu"], str)
    assert found["cpu"] and found["platform"] and found["cores"] >= found["cores_usable"] >= 1
    assert found["time_utc"].endswith("+00:00")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"git_commit", "git_dirty"} <= found.keys()


def test_the_hash_of_an_environment_stands_for_where_not_when_and_what(monkeypatch):
    data = {"fingerprint": "abc", "images": {"train": {"zero": 3}}}
    first = records.environment(Outer(), data)
    time.sleep(1.1)  # the time is given in seconds
    assert records.environment(Outer(name="other"), data)["hash"] == first["hash"]
    assert records.environment(Outer(), data | {"fingerprint": "abd"})["hash"] != first["hash"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert records.environment(Outer(), data)["hash"] != first["hash"]
    assert records.environment(Outer(), data)["time_utc"] != first["time_utc"]
    assert first["data"] == data and len(first["hash"]) == 64


def test_what_the_system_tells_of_itself_is_read_or_none(tmp_path):
    from environment import _first_line

    (tmp_path / "governor").write_text("powersave\n")
    assert _first_line(tmp_path / "governor") == "powersave"
    (tmp_path / "empty").write_text("")
    assert _first_line(tmp_path / "empty") is None and _first_line(tmp_path / "none") is None
    assert {"cpu_governor", "gpu_driver"} <= records.environment(Outer()).keys()


def test_environment_names_the_device_that_is_used(monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = records.environment({"device": "auto"})
    assert found["device"] == "cpu"
    assert found["variables"] == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast GPU")
    assert records.environment({"device": "auto"})["device"] == "cuda (Fast GPU)"
    assert records.environment(Outer())["device"] is None


def git(folder, *arguments):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout.strip()


def test_code_version_follows_the_checkout(tmp_path, monkeypatch):
    from environment import code_version

    nothing = {"git_commit": None, "git_dirty": None}
    assert code_version(tmp_path) == nothing
    (tmp_path / "environment.py").write_text("pass\n")
    git(tmp_path, "init", "-q")
    assert code_version(tmp_path) == nothing  # a checkout that holds other things than this code
    git(tmp_path, "add", "environment.py")
    git(tmp_path, "commit", "-q", "-m", "code")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not code")
    assert code_version(tmp_path) == {"git_commit": commit, "git_dirty": False}
    (tmp_path / "environment.py").write_text("changed\n")
    assert code_version(tmp_path) == {"git_commit": commit, "git_dirty": True}
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as git sets it for its hooks
    assert code_version(tmp_path)["git_commit"] == commit
    monkeypatch.setenv("PATH", "")
    assert code_version(tmp_path) == nothing


def test_records_need_no_torch():
    code = "import sys, records; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
