"""Every method on every network of the README's table: filters scored, selected and removed, or refused and why.

The table is made here. `python -m tests.test_method_table` puts it into the README after a change.
"""

import re

import pytest
import torch
import torchvision

from benchmarks.selection import cases, label_of
from errors import BenchmarkError
from filter_selection import REGISTRY, get_criterion
from pruner import DepGraphPruner
from selection import PruningSelection
from structure import ModelGraph
from tests.readme import README, between, put

TABLE = "methods by network"
NETWORKS = (
    *("vgg16", "vgg16_bn", "resnet18", "resnet50", "mobilenet_v2"),
    *("densenet121", "googlenet", "squeezenet1_0", "efficientnet_b0"),
)
SHAPE = (3, 64, 64)
CLASSES = 10
RATIO = 0.5


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    own = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, num_classes=CLASSES, **own).eval()


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, *SHAPE, generator=generator), torch.arange(4))]


def outcome(graph: ModelGraph, method: str, options: dict) -> str:
    """What came of it: empty, or the reason for a refusal."""
    criterion = get_criterion(method, options)
    selection = PruningSelection(criterion, (RATIO,), SHAPE, images(), scope=criterion.scopes[0])
    try:
        scores = selection.score(graph)
        [indices] = selection.select(graph, scores).values()
        pruned = DepGraphPruner(graph).prune(indices)  # refuses outputs that are not those of the masked network
    except BenchmarkError as error:
        return str(error)
    assert all(layer in scores for layer in indices)
    assert pruned(images()[0][0]).shape == (4, CLASSES)
    return ""


def table() -> str:
    """Markdown: a row a method, a column a network, and the refusals in words below."""
    outcomes: dict[tuple[str, str], str] = {}
    for name in NETWORKS:
        graph = ModelGraph(network(name), SHAPE)
        for method, options in cases(sorted(REGISTRY)):
            outcomes[label_of(method, options), name] = outcome(graph, method, options)
    reasons = list(dict.fromkeys(reason for reason in outcomes.values() if reason))
    rows = ["| method | " + " | ".join(NETWORKS) + " |", "|---|" + ":-:|" * len(NETWORKS)]
    for label in dict.fromkeys(label for label, _ in outcomes):
        cells = [outcomes[label, name] for name in NETWORKS]
        marks = [f"({reasons.index(reason) + 1})" if reason else "✓" for reason in cells]
        rows.append(f"| `{label}` | " + " | ".join(marks) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*rows, "", *notes, ""])


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_happens():
    assert between(TABLE) == table()


def test_every_method_has_a_row_and_every_network_a_column():
    text = between(TABLE)
    labels = [label_of(method, options) for method, options in cases(sorted(REGISTRY))]
    assert re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE) == labels
    assert text.startswith("| method | " + " | ".join(NETWORKS) + " |\n")


if __name__ == "__main__":
    README.write_text(put(TABLE, table()))
