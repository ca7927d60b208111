"""What the README names is there."""

import re
from pathlib import Path

from benchmarks.selection import cases, label_of, markdown
from filter_selection import REGISTRY
from tests.readme import between, put

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COSTS = ROOT / "docs" / "selection_cost.csv"
COST_TABLE = "cost of scoring"  # `python -m tests.test_readme` puts it into the README after a measurement


def test_its_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_it_lists_every_method_and_model_and_dataset():
    groups = ("pruning", "model", "dataset")
    names = {path.stem for group in groups for path in (ROOT / "config" / group).glob("*.yaml")}
    assert not {name for name in names | set(REGISTRY) if f"`{name}`" not in README}


def test_every_method_has_its_yaml():
    assert {path.stem for path in (ROOT / "config" / "pruning").glob("*.yaml")} == set(REGISTRY)


def test_it_quotes_the_measured_cost_of_every_method():
    text = between(COST_TABLE)
    assert text == markdown(COSTS)
    assert set(re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE)) == {
        label_of(method, options) for method, options in cases(sorted(REGISTRY))
    }


if __name__ == "__main__":
    (ROOT / "README.md").write_text(put(COST_TABLE, markdown(COSTS)))
