"""The criteria that rank filters by relevance: what a score sums up, what is refused, what is left untouched."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from zennit.rules import Epsilon

from errors import BenchmarkError, ConfigError
from filter_selection import get_criterion
from settings import CONFIG_DIR, check
from structure import ModelGraph
from tests.nets import CLASSES, SHAPE, Plain, Residual, batches, images_and_labels, lively
from tests.zennit_oracle import EPSILON, NETS, Everything, Squeezed, assert_same, our_relevance, zennit_relevance


@pytest.mark.parametrize("net", NETS)
def test_pxp_is_zennits_epsilon_everywhere_with_biases(net):
    model = lively(NETS[net]())
    images, labels = images_and_labels(6)
    theirs = zennit_relevance(model, Epsilon(EPSILON), images, labels, linear_rule=Epsilon(EPSILON))
    graph = ModelGraph(model, SHAPE)
    scores = get_criterion("pxp").score(graph, graph.convs, batches(images, labels, 4))
    assert_same(scores, {layer: theirs[layer].sum(dim=(2, 3)).abs().sum(dim=0) for layer in graph.convs})


@pytest.mark.parametrize("method", ["lrp", "pxp"])
@pytest.mark.parametrize("build", [Residual, Squeezed])
def test_scores_do_not_depend_on_the_batch_size(build, method):
    graph = ModelGraph(lively(build()), SHAPE)
    images, labels = images_and_labels(13)
    criterion = get_criterion(method)
    scores = [criterion.score(graph, graph.convs, batches(images, labels, size)) for size in (1, 7, None)]
    assert_same(scores[0], scores[1])
    assert_same(scores[0], scores[2])


def test_scores_are_sums_over_pixels_then_images_divided_by_the_layers_sum():
    graph = ModelGraph(lively(Residual()), SHAPE)
    images, labels = images_and_labels(6)
    each = [our_relevance(graph.model, images[n, None], labels[n, None]) for n in range(6)]

    def scores(**options):
        return get_criterion("lrp", options).score(graph, graph.convs, batches(images, labels, 4))

    for layer in graph.convs:
        per_image = torch.stack([found[layer][0].sum(dim=(1, 2)) for found in each])
        signed, absolute = per_image.sum(dim=0), per_image.abs().sum(dim=0)
        assert (signed - absolute).abs().max() > 1e-3
        expected = {
            ("signed", "none"): signed, ("signed", "layer_sum"): signed / signed.sum().abs(),
            ("absolute", "none"): absolute, ("absolute", "layer_sum"): absolute / absolute.sum(),
        }  # fmt: skip
        for (aggregation, normalisation), values in expected.items():
            found = scores(aggregation=aggregation, normalisation=normalisation)[layer]
            torch.testing.assert_close(found, values)
    found = our_relevance(graph.model, images, labels, "logit")["stem"].sum(dim=(2, 3)).sum(dim=0)
    torch.testing.assert_close(scores(start="logit", normalisation="none")["stem"], found)


def test_a_negative_sum_does_not_turn_the_order_round():
    graph = ModelGraph(lively(Residual(), seed=3), SHAPE)
    data = batches(*images_and_labels(4))
    raw = get_criterion("lrp", {"normalisation": "none"}).score(graph, graph.convs, data)
    divided = get_criterion("lrp").score(graph, graph.convs, data)
    negative = [layer for layer in graph.convs if raw[layer].sum() < 0]
    assert negative
    for layer in negative:
        assert divided[layer].argsort().tolist() == raw[layer].argsort().tolist()
        assert float(divided[layer].sum()) == pytest.approx(-1)


def test_relevance_starts_at_the_images_own_class_in_the_original_head():
    model = lively(Plain())
    graph = ModelGraph(model, SHAPE)
    images, _ = images_and_labels(3)

    def scores(*labels):
        return get_criterion("lrp").score(graph, graph.convs, [(images, torch.tensor(labels))])["features.3"]

    assert not torch.allclose(scores(3, 0, 2), scores(2, 0, 2))
    # Label 3 is the row 3 of the head, not the last of the three classes that occur.
    with torch.no_grad():
        model.classifier[3].weight[1] += 5
    before = scores(3, 0, 2)
    with torch.no_grad():
        model.classifier[3].weight[1] -= 7
    assert torch.equal(scores(3, 0, 2), before)
    with torch.no_grad():
        model.classifier[3].weight[3] *= torch.linspace(-1, 2, 9, dtype=torch.float64)
    assert not torch.allclose(scores(3, 0, 2), before)
    for label in (4, -1):
        with pytest.raises(BenchmarkError, match=f"label {label}: the network has logits 0 to 3"):
            scores(0, label, 2)


def state_of(model):
    tensors = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    return tensors, grads, hooks, needs, [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", ["not", "loader", "layer", "label"])
@pytest.mark.parametrize("method", ["lrp", "pxp"])
def test_the_network_and_the_images_are_left_as_they_were(method, fails, monkeypatch):
    model = lively(Residual()).train()
    model.bn1.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    graph = ModelGraph(model, SHAPE)
    images, labels = images_and_labels(8)
    given, before = images.clone(), state_of(model)

    def loader():
        yield images[:4], labels[:4]
        if fails == "loader":
            raise RuntimeError("broken")
        if fails == "layer":
            monkeypatch.setattr(F, "linear", lambda *args, **kwargs: 1 / 0)
        yield images[4:], labels[4:] + (fails == "label")

    try:
        get_criterion(method).score(graph, graph.convs, loader())
    except (RuntimeError, ZeroDivisionError, BenchmarkError):
        assert fails != "not"
    else:
        assert fails == "not"
    after = state_of(model)
    for name, (value, address) in before[0].items():
        assert torch.equal(after[0][name][0], value) and after[0][name][1] == address, name
    assert after[1:] == before[1:]
    assert torch.equal(images, given) and not images.requires_grad


def test_nothing_of_a_batch_outlives_it():
    graph = ModelGraph(lively(Residual()), SHAPE)
    alive = []

    def loader():
        for _ in range(5):
            images, labels = images_and_labels(3)
            alive.append(weakref.ref(images))
            yield images, labels
            del images
            held.append(sum(each() is not None for each in alive))

    held = []
    get_criterion("lrp").score(graph, graph.convs, loader())
    assert len(held) == 5 and max(held) == 1  # the loop variable alone


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.fc = nn.SiLU(), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = x * torch.sigmoid(self.gate(x))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def test_what_has_no_rule_is_refused_by_layer_and_operation_before_any_pass(monkeypatch):
    graph = ModelGraph(lively(Gated()), SHAPE)

    def untouched():
        raise AssertionError("an image was asked for")
        yield

    with pytest.raises(BenchmarkError, match=r"Gated: .* for act \(SiLU\), sigmoid \(sigmoid\), mul \(mul\);"):
        get_criterion("lrp").score(graph, graph.convs, untouched())
    # Above the layer that is read there is nothing to refuse; what is below runs forwards alone.
    silu = F.silu

    def without_gradient(*args, **kwargs):
        assert not torch.is_grad_enabled()
        return silu(*args, **kwargs)

    monkeypatch.setattr(F, "silu", without_gradient)
    found = get_criterion("lrp").score(graph, ["last"], batches(*images_and_labels(3)))
    assert found["last"].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("efficientnet_b0", ["features.0.2 (SiLU)", "scale_activation (Sigmoid)", "features.1.0.block.1 (mul)"]),
        ("mobilenet_v3_small", ["features.0.2 (Hardswish)", "(Hardsigmoid)", "features.1.block.1 (mul)"]),
    ],
)
def test_gated_networks_are_refused(name, operations):
    graph = ModelGraph(torchvision.models.get_model(name, weights=None).eval(), (3, 32, 32))
    for method in ("lrp", "pxp"):
        with pytest.raises(BenchmarkError) as raised:
            get_criterion(method).score(graph, graph.convs, [])
        assert all(operation in str(raised.value) for operation in operations)


def odd(forward, *modules):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)
            self.more = nn.ModuleList(modules)

        def forward(self, x):
            return forward(self, self.conv(x))

    return Odd().double().eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (odd(lambda net, x: net.fc(net.more[0](x).mean((2, 3))), nn.GroupNorm(2, 4)), r"more.0 \(GroupNorm\)"),
        (odd(lambda net, x: net.fc((x - x.mean((2, 3), keepdim=True)).mean((2, 3)))), r"\(sub\)"),
        (odd(lambda net, x: net.fc((x + x.mean((2, 3), keepdim=True)).mean((2, 3)))), r"\(add\)"),
        (odd(lambda net, x: net.fc(torch.add(x, x, alpha=2).mean((2, 3)))), r"\(add\)"),
        (odd(lambda net, x: net.fc((x * x).mean((2, 3)))), r"\(mul\)"),
        (odd(lambda net, x: net.fc(net.more[0](x)[0].mean((2, 3))), nn.MaxPool2d(2, return_indices=True)),
         r"more.0 \(MaxPool2d\)"),
        (odd(lambda net, x: x), "its output is no such tensor"),
    ],
)  # fmt: skip
def test_odd_networks_are_refused(model, message):
    graph = ModelGraph(model, SHAPE)
    with pytest.raises(BenchmarkError, match=message):
        get_criterion("lrp").score(graph, graph.convs, batches(*images_and_labels(3)))


def test_a_layer_without_relevance_is_an_error_that_names_it():
    data = batches(*images_and_labels(3))
    dead = lively(Residual())
    with torch.no_grad():
        dead.bn2.weight.zero_()
        dead.bn2.bias.zero_()
    graph = ModelGraph(dead, SHAPE)
    for method in ("lrp", "pxp"):
        with pytest.raises(BenchmarkError, match=f"{method}: no relevance reaches conv1"):
            get_criterion(method).score(graph, ["stem", "conv1"], data)
    beside = odd(lambda net, x: (net.fc(x.mean((2, 3))), net.more[0](x))[0], nn.Conv2d(4, 5, 1))
    with pytest.raises(BenchmarkError, match="more.0: no way leads from it to the output"):
        get_criterion("lrp").score(ModelGraph(beside, SHAPE), ["conv", "more.0"], data)
    with pytest.raises(BenchmarkError, match="lrp: there are no scoring images"):
        get_criterion("lrp").score(graph, ["stem"], [])
    weights = lively(Residual())
    with torch.no_grad():
        weights.stem.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(BenchmarkError, match="scores of stem are not finite"):
        get_criterion("lrp").score(ModelGraph(weights, SHAPE), ["stem"], data)


def test_relevance_that_cancels_is_not_divided_by():
    # Two equal filters, of which one speaks for the class and the other as strongly against it.
    model = lively(odd(lambda net, x: net.fc(F.relu(x).mean((2, 3)) + 0.0)))
    with torch.no_grad():
        model.conv.weight[:] = model.conv.weight[0]
        model.conv.bias.zero_()
        model.fc.weight[:] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    graph = ModelGraph(model, SHAPE)
    data = batches(*images_and_labels(3))
    with pytest.raises(BenchmarkError, match="lrp: positive and negative relevance of conv cancel"):
        get_criterion("lrp").score(graph, ["conv"], data)
    assert get_criterion("lrp", {"aggregation": "absolute"}).score(graph, ["conv"], data)["conv"].tolist() == [0.25] * 4


@pytest.mark.parametrize("method", ["lrp", "pxp"])
def test_single_precision_agrees(method):
    images, labels = images_and_labels(6)
    graph = ModelGraph(lively(Squeezed()), SHAPE)
    exact = get_criterion(method).score(graph, ["squeeze", "left"], batches(images, labels))
    graph = ModelGraph(lively(Squeezed()).float(), SHAPE)
    data = batches(images.float().contiguous(memory_format=torch.channels_last), labels)
    with torch.inference_mode():
        made_here = [(images.clone(), labels.clone()) for images, labels in data]
        found = get_criterion(method).score(graph, ["squeeze", "left"], made_here)
        explained = get_criterion(method).explain(graph, *made_here[0])
    assert explained.dtype == torch.float32 and explained.shape == images.shape
    for layer in exact:
        torch.testing.assert_close(found[layer], exact[layer], rtol=1e-3, atol=1e-4)


def test_fewer_layers_get_the_same_scores():
    graph = ModelGraph(lively(Everything()), SHAPE)
    data = batches(*images_and_labels(4))
    every = get_criterion("lrp").score(graph, graph.convs, data)
    some = get_criterion("lrp").score(graph, ["last", "depthwise"], data)
    assert list(some) == ["last", "depthwise"]
    assert_same(some, every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_rule": "gamma"}, "pruning.conv_rule: 'gamma' is unknown; valid: alpha1beta0, alpha2beta1, epsilon"),
        ({"first_layer": "flat"}, "pruning.first_layer: 'flat' is unknown; valid: conv, zbox"),
        ({"start": "softmax"}, "pruning.start: 'softmax' is unknown; valid: one, logit"),
        ({"aggregation": "mean"}, "pruning.aggregation: 'mean' is unknown; valid: signed, absolute"),
        ({"normalisation": "l2"}, "pruning.normalisation: 'l2' is unknown; valid: layer_sum, none"),
        ({"epsilon": 0.0}, "pruning.epsilon: 0.0 does not stabilise"),
    ],
)
def test_unknown_words_are_refused_with_the_key(options, message):
    for method in ("lrp", "pxp"):
        with pytest.raises(ConfigError, match=message):
            get_criterion(method, options)


@pytest.mark.parametrize("method", ["lrp", "pxp"])
def test_configured_and_own_defaults_are_the_same(method):
    with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
        pruning = check(compose("config", overrides=[f"pruning={method}"])).pruning
    assert (pruning.scoring_classes, pruning.pruning_scope) == ("selected", "global")
    configured, own = get_criterion(method, pruning.options), get_criterion(method)
    assert vars(configured) == vars(own)
    assert configured.class_aware and configured.needs_data and "global" in configured.scopes
