"""Tests of models.py: heads, stems, weights files and their faults."""

import hashlib
import io
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from errors import BenchmarkError
from models import ARCHITECTURES, get_model, head_name, model_from_state, read_weights, replace_head

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Wide(nn.Module):
    """A small classifier that defines its head first and calls it last, next to an unused layer."""

    def __init__(self, classes: int = 6):
        super().__init__()
        self.head = nn.Linear(8, classes)
        self.conv = nn.Conv2d(3, 8, 3)
        self.unused = nn.Linear(8, 99)

    def forward(self, images):
        return self.head(torch.relu(self.conv(images)).mean((2, 3)))


def refusal(call, *arguments, **options) -> str:
    """The one message with which the call is refused."""
    with pytest.raises(BenchmarkError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def resnet_file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(get_model("resnet18", 4).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnet50"])
def test_model_has_one_logit_a_class_and_is_in_eval_mode(name):
    model = get_model(name, 7)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert model(IMAGES).shape == (2, 7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_facts_of_the_architectures_agree_with_the_networks(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=7)
    assert head_name(model) == ARCHITECTURES[name].head
    assert model.get_submodule(ARCHITECTURES[name].head).out_features == 7
    assert hasattr(model, "conv1") == ARCHITECTURES[name].small_stem
    assert ARCHITECTURES[name].weights.name == "IMAGENET1K_V1"


def test_small_input_stem_keeps_the_resolution():
    model = get_model("resnet18", 5, small_input_stem=True)
    stem = model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity)
    with torch.no_grad():
        assert model.layer1(model.maxpool(model.conv1(IMAGES))).shape == (2, 64, 32, 32)
        assert model(IMAGES).shape == (2, 5)


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (get_model("resnet18", 3, seed=seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unknown_model_is_refused_with_the_nearest_name():
    assert "did you mean resnet18?" in refusal(get_model, "resnet81", 10)
    assert "mobilenet_v2" in refusal(get_model, "lenet", 10)


def test_stem_that_an_architecture_does_not_have_is_refused():
    assert "resnet18, resnet50" in refusal(get_model, "vgg16", 10, small_input_stem=True)
    message = refusal(get_model, "resnet18", 10, small_input_stem=True, use_pretrained_model=True)
    assert "7x7" in message


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_weights_are_read_bare_or_wrapped_and_from_half_precision(tmp_path, wrapper, prefix):
    state = Wide().state_dict()
    content = {prefix + key: value for key, value in state.items()}
    path = tmp_path / "weights.pt"
    torch.save(content if wrapper is None else {wrapper: content, "epoch": 3}, path)
    read = read_weights(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_loaded_model_computes_what_the_saved_one_did(resnet_file):
    saved, other = get_model("resnet18", 4), get_model("resnet18", 4, seed=1)
    loaded = get_model("resnet18", 4, pretrained_weights_path=resnet_file, seed=1)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), saved(IMAGES))
        assert not torch.equal(other(IMAGES), saved(IMAGES))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


def test_weights_without_batch_counters_are_accepted():
    state = get_model("resnet18", 4).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert model_from_state("resnet18", 4, old).bn1.num_batches_tracked == 0
    assert len(old) < len(state)


def test_head_of_another_size_is_named_as_the_cause(resnet_file):
    message = refusal(get_model, "resnet18", 10, pretrained_weights_path=resnet_file)
    assert "fc.weight is [4, 512] in the file, [10, 512] in the model" in message
    assert "head has 4 classes, the dataset has 10" in message
    assert str(resnet_file) in message and "stem" not in message


def test_other_stem_is_named_as_the_cause(resnet_file):
    message = refusal(get_model, "resnet18", 4, pretrained_weights_path=resnet_file, small_input_stem=True)
    assert "conv1.weight is [64, 3, 7, 7] in the file, [64, 3, 3, 3] in the model" in message
    assert "model.small_input_stem=false" in message and "head" not in message


def test_other_architecture_is_named_and_the_list_of_entries_is_bounded(resnet_file):
    message = refusal(get_model, "resnet50", 4, pretrained_weights_path=resnet_file)
    assert "those of resnet18" in message
    assert " more. " in message and len(message) < 1000
    state = {"layer.weight": torch.zeros(3)}
    assert "weights of another model" in refusal(model_from_state, "resnet50", 4, state)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value):
    state = get_model("resnet18", 4).state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    message = refusal(model_from_state, "resnet18", 4, state, source="the file")
    assert message.startswith("the file; ") and "layer1.0.conv1.weight" in message


def foreign_files(tmp_path, resnet_file):
    content = resnet_file.read_bytes()
    whole = tmp_path / "whole.pt"
    torch.save(Wide(), whole)
    contents = {
        "missing": None,
        "empty": b"",
        "text": b"not a checkpoint\n" * 9,
        "truncated": content[: len(content) // 2],
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "whole": whole.read_bytes(),
    }
    for name, data in contents.items():
        path = tmp_path / f"{name}.pt"
        if data is not None:
            path.write_bytes(data)
        yield name, path


def test_unreadable_files_are_refused_in_one_message_each(tmp_path, resnet_file):
    expected = {"missing": "no such file", "whole": "model.state_dict()"}
    for name, path in foreign_files(tmp_path, resnet_file):
        message = refusal(get_model, "resnet18", 4, pretrained_weights_path=path)
        assert message.startswith(f"model.pretrained_weights_path: {path}; "), name
        assert expected.get(name, "truncated, damaged or of another kind") in message, name
        assert "\n" not in message, name
    assert "no such file" in refusal(read_weights, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [([1, 2], "a list"), ({}, "nothing"), (torch.zeros(3), "a Tensor"), ({"epoch": 3, "lr": 0.1}, "epoch, lr")],
)
def test_content_that_is_no_state_dict_is_refused(tmp_path, content, said):
    path = tmp_path / "content.pt"
    torch.save(content, path)
    assert said in refusal(read_weights, path)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Weights with 1000 classes where torchvision looks for those of ResNet18 before it downloads them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    content = io.BytesIO()
    torch.save(get_model("resnet18", 1000, seed=3).state_dict(), content)
    path = folder / f"resnet18-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    path.write_bytes(content.getvalue())
    monkeypatch.setattr(ARCHITECTURES["resnet18"].weights.value, "url", f"https://nowhere.invalid/{path.name}")
    return path


def test_pretrained_backbone_is_kept_and_only_a_head_of_another_size_is_new(downloaded):
    source = get_model("resnet18", 1000, seed=3).state_dict()
    fresh = get_model("resnet18", 10, seed=8).state_dict()
    model = get_model("resnet18", 10, use_pretrained_model=True, seed=8).state_dict()
    for key, value in model.items():
        assert torch.equal(value, (fresh if key.startswith("fc.") else source)[key]), key
    whole = get_model("resnet18", 1000, use_pretrained_model=True, seed=8).state_dict()
    assert all(torch.equal(whole[key], source[key]) for key in source)


def test_damaged_download_is_named(downloaded):
    downloaded.write_bytes(downloaded.read_bytes()[:5000])
    assert f"{downloaded} is damaged" in refusal(get_model, "resnet18", 10, use_pretrained_model=True)


def test_without_a_network_the_message_names_the_key_that_helps(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = refusal(get_model, "resnet18", 10, use_pretrained_model=True)
    assert "model.pretrained_weights_path" in message and "no route to host" in message


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("squeezenet1_1", "classifier.1"),
        ("googlenet", "fc"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("shufflenet_v2_x0_5", "fc"),
    ],
)
def test_head_is_found_in_other_torchvision_networks(name, head):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        assert head_name(torchvision.models.get_model(name, num_classes=5, **options)) == head


def test_head_is_the_last_layer_called_not_the_last_defined():
    assert head_name(Wide()) == "head"


def test_auxiliary_heads_that_do_not_reach_the_output_are_passed_over():
    class Auxiliary(Wide):
        def forward(self, images):
            features = self.conv(images).mean((2, 3))
            logits = self.head(features)
            self.unused(features)
            return logits

    assert head_name(Auxiliary()) == "head"


def test_head_of_a_model_that_cannot_be_traced_is_the_last_linear():
    class Untraceable(nn.Sequential):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else images

    assert head_name(Untraceable(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Conv2d(1, 1, 1))) == "2"
    assert "no Linear" in refusal(head_name, nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("classes", [[4, 0, 2], [5], [0, 1, 2, 3, 4, 5]])
def test_replaced_head_gives_the_old_logits_in_list_order(classes):
    model = Wide().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = replace_head(model, classes)
    with torch.no_grad():
        torch.testing.assert_close(smaller(IMAGES), model(IMAGES)[:, classes])
        assert smaller.head.weight.shape == (len(classes), 8)
    assert smaller.head.out_features == len(classes)
    assert model.head.out_features == 6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_replaced_head_shares_no_memory_with_the_original():
    model = Wide()
    smaller = replace_head(model, [1, 0])
    with torch.no_grad():
        smaller.head.weight.zero_()
        smaller.conv.weight.zero_()
    assert model.head.weight.abs().sum() > 0 and model.conv.weight.abs().sum() > 0
    assert smaller.head.weight.requires_grad


def test_convolutional_head_is_replaced_in_list_order():
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=6).eval()
    smaller = replace_head(model, [3, 1])
    with torch.no_grad():
        torch.testing.assert_close(smaller(IMAGES), model(IMAGES)[:, [3, 1]])
    assert smaller.classifier[1].out_channels == 2


def test_head_without_a_bias_is_replaced():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
    images = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(replace_head(model, [2, 0])(images), model(images)[:, [2, 0]])


@pytest.mark.parametrize(
    ("classes", "said"), [([], "at least one"), ([0, 6], "6, valid are 0 to 5"), ([-1], "-1"), ([2, 2], "once")]
)
def test_classes_that_a_head_cannot_be_cut_to_are_refused(classes, said):
    assert said in refusal(replace_head, Wide(), classes)
