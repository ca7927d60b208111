"""Classes by rule: against enumeration, a network whose confusions are known, and in whole runs."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import subsets
from subsets import alike, random_subset, soft_confusion


@given(st.integers(2, 30), st.integers(0, 20), st.data())
def test_a_random_subset_is_a_function_of_its_arguments(classes, seed, data):
    size = data.draw(st.integers(1, classes))
    chosen = random_subset(classes, size, seed)
    assert list(chosen) == sorted(set(chosen)) and len(chosen) == size and 0 <= chosen[0] and chosen[-1] < classes
    assert chosen == random_subset(classes, size, seed)


def test_random_subsets_cover_the_classes_and_differ():
    drawn = [random_subset(10, 3, seed) for seed in range(200)]
    assert len(set(drawn)) > 80  # of 120
    counts = np.bincount(np.ravel(drawn), minlength=10)
    assert counts.min() > 35 and counts.max() < 85  # 60 each, 6.5 the standard deviation


def spoken(confusion, chosen):
    """What the classes of a subset give to each other, term by term."""
    return sum(confusion[i][j] for i in chosen for j in chosen if i != j)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("rule", "best"), [("similar", max), ("distinct", min)])
def test_the_subset_is_the_best_of_all(size, rule, best):
    confusion = np.random.default_rng(0).dirichlet(np.ones(7), size=7)
    before = confusion.copy()
    everything = [spoken(confusion, chosen) for chosen in combinations(range(7), size)]
    assert spoken(confusion, alike(confusion, size, rule)) == pytest.approx(best(everything))
    assert (confusion == before).all()


def test_of_too_many_subsets_one_is_built_up(monkeypatch):
    """Two blocks of classes that are confused among themselves, the second one more."""
    confusion = np.full((8, 8), 0.01)
    confusion[:4, :4], confusion[4:, 4:] = 0.1, 0.2
    assert alike(confusion, 3, "similar") == (4, 5, 6)
    monkeypatch.setattr(subsets, "ENUMERATED", 0)
    assert alike(confusion, 3, "similar") == (4, 5, 6)
    assert alike(confusion, 2, "distinct") == (0, 4)


def test_confusion_is_the_mean_probability_of_each_class():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 5.0], [0.0, 3.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 1])
    model = torch.nn.Identity()
    batched = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    shares = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(axis=1, keepdims=True)
    expected = [shares[0], (shares[1] + shares[3]) / 2, shares[2]]
    assert soft_confusion(model, batched, 3) == pytest.approx(np.array(expected), abs=1e-7)
    absent = soft_confusion(model, [(logits[:1], labels[:1])], 3)
    assert (absent[1:] == 0).all()
