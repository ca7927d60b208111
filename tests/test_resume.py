"""A run that an earlier process did not finish: what was measured stays, the rest is measured as it would have been."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest

import experiment
import kept
import retraining
import run_status
from errors import BenchmarkError
from kept import load_checked
from locks import locked
from records import read_records
from run_status import LOCK, RunStatus, Status, is_whole, read_status
from scores import SCORES
from sweep_plan import progress
from tests.test_main import job

MEASURED = {"environment_hash", "run_id", "times", "removal_seconds", "removal_peak_bytes", "retraining_seconds",
            "retraining_peak_bytes", "scoring_peak_bytes", "scoring_seconds", "training_seconds", "warnings",
            "forward_peak_bytes", "scratch_seconds", "config_hash"}  # fmt: skip
GONE = 2**22 + 1  # no process has this number
MATCHED = ("pruning.match=macs", "pruning.target=[0.3,0.5]", "training.train_pruned_from_scratch=true")


def figures(records):
    """What two runs of one configuration have in common."""
    return [{name: value for name, value in asdict(record).items() if name not in MEASURED} for record in records]


@pytest.fixture(scope="module")
def runs(shared):
    """Whole runs, made when they are first asked for, and what their command lines say."""
    made = {}

    def made_once(name):
        overrides = MATCHED if name == "targets" else ()
        if name not in made:
            job(shared, name, *overrides)
            made[name] = shared / name, overrides
        return made[name]

    return made_once


@pytest.fixture
def whole(runs):
    return runs("ratios")


def interrupted(whole: Path, folder: Path, lines: int, **changes) -> bytes:
    """A copy of a whole run as a process leaves it that was killed after so many records; returns those."""
    shutil.copytree(whole, folder)
    kept = b"".join((whole / "records.jsonl").read_bytes().splitlines(keepends=True)[:lines])
    (folder / "records.jsonl").write_bytes(kept)
    status = replace(read_status(whole), **({"state": "running", "pid": GONE} | changes))
    (folder / "status.json").write_text(json.dumps(asdict(status)))
    return kept


QUICK = {("ratios", 2)}
PLACES = [("ratios", lines) for lines in range(7)] + [("targets", lines) for lines in range(10)]


@pytest.mark.parametrize(
    "name, lines", [pytest.param(*place, marks=[] if place in QUICK else pytest.mark.slow) for place in PLACES]
)
def test_it_goes_on_after_any_record(name, lines, runs, tmp_path, monkeypatch, shared):
    root, overrides = runs(name)
    folder = tmp_path / "again"
    kept = interrupted(root, folder, lines)
    measured = []
    true_measure = experiment.measure_inference_time_and_accuracy
    monkeypatch.setattr(
        experiment,
        "measure_inference_time_and_accuracy",
        lambda *args, **more: measured.append(args) or true_measure(*args, **more),
    )
    again = job(shared, str(folder), *overrides)
    assert (folder / "records.jsonl").read_bytes().startswith(kept)
    first = read_records(root / "records.jsonl")
    assert figures(again) == figures(first) == figures(read_records(folder / "records.jsonl"))
    assert len({record.run_id for record in again}) == 1 and again[0].run_id == first[0].run_id
    assert len(measured) == len(first) - lines
    status = read_status(folder)
    assert status.state == "done" and status.attempts == 2
    for name in ("latency.npz", "confusion.npz"):
        with numpy.load(folder / name) as mine, numpy.load(root / name) as theirs:
            assert mine.files == theirs.files
            assert name == "latency.npz" or all((mine[key] == theirs[key]).all() for key in mine.files)
    assert json.loads((folder / "selections.json").read_text()) == json.loads((root / "selections.json").read_text())
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_a_line_cut_short_is_measured_again(whole, tmp_path, shared):
    root, overrides = whole
    folder = tmp_path / "again"
    kept = interrupted(root, folder, 3)
    (folder / "records.jsonl").write_bytes(kept[:-40])
    job(shared, str(folder), *overrides)
    assert figures(read_records(folder / "records.jsonl")) == figures(read_records(root / "records.jsonl"))


def test_records_say_what_images_they_are_of(whole):
    root, _ = whole
    around = json.loads((root / "environment.json").read_text())
    assert {record.images for record in read_records(root / "records.jsonl")} == {around["data"]["fingerprint"]}


def test_what_cannot_be_read_is_not_whole_and_locks_nobody_out(whole, tmp_path):
    root, _ = whole
    status = read_status(root)
    (tmp_path / "records.jsonl").mkdir()
    assert is_whole(root, status) and not is_whole(tmp_path, status)
    (tmp_path / "status.json").mkdir()  # so that the run cannot say that it begins
    for _ in range(2):
        with pytest.raises(BenchmarkError), RunStatus(tmp_path, "x", resume=True, wait=False):
            pass
    with locked(tmp_path / LOCK, "", wait=False) as free:
        assert free


def test_nothing_is_done_where_it_is_done(whole, shared, monkeypatch):
    root, overrides = whole
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr("main._run", None)
    assert job(shared, root.name, *overrides) == read_records(root / "records.jsonl")
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lines", [0, 4])
def test_what_is_done_but_lost_its_records_goes_on(lines, whole, shared, tmp_path, monkeypatch, caplog):
    root, overrides = whole
    folder = tmp_path / "again"
    kept = interrupted(root, folder, lines, state="done")
    if not lines:
        (folder / "records.jsonl").unlink()
    assert progress(folder).startswith("1 runs: 1 stopped") and progress(root).startswith("1 runs: 1 done")
    monkeypatch.setattr("main._run", lambda cfg, settings, run_dir, status: status.run_id)  # what it does is known
    assert job(shared, str(folder), *overrides) == read_status(root).run_id
    assert "not all of its records are there" in caplog.text
    assert read_status(folder).records == 0  # until all are written again
    assert not lines or (folder / "records.jsonl").read_bytes() == kept


@pytest.mark.slow
def test_without_resume_it_is_done_anew(whole, shared, tmp_path):
    root, overrides = whole
    folder = tmp_path / "again"
    shutil.copytree(root, folder)
    again = job(shared, str(folder), *overrides, "resume=false")
    everything = read_records(folder / "records.jsonl")
    assert len(everything) == 2 * len(again) and everything[-1].run_id == again[-1].run_id != everything[0].run_id


def test_records_of_another_dense_network_do_not_count(whole, shared, tmp_path, caplog):
    root, overrides = whole
    folder = tmp_path / "again"
    interrupted(root, folder, 3, origin="0" * 64)
    again = job(shared, str(folder), *overrides)
    assert "not those of this run's first records" in caplog.text
    assert figures(again) == figures(read_records(root / "records.jsonl"))
    assert again[0].run_id != read_records(root / "records.jsonl")[0].run_id


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_another_run(whole, shared, tmp_path):
    root, overrides = whole
    folder = tmp_path / "again"
    shutil.copytree(root, folder)
    again = job(shared, str(folder), *overrides, "training.retrain_after_pruning=false")
    assert len({record.run_id for record in read_records(folder / "records.jsonl")}) == 2
    assert {record.stage for record in again} <= {"dense", "pruned", "scratch"}


def test_a_failure_is_told_and_tried_again(shared, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("two\nlines")

    with monkeypatch.context() as patch:
        patch.setattr(retraining, "fit", fails)
        with pytest.raises(RuntimeError):
            job(shared, str(tmp_path / "run"))
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.attempts) == ("failed", "RuntimeError: two lines", 1)
    again = job(shared, str(tmp_path / "run"))
    assert read_status(tmp_path / "run").state == "done" and [r.stage for r in again[:2]] == ["dense", "pruned"]
    assert len(read_records(tmp_path / "run" / "records.jsonl")) == len(again)


@pytest.mark.slow
def test_scores_are_shared_where_only_what_comes_after_differs(shared, tmp_path, caplog):
    caplog.set_level("INFO")
    quick = ("training.retrain_after_pruning=false", "num_pruning_samples=17")
    job(shared, str(tmp_path / "one"), "pruning.pruning_ratio=[0.4]", *quick)
    assert "Scores reused" not in caplog.text
    for change in ("pruning.pruner=structure", "pruning.match=macs"):
        caplog.clear()
        more = ["pruning.target=[0.4]"] if "match" in change else []
        job(shared, str(tmp_path / change), change, *more, *quick)
        assert "Scores reused, nothing is scored" in caplog.text
    one, other = (read_records(tmp_path / name / "records.jsonl")[-1] for name in ("one", "pruning.match=macs"))
    assert one.scoring_seconds == other.scoring_seconds and one.scoring_images == other.scoring_images
    caplog.clear()
    job(shared, str(tmp_path / "other"), "pruning.pruning_ratio=[0.4]", *quick, "num_pruning_samples=18")
    assert "Scores reused" not in caplog.text


@pytest.mark.slow
def test_damaged_scores_are_made_again(whole, shared, tmp_path, caplog):
    cache, quick = tmp_path / "cache", ("pruning.pruning_ratio=[0.4]", "training.retrain_after_pruning=false")
    shutil.copytree(shared / "cache", cache, ignore=shutil.ignore_patterns("*.scores"))
    first = job(shared, str(tmp_path / "one"), f"cache_dir={cache}", *quick)
    (path,) = cache.glob("*.scores")
    content = path.read_bytes()
    key = load_checked(SCORES, path)["key"]
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    assert kept._read(SCORES, path, key) is not None
    for damaged in (b"", content[:middle], b"scores of another age\n", content + b"x", flipped):
        path.write_bytes(damaged)
        caplog.clear()
        assert kept._read(SCORES, path, key) is None and f"Scores not used and made again: {path}" in caplog.text
    again = job(shared, str(tmp_path / "two"), f"cache_dir={cache}", *quick)
    assert figures(again) == figures(first)
    assert kept._read(SCORES, path, key) is not None and kept._read(SCORES, path, "another key") is None


def test_a_status_that_cannot_be_read_is_none(tmp_path):
    good = {"state": "running", "identity": "x", "pid": 12, "seconds": 3, "heartbeat": None}
    (tmp_path / "status.json").write_text(json.dumps(good))
    assert read_status(tmp_path) == Status("running", "x", pid=12, seconds=3)
    damages = {
        "state": [3, "weird", None], "identity": [None, 3], "pid": ["12", 10**30, 0, -1, True, 1.5],
        "attempts": [None, "1", -1], "seconds": [None, "long", 1e300, float("nan")], "heartbeat": ["now", [], {}],
        "reason": [3, []], "host": [3], "records": [None, "7"], "run_id": [7],
    }  # fmt: skip
    bad = [json.dumps(good | {name: value}) for name, values in damages.items() for value in values]
    for content in ("", "[]", "{}", '{"state": 3, "identity": "x"}', '{"state": "done"', "null", 10**5 * "[", *bad):
        (tmp_path / "status.json").write_text(content)
        assert read_status(tmp_path) is None, content
    assert read_status(tmp_path / "nowhere") is None


def test_who_is_still_there():
    mine = Status("running", "x", host=run_status.HOST, pid=1, heartbeat=0.0)
    assert not mine.stopped and replace(mine, pid=GONE).stopped
    assert replace(mine, host="elsewhere").stopped and not replace(mine, host="elsewhere", heartbeat=2e10).stopped
    assert not replace(mine, state="done", pid=GONE).stopped
