"""OCAP against what its paper says, image by image and ratio by ratio."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from errors import ConfigError
from filter_selection import get_criterion
from filter_selection.ocap import ranks_of
from structure import ModelGraph
from tests.nets import NETS, SHAPE, Plain, Residual, batches, images_and_labels, lively

RATIOS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999]
ACTIVATIONS = {
    "leaky_relu": lambda response: torch.where(response > 0, response, 0.01 * response),
    "relu": lambda response: response.clamp(min=0),
    "identity": lambda response: response,
}


def naive_strengths(model, taps, images, activation):
    """Per image: layer -> L2 norm over H and W of each filter's activated response, read by hooks, one image a pass."""
    found = []
    for image in images:
        norms = {}

        def read(layer, norms=norms):
            def hook(module, inputs, output):
                norms[layer] = [float(plane.norm()) for plane in activation(output.clone())[0]]

            return hook

        handles = [model.get_submodule(module).register_forward_hook(read(layer)) for layer, module in taps.items()]
        with torch.no_grad():
            model(image[None])
        for handle in handles:
            handle.remove()
        found.append(norms)
    return found


def naive_selection(strengths, ratio, aggregation):
    """METHODS 2 and 3, with sets: what every image removes; or what the fewest images keep."""
    chosen = {}
    for layer in strengths[0]:
        filters = len(strengths[0][layer])
        count = min(math.floor(filters * ratio + 1e-9), filters - 1)
        removed = []
        for norms in strengths:
            order = sorted(range(filters), key=lambda index, values=norms[layer]: (values[index], index))
            removed.append(set(order[:count]))
        if aggregation == "union":
            gone = set.intersection(*removed)
        else:
            kept = [sum(index not in votes for votes in removed) for index in range(filters)]
            gone = set(sorted(range(filters), key=lambda index: (kept[index], index))[:count])
        if gone:
            chosen[layer] = sorted(gone)
    return chosen


@pytest.fixture(scope="module")
def references():
    images, _ = images_and_labels()
    models = {net: lively(build()) for net, (build, _) in NETS.items()}
    return {
        (net, name): naive_strengths(models[net], NETS[net][1], images, activation)
        for net in NETS
        for name, activation in ACTIVATIONS.items()
    }


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("aggregation", ["union", "frequency"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("net", NETS)
def test_indices_are_those_of_the_paper(references, net, activation, aggregation, batch_size):
    graph = ModelGraph(lively(NETS[net][0]()), SHAPE)
    criterion = get_criterion("ocap", {"activation_func": activation, "aggregation": aggregation})
    scores = criterion.score(graph, tuple(NETS[net][1]), batches(*images_and_labels(), batch_size))
    reference = references[net, activation]
    expected = {ratio: naive_selection(reference, ratio, aggregation) for ratio in RATIOS}
    assert {ratio: criterion.select(scores, ratio) for ratio in RATIOS} == expected
    assert any(expected.values())  # else the equality would be empty


def test_union_removes_no_more_than_asked_and_less_with_more_images(references):
    strengths = references["residual", "leaky_relu"]
    graph = ModelGraph(lively(Residual()), SHAPE)
    criterion = get_criterion("ocap")
    removed = []
    for count in (1, 4, 13):
        scores = criterion.score(graph, graph.convs, batches(*images_and_labels(count)))
        removed.append(sum(map(len, criterion.select(scores, 0.6).values())))
    assert removed[0] == sum(math.floor(0.6 * width) for width in (6, 5, 7, 7))
    assert removed[0] > removed[1] >= removed[2]
    assert naive_selection(strengths, 0.6, "union") == criterion.select(scores, 0.6)


def test_negative_slope_reaches_the_activation():
    graph = ModelGraph(lively(Residual()), SHAPE)
    data = batches(*images_and_labels())
    scores = {
        slope: get_criterion("ocap", {"negative_slope": slope}).score(graph, ("conv1",), data)["conv1"].tolist()
        for slope in (0.0, 1.0)
    }
    same = {
        name: get_criterion("ocap", {"activation_func": name}).score(graph, ("conv1",), data)["conv1"].tolist()
        for name in ("relu", "identity")
    }
    assert scores == {0.0: same["relu"], 1.0: same["identity"]}
    assert scores[0.0] != scores[1.0]


@pytest.mark.parametrize("aggregation", ["union", "frequency"])
def test_the_floor_holds_and_counts_before_the_vote(aggregation):
    graph = ModelGraph(lively(Plain()), SHAPE)
    criterion = get_criterion("ocap", {"aggregation": aggregation})
    scores = criterion.score(graph, graph.prunable, batches(*images_and_labels(1)))
    for floor in (1, 3, 5, 8, 20):
        chosen = criterion.select(scores, 0.999, min_filters=floor)
        kept = {layer: len(values) - len(chosen.get(layer, ())) for layer, values in scores.items()}
        assert kept == {layer: min(len(values), max(floor, 1)) for layer, values in scores.items()}


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_ranks_are_positions_with_ties_by_index(rows):
    expected = []
    for row in rows:
        order = sorted(range(4), key=lambda index, row=row: (row[index], index))
        expected.append([order.index(index) for index in range(4)])
    assert ranks_of(torch.tensor(rows, dtype=torch.float64)).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_func": "tanh"}, "pruning.activation_func: 'tanh' is unknown; valid: leaky_relu, relu, identity"),
        ({"aggregation": "mean"}, "pruning.aggregation: 'mean' is unknown; valid: union, frequency"),
    ],
)
def test_unknown_words_are_refused_with_the_key(options, message):
    with pytest.raises(ConfigError, match=message):
        get_criterion("ocap", options)


def test_it_is_for_the_selected_classes_and_per_layer():
    criterion = get_criterion("ocap")
    assert criterion.class_aware and criterion.needs_data and criterion.scopes == ("layer",)
    assert get_criterion("ocap").nested and not get_criterion("ocap", {"aggregation": "frequency"}).nested
    assert F.leaky_relu(torch.tensor(-1.0), 0.01) == ACTIVATIONS["leaky_relu"](torch.tensor(-1.0))
