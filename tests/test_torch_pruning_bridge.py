"""The bridge's scores are those that the Torch-Pruning library gives when it is asked directly, as its manual says."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn

from errors import BenchmarkError, ConfigError
from filter_selection import get_criterion
from structure import ModelGraph
from tests.nets import CLASSES, SHAPE, Plain, Residual, batches, images_and_labels, lively

DIRECT = {
    "magnitude": torch_pruning.importance.MagnitudeImportance,
    "lamp": torch_pruning.importance.LAMPImportance,
    "fpgm": torch_pruning.importance.FPGMImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
    "taylor": torch_pruning.importance.TaylorImportance,
    "hessian": torch_pruning.importance.HessianImportance,
}


class Joined(nn.Module):
    """Branches of different widths, joined: a layer's group is then a part of its reader's channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn, self.last, self.fc = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn(torch.cat((self.left(x), self.right(x)), 1)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


BUILD = {"residual": Residual, "plain": Plain, "joined": Joined}


def direct(build, layer, importance, images, labels):
    model = lively(build())
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images[:1])
    scorer = DIRECT[importance]()
    if importance == "taylor":
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    if importance == "hessian":
        squares = {}
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None]), label[None]).backward()
            for parameter in model.parameters():
                squares[parameter] = squares.get(parameter, 0) + parameter.grad**2 / len(images)
        for parameter, square in squares.items():
            parameter.grad = square
    conv = model.get_submodule(layer)
    filters = list(range(conv.out_channels))
    return scorer(graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=filters))


@pytest.mark.parametrize("importance", DIRECT)
@pytest.mark.parametrize("net", BUILD)
def test_scores_are_the_librarys_own(net, importance):
    images, labels = images_and_labels()
    graph = ModelGraph(lively(BUILD[net]()), SHAPE)
    layers = [layer for layer in graph.prunable if importance != "bn_scale" or (net, layer) in WITH_BATCH_NORM]
    if not layers:
        pytest.skip("no layer of it has a BatchNorm")
    criterion = get_criterion("torch_pruning", {"importance": importance})
    assert criterion.needs_data == (importance in ("taylor", "hessian"))
    scores = criterion.score(graph, layers, batches(images, labels, 4))
    for layer in layers:
        expected = direct(BUILD[net], layer, importance, images, labels)
        assert torch.allclose(scores[layer], expected, rtol=1e-6, atol=0)
        assert expected.std() > 1e-3 * expected.mean()


WITH_BATCH_NORM = {("residual", "stem"), ("residual", "conv1"), ("joined", "left"), ("joined", "right")}


def test_magnitude_by_hand():
    """The group of conv1: its own filters, its BatchNorm, and the input channels of conv2."""
    model = lively(Residual())
    filters, readers = model.conv1.weight.pow(2).sum((1, 2, 3)), model.conv2.weight.pow(2).sum((0, 2, 3))
    expected = ((filters + model.bn1.weight.pow(2) + readers) / 3).detach()
    scores = get_criterion("torch_pruning").score(ModelGraph(model, SHAPE), ["conv1"])["conv1"]
    assert torch.allclose(scores.double(), expected / expected.mean(), rtol=1e-5)


def test_hessian_of_one_image_is_what_the_library_accumulates():
    images, labels = images_and_labels(1)
    model = lively(Residual())
    scorer = torch_pruning.importance.HessianImportance()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=images)
    for loss in F.cross_entropy(model(images), labels, reduction="none"):
        model.zero_grad()
        loss.backward(retain_graph=True)
        scorer.accumulate_grad(model)
    group = graph.get_pruning_group(model.conv1, torch_pruning.prune_conv_out_channels, idxs=list(range(5)))
    scores = get_criterion("torch_pruning", {"importance": "hessian"}).score(
        ModelGraph(lively(Residual()), SHAPE), ["conv1"], batches(images, labels)
    )
    assert torch.allclose(scores["conv1"], scorer(group), rtol=1e-6, atol=0)


def test_the_library_keeps_only_the_last_gradient_it_is_given():
    """Why squares are summed here. Should this fail, the library has mended it, and its own method can be used."""
    layer, scorer = nn.Linear(1, 1, bias=False), torch_pruning.importance.HessianImportance()
    for value in (3.0, 1.0):
        layer.weight.grad = torch.full_like(layer.weight, value)
        scorer.accumulate_grad(layer)
    assert scorer._accu_grad[layer.weight].item() == 1.0


def test_bn_scale_without_batch_norm_names_the_layer_and_what_would_do():
    graph = ModelGraph(lively(Plain()), SHAPE)
    with pytest.raises(BenchmarkError, match="'bn_scale' finds no BatchNorm with features.0; valid without: magnitude"):
        get_criterion("torch_pruning", {"importance": "bn_scale"}).score(graph, graph.prunable)


def test_unknown_importances_are_refused_with_the_key():
    with pytest.raises(ConfigError, match="pruning.importance: 'l1' is unknown; valid: magnitude, lamp, fpgm, bn"):
        get_criterion("torch_pruning", {"importance": "l1"})


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_gradients_and_flags_left_over_do_not_count(importance):
    images, labels = images_and_labels()
    model = lively(Residual())
    used = copy.deepcopy(model).requires_grad_(False)
    for parameter in used.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    criterion = get_criterion("torch_pruning", {"importance": importance})
    scores = [criterion.score(ModelGraph(net, SHAPE), ["conv1"], batches(images, labels)) for net in (model, used)]
    assert torch.equal(scores[0]["conv1"], scores[1]["conv1"])
    assert not any(parameter.requires_grad for parameter in used.parameters())
