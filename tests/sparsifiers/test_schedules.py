"""Schedules: values by hand, plain data, messages."""

import dataclasses

import pytest

from sparsefx import SparsifierError
from sparsefx.sparsifiers import Constant, Cubic, Linear, Step
from sparsefx.sparsifiers.schedules import as_schedule, whole_number


def test_values():
    assert [Constant(3)(step) for step in (0, 99)] == [3, 3]
    assert [Linear(1, 0, 4, begin=2)(step) for step in (0, 2, 3, 6, 9)] == [1, 1, 0.75, 0, 0]
    cubic = Cubic(1, 0, 10)
    assert [cubic(step) for step in (0, 5, 10, 11)] == [1, 0.125, 0, 0]
    assert Cubic(0.0, 0.8, 4, begin=4)(6) == pytest.approx(0.8 - 0.8 / 8)
    jumps = Step([(0, 40), (10, 100)])
    assert [jumps(step) for step in (0, 9, 10, 11)] == [40, 40, 100, 100]


def test_plain_data():
    for schedule in (Constant(3), Linear(1, 0, 4), Cubic(1, 0, 10), Step(((0, 1), (3, 2)))):
        assert type(schedule)(**dataclasses.asdict(schedule)) == schedule
        assert hash(dataclasses.replace(schedule)) == hash(schedule)
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.value = 1


def test_numbers_become_schedules():
    assert as_schedule("X", "refresh", 40) == Constant(40)
    assert as_schedule("X", "refresh", Cubic(1, 0, 3)) == Cubic(1, 0, 3)
    assert whole_number("X", "k", 3, 1) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant("a"), r"Constant: value='a' must be a finite number"),
        (lambda: Constant(True), r"Constant: value=True must be a finite number"),
        (lambda: Linear(float("nan"), 0, 4), r"Linear: start=nan must be a finite number"),
        (lambda: Cubic(1, None, 4), r"Cubic: end=None must be a finite number"),
        (lambda: Cubic(1, 0, 0), r"Cubic: steps=0 must be an int of at least 1"),
        (lambda: Linear(1, 0, 4, begin=-1), r"Linear: begin=-1 must be an int of at least 0"),
        (lambda: Step(()), r"Step: values=\(\) must be \(step, value\) pairs"),
        (lambda: Step(((1, 2),)), r"with steps rising from 0"),
        (lambda: Step(((0, 2), (0, 3))), r"with steps rising from 0"),
        (lambda: Step(((0, None),)), r"Step: value=None must be a finite number"),
        (lambda: as_schedule("X", "n", "a"), r"X: n='a' must be a finite number or a schedule"),
        (lambda: whole_number("X", "k", True, 0), r"X: k=True must be an int of at least 0"),
    ],
)
def test_messages(make, message):
    with pytest.raises(SparsifierError, match=message):
        make()
