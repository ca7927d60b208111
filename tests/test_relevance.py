"""Relevance of every layer against zennit, against plain loops, and against conservation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zennit.rules import AlphaBeta, Epsilon, ZBox, ZPlus

from errors import ConfigError
from filter_selection import get_criterion
from relevance import RelevancePass
from relevance_rules import TINY, Rules
from structure import ModelGraph
from tests.nets import CLASSES, SHAPE, Plain, Residual, batches, images_and_labels, lively
from tests.zennit_oracle import (
    CONV_RULES,
    EPSILON,
    NETS,
    Everything,
    Plus,
    Squeezed,
    assert_same,
    our_relevance,
    zennit_relevance,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.mark.parametrize("rule", CONV_RULES)
@pytest.mark.parametrize("net", NETS)
def test_relevance_is_zennits(net, rule):
    model = lively(NETS[net]())
    images, labels = images_and_labels(6)
    assert (images < 0).any()
    theirs = zennit_relevance(model, CONV_RULES[rule], images, labels)
    assert_same(our_relevance(model, images, labels, conv=rule), theirs)
    pixels = get_criterion("lrp", {"conv_rule": rule}).explain(ModelGraph(model.train(), SHAPE), images, labels)
    assert_same({"pixels": pixels}, theirs)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("rule", [ZPlus(TINY), AlphaBeta(2, 1, TINY)])
def test_biases_that_count_do_so_as_in_zennit(rule):
    model = lively(Everything())
    images, labels = images_and_labels(6)
    theirs = zennit_relevance(model, rule, images, labels, linear_rule=Epsilon(EPSILON))
    conv = "alpha1beta0" if isinstance(rule, ZPlus) else "alpha2beta1"
    assert_same(our_relevance(model, images, labels, conv=conv, biases=True), theirs)


def test_box_rule_of_the_first_layer_is_zennits_and_conserves():
    model = lively(Everything())
    _, labels = images_and_labels(6)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (MEAN, STD))
    pixels = torch.rand(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = (pixels - mean) / std
    box = ZBox(-mean / std, (1 - mean) / std, TINY, zero_params="bias")
    theirs = zennit_relevance(model, CONV_RULES["alpha1beta0"], images, labels, first_rule=box)
    criterion = get_criterion("lrp", {"first_layer": "zbox"})
    graph = ModelGraph(model, SHAPE)
    ours = criterion.explain(graph, images, labels, mean=MEAN, std=STD)
    assert_same({"pixels": ours}, theirs)
    first = our_relevance(model, images, labels)["stem"]
    torch.testing.assert_close(ours.sum(dim=(1, 2, 3)), first.sum(dim=(1, 2, 3)))
    one_by_one = [criterion.explain(graph, images[i, None], labels[i, None], mean=MEAN, std=STD) for i in range(6)]
    torch.testing.assert_close(torch.cat(one_by_one), ours)
    # No filter's score depends on the rule below the first of them.
    data = batches(images, labels)
    scores = [get_criterion("lrp", {"first_layer": word}).score(graph, graph.convs, data) for word in ("conv", "zbox")]
    assert_same(scores[0], scores[1])
    with pytest.raises(ConfigError, match="pruning.first_layer: 'zbox' needs the mean and std"):
        criterion.explain(graph, images, labels)


def naive_hand_down(matrix, inputs, relevance, rule):
    """One output after the other, one input after the other. matrix[j][i]: the weight from input i to output j."""
    handed = [0.0] * len(inputs)
    for weights, incoming in zip(matrix, relevance, strict=True):
        shares = [weight * value for weight, value in zip(weights, inputs, strict=True)]
        parts = [(1, shares)]
        if rule != "epsilon":
            alpha = int(rule[5])
            parts = [(alpha, [max(z, 0) for z in shares]), (1 - alpha, [min(z, 0) for z in shares])]
        for factor, some in parts:
            total = sum(some)
            total += (EPSILON if rule == "epsilon" else 1e-30) * (-1 if total < 0 else 1)
            for i, share in enumerate(some):
                handed[i] += factor * share / total * incoming
    return handed


def matrix_of(conv, weight, shape):
    """The convolution as a matrix, entry by entry: [outputs][inputs], both flattened in the order C, H, W."""
    _, height, width = shape
    rows = []
    (down, right), (top, left), (high, wide) = conv.stride, conv.padding, conv.kernel_size
    group_in, group_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    for out in range(conv.out_channels):
        for y in range((height + 2 * top - high) // down + 1):
            for x in range((width + 2 * left - wide) // right + 1):
                row = [0.0] * (conv.in_channels * height * width)
                for channel in range(group_in):
                    for i in range(high):
                        for j in range(wide):
                            at_y, at_x = y * down + i - top, x * right + j - left
                            if 0 <= at_y < height and 0 <= at_x < width:
                                source = out // group_out * group_in + channel
                                row[(source * height + at_y) * width + at_x] = weight[out][channel][i][j]
                rows.append(row)
    return rows


@pytest.mark.parametrize("rule", CONV_RULES)
def test_relevance_is_that_of_plain_loops(rule):
    model = lively(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, (1, 2), groups=2),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(6, 3, (2, 1)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(9, 3),
        )  # fmt: skip
    )
    images, labels = images_and_labels(2, shape=(2, 4, 4))
    labels = labels % 3
    ours = our_relevance(model, images, labels, conv=rule)
    norm = model[1]
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    weights = {"0": model[0].weight * gain.view(-1, 1, 1, 1), "3": model[3].weight, "5": model[5].weight}
    for n, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        inputs = [image[None]]
        for module in model:
            inputs.append(module(inputs[-1].clone()).detach())
        relevance = [float(index == label) for index in range(3)]
        relevance = naive_hand_down(model[8].weight.tolist(), inputs[8].flatten().tolist(), relevance, "epsilon")
        for layer in ("5", "3", "0"):
            torch.testing.assert_close(ours[layer][n].flatten().tolist(), relevance, rtol=1e-9, atol=1e-12)
            read = inputs[int(layer)]
            matrix = matrix_of(model[int(layer)], weights[layer].tolist(), read.shape[1:])
            relevance = naive_hand_down(matrix, read.flatten().tolist(), relevance, rule)


# Sets of convolutions over which all relevance passes.
CUTS = {
    Everything: [["last"], ["stem"]],
    Residual: [["conv2", "shortcut"], ["stem"]],
    Squeezed: [["head"], ["left", "right"], ["squeeze"]],
    Plain: [["features.0"], ["features.3"], ["features.5"]],
}


@pytest.mark.parametrize("start", ["one", "logit"])
@pytest.mark.parametrize(
    ("build", "rule"),
    [(build, "epsilon") for build in CUTS] + [(build, "alpha1beta0") for build in (Squeezed, Plain)],
)
def test_relevance_of_every_layer_is_what_was_put_in(build, rule, start):
    model = without_shifts(lively(build()))  # a bias alone behind an output would keep its relevance
    images, labels = images_and_labels(7)
    put_in = torch.ones(7, dtype=torch.float64)
    if start == "logit":
        put_in = model(images).detach().gather(1, labels[:, None])[:, 0]
    found = our_relevance(model, images, labels, start, conv=rule, epsilon=TINY)
    for cut in CUTS[build]:
        total = sum(found[layer].sum(dim=(1, 2, 3)) for layer in cut)
        torch.testing.assert_close(total, put_in, rtol=1e-9, atol=1e-9)
    pixels = get_criterion("lrp", {"conv_rule": rule, "start": start, "epsilon": TINY}).explain(
        ModelGraph(model, SHAPE), images, labels
    )
    torch.testing.assert_close(pixels.sum(dim=(1, 2, 3)), put_in, rtol=1e-9, atol=1e-9)


def without_shifts(model):
    for module in model.modules():
        for shift in (getattr(module, "bias", None), getattr(module, "running_mean", None)):
            if shift is not None:
                shift.data.zero_()
    return model


def real(name: str) -> nn.Module:
    """A torchvision network with lively weights; VGG's linear layers, which would take seconds to draw, made small."""
    options = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    if name == "vgg16_bn":
        model.classifier = nn.Sequential(nn.Linear(25088, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 10))
    return lively(model.to_empty(device="cpu"))


REAL_CUTS = {
    "resnet18": [["layer4.0.conv2", "layer4.0.downsample.0"], ["layer2.0.conv2", "layer2.0.downsample.0"], ["conv1"]],
    "vgg16_bn": [[f"features.{index}"] for index in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)],
    "mobilenet_v2": [["features.18.0"], ["features.0.0"]],
    "densenet121": [["features.conv0"]],
    "googlenet": [[f"inception4a.branch{at}.conv" for at in ("1", "2.1", "3.1", "4.1")], ["conv1.conv"]],
}


@pytest.mark.parametrize("rule", ["alpha1beta0", "epsilon"])
@pytest.mark.parametrize("name", REAL_CUTS)
def test_real_networks_conserve(name, rule):
    model = real(name)
    if name == "mobilenet_v2" or rule == "epsilon":
        without_shifts(model)  # a depthwise filter's output may have a bias behind it and nothing else
    images, _ = images_and_labels(2, shape=(3, 32, 32))
    found = our_relevance(model, images, torch.tensor([9, 4]), conv=rule, epsilon=TINY)
    for cut in REAL_CUTS[name]:
        total = sum(found[layer].sum(dim=(1, 2, 3)) for layer in cut)
        assert total.tolist() == pytest.approx([1, 1], abs=1e-6), cut


class Functional(nn.Module):
    """`Modular` in calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a((x * 0.5 + 0.1).clone()), inplace=True)
        x = F.leaky_relu(torch.add(self.b(x), x), 0.3, inplace=True)
        x = F.max_pool2d(F.relu6(self.c(F.dropout(x, training=self.training))), 2)
        return self.fc(torch.mean(F.avg_pool2d(x.relu(), 2, stride=1), (2, 3)))


class Modular(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, CLASSES)
        self.plus, self.leaky = Plus(), nn.LeakyReLU(0.3)
        self.tail = nn.Sequential(
            nn.ReLU6(), nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2, stride=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x * 0.5 + 0.1).relu()
        return self.fc(self.tail(self.c(self.leaky(self.plus(self.b(x), x)))))


def test_calls_are_treated_as_modules_are():
    images, labels = images_and_labels(5)
    functional, modular = lively(Functional()), lively(Modular())
    assert_same(our_relevance(functional, images, labels), our_relevance(modular, images, labels))
    logits = without_shifts(functional)(images).detach()
    criterion = get_criterion("lrp", {"conv_rule": "epsilon", "epsilon": TINY, "start": "logit"})
    explained = criterion.explain(ModelGraph(functional, SHAPE), images, labels)  # through x * 0.5 + 0.1 as well
    torch.testing.assert_close(explained.sum(dim=(1, 2, 3)), logits.gather(1, labels[:, None])[:, 0])


class Aliased(nn.Module):
    """An in-place activation whose operand is read again afterwards."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.fc = nn.ReLU(inplace), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        before = self.a(x)
        after = self.relu(before)
        if not self.inplace:
            before = after
        x = self.b(after)
        y = x + before
        x += before
        return self.fc((x if self.inplace else y).mean((2, 3)))


def test_an_operand_changed_in_place_is_read_changed():
    images, labels = images_and_labels(5)
    ours = [our_relevance(lively(Aliased(inplace)), images, labels) for inplace in (True, False)]
    assert_same(ours[0], ours[1])


@pytest.mark.parametrize("rule", ["alpha1beta0", "alpha2beta1"])
@pytest.mark.parametrize("net", NETS)
def test_what_the_graph_says_of_signs_changes_no_result(net, rule, monkeypatch):
    model = lively(NETS[net]())
    images, labels = images_and_labels(5)
    with monkeypatch.context() as patch:
        patch.setattr(RelevancePass, "_find_non_negative", lambda self: set())
        slow = our_relevance(model, images, labels, conv=rule)
    assert_same(our_relevance(model, images, labels, conv=rule), slow)


class Shifted(nn.Module):
    """An add of a number, and modules named like calls that are something else."""

    def __init__(self):
        super().__init__()
        self.add, self.mean = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mean(F.relu(self.add(x)) + -0.5).mean((2, 3)))


def test_signs_are_found_only_where_they_are_sure():
    graph = ModelGraph(lively(Everything()), SHAPE)
    relevance_pass = RelevancePass(graph, graph.convs, Rules(), lambda layer, relevance: None)
    sure = {node.name for node in relevance_pass.non_negative}
    assert {"relu", "max_pool", "relu6", "relu_1", "cat_1", "drop"} <= sure
    assert sure.isdisjoint({"x", "stem", "stem_bn", "leaky", "plus", "pool", "average", "late_bn"})
    shifted = ModelGraph(lively(Shifted()), SHAPE)
    relevance_pass = RelevancePass(shifted, shifted.convs, Rules(), lambda layer, relevance: None)
    assert {node.name for node in relevance_pass.non_negative} == {"relu"}
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            values[node.name] = super().run_node(node)
            return values[node.name]

    Recorder(graph.module).run(images_and_labels(5)[0])
    assert all((values[name] >= 0).all() for name in sure if isinstance(values[name], Tensor))


@st.composite
def networks(draw):
    """Convolutions of any stride, padding, dilation and groups, each with or without BatchNorm, activation, pooling."""
    layers, channels = nn.Sequential(), 3
    for index in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        wide = groups * draw(st.integers(1, 3))
        conv = nn.Conv2d(
            channels, wide, draw(st.sampled_from([1, 2, 3, (3, 1)])), stride=draw(st.sampled_from([1, 2, (1, 2)])),
            padding=draw(st.integers(1, 2)), dilation=draw(st.integers(1, 2)), groups=groups, bias=draw(st.booleans()),
        )  # fmt: skip
        layers.add_module(f"conv{index}", conv)
        if draw(st.booleans()):
            layers.add_module(f"conv{index}_bn", nn.BatchNorm2d(wide))
        inplace = draw(st.booleans())
        activations = [nn.ReLU(inplace), nn.ReLU6(inplace), nn.LeakyReLU(0.1, inplace), nn.Identity()]
        layers.add_module(f"activation{index}", draw(st.sampled_from(activations)))
        pool = draw(st.sampled_from([nn.Identity(), nn.MaxPool2d(2, padding=1), nn.AvgPool2d(2, 1, padding=1)]))
        layers.add_module(f"pool{index}", pool)
        channels = wide
    layers.add_module("average", nn.AdaptiveAvgPool2d(2))
    layers.add_module("flatten", nn.Flatten())
    layers.add_module("fc", nn.Linear(4 * channels, CLASSES))
    return lively(layers, draw(st.integers(0, 100)))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from(list(CONV_RULES)))
def test_any_network_gets_zennits_relevance(model, rule):
    images, labels = images_and_labels(3)
    theirs = zennit_relevance(model, CONV_RULES[rule], images, labels)
    assert_same(our_relevance(model, images, labels, conv=rule), theirs, may_be_zero=True)
