"""Every torchvision family under every policy and pruner: the pruned network equals the masked one, or is refused.

The table in docs/removal.md is made here: `python -m tests.test_equality` writes it after a change.
"""

import functools
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from errors import BenchmarkError, ConfigError
from pruner import PRUNERS, get_pruner
from structure import RESIDUAL, ModelGraph
from tests.nets import SHAPE, Mixed, Plain, Residual, lively
from tests.oracles import masked
from tests.test_pruner import Small

TABLE = Path(__file__).resolve().parents[1] / "docs" / "removal.md"
FAMILIES = (
    *("alexnet", "vgg11", "vgg16", "vgg16_bn", "resnet18", "resnet34", "resnet50", "resnet101"),
    *("resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet", "inception_v3", "squeezenet1_0"),
    *("squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0"),
    *("shufflenet_v2_x1_0", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny"),
)
IN_A_MINUTE = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0")
WAYS = [(pruner, way) for way in RESIDUAL for pruner in PRUNERS if (pruner, way) != ("depgraph", "scatter")]
DRAWS = 3
UNKNOWN = ("depgraph", "shufflenet_v2_x1_0")  # torch-pruning fails on it, see the table


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    own = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = {"inception_v3": 75, "alexnet": 63}.get(name, 64)
    model = torchvision.models.get_model(name, num_classes=10, **own)
    for module in model.modules():  # a layer scale of 1e-6 would hide what a wrong slice does
        if hasattr(module, "layer_scale"):
            nn.init.uniform_(module.layer_scale, 0.5, 1.5)
    return lively(model), (3, size, size)


def draw(graph: ModelGraph, seed: int, share: float) -> dict[str, list[int]]:
    """A random subset of the filters of each layer, at least one staying; what is tied together goes together."""
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for layer in graph.prunable:
        lead = graph.streams[layer][0] if graph.residual == "coupled" else layer
        if layer == lead:
            width = graph.conv(layer).out_channels
            count = int(torch.randint(int(share * width) + 1, (1,), generator=generator))
            gone = torch.randperm(width, generator=generator)[: min(count, width - 1)]
            tied = graph.streams[layer] if graph.residual == "coupled" else (layer,)
            for other in tied if len(gone) else ():
                indices[other] = sorted(graph.channels.places(lead, other)[gone].tolist())
    return indices


def difference(graph: ModelGraph, pruner: str, indices: dict[str, list[int]], seed: int = 1) -> float:
    """Between the pruned and the masked outputs of two images, as a share of the largest; some filters do matter."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, *graph.input_shape, dtype=torch.float64, generator=generator)
    before = {name: value.clone() for name, value in graph.model.state_dict().items()}
    pruned = get_pruner(pruner, graph).prune(indices)
    assert all(torch.equal(before[name], value) for name, value in graph.model.state_dict().items())
    for layer in graph.prunable:
        width = graph.conv(layer).out_channels
        assert pruned.get_submodule(layer).weight.shape[0] == width - len(indices.get(layer, ()))
    with torch.no_grad():
        actual, dense = pruned(images), graph.model(images)
        with masked(graph, indices) as model:
            expected = model(images)
    assert sum(map(len, indices.values())) <= 5 or not torch.equal(dense, expected)  # a few may be without effect
    return float((actual - expected).abs().max() / expected.abs().max())


SMALL = {"small": (Small, (3, 32, 32)), "residual": (Residual, SHAPE), "plain": (Plain, SHAPE), "mixed": (Mixed, SHAPE)}


@functools.cache
def small_graph(name: str, residual: str) -> ModelGraph:
    torch.manual_seed(0)
    kind, shape = SMALL[name]
    return ModelGraph(lively(kind()), shape, residual)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_small_networks(name, seed, share):
    for pruner, residual in WAYS:
        graph = small_graph(name, residual)
        assert difference(graph, pruner, draw(graph, seed, share)) <= 1e-9


@pytest.mark.parametrize("residual", RESIDUAL)
@pytest.mark.parametrize("name", IN_A_MINUTE)
def test_torchvision_in_a_minute(name, residual):
    model, shape = network(name)
    graph = ModelGraph(model, shape, residual)
    for share in (0.5, 1.0):
        indices = draw(graph, 3, share)
        states = []
        for pruner in [pruner for pruner, way in WAYS if way == residual and (pruner, name) != UNKNOWN]:
            assert difference(graph, pruner, indices) <= 1e-9
            states.append(get_pruner(pruner, graph).prune(indices).state_dict())
        for state in states[1:]:
            assert state.keys() == states[0].keys()
            assert all(torch.equal(state[key], states[0][key]) for key in state)


def outcome(model: nn.Module, shape: tuple[int, int, int], pruner: str, residual: str) -> str:
    """`equal` with the share of convolutions that lost filters, or the reason for a refusal. Wrong is an error."""
    graph = ModelGraph(model, shape, residual)
    if not graph.prunable:
        return "refused: " + "; ".join(sorted(set(graph.left_out.values()), key=lambda why: (len(why), why))[:2])
    touched = set()
    for seed in range(DRAWS):
        indices = draw(graph, seed, (0.3, 0.7, 1.0)[seed])
        try:
            assert difference(graph, pruner, indices) <= 1e-9, (pruner, residual, seed)
        except BenchmarkError as error:
            return f"refused: {error}"
        touched.update(indices)
    return f"equal, {len(touched)} of {len(graph.convs)}"


def table(families: tuple[str, ...] = FAMILIES) -> str:
    heads = [f"{pruner}, {residual}" for pruner, residual in WAYS]
    lines = ["| network | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in families:
        model, shape = network(name)
        lines.append(f"| `{name}` | " + " | ".join(outcome(model, shape, *way) for way in WAYS) + " |")
    return "\n".join(lines) + "\n"


def stated() -> str:
    return "".join(line for line in TABLE.read_text().splitlines(keepends=True) if line.startswith("|"))


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_happens():
    assert stated() == table()


def test_scatter_needs_the_pruner_that_has_it():
    with pytest.raises(ConfigError, match="only pruning.pruner=structure"):
        get_pruner("depgraph", small_graph("residual", "scatter"))


if __name__ == "__main__":
    TABLE.write_text(TABLE.read_text().replace(stated(), table()) if stated() else TABLE.read_text() + table())
