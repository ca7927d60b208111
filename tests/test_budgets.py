"""Sizes worked out from the graph against networks that are built, and ratios found against every ratio there is."""

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets import LARGEST, ShapeCosts, find_ratios, removed_share
from costs import count_macs, count_parameters
from filter_selection import REGISTRY, get_criterion
from models import build, replace_head
from pruner import get_pruner
from record_checks import TOLERANCE
from selection import PruningSelection
from structure import ModelGraph
from tests.nets import SHAPE as SMALL
from tests.nets import Mixed, Plain, Residual, images_and_labels, lively

SHAPE = (3, 32, 32)
METHODS = sorted(REGISTRY)


def built(graph: ModelGraph, indices, classes):
    """MACs and parameters counted in the network itself."""
    pruner = "structure" if graph.residual == "scatter" else "depgraph"
    model = get_pruner(pruner, graph).prune(indices)
    model = model if classes is None else replace_head(model, range(classes))
    return count_macs(model, graph.input_shape).macs, count_parameters(model)


def assert_as_built(graph: ModelGraph, indices, classes=None) -> None:
    left = ShapeCosts(graph, classes).left(indices)
    assert (left.macs, left.params) == built(graph, indices, classes)


def some(graph: ModelGraph, ratio: float, seed: int = 0):
    return PruningSelection(get_criterion("random", seed=seed), (ratio,), graph.input_shape).select(graph)[ratio]


NETS = {
    (kind.__name__, residual): ModelGraph(lively(kind()), SMALL, residual)
    for kind in (Plain, Residual, Mixed)
    for residual in ("skip", "coupled", "scatter")
}


@pytest.mark.parametrize("net", NETS, ids=" ".join)
@given(ratio=st.integers(26, 99), seed=st.integers(0, 50), classes=st.sampled_from([None, 1, 2]))
@settings(max_examples=8, deadline=None)
def test_sizes_are_those_of_the_network_that_is_built(net, ratio, seed, classes):
    graph = NETS[net]
    assert_as_built(graph, some(graph, ratio / 100, seed), classes)


@pytest.mark.parametrize("residual", ["skip", "coupled", "scatter"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_sizes_of_torchvision_networks(name, residual):
    graph = ModelGraph(build(name, 10, small_input_stem=False).eval(), SHAPE, residual)
    assert_as_built(graph, some(graph, 0.6), 3)


def test_sizes_of_a_network_whose_features_are_flattened():
    model = torchvision.models.vgg11_bn(num_classes=10)
    for place, width in ((0, 64), (3, 64)):  # its two wide layers would take half a gigabyte
        model.classifier[place] = torch.nn.Linear(512 * 7 * 7 if place == 0 else 64, width)
    model.classifier[6] = torch.nn.Linear(64, 10)
    assert_as_built(ModelGraph(model.eval(), SHAPE), some(ModelGraph(model.eval(), SHAPE), 0.7), 4)


def test_sizes_worked_out_by_hand():
    """A 3x3 convolution of 4 filters on 3 x 8 x 8, a BatchNorm, pooling, and 5 logits; two filters go, two logits."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5),
    ).eval()  # fmt: skip
    left = ShapeCosts(ModelGraph(model, (3, 8, 8)), classes=3).left({"0": [0, 2]})
    assert left.macs == 64 * 2 * 27 + 2 * 3
    assert left.params == (2 * 27 + 2) + 2 * 2 + (2 * 3 + 3)


# Shares removed by a made-up method at ratio k/steps.
STEPS = st.lists(st.floats(0, 1), min_size=2, max_size=40).map(sorted)


@given(STEPS, st.floats(0.01, 0.99))
def test_no_ratio_comes_nearer_than_the_one_found(steps, target):
    shares = [0.0, *steps]

    def choose(ratio):
        return {"layer": list(range(int(ratio * len(shares))))}

    (found,) = find_ratios(choose, lambda indices: shares[len(indices["layer"])], [target], "macs")
    nearest = min(abs(share - target) for share in shares)
    assert abs(found.reached - target) == nearest
    assert found.reached == shares[len(found.indices["layer"])] and choose(found.ratio) == found.indices
    assert (found.note is None) == (nearest <= TOLERANCE)


@pytest.mark.parametrize(
    ("shares", "target", "note"),
    [
        ([0.0, 0.2, 0.4], 0.9, "target 0.9 of macs is not reached, 0.400 goes: the most that goes is 0.400, at ratio"),
        ([0.0, 0.2, 0.8], 0.5, "the selection jumps from 0.200 to 0.800 at ratio 0.6667"),
        ([0.5, 0.6, 0.8], 0.1, "the smaller head alone removes 0.500"),
    ],
)
def test_a_target_that_is_not_reached_has_its_reason(shares, target, note):
    found = find_ratios(
        lambda ratio: {"layer": list(range(int(ratio * 3)))}, lambda i: shares[len(i["layer"])], [target], "macs"
    )
    assert note in found[0].note


def test_a_ratio_is_written_with_as_few_digits_as_say_the_same():
    (found,) = find_ratios(
        lambda ratio: {"layer": list(range(int(ratio * 8)))}, lambda indices: len(indices["layer"]) / 8, [0.5], "macs"
    )
    assert found.ratio in (0.5, 0.6) and len(found.indices["layer"]) == 4
    assert 0.98 < LARGEST < 1


def test_what_was_selected_before_is_not_sized_again():
    asked = []

    def removed(indices):
        asked.append(len(indices["layer"]))
        return len(indices["layer"]) / 8

    find_ratios(lambda ratio: {"layer": list(range(int(ratio * 8)))}, removed, [0.3, 0.5, 0.6], "latency")
    assert len(asked) == len(set(asked)) <= 8


@pytest.fixture(scope="module")
def resnet() -> ModelGraph:
    return ModelGraph(lively(build("resnet18", 10, small_input_stem=False)), SHAPE)


def meet(graph: ModelGraph, method: str, scope: str, match: str, targets) -> None:
    """Every target is met, by the count in the network itself, or has its reason."""
    images, labels = images_and_labels(12, shape=SHAPE)
    selector = PruningSelection(
        get_criterion(method, seed=1), (), SHAPE, [(images, labels)], scope=scope, min_filters=1
    )
    prunable = sum(graph.conv(layer).out_channels for layer in selector.layers(graph))
    choose = selector.chooser(graph, selector.score(graph))
    for found in find_ratios(choose, removed_share(match, graph, 3, prunable), targets, match):
        macs, params = built(graph, found.indices, 3)
        shares = {
            "macs": 1 - macs / count_macs(graph.model, SHAPE).macs,
            "params": 1 - params / count_parameters(graph.model),
            "filters": sum(map(len, found.indices.values())) / prunable,
        }
        assert shares[match] == pytest.approx(found.reached, abs=1e-12)
        assert (abs(shares[match] - found.target) <= 0.02) == (found.note is None)
        assert found.note is None or "the most that goes is" in found.note or "jumps" in found.note
        if REGISTRY[method].exact and method != "matched_random":  # of an exact ranking, any share can be had
            assert found.note is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_same_macs(method, resnet):
    meet(resnet, method, REGISTRY[method].scopes[0], "macs", [0.3, 0.5, 0.7])


@pytest.mark.parametrize("match", ["params", "filters"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_other_budgets_are_met(match, scope, resnet):
    meet(resnet, "ln_structured", scope, match, [0.3, 0.6])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_same_macs_on_vgg(method):
    meet(
        ModelGraph(lively(build("vgg16_bn", 10, False)), SHAPE), method, REGISTRY[method].scopes[0], "macs", [0.3, 0.7]
    )
