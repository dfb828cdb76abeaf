"""Check cells: right, wrong, not filled in; a wrong answer never stops "Run All"."""

import pytest

from helpers import exercises


def is_double(function):
    assert function(2) == 4, "double of 2 is 4"


def test_empty_stub_is_skipped_visibly(capsys):
    def double(x):
        """Twice x."""
        ...

    assert exercises.check(double, is_double) is None
    assert "skipped" in capsys.readouterr().out


def test_right_wrong_and_raising(capsys):
    def right(x):
        return 2 * x

    def wrong(x):
        return x

    def raising(x):
        return x / 0

    assert exercises.check(right, is_double) is True
    assert exercises.check(wrong, is_double) is False
    assert exercises.check(raising, is_double) is False
    printed = capsys.readouterr().out
    assert "right: right" in printed and "double of 2 is 4" in printed and "ZeroDivisionError" in printed


def test_a_solution_that_rots_is_an_error():
    def wrong(x):
        return x

    with pytest.raises(AssertionError, match="does not pass its own check"):
        exercises.require(wrong, is_double)
