"""What the graph says of a network, against lists made by hand from the architectures' definitions."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from channel_numbers import FIXED
from errors import BenchmarkError, ConfigError
from filter_selection import REGISTRY, get_criterion
from helpers import derive_seed, evaluating, filter_pruning_indices_for_resnet, generator, share_of
from structure import ModelGraph
from tests.nets import SHAPE, Mixed, Plain, Residual, batches, images_and_labels, lively


def graph_of(model: nn.Module, shape=SHAPE) -> ModelGraph:
    return ModelGraph(model.eval(), shape)


@pytest.fixture(scope="module")
def resnets() -> dict[str, ModelGraph]:
    return {
        name: graph_of(getattr(torchvision.models, name)(num_classes=10), (3, 32, 32))
        for name in ("resnet18", "resnet34", "resnet50")
    }


# Taps


def test_taps_of_resnet18(resnets):
    graph = resnets["resnet18"]
    expected = {"conv1": "bn1"}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            if block == 0 and layer > 1:
                expected[f"layer{layer}.0.downsample.0"] = f"layer{layer}.0.downsample.1"
            for number in (1, 2):
                expected[f"layer{layer}.{block}.conv{number}"] = f"layer{layer}.{block}.bn{number}"
    nodes = {node.name: node.target for node in graph.module.graph.nodes}
    assert {layer: nodes[graph.tap(layer).node] for layer in graph.convs} == expected


def test_taps_without_batch_norm_are_the_activations():
    graph = graph_of(Plain())
    assert [graph.tap(layer).node for layer in graph.convs] == ["features_1", "features_4", "features_6"]
    assert [graph.tap(layer).filters for layer in graph.convs] == [5, 8, 7]


def test_taps_of_functional_activations_and_of_bare_convolutions():
    graph = graph_of(Mixed())
    taps = {layer: graph.tap(layer).node for layer in graph.convs}
    assert taps == {"stem": "bn", "grouped": "grouped_bn", "left": "left", "right": "right"}


def test_a_convolution_with_several_consumers_is_its_own_response():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.fc((torch.relu(self.bn(x)) + x).mean((2, 3)))

    assert graph_of(Forked()).tap("conv").node == "conv"


# Which filters go alone


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_left_out_of_resnets_is_what_the_names_say(resnets, name):
    graph = resnets[name]
    by_names = filter_pruning_indices_for_resnet({layer: [0] for layer in graph.convs}, name)
    assert graph.prunable == tuple(by_names)
    assert all("residual stream" in reason for reason in graph.left_out.values())
    assert 0 < len(by_names) < len(graph.convs)


def test_prunable_of_resnet18_by_hand(resnets):
    expected = tuple(f"layer{layer}.{block}.conv1" for layer in (1, 2, 3, 4) for block in (0, 1))
    assert resnets["resnet18"].prunable == expected


def test_prunable_of_mobilenet_v2_by_hand():
    graph = graph_of(torchvision.models.mobilenet_v2(num_classes=10), (3, 32, 32))
    # Sandler et al., table 2: blocks of one width, all but the first with an add, so their narrow ends are tied.
    stages = [(2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16)]
    tied = {f"features.{block}.conv.2" for stage in stages for block in stage}
    depthwise = {f"features.{block}.conv.1.0" for block in range(2, 18)} | {"features.1.conv.0.0"}
    expansions = {f"features.{block}.conv.0.0" for block in range(2, 18)}
    alone = {"features.0.0", "features.1.conv.1", "features.17.conv.2", "features.18.0"} | expansions
    assert set(graph.prunable) == alone
    assert set(graph.followers) == depthwise
    assert set(graph.left_out) == depthwise | tied
    assert len(graph.convs) == 52 == len(alone) + len(depthwise) + len(tied)
    assert all("residual stream" in graph.left_out[layer] for layer in tied)


class DenseBlock(nn.Module):
    """Each layer reads all earlier ones by concatenation; only the last one's sum with the stem ties anything."""

    def __init__(self, add: bool, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Sequential(norm(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        self.two = nn.Sequential(norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
        self.fc = nn.Linear(10, 3)
        self.add = add

    def forward(self, x):
        x = self.stem(x)
        one = self.one(x)
        two = self.two(torch.cat((x, one), 1))
        two = two + x if self.add else two
        return self.fc(torch.cat((two, x, one), 1).mean((2, 3)))


def test_concatenation_ties_nothing():
    graph = graph_of(DenseBlock(add=False))
    assert graph.prunable == ("stem", "one.2", "two.2") and graph.left_out == {}
    numbers = graph.channels
    assert numbers.first == {"stem": 0, "one.2": 4, "two.2": 6}
    assert numbers.inputs["two_2"].tolist() == [0, 1, 2, 3, 4, 5]
    assert numbers.inputs["fc"].tolist() == [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]


def test_an_add_ties_what_a_concatenation_passes_on():
    graph = graph_of(DenseBlock(add=True))
    assert graph.prunable == ("one.2",)
    assert "stem" in graph.left_out["two.2"] and "two.2" in graph.left_out["stem"]


def test_what_a_batch_norm_would_shift_on_its_way_stays():
    """What is zero before the next block's BatchNorm is not zero behind it, so removing it would not be zeroing it."""
    graph = graph_of(DenseBlock(add=False, norm=nn.BatchNorm2d))
    assert graph.left_out == {
        "stem": "one.0 would not keep its zeros zero",
        "one.2": "two.0 would not keep its zeros zero",
    }
    assert graph.prunable == ("two.2",)


def test_prunable_of_densenet121_by_hand():
    graph = graph_of(torchvision.models.densenet121(num_classes=10), (3, 32, 32))
    sizes = enumerate((6, 12, 24, 16), start=1)  # Huang et al., table 1
    bottlenecks = [f"features.denseblock{b}.denselayer{n}.conv1" for b, size in sizes for n in range(1, size + 1)]
    assert list(graph.prunable) == bottlenecks


def test_grouped_convolutions_and_what_feeds_them_stay():
    graph = graph_of(Mixed())
    assert graph.prunable == ("left", "right")
    assert graph.left_out == {
        "stem": "it feeds grouped, a grouped convolution",
        "grouped": "it is a grouped convolution",
    }


def test_a_grey_image_is_no_depthwise_convolution():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.Flatten(), nn.Linear(16, 2))
    assert graph_of(model, (1, 8, 8)).prunable == ("0", "2")


def test_flatten_repeats_a_filter_for_each_of_its_pixels():
    numbers = graph_of(Plain()).channels
    first = numbers.first["features.5"]
    expected = [number for number in range(first, first + 7) for _ in range(4)]
    assert numbers.inputs["classifier_0"].tolist() == expected


def test_a_product_ties_the_gate_to_what_it_scales():
    class Excited(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.down, self.up = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
            self.fc = nn.Linear(6, 2)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
            return self.fc((x * gate).mean((2, 3)))

    assert graph_of(Excited()).prunable == ("down",)


def test_a_convolution_that_is_the_head_keeps_its_filters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert graph_of(model).left_out == {"2": "it is the network's output"}


class Between(nn.Module):
    """conv -> `middle` -> conv, to see what an operation means for the first one's 4 filters on 6x6 pixels."""

    def __init__(self, middle, reads: int, module: nn.Module | None = None):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(reads, 5, 1)
        self.fc, self.middle, self.module = nn.Linear(5, 2), middle, module

    def forward(self, x):
        x = self.middle(self, F.relu(self.one(x)))
        return self.fc(F.relu(self.two(x)).mean((2, 3)))


MOVES = {
    "view": (lambda net, x: x.view(x.size(0), x.size(1), -1).unsqueeze(3), 4, None, [0, 1, 2, 3]),
    "reshape": (lambda net, x: x.reshape(x.shape[0], -1, 36, 1), 4, None, [0, 1, 2, 3]),
    "slice of pixels": (lambda net, x: x[:, :, 1:], 4, None, [0, 1, 2, 3]),
    "chunks of pixels": (lambda net, x: torch.cat(x.chunk(2, 2)[::-1], 2), 4, None, [0, 1, 2, 3]),
    "pool": (lambda net, x: F.max_pool2d(x, 2), 4, None, [0, 1, 2, 3]),
    "pool by keyword": (lambda net, x: F.max_pool2d(input=x, kernel_size=2), 4, None, [0, 1, 2, 3]),
    "scale": (lambda net, x: 0.5 * x, 4, None, [0, 1, 2, 3]),
    "mean of pixels": (lambda net, x: x.mean((-2, -1), keepdim=True), 4, None, [0, 1, 2, 3]),
    "mean of rows": (lambda net, x: torch.mean(x, 2).unsqueeze(2), 4, None, [0, 1, 2, 3]),
    "linear over channels": (
        lambda net, x: net.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 4, nn.Linear(4, 4), [FIXED] * 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_operations_that_move_channels(name):
    middle, reads, module, expected = MOVES[name]
    graph = graph_of(Between(middle, reads, module))
    assert graph.prunable == ("one", "two")
    assert graph.channels.inputs["two"].tolist() == expected


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factors", torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.factors


MIXED = "reads its filters mixed into one channel"
PLACE = "takes its channels by their place"
FIXED_FACTOR = "it is joined by a product with channels that must stay"
BINDS = {
    "mean of channels": (lambda net, x: x * x.mean(1, keepdim=True), 4, None, "it feeds mean (mean)"),
    "mean as large as the channels": (
        lambda net, x: x[..., :4, :4].mean((1, 2)).view(-1, 4, 1, 1), 4, None, "it feeds mean (mean)"
    ),
    "largest of channels": (lambda net, x: x * torch.max(x, 1, keepdim=True)[0], 4, None, "it feeds max_1 (max)"),
    "sum of a stack": (lambda net, x: torch.stack([x, x]).sum(0), 4, None, "it feeds stack (stack)"),
    "einsum": (lambda net, x: torch.einsum("nchw,nchw->nchw", [x, x]), 4, None, "it feeds einsum (einsum)"),
    "group norm": (lambda net, x: net.module(x), 4, nn.GroupNorm(2, 4), "it feeds module (GroupNorm)"),
    "softmax": (lambda net, x: torch.softmax(x, 1), 4, None, "it feeds softmax (softmax)"),
    "shuffle": (lambda net, x: net.module(x), 4, nn.ChannelShuffle(2), f"module {PLACE}"),
    "halves swapped": (lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1), 4, None, f"chunk {PLACE}"),
    "slice": (lambda net, x: x[:, 1:], 3, None, f"getitem {PLACE}"),
    "a width written out": (lambda net, x: x.view(x.size(0), 4, 6, 6), 4, None, f"view {PLACE}"),
    "groups of channels": (
        lambda net, x: x.reshape(x.size(0), 2, -1, 6, 6).transpose(1, 2).flatten(1, 2), 4, None, f"reshape {PLACE}"
    ),
    "one more": (lambda net, x: x + 1, 4, None, "add would not keep its zeros zero"),
    "a gate of its own": (lambda net, x: torch.sigmoid(x), 4, None, "sigmoid would not keep its zeros zero"),
    "a norm behind the activation": (
        lambda net, x: net.module(x), 4, nn.BatchNorm2d(4), "module would not keep its zeros zero"
    ),
    "pixels become channels": (lambda net, x: x.reshape(-1, 2, 12, 6), 2, None, f"reshape {PLACE}"),
    "factors that are no filter's": (lambda net, x: net.module(x), 4, Scale(), FIXED_FACTOR),
    "linear over pixels": (lambda net, x: net.module(x), 4, nn.Linear(6, 6), f"module {MIXED}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BINDS)
def test_operations_that_are_not_known_leave_their_filters_out_by_name(name):
    middle, reads, module, reason = BINDS[name]
    graph = graph_of(Between(middle, reads, module))
    assert graph.left_out == {"one": reason}


# Refusals


def test_a_shared_convolution_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x)).mean((2, 3)))

    with pytest.raises(BenchmarkError, match="^conv: runs twice"):
        graph_of(Shared())


def test_control_flow_on_data_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(BenchmarkError, match="^Branching: its graph cannot be traced by torch.fx"):
        graph_of(Branching())


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nn.Sequential(nn.ReLU())])
def test_a_model_without_convolutions_is_refused(model):
    with pytest.raises(BenchmarkError, match="^Sequential: no Conv2d runs in it"):
        graph_of(model)


def test_images_that_do_not_fit_are_refused_without_a_traceback(capfd):
    with pytest.raises(BenchmarkError, match=r"^Plain: an image of shape \(1, 8, 8\) does not pass through it"):
        graph_of(Plain(), (1, 8, 8))
    assert capfd.readouterr().err == ""


def test_a_convolution_that_never_runs_is_in_no_list():
    model = Plain()
    model.spare = nn.Conv2d(3, 3, 3)
    graph = graph_of(model)
    assert "spare" in dict(model.named_modules()) and "spare" not in graph.convs and "spare" not in graph.left_out


def test_the_graph_leaves_the_network_as_it_was():
    model = lively(Residual())
    model.bn1.train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert ModelGraph(model, SHAPE).prunable == ("stem", "conv1")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# Helpers


def test_share_of_reads_the_ratio_as_it_was_written():
    assert [share_of(ratio, 100) for ratio in (0, 0.29, 0.57, 0.07, 0.999, 1)] == [0, 29, 57, 7, 99, 100]
    assert all(share_of(k / 100, 100) == k for k in range(101))
    assert share_of(0.999, 512) == 511 and share_of(0.5, 7) == 3


def test_seeds_depend_on_seed_and_name_alone():
    assert derive_seed(0, "a") == derive_seed(0, "a")
    assert len({derive_seed(seed, name) for seed in range(5) for name in "abc"}) == 15
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, other = (torch.rand(4, generator=generator(3, "layer")) for _ in range(2))
    assert torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)


def test_evaluating_puts_each_mode_back_after_an_exception():
    model = Residual().train()
    model.bn1.eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]


def test_the_resnet_helper_keeps_its_argument_and_refuses_other_names():
    given = {"conv1": [1], "layer1.0.conv1": [0], "layer1.0.conv2": [2], "layer2.0.downsample.0": [3]}
    before = copy.deepcopy(given)
    assert filter_pruning_indices_for_resnet(given, "resnet18") == {"layer1.0.conv1": [0]}
    assert filter_pruning_indices_for_resnet(given, "resnet50") == {
        "conv1": [1], "layer1.0.conv1": [0], "layer1.0.conv2": [2]
    }  # fmt: skip
    assert given == before
    with pytest.raises(ConfigError, match="vgg16.*valid: resnet18"):
        filter_pruning_indices_for_resnet(given, "vgg16")


# What a trace may not hide


class Preactivated(nn.Module):
    """As in Xception: an activation in place whose operand is read again; `plain`: the same, written out."""

    def __init__(self, plain: bool):
        super().__init__()
        self.plain = plain
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.dropout = nn.Dropout()

    def forward(self, x):
        stem = self.stem(x)
        same = self.dropout(stem)
        active = F.relu(same) if self.plain else F.relu(same, True)
        return self.fc((self.conv(active) + (active if self.plain else stem)).mean((2, 3)))


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_an_operand_changed_in_place_is_read_changed(method):
    scores = []
    for plain in (True, False):
        graph = graph_of(lively(Preactivated(plain)))
        assert graph.tap("stem").node == "stem"
        criterion = get_criterion(method, {"importance": "taylor"} if method == "torch_pruning" else {})
        scores.append(criterion.score(graph, graph.convs, batches(*images_and_labels(6))))
    for layer, values in scores[0].items():
        torch.testing.assert_close(scores[1][layer], values)


def test_a_trace_that_computes_something_else_is_refused():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            y = self.conv(x)
            z = y
            y += self.other(x)  # torch.fx makes a new value of it, which leaves z as it was
            return self.fc((y * z).mean((2, 3)))

    with pytest.raises(BenchmarkError, match="Renamed: torch.fx traces another network than it is"):
        graph_of(lively(Renamed()))


def test_statistics_of_the_batch_are_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    with pytest.raises(BenchmarkError, match="1: normalises by the batch's own statistics"):
        graph_of(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_asking_for_a_size_is_not_reading(norm):
    class Sized(nn.Module):
        def __init__(self, asks: bool):
            super().__init__()
            self.asks = asks
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), norm(4), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            images = x.shape[0] if self.asks else 0
            x = F.relu(self.norm(x) if isinstance(self.norm, nn.BatchNorm2d) else x)
            return self.fc(x.mean((2, 3)).view(images, -1) if self.asks else x.mean((2, 3)))

    scores = []
    for asks in (True, False):
        graph = graph_of(lively(Sized(asks)))
        assert graph.tap("conv").node in ("norm", "relu") and graph.prunable == ("conv",)
        scores.append(get_criterion("lrp").score(graph, ["conv"], batches(*images_and_labels(6)))["conv"])
    assert torch.equal(*scores)


def test_a_layer_whose_output_only_gives_a_size_is_named():
    class DeadSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dead, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)).view(self.dead(x).size(0), -1))

    graph = graph_of(lively(DeadSize()))
    with pytest.raises(BenchmarkError, match="dead: no way leads from it to the output"):
        get_criterion("lrp").score(graph, graph.convs, batches(*images_and_labels(6)))


class Odd(nn.Module):
    """Two convolutions, and after them whatever `forward` of the case does."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.wide = nn.Linear(4, 5), nn.Linear(4 * 6 * 3, 5)

    def forward(self, x):
        return self.case(self, self.a(x), self.b(x))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (lambda net, a, b: net.fc(torch.mul(a, other=b).mean((2, 3))), "on a residual stream: tied to"),
        (lambda net, a, b: net.fc(torch.add(input=a, other=b).mean((2, 3))), "on a residual stream: tied to"),
        (lambda net, a, b: net.fc(a.mul(other=b).mean((2, 3))), "on a residual stream: tied to"),
        (lambda net, a, b: net.fc((a * a.size(1) + b).mean((2, 3))), "it feeds mul"),
        (lambda net, a, b: net.fc(a.mean((2, 3))) + net.fc(b.mean((2, 3))), "fc runs more than once"),
        (lambda net, a, b: net.fc((net.bn(a) + net.bn(b)).mean((2, 3))), "bn runs more than once"),
        (lambda net, a, b: net.fc(F.adaptive_avg_pool2d(torch.cat((a, b), 2), 1).flatten(1)), "by their place"),
        (lambda net, a, b: net.fc(F.adaptive_avg_pool2d(torch.cat((a, b), dim=-1), 1).flatten(1)), "by their place"),
        (lambda net, a, b: net.wide(F.max_pool2d(torch.cat((a, b), 1).permute(0, 2, 3, 1), (2, 2)).flatten(1)),
         "it feeds max_pool2d"),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_left_out_by_name(case, reason):
    graph = graph_of(lively(Odd(case)))
    assert graph.prunable == ()
    assert any(reason in why for why in graph.left_out.values())
