import copy
import io
import logging
import time
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import metrics
from errors import BenchmarkError
from metrics import (
    ClassCounts,
    Latency,
    count_macs,
    count_parameters,
    evaluate,
    measure_inference_time_and_accuracy,
    measure_latency,
    weight_bytes,
)

CPU = torch.device("cpu")


class Answers(nn.Module):
    """Answers with the class that is written in an image's first pixel: what is right is known by construction."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), self.classes).float()


def cut(answers, labels, batch_size):
    """Batches of 2x2 images that carry these answers, and labels; the last is as short as it comes out."""
    images = torch.tensor(answers, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return list(zip(images.split(batch_size), torch.tensor(labels).split(batch_size), strict=True))


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def without_weights(build, **options):
    """A torchvision model whose weights are whatever was in memory: for counting, not for computing."""
    with torch.device("meta"):
        model = build(weights=None, **options)
    return model.to_empty(device="cpu").eval()


# Accuracy


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_counts_equal_a_loop_over_single_images(data, classes, batch_size):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1))
    counts = evaluate(Answers(classes), cut(*zip(*pairs, strict=True), batch_size), classes, CPU)
    assert counts.total == tuple(sum(label == c for _, label in pairs) for c in range(classes))
    assert counts.correct == tuple(sum(answer == label == c for answer, label in pairs) for c in range(classes))


def test_perfect_model_scores_exactly_one_with_a_ragged_last_batch():
    labels = [index % 7 for index in range(1000)]
    counts = evaluate(Answers(7), cut(labels, labels, 128), 7, CPU)
    assert counts.accuracy == 1.0
    assert sum(counts.total) == 1000
    assert counts.worst == 1.0


def test_short_last_batch_weighs_by_its_images_not_as_a_batch():
    counts = evaluate(Answers(2), cut([0, 0, 0, 0, 1], [0, 0, 0, 0, 0], 4), 2, CPU)
    assert counts.accuracy == 4 / 5  # the mean over batches would be 1/2


def test_per_class_worst_and_subset_ignore_classes_without_images():
    counts = ClassCounts(correct=(3, 0, 1), total=(4, 0, 2))
    assert counts.per_class == (0.75, None, 0.5)
    assert counts.worst == 0.5
    assert counts.subset([2, 0]) == ClassCounts((1, 3), (2, 4))
    assert counts.subset([0]).accuracy == 0.75


@pytest.mark.parametrize("correct, total", [((1,), (1, 2)), ((3,), (2,)), ((-1,), (2,))])
def test_impossible_counts_are_refused(correct, total):
    with pytest.raises(ValueError, match="co"):
        ClassCounts(correct, total)


def test_accuracy_of_no_images_is_refused():
    with pytest.raises(ValueError, match="no images"):
        _ = ClassCounts((0,), (0,)).accuracy


def test_evaluation_uses_eval_mode_and_leaves_every_module_as_it_was():
    model = small_net().train()
    model[1].eval()  # frozen statistics in a model that trains
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    batches = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,)))]
    answers = copy.deepcopy(model).eval()(batches[0][0]).argmax(1)
    counts = evaluate(model, batches, 4, CPU)
    assert sum(counts.correct) == int((answers == batches[0][1]).sum())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modes_come_back_after_an_exception():
    model = small_net().train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.randn(2, 5, 8, 8), torch.zeros(2, dtype=torch.long))], 4, CPU)
    assert all(module.training for module in model.modules())


def test_model_sees_channels_last_images_in_inference_mode():
    seen = []

    class Watching(Answers):
        def forward(self, images):
            seen.append((torch.is_inference_mode_enabled(), images.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(images)

    evaluate(Watching(2), cut([0, 1, 1], [0, 1, 0], 2), 2, CPU)
    assert seen == [(True, True)] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error_that_counts_them(bad):
    class Broken(Answers):
        def forward(self, images):
            logits = super().forward(images)
            logits[images[:, 0, 0, 0] == 1, 0] = bad
            return logits

    with pytest.raises(BenchmarkError, match=r"not finite for 2 of 5 images"):
        evaluate(Broken(2), cut([0, 1, 0, 0, 1], [0, 1, 0, 0, 1], 2), 2, CPU)


@pytest.mark.parametrize(
    "batches, classes, message",
    [
        ([], 2, "no images"),
        (cut([0, 1], [0, 2], 2), 2, r"labels: 0 to 2; a model with 2 logits needs 0 to 1"),
        (cut([0, 1], [0, -1], 2), 2, r"labels: -1 to 0"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_error(batches, classes, message):
    with pytest.raises(BenchmarkError, match=message):
        evaluate(Answers(classes), batches, classes, CPU)


def test_another_number_of_logits_is_refused():
    with pytest.raises(BenchmarkError, match=r"shape \[2, 3\]; \[2, 4\]"):
        evaluate(Answers(3), cut([0, 1], [0, 1], 2), 4, CPU)


# MACs


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
def test_weight_bytes_equal_a_saved_file(build):
    model, buffer = build(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert weight_bytes(model) == buffer.getbuffer().nbytes


# Latency


def test_latency_statistics():
    latency = Latency(tuple(float(ms) for ms in range(1, 101)), batch_size=8)
    assert latency.median_ms == 50.5
    assert latency.p95_ms == pytest.approx(95.05)  # linear interpolation between the 95th and 96th sample
    assert len(latency.samples_ms) == 100


def test_latency_times_each_repeat_after_the_warm_up(monkeypatch):
    calls, waits = [], []

    class Sleeping(nn.Module):
        def forward(self, images):
            calls.append(images)
            time.sleep(0.1 if len(calls) <= 3 else 0.002)
            return images

    monkeypatch.setattr(metrics, "_synchronize", lambda device: waits.append(len(calls)))
    latency = measure_latency(Sleeping(), torch.zeros(5, 3, 2, 2), repeats=4, warmup=3, device=CPU)
    assert len(calls) == 7
    assert (len(latency.samples_ms), latency.batch_size) == (4, 5)
    assert 2 <= latency.median_ms <= latency.p95_ms < 90  # the slow warm-up calls are not in it
    assert waits == [3, 4, 4, 5, 5, 6, 6, 7]  # before the clock starts, and before it stops


def test_latency_is_that_of_channels_last_weights_and_leaves_the_model_alone():
    model, layouts = small_net().train(), []
    model[0].register_forward_hook(
        lambda module, *_: layouts.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    weight = model[0].weight
    measure_latency(model, torch.zeros(2, 3, 8, 8), repeats=1, warmup=0, device=CPU)
    assert layouts == [True]
    assert model[0].weight is weight and weight.is_contiguous() and model.training


@pytest.mark.parametrize("repeats, warmup", [(0, 1), (1, -1)])
def test_latency_refuses_impossible_numbers(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be"):
        measure_latency(Answers(2), torch.zeros(1, 3, 2, 2), repeats=repeats, warmup=warmup, device=CPU)


# All together


def test_everything_is_measured_on_one_reading_of_the_data():
    model, readings = small_net(), []

    def loader():
        readings.append(1)
        torch.manual_seed(1)
        for images in (6, 2):
            yield torch.randn(images, 3, 8, 8), torch.randint(4, (images,))

    measured = measure_inference_time_and_accuracy(model, loader(), num_classes=4, device=CPU, repeats=3, warmup=1)
    assert readings == [1]
    assert measured.counts == evaluate(model, loader(), 4, CPU)
    assert sum(measured.counts.total) == 8
    assert (len(measured.latency.samples_ms), measured.latency.batch_size) == (3, 6)
    assert measured.macs == 36 * 8 * 27 + 8 * 4
    assert measured.params == 8 * 27 + 8 + 16 + 8 * 4 + 4
    assert measured.size_bytes == weight_bytes(model)
    assert measured.warnings == ()


def test_macs_that_cannot_be_counted_are_none_with_the_reason(monkeypatch):
    def fails(*_):
        raise BenchmarkError("MACs: no")

    monkeypatch.setattr(metrics, "count_macs", fails)
    batches = cut([0, 1], [0, 1], 2)
    measured = measure_inference_time_and_accuracy(
        Answers(2), batches, num_classes=2, device=CPU, repeats=1, warmup=0
    )
    assert measured.macs is None
    assert measured.warnings == ("MACs: no",)
    assert measured.counts.accuracy == 1.0
