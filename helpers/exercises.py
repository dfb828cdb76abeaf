"""Check cells of exercises: right, what is wrong, or not filled in yet."""

import ast
import inspect
import textwrap
from collections.abc import Callable

from helpers import progress


def check(function: Callable, test: Callable[[Callable], None]) -> bool | None:
    """Run `test(function)` and say how it went; returns True when right, False when wrong, None when the stub is still empty.

    A wrong answer never stops "Run All": the message says what is wrong. `test` raises AssertionError with a hint. What is right is
    kept as the reader's progress.
    """
    right = _judge(function, test)
    if right:
        progress.add_exercise(_source(test))
    return right


def require(function: Callable, test: Callable[[Callable], None]) -> None:
    """As `check`, but a wrong or empty answer raises: for solution cells, so that a solution cannot rot unnoticed."""
    if _judge(function, test) is not True:
        raise AssertionError(f"the solution of {function.__name__} does not pass its own check")


def _judge(function, test):
    name = getattr(function, "__name__", type(function).__name__)
    if _is_stub(function):
        print(f"⏭  {name}: not filled in yet, skipped. Replace the `...` and run this cell again.")
        return None
    try:
        test(function)
    except AssertionError as error:
        print(f"✗  {name}: {error or 'not right yet'}")
        return False
    except Exception as error:
        print(f"✗  {name} stopped with {type(error).__name__}: {error}")
        return False
    print(f"✓  {name}: right.")
    return True


def _source(function):
    """Source text of a function, empty where Python does not know it."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""


def _is_stub(function):
    """True if the body is only a docstring and `...`."""
    try:
        tree = ast.parse(_source(function))
    except SyntaxError:
        return False
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):  # a lambda, say
        return False
    body = [
        node for node in tree.body[0].body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return not body
