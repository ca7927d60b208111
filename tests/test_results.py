"""The committed results: whole, met by the report that stands beside them, and repeatable."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from comparison import met
from comparison_table import markdown
from records import read_records
from runs import read_sweep

CODE = Path(__file__).resolve().parent.parent
SWEEPS = sorted(path.parent for path in (CODE / "results").glob("*/comparison.md"))


def test_there_are_results():
    assert SWEEPS


@pytest.mark.parametrize("root", SWEEPS, ids=lambda path: path.name)
def test_every_record_is_whole_and_the_tables_follow_from_them(root):
    sweep = read_sweep(root)
    assert not [problem for problem in sweep.problems if "lacks" not in problem]
    assert markdown(sweep) == (root / "comparison.md").read_text(encoding="utf-8"), (
        f"python report.py results/{root.name}"
    )
    for run in sweep.runs:
        assert {record.stage for record in run.records} == {"dense", "pruned", "retrained"}
        for record in run.records:
            assert met(record) or any("is not reached" in warning for warning in record.warnings)


@pytest.mark.slow
def test_a_cell_run_again_gives_the_same_accuracies(tmp_path):
    """With as many threads as then: sums are rounded by how they are split over threads."""
    run = read_sweep(SWEEPS[0]).runs[0]
    overrides = list(OmegaConf.load(run.path / ".hydra" / "overrides.yaml"))
    fixed = [f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", "latency.seconds=0.1"]
    code = (
        f"import torch; torch.set_num_threads({run.environment['torch_threads']}); import main; main.launch(main.run)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides, *fixed], cwd=CODE, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = read_records(tmp_path / "run" / "records.jsonl")
    assert [(r.stage, r.ratio, r.accuracy_per_class) for r in again] == [
        (r.stage, r.ratio, r.accuracy_per_class) for r in run.records
    ]
