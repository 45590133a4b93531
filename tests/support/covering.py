"""Few cases instead of all combinations.

Most mistakes need one value of a factor, or a pair or a triple of values of different factors,
to show (Kuhn, Wallace and Gallo, Software Fault Interactions and Implications for Software
Testing, 2004). A covering array of strength t is a set of cases in which every combination of
values of every t factors occurs: for 5 x 3 x 3 x 4 x 4 x 2 values 1,440 cases make all
combinations, and about a tenth of that all triples.

A test that is marked with `covering` runs such an array instead of the product of its parameters
(see conftest.py). A case that is left out still runs if its id is named.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Sequence


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """Selects rows so that every combination of `strength` values in all rows still occurs.

    Args:
        rows: cases, with one value for each factor.
        strength: the number of factors that are combined. All rows are kept if there are no more
            factors.

    Returns:
        Positions in `rows`, in ascending order, the same ones every time. The array is small, but
        not the smallest possible.
    """
    factors = len(rows[0]) if rows else 0
    if strength >= factors:
        return list(range(len(rows)))
    places = list(itertools.combinations(range(factors), strength))
    combinations = [{(place, *[row[n] for n in place]) for place in places} for row in rows]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    kept: list[int] = []
    covered: set[tuple[object, ...]] = set()
    # First the rows whose combinations are all new, then those with all but one new, and so on.
    for fewest in range(len(places), 0, -1):
        for position in order:
            if len(combinations[position] - covered) >= fewest:
                covered |= combinations[position]
                kept.append(position)
    return sorted(kept)
