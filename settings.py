"""What a run can be told: typed settings, and the check that every configuration passes before torch is imported.

The values stand in `config/`, the types here. What a pruning method adds to `pruning.*`, and which words a key takes
with a certain method or model (`choices`), its own YAML declares; nothing here knows a method by name.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from class_names import IMAGENET_SUBSETS, class_names, resolve_classes
from errors import ConfigError
from schema import Matches, Within, assemble, convert, flatten, kind_of_default, leaves, listed, show, unknown_key
from subsets import random_subset

CONFIG_DIR = Path(__file__).resolve().parent / "config"
PATHS = {"cache_dir", "model.pretrained_weights_path", "pruning.scores_path", "pruning.matched_selections"}
NAMED_GROUPS = ("pruning", "model", "dataset")
IMAGENET_CLASSES = 1000

Natural = Annotated[int, Within(0, below=2**31)]
Positive = Annotated[int, Within(1, below=2**31)]
PositiveNumber = Annotated[float, Within(0, above_low=True)]
Share = Annotated[float, Within(0, below=1)]
Text = Annotated[str, Matches(r"(?s).*\S.*", "not empty")]


@dataclass(frozen=True)
class TrainingSettings:
    train: bool
    use_pretrained_model: bool
    use_data_augmentation: bool
    epochs: Positive
    lr: PositiveNumber
    optimizer: Literal["adam", "adamw", "sgd"]
    weight_decay: Annotated[float, Within(0)]
    momentum: Share
    scheduler: Literal["cosine", "step", "none"]
    early_stopping_patience: Positive | None  # epochs
    batch_size_train: Positive
    batch_size_test: Positive
    retrain_after_pruning: bool
    train_pruned_from_scratch: bool
    retrain_epochs: Positive
    lr_retrain: PositiveNumber
    processes: Positive


@dataclass(frozen=True)
class ModelSettings:
    name: Text
    pretrained_weights_path: Text | None
    skip_first_layers: Natural
    small_input_stem: bool


@dataclass(frozen=True)
class DatasetSettings:
    name: Text
    root: Text | None
    num_classes: Positive
    image_size: Annotated[int, Within(32, below=2**14)]  # pixels; the models halve it five times
    samples_per_class: Positive | None
    validation_fraction: Annotated[float, Within(0, below=1, above_low=True)]
    num_workers: Annotated[int, Within(0, below=1025)]
    download: bool


@dataclass(frozen=True)
class PruningSettings:
    name: Text
    pruning_ratio: tuple[Share, ...]
    match: Literal["macs", "params", "filters", "latency"] | None
    target: tuple[Annotated[float, Within(0, below=1, above_low=True)], ...] | None  # share of it to remove
    pruning_scope: Literal["layer", "global"] | None  # None until `check` has put in what the matched method has
    scoring_classes: Literal["selected", "all", "complement"] | None
    min_filters: Positive
    round_to: Positive
    pruner: Literal["depgraph", "structure"]
    residual: Literal["skip", "coupled", "scatter"]
    coupled_scores: Literal["mean", "sum", "max"]
    scores_path: Text | None
    options: Mapping[str, Any] = field(default_factory=dict)  # the method's own keys


@dataclass(frozen=True)
class SubsetSettings:
    rule: Literal["given", "random", "similar", "distinct"]
    size: Positive
    seed: Natural  # of `random`


@dataclass(frozen=True)
class LatencySettings:
    batch_sizes: tuple[Positive | Literal["test"], ...]
    repeats: Positive
    warmup: Natural
    seconds: PositiveNumber
    threads: Annotated[int, Within(1, below=1025)] | None


@dataclass(frozen=True)
class WandbSettings:
    mode: Literal["offline", "online"]
    project: Text
    entity: Text | None
    group: Text | None
    job_type: Text | None
    tags: tuple[Text, ...] | None
    name: Text


@dataclass(frozen=True)
class SweepSettings:
    dry_run: bool


@dataclass(frozen=True)
class Settings:
    """A checked configuration. Fields with a default are worked out by `check`, the others are keys of `config/`."""

    selected_classes: tuple[int | str, ...]  # `check` leaves indices only; none where the dense network will tell
    num_pruning_samples: Positive
    replace_last_layer: bool
    log_results: bool
    run_name: Text
    device: Annotated[str, Matches(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N")]
    seed: Annotated[int, Within(0, below=2**32)]
    sampling_seed: Annotated[int, Within(0, below=2**32)] | None
    inference_with_onnx: bool
    cache_dir: Text
    save_pruned_models: bool
    resume: bool
    training: TrainingSettings
    model: ModelSettings
    dataset: DatasetSettings
    pruning: PruningSettings
    subset: SubsetSettings
    latency: LatencySettings
    wandb: WandbSettings
    sweep: SweepSettings
    class_names: tuple[str, ...] = ()  # of all classes of the dataset, by index
    variant: str = ""  # the method, and those of its settings that differ from its YAML


def check(cfg: DictConfig) -> Settings:
    """The settings that a composed configuration stands for.

    Raises ConfigError, whose text is the one message to show, for the first thing that keeps it from running.
    """
    given = flatten(OmegaConf.to_container(cfg, resolve=False))
    kinds, choices = _declared_keys(given)
    for key, value in given.items():
        if key not in kinds:
            raise _changed_choices(key, value) if ".choices" in key else unknown_key(key, value, kinds)
    for key in kinds:
        if given.get(key, "???") == "???":
            raise ConfigError(f"{key}: missing; give it a value, a ~ on the command line may have deleted it")
    resolved = flatten(_resolved(cfg))
    values = {key: convert(key, resolved.get(key), kind) for key, kind in kinds.items()}
    for key in PATHS & values.keys():
        values[key] = values[key] and os.path.expanduser(values[key])  # a shell leaves key=~/file as it is
    for key, words in choices.items():
        if values[key] not in words:
            name = values[f"{key.partition('.')[0]}.name"]
            raise ConfigError(f"{key}: {show(values[key])}; {name} takes only {listed(words)}")
    settings = assemble(Settings, values)
    own_keys = kinds.keys() - leaves(Settings).keys()
    options = {key.removeprefix("pruning."): values[key] for key in kinds if key in own_keys}
    settings = replace(
        settings, pruning=replace(settings.pruning, options=options), class_names=class_names(settings.dataset)
    )
    settings = replace(settings, pruning=_as_matched(settings.pruning), variant=_variant(settings.pruning))
    settings = replace(settings, selected_classes=_classes(settings))
    _refuse_contradictions(settings)
    return settings


def _classes(settings: Settings) -> tuple[int, ...]:
    """The selected classes as far as they are known without a network."""
    rule, size, known = settings.subset.rule, settings.subset.size, len(settings.class_names)
    if rule == "given":
        return resolve_classes(settings.selected_classes, settings.dataset)
    if settings.dataset.name == "imagenet" and rule in IMAGENET_SUBSETS and known == IMAGENET_CLASSES:
        return IMAGENET_SUBSETS[rule]
    least = 1 if rule == "random" else 2
    if not least <= size <= known:
        raise ConfigError(f"subset.size: {size}; subset.rule={rule} takes {least} to {known} of the {known} classes")
    return random_subset(known, size, settings.subset.seed) if rule == "random" else ()


def number_of_classes(settings: Settings) -> int:
    """How many classes are selected, also where which they are is not yet known."""
    return len(settings.selected_classes) or settings.subset.size


def _variant(pruning: PruningSettings) -> str:
    """The method's name, and the settings of its own, its scope and its scoring classes that differ from its YAML."""
    declared = {**OmegaConf.load(CONFIG_DIR / "config.yaml").pruning, **declaration("pruning", pruning.name)}
    chosen = pruning.options | {key: getattr(pruning, key) for key in ("pruning_scope", "scoring_classes")}
    changed = [f"{key}={_word(value)}" for key, value in chosen.items() if value != declared.get(key)]
    return " ".join([pruning.name, *changed])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _as_matched(pruning: PruningSettings) -> PruningSettings:
    """`pruning` with its nulls filled in from the YAML of the method that it matches."""
    matched = pruning.options.get("matched_method")
    missing = [key for key in ("pruning_scope", "scoring_classes") if getattr(pruning, key) is None]
    if not missing:
        return pruning
    if matched is None:
        raise ConfigError(f"pruning.{missing[0]}: null; only a method that matches another takes its value from there")
    names = sorted(path.stem for path in (CONFIG_DIR / "pruning").glob("[!_]*.yaml") if path.stem != pruning.name)
    if matched not in names:
        raise ConfigError(f"pruning.matched_method: {show(matched)}; cannot be matched, valid: {listed(names)}")
    values = {**OmegaConf.load(CONFIG_DIR / "config.yaml").pruning, **declaration("pruning", matched)}
    return replace(pruning, **{key: values[key] for key in missing})


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _declared_keys(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Every valid key with its annotation, and the words that the chosen method, model and dataset leave to a key.

    The declared `choices` are taken out of `given`; any that the user changed stay there, as the unknown keys they are.
    """
    kinds, choices = leaves(Settings), {}
    for group in NAMED_GROUPS:
        for name, value in flatten(declaration(group, given.get(f"{group}.name"))).items():
            key = f"{group}.{name}"
            if name.startswith("choices."):
                choices[f"{group}.{name.removeprefix('choices.')}"] = value
                if given.get(key) == value:
                    del given[key]
            elif group == "pruning":
                kinds.setdefault(key, kind_of_default(value))
    return kinds, choices


def _changed_choices(key: str, value: Any) -> ConfigError:
    group = key.partition(".")[0]
    return ConfigError(
        f"{key}: {show(value)}; choices are facts of config/{group}/, leave them and choose with {group}=NAME"
    )


def declaration(group: str, name: Any) -> dict[str, Any]:
    """What `config/<group>/<name>.yaml` says, whatever the command line made of it."""
    names = sorted(path.stem for path in (CONFIG_DIR / group).glob("[!_]*.yaml"))
    if name not in names:
        given = "missing" if name is None else show(name)
        raise ConfigError(f"{group}.name: {given}; choose with {group}=NAME, NAME being one of {listed(names)}")
    return _read_declaration(CONFIG_DIR / group / f"{name}.yaml")


def method_options(name: str) -> dict[str, Any]:
    """A pruning method's own keys with the values that `config/pruning/<name>.yaml` gives them."""
    general = {field.name for field in fields(PruningSettings)} | {"choices"}
    return {key: value for key, value in declaration("pruning", name).items() if key not in general}


@functools.cache
def _read_declaration(path: Path) -> dict[str, Any]:
    content = OmegaConf.load(path)
    bases = [name for name in content.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    inherited = [OmegaConf.create(_read_declaration(path.with_name(f"{name}.yaml"))) for name in bases]
    return OmegaConf.to_container(OmegaConf.merge(*inherited, content))


def _refuse_contradictions(settings: Settings) -> None:
    """Raise ConfigError for values that are valid each by itself but not together, and for a file that is not there."""
    training, model, dataset, pruning = settings.training, settings.model, settings.dataset, settings.pruning
    ratios, classes, weights = pruning.pruning_ratio, number_of_classes(settings), model.pretrained_weights_path
    if (pruning.match is None) != (pruning.target is None):
        given, missing = ("target", "match") if pruning.match is None else ("match", "target")
        raise ConfigError(
            f"pruning.{given}: {show(getattr(pruning, given))}; needs pruning.{missing} as well: pruning.match=macs "
            '"pruning.target=[0.5]" removes half of the MACs'
        )
    if pruning.target and (twice := [share for share in pruning.target if pruning.target.count(share) > 1]):
        raise ConfigError(f"pruning.target: {twice[0]} in {show(pruning.target)}; each may stand in the list once")
    if pruning.match and pruning.options.get("matched_selections"):
        raise ConfigError(
            f"pruning.match: {show(pruning.match)}; pruning.matched_selections has certain ratios only, none can be "
            "looked for; leave one of the two out"
        )
    if twice := [ratio for ratio in ratios if ratios.count(ratio) > 1]:
        raise ConfigError(f"pruning.pruning_ratio: {twice[0]} in {show(ratios)}; each ratio may stand in the list once")
    if settings.num_pruning_samples < classes:
        raise ConfigError(
            f"num_pruning_samples: {settings.num_pruning_samples}; must be at least {classes}, one for each of "
            "selected_classes"
        )
    if pruning.scoring_classes == "complement" and classes == len(settings.class_names):
        raise ConfigError(
            'pruning.scoring_classes: "complement"; selected_classes holds every class, which leaves none to score on'
        )
    if pruning.residual == "scatter" and pruning.pruner != "structure":
        raise ConfigError(
            'pruning.residual: "scatter"; only the structure pruner puts outputs back in place, set '
            "pruning.pruner=structure"
        )
    if os.path.exists(settings.cache_dir) and not os.path.isdir(settings.cache_dir):
        raise ConfigError(f"cache_dir: {show(settings.cache_dir)}; is a file, give a folder or a name that is free")
    if pruning.scores_path is not None and not os.path.isfile(pruning.scores_path):
        raise ConfigError(f"pruning.scores_path: {show(pruning.scores_path)}; no such file")
    if weights is not None and not os.path.isfile(weights):
        raise ConfigError(f"model.pretrained_weights_path: {show(weights)}; no such file")
    if weights is not None and training.use_pretrained_model:
        raise ConfigError(
            f"model.pretrained_weights_path: {show(weights)}; training.use_pretrained_model=true names other weights, "
            "set only one of the two"
        )
    if model.small_input_stem and training.use_pretrained_model:
        raise ConfigError(
            "model.small_input_stem: true; torchvision's weights (training.use_pretrained_model=true) are for the "
            "7x7 stem, set only one of the two"
        )
    if not training.train and weights is None and not training.use_pretrained_model:
        raise ConfigError(
            "training.train: false; then trained weights are needed: give model.pretrained_weights_path=FILE or, "
            "for ImageNet, training.use_pretrained_model=true"
        )
    if not training.train and training.use_pretrained_model and dataset.num_classes != IMAGENET_CLASSES:
        raise ConfigError(
            f"training.use_pretrained_model: true; torchvision's head is for {IMAGENET_CLASSES} classes, that for the "
            f"{dataset.num_classes} of {dataset.name} would stay untrained: set training.train=true or give "
            "model.pretrained_weights_path=FILE"
        )
