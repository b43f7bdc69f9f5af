"""A sample of a product of parameters in which every pair of them is met.

Faults are of one parameter, or of two together: an implementation that sums a dtype wrongly, a
layout that takes the pads of the other. Few are of three, and where those are known to be, the
three are met `together`. `pytest --whole` runs the whole product.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

whole = False  # conftest.py sets it


def covering(
    *,
    apart: Iterable[tuple[str, str]] = (),
    together: Sequence[str] = (),
    **axes: Sequence[Any],
):
    """`parametrize` by a sample of `axes`."""
    import pytest  # which who only samples need not have

    rows = sample(apart=apart, together=together, **axes)
    return pytest.mark.parametrize(tuple(axes), rows, ids=lambda value: str(value))


def sample(
    *,
    apart: Iterable[tuple[str, str]] = (),
    together: Sequence[str] = (),
    **axes: Sequence[Any],
) -> list[tuple]:
    """Rows of `axes`, in which each pair of values of two axes occurs together.

    Pairs of the axes in `apart` need not, though each value of either occurs. The whole product of
    the axes in `together` occurs.
    """
    rows = list(itertools.product(*axes.values()))
    if whole:
        return rows
    ignored = {frozenset(pair) for pair in apart}
    groups = [
        *((i,) for i in range(len(axes))),
        *(
            (i, j)
            for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2)
            if frozenset((a, b)) not in ignored
        ),
        tuple(list(axes).index(axis) for axis in together),
    ]
    return _sample(rows, groups)


def _sample(rows: list[tuple[Any, ...]], groups: list[tuple[int, ...]]) -> list[tuple[Any, ...]]:
    """Rows with all combinations of values that `groups` of columns have in `rows`.

    First those that add as many combinations as a row can, in the end those that add one.
    """

    def combinations(row):
        return {(group, *(row[i] for i in group)) for group in groups}

    met: set[tuple[Any, ...]] = set()
    sample = []
    for wanted in range(len(groups), 0, -1):
        for row in rows:
            new = combinations(row) - met
            if len(new) >= wanted:
                met |= new
                sample.append(row)
    return sample
