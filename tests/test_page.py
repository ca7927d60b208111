"""The report of a sweep: its files, its words, its page, and the page in a browser."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import report
from comparison_table import MISSING, markdown, sentence, tidy, words
from disk import HOST
from page import page
from runs import read_sweep
from sweep_plots import SWEEP_PLOTS
from tests.sample_sweeps import LEVELS, records_of, run_of, write_run, write_sweep
from tests.test_comparison import AFTER

GOLDEN = Path(__file__).parent / "golden"
REMAKE = "python -m tests.test_page"
CODE = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRAWN = [
    name for name in SWEEP_PLOTS if name != "selection_stability"
]  # which takes several draws of the scoring images


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def written(root):
    return report.write_sweep_report(root)


def golden(root: Path) -> str:
    return markdown(read_sweep(write_sweep(root)))


def test_the_comparison_is_the_one_that_was_agreed(tmp_path):
    expected = (GOLDEN / "comparison.md").read_text(encoding="utf-8")
    assert golden(tmp_path) == expected, f"if the change is meant: {REMAKE}"


def test_everything_is_written_and_the_same_records_give_the_same_bytes(root, written):
    plots = [root / "plots" / f"{name}.{suffix}" for name in DRAWN for suffix in ("png", "pdf")]
    assert written == [root / "results.csv", root / "comparison.md", *plots, root / "report.html"]
    before = {path: path.read_bytes() for path in written}
    assert all(map(len, before.values()))
    report.write_sweep_report(root)
    assert {path: path.read_bytes() for path in written} == before


def test_the_csv_has_a_row_a_record_that_says_the_same(root, written):
    with (root / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sweep = read_sweep(root)
    assert len(rows) == len(sweep.records) and None not in rows[0]
    for row, record in zip(rows, sweep.records, strict=True):
        assert float(row["accuracy"]) == record.accuracy and int(row["macs"]) == record.macs
        assert json.loads(row["accuracy_per_class"]) == record.accuracy_per_class and row["variant"] == record.variant
        assert row["target"] == ("" if record.target is None else str(record.target))
    columns, cells = tidy(sweep)
    assert {len(row) for row in cells} == {len(columns)}


def test_words_claim_only_what_is_sure(tmp_path):
    said = sentence(records_of(), AFTER)
    assert "ocap keeps most" in said and ", more than any other. Its lead over random: " in said
    said = sentence(records_of(("a", "b"), level=0.9), AFTER)
    assert "; b cannot be told from it" in said or "; a cannot be told from it" in said
    assert "more than any other" not in said and "over random" not in said
    said = sentence(records_of(subsets=1, seeds=1), AFTER)
    assert "1 pair of subset and seed cannot tell who is better" in said and "[" not in said
    assert "no other to compare it with" in sentence(run_of("ocap", (1, 2, 5), 0), AFTER)
    assert "no variant met this target" in sentence(run_of("ocap", (1, 2, 5), 0, unreached=(0.6,)), AFTER)


def test_a_target_that_was_missed_is_said(tmp_path):
    write_sweep(tmp_path, ("ocap", "random"))
    for number, subset in enumerate([(0, 3, 6), (1, 4, 7)]):
        write_run(tmp_path / f"missed {number}", run_of("lrp", subset, 0, unreached=(0.6,)))
    text = markdown(read_sweep(tmp_path))
    assert "lrp missed the target in 2 runs, so that it is not in the table." in text


def test_half_a_sweep_is_shown_and_says_what_is_missing(root, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(root, half)
    for number in ("0", "4", "26"):
        shutil.rmtree(half / number)
    assert report.main([str(half)]) == 0
    assert "missing: ocap on digits, 3 random classes, resnet18: lacks 4 of 36 results" in capsys.readouterr().out
    assert "lacks 4 of 36 results" in (half / "report.html").read_text()


class Outline(HTMLParser):
    """Tags that are open, sources that are asked for, and texts of cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_asks_for_nothing(root, written):
    outline = Outline((root / "report.html").read_text())
    assert outline.open == []
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert len([source for source in outline.sources if source.startswith("data:image")]) == len(DRAWN)
    everything = " ".join(outline.texts)
    assert "python main.py pruning=ocap seed=0" in everything and "a processor, Python 3.11" in everything
    assert all(said in everything for said in words(read_sweep(root)))


def test_names_cannot_become_markup(tmp_path):
    rows = run_of("ocap", (1, 2), 0)
    odd = ('<b>"x"&', "</script><script>alert(1)")
    renamed = [
        replace(
            r, class_names=odd, accuracy_per_class=dict(zip(odd, r.accuracy_per_class.values(), strict=True)),
            images_per_class=dict.fromkeys(odd, 100),
        )
        for r in rows
    ]  # fmt: skip
    write_run(tmp_path, renamed)
    text = page(read_sweep(tmp_path), {}, "<i>title")
    assert "<b>" not in text and "<i>" not in text and text.count("<script>") == 1
    assert all(name in "".join(Outline(text).texts) for name in odd)


def test_a_single_run_has_a_page_as_well(tmp_path):
    write_run(tmp_path, run_of("ocap", (1, 2), 0))
    assert report.write_report(tmp_path)[-1] == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text()
    assert "ocap: resnet18 on digits" in text and "there is no other to compare it with" not in text
    rows = [record for record in read_sweep(tmp_path).records if record.stage == "retrained" and record.target]
    assert len(rows) == 2
    for row in rows:
        told = f"{100 * row.accuracy:.1f} % at {100 * row.target:g} % of MACs removed"
        assert f"{100 * row.accuracy:.1f}</td>" in text and told in text


def test_a_single_run_that_missed_its_target_says_so(tmp_path):
    write_run(tmp_path, run_of("ocap", (1, 2), 0, targets=(0.3, 0.6), unreached=(0.3, 0.6)))
    text = page(read_sweep(tmp_path), {}, "title")
    assert "30 % of MACs removed: target not met, 60 % of MACs removed: target not met." in text
    assert "No pruned network" not in text and "ocap missed the target in 1 run" in text


def test_the_page_of_a_run_that_has_measured_everything_misses_nothing(tmp_path):
    """It is written while the run is still under way."""
    write_run(tmp_path, run_of("ocap", (1, 2), 0))
    status = {"state": "running", "identity": "0", "pid": os.getpid(), "host": HOST}
    for records, missing in ((0, True), (7, False)):
        (tmp_path / "status.json").write_text(json.dumps(status | {"records": records}))
        assert bool(read_sweep(tmp_path).problems) == missing


def test_the_report_of_a_sweep_needs_no_torch(root):
    code = "import sys, report; report.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=CODE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PROBE = """<script>
const probe = {};
const section = document.getElementById("results"), box = section.querySelector("input");
const shown = () => [...section.querySelectorAll("tbody tr")].filter((row) => !row.hidden).length;
probe.rows = shown();
probe.overflow = document.scrollingElement.scrollWidth - window.innerWidth;
probe.width = window.innerWidth;
box.value = "ocap retrained"; box.dispatchEvent(new Event("input"));
probe.searched = shown(); probe.said = section.querySelector("output").textContent;
const choice = section.querySelector("select"); choice.value = "random"; choice.dispatchEvent(new Event("change"));
probe.contradiction = shown();
box.value = ""; box.dispatchEvent(new Event("input"));
probe.chosen = shown();
const sort = [...section.querySelectorAll("th button")].find((button) => button.textContent === "accuracy %");
sort.click(); sort.click();
const column = sort.closest("th").cellIndex;
probe.sorted = [...section.querySelectorAll("tbody tr")].map((row) => parseFloat(row.cells[column].textContent));
probe.order = sort.closest("th").getAttribute("aria-sort");
document.title = "PROBE" + JSON.stringify(probe) + "END";
</script></body>"""


SORTED = """<script>
const section = document.getElementById("results");
const sorted = (title) => {
  const button = [...section.querySelectorAll("th button")].find((button) => button.textContent === title);
  button.click();
  return [...section.querySelectorAll("tbody tr")].map((row) => row.cells[button.closest("th").cellIndex].textContent);
};
const probe = {};
for (const title of ["latency %", "target %", "classes"]) probe[title] = [sorted(title), sorted(title)];
document.title = "PROBE" + JSON.stringify(probe) + "END";
</script></body>"""
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


def probed(text: str, script: str, folder: Path, width: int = 1280) -> dict:
    """What the script tells of the page in a browser window so wide."""
    path = folder / "probed.html"
    path.write_text(text.replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={folder}/profile", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(re.search("PROBE(.*)END</title>", done.stdout).group(1).replace("&amp;", "&"))


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1280, 500])  # a headless window is not made narrower than 500
def test_the_page_in_a_browser(root, written, width, tmp_path):
    probe = probed((root / "report.html").read_text(), PROBE, tmp_path, width)
    total = len(read_sweep(root).records)
    assert probe["rows"] == total and probe["width"] == width and probe["overflow"] <= 0
    assert probe["searched"] == 27 and probe["said"] == f"27 of {total} rows" and probe["contradiction"] == 0
    assert probe["chosen"] == total / len(LEVELS)
    assert probe["sorted"] == sorted(probe["sorted"], reverse=True) and probe["order"] == "descending"


@pytest.mark.slow
@needs_browser
def test_noisy_values_are_sorted_as_numbers_and_missing_ones_come_last(tmp_path):
    rows = run_of("ocap", (1, 2), 0, targets=(0.03, 0.3, 0.85)) + run_of("ocap", (10, 9), 1, targets=())
    for number, row in enumerate(rows):
        shares = [replace(timing, noisy=number % 2 == 0, ratio_low=0.01) for timing in row.times]
        rows[number] = replace(row, times=() if number == 4 else tuple(shares))
    for seed in (0, 1):
        write_run(tmp_path / str(seed), [row for row in rows if row.seed == seed])
    probe = probed(page(read_sweep(tmp_path), {}, "sorted"), SORTED, tmp_path)
    for title, missing in (("latency %", 1), ("target %", 6)):
        for cells, down in zip(probe[title], (False, True), strict=True):
            numbers = [float(cell.removeprefix("~")) for cell in cells[: len(cells) - missing]]
            assert numbers == sorted(numbers, reverse=down) and len(set(numbers)) > 2
            assert set(cells[len(cells) - missing :]) == {MISSING}
    assert any(cell.startswith("~") for cell in probe["latency %"][0])
    assert probe["classes"][0] == 9 * ["class 1, class 2"] + 3 * ["class 10, class 9"] == probe["classes"][1][::-1]


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (GOLDEN / "comparison.md").write_text(golden(Path(folder)), encoding="utf-8")
