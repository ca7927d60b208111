"""What is whole is read, what is not is named."""

import json
import shutil
from dataclasses import replace

import pytest

from errors import BenchmarkError
from records import read_records
from runs import read_sweep, shaping, shown_run
from tests.sample_sweeps import run_of, write_run, write_sweep


def test_a_whole_sweep_is_read_without_a_word(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path, subsets=2, seeds=6))
    assert len(sweep.runs) == 36 and len(sweep.records) == 36 * 7 and sweep.problems == ()
    assert [run.name for run in sweep.runs] == [str(number) for number in range(36)]
    run = sweep.runs[4]
    assert run.command == "python main.py pruning=ln_structured seed=0" and run.environment["cpu"] == "a processor"
    pruned = [record for record in run.records if record.stage == "pruned"][1]
    counts = {layer: len(filters) for layer, filters in run.selections[pruned.ratio].items()}
    assert counts == pruned.filters_chosen_per_layer


def test_a_single_run_is_a_sweep_of_one(tmp_path):
    write_run(tmp_path / "run", run_of("ocap", (1, 2), 0))
    assert [run.name for run in read_sweep(tmp_path / "run").runs] == ["."]


def cut_short(root):
    path = root / "0" / "records.jsonl"
    path.write_text(path.read_text()[:-40])


def of_another_version(root):
    path = root / "0" / "records.jsonl"
    path.write_text(path.read_text().replace('{"schema": 4', '{"schema": 2', 1))


def twice_in_a_file(root):
    path = root / "0" / "records.jsonl"
    path.write_text(path.read_text() + path.read_text().replace("2026-", "2027-"))


def twice_in_folders(root):
    shutil.copytree(root / "0", root / "9")
    path = root / "9" / "records.jsonl"
    path.write_text(path.read_text().replace("2026-", "2027-"))


def empty(root):
    (root / "0" / "records.jsonl").write_text("")


def failed(root):
    (root / "0" / "records.jsonl").unlink()


def gone(root):
    shutil.rmtree(root / "0")


def no_selections(root):
    (root / "0" / "selections.json").unlink()


def damaged_environment(root):
    (root / "0" / "environment.json").write_text('{"cpu": ')


@pytest.mark.parametrize(
    ("damage", "runs", "records", "problem"),
    [
        (cut_short, 6, 41, "0: records.jsonl, line 7: not read: cut short, the run was interrupted"),
        (of_another_version, 6, 41, "0: records.jsonl, line 1: not read: schema 2; this version reads schema 4"),
        (
            twice_in_a_file,
            6,
            42,
            "0: records.jsonl holds 1 other run, shown is 2027-ocap-(0, 3, 6)-0-digits-resnet18, 7 records",
        ),
        (twice_in_folders, 6, 42, "0: same configuration as 9, left out"),
        (empty, 5, 35, "0: records.jsonl is empty; the run failed, or is under way"),
        (failed, 5, 35, "0: has no record yet; it failed, or is under way"),
        (
            gone,
            5,
            35,
            "ocap on digits, 3 random classes, resnet18: lacks 4 of 8 results that others have (seed 0, "
            "classes 0, 3, 6)",
        ),
        (no_selections, 6, 42, "0: has no selections.json"),
        (damaged_environment, 6, 42, "0: environment.json is damaged and was not read"),
    ],
)
def test_what_is_whole_is_read_and_the_rest_is_named(damage, runs, records, problem, tmp_path):
    write_sweep(tmp_path, subsets=2, seeds=1)
    damage(tmp_path)
    sweep = read_sweep(tmp_path)
    assert (len(sweep.runs), len(sweep.records)) == (runs, records) and problem in sweep.problems


def again(root, name, records=None, state=None):
    """A later run of the configuration of run 0, cut off after so many records."""
    shutil.copytree(root / "0", root / name)
    path = root / name / "records.jsonl"
    lines = path.read_text().replace("2026-", "2027-").splitlines(keepends=True)
    path.write_text("".join(lines[:records]))
    if state:
        (root / name / "status.json").write_text(json.dumps({"state": state, "identity": "0", "reason": "no memory"}))


def test_a_whole_run_does_not_lose_to_a_later_one_that_was_cut_off(tmp_path):
    write_sweep(tmp_path, subsets=2, seeds=1)
    again(tmp_path, "8", records=3)
    again(tmp_path, "9", records=5)
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == list("012345") and len(sweep.records) == 6 * 7
    assert sweep.problems == (
        "8: same configuration as 0, but 3 of its 7 results, left out",
        "9: same configuration as 0, but 5 of its 7 results, left out",
    )


@pytest.mark.parametrize(
    ("earlier", "later", "kept", "problem"),
    [
        ("done", "failed", "0", "9: same configuration as 0, but not done, left out"),
        ("failed", "done", "9", "0: same configuration as 9, but not done, left out"),
        ("done", "done", "9", "0: same configuration as 9, left out"),
        (None, "failed", "9", "0: same configuration as 9, left out"),
    ],
)
def test_of_runs_with_as_many_results_one_that_is_done_counts_then_the_last(earlier, later, kept, problem, tmp_path):
    write_run(tmp_path / "0", run_of("ocap", (1, 2), 0))
    again(tmp_path, "9", state=later)
    if earlier:
        (tmp_path / "0" / "status.json").write_text(json.dumps({"state": earlier, "identity": "0"}))
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == [kept] and problem in sweep.problems


def test_a_folder_without_a_record_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(BenchmarkError, match="not one whole record in or below it"):
        read_sweep(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "records.jsonl").write_text('{"schema": 4, "run')
    with pytest.raises(BenchmarkError, match="0: records.jsonl, line 1: not read: cut short"):
        read_sweep(tmp_path)


def changed(records, **fields):
    """Another run, of other settings."""
    identity = {key: f"{getattr(records[0], key)} {fields}" for key in ("run_id", "config_hash")}
    return [replace(record, **identity, **fields) for record in records]


def test_runs_that_differ_in_a_setting_that_no_variant_tells_are_told_apart(tmp_path):
    for seed in (0, 1):
        for images in (3, 30):
            told = [f"num_pruning_samples={images}", f"cache_dir=cache{images}", "+experiment=sample_sensitivity"]
            records = changed(run_of("ocap", (1, 2), seed), num_pruning_samples=images)
            write_run(tmp_path / f"{seed} {images}", records, told)
        write_run(tmp_path / f"random {seed}", run_of("random", (1, 2), seed), ["+experiment=sample_sensitivity"])
    sweep = read_sweep(tmp_path)
    assert sweep.problems == ()
    found = {(record.variant, record.seed, record.num_pruning_samples) for record in sweep.records}
    named = {(f"ocap num_pruning_samples={images}", seed, images) for seed in (0, 1) for images in (3, 30)}
    assert found == named | {("random", seed, 30) for seed in (0, 1)}


def test_a_variant_whose_every_run_has_another_setting_says_so(tmp_path):
    """Nothing collides, and still it is no fair comparison: one is retrained ten times as long."""
    for seed in (0, 1):
        write_run(tmp_path / f"long {seed}", run_of("ocap", (1, 2), seed), ["training.retrain_epochs=30"])
        write_run(tmp_path / f"short {seed}", run_of("lrp", (1, 2), seed), ["device=cpu"])
    sweep = read_sweep(tmp_path)
    assert {record.variant for record in sweep.records} == {"ocap training.retrain_epochs=30", "lrp device=cpu"}


def test_one_file_that_cannot_be_read_costs_its_run_alone(tmp_path):
    for number in (0, 1):
        write_run(tmp_path / str(number), run_of("ocap", (1, 2), number))
    (tmp_path / "2" / "records.jsonl").mkdir(parents=True)
    lines = (tmp_path / "0" / "records.jsonl").read_text()
    first = lines.splitlines()[0]
    huge = first.replace('"accuracy": ', '"accuracy": 1' + 400 * "0" + ', "was": ')
    (tmp_path / "0" / "records.jsonl").write_text(huge + "\n" + 100_000 * "[" + "\n" + lines)
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["0", "1"]
    assert len(sweep.records) == 2 * len(lines.splitlines())
    assert sum("not read" in problem for problem in sweep.problems) == 2 and any("2: " in p for p in sweep.problems)


def test_of_runs_that_nothing_tells_apart_the_one_that_got_furthest_counts(tmp_path):
    one = run_of("ocap", (1, 2), 0)
    write_run(tmp_path / "0", one)
    write_run(tmp_path / "1", changed(one, subset="similar")[:5])
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["0"] and sweep.problems[0].startswith("1: ocap on the same classes")


def test_runs_that_nothing_tells_apart_are_not_averaged_but_named(tmp_path):
    one = run_of("ocap", (1, 2), 0)
    write_run(tmp_path / "0", one, ["subset.seed=0"])
    write_run(tmp_path / "1", changed(one, subset="similar"), ["subset.seed=4"])
    sweep = read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["1"]
    assert sweep.problems == (
        "0: ocap on the same classes and seed as 1, and nothing that its command line says tells them apart, left out",
    )
    assert {record.variant for record in sweep.records} == {"ocap"}


def without(records, **fields):
    """The records but those that have these values."""
    return [record for record in records if any(getattr(record, key) != value for key, value in fields.items())]


@pytest.mark.parametrize(
    ("lacking", "results"),
    [({"stage": "retrained"}, 2), ({"target": 0.6}, 2), ({"target": 0.6, "stage": "retrained"}, 1)],
)
def test_a_stage_or_target_that_no_variant_of_a_block_has_is_missed(lacking, results, tmp_path):
    for seed in (0, 1, 2):
        for variant in ("ocap", "random"):
            records = run_of(variant, (1, 2), seed)
            write_run(tmp_path / f"{seed} {variant}", without(records, **lacking) if seed else records)
    assert read_sweep(tmp_path).problems == (
        f"every variant on digits, 2 random classes, resnet18: lacks {2 * results} of 12 results that other seeds or "
        "classes have (seed 1, classes 1, 2 and 1 more)",
    )


def test_a_block_where_nothing_is_pruned_yet_is_missed(tmp_path):
    write_run(tmp_path / "0", run_of("ocap", (1, 2), 0))
    write_run(tmp_path / "1", run_of("ocap", (1, 3), 0)[:2])
    (problem,) = read_sweep(tmp_path).problems
    assert "every variant on digits, 2 random classes, resnet18: lacks 4 of 8 results" in problem
    assert "(seed 0, classes 1, 3)" in problem


def test_other_classes_and_models_have_other_targets(tmp_path):
    """No gap: what is asked of three classes need not be asked of two, nor of another network."""
    write_run(tmp_path / "0", run_of("ocap", (1, 2), 0))
    write_run(tmp_path / "1", run_of("ocap", (1, 2, 3), 0, targets=(0.3,)))
    write_run(tmp_path / "2", run_of("ocap", (1, 2), 0, targets=(0.4,), model="vgg16"))
    assert read_sweep(tmp_path).problems == ()


def from_other(root, field, name):
    """A sweep whose run `name` differs from all others in what it started from."""
    write_sweep(root, subsets=1, seeds=2)
    for path in root.glob("*/records.jsonl"):
        digest = ("b" if path.parent.name == name else "a") * 64
        records = [replace(record, **{field: digest}) for record in read_records(path)]
        path.write_text("".join(record.to_json() + "\n" for record in records))


@pytest.mark.parametrize(("field", "what"), [("dense_weights", "dense networks"), ("images", "sets of images")])
def test_runs_of_one_seed_that_started_from_other_networks_or_images_are_told(field, what, tmp_path):
    from_other(tmp_path, field, "1")
    (problem,) = [text for text in read_sweep(tmp_path).problems if what in text]
    told = (
        f"digits, 3 random classes, resnet18, seed 0: 2 {what} in its runs (aaaaaaaa in 2, as 0, bbbbbbbb in 1, as 1)"
    )
    assert problem.startswith(told) and problem.endswith("what is compared across them is no pair")


def test_other_images_are_the_one_reason_told(tmp_path):
    from_other(tmp_path, "images", "1")
    shutil.move(tmp_path / "0", tmp_path / "kept")
    for path in tmp_path.glob("*/records.jsonl"):
        records = [replace(record, dense_weights=record.images) for record in read_records(path)]
        path.write_text("".join(record.to_json() + "\n" for record in records))
    assert sum("sets of images" in text for text in read_sweep(tmp_path).problems) == 1
    assert not any("dense networks" in text for text in read_sweep(tmp_path).problems)


def test_other_tasks_may_have_other_networks(tmp_path):
    for number, classes in enumerate([(1, 2), (1, 2, 3)]):
        records = [replace(record, dense_weights=f"{number}" * 64) for record in run_of("ocap", classes, 0)]
        write_run(tmp_path / str(number), records, [f"training.epochs={number + 1}"])
    assert read_sweep(tmp_path).problems == ()


@pytest.mark.parametrize("other", [False, True])
def test_images_of_another_place_are_another_setting_only_where_they_are_others(other, tmp_path):
    for number, variant in enumerate(["ocap", "random"]):
        digest = str(number * other) * 64
        records = [replace(record, images=digest) for record in run_of(variant, (1, 2), 0)]
        write_run(tmp_path / str(number), records, [f"dataset.root=/data {number}"])
    sweep = read_sweep(tmp_path)
    names = {"ocap dataset.root=/data 0", "random dataset.root=/data 1"} if other else {"ocap", "random"}
    assert {record.variant for record in sweep.records} == names
    assert not sweep.problems  # what a name says needs no other word


@pytest.mark.parametrize("known", [True, False])
def test_images_that_another_setting_or_seed_changes_say_nothing_of_their_place(known, tmp_path):
    """Each seed was run on another machine, with the same files elsewhere; one record is of an earlier version."""
    for seed in (0, 1):
        for size in (32, 64):
            for variant in ("ocap", "random"):
                told = [f"dataset.root=/s{seed}", f"dataset.image_size={size}"]
                digest = f"{seed}{size}" if known or variant == "ocap" else None
                records = changed(run_of(variant, (1, 2), seed), images=digest)
                records = [replace(record, config_hash=f"{size}{seed}{variant}") for record in records]
                write_run(tmp_path / f"{variant} {seed} {size}", records, told)
    sweep = read_sweep(tmp_path)
    names = {f"{variant} dataset.image_size={size}" for variant in ("ocap", "random") for size in (32, 64)}
    assert {record.variant for record in sweep.records} == names and not sweep.problems


@pytest.mark.parametrize("folder", ["/my nets/seed={}", "/my_nets/seed={}", "/a device=cpu/{}"])
def test_controls_of_other_networks_are_never_one(folder, tmp_path):
    """Whatever the path says: spaces and key=value in it are no settings."""
    for variant in ("ocap", "random"):
        for network in (1, 2):
            records = changed(run_of(variant, (1, 2), 0), dense_weights=f"{network}" * 64)
            told = ["training.train=false", f"model.pretrained_weights_path={folder.format(network)}/w.pt"]
            write_run(tmp_path / f"{variant} {network}", records, told)
    sweep = read_sweep(tmp_path)
    found = {shaping(record, "dense") for record in sweep.records}
    assert found == {(f"model.pretrained_weights_path={folder.format(network)}/w.pt",) for network in (1, 2)}
    assert not sweep.problems


def test_of_runs_in_one_file_the_one_measured_to_the_end_counts_then_the_one_that_got_furthest(tmp_path):
    one = run_of("ocap", (1, 2), 0)
    later = [replace(record, run_id="2027") for record in one[:3]]
    write_run(tmp_path / "0", [*one, *later])
    (run,) = read_sweep(tmp_path).runs
    assert {record.run_id for record in run.records} == {one[0].run_id}
    status = {"state": "running", "identity": "0", "run_id": "2027", "records": 0}
    (tmp_path / "0" / "status.json").write_text(json.dumps(status))
    (run,) = read_sweep(tmp_path).runs
    assert {record.run_id for record in run.records} == {one[0].run_id}
    status["records"] = 3
    (tmp_path / "0" / "status.json").write_text(json.dumps(status))
    (run,) = read_sweep(tmp_path).runs
    assert {record.run_id for record in run.records} == {"2027"}
    of_another_configuration = [replace(record, config_hash="f" * 64, run_id="2028") for record in one[:3]]
    write_run(tmp_path / "1", [*one, *of_another_configuration])
    assert shown_run(read_records(tmp_path / "1" / "records.jsonl"), tmp_path / "1") == of_another_configuration


def test_a_run_that_is_done_and_lost_its_records_is_named(tmp_path):
    write_sweep(tmp_path, subsets=1, seeds=1)
    for name, written in (("0", 7), ("1", 7), ("2", 9)):
        status = {"state": "done", "identity": name, "records": written}
        (tmp_path / name / "status.json").write_text(json.dumps(status))
    (tmp_path / "1" / "records.jsonl").unlink()
    problems = read_sweep(tmp_path).problems
    assert "1: done, but its records are gone; the same command measures them again" in problems
    assert "2: done, but only 7 of its 9 records are there; the same command measures them again" in problems
    assert not any(problem.startswith("0:") for problem in problems)
