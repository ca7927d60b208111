"""The statistics against scipy, against a slow bootstrap, and in what must not change them."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import comparison
from comparison import (
    Resampling,
    Setting,
    areas,
    cells_of,
    controls,
    difference,
    friedman,
    ranked,
    settings_of,
    standings,
)
from runs import block_of, read_sweep, task_of
from tests.sample_records import certainty
from tests.sample_sweeps import LEVELS, records_of, run_of, write_run

AFTER = Setting("digits, 3 random classes", "resnet18", "retrained", "macs", 0.6)
COMMITTED = Path(__file__).resolve().parent.parent / "results"


def matrix(records, setting):
    """Accuracies [block, variant] of the blocks that all variants have at the target, picked out one by one."""
    cells = {}
    for r in records:
        if (task_of(r), r.model, r.stage, r.match, r.target) == (
            setting.task, setting.model, setting.stage, setting.match, setting.level,
        ):  # fmt: skip
            if abs(r.reached - r.target) <= 0.02:
                cells[(r.selected_classes, r.seed), r.variant] = r.accuracy
    variants = sorted({key[1] for key in cells})
    blocks = sorted(block for block in {key[0] for key in cells} if all((block, v) in cells for v in variants))
    return np.array([[cells[block, variant] for variant in variants] for block in blocks]), variants


def sweeps():
    """Made-up records, and all that the repository holds of real ones."""
    yield pytest.param(records_of(), id="made up")
    for path in sorted({found.parents[1] for found in COMMITTED.glob("*/*/records.jsonl")}):
        records = list(read_sweep(path).records)
        if len({block_of(record) for record in records}) > 1:
            yield pytest.param(records, id=path.name)


@pytest.mark.parametrize("records", list(sweeps()))
def test_means_ranks_and_friedman_are_those_of_scipy(records):
    checked = 0
    for setting in settings_of(records):
        cells = cells_of(records, setting)
        if len(cells.blocks) < 2 or cells.left_out:
            continue
        values, variants = matrix(records, setting)
        rows = {standing.variant: standing for standing in standings(records, setting)}
        ranks = scipy.stats.rankdata(-values, axis=1).mean(axis=0)
        for variant, mean, rank in zip(variants, values.mean(axis=0), ranks, strict=True):
            assert rows[variant].accuracy.value == pytest.approx(mean, abs=1e-12)
            assert rows[variant].mean_rank.value == pytest.approx(rank, abs=1e-12)
        if len(variants) > 2:
            theirs = scipy.stats.friedmanchisquare(*values.T)
            ours = friedman(records, setting)
            if ours is None:  # all tied, which scipy answers with a division by zero
                assert math.isnan(theirs.statistic)
            else:
                assert ours == (pytest.approx(theirs.statistic), len(variants) - 1)
        checked += 1
    assert checked > 0


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6))
def test_ranks_are_those_of_scipy(rows):
    assert np.allclose(ranked(rows), scipy.stats.rankdata(-np.array(rows), axis=1))


def expanded(levels: int) -> float:
    """The share that an interval of 95 % leaves out on each side where there are so many levels of the fewer factor."""
    return scipy.stats.norm.cdf(-scipy.stats.t(levels - 1).ppf(0.975) * math.sqrt(levels / (levels - 1)))


def slow_pigeonhole(values: dict, draws: int, seed: int) -> list[float]:
    """Means of tables of subsets by seeds whose rows and columns were drawn, built cell by cell."""
    chance = random.Random(seed)
    subsets, seeds = sorted({key[0] for key in values}), sorted({key[1] for key in values})
    means = []
    while len(means) < draws:
        rows, columns = chance.choices(subsets, k=len(subsets)), chance.choices(seeds, k=len(seeds))
        drawn = [values[row, column] for row in rows for column in columns if (row, column) in values]
        if drawn:
            means.append(math.fsum(drawn) / len(drawn))
    return means


@pytest.mark.parametrize("hole", [None, ((0,), 1)])
def test_the_interval_is_that_of_tables_drawn_cell_by_cell(hole):
    chance = random.Random(3)
    values = {((row,), column): row + chance.gauss(0, 1) for row in range(7) for column in range(6)}
    values.pop(hole, None)
    resampling = Resampling([(*key, 0) for key in values])
    estimate = resampling.mean(list(values.values()))
    tail = expanded(6)
    assert 0.001 < tail < 0.003
    low, high = np.quantile(slow_pigeonhole(values, 20_000, 1), (tail, 1 - tail))
    assert estimate.value == pytest.approx(np.mean(list(values.values())))
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=0.2), pytest.approx(high, abs=0.2))


def test_with_one_subset_it_is_scipys_percentile_bootstrap():
    values = [random.Random(5).gauss(0, 1) for _ in range(12)]
    estimate = Resampling([((1,), seed, 0) for seed in range(12)]).mean(values)
    theirs = scipy.stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(1),
        confidence_level=1 - 2 * expanded(12),
    )
    assert estimate.low == pytest.approx(theirs.confidence_interval.low, abs=0.03)
    assert estimate.high == pytest.approx(theirs.confidence_interval.high, abs=0.03)


@pytest.mark.parametrize(("levels", "least"), [(3, 0.93), (5, 0.96)])
def test_intervals_hold_the_truth_as_often_as_they_say(levels, least):
    """Effects of subset, seed and both, of one size, mean 0: how many hold 0. 0.96 and 0.98 here."""
    generator = np.random.default_rng(0)
    blocks = [((subset,), seed, 0) for subset in range(levels) for seed in range(levels)]
    resampling, held = Resampling(blocks), 0
    for _ in range(600):
        subset, seed, both = (generator.normal(size=size) for size in (levels, levels, (levels, levels)))
        estimate = resampling.mean([subset[b[0][0]] + seed[b[1]] + both[b[0][0], b[1]] for b in blocks])
        held += estimate.low <= 0 <= estimate.high
    assert held / 600 > least


def test_three_by_three_say_no_less_than_their_range():
    """So few draws say little: an interval excludes what no block reached, and hardly more."""
    values = [random.Random(9).gauss(0, 1) for _ in range(9)]
    estimate = Resampling([((subset,), seed, 0) for subset in range(3) for seed in range(3)]).mean(values)
    assert (estimate.low, estimate.high) == pytest.approx((min(values), max(values)))


def test_the_better_one_leads_and_its_rank_is_certain():
    rows = standings(records_of(), AFTER)
    assert [row.variant for row in rows] == ["ocap", "ln_structured", "random"]
    assert [row.rank for row in rows] == [(1, 1), (2, 2), (3, 3)]
    assert rows[0].lead.low > 0 and rows[2].lead is None and rows[0].accuracy.n == 9
    assert all(row.macs_ratio == pytest.approx(0.4, abs=0.006) for row in rows)


def test_controls_are_the_networks_that_nothing_was_removed_from():
    """Means over the blocks that are compared, by hand; one block is missing of one variant."""
    gone = ((0, 3, 6), 1)
    records = [r for r in records_of() if not (r.variant == "random" and (r.selected_classes, r.seed) == gone)]
    found = controls(records, AFTER)
    for said, stage in {
        "with all logits": "dense",
        "with the replaced head": "pruned",
        "with that and the same retraining": "retrained",
    }.items():
        values = {}
        for r in records:
            if r.stage == stage and not r.ratio and (r.selected_classes, r.seed) != gone:
                values.setdefault((r.selected_classes, r.seed), []).append(r.accuracy)
        assert found[said].n == len(values) == 8
        assert found[said].value == pytest.approx(np.mean([np.mean(row) for row in values.values()]))
    without = [r for r in records if r.stage != "dense" or r.seed]
    assert set(controls(without, AFTER)) == set(found) - {"with all logits"}


def told_runs(root, settings):
    """Runs of one variant on the same 2 by 1 blocks, a set of settings each; accuracies differ from one to the next."""
    for number, told in enumerate(settings):
        for subset in ((0, 3, 6), (1, 4, 7)):
            rows = run_of("ocap", subset, 0, level=0.6 + 0.1 * number)
            lower = 1 - 0.05 * number  # of the controls, too
            rows = [lowered(r, lower, f"{r.run_id} {number}") for r in rows]
            write_run(root / f"{number} {subset[0]}", rows, told)
    return read_sweep(root).records


def lowered(r, share, name):
    per_class = {label: round(100 * share * value) / 100 for label, value in r.accuracy_per_class.items()}
    answers = certainty(per_class, r.images_per_class) | {"worst_class_accuracy": min(per_class.values())}
    everywhere = r.accuracy_all_classes and share * r.accuracy_all_classes
    return replace(
        r, run_id=name, config_hash=name, accuracy_per_class=per_class, accuracy_all_classes=everywhere, **answers
    )


def mean_control(records, stage, *variants):
    return np.mean([r.accuracy for r in records if r.stage == stage and not r.ratio and r.variant in variants])


def without_doubt(found):
    """Controls by their names without the word that runs differ, as made-up ones do."""
    return {said.partition(" (a mean over")[0]: mean for said, mean in found.items()}


def test_a_control_that_was_retrained_otherwise_is_not_averaged_with_the_others(tmp_path):
    records = told_runs(tmp_path, [["training.retrain_epochs=3"], ["training.retrain_epochs=30"]])
    short, long = (f"ocap training.retrain_epochs={epochs}" for epochs in (3, 30))
    found = without_doubt(controls(records, AFTER))
    expected = {
        # What retraining is told has no say in these: one network for both.
        "with all logits": mean_control(records, "dense", short, long),
        "with the replaced head": mean_control(records, "pruned", short, long),
        "with that and the same retraining (training.retrain_epochs=3)": mean_control(records, "retrained", short),
        "with that and the same retraining (training.retrain_epochs=30)": mean_control(records, "retrained", long),
    }
    assert {said: mean.value for said, mean in found.items()} == pytest.approx(expected)
    assert list(found) == list(expected)


def test_settings_that_shape_the_dense_network_set_all_controls_apart(tmp_path):
    records = told_runs(tmp_path, [[], ["training.epochs=2", "dataset.classes=[a, b]"]])
    named = "ocap dataset.classes=[a, b] training.epochs=2"
    found = controls(records, AFTER)
    for said, stage in {"with all logits": "dense", "with the replaced head": "pruned"}.items():
        assert found[said].value == pytest.approx(mean_control(records, stage, "ocap"))
        other = found[f"{said} (dataset.classes=[a, b], training.epochs=2)"]
        assert other.value == pytest.approx(mean_control(records, stage, named))
    assert len(found) == 6


def test_what_the_method_is_told_sets_no_control_apart(tmp_path):
    records = told_runs(tmp_path, [["pruning.residual=skip"], ["pruning.residual=coupled", "num_pruning_samples=3"]])
    variants = {r.variant for r in records}
    assert len(variants) == 2
    found = without_doubt(controls(records, AFTER))
    assert found["with all logits"].value == pytest.approx(mean_control(records, "dense", *variants))
    assert len(found) == 3


def test_a_paired_difference_is_the_mean_of_differences_within_blocks():
    records = records_of()
    values, variants = matrix(records, AFTER)
    one, other = variants.index("ocap"), variants.index("random")
    found = difference(records, AFTER, "ocap", "random")
    assert found.value == pytest.approx((values[:, one] - values[:, other]).mean())
    own = standings(records, AFTER)[2].accuracy
    assert found.high - found.low < own.high - own.low  # what is hard for both does not count
    assert difference(records, AFTER, "ocap", "nothing") is None


def test_equal_methods_are_tied():
    records = records_of(("a", "b"), level=0.9)
    assert {row.rank for row in standings(records, AFTER, "a")} == {(1, 2)}


def test_two_blocks_tell_no_interval_and_no_order():
    rows = standings(records_of(subsets=2, seeds=1), AFTER)
    assert all(row.accuracy.low is None and row.rank == (1, 3) for row in rows) and rows[0].lead.sign == 0


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(chance):
    records = records_of(subsets=2, seeds=3)
    shuffled = list(records)
    chance.shuffle(shuffled)
    assert standings(shuffled, AFTER) == standings(records, AFTER)
    assert areas(shuffled, "digits, 3 random classes", "resnet18", "retrained") == areas(
        records, "digits, 3 random classes", "resnet18", "retrained"
    )


def test_what_missed_its_target_does_not_compete():
    records = records_of(("ocap", "random"))
    records += [r for s in range(3) for k in range(3) for r in run_of("lrp", (s, s + 3, s + 6), k, unreached=(0.6,))]
    assert {row.variant for row in standings(records, AFTER)} == {"ocap", "random"}
    cells = cells_of(records, AFTER)
    assert cells.left_out == ("lrp",) and cells.unmet == {"lrp": 9} and cells.missing["lrp"] == 0
    nearer = replace(AFTER, level=0.3)
    assert {row.variant for row in standings(records, nearer)} == {"ocap", "random", "lrp"}


def test_a_sweep_that_is_half_done_compares_what_all_have():
    records = records_of(("ocap", "random")) + run_of("lrp", (0, 3, 6), 0)
    rows = standings(records, AFTER)
    assert [row.accuracy.n for row in rows] == [9, 9] and cells_of(records, AFTER).missing["lrp"] == 8
    records += [r for s in range(3) for k in (0, 1) for r in run_of("lrp", (s, s + 3, s + 6), k) if (s, k) != (0, 0)]
    assert [row.accuracy.n for row in standings(records, AFTER)] == [6, 6, 6]


def test_the_area_is_scipys_trapezoid():
    records = records_of(subsets=2, seeds=3)
    found = {area.variant: area for area in areas(records, "digits, 3 random classes", "resnet18", "retrained")}
    assert set(found) == set(LEVELS)
    low, high = found["ocap"].low, found["ocap"].high
    for variant in LEVELS:
        runs = {}
        for r in records:
            if r.variant == variant and r.stage == "retrained":
                runs.setdefault((r.selected_classes, r.seed), []).append((r.macs_ratio, r.accuracy))
        heights = []
        for line in map(sorted, runs.values()):
            x = np.linspace(low, high, 20_001)
            heights.append(scipy.integrate.trapezoid(np.interp(x, *zip(*line, strict=True)), x) / (high - low))
        assert found[variant].accuracy.value == pytest.approx(np.mean(heights), abs=1e-6)
    assert areas(records, "digits, 3 random classes", "vgg16", "retrained") == []


def test_settings_are_named_and_ordered():
    settings = settings_of(records_of(subsets=1, seeds=1))
    assert [str(s) for s in settings[:2]] == [
        "digits, 3 random classes, resnet18, 30 % of MACs removed, before retraining",
        "digits, 3 random classes, resnet18, 30 % of MACs removed, after retraining",
    ]
    assert len(settings) == 4 and comparison.TOLERANCE == 0.02


def test_more_classes_and_other_rules_are_tables_of_their_own():
    three, two = run_of("ocap", (0, 1, 2), 0), run_of("ocap", (0, 1), 0)
    alike = [replace(record, subset="similar") for record in three]
    one = run_of("ocap", (4,), 0)
    assert [task_of(rows[0]) for rows in (three, two, alike, one)] == [
        "digits, 3 random classes", "digits, 2 random classes", "digits, 3 similar classes", "digits, 1 random class",
    ]  # fmt: skip
    everything = three + two + alike + one
    assert len({setting.task for setting in settings_of(everything)}) == 4
    assert [row.accuracy.n for row in standings(everything, AFTER)] == [1]
    assert standings(everything, AFTER)[0].accuracy == standings(three, AFTER)[0].accuracy
    assert areas(everything, AFTER.task, "resnet18", "retrained") == areas(three, AFTER.task, "resnet18", "retrained")


def test_draws_of_scoring_images_are_no_seeds():
    """Five draws for one seed and subset are five blocks, and still one network: no interval, and no order."""
    rows = [r for seed in range(5) for variant in ("a", "b") for r in run_of(variant, (0, 1, 2), seed)]
    drawn = [replace(record, seed=0) for record in rows]
    assert all(row.accuracy.low is None and row.accuracy.n == 5 for row in standings(drawn, AFTER))
    assert all(row.accuracy.low is not None for row in standings(rows, AFTER))


def test_a_run_that_was_cut_short_takes_no_range_from_the_others():
    records = records_of()
    cut = [r for r in records if not (r.variant == "ocap" and block_of(r) == block_of(records[0]) and r.target == 0.6)]
    whole, fewer = (areas(rows, AFTER.task, "resnet18", "retrained") for rows in (records, cut))
    assert {(area.low, area.high) for area in fewer} == {(area.low, area.high) for area in whole}
    assert {area.accuracy.n for area in fewer} == {whole[0].accuracy.n - 1}


def test_controls_that_differ_within_a_block_say_so():
    """Runs of one seed that did not start from one network: their mean is of none."""
    records = records_of()
    odd = next(n for n, r in enumerate(records) if r.stage == "pruned" and r.ratio == 0)
    changed = dict.fromkeys(records[odd].accuracy_per_class, 0.5)
    answers = certainty(changed, records[odd].images_per_class)
    answers |= {"accuracy_per_class": changed, "worst_class_accuracy": 0.5}
    points = 100 * (records[odd].accuracy - 0.5)
    records[odd] = replace(records[odd], **answers)
    told = [said for said in controls(records, AFTER) if said.startswith("with the replaced head")]
    assert told == [f"with the replaced head (a mean over runs that differ by up to {points:.1f} points)"]
    assert "with all logits" in controls(records, AFTER)
