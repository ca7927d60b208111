"""The networks, their weights and their heads: what is known of an architecture stands here, in one entry each."""

import copy
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from errors import BenchmarkError
from scatter import Tracer
from settings import IMAGENET_CLASSES

SHOWN_ENTRIES = 5  # how many keys a message about unfitting weights names
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep their state dict
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # put before each name by DataParallel and torch.compile
COUNTER = ".num_batches_tracked"  # ends the name of BatchNorm's step counter


@dataclass(frozen=True)
class Architecture:
    """Facts of one torchvision architecture.

    weights: its ImageNet weights (the first published set, which the pruning literature starts from).
    head: qualified name of the classifying layer.
    small_stem: exists with the 3x3 stride-1 stem of the CIFAR literature (He et al., CVPR 2016, section 4.2).
    """

    weights: zoo.WeightsEnum
    head: str
    small_stem: bool = False


ARCHITECTURES = {
    "vgg16": Architecture(zoo.VGG16_Weights.IMAGENET1K_V1, head="classifier.6"),
    "vgg16_bn": Architecture(zoo.VGG16_BN_Weights.IMAGENET1K_V1, head="classifier.6"),
    "resnet18": Architecture(zoo.ResNet18_Weights.IMAGENET1K_V1, head="fc", small_stem=True),
    "resnet50": Architecture(zoo.ResNet50_Weights.IMAGENET1K_V1, head="fc", small_stem=True),
    "mobilenet_v2": Architecture(zoo.MobileNet_V2_Weights.IMAGENET1K_V1, head="classifier.1"),
}


def get_model(
    name: str,
    num_classes: int,
    *,
    small_input_stem: bool = False,
    use_pretrained_model: bool = False,
    pretrained_weights_path: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """A model on the CPU, in eval mode, that maps images [B, 3, H, W] to logits [B, num_classes].

    pretrained_weights_path decides alone where it is given: every weight comes from that file. Otherwise
    use_pretrained_model takes torchvision's ImageNet weights; the head is kept for 1000 classes and new for any other
    number. What is new is a function of `seed`; the global random state is left as it was.

    Raises BenchmarkError for an unknown name, for a stem the architecture does not have, for weights that cannot be
    fetched or read, do not fit or are not finite.
    """
    _refuse_unknown(name, small_input_stem)
    if small_input_stem and use_pretrained_model and pretrained_weights_path is None:
        raise BenchmarkError("model.small_input_stem: true; torchvision's weights have the 7x7 stem, set it to false")
    if pretrained_weights_path is not None:
        state = read_weights(pretrained_weights_path)
        source = f"model.pretrained_weights_path: {pretrained_weights_path}"
        return model_from_state(name, num_classes, state, small_input_stem=small_input_stem, source=source)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(name, num_classes, small_input_stem)
    if use_pretrained_model:
        _load_torchvision_weights(model, name, num_classes)
    return model.eval()


def model_from_state(
    name: str, num_classes: int, state: Mapping[str, Tensor], *, small_input_stem: bool = False, source: str = "weights"
) -> nn.Module:
    """The named model with exactly the weights of `state`, on the CPU, in eval mode.

    Raises BenchmarkError, opening with `source`, that names the entries at fault and the likely cause.
    """
    _refuse_unknown(name, small_input_stem)
    with torch.device("meta"):  # names and shapes without the seconds that a large random initialisation takes
        model = build(name, num_classes, small_input_stem)
    wanted = model.state_dict()
    # Checkpoints older than PyTorch 0.4.1 lack these counters, which inference never reads.
    state = {**{key: torch.tensor(0) for key in wanted if key.endswith(COUNTER)}, **state}
    faults = _mismatches(wanted, state)
    if faults:
        shown = "; ".join(list(faults.values())[:SHOWN_ENTRIES])
        more = f"; and {len(faults) - SHOWN_ENTRIES} more" if len(faults) > SHOWN_ENTRIES else ""
        cause = _likely_cause(name, num_classes, small_input_stem, state, faults)
        raise BenchmarkError(f"{source}; does not fit {name} with {num_classes} classes: {shown}{more}. {cause}")
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise BenchmarkError(f"{source}; holds NaN or infinite weights: {_listed(broken)}. Use an intact file")
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU: bare, or under 'state_dict', 'model_state_dict' or 'model'.

    Only tensors are unpickled (weights_only), so a foreign file cannot run code. Raises BenchmarkError.
    """
    key = f"model.pretrained_weights_path: {path}"
    if not Path(path).is_file():
        raise BenchmarkError(f"{key}; there is no such file, give the path of a saved state dict")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises a dozen types on damaged and foreign files
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = "it holds pickled objects, such as a whole model, which are not loaded because they can run code"
            raise BenchmarkError(f"{key}; {reason}. Save model.state_dict() instead") from error
        reason = "it cannot be read as a PyTorch file: truncated, damaged or of another kind"
        raise BenchmarkError(f"{key}; {reason}. Give a file written by torch.save(model.state_dict(), path)") from error
    for wrapper in WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise BenchmarkError(f"{key}; it holds {_kind(content)}, a state dict (names to tensors) is needed")
    foreign = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise BenchmarkError(f"{key}; entries that are not tensors: {_listed(foreign)}. A state dict is needed")
    return {_without_wrappers(str(name)): value for name, value in content.items()}


def head_name(model: nn.Module) -> str:
    """Qualified name of the classifying layer: the last Linear or convolution on the way to the output.

    The order is that of execution, so a classifier that is a 1x1 convolution (SqueezeNet) is found, and auxiliary heads
    that do not reach the output are not. A model that cannot be traced is searched in the order of its definition.
    Raises BenchmarkError if there is no such layer.
    """
    modules = dict(model.named_modules())
    candidates = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    candidates = candidates or [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    try:
        nodes = list(Tracer().trace(model).nodes)
    except Exception:  # data-dependent control flow; tracing runs the model's own code, which may raise anything
        nodes = []
    needed = {node for node in nodes if node.op == "output"}
    for node in reversed(nodes):
        if node not in needed:
            continue
        if node.op == "call_module" and isinstance(modules[node.target], nn.Linear | nn.Conv2d):
            candidates = [node.target]
            break
        needed.update(node.all_input_nodes)
    if not candidates:
        raise BenchmarkError(f"{type(model).__name__}: no Linear or convolution found that could be its head")
    return candidates[-1]


def replace_head(model: nn.Module, classes: Sequence[int]) -> nn.Module:
    """A copy of `model` whose logit i is the logit classes[i] of the original: rows are cut out, not masked.

    The copy maps images to logits [B, len(classes)]. Raises BenchmarkError for an empty list, a duplicate, or an index
    that the head does not have.
    """
    name = head_name(model)
    outputs = model.get_submodule(name).weight.shape[0]
    given = f"selected_classes: {list(classes)}"
    if not len(classes):
        raise BenchmarkError(f"{given}; name at least one class")
    outside = [index for index in classes if not 0 <= index < outputs]
    if outside:
        raise BenchmarkError(f"{given}; the model has no class {_listed(outside)}, valid are 0 to {outputs - 1}")
    if len(set(classes)) < len(classes):
        raise BenchmarkError(f"{given}; a class stands more than once, name each class once")
    replaced = copy.deepcopy(model)
    head = replaced.get_submodule(name)
    for parameter_name in ("weight", "bias"):
        parameter = getattr(head, parameter_name)
        if parameter is not None:
            rows = parameter.detach()[list(classes)].clone()
            setattr(head, parameter_name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(classes))
    return replaced


def drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose weights and statistics are drawn anew, each layer by its own rule, as before any training.

    Raises BenchmarkError for a parameter whose module does not know how.
    """
    drawn = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, module in drawn.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif module._parameters:
                raise BenchmarkError(f"{name}: {type(module).__name__} has no reset_parameters to draw it anew")
    return drawn


def _refuse_unknown(name: str, small_input_stem: bool) -> None:
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise BenchmarkError(f"model.name: {name!r}; valid are {', '.join(ARCHITECTURES)}{hint}")
    if small_input_stem and not ARCHITECTURES[name].small_stem:
        able = ", ".join(other for other, facts in ARCHITECTURES.items() if facts.small_stem)
        raise BenchmarkError(f"model.small_input_stem: true for {name}; only {able} have this stem, set it to false")


def build(name: str, num_classes: int, small_input_stem: bool) -> nn.Module:
    """The architecture with torchvision's own random weights."""
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if small_input_stem:
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet does
        model.maxpool = nn.Identity()
    return model


def _load_torchvision_weights(model: nn.Module, name: str, num_classes: int) -> None:
    """Load torchvision's ImageNet weights into `model`; a head for another number of classes stays as it is."""
    weights = ARCHITECTURES[name].weights
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    key = "training.use_pretrained_model: true"
    instead = "or give the weights by model.pretrained_weights_path"
    try:
        _refuse_other_content(cached)
        state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # no network, a wrong checksum, or what reading a damaged file raises
        problem, remedy = f"{weights.url} could not be fetched", f"Go online, put the file at {cached}"
        if cached.is_file():
            problem, remedy = f"{cached} is damaged", "Delete it to fetch it anew"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"{key}; {problem} ({reason}). {remedy}, {instead}") from error
    head = f"{ARCHITECTURES[name].head}."
    fits = num_classes == IMAGENET_CLASSES
    new_head = {} if fits else {key: value for key, value in model.state_dict().items() if key.startswith(head)}
    model.load_state_dict({**state, **new_head})


def _refuse_other_content(cached: Path) -> None:
    """Raise ValueError for a file whose name ends in other digits than its sha256 begins with: torch.hub looks at them
    when it fetches a file, and never again."""
    if cached.is_file():
        with cached.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(wanted := cached.stem.rpartition("-")[2]):
            raise ValueError(f"its sha256 begins with {digest[: len(wanted)]}, not with {wanted}")


def _mismatches(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Entry -> what is wrong with it: wrong shapes first, as they tell most, then missing and unknown entries."""
    shapes = {
        key: f"{key} is {list(given[key].shape)} in the file, {list(wanted[key].shape)} in the model"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    }
    missing = {key: f"{key} is missing in the file" for key in wanted if key not in given}
    unknown = {key: f"{key} is not in the model" for key in given if key not in wanted}
    return shapes | missing | unknown


def _likely_cause(
    name: str, num_classes: int, small_input_stem: bool, state: Mapping[str, Tensor], faults: Mapping[str, str]
) -> str:
    """A sentence on what probably went wrong: another architecture, another stem, another number of classes."""
    head = ARCHITECTURES[name].head
    causes = []
    for other in ARCHITECTURES:
        with torch.device("meta"):
            entries = build(other, num_classes, False).state_dict()
        if other != name and _without_counters(entries) == _without_counters(state):
            causes.append(f"the weights are those of {other} (model={other})")
    if not causes and "conv1.weight" in faults and "conv1.weight" in state and ARCHITECTURES[name].small_stem:
        causes.append(f"the file has the other stem (model.small_input_stem={str(not small_input_stem).lower()})")
    if not causes and f"{head}.bias" in faults and f"{head}.bias" in state:
        classes = state[f"{head}.bias"].numel()
        causes.append(f"the file's head has {classes} classes, the dataset has {num_classes}")
    return f"Likely cause: {', and '.join(causes)}" if causes else "Likely cause: weights of another model"


def _without_counters(state: Mapping[str, Tensor]) -> set[str]:
    return {key for key in state if not key.endswith(COUNTER)}


def _without_wrappers(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _listed(values: Sequence[Any]) -> str:
    more = f" and {len(values) - SHOWN_ENTRIES} more" if len(values) > SHOWN_ENTRIES else ""
    return ", ".join(str(value) for value in values[:SHOWN_ENTRIES]) + more


def _kind(content: Any) -> str:
    return "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
