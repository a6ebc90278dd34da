"""The exception tree is as its docstring draws it."""

import inspect

import pytest

from pyengine import errors


def test_all_lists_every_exception():
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value)]
    assert sorted(classes) == sorted(errors.__all__) == errors.__all__


def test_every_error_is_caught_as_pyengine_error():
    for name in errors.__all__:
        with pytest.raises(errors.PyEngineError, match="one sentence"):
            raise getattr(errors, name)("one sentence")


def test_value_errors_are_those_the_docstring_says():
    drawn = {
        line.split()[1]
        for line in errors.__doc__.splitlines()
        if line.strip().startswith(("├", "└")) and "(ValueError)" in line
    }
    assert drawn == {name for name in errors.__all__ if issubclass(getattr(errors, name), ValueError)}
    assert len(drawn) == 4


def test_the_docstring_names_every_error():
    assert all(name in errors.__doc__ for name in errors.__all__)
