"""Whatever `check` refuses on a command line is in test_command_line.py; here is what it makes of what it accepts."""

import dataclasses
import itertools

import hydra
import pytest
from omegaconf import OmegaConf

import settings
from environment import config_hash
from errors import ConfigError
from settings import CONFIG_DIR, Settings, check
from subsets import random_subset


def checked(*overrides: str) -> Settings:
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return check(hydra.compose("config", overrides=list(overrides)))


def names_in(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def test_the_defaults_are_a_run_on_digits():
    run = checked()
    assert (run.dataset.name, run.model.name, run.pruning.name) == ("digits", "resnet18", "ocap")
    assert run.selected_classes == (3, 8, 9)
    assert run.class_names == tuple("0123456789")
    assert len(run.pruning.pruning_ratio) >= 8
    assert run.run_name == "ocap-resnet18-digits"


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        checked().training.epochs = 1


def test_one_ratio_is_a_list_of_one():
    assert checked("pruning.pruning_ratio=0.85").pruning.pruning_ratio == (0.85,)


def test_ratios_keep_their_order():
    assert checked("pruning.pruning_ratio=[0.9,0,0.1]").pruning.pruning_ratio == (0.9, 0.0, 0.1)


def test_classes_keep_their_order_and_names_become_indices():
    run = checked("dataset=fashion_mnist", "selected_classes=[bag,trouser,0]")
    assert run.selected_classes == (8, 1, 0)


def test_values_come_out_in_their_types():
    run = checked("training.early_stopping_patience=null", "training.lr=1", "run_name=7")
    assert run.training.early_stopping_patience is None
    assert (run.training.lr, type(run.training.lr)) == (1.0, float)
    assert run.run_name == "7"


def test_the_methods_own_keys_end_in_options():
    options = checked("pruning.activation_func=relu", "pruning.negative_slope=0").pruning.options
    assert options == {"activation_func": "relu", "negative_slope": 0.0, "aggregation": "union"}
    assert checked("pruning=random").pruning.options == {}


@pytest.mark.parametrize("group", ["pruning", "model"])
def test_every_choice_of_a_group_can_be_made(group):
    for name in names_in(group):
        assert getattr(checked(f"{group}={name}"), group).name == name


@pytest.mark.parametrize("dataset", [name for name in names_in("dataset") if name != "imagenet"])
def test_every_dataset_knows_its_classes_without_its_files(dataset):
    run = checked(f"dataset={dataset}")
    assert len(run.class_names) == run.dataset.num_classes


def test_only_resnets_take_the_small_stem():
    assert checked("model=resnet50", "model.small_input_stem=true").model.small_input_stem is True
    with pytest.raises(ConfigError, match="mobilenet_v2 takes only false"):
        checked("model=mobilenet_v2", "model.small_input_stem=true")


def test_a_methods_file_alone_adds_its_keys_types_and_words(tmp_path, monkeypatch):
    config = tmp_path / "config"
    for group in ("model", "dataset"):
        (config / group).mkdir(parents=True)
        for path in (CONFIG_DIR / group).glob("*.yaml"):
            (config / group / path.name).write_text(path.read_text())
    (config / "config.yaml").write_text((CONFIG_DIR / "config.yaml").read_text())
    (config / "pruning").mkdir()
    (config / "pruning" / "base.yaml").write_text("name: base\nrule: a\nchoices: {rule: [a, b]}\n")
    (config / "pruning" / "new.yaml").write_text("defaults: [base]\nname: new\nsteps: 3\nlimit: null\n")
    monkeypatch.setattr(settings, "CONFIG_DIR", config)
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose("config", overrides=["pruning=random"])

    def with_values(**values):
        own = {"name": "new", "rule": "b", "steps": 3, "limit": 0.5, "choices": {"rule": ["a", "b"]}, **values}
        cfg = OmegaConf.merge({}, composed)
        OmegaConf.set_struct(cfg, False)
        del cfg.pruning.choices
        cfg.pruning.update(own)
        return check(cfg)

    assert with_values().pruning.options == {"rule": "b", "steps": 3, "limit": 0.5}
    with pytest.raises(ConfigError, match=r"pruning\.rule: \"c\"; new takes only a, b"):
        with_values(rule="c")
    with pytest.raises(ConfigError, match=r"pruning\.steps: 2\.5; must be an integer"):
        with_values(steps=2.5)
    with pytest.raises(ConfigError, match=r"pruning\.step: 3; no such key, did you mean pruning\.steps\?"):
        with_values(step=3)


def test_trained_weights_can_replace_training(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"")
    run = checked("training.train=false", f"model.pretrained_weights_path={weights}")
    assert run.model.pretrained_weights_path == str(weights)


def test_a_scores_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"pruning\.scores_path: \".*/scores\.npz\"; no such file"):
        checked(f"pruning.scores_path={tmp_path / 'scores.npz'}")


def test_what_training_a_dataset_needs_otherwise_gives_way_to_the_command_line():
    general, special = checked().training, checked("dataset=fashion_mnist").training
    assert (special.epochs, special.lr) != (general.epochs, general.lr)
    assert dataclasses.replace(special, epochs=general.epochs, lr=general.lr) == general
    assert checked("dataset=fashion_mnist", "training.epochs=3").training == dataclasses.replace(special, epochs=3)


@pytest.mark.parametrize("method", names_in("pruning"))
def test_what_is_matched_is_scored_and_ranked_as_by_itself(method):
    if method == "matched_random":
        with pytest.raises(ConfigError, match='pruning.matched_method: "matched_random"; cannot be matched, valid: '):
            checked("pruning=matched_random", f"pruning.matched_method={method}")
        return
    own = checked(f"pruning={method}").pruning
    matched = checked("pruning=matched_random", f"pruning.matched_method={method}").pruning
    assert (matched.pruning_scope, matched.scoring_classes) == (own.pruning_scope, own.scoring_classes)
    told = checked("pruning=matched_random", f"pruning.matched_method={method}", "pruning.pruning_scope=layer").pruning
    assert (told.pruning_scope, told.scoring_classes) == ("layer", own.scoring_classes)


def test_only_a_method_that_matches_takes_null():
    with pytest.raises(ConfigError, match="pruning.pruning_scope: null; only a method that matches another"):
        checked("pruning=lrp", "pruning.pruning_scope=null")


def test_a_home_folder_is_followed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked("cache_dir='~/cache'").cache_dir == str(tmp_path / "cache")


@pytest.mark.parametrize("rule", ["similar", "distinct"])
def test_of_imagenet_the_published_classes_are_taken(rule, tmp_path):
    names = checked("dataset=imagenet", f"dataset.root={tmp_path}", f"subset={rule}", "pruning.target=null")
    chosen = [names.class_names[index] for index in names.selected_classes]
    known = {"similar": ("gondola", "trimaran", "canoe"), "distinct": ("jellyfish", "king_penguin", "triceratops")}
    assert len(chosen) == 10 and all(
        any(word in name.lower().replace(" ", "_") for name in chosen) for word in known[rule]
    )


def test_classes_by_rule_are_known_as_far_as_they_can_be():
    assert checked("subset=random", "subset.size=4").selected_classes == random_subset(10, 4, 0)
    assert checked("subset=random", "subset.seed=1").selected_classes != checked("subset=random").selected_classes
    assert checked("subset=similar").selected_classes == ()
    assert checked().selected_classes == (3, 8, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["subset=random", "subset.size=11"], "subset.size: 11; subset.rule=random takes 1 to 10 of the 10 classes"),
        (["subset=similar", "subset.size=1"], "subset.size: 1; subset.rule=similar takes 2 to 10 of the 10 classes"),
        (["subset.rule=alike"], 'subset.rule: "alike"; must be one of given, random, similar, distinct'),
        (["pruning.match=macs"], 'pruning.match: "macs"; needs pruning.target as well'),
        (["pruning.target=[0.5]"], r"pruning.target: \[0.5\]; needs pruning.match as well"),
        (["pruning.match=flops", "pruning.target=[0.5]"], "pruning.match: .* one of macs, params, filters, latency"),
        (
            ["pruning.match=macs", "pruning.target=[0]"],
            r"pruning.target: \[0\]; must be a list of one or more, each a number above 0 and below 1",
        ),
        (["pruning.match=macs", "pruning.target=[0.5,0.5]"], "pruning.target: 0.5 in .* once"),
        (["subset=random", "num_pruning_samples=2"], "num_pruning_samples: 2; must be at least 3"),
    ],
)
def test_budgets_and_subsets_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        checked(*given)


@pytest.mark.parametrize(
    ("given", "variant"),
    [
        ([], "ocap"),
        (["pruning=torchpruner", "pruning.attribution=apoz"], "torchpruner attribution=apoz"),
        (["pruning=lrp", "pruning.scoring_classes=all"], "lrp scoring_classes=all"),
        (["pruning=ln_structured", "pruning.pruning_scope=global"], "ln_structured pruning_scope=global"),
        (["pruning=matched_random"], "matched_random"),
        (["pruning=matched_random", "pruning.matched_method=lrp"], "matched_random matched_method=lrp"),
        (["pruning.match=macs", "pruning.target=[0.5]", "pruning.min_filters=2"], "ocap"),
    ],
)
def test_a_variant_is_the_method_and_what_is_set_otherwise(given, variant):
    assert checked(*given).variant == variant


def jobs_of(experiment: str) -> list[list[str]]:
    """The overrides of every job of an experiment."""
    params = OmegaConf.load(CONFIG_DIR / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    axes = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
    return [list(job) for job in itertools.product(*axes)]


@pytest.mark.parametrize("experiment", names_in("experiment"))
def test_the_jobs_of_every_experiment_can_run(experiment, tmp_path):
    """The first, the last, and two between them."""
    given = [f"dataset.root={tmp_path}"] if "original" in experiment else []
    jobs = jobs_of(experiment)
    jobs = [*jobs[: -1 : len(jobs) // 3 + 1], jobs[-1]]
    settings = [checked(f"+experiment={experiment}", *job, *given) for job in jobs]
    assert len({config_hash(one) for one in settings}) == len(jobs)
