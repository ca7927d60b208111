"""The whole job, shrunk: configuration in, records, files and plots out."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy
import pytest
import torch
import torchvision

from errors import ConfigError
from filter_selection.ocap import OCAP
from main import run
from records import read_records
from run_status import read_status
from settings import CONFIG_DIR
from tests.formats import write_cifar10
from tests.wandb_file import read_run
from tracking import class_table, results_table, row

MAIN = Path(__file__).resolve().parents[1] / "main.py"
SMALL = [
    "device=cpu",
    "dataset.samples_per_class=20",
    "training.epochs=2",
    "training.retrain_epochs=1",
    "latency.repeats=2",
    "latency.warmup=0",
    "pruning.pruning_ratio=[0.5,0.9]",
]
WITHOUT_RETRAINING = "training.retrain_after_pruning=false"


def compose(tmp_path: Path, *overrides: str):
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose("config", overrides=[*SMALL, f"cache_dir={tmp_path / 'cache'}", *overrides])


def job(tmp_path: Path, name: str, *overrides: str):
    return run(compose(tmp_path, *overrides), tmp_path / name)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def first(shared):
    return job(shared, "first")


def test_every_ratio_is_recorded_before_and_after_retraining(first, shared):
    stages = [(record.stage, record.ratio) for record in first]
    assert stages == [("dense", 0.0)] + [(s, r) for r in (0.0, 0.5, 0.9) for s in ("pruned", "retrained")]
    assert read_records(shared / "first" / "records.jsonl") == first
    assert [(row["stage"], float(row["ratio"])) for row in rows_of(shared / "first")] == stages
    dense, untouched = first[0], first[1]
    assert (dense.head, untouched.head) == ("all", "selected")
    assert dense.accuracy_all_classes is not None and untouched.accuracy_all_classes is None
    assert untouched.filters_removed == 0 and untouched.macs < dense.macs  # the head alone has shrunk
    assert dense.macs - untouched.macs == 512 * 7 and dense.params - untouched.params == 512 * 7 + 7
    assert untouched.accuracy >= dense.accuracy  # with fewer wrong answers to give, none gets worse


def test_figures_fit_the_filters_that_went(first, shared):
    selections = {entry["ratio"]: entry["filters_removed"] for entry in read_json(shared / "first" / "selections.json")}
    for record in first[1:]:
        removed = {layer: len(filters) for layer, filters in selections[record.ratio].items()}
        assert record.filters_removed == sum(removed.values())
        for layer, width in record.widths_dense.items():
            assert record.filters_kept_per_layer[layer] == width - removed.get(layer, 0)
    deep, shallow = first[5], first[3]
    assert deep.macs < shallow.macs < first[1].macs and deep.size_bytes < first[1].size_bytes


def test_plots_and_environment_are_there(first, shared):
    folder = shared / "first"
    assert len(list((folder / "plots").glob("*.png"))) >= 3
    environment = read_json(folder / "environment.json")
    assert environment["config_hash"] == first[0].config_hash


def test_the_same_run_again_trains_nothing_and_finds_the_same(first, shared, caplog):
    with caplog.at_level("INFO"):
        again = job(shared, "again")
    assert (shared / "again" / "selections.json").read_bytes() == (shared / "first" / "selections.json").read_bytes()
    assert [r.accuracy_per_class for r in again] == [r.accuracy_per_class for r in first]
    assert [r.accuracy_all_classes for r in again] == [r.accuracy_all_classes for r in first]
    assert len(list((shared / "cache").glob("*.pt"))) == 1
    assert any("cache" in message and ".pt" in message for message in caplog.messages)


@pytest.mark.slow
def test_an_unsorted_list_of_classes_gives_the_same_figures_per_class(first, shared):
    """Enough classes, epochs and learning that sums in another order would end in another network."""
    longer = ["training.retrain_epochs=3", "training.lr_retrain=0.05", "pruning.pruning_ratio=0.8"]
    in_order, unsorted = (
        job(shared, f"classes {classes}", f"selected_classes={classes}", *longer)
        for classes in ("[0,2,3,4,6]", "[6,3,0,4,2]")
    )
    assert unsorted[0].class_names == ("6", "3", "0", "4", "2")
    for one, other in zip(in_order, unsorted, strict=True):
        assert one.accuracy_per_class == other.accuracy_per_class
        assert one.filters_kept_per_layer == other.filters_kept_per_layer


def test_raw_figures_give_the_records(first, shared):
    """From the samples and counts that are kept, worked out again without the benchmark's own functions."""
    samples = numpy.load(shared / "first" / "latency.npz")
    confusions = numpy.load(shared / "first" / "confusion.npz")
    for record in first:
        name = f"{record.stage}_{record.ratio!r}"
        assert [timing.batch_size for timing in record.times] == [1, sum(record.images_per_class.values())]
        for timing in record.times:
            place = f"{name}/{timing.engine}/batch_{timing.batch_size}"
            dense, model = samples[f"{place}/dense_ms"], samples[f"{place}/model_ms"]
            assert len(dense) == len(model) == timing.pairs == 2 and timing.noisy  # two pairs say nothing
            assert timing.median_ms == numpy.median(model) and timing.dense_median_ms == numpy.median(dense)
            assert timing.ratio == pytest.approx(numpy.sqrt(numpy.prod(model / dense)))  # the median of two
        matrix = confusions[name]
        rows = list(record.selected_classes) if record.head == "all" else range(len(record.class_names))
        for class_name, place in zip(record.class_names, rows, strict=True):
            assert matrix[place].sum() == record.images_per_class[class_name]
            assert matrix[place, place] / matrix[place].sum() == record.accuracy_per_class[class_name]
    assert set(confusions.files) == {f"{record.stage}_{record.ratio!r}" for record in first}
    assert any("says nothing, only 2 pairs" in warning for warning in first[-1].warnings)


def test_costs_and_surroundings_are_recorded(first, shared):
    environment = read_json(shared / "first" / "environment.json")
    assert {record.environment_hash for record in first} == {environment["hash"]}
    assert environment["data"]["images"]["train"].keys() == set("0123456789")
    dense, pruned, retrained = first[0], first[3], first[4]
    assert (dense.scoring_images, pruned.scoring_images, retrained.scoring_images) == (None, 30, 30)
    assert min(pruned.scoring_peak_bytes, pruned.removal_peak_bytes, retrained.retraining_peak_bytes) > 100e6
    trained_on = sum(environment["data"]["images"]["train"][name] for name in dense.class_names)
    assert retrained.retraining_images == trained_on  # one epoch
    assert pruned.forward_peak_bytes == retrained.forward_peak_bytes > 0
    assert first[-1].activation_bytes < dense.activation_bytes
    assert pruned.weight_bytes < pruned.size_bytes < 1.02 * pruned.weight_bytes


@pytest.fixture(scope="module")
def dashboard(shared):
    """A run with ONNX Runtime and W&B, as its user would type it, and what it printed."""
    command = [sys.executable, str(MAIN), *SMALL, f"cache_dir={shared / 'cache'}", "pruning.pruning_ratio=[0.9]"]
    command += ["inference_with_onnx=true", "log_results=true", "wandb.tags=[quick]", "latency.batch_sizes=[2]"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command.append(f"hydra.run.dir={shared / 'dashboard'}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=shared, env=environment)
    assert done.returncode == 0, done.stderr
    return shared / "dashboard", read_records(shared / "dashboard" / "records.jsonl"), done


@pytest.mark.slow
def test_onnx_runtime_answers_as_pytorch_does(dashboard):
    _, records, done = dashboard
    for record in records:
        assert record.onnx_exporter == "current" and record.onnx_difference < 1e-4
        assert record.onnx_accuracy == record.accuracy
        assert [(timing.engine, timing.batch_size) for timing in record.times] == [("pytorch", 2), ("onnxruntime", 2)]
    assert records[-1].onnx_size_bytes < records[0].onnx_size_bytes
    assert "ONNX Runtime: the same accuracy in every row" in done.stdout


@pytest.mark.slow
def test_the_dashboard_holds_what_the_records_hold(dashboard):
    folder, records, done = dashboard
    found = read_run(folder)
    assert found["exit"] == 0 and "W&B: kept in" in done.stderr
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in _text(path)]  # nobody is left
    assert found["config"]["pruning"]["pruning_ratio"] == [0.9] and found["config"]["wandb"]["tags"] == ["quick"]
    assert found["config"]["environment"]["hash"] == records[0].environment_hash
    columns, values = results_table(records)
    assert (found["tables"]["results"]["columns"], found["tables"]["results"]["data"]) == (columns, values)
    assert found["tables"]["classes"]["data"] == class_table(records)[1]
    for name, epochs in (("training", [1, 2]), ("retraining/ratio_0_9", [1])):
        assert [line[f"{name}/epoch"] for line in found["history"] if f"{name}/epoch" in line] == epochs
    rows = [line for line in found["history"] if "accuracy_after" in line]
    assert [line["pruning_ratio"] for line in rows] == [0, 0.9]
    final = row(records[0], records[-2], records[-1])
    assert {name: rows[-1][name] for name in final} == final
    assert {name: found["summary"][name] for name in final} == final and found["summary"]["seconds"] > 0
    assert set(found["images"]) == {f"plots/{path.stem}" for path in (folder / "plots").glob("*.png")}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_whole_records(first, shared):
    """kill -9 while it measures, with W&B at its side: what was recorded stays, and is reported."""
    folder = shared / "killed"
    command = [sys.executable, str(MAIN), *SMALL, f"cache_dir={shared / 'cache'}", "log_results=true"]
    process = subprocess.Popen(
        [*command, f"hydra.run.dir={folder}"], cwd=shared, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    records, deadline = folder / "records.jsonl", time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    whole = read_records(records)
    assert len(whole) >= 2 and [r.stage for r in whole[:2]] == ["dense", "pruned"]
    assert whole[1].accuracy_per_class == first[1].accuracy_per_class
    assert not list(folder.rglob("*.partial"))
    assert (
        "dense, all logits"
        in subprocess.run(
            [sys.executable, str(MAIN.parent / "report.py"), str(folder)], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.slow
def test_a_full_disk_of_the_dashboards_costs_no_record(first, shared, small_disk):
    command = [sys.executable, str(MAIN), *SMALL, f"cache_dir={shared / 'cache'}", "log_results=true"]
    environment = os.environ | {"WANDB_DIR": str(small_disk)}
    (small_disk / "full").write_bytes(bytes(40_000))
    folder = shared / "full disk"
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"], cwd=shared, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stderr.count("W&B: ") == 1, done.stderr
    assert [r.accuracy_per_class for r in read_records(folder / "records.jsonl")] == [
        r.accuracy_per_class for r in first
    ]


@pytest.mark.slow
def test_classes_by_name_are_the_same_classes(first, shared):
    named = job(shared, "named", "selected_classes=['3','8','9']", WITHOUT_RETRAINING)
    pruned = [record for record in first if record.stage != "retrained"]
    assert [r.accuracy_per_class for r in named] == [r.accuracy_per_class for r in pruned]


@pytest.mark.slow
def test_without_head_replacement_all_logits_stay(first, shared):
    kept = job(shared, "kept", "replace_last_layer=false", WITHOUT_RETRAINING)
    dense, untouched = kept[0], kept[1]
    assert {record.head for record in kept} == {"all"}
    assert untouched.accuracy_per_class == dense.accuracy_per_class == first[0].accuracy_per_class
    assert untouched.macs == dense.macs


@pytest.mark.slow
def test_class_agnostic_methods_remove_as_many_as_asked(first, shared):
    overall = job(shared, "overall", "pruning=ln_structured", "pruning.pruning_scope=global", WITHOUT_RETRAINING)
    prunable = overall[0].filters_prunable
    assert [record.filters_removed for record in overall[1:]] == [0, prunable // 2, prunable * 9 // 10]
    random = job(shared, "random", "pruning=random", WITHOUT_RETRAINING)
    widths = [width for layer, width in random[0].widths_dense.items() if layer not in random[0].layers_left_out]
    by_layer = [sum(width * tenths // 10 for width in widths) for tenths in (0, 5, 9)]
    assert [record.filters_removed for record in random[1:]] == by_layer


@pytest.mark.slow
def test_other_ratios_of_kept_scores_need_no_new_pass(first, shared, monkeypatch):
    ratios = "pruning.pruning_ratio=[0.3,0.7]"
    anew = job(shared, "anew", ratios, WITHOUT_RETRAINING)

    def fail(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(OCAP, "compute", fail)
    path = shared / "first" / "scores.npz"
    reused = job(shared, "reused", ratios, WITHOUT_RETRAINING, f"pruning.scores_path={path}")
    assert (shared / "reused" / "selections.json").read_bytes() == (shared / "anew" / "selections.json").read_bytes()
    assert [record.accuracy_per_class for record in reused] == [record.accuracy_per_class for record in anew]
    # What scoring cost is what it cost when it was done, and the scores go on from run to run.
    assert {record.scoring_seconds for record in reused[1:]} == {first[1].scoring_seconds}
    kept = shared / "reused" / "scores.npz"
    others = ["selected_classes=[8,9,3]", "model.skip_first_layers=2"]  # shape the use of the scores, not the scores
    job(shared, "again reused", ratios, *others, WITHOUT_RETRAINING, f"pruning.scores_path={kept}")
    skipped = read_json(shared / "again reused" / "selections.json")
    whole = read_json(shared / "anew" / "selections.json")
    assert "layer1.0.conv1" in whole[-1]["filters_removed"]
    assert [set(entry["filters_removed"]) for entry in skipped[1:]] == [
        set(entry["filters_removed"]) - {"layer1.0.conv1"} for entry in whole[1:]
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning=random", 'made with pruning.name="ocap", this run has "random"'),
        ("pruning.aggregation=frequency", 'pruning.aggregation="union", this run has "frequency"'),
        ("selected_classes=[1,2]", r"selected_classes=\[3, 8, 9\], this run has \[1, 2\]"),
        ("pruning.scoring_classes=all", 'pruning.scoring_classes="selected", this run has "all"'),
        ("num_pruning_samples=12", "num_pruning_samples=30, this run has 12"),
        ("training.epochs=1", "weights .sha256.="),
    ],
)
def test_scores_of_another_making_are_refused(first, shared, override, message):
    path = shared / "first" / "scores.npz"
    with pytest.raises(ConfigError, match=f"pruning.scores_path: .*{message}"):
        job(shared, "refused", override, f"pruning.scores_path={path}")
    assert not (shared / "refused" / "records.jsonl").exists()


def test_scores_that_lack_a_layer_are_refused(first, shared):
    job(shared, "short", "model.skip_first_layers=2", "pruning.pruning_ratio=0", WITHOUT_RETRAINING)
    with pytest.raises(ConfigError, match="has no scores of .*skip_first_layers"):
        job(shared, "refused", f"pruning.scores_path={shared / 'short' / 'scores.npz'}")


@pytest.mark.parametrize("content", [b"", b"no scores", "half", "foreign"])
def test_a_damaged_or_foreign_scores_file_is_refused(first, shared, tmp_path, content):
    path = tmp_path / "scores.npz"
    if content == "foreign":
        numpy.savez(path, conv1=numpy.zeros(3))
    else:
        whole = (shared / "first" / "scores.npz").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ConfigError, match="pruning.scores_path: .*is not the scores.npz of a run, or is damaged"):
        job(shared, "refused", f"pruning.scores_path={path}")


@pytest.mark.slow
def test_given_weights_on_cifar10s_own_files(tmp_path):
    write_cifar10(tmp_path / "data", images_per_class=8, seed=0)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "weights.pt")
    records = run_cifar10(tmp_path, "resnet18")
    assert [record.ratio for record in records] == [0.0, 0.0, 0.85]
    assert records[0].class_names == ("airplane", "automobile", "bird")


@pytest.mark.slow
def test_the_command_of_the_readme_on_vgg16(tmp_path):
    """`python main.py model=vgg16 dataset=cifar10 ... pruning.pruning_ratio="[0.85]" selected_classes=[0,1,2]`."""
    write_cifar10(tmp_path / "data", images_per_class=8, seed=0)
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16(num_classes=10).state_dict(), tmp_path / "weights.pt")
    records = run_cifar10(tmp_path, "vgg16")
    assert records[-1].filters_removed > 0 and records[-1].macs < records[0].macs


def run_cifar10(tmp_path: Path, model: str):
    overrides = [
        f"model={model}",
        "dataset=cifar10",
        f"dataset.root={tmp_path / 'data'}",
        "training.train=false",
        f"model.pretrained_weights_path={tmp_path / 'weights.pt'}",
        "pruning=ocap",
        "pruning.pruning_ratio=[0.85]",
        "selected_classes=[0,1,2]",
        "num_pruning_samples=6",
        WITHOUT_RETRAINING,
        "device=cpu",
        "latency.repeats=2",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run([sys.executable, str(MAIN), *overrides], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ocap | " + model in done.stdout
    assert not list((tmp_path / "cache").glob("*.pt"))  # nothing was trained, so nothing is kept
    return read_records(tmp_path / "run" / "records.jsonl")


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_job_that_fails(first, shared, tmp_path):
    """The dataset of the first job is not where it should be; the second needs no files."""
    places = [f"cache_dir={shared / 'cache'}", f"hydra.sweep.dir={tmp_path}", f"dataset.root={tmp_path}/none"]
    sweep = [WITHOUT_RETRAINING, "dataset=cifar10,digits"]
    command = [sys.executable, str(MAIN), "-m", *SMALL, *places, *sweep]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and f"{tmp_path}/none" in done.stderr
    (failed,), (done,) = tmp_path.glob("ocap-resnet18-cifar10-*"), tmp_path.glob("ocap-resnet18-digits-*")
    assert not (failed / "records.jsonl").exists() and f"{tmp_path}/none" in read_status(failed).reason
    assert len(read_records(done / "records.jsonl")) == 4
    (missing,) = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if failed.name in line]
    assert "failed: " in missing and f"{tmp_path}/none" in missing


def read_json(path: Path):
    return json.loads(path.read_text())
