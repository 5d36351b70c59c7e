"""Exercises: solutions pass, stubs do not, and wrong answers are told what is wrong with them."""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def marked_cells():
    """All stub and solution cells: chapter, the mark, the source, and the chapter's import statements."""
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        sources = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        imports = []
        for source in sources:
            if not source.lstrip().startswith(("%", "!")) and "#| eval: false" not in source:
                imports += [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        number = 0
        for source in sources:
            for mark in ("stub", "solution"):
                if f"#| {mark}" in source.splitlines()[:3]:
                    number += mark == "stub"
                    yield pytest.param(mark, source, imports, id=f"{path.stem}-{mark}{number}")


@pytest.mark.parametrize(("mark", "source", "imports"), marked_cells())
def test_cell(mark, source, imports):
    """A solution satisfies its checker; a stub is told that it is not done."""
    *body, last = ast.parse(source).body
    assert isinstance(last, ast.Expr), "the cell must end with its check_…(…) call"
    names = {}
    exec(compile(ast.Module(imports + body, []), "cell", "exec"), names)
    feedback = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    assert feedback.passed == (mark == "solution"), feedback
    assert "raised" not in feedback.message, feedback


def wrong_answers():
    """The table of each chapter in tests/exercises."""
    for path in sorted(Path(__file__).with_name("exercises").glob("[a-z]*.py")):
        spec = importlib.util.spec_from_file_location(f"wrong_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for i, (check, arguments, diagnosis) in enumerate(module.WRONG):
            yield pytest.param(check, arguments, diagnosis, id=f"{path.stem}-{check.__name__}-{i}")


@pytest.mark.parametrize(("check", "arguments", "diagnosis"), wrong_answers())
def test_wrong(check, arguments, diagnosis):
    """A wrong answer fails with the diagnosis meant for it."""
    feedback = check(*arguments)
    assert not feedback.passed, feedback
    assert diagnosis.lower() in feedback.message.lower(), feedback


def test_every_exercise_has_wrong_answers():
    """At least two for each checker that the chapters export."""
    count = {}
    for param in wrong_answers():
        count[param.values[0].__name__] = count.get(param.values[0].__name__, 0) + 1
    for path in (ROOT / "unet_course" / "exercises").glob("[a-z]*.py"):
        module = importlib.import_module(f"unet_course.exercises.{path.stem}")
        for name in (n for n in module.__all__ if n.startswith("check_")):
            assert count.get(name, 0) >= 2, f"{name} has {count.get(name, 0)} wrong answers in tests/exercises"
