"""What the plots of a sweep hold, against figures worked out another way; that they are drawn for few and for many."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import fmean

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

import sweep_plots
from comparison import settings_of, standings
from filter_selection import REGISTRY
from plot_style import METHOD_COLOURS, STYLE, render, variant_style
from runs import block_of, read_sweep
from settings import CONFIG_DIR
from sweep_heat_maps import accuracy_lost_per_class, filters_kept_per_layer, middle_level
from sweep_plots import SWEEP_PLOTS, accuracy_over_macs, middle_setting, ranks, selection_overlap, selection_stability
from tests.sample_sweeps import LEVELS, records_of, run_of, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return read_sweep(write_sweep(tmp_path_factory.mktemp("sweep")))


def test_lines_hold_the_means_at_each_target(sweep):
    figure = accuracy_over_macs(sweep)
    for axes, stage in zip(figure.axes, ("pruned", "retrained"), strict=True):
        drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
        assert set(drawn) == set(LEVELS)
        for variant, points in drawn.items():
            groups = defaultdict(list)
            for r in sweep.records:
                if (r.variant, r.stage) == (variant, stage):
                    groups[r.target].append((100 * r.macs_ratio, 100 * r.accuracy))
            expected = sorted((fmean(x for x, _ in row), fmean(y for _, y in row)) for row in groups.values())
            assert points == pytest.approx(np.array(expected))


@pytest.mark.parametrize("name", SWEEP_PLOTS)
@pytest.mark.parametrize(
    ("variants", "options"),
    [
        (("ocap",), {"subsets": 1, "seeds": 1}),
        (("ocap scoring_classes=complement activation_func=identity", "random"), {"subsets": 2, "seeds": 1}),
        (sorted(REGISTRY), {"subsets": 1, "seeds": 5}),
    ],
)
def test_plots_are_drawn_for_few_and_for_many_without_a_word(name, variants, options, tmp_path, caplog):
    root = write_sweep(tmp_path / "one", variants, **options)
    for model in ("vgg16", "resnet18"):
        write_run(tmp_path / "one" / f"other {model}", run_of(variants[0], (1, 2), 9, model=model, dataset="$gtsrb_"))
    figure = SWEEP_PLOTS[name](read_sweep(root))
    if figure is None:
        assert name == "selection_stability" or len(variants) == 1 and name in ("ranks", "selection_overlap")
        return
    files = render(figure)
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF") and not caplog.records


def test_names_of_lines_do_not_overlap(tmp_path):
    """All lines end at one point, the worst case."""
    sweep = read_sweep(write_sweep(tmp_path, sorted(REGISTRY), subsets=1, seeds=1, level=0.5))
    with rc_context(STYLE):
        figure = accuracy_over_macs(sweep)
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        for axes in figure.axes:
            boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
            assert len(boxes) == len(REGISTRY)
            bottoms = sorted((box.y0, box.y1) for box in boxes)
            assert all(lower[1] < upper[0] + 2 for lower, upper in zip(bottoms, bottoms[1:], strict=False))
            assert bottoms[0][0] > axes.get_window_extent().y0 - 2


def test_no_two_methods_look_alike_and_each_looks_the_same_everywhere():
    methods = [path.stem for path in (CONFIG_DIR / "pruning").glob("*.yaml")]
    looks = {(variant_style(method)["color"], variant_style(method)["marker"]) for method in methods}
    assert len(looks) == len(methods) == len(REGISTRY)
    changed = variant_style("ocap scoring_classes=all")
    assert changed == variant_style("ocap scoring_classes=all") and changed["color"] == variant_style("ocap")["color"]
    assert changed["linestyle"] != "-" != variant_style("ocap scoring_classes=complement")["linestyle"]


def of_several_tasks_and_models(root):
    for number, (dataset, model, subset) in enumerate(
        [("digits", "vgg16", (1,)), ("digits", "vgg16", (1, 2)), ("fashion_mnist", "mobilenet_v2", (3, 5, 7))]
    ):
        for variant in ("ocap", "random"):
            write_run(root / f"{number} {variant}", run_of(variant, subset, 0, dataset=dataset, model=model))
    return read_sweep(root)


def test_titles_of_panels_do_not_overlap(tmp_path):
    with rc_context(STYLE):
        figure = accuracy_lost_per_class(of_several_tasks_and_models(tmp_path))
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [axes._left_title.get_window_extent(renderer) for axes in figure.axes]
    titles = [" ".join(axes.get_title(loc="left").split()) for axes in figure.axes]
    assert titles == [
        "digits, 1 random class, vgg16", "digits, 2 random classes, vgg16",
        "fashion_mnist, 3 random classes, mobilenet_v2",
    ]  # fmt: skip
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes)) and boxes[-1].x1 < figure.bbox.x1


def test_every_model_has_a_panel_of_the_filters_it_keeps(tmp_path):
    sweep = of_several_tasks_and_models(tmp_path)
    figure = filters_kept_per_layer(sweep)
    models = ["mobilenet_v2", "vgg16"]
    assert [axes.get_title(loc="left").partition(";")[0].split(", ")[-1] for axes in figure.axes] == models
    for axes, model in zip(figure.axes, models, strict=True):
        layers = [label.get_text() for label in axes.get_yticklabels()]
        assert layers == ["layer1.conv1", "layer2.conv1"]  # the others keep all
        record = next(r for r in sweep.records if (r.model, r.stage, r.target) == (model, "pruned", 0.3))
        shares = [100 * record.filters_kept_per_layer[layer] / record.widths_dense[layer] for layer in layers]
        assert [text.get_text() for text in axes.texts] == [f"{share:.0f}" for share in shares for _ in range(2)]


@pytest.mark.parametrize("method", ["ocap", "lrp", "pxp", "crisp", "class_taylor", "firing_rate"])
def test_variants_that_experiments_compare_have_markers_of_their_own(method):
    changes = ("", " scoring_classes=all", " scoring_classes=complement", " pruning_scope=global")
    assert len({variant_style(method + change)["marker"] for change in changes}) == len(changes)


# Machado et al., IEEE TVCG 2009: what is left of linear RGB without the cones for red, and for green.
VISION = {
    "all cones": np.eye(3),
    "no red": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "no green": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]]),
}


def lab(colour, seen):
    """CIE L*a*b*, white D65, of an sRGB colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = seen @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    shares = to_xyz @ linear.clip(0, 1) / (0.9505, 1, 1.0888)
    x, y, z = np.where(shares > 0.008856, np.cbrt(shares), 7.787 * shares + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("vision", "least"), [("all cones", 25), ("no red", 9), ("no green", 9)])
def test_methods_can_be_told_apart_by_colour_in_any_vision_and_by_marker_without(vision, least):
    """A difference of 2.3 is just seen where colours touch."""
    assert REGISTRY.keys() <= METHOD_COLOURS.keys()
    assert len({variant_style(method)["marker"] for method in REGISTRY}) == len(REGISTRY)
    seen = {method: lab(METHOD_COLOURS[method], VISION[vision]) for method in REGISTRY}
    apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(sorted(seen), 2)}
    assert not {pair: distance for pair, distance in apart.items() if distance < least}


def test_overlap_of_selections_is_the_mean_jaccard_index(sweep):
    figure = selection_overlap(sweep)
    cells = [text.get_text() for text in figure.axes[0].texts]
    variants = sorted(LEVELS)
    target = middle_level(sweep)[1]
    chosen = {}
    for run in sweep.runs:
        (ratio,) = [r.ratio for r in run.records if r.stage == "pruned" and r.target == target]
        pairs = {(layer, i) for layer, filters in run.selections[ratio].items() for i in filters}
        chosen[run.records[0].variant, run.records[0].selected_classes, run.records[0].seed] = pairs
    blocks = sorted({key[1:] for key in chosen})
    for row, one in enumerate(variants):
        for column, other in enumerate(variants):
            shares = [
                len(chosen[one, *b] & chosen[other, *b]) / len(chosen[one, *b] | chosen[other, *b]) for b in blocks
            ]
            assert cells[row * len(variants) + column] == f"{100 * fmean(shares):.0f}"


def test_ranks_are_drawn_best_on_top(sweep):
    axes = ranks(sweep).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ocap", "ln_structured", "random"]
    assert axes.yaxis_inverted()


def test_the_middle_setting_is_after_retraining(sweep):
    setting = middle_setting(sweep.records, "digits, 3 random classes", "resnet18")
    assert (setting.stage, setting.level) == ("retrained", 0.3)
    assert middle_setting(sweep.records, "digits, 3 random classes", "vgg16") is None


def test_the_stability_of_selections_is_the_overlap_of_pairs_of_draws(tmp_path):
    """Each selection is made by hand: of a layer's first ten filters, those from the draw's number on."""
    for images, first in ((6, (0, 5)), (60, (0, 1))):
        for draw, begin in enumerate(first):
            records = [
                replace(r, num_pruning_samples=images, sampling_seed=draw, config_hash=f"{images} {draw}")
                for r in run_of("ocap", (1, 2), 0, targets=(0.3,))
            ]
            run = write_run(tmp_path / f"{images} {draw}", records, [f"num_pruning_samples={images}"])
            ratio = records[-1].ratio
            (run / "selections.json").write_text(
                json.dumps([{"ratio": ratio, "filters_removed": {"layer": list(range(begin, 10))}}])
            )
    (axes,) = selection_stability(read_sweep(tmp_path)).axes
    (line,) = axes.lines
    assert line.get_label() == "ocap"
    assert line.get_xydata() == pytest.approx(np.array([[np.log10(6), 50.0], [np.log10(60), 90.0]]))


def test_the_stability_of_selections_takes_several_draws_and_numbers(sweep):
    assert selection_stability(sweep) is None


def test_curves_are_means_over_the_pairs_of_the_table():
    """One run is missing, and another's latency says nothing: accuracies are those of the table all the same."""
    records = records_of()
    whole = [r for r in records if not (r.variant == "random" and block_of(r) == block_of(records[0]))]
    noisy = [
        replace(r, times=tuple(replace(t, noisy=True) for t in r.times))
        if r.variant == "ocap" and r.seed == 1 and r.target == 0.6
        else r
        for r in whole
    ]
    setting = next(s for s in settings_of(whole) if s.stage == "retrained" and s.level == 0.6)
    table = {row.variant: 100 * row.accuracy.value for row in standings(whole, setting)}
    chosen = [r for r in noisy if r.stage == "retrained"]
    for place in (lambda r: r.macs_ratio, sweep_plots._latency):
        lines = sweep_plots._means(chosen, place)
        assert {variant: points[0][1] for variant, points in lines.items()} == pytest.approx(table)


def test_targets_and_ratios_of_one_number_are_points_of_their_own():
    matched = [r for r in records_of(("ocap",), subsets=1, seeds=1) if r.stage == "retrained"]
    given = [replace(r, match=None, target=None, reached=None, ratio=r.target) for r in matched if r.target]
    assert len(sweep_plots._means(matched + given, lambda r: r.macs_ratio)["ocap"]) == len(matched + given)
