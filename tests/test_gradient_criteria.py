"""Methods that read gradients or count by class, against closed forms and plain loops over layers and images."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from errors import BenchmarkError, ConfigError
from filter_selection import get_criterion
from filter_selection.crisp import sum_of_absolute_gradients
from filter_selection.gradients import GradientCriterion, frozen
from structure import ModelGraph
from tests.nets import CLASSES, NETS, SHAPE, Plain, Residual, batches, images_and_labels, lively

# The max network of TorchPruner's own tests: hidden units A = relu((y - x) / 2), B = relu(x - y), C = D = relu(x + y),
# so that max(x, y) = A + B / 2 + C / 2. It is the first logit; the second is always 0.
POINTS = [(0.0, 1.0), (1.0, 0.0), (1.0, 2.0), (2.0, 1.0)]


class MaxNetwork(nn.Module):
    def __init__(self, weight_of_d: float):
        super().__init__()
        self.hidden, self.relu = nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(inplace=True)
        self.out = nn.Linear(4, 2, bias=False)
        hidden = [[-0.5, 0.5], [1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]
        self.hidden.weight = nn.Parameter(torch.tensor(hidden, dtype=torch.float64).view(4, 2, 1, 1))
        out = [[1.0, 0.5, 0.5, weight_of_d], [0.0, 0.0, 0.0, 0.0]]
        self.out.weight = nn.Parameter(torch.tensor(out, dtype=torch.float64))

    def forward(self, x):
        return self.out(self.relu(self.hidden(x)).flatten(1))


def max_network_scores(weight_of_d: float, **options) -> list[float]:
    graph = ModelGraph(MaxNetwork(weight_of_d).eval(), (2, 1, 1))
    images = torch.tensor(POINTS, dtype=torch.float64).view(4, 2, 1, 1)
    labels = torch.zeros(4, dtype=torch.int64)
    scores = get_criterion("torchpruner", options).score(graph, ["hidden"], batches(images, labels))
    return scores["hidden"].tolist()


def normalised(values: list[float]) -> list[float]:
    length = math.sqrt(sum(value**2 for value in values))
    return pytest.approx([value / length for value in values], rel=1e-12)


def test_closed_forms_where_d_is_not_read():
    # dL/dlogit0 = p - 1 = -q with q = 1 / (1 + exp(max)); max is 1 at the first two points, 2 at the others.
    q1, q2 = 1 / (1 + math.e), 1 / (1 + math.e**2)
    # A is 1/2 at two points, one of each max, and 0 elsewhere; B is 1 there where A is 0; C is 1 and 3.
    taylor = [(0.5 * q1 + 0.5 * q2) / 4, (0.5 * q1 + 0.5 * q2) / 4, (2 * 0.5 * q1 + 2 * 1.5 * q2) / 4, 0]
    assert max_network_scores(0.0, attribution="taylor") == normalised(taylor)
    sensitivity = [(q1 + q2) / 2, (q1 + q2) / 4, (q1 + q2) / 4, 0]
    assert max_network_scores(0.0, attribution="sensitivity") == normalised(sensitivity)
    assert max_network_scores(0.0, attribution="apoz") == normalised([0.5, 0.5, 1, 1])


def test_closed_forms_where_d_works_against_the_class():
    q1, q2 = 1 / (1 + math.exp(0.9)), 1 / (1 + math.exp(1.7))
    taylor = [(q1 + q2) / 8, (q1 + q2) / 8, (q1 + 3 * q2) / 4, (q1 + 3 * q2) / 20]
    assert max_network_scores(-0.1, attribution="taylor") == normalised(taylor)
    # Removing D raises the logit of the class and lowers the loss.
    assert max_network_scores(-0.1, attribution="taylor", signed=True) == normalised([*taylor[:3], -taylor[3]])
    sensitivity = [(q1 + q2) / 2, (q1 + q2) / 4, (q1 + q2) / 4, (q1 + q2) / 20]
    assert max_network_scores(-0.1, attribution="sensitivity") == normalised(sensitivity)


# Naive versions: module hooks and autograd, one layer and one image at a time.


def response_and_gradient(model, module, image, label):
    """[C, H, W] each: a module's output for one image, and the gradient of that image's cross-entropy there."""
    held = []

    def hold(module, inputs, output):
        held.append(output.detach().clone().requires_grad_())
        return held[0].clone()  # what follows may overwrite it

    handle = model.get_submodule(module).register_forward_hook(hold)
    loss = -F.log_softmax(model(image[None]), dim=1)[0, int(label)]
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, held)
    return held[0].detach()[0], gradient[0]


def naive(model, taps, images, labels, of_one, of_all):
    """of_all(for each image (label, of_one(response plane, gradient plane))) for each filter of each layer."""
    scores = {}
    for layer, module in taps.items():
        filters = model.get_submodule(layer).out_channels
        found = [[] for _ in range(filters)]
        for image, label in zip(images, labels.tolist(), strict=True):
            response, gradient = response_and_gradient(model, module, image, label)
            for index in range(filters):
                found[index].append((label, of_one(response[index], gradient[index])))
        scores[layer] = [of_all(values) for values in found]
    return scores


def mean(values):
    return sum(float(value) for _, value in values) / len(values)


def share_of_each_class(values):
    by_class = {}
    for label, value in values:
        by_class.setdefault(label, []).append(bool(value))
    assert len(by_class) == 3  # class 1 has no image
    return [sum(hits) / len(hits) for hits in by_class.values()]


NAIVE = {
    ("torchpruner", "taylor"): (lambda a, g: abs((a * g).sum()), mean),
    ("torchpruner", "signed"): (lambda a, g: -(a * g).sum(), mean),
    ("torchpruner", "sensitivity"): (lambda a, g: g.abs().sum(), mean),
    ("torchpruner", "apoz"): (lambda a, g: 1 - (a.clamp(min=0) == 0).double().mean(), mean),
    ("class_taylor", 0.0): (lambda a, g: bool(((a * g).abs() > 0).any()), lambda v: sum(share_of_each_class(v))),
    ("class_taylor", 0.01): (lambda a, g: bool(((a * g).abs() > 0.01).any()), lambda v: sum(share_of_each_class(v))),
    ("firing_rate", None): (lambda a, g: bool((a > 0).any()), lambda v: max(share_of_each_class(v))),
}
OPTIONS = {
    "taylor": {"attribution": "taylor"}, "signed": {"attribution": "taylor", "signed": True},
    "sensitivity": {"attribution": "sensitivity"}, "apoz": {"attribution": "apoz"},
    0.0: {"threshold": 0.0}, 0.01: {"threshold": 0.01}, None: {},
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("method", NAIVE, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_scores_are_those_of_the_naive_version(net, method, batch_size):
    build, taps = NETS[net]
    model, (images, labels) = lively(build()), images_and_labels()
    images = images * 0.05 if method[0] == "firing_rate" else images  # small ones leave some filters silent
    expected = naive(model, taps, images, labels, *NAIVE[method])
    criterion = get_criterion(method[0], OPTIONS[method[1]])
    scores = criterion.score(ModelGraph(model, SHAPE), tuple(taps), batches(images, labels, batch_size))
    for layer in taps:
        exactly = normalised if method[0] == "torchpruner" else pytest.approx
        assert scores[layer].tolist() == exactly(expected[layer])


def test_the_counting_methods_tell_filters_apart_in_these_tests():
    """Else the equality above would be that of constants."""
    model, (images, labels) = lively(Residual()), images_and_labels()
    taps = NETS["residual"][1]
    for method, scale in ((("class_taylor", 0.01), 1), (("firing_rate", None), 0.05)):
        expected = naive(model, taps, scale * images, labels, *NAIVE[method])
        assert max(len(set(values)) for values in expected.values()) >= 3


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("net", NETS)
def test_crisp_takes_the_absolute_value_of_each_images_own_gradient(net, batch_size):
    build, taps = NETS[net]
    model, (images, labels) = lively(build()), images_and_labels()
    expected = {}
    for layer in taps:
        weight = model.get_submodule(layer).weight
        saliency = torch.zeros_like(weight)
        for image, label in zip(images, labels.tolist(), strict=True):
            loss = -F.log_softmax(model(image[None]), dim=1)[0, label]
            saliency += torch.autograd.grad(loss, weight)[0].abs() / len(images)
        expected[layer] = [(kernel.abs() * s).sum().item() for kernel, s in zip(weight, saliency, strict=True)]
    scores = get_criterion("crisp").score(ModelGraph(model, SHAPE), tuple(taps), batches(images, labels, batch_size))
    assert {layer: values.tolist() for layer, values in scores.items()} == {
        layer: pytest.approx(values, rel=1e-10) for layer, values in expected.items()
    }


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, (3, 2), dilation=(1, 2), padding="same", bias=False),
        nn.Conv2d(4, 3, 3, stride=(1, 2), padding=(2, 1), padding_mode="circular"),
        nn.Conv2d(4, 3, 2, padding="valid"),
        nn.Conv2d(4, 6, (7, 6), groups=2),  # one position only
    ],
)
def test_absolute_gradients_are_those_of_each_image(conv, monkeypatch):
    conv = conv.double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 4, 7, 6, dtype=torch.float64, generator=generator)
    outputs = conv(inputs)
    gradient = torch.randn(outputs.shape, dtype=torch.float64, generator=generator)
    expected = torch.zeros_like(conv.weight)
    for n in range(3):
        expected += torch.autograd.grad(outputs[n], conv.weight, gradient[n], retain_graph=True)[0].abs()
    for block in (128, 2, 1):
        monkeypatch.setattr("filter_selection.crisp.BLOCK", block)
        assert torch.allclose(sum_of_absolute_gradients(conv, inputs, gradient), expected, rtol=1e-12, atol=1e-12)


# The pass itself


class Overwriting(nn.Module):
    """Each way of writing over a response that has just been there: module, method, function, keyword, flag, alias."""

    def __init__(self, how: str):
        super().__init__()
        self.conv, self.bn, self.fc, self.how = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, CLASSES), how
        self.leaky = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.how == "module":
            x = self.leaky(x)
        elif self.how == "method":
            x = x.sigmoid_()
        elif self.how == "function":
            x = torch.sigmoid_(x)
        elif self.how == "keyword":
            x = F.hardswish(x, inplace=True)
        elif self.how == "flag":
            x = F.leaky_relu(x, 0.3, True)
        elif self.how == "alias":
            x = F.elu(x.view(-1, 5, 6, 6), inplace=True)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["module", "method", "function", "keyword", "flag", "alias"])
def test_a_response_is_read_before_it_is_overwritten(how):
    model, (images, labels) = lively(Overwriting(how)), images_and_labels()
    expected = naive(model, {"conv": "bn"}, images, labels, *NAIVE["torchpruner", "taylor"])
    scores = get_criterion("torchpruner").score(ModelGraph(model, SHAPE), ["conv"], batches(images, labels))
    assert scores["conv"].tolist() == normalised(expected["conv"])


class Recording(GradientCriterion):
    name = "recording"

    def __init__(self):
        super().__init__()
        self.order, self.gradients, self.still_there = [], [], []

    def observe(self, state, response, gradient, labels):
        self.still_there.append([reference() is not None for reference in self.gradients])
        self.gradients.append(weakref.ref(gradient))
        self.order.append((len(state), tuple(labels.tolist())))
        assert not response.requires_grad and gradient.shape == response.shape
        return state + response.sum()


def test_each_gradient_is_read_as_soon_as_it_is_there_and_then_let_go():
    criterion, (images, labels) = Recording(), images_and_labels(4)
    criterion.score(ModelGraph(lively(Plain()), SHAPE), NETS["plain"][1], batches(images, labels, 2))
    first, second = tuple(labels[:2].tolist()), tuple(labels[2:].tolist())
    assert criterion.order == [(7, first), (8, first), (5, first), (7, second), (8, second), (5, second)]
    assert not any(any(alive) for alive in criterion.still_there)


class Probe(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Probe.calls += 1
        return gradient


class Probed(nn.Module):
    def forward(self, x):
        return Probe.apply(x)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.probe = nn.Conv2d(3, 4, 3), Probed()
        self.two, self.fc = nn.Conv2d(4, 5, 3), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.two(self.probe(torch.relu(self.one(x))))).mean((2, 3)))


@pytest.mark.parametrize(("layers", "calls"), [(["two"], 0), (["one", "two"], 1), (["one"], 1)])
def test_the_backward_pass_ends_at_the_earliest_tap(layers, calls, monkeypatch):
    monkeypatch.setattr(torch.fx.Tracer, "is_leaf_module", lambda tracer, module, name: not isinstance(module, Deep))
    graph = ModelGraph(lively(Deep()), SHAPE)
    Probe.calls = 0
    get_criterion("torchpruner").score(graph, layers, batches(*images_and_labels()))
    assert Probe.calls == calls


def test_it_works_where_gradients_are_switched_off():
    graph, data = ModelGraph(lively(Residual()), SHAPE), batches(*images_and_labels())
    expected = get_criterion("torchpruner").score(graph, ["conv1"], data)["conv1"]
    with torch.no_grad():
        assert torch.equal(get_criterion("torchpruner").score(graph, ["conv1"], data)["conv1"], expected)


def test_frozen_puts_each_flag_back_after_an_exception():
    model = Residual()
    model.bn1.weight.requires_grad_(False)
    with pytest.raises(KeyError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["bn1.weight"]


@pytest.mark.parametrize("method", ["torchpruner", "class_taylor", "crisp"])
def test_labels_without_a_logit_are_refused(method):
    images, labels = images_and_labels()
    with pytest.raises(BenchmarkError, match=f"{method}: labels from 0 to 7 for 4 logits; scoring needs the original"):
        labels[3] = 7
        get_criterion(method).score(ModelGraph(lively(Plain()), SHAPE), ["features.0"], batches(images, labels))


def test_an_output_that_is_no_row_of_logits_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    with pytest.raises(BenchmarkError, match=r"torchpruner: the network's output must be one row of logits an image"):
        get_criterion("torchpruner").score(ModelGraph(model, SHAPE), ["0"], batches(*images_and_labels()))


class DeadEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dead, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.conv(x)
        self.dead(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("layers", "message"), [(["dead"], "no logit dep"), (["conv", "dead"], "dead scores zero")])
@pytest.mark.parametrize("method", ["torchpruner", "class_taylor", "crisp"])
def test_a_layer_that_leads_nowhere_is_refused(method, layers, message):
    with pytest.raises(BenchmarkError, match=f"{method}: {message}"):
        get_criterion(method).score(ModelGraph(lively(DeadEnd()), SHAPE), layers, batches(*images_and_labels()))


def test_apoz_reads_no_labels():
    images, labels = images_and_labels()
    graph = ModelGraph(lively(Plain()), SHAPE)
    criterion = get_criterion("torchpruner", {"attribution": "apoz"})
    scores = criterion.score(graph, ["features.3"], batches(images, labels))["features.3"]
    assert torch.equal(criterion.score(graph, ["features.3"], batches(images, labels + 99))["features.3"], scores)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("torchpruner", {"attribution": "shap"}, "pruning.attribution: 'shap' is unknown; valid: taylor, apoz, sensit"),
        ("torchpruner", {"attribution": "apoz", "signed": True}, "pruning.signed: true; apoz has no sign, only attr"),
        ("class_taylor", {"threshold": -1.0}, "pruning.threshold: -1.0 is exceeded everywhere; valid: 0 or more"),
    ],
)
def test_options_that_are_not_valid_are_refused_with_the_key(method, options, message):
    with pytest.raises(ConfigError, match=message):
        get_criterion(method, options)


def test_a_threshold_that_nothing_exceeds_is_refused_with_the_key():
    criterion = get_criterion("class_taylor", {"threshold": 1e9})
    with pytest.raises(BenchmarkError, match=r"class_taylor: features.0 .* pruning.threshold=1000000000.0 .* lower it"):
        criterion.score(ModelGraph(lively(Plain()), SHAPE), ["features.0"], batches(*images_and_labels()))
