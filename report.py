"""Records become a table, a CSV file and plots; runs alone on the records of an old run, without torch.

python report.py RUN_DIR
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from disk import write_whole
from errors import BenchmarkError
from records import Record, read_records, write_csv
from tables import table

log = logging.getLogger(__name__)

RECORDS = "records.jsonl"


def write_report(run_dir: str | Path) -> list[Path]:
    """Write results.csv and plots/*.png and *.pdf from the records in `run_dir`; returns what was written.

    Raises BenchmarkError for a folder without records. Plots show the last run of the file; a plot for which there are
    no records yet is left out with a warning.
    """
    run_dir = Path(run_dir)
    return _write(run_dir, _records_of(run_dir))


def _write(run_dir: Path, records: list[Record]) -> list[Path]:
    # Here, because matplotlib takes a second that a table need not wait for.
    from plot_style import render
    from plots import PLOTS

    write_csv(run_dir / "results.csv", records)
    written = [run_dir / "results.csv"]
    last = [record for record in records if record.run_id == records[-1].run_id]
    if older := len({record.run_id for record in records}) - 1:
        log.warning("%s: %d earlier runs are in results.csv, but not in the plots", run_dir / RECORDS, older)
    for name, draw in PLOTS.items():
        figure = draw(last)
        if figure is None:
            log.warning("plot %s: left out, no pruned model was recorded", name)
            continue
        for suffix, content in render(figure).items():
            path = run_dir / "plots" / f"{name}.{suffix}"
            write_whole(path, content)
            written.append(path)
    return written


def _records_of(run_dir: Path) -> list[Record]:
    path = run_dir / RECORDS
    if not path.is_file():
        inside = sorted(str(found.parent) for found in run_dir.glob(f"**/{RECORDS}"))[:3] if run_dir.is_dir() else []
        hint = f"did you mean {' or '.join(inside)}" if inside else "give the directory of a run, as outputs/DATE/TIME"
        raise BenchmarkError(f"{run_dir}: no {RECORDS} in it; {hint}")
    records = read_records(path)
    if not records:
        raise BenchmarkError(f"{path}: not one whole record in it; the run ended before its first measurement")
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help=f"directory of a run, with its {RECORDS}")
    run_dir = parser.parse_args(arguments).run_dir
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        records = _records_of(run_dir)
        print(table(records))
        written = _write(run_dir, records)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + "\n".join(f"wrote {path}" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
