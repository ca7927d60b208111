"""Parameters, multiply-adds and bytes against closed forms and other counters."""

import copy
import io
import logging
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from costs import activation_bytes, count_macs, count_parameters, file_bytes, weight_bytes
from errors import BenchmarkError
from filter_selection import get_criterion
from models import get_model
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph
from tests.nets import small_net


def without_weights(build, **options):
    """A torchvision model whose weights are whatever was in memory: for counting, not for computing."""
    with torch.device("meta"):
        model = build(weights=None, **options)
    return model.to_empty(device="cpu").eval()


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, (3, 1), stride=2, bias=False), (3, 11, 9), 5 * 5 * 8 * 3 * 3),
        (nn.Conv2d(8, 12, 3, groups=4, padding=1), (8, 6, 6), 6 * 6 * 12 * (8 // 4) * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 6, 6), 6 * 6 * 8 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2), (4, 9, 9), 5 * 5 * 6 * 4 * 9),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 7)), (3, 4, 4), 48 * 7),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 7, bias=False)), (3, 4, 4), 48 * 7),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), (3, 8, 8), 0),
    ],
)
def test_macs_of_layers_equal_the_closed_formula(layer, shape, expected):
    count = count_macs(layer, shape)
    assert (count.macs, count.unsupported) == (expected, ())


def flop_counter_macs(model, size):
    """torch's own counter, which counts a multiply-add as two."""
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    return flops.get_total_flops() / 2


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_macs_at_224_are_those_torchvision_publishes(name):
    model = without_weights(getattr(torchvision.models, name))
    count = count_macs(model, (3, 224, 224))
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta["_ops"]  # in 1e9
    assert round(count.macs / 1e9, 3) == published
    assert count.macs == flop_counter_macs(model, 224)
    assert count.unsupported == ()


@pytest.mark.parametrize(
    "name, expected",
    [
        # 13 convolutions of 3x3 (3.13e8, Li et al., ICLR 2017, table 1), and torchvision's three linear layers.
        ("vgg16", 313_196_544 + 512 * 49 * 4096 + 4096 * 4096 + 4096 * 1000),
        # All convolutions of ResNet18 halve with each stride, so 32x32 costs (32/224)^2 of 224x224: 1,813,561,344 / 49.
        ("resnet18", 1_813_561_344 // 49 + 512 * 1000),
    ],
)
def test_macs_at_32_are_those_of_small_images(name, expected):
    model = without_weights(getattr(torchvision.models, name))
    assert count_macs(model, (3, 32, 32)).macs == expected == flop_counter_macs(model, 32)


def test_macs_follow_the_input_size():
    layer = nn.Conv2d(3, 4, 1)
    assert count_macs(layer, (3, 16, 16)).macs == 4 * count_macs(layer, (3, 8, 8)).macs


def test_operations_that_are_not_counted_are_named():
    class Attention(nn.Module):
        def forward(self, images):
            flat = images.flatten(2)
            return torch.linalg.vector_norm(flat @ flat.transpose(1, 2), dim=(1, 2))

    count = count_macs(Attention(), (3, 4, 4))
    assert count.macs == 0
    assert count.unsupported == ("matmul (144 multiply-adds)", "aten::linalg_vector_norm x1")


def test_counting_is_silent_and_changes_no_setting_of_its_own(caplog, capfd):
    filters, model = list(warnings.filters), small_net().train()
    with caplog.at_level(logging.DEBUG):
        count_macs(model, (3, 8, 8))
    assert warnings.filters == filters
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_model_that_cannot_be_traced_is_an_error_and_keeps_no_hooks():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2))
    with pytest.raises(BenchmarkError, match=r"MACs: the model cannot be traced at \(3, 8, 8\)"):
        count_macs(model, (3, 8, 8))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


# Size


def test_parameters_count_shared_tensors_once():
    first = nn.Linear(3, 5)
    second = nn.Linear(3, 5)
    second.weight = first.weight
    assert count_parameters(nn.ModuleList([first, second])) == 15 + 5 + 5


@pytest.mark.parametrize("build", [small_net, lambda: nn.Conv2d(3, 5, 3).half()])
def test_file_bytes_equal_a_saved_file(build):
    model, buffer = build(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert file_bytes(model) == buffer.getbuffer().nbytes


def test_weight_bytes_are_those_of_the_tensors():
    model = nn.Sequential(nn.Conv2d(3, 5, 3).half(), nn.BatchNorm2d(5))
    assert weight_bytes(model) == 2 * (5 * 27 + 5) + 4 * 4 * 5 + 8
    model[1].weight = model[1].bias  # one tensor in two places
    assert weight_bytes(model) == 2 * (5 * 27 + 5) + 4 * 3 * 5 + 8


# Activations


def hooked_activation_bytes(model, shape):
    """An independent count: what every convolution and linear layer puts out, by hooks."""
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, __, out: seen.append(out.numel() * out.element_size()))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *shape))
    return sum(seen)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "mobilenet_v2"])
def test_activations_are_the_outputs_of_convolutions_and_linear_layers(name):
    model = without_weights(getattr(torchvision.models, name))
    found = activation_bytes(model, (3, 32, 32))
    assert found == hooked_activation_bytes(copy.deepcopy(model), (3, 32, 32)) > 0


def test_activations_of_a_layer_by_hand():
    assert activation_bytes(nn.Conv2d(3, 8, 3, stride=2), (3, 9, 9)) == 4 * 8 * 4 * 4
    assert activation_bytes(nn.Conv2d(3, 8, 1).double(), (3, 4, 4)) == 8 * 8 * 4 * 4


# Pruned


@settings(max_examples=3, deadline=None)
@given(name=st.sampled_from(["resnet18", "vgg16_bn", "mobilenet_v2"]), ratio=st.floats(0.1, 0.95))
def test_costs_of_pruned_networks_agree_with_the_second_counters(name, ratio):
    """MACs with torch's own counter, activations with hooks, on widths of every kind."""
    shape = (3, 32, 32)
    graph = ModelGraph(get_model(name, 10), shape)
    [indices] = PruningSelection(get_criterion("random"), (ratio,), shape).select(graph).values()
    pruned = get_pruner("structure", graph).prune(indices).eval()
    count = count_macs(pruned, shape)
    assert count.macs == flop_counter_macs(pruned, 32) and count.unsupported == ()
    assert activation_bytes(pruned, shape) == hooked_activation_bytes(copy.deepcopy(pruned), shape)
