"""Public functions say what they take and what they return, and in words what they do: notebooks show them, and editors read them."""

import ast

import pytest
from conftest import ROOT

# Every module of the package. The errors of `diagnosis/catalogue` and the failures of `diagnosis/reproductions` are data: they have
# no public functions, but the modules beside them that find, provoke and repair them do.
PUBLIC = sorted((ROOT / "helpers").rglob("*.py"))


def public(tree):
    """(name, node, is a method) of each public function, of public classes too."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield f"{node.name}.{inner.name}", inner, True


def bare(node, method):
    """Parameters of a function without a type, and "return" where that has none."""
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)
    places = [*node.args.posonlyargs, *node.args.args][method and not static :]
    places += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    missing = [place.arg for place in places if place.annotation is None]
    return missing + ["return"] * (node.returns is None and node.name != "__init__")


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT / "helpers")))
def test_public_functions_are_annotated(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {name: bare(node, method) for name, node, method in public(tree) if bare(node, method)} == {}


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT / "helpers")))
def test_public_functions_have_docstrings(path):
    """A patch of an archived package says in its decorator what it assumed and what is true; an `__init__` is told in its class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = [
        name
        for name, node, _ in public(tree)
        if not ast.get_docstring(node)
        and node.name != "__init__"
        and not any("patch(" in ast.unparse(each) for each in node.decorator_list)
    ]
    assert silent == []


def test_the_search_finds_what_it_looks_for():
    tree = ast.parse(
        "def f(a, *b, c: int = 1, **d): ...\nclass K:\n    def m(self, e) -> int: ...\n    def _p(self, x): ..."
    )
    assert {name: bare(node, method) for name, node, method in public(tree)} == {
        "f": ["a", "b", "d", "return"],
        "K.m": ["e"],
    }
