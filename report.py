"""Records become a table, a CSV file and plots; runs alone on the records of an old run, without torch.

python report.py RUN_DIR
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from disk import write_whole
from errors import BenchmarkError
from records import Record, read_records, write_csv
from runs import RECORDS, Sweep, read_sweep, shown_run
from tables import table

log = logging.getLogger(__name__)


def write_report(run_dir: str | Path) -> list[Path]:
    """Write results.csv, plots/*.png and *.pdf and report.html from the records in `run_dir`; returns what was written.

    Raises BenchmarkError for a folder without records. Plots show one run of the file, see `shown_run`; a plot for
    which there are no records yet is left out with a warning.
    """
    run_dir = Path(run_dir)
    return _write(run_dir, _records_of(run_dir))


def _write(run_dir: Path, records: list[Record]) -> list[Path]:
    # Here, because matplotlib takes a second that a table need not wait for.
    from plot_style import render
    from plots import PLOTS

    write_csv(run_dir / "results.csv", records)
    written = [run_dir / "results.csv"]
    shown = shown_run(records, run_dir)
    if others := len({record.run_id for record in records}) - 1:
        log.warning("%s: %d other runs are in results.csv, but not in the plots", run_dir / RECORDS, others)
    pictures = {}
    for name, draw in PLOTS.items():
        figure = draw(shown)
        if figure is None:
            log.warning("plot %s: left out, no pruned model was recorded", name)
            continue
        written += _keep_plot(run_dir, name, render(figure), pictures)
    return [*written, _write_page(run_dir, read_sweep(run_dir), pictures)]


def _keep_plot(folder: Path, name: str, files: dict[str, bytes], pictures: dict[str, bytes]) -> list[Path]:
    pictures[name] = files["png"]
    for suffix, content in files.items():
        write_whole(folder / "plots" / f"{name}.{suffix}", content)
    return [folder / "plots" / f"{name}.{suffix}" for suffix in files]


def _write_page(folder: Path, sweep: Sweep, pictures: dict[str, bytes]) -> Path:
    from page import page

    first = sweep.records[0]
    what = "Pruning" if len(sweep.runs) > 1 else first.variant
    datasets, models = (sorted({getattr(r, key) for r in sweep.records}) for key in ("dataset", "model"))
    title = f"{what}: {', '.join(models)} on {', '.join(datasets)}"
    write_whole(folder / "report.html", page(sweep, pictures, title))
    return folder / "report.html"


def write_sweep_report(root: str | Path) -> list[Path]:
    """Compare the runs below `root`: results.csv, comparison.md, plots/ and report.html; returns what was written.

    Works on a sweep that is half done, and says what is missing. Raises BenchmarkError for a folder without records.
    """
    return _write_sweep(read_sweep(root))


def _write_sweep(sweep: Sweep) -> list[Path]:
    from comparison_table import markdown, tidy_csv
    from plot_style import render
    from sweep_plots import SWEEP_PLOTS

    root = sweep.root
    write_whole(root / "results.csv", tidy_csv(sweep))
    write_whole(root / "comparison.md", markdown(sweep))
    written, pictures = [root / "results.csv", root / "comparison.md"], {}
    for name, draw in SWEEP_PLOTS.items():
        figure = draw(sweep)
        if figure is not None:
            written += _keep_plot(root, name, render(figure), pictures)
    return [*written, _write_page(root, sweep, pictures)]


def _told(sweep: Sweep) -> list[str]:
    """The comparison in words, and what is missing, for the console."""
    from comparison_table import words

    missing = [f"missing: {problem}" for problem in sweep.problems]
    return [f"{len(sweep.runs)} runs, {len(sweep.records)} records", *words(sweep), *missing]


def _status(run_dir: Path) -> str:
    from sweep_plan import progress

    told = progress(run_dir)
    if told is None:
        raise BenchmarkError(f"{run_dir}: no status.json in or below it; give the folder of a run or of a sweep")
    return told


def _records_of(run_dir: Path) -> list[Record]:
    path = run_dir / RECORDS
    if not path.is_file():
        hint = "give the directory of a run, as outputs/DATE/TIME, or of a sweep, as multirun/NAME"
        raise BenchmarkError(f"{run_dir}: no {RECORDS} in it; {hint}")
    records = read_records(path)
    if not records:
        raise BenchmarkError(f"{path}: not one whole record in it; the run ended before its first measurement")
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help=f"directory of a run, with its {RECORDS}, or of a sweep")
    parser.add_argument("--status", action="store_true", help="tell how far the runs are, and write nothing")
    options = parser.parse_args(arguments)
    run_dir = options.dir
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        if options.status:
            print(_status(run_dir))
            return 0
        if (run_dir / RECORDS).is_file() or not run_dir.is_dir():
            records = _records_of(run_dir)
            written, told = _write(run_dir, records), table(shown_run(records, run_dir))
        else:
            sweep = read_sweep(run_dir)
            written, told = _write_sweep(sweep), "\n".join(_told(sweep))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        print(told + "\n\n" + "\n".join(f"wrote {path}" for path in written), flush=True)
    except BrokenPipeError:  # `| head` has read enough; all is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
