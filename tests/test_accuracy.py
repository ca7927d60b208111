"""What is counted right, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accuracy import TOP5_FROM, ClassCounts, evaluate, evaluate_each
from errors import BenchmarkError
from tests.nets import small_net

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


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 5), st.integers(1, 9))
def test_confusion_says_what_each_class_is_taken_for(data, classes, batch_size):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1))
    counts = evaluate(Answers(classes), cut(*zip(*pairs, strict=True), batch_size), classes, CPU)
    expected = [[pairs.count((answer, label)) for answer in range(classes)] for label in range(classes)]
    assert counts.confusion.tolist() == expected
    assert counts.subset([1]).confusion.tolist() == [expected[1]]
    assert counts.confusion.dtype == np.int64 and counts.confusion.sum() == len(pairs)


def test_balanced_accuracy_weighs_classes_not_images():
    counts = ClassCounts(correct=(9, 0, 1), total=(9, 0, 2))
    assert counts.accuracy == 10 / 11
    assert counts.balanced == 0.75  # the class without images has no say


class Ranked(nn.Module):
    """Logits whose order is known: an image whose first pixel is p has its highest at class p, then p + 1, ..."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        best = images[:, 0, 0, 0].long()[:, None]
        return -((torch.arange(self.classes)[None] - best) % self.classes).float()


def test_top5_counts_the_five_highest_with_a_hundred_logits_or_more():
    answers, labels = [0, 0, 0, 0, 98], [0, 4, 5, 99, 2]  # at rank 1, 5, 6, 100, and 5 around the end
    counts = evaluate(Ranked(TOP5_FROM), cut(answers, labels, 2), TOP5_FROM, CPU)
    assert counts.accuracy == 1 / 5 and counts.accuracy_top5 == 3 / 5
    assert counts.subset([4, 5]).accuracy_top5 == 1 / 2
    assert evaluate(Ranked(TOP5_FROM - 1), cut([0], [0], 2), TOP5_FROM - 1, CPU).accuracy_top5 is None


def test_what_is_right_at_once_is_right_within_five_where_logits_tie():
    class Dead(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), TOP5_FROM)

    counts = evaluate(Dead(), cut([0, 0], [0, 50], 2), TOP5_FROM, CPU)
    assert counts.accuracy == 0.5 and counts.accuracy_top5 >= 0.5


def test_several_models_read_the_images_once():
    readings = []

    def loader():
        readings.append(1)
        yield from cut([0, 1, 1], [0, 1, 0], 2)

    class Wrong(Answers):
        def forward(self, images):
            return -super().forward(images)

    right, wrong = evaluate_each([Answers(2), Wrong(2)], loader(), 2, CPU)
    assert readings == [1]
    assert (right.correct, wrong.correct) == ((1, 1), (1, 0))
    assert right == evaluate(Answers(2), loader(), 2, CPU)
