"""Matched random takes the counts of another method, exactly, and nothing else of it."""

import re

import pytest
import torch

from errors import ConfigError
from filter_selection import REGISTRY, get_criterion
from records import write_selections
from selection import PruningSelection
from settings import method_options
from structure import ModelGraph
from tests.nets import SHAPE, Plain, batches, images_and_labels, lively

RATIOS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999]


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return ModelGraph(lively(Plain()), SHAPE)


@pytest.fixture(scope="module")
def data():
    return batches(*images_and_labels(5))


def select(graph, data, method, options, scope="layer", floor=1, seed=3):
    criterion = get_criterion(method, options, seed=seed)
    images = data if criterion.needs_data else None
    return PruningSelection(criterion, RATIOS, SHAPE, images, scope=scope, min_filters=floor).select(graph)


def counts(selections):
    return {ratio: {layer: len(filters) for layer, filters in chosen.items()} for ratio, chosen in selections.items()}


@pytest.mark.parametrize("method", sorted(set(REGISTRY) - {"matched_random"}))
@pytest.mark.parametrize("floor", [1, 2])
def test_counts_are_those_of_the_method_at_every_ratio(graph, data, method, floor):
    scopes = get_criterion(method, method_options(method)).scopes
    for scope in scopes:
        theirs = select(graph, data, method, method_options(method), scope, floor)
        ours = select(graph, data, "matched_random", {"matched_method": method}, scope, floor)
        assert counts(ours) == counts(theirs)
        assert ours != theirs


@pytest.mark.parametrize("options", [{"aggregation": "frequency"}, ["aggregation=frequency"]])
def test_options_of_the_method_are_handed_on(graph, data, options):
    union = select(graph, data, "ocap", {})
    frequency = select(graph, data, "ocap", {"aggregation": "frequency"})
    assert counts(union) != counts(frequency)
    assert counts(select(graph, data, "matched_random", {})) == counts(union)
    assert counts(select(graph, data, "matched_random", {"matched_options": options})) == counts(frequency)


def test_facts_are_those_of_the_method():
    for method, options in (("ocap", {}), ("ocap", {"aggregation": "frequency"}), ("ln_structured", {}), ("lrp", {})):
        theirs = get_criterion(method, options)
        ours = get_criterion("matched_random", {"matched_method": method, "matched_options": options})
        for fact in ("needs_data", "class_aware", "scopes", "nested", "exact"):
            assert getattr(ours, fact) == getattr(theirs, fact)


def test_the_draw_depends_on_seed_and_layer_alone(graph, data):
    """A fair draw: the same for every method and ratio, another for each seed and layer, every filter equally often."""
    by_norm = select(graph, None, "matched_random", {"matched_method": "ln_structured"})
    by_chance = select(graph, None, "matched_random", {"matched_method": "random"})
    assert by_norm == by_chance
    assert by_norm != select(graph, None, "matched_random", {"matched_method": "ln_structured"}, seed=4)
    twins = {"one": torch.zeros(40), "other": torch.zeros(40)}
    drawn = get_criterion("matched_random", {"matched_method": "ln_structured"}).select(twins, 0.5, "layer")
    assert drawn["one"] != drawn["other"]
    layer, draws = "features.3", 120
    taken = torch.zeros(8)
    scores = {layer: torch.arange(8.0)}
    for seed in range(draws):
        criterion = get_criterion("matched_random", {"matched_method": "ln_structured"}, seed=seed)
        taken[criterion.select(scores, 0.5, "layer")[layer]] += 1
    assert (taken - draws / 2).abs().max() < 5 * (draws / 4) ** 0.5  # five standard deviations of a fair draw


def test_scores_are_those_of_the_method(graph, data):
    theirs = get_criterion("ocap").score(graph, graph.prunable, data)
    ours = get_criterion("matched_random").score(graph, graph.prunable, data)
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)


@pytest.fixture
def file(tmp_path):
    selections = {0.0: {}, 0.5: {"features.0": [0, 3], "features.5": [1]}, 0.9: {"features.3": list(range(7))}}
    write_selections(tmp_path / "selections.json", selections)
    return str(tmp_path / "selections.json")


def test_counts_of_a_file(graph, file):
    criterion = get_criterion("matched_random", {"matched_selections": file}, seed=1)
    assert not criterion.needs_data and not criterion.class_aware
    selection = PruningSelection(criterion, [0.9, 0.5], SHAPE, scope="global")
    scores = selection.score(graph)
    chosen = selection.select(graph, scores)
    assert counts(chosen) == {0.9: {"features.3": 7}, 0.5: {"features.0": 2, "features.5": 1}}
    for indices in chosen.values():  # the scores tell the draw: the lowest are taken
        for layer, filters in indices.items():
            assert filters == sorted(torch.argsort(scores[layer])[: len(filters)].tolist())
    by_method = get_criterion("matched_random", {"matched_method": "ln_structured"}, seed=1).select(
        scores, 0.9, "layer"
    )
    assert by_method["features.3"] == chosen[0.9]["features.3"]


@pytest.mark.parametrize(
    ("ratios", "floor", "skipped", "message"),
    [
        ([0.3], 1, 0, "has no ratio 0.3, it has 0.0, 0.5, 0.9"),
        ([0.9], 2, 0, "removes 7 of the 8 filters of features.3 at ratio 0.9, where pruning.min_filters=2 must stay"),
        ([0.5], 1, 1, "removes filters of features.0, which this run does not choose by itself"),
    ],
)
def test_a_file_that_does_not_fit_the_run(graph, file, ratios, floor, skipped, message):
    criterion = get_criterion("matched_random", {"matched_selections": file})
    selection = PruningSelection(criterion, ratios, SHAPE, min_filters=floor, skip_first_layers=skipped)
    with pytest.raises(ConfigError, match=re.escape(f"pruning.matched_selections: {file}; {message}")):
        selection.select(graph)


@pytest.mark.parametrize("content", ["{", "[1]", '{"ratio": 1}', '[{"ratio": "x", "filters_removed": {}}]', "[{}]"])
def test_a_file_that_is_not_one_of_selections(tmp_path, content):
    path = tmp_path / "selections.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is not the selections.json of a run"):
        get_criterion("matched_random", {"matched_selections": str(path)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matched_selections": "/nowhere.json"}, "pruning.matched_selections: /nowhere.json; cannot be read (No such"),
        (
            {"matched_method": "matched_random"},
            "pruning.matched_method: 'matched_random' cannot be matched; valid: class_tay",
        ),
        (
            {"matched_method": "ocop"},
            "pruning.matched_method: 'ocop' cannot be matched; valid: class_taylor, ",
        ),
        (
            {"matched_options": ["slope=1"]},
            "pruning.matched_options: 'slope' is no key of ocap; valid: activation_func, ",
        ),
        (
            {"matched_method": "random", "matched_options": ["a=1"]},
            "pruning.matched_options: 'a' is no key of random; valid: none",
        ),
        (
            {"matched_options": ["negative_slope=big"]},
            'pruning.matched_options: negative_slope: "big"; must be a number',
        ),
        ({"matched_options": ["aggregation=mean"]}, "pruning.aggregation: 'mean' is unknown; valid: union, frequency"),
        ({"matched_options": ["a=[1"]}, "pruning.matched_options: ['a=[1']; must be a list of texts key=value"),
        ({"matched_options": [3]}, "pruning.matched_options: [3]; must be a list of texts key=value"),
    ],
)
def test_options_that_are_not_valid(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_criterion("matched_random", options)


def test_defaults_come_from_the_yaml_and_what_it_builds_on():
    assert method_options("ocap") == {"activation_func": "leaky_relu", "negative_slope": 0.01, "aggregation": "union"}
    assert method_options("random") == {}
    assert method_options("pxp").keys() == method_options("lrp").keys() and method_options("pxp")["biases"] is True
    assert method_options("matched_random") == {
        "matched_method": "ocap",
        "matched_options": [],
        "matched_selections": None,
    }
