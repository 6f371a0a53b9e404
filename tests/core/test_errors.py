"""Exit codes are part of the contract with scripts that call lorakit."""

import pytest

from lorakit.core import errors


def test_exit_codes_are_the_documented_ones():
    assert errors.InputError("x").exit_code == 2
    assert errors.DivergedError("x").exit_code == 3
    assert errors.StorageError("x").exit_code == 4
    assert errors.InterruptedRun("x", signal_number=2).exit_code == 130
    assert errors.InterruptedRun("x", signal_number=15).exit_code == 143


def test_an_input_error_lists_all_problems():
    error = errors.InputError(["a is wrong", "b is wrong"])
    assert error.problems == ["a is wrong", "b is wrong"]
    assert str(error) == "a is wrong\nb is wrong"
    assert errors.InputError("alone").problems == ["alone"]


def test_an_input_error_without_a_problem_is_a_bug():
    with pytest.raises(AssertionError):
        errors.InputError([])


def test_all_are_caught_as_one():
    kinds = [getattr(errors, name) for name in dir(errors) if isinstance(getattr(errors, name), type)]
    raised = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(raised) >= 6
    assert all(issubclass(kind, errors.LorakitError) for kind in raised)
