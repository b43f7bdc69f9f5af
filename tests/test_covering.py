"""That samples of parameters have every pair, and are samples."""

import itertools

import covering
import pytest

AXES = {"case": range(7), "op": ("forward", "filter_grad"), "dtype": range(4), "layout": range(2)}


def rows(monkeypatch, whole, **options):
    monkeypatch.setattr(covering, "whole", whole)
    mark = covering.covering(**options, **AXES)
    names, values = mark.args
    assert names == tuple(AXES)
    return [dict(zip(names, row, strict=True)) for row in values]


def pairs(rows, a, b):
    return {(row[a], row[b]) for row in rows}


def test_every_pair_is_met(monkeypatch):
    sample = rows(monkeypatch, whole=False)
    assert len(sample) < 7 * 4 * 2
    for a, b in itertools.combinations(AXES, 2):
        assert pairs(sample, a, b) == set(itertools.product(AXES[a], AXES[b]))


def test_but_those_that_need_not_be(monkeypatch):
    sample = rows(monkeypatch, whole=False, apart=[("dtype", "case"), ("case", "layout")])
    assert len(sample) == 7 * 2
    assert pairs(sample, "case", "op") == set(itertools.product(AXES["case"], AXES["op"]))
    assert pairs(sample, "dtype", "layout") == set(itertools.product(AXES["dtype"], AXES["layout"]))


def test_three_together(monkeypatch):
    sample = rows(monkeypatch, whole=False, together=("case", "op", "layout"))
    assert len(sample) == 7 * 2 * 2
    assert {(row["case"], row["op"], row["layout"]) for row in sample} == set(
        itertools.product(AXES["case"], AXES["op"], AXES["layout"])
    )
    assert pairs(sample, "case", "dtype") == set(itertools.product(AXES["case"], AXES["dtype"]))


@pytest.mark.parametrize("apart", [(), [("dtype", "case")]])
def test_the_whole_product(monkeypatch, apart):
    whole = rows(monkeypatch, whole=True, apart=apart)
    assert [tuple(row.values()) for row in whole] == list(itertools.product(*AXES.values()))
