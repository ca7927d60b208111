"""A saved network is the network: bit for bit in a new process, and nothing else is read as one."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import BenchmarkError
from export import STRUCTURE, load_pruned_model, read_structure, save_pruned_model, structure_of
from filter_selection import get_criterion
from models import ARCHITECTURES, get_model, replace_head
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 32, 32)
CLASSES = [7, 2, 4]
# Architecture -> policy: all three, with and without channels_last.
POLICIES = {"vgg16": "skip", "vgg16_bn": "skip", "resnet18": "scatter", "resnet50": "coupled", "mobilenet_v2": "skip"}


def pruned_network(name: str, residual: str) -> torch.nn.Module:
    dense = get_model(name, 10)
    if residual != "skip":
        dense = dense.to(memory_format=torch.channels_last)
    graph = ModelGraph(dense, SHAPE, residual)
    [indices] = PruningSelection(get_criterion("ln_structured"), (0.8,), SHAPE).select(graph).values()
    return replace_head(get_pruner("structure", graph).prune(indices), CLASSES)


def save(path: Path, model: torch.nn.Module, name: str) -> None:
    names = [f"class {index}" for index in CLASSES]
    facts = {"architecture": name, "num_classes": 10, "small_input_stem": False, "input_shape": SHAPE}
    facts |= {"mean": (0.5, 0.4, 0.3), "std": (0.25,) * 3, "provenance": {"ratio": 0.8}}
    save_pruned_model(path, model, structure_of(model, class_names=names, class_indices=CLASSES, **facts))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def resnet(folder) -> tuple[torch.nn.Module, Path]:
    model = pruned_network("resnet18", "scatter")
    save(folder / "resnet18.npz", model, "resnet18")
    return model, folder / "resnet18.npz"


LARGE = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "vgg16", "vgg16_bn")
]  # up to half a gigabyte


@pytest.mark.parametrize("name", [*sorted(ARCHITECTURES.keys() - {"vgg16", "vgg16_bn", "resnet50"}), *LARGE])
def test_a_new_process_computes_the_same_bits(name, tmp_path):
    model = pruned_network(name, POLICIES[name])
    save(tmp_path / "network.npz", model, name)
    program = (
        "import sys, torch; from export import load_pruned_model; model = load_pruned_model(sys.argv[1]); "
        "torch.save([model.state_dict(), model(torch.load(sys.argv[2])).detach()], sys.argv[3])"
    )
    torch.save(images(), tmp_path / "images.pt")
    files = [str(tmp_path / file) for file in ("network.npz", "images.pt", "outputs.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number rounds otherwise
    subprocess.run([sys.executable, "-c", program, *files], check=True, cwd=ROOT, env=environment)
    state, outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        assert torch.equal(outputs, model(images()))
    ours = model.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(state[key], ours[key]) for key in ours)
    structure = read_structure(tmp_path / "network.npz")
    assert structure.class_names == ("class 7", "class 2", "class 4") and structure.class_indices == (7, 2, 4)
    assert structure.input_shape == SHAPE and structure.provenance == {"ratio": 0.8}
    assert all(model.get_submodule(layer).out_channels == width for layer, width in structure.widths.items())
    dense = sum(parameter.numel() for parameter in get_model(name, 10).parameters()) * 4
    assert (tmp_path / "network.npz").stat().st_size < 0.7 * dense


def test_a_loaded_network_can_be_trained(resnet):
    model = load_pruned_model(resnet[1]).train()
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/a_pickle_ran_code",)


def rewritten(path: Path, change) -> bytes:
    """The archive with its arrays changed by `change(arrays)`."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def change_structure(**values):
    def change(arrays):
        text = json.loads(str(arrays[STRUCTURE])) | values
        arrays[STRUCTURE] = np.array(json.dumps(text))

    return change


def replace_array(name: str, value):
    return lambda arrays: arrays.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layer1.0.bn1.bias"), "layer1.0.bn1.bias is missing"),
        (replace_array("spy.weight", np.zeros(3)), "spy.weight is no weight of resnet18"),
        (replace_array("fc.bias", np.zeros(11, np.float32)), r"fc.bias is \[11\] in the file, \[10\] when dense"),
        (replace_array("conv1.weight", np.zeros((2, 3, 3, 3), np.float32)), "strides .* are no layout of"),
        (replace_array("bn1.bias", np.zeros(2, np.float32)), "do not fit"),
        (replace_array("fc.bias", np.array([Malicious()] * 3)), "is no saved network .*Object arrays"),
        (change_structure(architecture="lenet"), "architecture 'lenet' is none of"),
        (change_structure(class_names=["one"]), "class_names and class_indices do not fit"),
        (change_structure(mean=[0.5]), "mean and std do not fit"),
        (replace_array("fc.bias", np.full(3, np.nan, np.float32)), "fc.bias is not finite"),
        (lambda arrays: arrays.update({n: a[::-1] for n, a in arrays.items() if ".sources" in n}), "in the order"),
        (change_structure(format=99), "it is of another version"),
        (change_structure(surprise=1), "its structure is not whole"),
        (change_structure(strides={"conv1.weight": [2**40, 1, 1, 1]}), "are no layout of"),
        (change_structure(class_names=["one"], class_indices=[7]), r"\(1, 3\) logits for 1 classes"),
        (change_structure(widths={"conv1": 1}), "the widths are others"),
        (lambda arrays: arrays.pop(STRUCTURE), "is no saved network"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(resnet, tmp_path, change, message):
    (tmp_path / "network.npz").write_bytes(rewritten(resnet[1], change))
    with pytest.raises(BenchmarkError, match=f"network.npz: .*{message}"):
        load_pruned_model(tmp_path / "network.npz")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(resnet, tmp_path, share):
    whole = resnet[1].read_bytes()
    (tmp_path / "network.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BenchmarkError, match="network.npz: is no saved network of this benchmark, or is damaged"):
        load_pruned_model(tmp_path / "network.npz")


def test_a_changed_byte_is_noticed(resnet, tmp_path):
    whole = bytearray(resnet[1].read_bytes())
    with zipfile.ZipFile(resnet[1]) as archive:
        place = max(archive.infolist(), key=lambda info: info.file_size)
    whole[place.header_offset + place.file_size // 2] ^= 1
    (tmp_path / "network.npz").write_bytes(whole)
    with pytest.raises(BenchmarkError, match="is damaged"):
        load_pruned_model(tmp_path / "network.npz")


def test_no_pickle_is_read(resnet, tmp_path):
    for content in (pickle.dumps(Malicious()), pickle.dumps(resnet[0].state_dict())):
        (tmp_path / "network.npz").write_bytes(content)
        with pytest.raises(BenchmarkError, match="is no saved network"):
            load_pruned_model(tmp_path / "network.npz")
    torch.save(Malicious(), tmp_path / "network.pt")
    with pytest.raises(BenchmarkError, match="is no saved network"):
        load_pruned_model(tmp_path / "network.pt")
    assert not Path("/tmp/a_pickle_ran_code").exists()


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(BenchmarkError, match="none.npz: cannot be read .No such file"):
        load_pruned_model(tmp_path / "none.npz")
