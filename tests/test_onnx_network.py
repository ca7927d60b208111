"""What is exported computes what PyTorch computes, or is not used: by the first exporter, the second, or neither."""

import logging

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import onnx_network
from errors import BenchmarkError
from filter_selection import get_criterion
from models import get_model, replace_head
from onnx_network import PARITY_WITHIN, OnnxNetwork, export_onnx, exported
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def pooled(self, x):
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x):
        return self.fc(self.pooled(x))


class Singular(Small):
    """An operation that ONNX does not have."""

    def forward(self, x):
        return self.fc(torch.linalg.svdvals(self.conv(x).flatten(2)))


class Branching(Small):
    """A condition on the data: the one exporter refuses it, the other follows the branch of the images it is shown."""

    def forward(self, x):
        pooled = self.pooled(x)
        return self.fc(2 * pooled if x.sum() > 0 else pooled)


class NeverBranching(Small):
    """A condition that always comes out the same: what the second exporter makes is right."""

    def forward(self, x):
        pooled = self.pooled(x)
        return self.fc(2 * pooled if float(pooled.sum()) < -1 else pooled)


def pruned_network(name, residual="skip"):
    graph = ModelGraph(get_model(name, 10), SHAPE, residual)
    [indices] = PruningSelection(get_criterion("ln_structured"), (0.8,), SHAPE).select(graph).values()
    return replace_head(get_pruner("structure", graph).prune(indices), [7, 2, 4])


@pytest.fixture(scope="module")
def resnet():
    return pruned_network("resnet18", "scatter")


def images(count, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def assert_same(model, content, batches=(1, 4, 7), shape=SHAPE):
    """Against ONNX Runtime as anyone would call it, on other images and batch sizes than the export compared."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in batches:
        (logits,) = session.run(["logits"], {"images": images(count, shape).numpy()})
        with torch.no_grad():
            expected = model(images(count, shape))
        difference = (torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-4


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "vgg16"))]
)
@pytest.mark.parametrize("exporter", ["current", "legacy"])
def test_pruned_networks_compute_the_same_for_any_batch(name, exporter, monkeypatch):
    model = pruned_network(name)
    monkeypatch.setattr(onnx_network, "EXPORTERS", {exporter: onnx_network.EXPORTERS[exporter]})
    # The earlier exporter lacks a pooling to more pixels than there are, which VGG does with images of 32 pixels.
    shape = (3, 224, 224) if (name, exporter) == ("vgg16", "legacy") else SHAPE
    made = exported(model, shape)
    assert made.exporter == exporter and made.difference <= PARITY_WITHIN and made.refused == ()
    assert_same(model, made.content, shape=shape)


def test_a_network_whose_outputs_are_put_back_is_exported_in_one_file(resnet, tmp_path):
    made = export_onnx(tmp_path / "network.onnx", resnet, SHAPE)
    assert made.exporter == "current"
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    assert (tmp_path / "network.onnx").read_bytes() == made.content
    graph = onnx.load(tmp_path / "network.onnx", load_external_data=False).graph
    assert not any(tensor.external_data for tensor in graph.initializer)
    assert_same(resnet, made.content)


def test_an_operation_that_onnx_lacks_falls_back_to_pytorch(capfd):
    with pytest.raises(BenchmarkError) as refused:
        exported(Singular().eval(), (3, 8, 8))
    assert "the current exporter: No ONNX function found" in str(refused.value)
    assert "the legacy exporter: " in str(refused.value) and "linalg_svdvals" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")  # neither exporter may talk to the user itself


def test_a_branch_that_depends_on_data_is_caught_by_the_comparison():
    with pytest.raises(BenchmarkError, match="current exporter: Could not guard .*legacy exporter: its outputs differ"):
        exported(Branching().eval(), (3, 8, 8))


def test_a_branch_that_only_the_given_images_take_is_caught():
    class Rare(Small):
        def forward(self, x):
            pooled = self.pooled(x)
            return self.fc(2 * pooled if x.mean() > 3 else pooled)

    model = Rare().eval()
    assert exported(model, (3, 8, 8)).exporter == "legacy"  # nothing random comes so far
    with pytest.raises(BenchmarkError, match="its outputs differ"):
        exported(model, (3, 8, 8), images=torch.full((5, 3, 8, 8), 4.0))


def test_the_second_exporter_serves_where_the_first_fails():
    made = exported(NeverBranching().eval(), (3, 8, 8))
    assert made.exporter == "legacy"
    assert len(made.refused) == 1 and "the current exporter: Could not guard" in made.refused[0]
    assert made.difference <= PARITY_WITHIN


def test_an_export_that_computes_something_else_is_refused(resnet, tmp_path, monkeypatch):
    other, real = pruned_network("resnet18"), onnx_network.EXPORTERS["current"]
    monkeypatch.setattr(onnx_network, "EXPORTERS", {"current": lambda model, example: real(other, example)})
    with pytest.raises(BenchmarkError, match="network.onnx: cannot be exported .*its outputs differ from PyTorch's by"):
        export_onnx(tmp_path / "network.onnx", resnet, SHAPE)
    assert not (tmp_path / "network.onnx").exists()


def test_outputs_that_are_not_numbers_are_refused(monkeypatch):
    real, broken = onnx_network.EXPORTERS["current"], Small().eval()
    with torch.no_grad():
        broken.fc.bias[0] = float("nan")
    monkeypatch.setattr(onnx_network, "EXPORTERS", {"current": lambda model, example: real(broken, example)})
    with pytest.raises(BenchmarkError, match="differ from PyTorch's by inf"):
        exported(Small().eval(), (3, 8, 8))


def test_exporting_leaves_the_model_and_the_logs_alone(capfd, caplog):
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    exported(model, (3, 8, 8))
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_a_session_runs_as_a_module_and_bound_to_a_batch():
    model = Small().eval()
    content = exported(model, (3, 8, 8)).content
    network = OnnxNetwork(content, CPU, threads=1)
    assert network.provider == "CPUExecutionProvider"
    assert network.session.get_session_options().intra_op_num_threads == 1
    batch = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(network(batch), model(batch), atol=1e-5)
    network.bound(batch)()


def test_what_is_no_onnx_file_is_one_message():
    with pytest.raises(BenchmarkError, match="ONNX Runtime cannot load the network"):
        OnnxNetwork(b"no onnx", CPU, threads=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_provider_is_cudas_where_there_is_one():
    content = exported(Small().eval(), (3, 8, 8)).content
    network = OnnxNetwork(content, torch.device("cuda"), threads=1)
    assert (network.provider == "CUDAExecutionProvider") == (
        "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    )
