"""What every method promises, tried on each one in the registry and on each word that its YAML allows for its keys."""

import contextlib
import copy
import gc
import inspect
import math
import weakref

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from errors import BenchmarkError, ConfigError
from filter_selection import REGISTRY, get_criterion
from selection import PruningSelection
from settings import CONFIG_DIR, method_options
from structure import ModelGraph
from tests.nets import NETS, SHAPE, batches, images_and_labels, lively


def declaration(method: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "pruning" / f"{method}.yaml"))


def variants() -> dict[str, tuple[str, dict]]:
    """id -> (method, options): the defaults of its YAML, and each other word that it allows for a key of its own."""
    found = {}
    for method in sorted(REGISTRY):
        defaults = method_options(method)
        found[method] = (method, defaults)
        for key, words in declaration(method).get("choices", {}).items():
            for word in words if key in defaults else ():
                if word != defaults[key]:
                    found[f"{method}-{key}={word}"] = (method, defaults | {key: word})
    return found


VARIANTS = variants()
NET_NAMES = ("residual", "plain")
REFUSALS = {("torch_pruning-importance=bn_scale", "plain"): "finds no BatchNorm with features.0"}
CASES = [(variant, net) for variant in VARIANTS for net in NET_NAMES if (variant, net) not in REFUSALS]
each_case = pytest.mark.parametrize(("variant", "net"), CASES)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant: str, seed: int = 3):
    method, options = VARIANTS[variant]
    return get_criterion(method, copy.deepcopy(options), seed=seed)


def graph_of(net: str) -> ModelGraph:
    return ModelGraph(lively(NETS[net][0]()), SHAPE)


@pytest.fixture(scope="module")
def data():
    images, labels = images_and_labels()
    return 0.3 * images, labels  # larger ones wake every filter, and what is counted is the same for all


@pytest.fixture(scope="module")
def scored(data):
    """(variant, net) -> graph, scores: worked out once, read by many tests."""
    known = {}

    def get(variant, net):
        if (variant, net) not in known:
            graph = graph_of(net)
            known[variant, net] = graph, make(variant).score(graph, graph.prunable, batches(*data))
        return known[variant, net]

    return get


def selector(variant: str, ratios, data, **options) -> PruningSelection:
    criterion = make(variant)
    return PruningSelection(criterion, ratios, SHAPE, batches(*data) if criterion.needs_data else None, **options)


# Scores


@each_case
def test_one_finite_value_a_filter_on_the_cpu(variant, net, scored):
    graph, scores = scored(variant, net)
    assert tuple(scores) == graph.prunable
    for layer, values in scores.items():
        assert len(values) == graph.conv(layer).out_channels
        assert values.isfinite().all() and values.device.type == "cpu" and not values.requires_grad
    assert any(len(values.unique()) > 1 for values in scores.values())


@each_case
@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_scores_do_not_depend_on_the_cut_into_batches(variant, net, batch_size, scored, data):
    graph, expected = scored(variant, net)
    scores = make(variant).score(graph, graph.prunable, batches(*data, batch_size))
    for layer, values in scores.items():
        assert values.dtype == expected[layer].dtype and values.shape == expected[layer].shape
        if batch_size is None:
            assert torch.equal(values, expected[layer])  # repeatable to the last bit
        else:
            tolerance = 1e-9 if values.dtype == torch.float64 else 1e-5
            assert (values - expected[layer]).abs().max() <= tolerance * expected[layer].abs().max()


@each_case
def test_single_precision_gives_the_same_scores_but_for_rounding(variant, net, scored, data):
    _, expected = scored(variant, net)
    graph = ModelGraph(lively(NETS[net][0]()).float(), SHAPE)
    scores = make(variant).score(graph, graph.prunable, batches(data[0].float(), data[1]))
    for layer, values in scores.items():
        assert (values - expected[layer]).abs().max() <= 1e-3 * expected[layer].abs().max()


@each_case
def test_the_memory_layout_does_not_matter(variant, net, scored, data):
    _, expected = scored(variant, net)
    graph = ModelGraph(lively(NETS[net][0]()).to(memory_format=torch.channels_last), SHAPE)
    images = data[0].contiguous(memory_format=torch.channels_last)
    scores = make(variant).score(graph, graph.prunable, batches(images, data[1]))
    for layer, values in scores.items():
        assert (values - expected[layer]).abs().max() <= 1e-5 * expected[layer].abs().max()


@each_case
def test_a_layer_scores_the_same_alone(variant, net, scored, data):
    graph, expected = scored(variant, net)
    layer = graph.prunable[-1]
    alone = make(variant).score(graph, [layer], batches(*data))
    assert list(alone) == [layer] and torch.allclose(alone[layer], expected[layer], rtol=1e-9)


def bytes_of_live_tensors() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@each_variant
def test_what_is_kept_from_batch_to_batch_does_not_grow(variant):
    """Neither the images nor anything made of them outlives the next batch but a state of constant size."""
    held, given = [], []

    def images_watched():
        for number in range(6):
            images, labels = images_and_labels(5, seed=number)
            given.append(weakref.ref(images))
            yield 0.3 * images, labels
            del images
            if number in (1, 5):
                held.append(bytes_of_live_tensors())

    graph = graph_of("residual")
    criterion = make(variant)
    criterion.score(graph, graph.prunable, images_watched())
    assert len(held) == (2 if criterion.needs_data else 0)
    assert len(set(held)) <= 1
    assert not any(reference() is not None for reference in given)


# The network and the caller's belongings


def a_used_network(net: str) -> nn.Module:
    """Gradients left over, some weights frozen, some modules in train mode, hooks of the user's own."""
    model = lively(NETS[net][0]())
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    return model


def state_of(model: nn.Module) -> dict:
    state = {f"value {name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"requires_grad {name}"] = parameter.requires_grad
        state[f"identity {name}"] = id(parameter)
    for name, module in model.named_modules():
        state[f"training {name}"] = module.training
        state[f"inplace {name}"] = getattr(module, "inplace", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            state[f"{hooks} {name}"] = list(getattr(module, hooks).items())
    state["rng"] = torch.get_rng_state()
    state["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return state


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key


def breaking(data, after: int):
    yield from batches(*data, 5)[:after]
    raise OSError("the disk is gone")


@each_case
@pytest.mark.parametrize("broken_after", [None, 0, 2])
def test_the_network_and_the_images_are_left_as_they_were(variant, net, broken_after, data):
    model = a_used_network(net)
    seen = []
    handle = list(model.children())[-1].register_forward_hook(lambda *arguments: seen.append(1))
    criterion, graph = make(variant), ModelGraph(model, SHAPE)
    before, images, labels = state_of(model), data[0].clone(), data[1].clone()
    if broken_after is None:
        criterion.score(graph, graph.prunable, batches(*data, 5))
    elif criterion.needs_data:
        with pytest.raises(OSError, match="the disk is gone"):
            criterion.score(graph, graph.prunable, breaking(data, broken_after))
    assert_same(before, state_of(model))
    assert torch.equal(data[0], images) and torch.equal(data[1], labels)
    handle.remove()


@each_variant
def test_options_are_not_changed(variant):
    method, options = VARIANTS[variant]
    given = copy.deepcopy(options)
    get_criterion(method, given)
    assert given == options


# Selections


def assert_valid(graph, chosen, min_filters):
    for layer, filters in chosen.items():
        width = graph.conv(layer).out_channels
        assert filters and filters == sorted(set(filters)) and 0 <= filters[0] and filters[-1] < width
        assert all(type(index) is int for index in filters)
        assert width - len(filters) >= min_filters


def exact_counts(widths, ratio, scope, floor):
    """How many go: in each layer, or in all together."""
    if scope == "layer":
        return {layer: min(math.floor(ratio * width), max(width - floor, 0)) for layer, width in widths.items()}
    return min(math.floor(ratio * sum(widths.values())), sum(max(width - floor, 0) for width in widths.values()))


@each_case
@pytest.mark.parametrize("skipped", [0, 1, "all but one"])
@pytest.mark.parametrize("floor", [1, 3])
def test_selections_for_every_scope_floor_and_skipped_layer(variant, net, skipped, floor, scored, data):
    graph, all_scores = scored(variant, net)
    ratios = [0.999, 0.25, 0.625, 0.8]
    skipped = graph.convs.index(graph.prunable[-1]) if skipped == "all but one" else skipped
    scores = {layer: all_scores[layer] for layer in graph.prunable if layer in graph.convs[skipped:]}
    widths = {layer: len(values) for layer, values in scores.items()}
    for scope in make(variant).scopes:
        selection = selector(variant, ratios, data, scope=scope, min_filters=floor, skip_first_layers=skipped)
        assert set(selection.layers(graph)) == set(scores)
        chosen = selection.select(graph, scores)
        assert list(chosen) == ratios
        for ratio, indices in chosen.items():
            assert set(indices) <= set(scores)
            assert_valid(graph, indices, floor)
            if selection.criterion.exact:
                counts = {layer: len(indices.get(layer, ())) for layer in scores}
                expected = exact_counts(widths, ratio, scope, floor)
                assert (counts if scope == "layer" else sum(counts.values())) == expected


@each_case
def test_what_goes_at_a_ratio_goes_at_a_higher_one_where_that_is_promised(variant, net, scored):
    graph, scores = scored(variant, net)
    criterion = make(variant)
    if not criterion.nested:
        pytest.skip("the method does not promise it")
    for scope in criterion.scopes:
        last = {}
        for ratio in [step / 20 for step in range(1, 20)] + [0.999]:
            chosen = criterion.select(scores, ratio, scope)
            assert all(set(filters) <= set(chosen.get(layer, ())) for layer, filters in last.items())
            last = chosen
        assert last


@each_case
def test_a_run_of_the_whole_is_that_of_its_parts(variant, net, scored, data):
    graph, scores = scored(variant, net)
    selection = selector(variant, [0.5], data)
    assert selection.select(graph.model)[0.5] == selection.criterion.select(scores, 0.5, "layer")


# Bad input


@pytest.mark.parametrize(("variant", "net"), REFUSALS)
def test_refusals_name_the_layer_and_the_reason(variant, net, data):
    graph = graph_of(net)
    with pytest.raises(BenchmarkError, match=REFUSALS[variant, net]):
        make(variant).score(graph, graph.prunable, batches(*data))


@contextlib.contextmanager
def refused_by_layer(graph):
    with pytest.raises(BenchmarkError) as caught:
        yield
    assert any(layer in str(caught.value) for layer in graph.convs), caught.value


@each_case
def test_a_weight_that_is_nan_is_refused_by_layer_or_was_never_read(variant, net, scored, data):
    _, expected = scored(variant, net)
    model = lively(NETS[net][0]())
    graph = ModelGraph(model, SHAPE)
    with torch.no_grad():
        graph.conv(graph.prunable[0]).weight[1, 0, 0, 0] = math.nan
    criterion = make(variant)
    try:
        scores = criterion.score(graph, graph.prunable, batches(*data))
    except BenchmarkError as error:
        assert any(layer in str(error) for layer in graph.convs), error
    else:
        assert not criterion.needs_data
        assert all(torch.equal(scores[layer], values) for layer, values in expected.items())


@each_case
def test_images_that_are_not_finite_are_refused_by_layer(variant, net, data):
    criterion, graph = make(variant), graph_of(net)
    for value in (math.nan, math.inf):
        images = data[0].clone()
        images[5, 1, 2, 3] = value
        if criterion.needs_data:
            with refused_by_layer(graph):
                criterion.score(graph, graph.prunable, batches(images, data[1], 4))


@each_case
def test_a_layer_without_any_response_is_refused_by_name(variant, net, data):
    """The first layer's responses are zero, for methods that read images at all."""
    criterion, model = make(variant), lively(NETS[net][0]())
    if not criterion.needs_data:
        pytest.skip("it reads no response")
    graph = ModelGraph(model, SHAPE)
    silent = model.stem_bn if net == "residual" else model.features[0]
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    with refused_by_layer(graph):
        criterion.score(graph, graph.prunable, batches(*data))


@each_variant
def test_a_layer_that_never_runs_is_refused_by_name(variant, data):
    model = lively(NETS["residual"][0]())
    model.spare = nn.Conv2d(3, 4, 3).double()
    with pytest.raises(BenchmarkError, match="spare is no convolution that runs"):
        make(variant).score(ModelGraph(model, SHAPE), ["stem", "spare"], batches(*data))


@each_variant
def test_no_images_are_refused(variant):
    criterion, graph = make(variant), graph_of("residual")
    if not criterion.needs_data:
        assert criterion.score(graph, graph.prunable).keys() == set(graph.prunable)
        return
    for nothing in (None, []):
        with pytest.raises(BenchmarkError, match="no scoring images|needs scoring images"):
            criterion.score(graph, graph.prunable, nothing)


# Code and YAML


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_the_yaml_says_what_the_code_does(method):
    yaml, criterion = declaration(method), get_criterion(method, method_options(method))
    assert yaml["name"] == method == criterion.name
    parameters = inspect.signature(type(criterion).__init__).parameters
    options = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - {"seed"}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        assert options == set(method_options(method))
    inherited = declaration(yaml["defaults"][0]) if "defaults" in yaml else {}
    merged = inherited | yaml
    if method == "matched_random":  # whose images and which scope, the method that it matches says
        assert merged["scoring_classes"] is merged["pruning_scope"] is None
    else:
        assert merged["scoring_classes"] == ("selected" if criterion.class_aware else "all")
        assert merged.get("pruning_scope", "layer") in criterion.scopes
        assert set(merged.get("choices", {}).get("pruning_scope", ("layer", "global"))) == set(criterion.scopes)


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_words_that_the_yaml_does_not_allow_are_refused_with_the_key(method):
    defaults = method_options(method)
    for key in declaration(method).get("choices", {}):
        if key in defaults and isinstance(defaults[key], str):
            with pytest.raises(ConfigError, match=f"pruning.{key}: 'nonsense'"):
                get_criterion(method, defaults | {key: "nonsense"})
