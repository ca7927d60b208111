"""What is whole is read, what is not is named."""

import shutil

import pytest

from errors import BenchmarkError
from runs import read_sweep
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
        (twice_in_a_file, 6, 42, "0: records.jsonl holds 1 earlier runs, only the last is shown"),
        (twice_in_folders, 6, 42, "0: same configuration as 9, left out"),
        (empty, 5, 35, "0: has no record yet; it failed, or is under way"),
        (failed, 5, 35, "0: has no record yet; it failed, or is under way"),
        (gone, 5, 35, "ocap on digits, resnet18: lacks 4 of 8 results that others have (seed 0, classes 0, 3, 6)"),
        (no_selections, 6, 42, "0: has no selections.json"),
        (damaged_environment, 6, 42, "0: environment.json is damaged and was not read"),
    ],
)
def test_what_is_whole_is_read_and_the_rest_is_named(damage, runs, records, problem, tmp_path):
    write_sweep(tmp_path, subsets=2, seeds=1)
    damage(tmp_path)
    sweep = read_sweep(tmp_path)
    assert (len(sweep.runs), len(sweep.records)) == (runs, records) and problem in sweep.problems


def test_a_folder_without_a_record_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(BenchmarkError, match="not one whole record in or below it"):
        read_sweep(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "records.jsonl").write_text('{"schema": 4, "run')
    with pytest.raises(BenchmarkError, match="0: records.jsonl, line 1: not read: cut short"):
        read_sweep(tmp_path)
