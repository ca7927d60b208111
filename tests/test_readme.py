"""What the README names is there."""

import re
from pathlib import Path

from filter_selection import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_its_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_it_lists_every_method_and_model_and_dataset():
    groups = ("pruning", "model", "dataset")
    names = {path.stem for group in groups for path in (ROOT / "config" / group).glob("*.yaml")}
    assert not {name for name in names | set(REGISTRY) if f"`{name}`" not in README}


def test_every_method_has_its_yaml():
    assert {path.stem for path in (ROOT / "config" / "pruning").glob("*.yaml")} == set(REGISTRY)
