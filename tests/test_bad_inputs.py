"""Files and folders that are not what they should be: each ends in one message and exit code 1, and nothing is lost.

What the configuration alone gets wrong is in test_command_line.py.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import torchvision

import report
from command_line import explain
from records import read_records
from run_status import read_status
from tests.formats import dump_python2, write_cifar10, write_fashion_mnist, write_idx
from tests.test_main import job
from tests.test_resume import figures

GIVEN = ("training.train=false", "pruning.pruning_ratio=[0.5]", "training.retrain_after_pruning=false")


class Opens:
    """A pickle that would write a file when it is read."""

    def __reduce__(self):
        return open, ("pickled_code_ran", "w")


def state():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).state_dict()


def text(path):
    path.write_text("no weights\n")


def code(path):
    path.write_bytes(pickle.dumps(Opens()))


def code_in_a_checkpoint(path):
    torch.save({"state_dict": state(), "config": Opens()}, path)


def half(path):
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_list(path):
    torch.save([1, 2, 3], path)


def other_names(path):
    torch.save({f"net.{name}.x": value for name, value in state().items()}, path)


def missing_layer(path):
    torch.save({name: value for name, value in state().items() if name != "layer3.0.conv1.weight"}, path)


def other_shape(path):
    torch.save(state() | {"fc.weight": torch.zeros(11, 512), "fc.bias": torch.zeros(11)}, path)


def nan(path):
    torch.save(state() | {"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, path)


def infinite(path):
    torch.save(state() | {"fc.bias": torch.full((10,), torch.inf)}, path)


def texts(path):
    torch.save(dict.fromkeys(state(), "weights"), path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write",
    [
        text,
        code,
        code_in_a_checkpoint,
        half,
        a_list,
        other_names,
        missing_layer,
        other_shape,
        nan,
        infinite,
        texts,
        empty,
    ],
)
def test_weights(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights.pt")
    refused(tmp_path, str(tmp_path / "weights.pt"), *GIVEN, f"model.pretrained_weights_path={tmp_path}/weights.pt")
    assert not (tmp_path / "pickled_code_ran").exists()


def batch_of(root: Path, **changes):
    """The first training batch, with other content."""
    path = root / "cifar-10-batches-py" / "data_batch_1"
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    dump_python2(path, content | {name: change(content[name]) for name, change in changes.items()})


def label_out_of_range(root):
    batch_of(root, labels=lambda labels: [10, *labels[1:]])


def negative_label(root):
    batch_of(root, labels=lambda labels: [-1, *labels[1:]])


def labels_of_another_kind(root):
    batch_of(root, labels=lambda labels: ["cat"] * len(labels))


def fewer_labels(root):
    batch_of(root, labels=lambda labels: labels[1:])


def floats(root):
    batch_of(root, data=lambda data: data.astype("float32") / 255)


def nan_images(root):
    batch_of(root, data=lambda data: numpy.full(data.shape, numpy.nan, "float32"))


def smaller_images(root):
    batch_of(root, data=lambda data: data[:, :3000])


def a_batch_is_missing(root):
    (root / "cifar-10-batches-py" / "data_batch_3").unlink()


def an_empty_batch(root):
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"")


def code_in_a_batch(root):
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Opens()))


def a_folder_in_its_place(root):
    path = root / "cifar-10-batches-py" / "data_batch_4"
    path.unlink()
    path.mkdir()


def a_class_without_images(root):
    for path in (root / "cifar-10-batches-py").glob("data_batch_*"):
        content = pickle.loads(path.read_bytes(), encoding="latin1")
        dump_python2(path, content | {"labels": [label or 1 for label in content["labels"]]})


@pytest.mark.parametrize(
    "damage",
    [label_out_of_range, negative_label, labels_of_another_kind, fewer_labels, floats, nan_images, smaller_images,
     a_batch_is_missing, an_empty_batch, code_in_a_batch, a_folder_in_its_place, a_class_without_images],
)  # fmt: skip
def test_cifar10_files(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "data", images_per_class=10)
    damage(tmp_path / "data")
    refused(tmp_path, "", "dataset=cifar10", f"dataset.root={tmp_path}/data", "selected_classes=[0,1,2]")
    assert not (tmp_path / "pickled_code_ran").exists()


def idx_of_floats(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 13, 3]) + path.read_bytes()[4:])


def idx_without_its_magic_number(raw):
    path = raw / "train-labels-idx1-ubyte"
    path.write_bytes(b"\xff" * 4 + path.read_bytes()[4:])


def idx_of_other_labels(raw):
    write_idx(raw / "t10k-labels-idx1-ubyte", numpy.full(30, 200, numpy.uint8))


def idx_of_larger_images(raw):
    write_idx(raw / "t10k-images-idx3-ubyte", numpy.zeros((30, 29, 29), numpy.uint8))


def no_test_images(raw):
    (raw / "t10k-images-idx3-ubyte").unlink()


@pytest.mark.parametrize(
    "damage", [idx_of_floats, idx_without_its_magic_number, idx_of_other_labels, idx_of_larger_images, no_test_images]
)
def test_fashion_mnist_files(damage, tmp_path):
    write_fashion_mnist(tmp_path / "data")
    damage(tmp_path / "data" / "FashionMNIST" / "raw")
    refused(tmp_path, "", "dataset=fashion_mnist", f"dataset.root={tmp_path}/data")


def refused(tmp_path: Path, named: str, *overrides: str) -> None:
    """The run ends with one message that names the file, which is also the reason in its status; nothing is kept."""
    with pytest.raises(Exception) as caught:  # noqa: B017 - `explain` knows which are meant for users
        job(tmp_path, "run", *overrides)
    message = explain(caught.value)
    assert message is not None and "\n" not in message and named in message and len(message) < 1000
    status = read_status(tmp_path / "run")
    assert status.state == "failed" and status.reason == " ".join(message.split())
    assert not (tmp_path / "run" / "records.jsonl").exists()
    assert not list((tmp_path / "cache").glob("*"))  # and nothing expensive was begun


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    job(folder, "run", "training.retrain_after_pruning=false")
    return folder


def test_a_disk_that_is_full_from_the_beginning(whole, small_disk):
    (small_disk / "filler").write_bytes(bytes(64 * 1024))
    with pytest.raises(Exception) as caught:  # noqa: B017
        job(whole, str(small_disk / "run"), "seed=5")
    assert "No space left" in explain(caught.value) and "\n" not in explain(caught.value)


def test_a_disk_that_gets_full_keeps_what_was_measured(whole, small_disk):
    with pytest.raises(Exception) as caught:  # noqa: B017
        job(whole, str(small_disk / "run"), "training.retrain_after_pruning=false")
    assert "No space left" in explain(caught.value)
    for record in read_records(small_disk / "run" / "records.jsonl"):
        assert record.accuracy >= 0
    assert not list(small_disk.rglob("*.partial"))


def test_a_disk_that_takes_no_writing(whole, read_only_disk):
    for place in ("run", "sweep/run"):
        with pytest.raises(Exception) as caught:  # noqa: B017
            job(whole, str(read_only_disk / place), "seed=6")
        message = explain(caught.value)
        assert "Read-only file system" in message and str(read_only_disk) in message and "\n" not in message


@pytest.mark.slow
def test_a_cache_that_takes_no_writing_costs_warnings(whole, tmp_path, read_only_disk, caplog):
    records = job(tmp_path, "run", f"cache_dir={read_only_disk}/cache", "training.retrain_after_pruning=false")
    assert records == read_records(tmp_path / "run" / "records.jsonl")
    assert figures(records) == figures(read_records(whole / "run" / "records.jsonl"))
    for kind in ("Dense model", "Scores", "Answers of the dense model"):
        assert f"{kind} not kept, the next run makes it again: {read_only_disk}/cache/" in caplog.text


def test_a_folder_that_is_a_file(whole, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for place in ("taken", "taken/run"):
        with pytest.raises(Exception) as caught:  # noqa: B017
            job(whole, str(tmp_path / place))
        assert "taken" in explain(caught.value)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_warning(whole, tmp_path, small_disk, caplog):
    (small_disk / "filler").write_bytes(bytes(64 * 1024))
    records = job(tmp_path, "run", f"cache_dir={small_disk}/cache", "training.retrain_after_pruning=false")
    assert len(records) == len(read_records(whole / "run" / "records.jsonl"))
    assert "Dense model not kept" in caplog.text and "Scores not kept" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x00" * 500, b"{}\n", b"null\n[]\n3\n", b'{"schema": 99}\n', b"\xff\xfe\n"])
def test_records_that_are_none(content, tmp_path, capsys):
    (tmp_path / "records.jsonl").write_bytes(content)
    assert report.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "not one whole record" in said.err and "Traceback" not in said.err
    assert (tmp_path / "records.jsonl").read_bytes() == content


def test_folders_that_hold_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        assert report.main([str(folder)]) == 1 and report.main([str(folder), "--status"]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_companions_cost_no_record(whole, tmp_path, capsys):
    for name in ("selections.json", "environment.json", "status.json"):
        folder = tmp_path / name
        shutil.copytree(whole / "run", folder)
        (folder / name).write_bytes(b"\x00damaged")
        assert report.main([str(folder)]) == 0
    assert "Traceback" not in capsys.readouterr().err
