"""support/covering.py: few cases, in which every combination of few factors occurs."""

import itertools

import pytest

from support.covering import covering


def combinations(rows, strength):
    """All combinations of values of `strength` factors that occur, with their factors."""
    return {
        tuple((n, row[n]) for n in factors)
        for row in rows
        for factors in itertools.combinations(range(len(row)), strength)
    }


PRODUCT = list(itertools.product(range(5), "abc", [True, False], [None, "relu"], (1.5, 2.5, 3.5)))
#: Not every combination is allowed: values of the last factor depend on the first.
PART = [row for row in PRODUCT if row[0] + row[-1] < 5]


@pytest.mark.parametrize("rows", [PRODUCT, PART], ids=["product", "part"])
@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_every_combination_occurs(rows, strength):
    kept = [rows[n] for n in covering(rows, strength)]
    assert combinations(kept, strength) == combinations(rows, strength)
    assert len(kept) < len(rows)


def test_is_small():
    """Any three factors have at most 5 x 3 x 3 combinations."""
    assert 45 <= len(covering(PRODUCT, 3)) <= 60


def test_is_the_same_every_time():
    assert covering(PRODUCT, 3) == covering(PRODUCT, 3)


def test_few_factors_keep_all_cases():
    assert covering(PRODUCT, 5) == covering(PRODUCT, 99) == list(range(len(PRODUCT)))
    assert covering([], 3) == []
