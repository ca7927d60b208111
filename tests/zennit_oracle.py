"""zennit's relevance, and networks that both it and the program can take apart."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zennit.canonizers import NamedMergeBatchNorm
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import AlphaBeta, Epsilon, Norm, Pass, ZPlus
from zennit.types import Activation, AvgPool, BatchNorm

from relevance import RelevancePass
from relevance_rules import TINY, Rules
from structure import ModelGraph
from tests.nets import CLASSES, Plain

EPSILON = 1e-6
CONV_RULES = {
    "alpha1beta0": ZPlus(TINY, zero_params="bias"),
    "alpha2beta1": AlphaBeta(2, 1, TINY, zero_params="bias"),
    "epsilon": Epsilon(EPSILON, zero_params="bias"),
}


class Plus(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


class ZennitPlus(nn.Module):
    """The same for zennit, whose rules need a module of its own to hold on to."""

    def __init__(self):
        super().__init__()
        self.sum = Sum()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.sum(torch.stack((one, other), dim=-1))


class Everything(nn.Module):
    """BatchNorm after and before a convolution, stride, padding, groups, depthwise, LeakyReLU, a residual add of signed
    branches, a concatenation, a channel shuffle, every pooling, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
        self.grouped_bn = nn.BatchNorm2d(4)
        self.leaky = nn.LeakyReLU(0.2)
        self.depthwise = nn.Conv2d(4, 8, (3, 1), padding=(2, 1), dilation=(2, 1), groups=4)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(8)
        self.plus = Plus()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)
        self.max_pool = nn.MaxPool2d(2, stride=2, padding=1)
        self.late_bn = nn.BatchNorm2d(14)
        self.relu6 = nn.ReLU6()
        self.last = nn.Conv2d(14, 5, 2, padding="same", padding_mode="circular")
        self.average = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(20, 9)
        self.drop = nn.Dropout()
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        y = self.depthwise(self.leaky(self.grouped_bn(self.grouped(x))))[:, :, :, 1:5]
        y = self.plus(y, self.shortcut_bn(self.shortcut(x)))
        y = self.relu(self.pool(y))
        y = torch.cat((self.max_pool(x)[:, :, :4, :4], y), dim=1)
        one, other = y.view(y.size(0), 2, 7, 4, 4).transpose(1, 2).contiguous().view(y.size(0), -1, 4, 4).chunk(2, 1)
        y = self.relu6(self.late_bn(torch.cat((other, one), 1)))
        y = torch.flatten(self.average(self.last(y)), 1)
        return self.head(self.drop(self.relu(self.hidden(y))))


class Squeezed(nn.Module):
    """A head that is a convolution, and fire-like branches, as in SqueezeNet; in-place activations."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, stride=1, ceil_mode=True)
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.squeeze(x)))
        x = torch.cat((self.relu(self.left(x)), self.relu(self.right(x))), dim=1)
        return self.average(self.head(x)).flatten(1)


NETS = {"everything": Everything, "squeezed": Squeezed, "plain": Plain}


def our_relevance(model, images, labels, start="one", layers=None, **rules) -> dict[str, Tensor]:
    """Relevance [N, C, H, W] of the layers' outputs, by default of every convolution's."""
    graph = ModelGraph(model, images.shape[1:])
    found = {}
    RelevancePass(graph, layers or graph.convs, Rules(**rules), found.__setitem__).pass_batch(images, labels, start)
    return found


def zennit_relevance(model, conv_rule, images, labels, *, linear_rule=None, first_rule=None) -> dict[str, Tensor]:
    """Relevance [N, C, H, W] of every convolution's output, and of the pixels under "pixels"."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Plus):
            setattr(model, name, ZennitPlus())
        if getattr(module, "inplace", False):
            module.inplace = False  # zennit's hooks on a module's output do not survive it
    modules = dict(model.named_modules())
    convs = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    norms = {name: f"{name}_bn" for name in convs if f"{name}_bn" in modules}
    rules = {nn.Linear: linear_rule or Epsilon(EPSILON, zero_params="bias"), AvgPool: Norm(EPSILON), Sum: Norm(EPSILON),
             Activation: Pass(), BatchNorm: Pass()}  # fmt: skip

    def rule_of(context, name, module):
        if name in convs:
            return first_rule if first_rule and name == convs[0] else conv_rule
        return next((rule for kind, rule in rules.items() if isinstance(module, kind)), None)

    found = {}

    def read(name, output):
        output.register_hook(lambda relevance: found.__setitem__(name, relevance))

    images = images.clone().requires_grad_()
    composite = Composite(rule_of, [NamedMergeBatchNorm([((conv,), norm) for conv, norm in norms.items()])])
    with composite.context(model):
        for norm in norms.values():
            modules[norm].eps = 0  # the emptied norm would still divide by sqrt(1 + eps)
        for name in convs:
            modules[name].register_forward_hook(lambda module, inputs, output, name=name: read(name, output))
        logits = model(images)
        (found["pixels"],) = torch.autograd.grad(logits, images, F.one_hot(labels, CLASSES).to(logits))
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, may_be_zero: bool = False):
    assert ours
    for layer, values in ours.items():
        told = partial("{}: {}".format, layer)
        torch.testing.assert_close(values, theirs[layer], rtol=1e-8, atol=1e-10, msg=told)
        assert may_be_zero or values.any(), layer
