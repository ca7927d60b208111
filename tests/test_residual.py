"""Filters that a residual add holds in place: left alone, chosen together, or put back; and widths in multiples."""

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.selection import cases
from costs import count_macs
from errors import BenchmarkError, ConfigError
from filter_selection import REGISTRY, get_criterion
from filter_selection.base import Criterion
from helpers import share_of
from pruner import get_pruner
from selection import PruningSelection
from structure import RESIDUAL, ModelGraph
from tests.nets import SHAPE, Residual, batches, images_and_labels, lively


class Given(Criterion):
    """Scores that the test gives."""

    name, needs_data = "given", False

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def compute(self, graph, layers, batches):
        return {layer: torch.tensor(self.scores[layer]) for layer in layers}


@pytest.fixture(scope="module")
def graphs():
    model = lively(Residual())
    return {residual: ModelGraph(model, SHAPE, residual) for residual in RESIDUAL}


@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(0)
    return {name: getattr(torchvision.models, name)(num_classes=10).eval() for name in ("resnet18", "resnet50")}


def test_which_layers_each_policy_prunes(graphs):
    assert graphs["skip"].prunable == ("stem", "conv1")
    assert graphs["coupled"].prunable == graphs["scatter"].prunable == ("stem", "conv1", "conv2", "shortcut")
    assert graphs["coupled"].streams == {
        "stem": ("stem",), "conv1": ("conv1",), "conv2": ("conv2", "shortcut"), "shortcut": ("conv2", "shortcut"),
    }  # fmt: skip
    assert graphs["scatter"].put_back == {"conv2": "bn2", "shortcut": "shortcut"}


# conv2 and shortcut are added to each other. Mean sizes 2 and 20: divided by them, the two speak equally loud.
SCORES = {"stem": [1.0] * 6, "conv1": [1.0] * 5,
          "conv2": [1.0, 2, 4, 2, 2, 1, 2], "shortcut": [20.0, 5, 40, 15, 20, 10, 30]}  # fmt: skip
NORMALISED = {"mean": [0.75, 0.625, 2, 0.875, 1, 0.5, 1.25], "sum": [1.5, 1.25, 4, 1.75, 2, 1, 2.5],
              "max": [1, 1, 2, 1, 1, 0.5, 1.5]}  # fmt: skip


@pytest.mark.parametrize("how", NORMALISED)
def test_combined_scores_by_hand(graphs, how):
    values = [torch.tensor(SCORES[layer]) for layer in ("conv2", "shortcut")]
    combined = Given(SCORES).combine(values, how)
    assert torch.allclose(combined, 11 * torch.tensor(NORMALISED[how], dtype=torch.float64))


@pytest.mark.parametrize(("how", "gone"), [("mean", [0, 1, 5]), ("sum", [0, 1, 5]), ("max", [0, 1, 5])])
def test_layers_on_one_stream_lose_the_same_filters(graphs, how, gone):
    selection = PruningSelection(Given(SCORES), (0.5,), SHAPE, coupled_scores=how)
    chosen = selection.select(graphs["coupled"])[0.5]
    assert chosen["conv2"] == chosen["shortcut"] == gone
    assert chosen["conv1"] == [0, 1] and chosen["stem"] == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), scope=st.sampled_from(["layer", "global"]), round_to=st.integers(1, 4), floor=st.integers(1, 3))
def test_any_coupled_selection_can_be_removed(graphs, data, scope, round_to, floor):
    graph = graphs["coupled"]
    width = {layer: graph.conv(layer).out_channels for layer in graph.prunable}
    values = st.floats(-10, 10, allow_nan=False)
    scores = {layer: data.draw(st.lists(values, min_size=size, max_size=size)) for layer, size in width.items()}
    ratio = data.draw(st.integers(300, 999)) / 1000
    selection = PruningSelection(Given(scores), (ratio,), SHAPE, scope=scope, round_to=round_to, min_filters=floor)
    try:
        [indices] = selection.select(graph).values()
    except ConfigError as error:
        assert "removes no filter" in str(error)
        return
    get_pruner("structure", graph).prune(indices)
    for layer, filters in indices.items():
        kept = width[layer] - len(filters)
        assert kept >= min(floor, width[layer]) and kept % round_to == 0
        assert scope == "global" or len(filters) <= share_of(ratio, width[layer])


@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("residual", RESIDUAL)
def test_every_method_under_every_policy(graphs, name, residual):
    graph = graphs[residual]
    criterion = get_criterion(name)
    selection = PruningSelection(
        criterion, (0.5, 0.999), SHAPE, batches(*images_and_labels(6)), scope=criterion.scopes[-1]
    )
    for ratio, indices in selection.select(graph).items():
        pruned = get_pruner("structure", graph).prune(indices)  # checked against masking
        for layer in graph.prunable:
            removed = graph.conv(layer).out_channels - pruned.get_submodule(layer).out_channels
            assert removed == len(indices.get(layer, ()))
            assert criterion.scopes[-1] == "global" or not criterion.exact or ratio != 0.5 or removed


def test_a_part_of_a_stream_cannot_go_alone(graphs):
    with pytest.raises(BenchmarkError, match="shortcut: its filter 3 is tied to one that is to go.*conv2, shortcut"):
        get_pruner("structure", graphs["coupled"]).prune({"conv2": [3]})


def test_a_stream_with_a_skipped_layer_stays_whole(graphs):
    selection = PruningSelection(Given(SCORES), (0.5,), SHAPE, skip_first_layers=3)
    assert selection.left_out(graphs["coupled"])["shortcut"] == "tied to conv2, which is left out"
    with pytest.raises(ConfigError, match="leaves no convolution to prune"):
        selection.select(graphs["coupled"])


def test_ranks_cannot_be_summed():
    with pytest.raises(ConfigError, match="pruning.coupled_scores: 'sum'.*ocap; valid: max, mean"):
        PruningSelection(get_criterion("ocap"), (0.5,), SHAPE, coupled_scores="sum")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("pruner", ["depgraph", "structure"])
def test_coupled_reaches_half_of_the_macs(resnets, name, pruner):
    shape = (3, 64, 64)
    graph = ModelGraph(resnets[name], shape, "coupled")
    [indices] = PruningSelection(get_criterion("ln_structured"), (0.5,), shape).select(graph).values()
    pruned, difference = get_pruner(pruner, graph).prune_and_prove(indices)
    assert difference < 1e-4
    assert count_macs(pruned, shape).macs <= 0.5 * count_macs(graph.model, shape).macs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_widths_are_multiples(resnets, name):
    graph = ModelGraph(resnets[name], (3, 64, 64), "coupled")
    criterion = get_criterion("ln_structured")
    plain, rounded = (
        PruningSelection(criterion, (0.3, 0.7), (3, 64, 64), round_to=multiple, scope="global").select(graph)
        for multiple in (1, 8)
    )
    for ratio, indices in rounded.items():
        for layer, filters in indices.items():
            kept = graph.conv(layer).out_channels - len(filters)
            before = graph.conv(layer).out_channels - len(plain[ratio][layer])
            assert kept == math.ceil(before / 8) * 8
            assert set(filters) <= set(plain[ratio][layer])


def test_a_shortfall_is_said(graphs):
    selection = PruningSelection(Given(SCORES), (0.5,), SHAPE, round_to=4)
    [indices] = selection.select(graphs["coupled"]).values()
    assert {layer: len(filters) for layer, filters in indices.items()} == {
        "stem": 2, "conv1": 1, "conv2": 3, "shortcut": 3,
    }  # fmt: skip
    assert selection.shortfall(graphs["coupled"], 0.5, indices) == (
        "9 filters go at ratio 0.5, which asks for 11: pruning.min_filters=1 and a multiple of pruning.round_to=4 stay"
    )


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["skip", "coupled"])
@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_every_method_to_the_last_filter(name, residual):
    """ResNet18 and VGG16, all methods, ratios to 0.999: every prune ends in a working model."""
    torch.manual_seed(0)
    shape, ratios = (3, 32, 32), (0.3, 0.6, 0.9, 0.99, 0.999)
    graph = ModelGraph(getattr(torchvision.models, name)(num_classes=4).eval(), shape, residual)
    images, labels = images_and_labels(6, shape=shape)
    for method, options in cases(sorted(REGISTRY)):
        criterion = get_criterion(method, options)
        try:
            selection = PruningSelection(criterion, ratios, shape, batches(images.float(), labels))
            selected = selection.select(graph)
        except BenchmarkError as error:
            assert "finds no BatchNorm" in str(error) and name == "vgg16"
            continue
        for ratio, indices in selected.items():
            pruned = get_pruner("depgraph" if ratio == 0.999 else "structure", graph).prune(indices)
            assert pruned(images.float()).isfinite().all()
            if criterion.exact:
                assert sum(map(len, indices.values())) > 0
            if ratio == 0.999 and criterion.exact and selection.scope == "layer":
                assert all(pruned.get_submodule(layer).out_channels == 1 for layer in graph.prunable)
