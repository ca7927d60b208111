import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splits import pick, pick_per_class, rows_by_class, stratified_split

label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=80)
fractions = st.floats(0.01, 0.95)


@settings(deadline=None)
@given(label_lists)
def test_rows_by_class_are_those_of_a_plain_search(labels):
    expected = {label: [row for row, other in enumerate(labels) if other == label] for label in sorted(set(labels))}
    found = {label: rows.tolist() for label, rows in rows_by_class(torch.tensor(labels))}
    assert found == expected and list(found) == list(expected)


@settings(deadline=None)
@given(label_lists, fractions)
def test_a_split_takes_the_fraction_of_each_class(labels, fraction):
    labels = torch.tensor(labels)
    stays, off = stratified_split(labels, fraction, 0, "split")
    assert sorted(stays.tolist() + off.tolist()) == list(range(len(labels)))
    for label, rows in rows_by_class(labels):
        expected = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        assert (labels[off] == label).sum() == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=80), fractions)
def test_groups_stay_together_and_one_of_each_class_stays(pairs, fraction):
    labels = torch.tensor([label for label, _ in pairs])
    groups = torch.tensor([10 * label + group for label, group in pairs])
    stays, off = stratified_split(labels, fraction, 0, "split", groups)
    assert not set(groups[stays].tolist()) & set(groups[off].tolist())
    for label, rows in rows_by_class(labels):
        several = len(groups[rows].unique()) > 1
        assert (labels[stays] == label).any() and (labels[off] == label).any() == several


def test_groups_are_split_off_only_until_the_fraction_is_reached():
    labels, groups = torch.zeros(90, dtype=torch.int64), torch.arange(90) // 30
    assert len(stratified_split(labels, 0.1, 0, "split", groups)[1]) == 30
    assert len(stratified_split(labels, 0.4, 0, "split", groups)[1]) == 60


def test_a_split_depends_on_seed_and_name_and_is_not_the_first_rows():
    labels = torch.zeros(100, dtype=torch.int64)
    purposes = [(0, "a"), (0, "a"), (1, "a"), (0, "b")]
    splits = [stratified_split(labels, 0.5, *purpose)[1].tolist() for purpose in purposes]
    assert splits[0] == splits[1] and len({tuple(split) for split in splits}) == 3
    assert list(range(50)) not in splits


def test_one_class_is_split_alike_whatever_the_others_hold():
    one = stratified_split(torch.tensor([0] * 20), 0.3, 0, "split")[1]
    both = stratified_split(torch.tensor([0] * 20 + [1] * 7), 0.3, 0, "split")[1]
    assert both[both < 20].tolist() == one.tolist()


@settings(deadline=None)
@given(label_lists, st.integers(1, 20))
def test_at_most_so_many_of_each_class_are_picked(labels, count):
    labels = torch.tensor(labels)
    rows = pick_per_class(labels, count, 0, "samples")
    assert rows.tolist() == sorted(set(rows.tolist()))
    for label, of_class in rows_by_class(labels):
        assert (labels[rows] == label).sum() == min(count, len(of_class))


def test_more_picked_rows_contain_fewer():
    rows = torch.arange(100, 200)
    few, many = (pick(rows, count, 0, "rows").tolist() for count in (10, 30))
    assert set(few) < set(many) and many == sorted(many) and len(many) == 30 and min(many) >= 100
