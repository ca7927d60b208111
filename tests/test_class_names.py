import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import class_names as module
from class_names import FACTS, IMAGENETTE_WNIDS, class_names, resolve_classes
from errors import ConfigError


def dataset(name, num_classes=None, root=None):
    return SimpleNamespace(name=name, num_classes=num_classes or len(FACTS[name]), root=root)


def imagenet(tmp_path, folders=(), num_classes=1000):
    for folder in folders:
        (tmp_path / "train" / folder).mkdir(parents=True)
    return SimpleNamespace(name="imagenet", num_classes=num_classes, root=str(tmp_path))


def refusal(given, of):
    with pytest.raises(ConfigError) as caught:
        resolve_classes(given, of)
    return str(caught.value)


def test_names_are_as_many_as_the_classes():
    counts = {name: len(class_names(dataset(name))) for name in FACTS}
    assert counts == {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "gtsrb": 43, "imagenette": 10}


@pytest.mark.parametrize("name", FACTS)
def test_each_name_and_each_index_leads_to_its_class(name):
    names = class_names(dataset(name))
    everything = tuple(range(len(names)))
    assert resolve_classes(names, dataset(name)) == everything
    assert resolve_classes([str(index) for index in everything], dataset(name)) == everything
    assert resolve_classes(everything, dataset(name)) == everything


def test_the_order_given_is_kept():
    assert resolve_classes(["bag", 1, "0"], dataset("fashion_mnist")) == (8, 1, 0)


@pytest.mark.parametrize("written", ["ankle_boot", "Ankle Boot", "ANKLE-BOOT", "ankleboot"])
def test_case_spaces_hyphens_and_underscores_do_not_matter(written):
    assert resolve_classes([written], dataset("fashion_mnist")) == (9,)


def test_wnids_are_names_for_imagenette():
    assert resolve_classes(IMAGENETTE_WNIDS[::-1], dataset("imagenette")) == tuple(range(9, -1, -1))


def test_an_unknown_name_is_answered_with_the_nearest():
    message = refusal(["trousers", "bag", "snaeker"], dataset("fashion_mnist"))
    assert "selected_classes" in message and "fashion_mnist" in message
    assert "trousers is no class, nearest: trouser" in message and "snaeker is no class, nearest: sneaker" in message
    assert "bag is no class" not in message


def test_a_name_like_no_other_is_answered_with_the_valid_ones():
    assert "airplane, automobile, bird" in refusal(["zzzzzz"], dataset("cifar10"))


@pytest.mark.parametrize("index", [10, -1, "10", "-1"])
def test_an_index_out_of_range_is_answered_with_the_range(index):
    assert refusal([index], dataset("cifar10")) == f"selected_classes: {index}; cifar10 has the classes 0 to 9"


@pytest.mark.parametrize("given", [[3, 3], ["cat", 3], ["cat", "Cat"], [5, "cat", "CAT"]])
def test_duplicates_are_named(given):
    message = refusal(given, dataset("cifar10"))
    assert f"{given[-2]} and {given[-1]}; both are class 3 (cat)" in message


@pytest.mark.parametrize("given", [[], ()])
def test_an_empty_list_is_refused(given):
    assert "at least one" in refusal(given, dataset("cifar10"))


@pytest.mark.parametrize("given", ["cat", 3, None])
def test_what_is_no_list_is_refused(given):
    assert "must be a list" in refusal(given, dataset("cifar10"))


@pytest.mark.parametrize("element", [True, 1.0, None, [1]])
def test_what_is_neither_index_nor_name_is_refused(element):
    assert "index or a class name" in refusal([element], dataset("digits"))


def test_a_wrong_number_of_classes_is_refused():
    with pytest.raises(ConfigError, match=r"dataset\.num_classes: 11; cifar10 has 10"):
        class_names(dataset("cifar10", num_classes=11))


def test_imagenet_has_torchvisions_categories_even_without_files(tmp_path):
    names = class_names(imagenet(tmp_path))
    assert len(names) == 1000 and (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert len({module._key(name) for name in names}) == 1000
    assert resolve_classes(["Golden_Retriever", "tench"], imagenet(tmp_path)) == (207, 0)


def test_an_ambiguous_imagenet_name_is_answered_with_its_indices(tmp_path):
    message = refusal(["cardigan"], imagenet(tmp_path))
    assert "ambiguous" in message and "264" in message and "474" in message
    assert resolve_classes(["Cardigan (264)"], imagenet(tmp_path)) == (264,)


def test_names_that_are_the_same_are_all_offered(tmp_path, monkeypatch):
    categories = tuple("crane" if index in (134, 517) else f"thing {index}" for index in range(1000))
    monkeypatch.setattr(module, "_imagenet_categories", lambda: categories)
    assert "134 (crane (134)), 517 (crane (517))" in refusal(["crane"], imagenet(tmp_path))


def test_imagenet_wnids_are_names_when_the_folders_are_there(tmp_path):
    full = imagenet(tmp_path, [f"n{index:08d}" for index in range(1000)])
    assert resolve_classes(["n00000999", "tench"], full) == (999, 0)


def test_fewer_class_folders_are_their_own_names(tmp_path):
    small = imagenet(tmp_path, ["n03", "n01", ".hidden", "n02"], num_classes=3)
    assert class_names(small) == ("n01", "n02", "n03")
    assert resolve_classes(["N03", 0], small) == (2, 0)


def test_a_numeric_folder_name_goes_before_the_index(tmp_path):
    numeric = imagenet(tmp_path, ["0", "1", "10", "2"], num_classes=4)
    assert resolve_classes(["10", 3], numeric) == (2, 3)


def test_a_number_of_folders_other_than_that_of_the_classes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.num_classes: 1000; .*train has 2 classes"):
        class_names(imagenet(tmp_path, ["n01", "n02"]))


def test_folders_that_are_missing_and_needed_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.root: .*no class folders in .*train"):
        class_names(imagenet(tmp_path, num_classes=12))


def test_names_come_without_torch():
    code = (
        "import sys, types, class_names\n"
        "d = types.SimpleNamespace(name='imagenet', num_classes=1000, root=None)\n"
        "class_names.resolve_classes(['tench'], d)\n"
        "sys.exit('torch' in sys.modules or 'torchvision' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parent).returncode == 0
