"""The README promises nothing that is not there: imports, commands, targets, links."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import unet_course
from unet_course.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [line.partition(" # ")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_imports_and_calls():
    """Each name of its code is offered by the package, and each call has arguments that the function takes."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    tree = ast.parse(code)
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    assert imported and all(hasattr(unet_course, name) for name in imported)
    takes = {"model": unet_course.TextToImage.forward, "sd": unet_course.StableDiffusion.forward, "load_stable_diffusion": unet_course.load_stable_diffusion, "write_picture": unet_course.write_picture}
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert {node.func.id for node in called} == set(takes)
    for node in called:
        signature, self = inspect.signature(takes[node.func.id]), [None] * (node.func.id in ("model", "sd"))
        signature.bind(*self, *node.args, **{word.arg: word.value for word in node.keywords})


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("unet-course")])
def test_commands(line):
    """The command line understands each of its lines."""
    command, *arguments = shlex.split(line)[1:]
    typer.main.get_command(app).commands[command].make_context(command, arguments)


def test_targets():
    """Each `make` is in the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z-]+)", "\n".join([*LINES, *re.findall(r"`(make [a-z-]+)`", README)]))) <= targets


def test_links():
    """Each file that it links to or shows exists."""
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert linked and all((ROOT / target).exists() for target in linked)
