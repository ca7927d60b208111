"""Scores become indices: slow rankings, floors, ties, nesting, skipped layers; and the methods without data."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errors import BenchmarkError, ConfigError
from filter_selection import REGISTRY, get_criterion
from filter_selection.base import Criterion, lowest_overall, lowest_per_layer
from helpers import share_of
from selection import PruningSelection, get_selector
from structure import ModelGraph
from tests.nets import SHAPE, Mixed, Plain, Residual, batches, images_and_labels, lively

# Few different values, so that ties are common.
LAYERS = st.dictionaries(
    st.sampled_from("abcde"), st.lists(st.integers(-2, 2), min_size=1, max_size=9), min_size=1, max_size=4
)
SCORES = LAYERS.map(lambda layers: {name: torch.tensor(values, dtype=torch.float64) for name, values in layers.items()})
RATIOS = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
FLOORS = st.integers(1, 4)


def naive_lowest(scores, wanted, spare):
    """Takes the lowest filter that may still go, one after the other; ties by layer order, then by index."""
    gone = {layer: [] for layer in scores}
    for _ in range(wanted):
        candidates = [
            (float(value), position, index, layer)
            for position, (layer, values) in enumerate(scores.items())
            for index, value in enumerate(values)
            if index not in gone[layer] and len(gone[layer]) < spare[layer]
        ]
        if not candidates:
            break
        *_, index, layer = min(candidates)
        gone[layer].append(index)
    return {layer: sorted(filters) for layer, filters in gone.items() if filters}


@given(SCORES, RATIOS, FLOORS)
def test_lowest_per_layer(scores, ratio, floor):
    expected = {}
    for layer, values in scores.items():
        wanted = math.floor(Fraction(str(ratio)) * len(values))
        expected |= naive_lowest({layer: values}, wanted, {layer: len(values) - floor})
    assert lowest_per_layer(scores, ratio, floor) == expected


@given(SCORES, RATIOS, FLOORS)
def test_lowest_overall(scores, ratio, floor):
    wanted = math.floor(Fraction(str(ratio)) * sum(map(len, scores.values())))
    expected = naive_lowest(scores, wanted, {layer: len(values) - floor for layer, values in scores.items()})
    assert lowest_overall(scores, ratio, floor) == expected


@pytest.mark.parametrize("choose", [lowest_per_layer, lowest_overall])
@given(scores=SCORES, one=RATIOS, other=RATIOS, floor=FLOORS)
def test_what_goes_at_a_ratio_goes_at_every_higher_one(choose, scores, one, other, floor):
    less, more = choose(scores, min(one, other), floor), choose(scores, max(one, other), floor)
    assert all(set(filters) <= set(more.get(layer, ())) for layer, filters in less.items())


@pytest.mark.parametrize("choose", [lowest_per_layer, lowest_overall])
def test_scores_are_not_changed_and_ties_go_by_order(choose):
    scores = {"b": torch.zeros(4), "a": torch.zeros(4)}
    expected = {lowest_per_layer: {"b": [0, 1], "a": [0, 1]}, lowest_overall: {"b": [0, 1, 2], "a": [0]}}[choose]
    assert choose(scores, 0.5, 1) == expected
    assert all(torch.equal(values, torch.zeros(4)) for values in scores.values())


def test_a_global_ranking_that_would_empty_a_layer_goes_on_elsewhere():
    scores = {"weak": torch.tensor([0.1, 0.2, 0.3]), "strong": torch.tensor([5.0, 6.0, 7.0])}
    assert lowest_overall(scores, 0.5, 1) == {"weak": [0, 1], "strong": [0]}
    assert lowest_overall(scores, 0.5, 2) == {"weak": [0], "strong": [0]}
    assert lowest_overall(scores, 0.999, 1) == {"weak": [0, 1], "strong": [0, 1]}


# PruningSelection


class Positions(Criterion):
    """Scores that are known beforehand: filter i scores i, in every layer."""

    name = "positions"
    needs_data = False
    passes = 0

    def compute(self, graph, layers, batches):
        self.passes += 1
        return {layer: torch.arange(graph.conv(layer).out_channels, dtype=torch.float64) for layer in layers}


@pytest.fixture(scope="module")
def plain() -> ModelGraph:
    return ModelGraph(lively(Plain()), SHAPE)


def test_all_ratios_from_one_pass_in_the_order_asked_for(plain):
    criterion = Positions()
    selection = PruningSelection(criterion, (0.8, 0.0, 0.4), SHAPE)
    chosen = selection.select(plain)
    assert list(chosen) == [0.8, 0.0, 0.4] and criterion.passes == 1
    assert chosen[0.4] == {"features.0": [0, 1], "features.3": [0, 1, 2], "features.5": [0, 1]}
    assert chosen[0.0] == {}
    assert chosen[0.8] == {"features.0": [0, 1, 2, 3], "features.3": [*range(6)], "features.5": [*range(5)]}
    assert selection.select(plain, selection.score(plain)) == chosen and criterion.passes == 2
    assert selection.select(plain.model) == chosen  # from the network itself, without its graph


def test_scope_and_floor_are_handed_on(plain):
    selection = PruningSelection(Positions(), [0.999], SHAPE, scope="global", min_filters=4)
    assert selection.select(plain)[0.999] == {"features.0": [0], "features.3": [0, 1, 2, 3], "features.5": [0, 1, 2]}
    overall = PruningSelection(Positions(), [0.2], SHAPE, scope="global").select(plain)[0.2]
    assert overall == {"features.0": [0, 1], "features.3": [0], "features.5": [0]}


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_the_first_layers_are_skipped(plain, skipped):
    layers = ("features.0", "features.3", "features.5")
    selection = PruningSelection(Positions(), [0.5], SHAPE, skip_first_layers=skipped)
    assert selection.layers(plain) == layers[skipped:]
    assert tuple(selection.select(plain)[0.5]) == layers[skipped:]
    assert list(selection.left_out(plain)) == list(layers[:skipped])


def test_skipping_counts_convolutions_and_not_prunable_ones():
    graph = ModelGraph(lively(Residual()), SHAPE)
    assert graph.convs == ("stem", "conv1", "conv2", "shortcut")
    selection = PruningSelection(Positions(), [0.5], SHAPE, skip_first_layers=1)
    assert selection.layers(graph) == ("conv1",)
    assert selection.left_out(graph)["stem"] == "among the first 1 (model.skip_first_layers)"
    assert "residual" in selection.left_out(graph)["conv2"]
    mixed = ModelGraph(lively(Mixed()), SHAPE)  # its first two cannot be pruned anyhow
    assert mixed.convs == ("stem", "grouped", "left", "right")
    for skipped, layers in ((1, ("left", "right")), (2, ("left", "right")), (3, ("right",))):
        assert PruningSelection(Positions(), [0.5], SHAPE, skip_first_layers=skipped).layers(mixed) == layers


@pytest.mark.parametrize("skipped", [3, 99])
def test_skipping_every_layer_is_an_error(plain, skipped):
    with pytest.raises(ConfigError, match=f"model.skip_first_layers: {skipped} leaves no convolution to prune"):
        PruningSelection(Positions(), [0.5], SHAPE, skip_first_layers=skipped).score(plain)


def test_a_scope_that_the_method_lacks_is_an_error():
    with pytest.raises(ConfigError, match="pruning.pruning_scope: 'global' is not a scope of ocap; valid: layer"):
        PruningSelection(get_criterion("ocap"), [0.5], SHAPE, [], scope="global")


def test_a_floor_of_nothing_is_an_error():
    with pytest.raises(ConfigError, match="pruning.min_filters: 0"):
        PruningSelection(Positions(), [0.5], SHAPE, min_filters=0)


def test_a_ratio_too_small_to_remove_anything_is_an_error(plain):
    with pytest.raises(ConfigError, match="pruning.pruning_ratio: 0.1 removes no filter"):
        PruningSelection(Positions(), [0.5, 0.1], SHAPE).select(plain)


class Broken(Positions):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def compute(self, graph, layers, batches):
        return {layer: self.values for layer in layers}


def test_scores_that_are_not_finite_or_too_few_are_errors_by_layer(plain):
    with pytest.raises(BenchmarkError, match="positions: 2 scores of features.0 are not finite"):
        Broken(torch.tensor([1, math.nan, 2, math.inf, 3])).score(plain, ["features.0"])
    with pytest.raises(BenchmarkError, match="positions: features.0 has 5 filters and was given 4 scores"):
        Broken(torch.ones(4)).score(plain, ["features.0"])


def test_a_method_that_reads_images_is_given_the_ones_of_its_classes():
    asked = []

    def get_scoring_loader(classes):
        asked.append(classes)
        return batches(*images_and_labels(3))

    def settings(name, scope="layer", **options):
        pruning = SimpleNamespace(
            match=None,
            **{"name": name, "options": options, "pruning_ratio": (0.5,), "pruning_scope": scope, "min_filters": 2},
            **{"scoring_classes": "all", "round_to": 8, "coupled_scores": "max"},
        )
        return SimpleNamespace(pruning=pruning, seed=7, model=SimpleNamespace(skip_first_layers=1))

    factory = SimpleNamespace(input_shape=SHAPE, get_scoring_loader=get_scoring_loader)
    selector = get_selector(settings("ocap", aggregation="frequency"), factory)
    assert asked == ["all"] and selector.criterion.aggregation == "frequency" and len(selector.batches) == 1
    selector = get_selector(settings("ln_structured", scope="global", norm=2), factory)
    assert asked == ["all"] and selector.batches is None and selector.criterion.seed == 7
    assert (selector.scope, selector.min_filters, selector.skip_first_layers) == ("global", 2, 1)
    assert (selector.round_to, selector.coupled_scores) == (8, "max")
    assert selector.ratios == (0.0, 0.5) and selector.input_shape == SHAPE
    asks_for_zero = settings("random")
    asks_for_zero.pruning.pruning_ratio = (0.5, 0.0)
    assert get_selector(asks_for_zero, factory).ratios == (0.5, 0.0)


def test_an_unknown_method_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match="pruning.name: 'ocop' is not a method; valid: .*ocap"):
        get_criterion("ocop")
    assert {"ocap", "ln_structured", "random"} <= set(REGISTRY)


# Methods without data


@pytest.mark.parametrize("norm", [1, 2])
def test_ln_structured_is_the_norm_of_each_filter(norm):
    graph = ModelGraph(lively(Residual()), SHAPE)
    scores = get_criterion("ln_structured", {"norm": norm}).score(graph, graph.convs)
    for layer in graph.convs:
        weights = graph.conv(layer).weight.tolist()
        flat = [[w for plane in kernel for row in plane for w in row] for kernel in weights]
        expected = [sum(abs(w) ** norm for w in kernel) ** (1 / norm) for kernel in flat]
        assert scores[layer].tolist() == pytest.approx(expected, rel=1e-12)
        assert not scores[layer].requires_grad


def test_ln_structured_refuses_other_norms():
    with pytest.raises(ConfigError, match="pruning.norm: 3 is unknown; valid: 1, 2"):
        get_criterion("ln_structured", {"norm": 3})


def test_random_depends_on_seed_and_layer_alone(plain):
    scores = get_criterion("random", seed=1).score(plain, plain.prunable)
    alone = get_criterion("random", seed=1).score(plain, plain.prunable[1:2])
    other = get_criterion("random", seed=2).score(plain, plain.prunable)
    layer = plain.prunable[1]
    assert torch.equal(scores[layer], alone[layer]) and not torch.equal(scores[layer], other[layer])
    assert all(len(values.unique()) == len(values) for values in scores.values())
    assert len({float(values[0]) for values in scores.values()}) == 3  # each layer draws on its own


def test_random_removes_every_filter_equally_often(plain):
    layer, width, draws = "features.3", 8, 400
    counts = torch.zeros(width)
    for seed in range(draws):
        criterion = get_criterion("random", seed=seed)
        counts[criterion.select(criterion.score(plain, [layer]), 0.5, "layer")[layer]] += 1
    assert counts.sum() == draws * share_of(0.5, width)
    assert (counts - draws / 2).abs().max() < 5 * (draws / 4) ** 0.5  # five standard deviations of a fair draw
