"""Long sets of cases: a few in the slow tests, the rest in the exhaustive ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def sampled(cases: Iterable[Any], *in_ci: Any) -> list[ParameterSet]:
    """Mark the cases ``in_ci`` as slow and the others as exhaustive.

    ``pytest -m "slow or exhaustive" FILE`` runs all of them.

    Args:
        cases: a value each, or a tuple where the test has several arguments.
        in_ci: those that `make test` runs too; each must be one of the cases.
    """
    cases = list(cases)
    assert in_ci
    assert all(case in cases for case in in_ci)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=pytest.mark.slow if case in in_ci else pytest.mark.exhaustive,
        )
        for case in cases
    ]


def sampled_pairs(first: Iterable[Any], second: Iterable[Any], *in_ci: tuple[Any, Any]) -> list[ParameterSet]:
    """Do as :func:`sampled` for every pair of two sets of values."""
    return sampled(product(first, second), *in_ci)


def sampled_by_name(cases: Mapping[str, Any], *in_ci: str) -> list[ParameterSet]:
    """Do as :func:`sampled` with cases that have names, which become the tests' ids."""
    assert in_ci
    assert set(in_ci) <= cases.keys()
    return [
        pytest.param(case, id=name, marks=pytest.mark.slow if name in in_ci else pytest.mark.exhaustive)
        for name, case in cases.items()
    ]
