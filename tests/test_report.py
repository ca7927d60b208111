import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import plot_labels
import plot_style
import plots
import report
from errors import BenchmarkError
from records import append_record, read_records, write_csv
from tables import describe_classes, scaled, table
from tests.sample_records import accuracies, record, run_records, timing

ROOT = Path(__file__).resolve().parent.parent

# Regenerate: python -c "from tests.test_report import *; print(table(golden_records()))"
GOLDEN = """\
ocap | resnet18 | digits | 2 classes: eight, three | seed 42

                   ratio    ratio  accuracy       95 %    worst    MACs     of  params     of     size   latency   time
stage              asked  reached         %   interval  class %          dense          dense           of dense      s
-----------------------------------------------------------------------------------------------------------------------
dense, all logits      -        -     84.00  71.5-91.7    70.00  37.5 M  1.000  11.2 M  1.000  44.8 MB     1.000  83.25
dense, new head        -        -     84.00  71.5-91.7    70.00  37.5 M  1.000  11.2 M  1.000  44.8 MB     1.000      -
pruned              0.25    0.250     84.00  71.5-91.7    70.00  31.9 M  0.850  9.50 M  0.850  38.1 MB     0.850   0.31
retrained           0.25    0.250     84.00  71.5-91.7    70.00  31.9 M  0.850  9.50 M  0.850  38.1 MB     0.850    123
pruned               0.5    0.500     84.00  71.5-91.7    70.00       -      -  7.82 M  0.700  31.4 MB    ~0.700   0.31

accuracy: selected classes' test images; interval: Wilson
latency: PyTorch, batch of 128, see below
time: training (dense, when it was trained), removal (pruned), retraining (retrained)
scoring: 0.42 s on 30 images, once for all ratios
dense model on the test images of all classes: 98.61 %

                   ratio                    PyTorch                     PyTorch                ONNX Runtime     memory
stage              asked                 batch of 1                batch of 128                batch of 128  of a pass
----------------------------------------------------------------------------------------------------------------------
dense, all logits      -  1.60  1.000 (0.960-1.020)  12.50  1.000 (0.960-1.020)                           -    14.0 MB
dense, new head        -  1.60  1.000 (0.960-1.020)  12.50  1.000 (0.960-1.020)                           -    14.0 MB
pruned              0.25  1.43  0.895 (0.859-0.913)  10.62  0.850 (0.816-0.867)                           -    11.9 MB
retrained           0.25  1.43  0.895 (0.859-0.913)  10.62  0.850 (0.816-0.867)                           -    11.9 MB
pruned               0.5                          -  8.75  ~0.700 (0.672-0.714)  12.00  1.500 (1.440-1.530)          -

latency: median ms of a pass; share of the dense model's, timed in turn, and its interval (nominally 99 %)
~: the times spread too far, or are too few, to say anything
threads: 2; memory: beyond weights and images, batch of 128
ONNX Runtime: accuracy off by up to 2.00 points in 1 of 5 rows, outputs within 2e-06 of PyTorch's, files of 31.4 MB
warning: 2 layers lose fewer filters than asked for: the images do not agree on them (pruned 0.25, 0.5)
warning: MACs leave out aten::einsum x2 (pruned 0.5)
"""


def golden_records():
    union = "2 layers lose fewer filters than asked for: the images do not agree on them"
    onnx = {"onnx_exporter": "legacy", "onnx_provider": "CPUExecutionProvider", "onnx_difference": 2e-6}
    onnx |= {"onnx_size_bytes": 31_400_000, "onnx_accuracy": 41 / 50, "forward_peak_bytes": None}
    onnx["times"] = [timing(128, noisy=True), timing(128, 8.0, 1.5, engine="onnxruntime")]
    return [
        record("dense", head="all", accuracy_all_classes=0.98611, training_seconds=83.25),
        record("dense"),
        record("pruned", 0.25, warnings=[union]),
        record("retrained", 0.25, retraining_seconds=123.4),
        record("pruned", 0.5, warnings=[union, "MACs leave out aten::einsum x2"], macs=None, macs_ratio=None, **onnx),
    ]


def figure_texts(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))} - {""}


# The table


def test_table_is_as_it_was_agreed():
    assert table(golden_records()) + "\n" == GOLDEN


def test_table_is_aligned_and_fits_a_console():
    lines = table(run_records(ratios=[round(0.1 * i, 1) for i in range(10)], classes=40)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("---"))
    rows = lines[start + 1 : lines.index("", start)]
    assert len(rows) == 22
    assert max(map(len, lines)) <= 120
    assert {len(row) for row in rows} == {len(lines[start])}
    assert [len({row[column] for row in rows}) for column in range(len(rows[0]))].count(1) >= 24  # gaps line up


def test_every_warning_is_listed_once_with_its_rows():
    rows = [record("pruned", 0.25, warnings=["odd"]), record("retrained", 0.25, warnings=["odd", "slow"])]
    rows += [record("pruned", 0.5, warnings=["odd"]), record("dense", warnings=["slow"])]
    warnings = [line for line in table(rows).splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: odd (pruned 0.25, 0.5; retrained 0.25)",
        "warning: slow (retrained 0.25; dense, new head)",
    ]


def test_each_run_has_a_block_of_its_own():
    text = table([record(run_id="a", method="ocap"), record(run_id="b", method="random")])
    assert [line.split(" | ")[0] for line in text.splitlines() if " | " in line] == ["ocap", "random"]


@pytest.mark.parametrize(
    "number, expected",
    [
        (None, "-"), (0, "0 "), (999, "999 "), (1000, "1.00 k"), (37_523_456, "37.5 M"), (1_814_073_344, "1.81 G"),
        (15_470_264_320, "15.5 G"),
    ],
)  # fmt: skip
def test_numbers_are_scaled_with_their_prefix(number, expected):
    assert scaled(number) == expected


@given(st.integers(1, 10**13))
def test_scaling_loses_less_than_half_a_percent(number):
    value, _, prefix = scaled(number).partition(" ")
    assert float(value) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[prefix] == pytest.approx(number, rel=0.0051)


def test_long_lists_of_classes_are_cut_and_counted():
    assert describe_classes(["bag"]) == "1 class: bag"
    assert describe_classes(["bag", "coat"]) == "2 classes: bag, coat"
    assert describe_classes([f"c{i}" for i in range(40)], room=10) == "40 classes: c0, c1, c2 and 37 more"
    assert describe_classes(["a very long name indeed", "b"], room=5) == "2 classes: a very long name indeed and 1 more"


# The report of a run


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    for row in run_records(ratios=[0.0, 0.25, 0.5, 0.75, 0.9], classes=2, layers=5):
        append_record(run_dir / report.RECORDS, row)
    return run_dir, report.write_report(run_dir)


def test_report_writes_the_csv_and_every_plot_in_both_formats(reported, tmp_path):
    run_dir, written = reported
    names = [f"plots/{name}.{suffix}" for name in plots.PLOTS for suffix in ("png", "pdf")]
    assert [str(path.relative_to(run_dir)) for path in written] == ["results.csv", *names, "report.html"]
    write_csv(tmp_path / "again.csv", read_records(run_dir / report.RECORDS))
    assert (run_dir / "results.csv").read_text() == (tmp_path / "again.csv").read_text()
    left = {path.name for path in run_dir.rglob("*") if path.is_file()}
    assert left == {"records.jsonl", "results.csv", "report.html", *(Path(name).name for name in names)}


def test_plots_are_pictures_with_something_on_them(reported):
    for path in reported[1]:
        if path.suffix == ".png":
            image = Image.open(path).convert("RGB")
            assert min(image.size) > 300
            assert len(image.resize((200, 200)).getcolors(40_000)) > 50


def test_pdf_fonts_are_whole_truetype_fonts(reported):
    for path in reported[1]:
        if path.suffix == ".pdf":
            content = path.read_bytes()
            assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content


@pytest.mark.parametrize("name", plots.PLOTS)
def test_the_same_records_give_the_same_files(reported, name):
    figure = plots.PLOTS[name](read_records(reported[0] / report.RECORDS))
    for suffix, content in plot_style.render(figure).items():
        assert content == (reported[0] / "plots" / f"{name}.{suffix}").read_bytes()


def test_report_runs_alone_and_without_torch(reported):
    code = (
        "import sys, report; code = report.main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(reported[0])], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(table(read_records(reported[0] / report.RECORDS)))
    assert f"wrote {reported[0] / 'plots' / 'filters_kept.pdf'}" in done.stdout


def test_table_needs_no_matplotlib():
    code = "import sys, report, tables; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"no records.jsonl in it; give the directory of a run"),
        ({"records.jsonl": ""}, r"not one whole record in it"),
        ({"records.jsonl": '{"schema": 4, "run'}, r"not one whole record in it"),
        ({"0/records.jsonl": "", "1/records.jsonl": ""}, r"no records.jsonl in it; .* or of a sweep"),
    ],
)
def test_a_folder_without_records_is_one_clear_error(tmp_path, capsys, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        report.write_report(tmp_path)
    assert report.main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith(str(tmp_path)) and "not one whole record in" in captured.err
    assert all(f"{name.partition('/')[0]}: records.jsonl is empty" in captured.err for name in files if "/" in name)


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(BenchmarkError, match="missing: no records.jsonl"):
        report.write_report(tmp_path / "missing")


def test_a_run_that_stopped_at_the_dense_model_has_a_table_and_says_what_is_left_out(tmp_path, caplog):
    append_record(tmp_path / report.RECORDS, record("dense", head="all"))
    assert report.write_report(tmp_path) == [tmp_path / "results.csv", tmp_path / "report.html"]
    assert "No pruned network was recorded yet." in (tmp_path / "report.html").read_text()
    assert caplog.text.count("left out, no pruned model was recorded") == len(plots.PLOTS)


def test_an_earlier_run_in_the_same_folder_is_not_mixed_into_the_plots(tmp_path, caplog, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "PLOTS", {"accuracy": lambda records: drawn.append(records)})
    for run in ("old", "new", "new"):
        append_record(tmp_path / report.RECORDS, record(run_id=run))
    with caplog.at_level(logging.WARNING):
        report.write_report(tmp_path)
    assert [row.run_id for row in drawn[0]] == ["new", "new"]
    assert "1 other runs are in results.csv, but not in the plots" in caplog.text
    assert (tmp_path / "results.csv").read_text().count("\n") == 4
    shown = []
    monkeypatch.setattr(report, "table", lambda records: shown.append(records) or "")
    assert report.main([str(tmp_path)]) == 0
    assert [row.run_id for row in shown[0]] == ["new", "new"]


# The plots


@pytest.mark.parametrize("name", plots.PLOTS)
@pytest.mark.parametrize(
    "ratios, classes, layers, retrained",
    [([0.5], 1, 2, True), ([0.0], 10, 50, False), ([round(0.1 * index, 1) for index in range(10)], 12, 20, True)],
)
def test_plots_are_drawn_for_few_and_many(name, ratios, classes, layers, retrained):
    figure = plots.PLOTS[name](run_records(ratios, classes, layers, retrained))
    figure.draw_without_rendering()
    assert any("ocap, resnet18, digits" in text for text in figure_texts(figure))


def test_accuracy_plot_holds_the_recorded_figures():
    rows = run_records(ratios=[0.5, 0.25])  # asked for in this order
    axes = plots.accuracy_over_macs(rows).axes[0]
    drawn = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
    for stage in ("pruned", "retrained"):
        points = [(row.macs / 1e6, 100 * row.accuracy) for row in rows if row.stage == stage]
        assert tuple(reversed(points)) in drawn  # by ratio
    for row in rows[:2]:
        assert ((row.macs / 1e6, 100 * row.accuracy),) in drawn
    assert axes.get_xlabel() == "MACs per image (M; dense model: 37.5 M)"


def test_accuracy_plot_names_lines_baselines_and_ratios():
    texts = figure_texts(plots.accuracy_over_macs(run_records(ratios=[0.25, 0.5])))
    assert {"before retraining", "after retraining", "0.25", "0.5"} <= texts
    assert sum(text.startswith(("dense, all logits\n", "dense, selected logits\n")) for text in texts) == 2


def test_records_without_macs_are_left_out_of_the_accuracy_plot():
    assert plots.accuracy_over_macs([record(macs=None, macs_ratio=None)]) is None


def test_ratio_labels_that_would_overlap_are_joined():
    rows = [record("pruned", ratio, macs=30_000_000) for ratio in (0.1, 0.2, 0.3)]
    texts = figure_texts(plots.accuracy_over_macs([record("dense"), *rows]))
    assert "0.1\u20130.3" in texts and "0.2" not in texts


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.1, 20))
def test_labels_are_spread_as_far_as_needed_in_their_order(values, gap):
    placed = plot_labels._spread(values, gap)
    order = sorted(range(len(values)), key=lambda index: values[index])
    steps = [placed[after] - placed[before] for before, after in zip(order, order[1:], strict=False)]
    assert all(step >= gap * (1 - 1e-9) - 1e-9 for step in steps)
    apart = [values[after] - values[before] for before, after in zip(order, order[1:], strict=False)]
    if all(distance >= gap for distance in apart):
        assert placed == pytest.approx(values)
    assert sum(placed) == pytest.approx(sum(values), abs=1e-6)


@pytest.mark.parametrize("macs", [200_000, 20_000_000])  # no room beside the ends of the lines, and room
def test_names_of_lines_that_end_at_one_point_do_not_overlap(macs):
    rows = [record("dense"), record("pruned", 0.25)]
    rows += [record(stage, 0.98, macs=macs) for stage in ("pruned", "retrained")]
    figure = plots.accuracy_over_macs(rows)
    figure.draw_without_rendering()
    first, second = (
        text.get_window_extent() for text in figure.axes[0].texts if text.get_text().endswith(" retraining")
    )
    assert not first.overlaps(second)


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.1, 20))
def test_stacked_labels_only_move_down(values, gap):
    placed = plot_labels._stack(values, gap)
    ordered = sorted(placed)
    assert all(after - before >= gap * (1 - 1e-9) - 1e-9 for before, after in zip(ordered, ordered[1:], strict=False))
    assert all(new <= old for new, old in zip(placed, values, strict=True))
    assert max(placed, default=0) == max(values, default=0)


def test_latency_plot_shows_what_says_nothing_as_such():
    wide = timing(128, ratio=0.9, ratio_high=13.0, noisy=True)
    few = timing(1, ratio=0.6, pairs=2, noisy=True)
    sure = timing(1, ratio=0.8)
    rows = [record("pruned", 0.25, times=[sure, wide]), record("pruned", 0.5, times=[few, timing(128, ratio=0.7)])]
    (axes,) = plots.latency_over_macs(rows).axes
    assert axes.get_ylim()[1] < 150  # the bar that says nothing runs out of the plot
    points = [line for line in axes.lines if len(line.get_ydata()) == 1]
    hollow = {round(line.get_ydata()[0]): line.get_markerfacecolor() == "white" for line in points}
    assert hollow == {80: False, 90: True, 60: True, 70: False}
    bars = [container for container in axes.containers if container.has_yerr]
    assert len(bars) == 3  # two pairs have no interval
    assert axes.get_ylabel().endswith("hollow: says nothing)")


def test_class_panels_hold_the_recorded_figures_of_each_class():
    rows = run_records(ratios=[0.25, 0.5], classes=5)
    figure = plots.accuracy_per_class(rows)
    for name, axes in zip(rows[0].class_names, figure.axes, strict=False):
        assert axes.get_title(loc="left") == f"{name} (40 images)"
        lines = [list(map(tuple, line.get_xydata())) for line in axes.lines]
        assert lines[0] == [(r.ratio, 100 * r.accuracy_per_class[name]) for r in rows if r.stage == "pruned"]
        assert lines[1] == [(r.ratio, 100 * r.accuracy_per_class[name]) for r in rows if r.stage == "retrained"]
        assert lines[2][0][1] == 100 * rows[1].accuracy_per_class[name]


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("head", ["selected", "all"])
def test_class_plots_say_which_logits_the_dense_model_has(head, classes):
    rows = run_records(ratios=[0.25], classes=classes)
    rows = rows if head == "selected" else [row for row in rows if row.stage != "dense" or row.head == "all"]
    told = " ".join(figure_texts(plots.accuracy_per_class(rows))).replace("\n", " ")
    assert f"dense, {head} logits" in told and "dense model" not in told


def test_markers_at_the_ends_of_the_class_panels_are_whole():
    rows = run_records(ratios=[0.0, 0.98], classes=2)
    for axes in plots.accuracy_per_class(rows).axes:
        for line in axes.lines[:2]:
            assert not line.get_clip_on()


def test_many_classes_become_a_heat_map_with_a_dense_column():
    rows = run_records(ratios=[0.0, 0.25, 0.5], classes=9)
    before, after = plots.accuracy_per_class(rows).axes
    assert [label.get_text() for label in before.get_xticklabels()] == ["dense,\nselected\nlogits", "0.25", "0.5"]
    assert [label.get_text() for label in after.get_xticklabels()] == ["0", "0.25", "0.5"]
    shown = before.collections[0].get_array()
    pruned = [row for row in rows if row.stage == "pruned"]
    assert shown[4].tolist() == [100 * row.accuracy_per_class["class 4"] for row in (rows[1], *pruned[1:])]


def test_few_ratios_become_bars_of_the_kept_filters():
    rows = run_records(ratios=[0.25, 0.5], layers=6)
    figure = plots.filters_kept(rows)
    pruned = [row for row in rows if row.stage == "pruned"]
    for axes, row in zip(figure.axes, pruned, strict=True):
        layers = list(row.widths_dense)
        expected = {(n, float(row.widths_dense[layer])) for n, layer in enumerate(layers)}
        expected |= {(n, float(row.filters_kept_per_layer[layer])) for n, layer in enumerate(layers) if n}
        bars = {(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in axes.patches}
        assert bars == expected  # the first layer is left out, and has only the grey bar
    assert {"left out", "12 of 16", "8 of 16", "ratio 0.5 asked for, 50 % removed"} <= figure_texts(figure)


def test_many_ratios_become_a_heat_map_of_the_kept_filters():
    rows = run_records(ratios=[0.0, 0.25, 0.5, 0.75, 0.875], layers=5)
    axes = plots.filters_kept(rows).axes[0]
    assert axes.collections[0].get_array()[1].tolist() == [0.75, 0.5, 0.25, 0.125]
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "0.875\n88 %"
    assert axes.get_yticklabels()[0].get_text() == "layer0.0.conv1  16"
    assert sum(text.get_text() == "left out" for text in axes.texts) == 1


def test_a_layer_that_loses_filters_with_another_is_not_shown_as_left_out():
    changes = {"filters_kept_per_layer": {**record().filters_kept_per_layer, "conv1": 8}}
    texts = figure_texts(plots.filters_kept([record(**changes)]))
    assert "8 of 16" in texts
    assert "left out" in texts  # the other one


def test_a_method_keeps_its_colour():
    assert plot_style.method_colour("ocap") == "#0072B2"
    assert plot_style.method_colour("never heard of") == plot_style.method_colour("never heard of")
    assert plot_style.method_colour("never heard of") in plot_style.METHOD_COLOURS.values()
    assert len(set(plot_style.METHOD_COLOURS.values())) == len(plot_style.METHOD_COLOURS)
    code = "import plot_style; print(plot_style.method_colour('never heard of'))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert told.stdout.strip() == plot_style.method_colour("never heard of")


def test_names_are_shown_as_they_are_written():
    names = ("$5 note", "$10_note$")
    shares = accuracies([1.0, 0.5])
    named = {
        "class_names": names,
        "accuracy_per_class": dict(zip(names, (1.0, 0.5), strict=True)),
        "images_per_class": dict.fromkeys(names, 40),
    }
    figure = plots.accuracy_per_class([record(**shares | named)])
    figure.draw_without_rendering()  # as mathematics, the second name could not be drawn
    assert "$10_note$ (40 images)" in figure_texts(figure)


def test_drawing_is_silent_and_leaves_matplotlib_as_it_was(caplog):
    import matplotlib

    before, level = dict(matplotlib.rcParams), logging.getLogger("fontTools").level
    with caplog.at_level(logging.INFO):
        plot_style.render(plots.filters_kept(run_records()))
    assert caplog.records == []
    assert dict(matplotlib.rcParams) == before
    assert logging.getLogger("fontTools").level == level


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path):
    append_record(tmp_path / report.RECORDS, record("dense", head="all"))
    code = f"import os, report; os.close(0); report.main([{str(tmp_path)!r}])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr and (tmp_path / "report.html").is_file()
