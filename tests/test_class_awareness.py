"""The whole comparison on a network in which it is known which filters serve which class.

Filter k answers to images of class k alone, and logit k reads filter k alone. The filters of the classes that nobody
selected have the larger weights and the larger logits: what looks at weights, or at images of all classes, keeps those.
"""

import pytest
import torch
from torch import nn

from accuracy import evaluate
from bookkeeping import accuracy_fields
from budgets import find_ratios, removed_share
from comparison import Setting, standings
from filter_selection import REGISTRY, get_criterion
from metrics import Measurement
from models import replace_head
from pruner import get_pruner
from selection import PruningSelection
from structure import ModelGraph
from tests.sample_records import fields_of, lost, record

CLASSES, SHAPE = 12, (12, 6, 6)
SUBSETS = [(0, 3, 6, 9), (1, 2, 5, 11), (4, 7, 8, 10)]
TARGET = 8 / 12  # all that serve the classes not selected
AWARE = sorted(name for name, criterion in REGISTRY.items() if criterion.class_aware)
AGNOSTIC = sorted(REGISTRY.keys() - set(AWARE) - {"matched_random"}) + ["matched_random"]


def network(selected) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(CLASSES, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CLASSES, CLASSES)
    )
    size = torch.full((CLASSES,), 2.0)
    size[list(selected)] = 1.0
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(size)[:, :, None, None])
        model[4].weight.copy_(torch.eye(CLASSES))
        model[0].bias.zero_()
        model[4].bias.zero_()
    return model.eval()


def images_of(classes, seed, count=5):
    """Channel k is bright where an image is of class k, and below zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label for label in classes for _ in range(count)])
    images = -0.1 * torch.rand(len(labels), *SHAPE, generator=generator)
    images[torch.arange(len(labels)), labels] = 0.5 + torch.rand(len(labels), *SHAPE[1:], generator=generator)
    return images, labels


def pruned_by(method, selected, seed):
    """What a method removes at the budget, and the record of the network that is left."""
    graph = ModelGraph(network(selected), SHAPE)
    scored_on = selected if REGISTRY[method].class_aware or method == "matched_random" else range(CLASSES)
    batches = [images_of(scored_on, seed)]
    scope = REGISTRY[method].scopes[0]
    selector = PruningSelection(get_criterion(method, seed=seed), (), SHAPE, batches, scope=scope)
    choose = selector.chooser(graph, selector.score(graph))
    (found,) = find_ratios(choose, removed_share("filters", graph, None, CLASSES), [TARGET], "filters")
    model = replace_head(get_pruner("depgraph", graph).prune(found.indices), selected)
    test, labels = images_of(selected, seed + 100)
    position = torch.tensor([selected.index(label) for label in labels.tolist()])
    counts = evaluate(model, [(test, position)], len(selected), torch.device("cpu"))
    names = [f"class {label}" for label in selected]
    answers = accuracy_fields(Measurement(counts, None, {}, 1, None, ()), "pruned", "selected", selected, names)
    kept = {"0": CLASSES - len(found.indices["0"])}
    return set(found.indices["0"]), record(
        "pruned", found.ratio, method=method, variant=method, seed=seed, selected_classes=selected, class_names=names,
        match="filters", target=TARGET, reached=found.reached, achieved_ratio=found.reached,
        filters_removed=len(found.indices["0"]), filters_prunable=CLASSES, filters_total=CLASSES,
        widths_dense={"0": CLASSES}, filters_kept_per_layer=kept, layers_left_out=(),
        filters_chosen_per_layer=lost({"0": CLASSES}, kept), **answers,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return {
        (method, selected, seed): pruned_by(method, selected, seed)
        for method in AWARE + AGNOSTIC
        for selected in SUBSETS
        for seed in range(3)
    }


def test_the_network_tells_all_classes_apart():
    images, labels = images_of(range(CLASSES), 1)
    assert (network((0, 1))(images).argmax(1) == labels).all()
    assert fields_of()["seed"] == 42 and len(AWARE) >= 6 and len(AGNOSTIC) >= 5


@pytest.mark.parametrize("method", AWARE)
def test_class_aware_methods_find_the_filters_of_the_other_classes(method, results):
    for (name, selected, _), (removed, row) in results.items():
        if name == method:
            assert removed == set(range(CLASSES)) - set(selected) and row.accuracy == 1


@pytest.mark.parametrize("method", AGNOSTIC)
def test_class_agnostic_methods_do_not(method, results):
    for (name, selected, _), (removed, row) in results.items():
        if name == method:
            assert removed != set(range(CLASSES)) - set(selected) and len(removed) == 8 and row.accuracy < 1


def test_the_comparison_ranks_them_so(results):
    setting = Setting("digits, 4 classes", "resnet18", "pruned", "filters", TARGET)
    rows = {row.variant: row for row in standings([row for _, row in results.values()], setting)}
    assert rows.keys() == {*AWARE, *AGNOSTIC}
    for method in AWARE:
        assert rows[method].rank == (1, len(AWARE)) and rows[method].lead.sign == 1
    assert all(rows[method].rank[0] > len(AWARE) for method in AGNOSTIC)
