"""The pruned network computes what the dense one computes with the removed filters' responses zeroed."""

import copy

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from errors import BenchmarkError
from filter_selection import get_criterion
from models import replace_head
from pruner import PRUNERS, DepGraphPruner, get_pruner
from structure import ModelGraph
from tests.oracles import masked

SHAPE = (3, 32, 32)
VGGS = ["vgg16", "vgg16_bn"]


def lively(model: nn.Module) -> nn.Module:
    """float64, with BatchNorm statistics as training would leave them: a zero mean hides what a wrong slice does."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model.double().eval()


class Small(nn.Module):
    """Conv and BatchNorm, a residual add, a depthwise pair, a concatenation, and a flatten with more than one pixel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.back = nn.Conv2d(5, 6, 1)
        self.wide = nn.Sequential(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(7, 7, 3, groups=7, padding=1), nn.BatchNorm2d(7), nn.ReLU6())
        self.left = nn.Sequential(nn.Conv2d(7, 4, 3, stride=2), nn.ReLU(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(7, 3, 3, stride=2), nn.LeakyReLU(0.1))
        self.squeeze = nn.Conv2d(7, 4, 1)
        self.head = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x):
        x = self.stem(nn.functional.max_pool2d(x, 4))
        x = torch.relu(x + self.back(self.inner(x)))
        x = self.depthwise(self.wide(x))
        x = self.squeeze(torch.cat((self.left(x), self.right(x)), 1))
        return self.head(torch.flatten(x, 1))


def small_vgg(batch_norm: bool) -> nn.Module:
    """torchvision's VGG with its flatten of 7x7 pixels a channel, at a width that a test can afford."""
    layers = torchvision.models.vgg.make_layers([8, "M", 12, "M", 10], batch_norm=batch_norm)
    model = torchvision.models.VGG(layers, num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(10 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return model


def assert_equal_to_masking(graph: ModelGraph, indices: dict[str, list[int]], pruner: str) -> None:
    images = torch.randn(2, *graph.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pruned = get_pruner(pruner, graph).prune(indices)
    with torch.no_grad():
        actual = pruned(images)
        with masked(graph, indices) as model:
            expected = model(images)
        unpruned = graph.model(images)
    assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()
    if any(indices.values()):
        assert not torch.equal(actual, unpruned)  # masking the wrong place would make the equality empty


def assert_same_state(graph: ModelGraph, indices: dict[str, list[int]]) -> None:
    """Whichever way the filters are removed, the same weights are left under the same names."""
    one, other = (get_pruner(pruner, graph).prune(indices).state_dict() for pruner in ("depgraph", "structure"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def small() -> ModelGraph:
    torch.manual_seed(0)
    model = lively(Small())
    for layer in (model.inner[1], model.depthwise[1], model.left[0]):
        layer.bias.data += 1  # so that no filter is without effect on the images of `assert_equal_to_masking`
    graph = ModelGraph(model, SHAPE)
    for layer in graph.prunable:
        for index in range(graph.conv(layer).out_channels):
            assert_equal_to_masking(graph, {layer: [index]}, "depgraph")
    return graph


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_subset_that_leaves_one_filter_equals_masking(small, data):
    indices = {}
    for layer in small.prunable:
        width = small.conv(layer).out_channels
        chosen = data.draw(st.sets(st.integers(0, width - 1), max_size=width - 1), label=layer)
        if chosen:
            indices[layer] = sorted(chosen)
    for pruner in PRUNERS:
        assert_equal_to_masking(small, indices, pruner)
    assert_same_state(small, indices)


slow = pytest.mark.slow  # VGGs: a gigabyte of weights in float64; MobileNet: many layers


NETWORKS = [
    "resnet18",
    "resnet50",
    "densenet121",
    *(pytest.param(name, marks=slow) for name in (*VGGS, "mobilenet_v2")),
]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ratio", [0.3, 0.999])
def test_torchvision_models_equal_masking(name, ratio):
    torch.manual_seed(0)
    graph = ModelGraph(lively(getattr(torchvision.models, name)(num_classes=10)), SHAPE)
    criterion = get_criterion("random", seed=3)
    indices = criterion.select(criterion.score(graph, graph.prunable), ratio, "layer")
    assert all(indices[layer] for layer in graph.prunable)
    for pruner in PRUNERS:
        assert_equal_to_masking(graph, indices, pruner)
    assert_same_state(graph, indices)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.999])
def test_flattened_features_equal_masking(batch_norm, ratio):
    torch.manual_seed(0)
    graph = ModelGraph(lively(small_vgg(batch_norm)), SHAPE)
    criterion = get_criterion("random", seed=3)
    indices = criterion.select(criterion.score(graph, graph.prunable), ratio, "layer")
    for pruner in PRUNERS:
        assert_equal_to_masking(graph, indices, pruner)
    assert_same_state(graph, indices)


def test_a_library_that_removes_too_much_is_caught():
    """torch-pruning 1.6.1 miscounts a concatenation that is flattened with more than one pixel a channel."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3), nn.Linear(7 * 9, 5)

        def forward(self, x):
            return self.head(torch.flatten(torch.cat((self.left(x), self.right(x)), 1), 1))

    graph = ModelGraph(Joined().double().eval(), (3, 5, 5))
    with pytest.raises(BenchmarkError, match="filters were to go, but"):
        DepGraphPruner(graph).prune({"right": [0]})


def test_the_dense_network_is_untouched(small):
    before = copy.deepcopy(small.model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in small.model.parameters()]
    pruned = DepGraphPruner(small).prune({"inner.0": [0, 2]})
    assert pruned.inner[0].out_channels == 3 and small.model.inner[0].out_channels == 5
    assert all(torch.equal(before[key], value) for key, value in small.model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in small.model.parameters()] == flags
    assert all(p.requires_grad and p.grad is None for p in pruned.parameters())


@pytest.mark.parametrize("indices", [{}, {"left.0": [1]}])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_pruned_network_shares_no_memory_with_the_dense_one(small, pruner, indices):
    pruned = get_pruner(pruner, small).prune(indices)
    before = copy.deepcopy(small.model.state_dict())
    for value in pruned.state_dict().values():
        value.zero_()
    assert all(torch.equal(before[key], value) for key, value in small.model.state_dict().items())
    assert not {id(p) for p in pruned.parameters()} & {id(p) for p in small.model.parameters()}


def test_a_removal_that_changes_the_dense_network_is_caught(small):
    class Careless(DepGraphPruner):
        def _remove(self, model, indices):
            super()._remove(model, indices)
            with torch.no_grad():
                self.graph.model.head.bias.add_(0)

    with pytest.raises(BenchmarkError, match="dense network: was changed by the removal"):
        Careless(small).prune({"inner.0": [0]})


@pytest.mark.parametrize("pruner", PRUNERS)
def test_frozen_and_unused_layers_are_refused_by_name(pruner):
    model = Small().double().eval()
    model.unused = nn.Conv2d(3, 4, 3)
    model.inner[0].requires_grad_(False)
    graph = ModelGraph(model, SHAPE)
    with pytest.raises(BenchmarkError, match="unused: never runs; those that run are stem.0, inner.0"):
        get_pruner(pruner, graph).prune({"unused": [0]})
    with pytest.raises(BenchmarkError, match="inner.0: is frozen .requires_grad=False. and stays as it is"):
        get_pruner(pruner, graph).prune({"inner.0": [0]})
    assert get_pruner(pruner, graph).prune({"left.0": [0]}).left[0].out_channels == 3


def test_nothing_to_remove_is_a_copy(small):
    images = torch.randn(2, *SHAPE, dtype=torch.float64)
    pruned = DepGraphPruner(small).prune({})
    assert pruned is not small.model
    with torch.no_grad():
        assert torch.equal(pruned(images), small.model(images))


def test_a_removal_that_computes_something_else_is_caught(small):
    class Careless(DepGraphPruner):
        """Removes other filters than it was asked to: every width is right, the network is not."""

        def _remove(self, model, indices):
            super()._remove(model, {layer: [index + 1 for index in filters] for layer, filters in indices.items()})

    with pytest.raises(BenchmarkError, match="differ from the masked dense network's"):
        Careless(small).prune({"inner.0": [0, 2]})


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"inner.0": [5]}, "inner.0: has no filter 5; valid: 0 to 4"),
        ({"inner.0": [-1]}, "inner.0: has no filter -1"),
        ({"inner.0": [1, 1]}, "inner.0: its indices are not sorted and unique"),
        ({"inner.0": [2, 1]}, "inner.0: its indices are not sorted and unique"),
        ({"inner.0": [0, 1, 2, 3, 4]}, "inner.0: all 5 filters are to go"),
        ({"outer.0": [0]}, "outer.0: is not a convolution of this network"),
        ({"head": [0]}, "head: is not a convolution of this network"),
        ({"back": [0]}, "back: its filters cannot be removed on their own: on a residual stream: tied to stem.0"),
        ({"depthwise.0": [0]}, "depthwise.0: its filters cannot be removed on their own: depthwise"),
    ],
)
def test_indices_that_cannot_be_removed_are_refused(small, indices, message):
    with pytest.raises(BenchmarkError, match=message.replace("(", r"\(")):
        DepGraphPruner(small).prune(indices)


def test_a_prune_that_changes_nothing_is_an_error(small):
    class Lazy(DepGraphPruner):
        def _remove(self, model, indices):
            pass

    with pytest.raises(BenchmarkError, match="inner.0: 2 filters were to go, but 0 of 5 went"):
        Lazy(small).prune({"inner.0": [0, 1]})


@pytest.mark.parametrize("pruner", PRUNERS)
def test_weights_that_are_not_a_layers_own_are_refused(pruner):
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(108, 2)).eval()

    shared, normed = net(), net()
    shared[1].weight = shared[0].weight
    nn.utils.parametrizations.weight_norm(normed[0])
    for model in (shared, normed):
        with pytest.raises(BenchmarkError, match="0: its weight is shared with another layer or worked out"):
            get_pruner(pruner, ModelGraph(model, (3, 8, 8))).prune({"0": [1]})


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_network_of_two_outputs_is_refused_in_one_message(pruner):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x).mean((2, 3))
            return self.one(x), self.two(x)

    with pytest.raises(BenchmarkError, match="or gives other than one tensor of logits"):
        get_pruner(pruner, ModelGraph(Two().eval(), (3, 8, 8))).prune({"conv": [1]})


@pytest.mark.parametrize("index", [1.0, True, "1", None])
def test_an_index_that_is_no_whole_number_is_refused(small, index):
    with pytest.raises(BenchmarkError, match="inner.0: .* is no index of a filter"):
        get_pruner("structure", small).prune({"inner.0": [index]})


def test_a_slip_too_small_for_the_eye_is_caught(small):
    class Careless(DepGraphPruner):
        def _remove(self, model, indices):
            super()._remove(model, indices)
            with torch.no_grad():
                model.head.bias.add_(1e-6)

    with pytest.raises(BenchmarkError, match="at most 1e-09 is rounding"):
        Careless(small).prune({"inner.0": [0]})


def test_the_head_of_a_network_with_outputs_put_back_is_the_one_that_answers():
    class Embedded(nn.Module):
        """The last linear layer that is defined is not the last that runs."""

        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.back, self.back_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
            self.head, self.embed = nn.Linear(8, 5), nn.Linear(6, 8)

        def forward(self, x):
            x = self.bn(self.stem(x))
            x = torch.relu(x + self.back_bn(self.back(x)))
            return self.head(self.embed(x.mean((2, 3))))

    graph = ModelGraph(lively(Embedded()), (3, 8, 8), "scatter")
    pruned = get_pruner("structure", graph).prune({"back": [0, 3], "stem": [1]})
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(replace_head(pruned, [4, 1])(images), pruned(images)[:, [4, 1]])
