"""What the runs of a sweep share besides the dense network: made once, and the same as if each had made it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy
import pytest

import baselines
import retraining
from accuracy import ClassCounts
from kept import load_checked, save_checked
from tests.test_main import job
from tests.test_resume import figures

RATIO, REUSED = "pruning.pruning_ratio=[0.5]", ("Answers of the dense model reused", "Retrained dense model reused")


@pytest.fixture(scope="module", autouse=True)
def first(shared):
    return job(shared, "first", RATIO, "pruning=random")


def alone(shared, tmp_path, *overrides):
    """The same run with nothing in the cache but the dense network."""
    cache = tmp_path / "alone"
    cache.mkdir()
    for path in (shared / "cache").glob("*.pt"):
        shutil.copy(path, cache)
    return job(shared, str(tmp_path / "run alone"), f"cache_dir={cache}", *overrides)


def test_another_method_reads_and_retrains_nothing_that_was(shared, tmp_path, caplog, monkeypatch, first):
    caplog.set_level("INFO")
    fits, true_fit = [], retraining.fit
    monkeypatch.setattr(retraining, "fit", lambda *args, **more: fits.append(more) or true_fit(*args, **more))
    again = job(shared, str(tmp_path / "run"), RATIO, "pruning=ln_structured")
    assert all(text in caplog.text for text in REUSED)
    assert [more["description"] for more in fits] == ["retraining at ratio 0.5"]
    by_place = {(r.stage, r.ratio): r for r in first}
    for record in again[:3]:  # dense, ratio 0 pruned and retrained
        other = by_place[record.stage, record.ratio]
        assert record.accuracy_per_class == other.accuracy_per_class
        assert record.retraining_seconds == other.retraining_seconds
        assert record.retraining_peak_bytes == other.retraining_peak_bytes
    caplog.clear()
    assert figures(alone(shared, tmp_path, RATIO, "pruning=ln_structured")) == figures(again)
    assert not any(text in caplog.text for text in REUSED)
    with numpy.load(tmp_path / "run/confusion.npz") as mine, numpy.load(tmp_path / "run alone/confusion.npz") as theirs:
        assert mine.files == theirs.files and all((mine[name] == theirs[name]).all() for name in mine.files)


@pytest.mark.parametrize(
    "change, reused",
    [
        # The same classes in another order.
        pytest.param(("selected_classes=[9,3,8]",), REUSED, marks=pytest.mark.slow),
        pytest.param(("selected_classes=[1,2,4]",), REUSED[:1], marks=pytest.mark.slow),
        pytest.param(("training.retrain_epochs=2",), REUSED[:1], marks=pytest.mark.slow),
        pytest.param(("training.lr_retrain=0.02",), REUSED[:1], marks=pytest.mark.slow),
        pytest.param(("training.batch_size_train=32", "training.epochs=1"), (), marks=pytest.mark.slow),
        pytest.param(("replace_last_layer=false",), REUSED[:1], marks=pytest.mark.slow),
        pytest.param(("training.batch_size_test=64",), (), marks=pytest.mark.slow),
        pytest.param(("seed=7",), (), marks=pytest.mark.slow),
        pytest.param(("inference_with_onnx=true",), REUSED[1:], marks=pytest.mark.slow),
    ],
)
def test_only_what_is_the_same_is_shared(shared, tmp_path, caplog, change, reused):
    caplog.set_level("INFO")
    dense = ("pruning.pruning_ratio=[0.0]", "pruning=random")
    found = job(shared, str(tmp_path / "run"), *dense, *change)
    assert [text for text in REUSED if text in caplog.text] == list(reused)
    if reused:
        assert figures(alone(shared, tmp_path, *dense, *change)) == figures(found)


@pytest.mark.slow
def test_damaged_ones_are_made_again(shared, tmp_path, caplog, first):
    cache = shutil.copytree(shared / "cache", tmp_path / "cache")
    paths = [*cache.glob("*.answers"), *cache.glob("*.retrained")]
    assert len(paths) >= 2
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = job(shared, str(tmp_path / "run"), RATIO, "pruning=random", f"cache_dir={cache}")
    assert figures(again) == figures(first)
    assert "Answers of the dense model not used and made again" in caplog.text
    assert "Retrained dense model not used and made again" in caplog.text


def test_answers_come_back_as_they_were(tmp_path):
    kind = baselines.ANSWERS
    for top5 in (None, (2, 3)):
        counts = ClassCounts((1, 2), (3, 4), top5, numpy.array([[1, 2], [2, 2]]))
        save_checked(kind, tmp_path / "answers", kind.pack(counts))
        again = kind.unpack(load_checked(kind, tmp_path / "answers"))
        assert again == counts and (again.confusion == counts.confusion).all()
        with pytest.raises(ValueError):
            kind.unpack(kind.pack(replace(counts, correct=(4, 2))) if top5 else {**kind.pack(counts), "total": [3]})
