"""The package as a whole: imports follow the table of contents, modules stand alone, everything is documented and in step."""

import ast
import filecmp
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
from fastcore.docments import docments
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unet_course"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE.rglob("[a-z]*.py"))
CHAPTER_MODULES = [m for m in MODULES if "exercises" not in m]
LONGEST_CELL = 40  # lines of code
LONG_CELLS = {"ResBlock", "ResnetBlock", "SpatialTransformer", "Model", "UNetModel", "UNetND", "Schedule", "Trainer", "AutoencoderKL", "Tokenizer", "CLIPTextModel", "TextToImage", "StableDiffusion"}  # classes that grew in view and are then shown whole
ASIDE = re.compile(r"^#\| *(hide|code-fold|export exercises)", re.M)  # cells that the page does not show open
HEAVY = ("accelerate", "matplotlib", "IPython", "diffusers", "transformers", "nbdev", "fastcore", "typer", "PIL", "tokenizers")


@cache
def code_cells(path: Path) -> tuple[str, ...]:
    """The sources of a notebook's code cells."""
    return tuple(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def parse(source: str) -> ast.Module:
    """A cell's code, magics translated as IPython does."""
    return ast.parse(TransformerManager().transform_cell(source))


@cache
def homes() -> dict[str, int]:
    """Module → the number of the chapter that exports it."""
    found = {}
    for path in NOTEBOOKS:
        for source in code_cells(path):
            for name in re.findall(r"^#\| *(?:default_exp|export) +([\w.]+)", source, re.M):
                found[f"unet_course.{name}"] = int(path.name[:2])
    return found


@cache
def names() -> dict[str, str]:
    """Public name → the module that is its home."""
    return {name: module for module in CHAPTER_MODULES for name in importlib.import_module(module).__all__}


def imported(tree: ast.AST, package: str) -> set[str]:
    """The course's modules that some code imports; `package` is what a leading dot means."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            for name in (a.name for a in node.names):
                inner = f"{module}.{name}"
                found.add(inner if inner in MODULES else names().get(name, module) if module == "unet_course" else module)
    return {m for m in found if m in homes()}


def too_late(found: set[str], chapter: int, own: bool) -> set[str]:
    """Imports of what comes later in the book; 00 is free, appendices serve every chapter, a checker may use its own chapter."""
    if chapter == 0:
        return set()
    latest = {m: chapter if own or "exercises" in m else chapter - 1 for m in found}
    return {m for m in found if latest[m] < homes()[m] < 90}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_import_from_earlier_chapters(path):
    """The table of contents is the import graph: cells."""
    for source in code_cells(path):
        late = too_late(imported(parse(source), "unet_course"), int(path.name[:2]), own="exercises." in source.partition("\n\n")[0])
        assert not late, f"{sorted(late)} imported in:\n{source}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"unet_course.exercises.__init__"}))
def test_modules_import_from_earlier_chapters(module):
    """The table of contents is the import graph: modules."""
    found = imported(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()), module.rpartition(".")[0])
    assert not too_late(found, homes()[module], own="exercises" in module)


FORKS = """
import os, sys, torch

for module in sys.argv[1:]:
    sys.stdout.flush()
    if not os.fork():
        __import__(module)
        print(module, *[tool for tool in ("nbdev", "fastcore", "myst_nb") if tool in sys.modules], flush=True)
        os._exit(0)
    os.wait()
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, outside the repository."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/")


def test_each_module_imports_alone():
    """Each in a process of its own that has imported nothing but torch; silently, and with none of the book's tools."""
    done = run(FORKS, *MODULES)
    assert done.stderr == ""
    assert done.stdout.split("\n") == [*MODULES, ""]


def test_package_imports_light():
    """`import unet_course` and `dir` of it wait for nothing, not even for torch; all its names together bring in nothing heavy beside torch."""
    found = f"print(*[m for m in {HEAVY} if m in sys.modules])"
    done = run(f"import sys, unet_course; dir(unet_course); print('torch' in sys.modules); from unet_course import *; {found}")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["False"], "")


def test_package_offers_what_its_stub_says():
    """Each name of `__init__.pyi` is the thing of that name in the module that it is listed under; every module of the course is among them."""
    listed = [(node.module, names) for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body if isinstance(node, ast.ImportFrom) for names in node.names]
    assert all(name.asname == name.name for _, name in listed), "`as`: a name that others may import"
    package = importlib.import_module("unet_course")
    for module, name in listed:
        home = f"unet_course.{module}" if module else "unet_course"
        wanted = getattr(importlib.import_module(home), name.name) if module else importlib.import_module(f"{home}.{name.name}")
        assert getattr(package, name.name) is wanted
    assert {name.name for module, name in listed if not module} == {m.rpartition(".")[2] for m in CHAPTER_MODULES} - {"cli", "figures"}
    assert set(package.__all__) == {name.name for _, name in listed}
    with pytest.raises(AttributeError, match="attribute Unet"):
        package.Unet


def test_one_home():
    """Every class and every public function is defined once."""
    found: dict[str, list[str]] = {}
    for module in CHAPTER_MODULES:
        for node in ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def undocumented(name: str, function) -> list[str]:
    """Parameters without annotation, or with neither a comment nor a shape in the annotation."""
    comments = {k: v for k, v in docments(function, full=False).items() if v}
    missing = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.annotation is parameter.empty:
            missing.append(f"{name}({parameter.name}): no annotation")
        elif parameter.name not in comments and "jaxtyping" not in repr(parameter.annotation):
            missing.append(f"{name}({parameter.name}): no comment")
    return missing


@pytest.mark.parametrize("module", CHAPTER_MODULES)
def test_documented(module):
    """Every public function, class and `forward` has a docstring; every parameter an annotation and a comment or a shape."""
    missing = []
    for name in importlib.import_module(module).__all__:
        thing = getattr(importlib.import_module(module), name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        parts = {name: thing}
        if inspect.isclass(thing):
            parts = {f"{name}.{k}": v for k, v in vars(thing).items() if inspect.isfunction(v) and not k.startswith("_")}
            missing += [] if (vars(thing).get("__doc__") or "").strip() else [f"{name}: no docstring"]
            if "__init__" in vars(thing) and not hasattr(thing, "__dataclass_fields__"):
                missing += undocumented(name, thing.__init__)
        for part, function in parts.items():
            missing += [] if (function.__doc__ or "").strip() else [f"{part}: no docstring"]
            missing += undocumented(part, function)
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_plt_show(path):
    """Figures are shown by `show`, which asks for a description and follows the page's theme."""
    assert not [source for source in code_cells(path) if "plt.show(" in source]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    """No cell is longer than a reader takes in at once."""
    for source in code_cells(path):
        if ASIDE.search(source):
            continue
        lines = [line for line in source.splitlines() if line.strip() and not re.match(r"\s*#\s*\|", line)]
        defined = {node.name for node in parse(source).body if isinstance(node, ast.ClassDef)}
        assert len(lines) <= LONGEST_CELL or defined & LONG_CELLS, f"{len(lines)} lines:\n{source}"


def test_notebooks_clean_and_package_in_sync(tmp_path):
    """Cleaning and exporting a copy changes nothing."""
    for folder in ("nbs", "unet_course", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(tmp_path, tmp_path / "before")
    subprocess.run([Path(sys.executable).with_name("nbdev-clean")], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "tools/export.py"], cwd=tmp_path, check=True)
    files = {p.relative_to(tmp_path) for folder in ("nbs", "unet_course") for p in (tmp_path / folder).rglob("*") if p.is_file()}
    before = {p.relative_to(tmp_path / "before") for folder in ("nbs", "unet_course") for p in (tmp_path / "before" / folder).rglob("*") if p.is_file()}
    changed = sorted(str(f) for f in files | before if f not in files & before or not filecmp.cmp(tmp_path / f, tmp_path / "before" / f, shallow=False))
    assert not changed, f"run `make check`; out of step: {changed}"


@pytest.mark.slow
def test_wheel(tmp_path):
    """The wheel holds the package, its data and all licences, and nothing else."""
    sys.path.insert(0, str(ROOT / "tools"))
    from colab import build_wheel

    with ZipFile(build_wheel(tmp_path)) as wheel:
        inside = {name for name in wheel.namelist() if not name.endswith("/")}
        metadata = wheel.read(next(n for n in inside if n.endswith("METADATA"))).decode()
    package = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in inside if ".dist-info/" not in n} == package
    assert "unet_course/py.typed" in inside and "unet_course/assets/digits.npz" in inside
    licences = {Path(n).name for n in inside if "/licenses/" in n}
    assert licences == {"LICENSE", *(p.name for p in (PACKAGE / "assets").glob("*.LICENSE.txt"))}
    assert "Requires-Dist: torch>=2.9\n" in metadata


def test_directives_of_a_cell():
    """The book's extension turns `#|` lines into tags, and `code-summary` into the words on a fold."""
    spec = importlib.util.spec_from_file_location("nbdev_notebooks", ROOT / "book/_ext/nbdev_notebooks.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    cell = nbformat.v4.new_code_cell("#| code-fold: true\n#| code-summary: The race\n#| export\n\nx = 1  #| no directive\n")
    extension.convert(cell)
    assert cell.source == "x = 1  #| no directive" and cell.metadata["tags"] == ["hide-input", "export"]
    assert cell.metadata["mystnb"] == {"code_prompt_show": "Show: The race", "code_prompt_hide": "Hide: The race"}
