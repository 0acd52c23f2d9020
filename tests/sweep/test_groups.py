"""The order of variants, and how it is cut into groups."""

import gc
import tracemalloc

import pytest

from fastinterp.model import Edit
from fastinterp.sweep import Variant
from fastinterp.sweep.groups import Order, Planned
from fastinterp.sweep.source import sourced


def planned(index: int, layer: int, start: tuple[int, ...] | None, n_bytes: int = 10) -> Planned:
    return Planned(index=index, first_layer=layer, start=start, n_bytes=n_bytes)


MIXED = [
    planned(0, 3, (1, 2)),
    planned(1, 0, (2, 0), n_bytes=35),
    planned(2, 3, None),
    planned(3, 0, (0, 7)),
    planned(4, 3, (1, 2), n_bytes=1),
    planned(5, 0, (2, 0)),
    planned(6, 0, None, n_bytes=12),
]


def test_the_order_is_by_layer_start_and_index():
    order = Order(MIXED)
    assert len(order) == len(MIXED)
    found = [order[i] for i in range(len(order))]
    assert found == sorted(MIXED, key=lambda each: (each.first_layer, each.start or ()))
    assert [each.index for each in found] == [6, 3, 1, 5, 2, 0, 4]
    assert order.whole
    assert not Order(each for each in MIXED if each.start is not None).whole


@pytest.mark.parametrize(
    ("residual_bytes", "expected"),
    [
        (1, [([6], 0), ([3], 0), ([1], 0), ([5], 3), ([2], 3), ([0], 3), ([4], 0)]),
        (21, [([6], 0), ([3], 0), ([1], 0), ([5, 2], 3), ([0, 4], 0)]),
        (22, [([6, 3], 0), ([1], 0), ([5, 2], 3), ([0, 4], 0)]),
        (1000, [([6, 3, 1, 5, 2, 0, 4], 0)]),
    ],
)
def test_groups_stay_below_the_bytes_or_have_one_variant(residual_bytes, expected):
    found = [([each.index for each in group], then) for group, then in Order(MIXED).groups(residual_bytes)]
    assert found == expected


def test_nothing_has_no_groups():
    assert list(Order([]).groups(100)) == []


def test_thousands_of_variants_take_few_bytes():
    n = 20_000
    tracemalloc.start()
    try:
        order = Order(planned(i, i % 30, (i % 15,) * 64, n_bytes=10_000 + i % 15) for i in range(n))
        kept, most = tracemalloc.get_traced_memory()
        groups = order.groups(1)
        for _ in range(n - 1):
            next(groups)
        running = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 16 * n
    assert most < 50 * n
    assert running - kept < 10_000


def test_a_variant_that_was_looked_at_leaves_nothing_behind():
    variant = Variant(edits=(Edit(site="z", layer=1, head=0, replacement=0.0),))
    for _ in range(10):
        sourced(variant.at_layer(1), {})
    gc.collect()  # So that the interpreter keeps no tuples for later.
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(2000):
            sourced(variant.at_layer(1), {})
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2000 * 20
