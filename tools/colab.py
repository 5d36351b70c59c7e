"""The Colab edition of the chapters: `python tools/colab.py` writes it, and the package's wheel, to _build/colab.

Colab shows plain Markdown, so MyST is translated: admonitions become quotations, hints and solutions fold, equations and
exercises get their numbers, citations and links are written out, measured values are taken from the built book. Directive
lines go, hidden assertions go, and a first cell installs what Colab lacks, leaving its torch alone. Syntax that is not
known here is an error rather than litter on a reader's screen.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import cache
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell
from packaging.requirements import Requirement
from pybtex.database import BibliographyData, parse_file
from pybtex.plugin import find_plugin

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOOK = PROJECT["urls"]["Book"].rstrip("/")
OWNER = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
COLAB = f"https://colab.research.google.com/github/{OWNER}/blob/colab"
RAW = f"https://raw.githubusercontent.com/{OWNER}"
PREINSTALLED = {"torch", "numpy", "matplotlib", "ipywidgets"}  # on Colab; never touched

DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}|:{3,})(?:\{([\w:.-]+)\})?(.*)$")
ROLE = re.compile(r"\{([A-Za-z][\w:-]*)\}`([^`]+)`|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`)", re.S)  # or code, in which braces mean nothing
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
EQUATION = re.compile(r"\$\$(.+?)\$\$(?:[ \t]*\(([\w:-]+)\))?", re.S)
COLOURED = {"learned": "learned", "given": "data", "oftime": "time", "ofnoise": "noise"}  # macro: its key in COLORS
ADMONITIONS = {"note", "tip", "warning", "important", "caution", "attention", "danger", "seealso", "hint", "admonition", "margin", "sidebar"}
FOLDED = {"dropdown", "toggle", "solution"}
TRANSPARENT = {"div", "container", "tab-set", "grid", "card", "grid-item-card", "tab-item", "epigraph", "table", "exercise-start"}
DROPPED = {"exercise-end", "tableofcontents", "contents", "index"}
PLAIN_ROLES = {"term", "download", "abbr", "sub", "sup"}
REFERENCES = "<references>"


@cache
def colours() -> dict[str, str]:
    """The shades of the book's colours."""
    from unet_course.figures import COLORS

    return {macro: COLORS[meaning] for macro, meaning in COLOURED.items()}


@cache
def bibliography() -> BibliographyData:
    """The book's references."""
    return parse_file(str(ROOT / "book" / "references.bib"))


@cache
def values() -> dict[str, str]:
    """What the chapters glued in the last build of the book, if there was one."""
    found = {}
    for file in sorted((ROOT / "_build" / "jupyter_execute").rglob("*.glue.json")):
        for name, output in json.loads(file.read_text()).items():
            found[name] = output["data"]["text/plain"].strip("'\"")
    return found


def chapters() -> list[Path]:
    """All notebooks, in the order of the book."""
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def prose(path: Path) -> str:
    """The text cells of a notebook, in one."""
    return "\n\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


@cache
def labels() -> dict[str, tuple[str, str, int]]:
    """What can be referred to: label → chapter, kind (equation or exercise), number."""
    found, count = {}, {"equation": 0, "exercise": 0}  # through the whole book, as on its pages
    for path in chapters():
        text = prose(path)
        numbered = [(m.start(), "equation", m[2]) for m in EQUATION.finditer(text) if m[2]]
        numbered += [(m.start(), "equation", m[1]) for m in re.finditer(r"\{math\}[^\n]*\n:label: *(\S+)", text)]
        numbered += [(m.start(), "exercise", m[1]) for m in re.finditer(r"\{exercise(?:-start)?\}[^\n]*\n(?::[\w-]+:[^\n]*\n)*?:label: *(\S+)", text)]
        for _, kind, label in sorted(numbered):
            count[kind] += 1
            found[label] = path.stem, kind, count[kind]
    return found


def title(stem: str) -> str:
    """The heading of a chapter."""
    return re.search(r"^# +(.+)$", prose(ROOT / "nbs" / f"{stem}.ipynb"), re.M)[1]


class Text:
    """Translates the Markdown of one chapter."""

    def __init__(self, stem: str):
        self.stem = stem
        self.cited: list[str] = []

    def translate(self, text: str) -> str:
        """MyST in, plain Markdown out."""
        out, plain, lines = [], [], text.splitlines()
        while lines:
            line = lines.pop(0)
            fence = FENCE.match(line)
            if not fence or fence[2][0] == ":" and not fence[3]:
                plain.append(line)
                continue
            out.append(self.inline("\n".join(plain)))
            plain, inside = [], []
            closing = re.compile(rf"\s*{fence[2][0]}{{{len(fence[2])},}}\s*$")
            while lines and not closing.match(lines[0]):
                inside.append(lines.pop(0).removeprefix(fence[1]))
            if lines:
                lines.pop(0)
            block = self.directive(fence[3], fence[4].strip(), inside) if fence[3] else "\n".join([fence[2] + fence[4], *inside, fence[2]])
            out.append("\n".join(fence[1] + row if row else "" for row in block.splitlines()))
        out.append(self.inline("\n".join(plain)))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()

    def directive(self, name: str, argument: str, lines: list[str]) -> str:
        """One directive, as Markdown."""
        options = {}
        if lines and lines[0].strip() == "---":
            lines[:] = [f":{row}" for row in lines[1 : lines.index("---", 1)]] + lines[lines.index("---", 1) + 1 :]
        while lines and (option := re.match(r":([\w-]+): *(.*)$", lines[0])):
            options[option[1]] = option[2]
            del lines[0]
        body = "\n".join(lines).strip("\n")
        if name in ("math", "code", "code-block", "sourcecode", "literalinclude"):
            return self.equation(body, options.get("label")) if name == "math" else f"```{argument}\n{body}\n```"
        if name in ("figure", "image"):
            picture = self.inline(f"![{options.get('alt', '')}]({argument})")
            return f"\n{picture}\n\n{self.translate(body)}\n"
        if name == "bibliography":
            return REFERENCES
        if name in DROPPED:
            return ""
        body = self.translate(body)
        if name in ("exercise", "exercise-start"):
            number = labels()[options["label"]][2]
            return f"\n### Exercise {number}{': ' + self.inline(argument) if argument else ''}\n\n{body}\n"
        if name in FOLDED or name in ADMONITIONS and "dropdown" in options.get("class", ""):
            summary = "Worked solution" if name == "solution" else self.inline(argument) or name.capitalize()
            return f"\n<details><summary>{summary}</summary>\n\n{body}\n\n</details>\n"
        if name in ADMONITIONS:
            text, head = (body, argument) if name in ("admonition", "margin", "sidebar") else (f"{self.inline(argument)}\n{body}".strip(), name.capitalize())
            quoted = f"**{self.inline(head)}**\n\n{text}" if head else text
            return "\n" + "\n".join(f"> {row}".rstrip() for row in quoted.splitlines()) + "\n"
        if name in TRANSPARENT:
            return f"\n**{self.inline(argument)}**\n\n{body}\n" if argument else f"\n{body}\n"
        raise ValueError(f"{self.stem}: the Colab edition has no translation of the directive {{{name}}}; add one to tools/colab.py")

    def inline(self, text: str) -> str:
        """Roles, equations, links and colours within a paragraph."""
        text = re.sub(r"^\([\w:-]+\)=\s*$", "", text, flags=re.M)
        text = EQUATION.sub(lambda m: self.equation(m[1], m[2]), text)
        text = ROLE.sub(lambda m: self.role(m[1], m[2]) if m[1] else m[0], text)
        text = LINK.sub(lambda m: self.link(m[1], m[2], m[3]), text)
        text = re.sub(r'(<img[^>]*\bsrc=")([^"]+)', lambda m: m[1] + self.address(m[2], picture=True), text)
        text = re.sub(r"(?<=[)\]`])\{[.#][^}`]*\}", "", text)
        return self.colour(text)

    def equation(self, body: str, label: str | None) -> str:
        """A displayed equation, with its number if it has a label."""
        tag = f" \\tag{{{labels()[label][2]}}}" if label else ""
        return f"$$\n{self.colour(body.strip())}{tag}\n$$"

    def colour(self, text: str) -> str:
        r"""`\learned{…}` and the like, as standard LaTeX."""
        for macro, shade in colours().items():
            while found := re.search(rf"\\{macro}(?![A-Za-z])", text):
                end = self.argument_end(text, found.end())
                argument = text[found.end() : end].strip()
                argument = argument[1:-1] if argument.startswith("{") else argument
                text = f"{text[: found.start()]}{{\\color{{{shade}}}{{{argument}}}}}{text[end:]}"
        return text

    @staticmethod
    def argument_end(text: str, start: int) -> int:
        """Where the TeX argument that starts here ends: a group in braces, a command, or one character."""
        if text[start] != "{":
            return start + re.match(r"\s*(\\[A-Za-z]+|.)", text[start:]).end()
        depth = 0
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return i + 1
        raise ValueError(f"unbalanced braces: {text[start - 12 : start + 40]!r}")

    def role(self, name: str, content: str) -> str:
        """One role, as Markdown."""
        shown, target = re.fullmatch(r"(?:(.*?)\s*<)?([^<>]+)>?", content, re.S).groups() if "<" in content else (None, content)
        if name.startswith("glue"):
            return self.value(content)
        if name.startswith("cite"):
            return self.citation([k.strip() for k in content.split(",")], textual=name == "cite:t")
        if name in ("eq", "ref", "numref", "doc"):
            return self.reference(target.strip(), shown)
        if name == "math":
            return f"${content}$"
        if name.startswith("py:") or name in ("class", "func", "meth", "mod", "attr", "code", "kbd"):
            return f"`{shown or (target.rpartition('.')[2] if target.startswith('~') else target)}`"
        if name in PLAIN_ROLES:
            return shown or target
        raise ValueError(f"{self.stem}: the Colab edition has no translation of the role {{{name}}}; add one to tools/colab.py")

    def value(self, content: str) -> str:
        """A measured value, from the book's own run."""
        name, _, form = content.partition(":")
        if name not in values():
            return "(see the output above)"
        return format(float(values()[name]), form) if form else values()[name]

    def citation(self, keys: list[str], textual: bool) -> str:
        """Authors and year; the keys are noted for the list of references."""
        found = []
        for key in keys:
            if key not in bibliography().entries:
                raise ValueError(f"{self.stem}: {key} is not in book/references.bib")
            entry = bibliography().entries[key]
            names = [" ".join(person.prelast_names + person.last_names).replace("{", "").replace("}", "") for person in entry.persons["author"]]
            names = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
            found.append(f"{names} ({entry.fields['year']})" if textual else f"{names}, {entry.fields['year']}")
            self.cited += [key] * (key not in self.cited)
        return ", ".join(found) if textual else f"({'; '.join(found)})"

    def reference(self, label: str, shown: str | None) -> str:
        """The number of an equation or exercise, or a link to the book."""
        if label in labels():
            stem, kind, number = labels()[label]
            text = shown or (f"({number})" if kind == "equation" else f"Exercise {number}")
            return text if stem == self.stem else f"{text} of [{title(stem)}]({COLAB}/{stem}.ipynb)"
        return f"[{shown or label}]({BOOK}/nbs/{self.stem}.html#{label})"

    def link(self, picture: str, text: str, target: str) -> str:
        """A link or a picture with its address written out."""
        notebook = Path(target.partition("#")[0])
        if not text and notebook.suffix == ".ipynb":
            text = title(notebook.stem)
        return f"{picture}[{text}]({self.address(target, bool(picture))})"

    def address(self, target: str, picture: bool = False) -> str:
        """Where something that the chapter links to is found from Colab."""
        if re.match(r"[a-z]+:", target):
            return target
        file, _, fragment = target.partition("#")
        where = (ROOT / "nbs" / file).resolve().relative_to(ROOT) if file else Path("nbs") / f"{self.stem}.html"
        if picture:
            return f"{RAW}/main/{where}"
        if where.suffix == ".ipynb" and not fragment:
            return f"{COLAB}/{where.name}"
        return f"{BOOK}/{where.with_suffix('.html')}{'#' + fragment if fragment else ''}"

    def references(self) -> str:
        """The list of what was cited."""
        style, backend = find_plugin("pybtex.style.formatting", "plain")(), find_plugin("pybtex.backends", "markdown")()
        entries = style.format_bibliography(bibliography(), self.cited)
        return "\n".join("- " + " ".join(entry.text.render(backend).split()) for entry in entries)


def directives(source: str) -> tuple[dict[str, str], str]:
    """The leading `#|` lines of a code cell, and the rest."""
    lines, found = source.splitlines(), {}
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[2]
        del lines[0]
    return found, "\n".join(lines).strip("\n")


@cache
def statements(source: str) -> list[ast.stmt]:
    """The cell's statements, magics translated as IPython does."""
    magic = re.search(r"^\s*[%!]|[?]$", source, re.M)
    return ast.parse(TransformerManager().transform_cell(source) if magic else source).body


def bound(node: ast.AST) -> set[str]:
    """Names that a statement gives a value."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    found = {(a.asname or a.name).partition(".")[0] for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    return found | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def needed(source: str, later: list[str]) -> bool:
    """Whether later cells use a name that this one binds, before they bind it themselves."""
    pending = set().union(*map(bound, statements(source)), set())
    for cell in later:
        for statement in statements(cell):
            if pending & {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}:
                return True
            pending -= bound(statement)
    return False


def code(cells: list, solutions: set[str]) -> dict[str, tuple[str, str | None, bool]]:
    """The code cells that stay: id → source, title if folded, whether the book runs it."""
    kept: dict[str, tuple[str, str | None, bool]] = {}
    for cell in reversed(cells):
        marks, source = directives(cell.source)
        if not source or marks.get("export", "").startswith("exercises."):
            continue
        if "hide" in marks and not needed(source, [s for s, _, _ in reversed(kept.values())]):
            continue
        fold = None
        if "solution" in marks or cell.id in solutions:
            fold = "Worked solution (click to show)"
        elif "hide" in marks or marks.get("echo") == "false":
            fold = "Code behind the scenes (click to show)"
        elif marks.get("code-fold") == "true":
            fold = f"{marks.get('code-summary', 'Code of the figure')} (click to show)"
        kept[cell.id] = source, fold, marks.get("eval") != "false"
    return kept


def code_cell(cell_id: str, source: str, fold: str | None, runs: bool):
    """A code cell for Colab; a folded one is a form that shows its title."""
    if not runs:
        source = "# The book shows this cell without running it.\n" + source
    if not fold or source.startswith("%%"):
        return new_code_cell(source, id=cell_id, metadata={} if runs else {"tags": ["skip-execution"]})
    return new_code_cell(f"#@title {fold}\n{source}", id=cell_id, metadata={"cellView": "form"})


def head(stem: str, wheel: str) -> list:
    """The note and the installation that come right after the title."""
    extra = " ".join(f'"{r}"' for r in PROJECT["dependencies"] if Requirement(r).name not in PREINSTALLED)
    note = (
        f"*The Colab edition of a chapter of [a free book]({BOOK}); [its page there]({BOOK}/nbs/{stem}.html) shows every figure already drawn. "
        "Here you can run and change everything. Run the next cell first; it leaves Colab's own torch as it is. "
        "A CPU runtime is enough.*"
    )
    install = f'#@title Install the package of the course\n%pip install -q --no-deps "{wheel}"\n%pip install -q {extra}'
    return [new_markdown_cell(note, id="colab-note"), new_code_cell(install, id="colab-install", metadata={"cellView": "form"})]


def edition(path: Path, wheel: str) -> nbformat.NotebookNode:
    """The Colab edition of one notebook."""
    source = nbformat.read(path, as_version=4)
    text, cells, inside, solutions = Text(path.stem), [], False, set()
    for cell in source.cells:
        if cell.cell_type == "code":
            solutions |= {cell.id} if inside else set()
            cells.append(cell)
            continue
        for i, part in enumerate(re.split(r"(?m)^[`:]{3,}\{(solution-(?:start|end)[^`:]*?(?:\n:[^\n]*)*)\n+[`:]{3,} *$", cell.source)):
            if i % 2:
                inside = part.startswith("solution-start")
            elif translated := text.translate(part):
                if inside:
                    translated = f"<details><summary>Worked solution</summary>\n\n{translated}\n\n</details>"
                cells.append(new_markdown_cell(translated, id=f"{cell.id}-{i // 2}" if i else cell.id))
    kept = code([c for c in cells if c.cell_type == "code"], solutions)
    cells = [code_cell(c.id, *kept[c.id]) if c.cell_type == "code" else c for c in cells if c.cell_type == "markdown" or c.id in kept]
    opening = re.match(r"# .+\n*(?:>.*\n*)*", cells[0].source)
    rest = cells[0].source[opening.end() :].strip()
    cells[:1] = [new_markdown_cell(opening[0].strip(), id=cells[0].id), *head(path.stem, wheel), *([new_markdown_cell(rest, id=f"{cells[0].id}-rest")] if rest else [])]
    if text.cited and not any(REFERENCES in c.source for c in cells):
        cells.append(new_markdown_cell(f"## References\n\n{REFERENCES}", id="colab-references"))
    for cell in cells:
        if REFERENCES in cell.source:
            cell.source = cell.source.replace(REFERENCES, text.references())
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "colab": {"provenance": [], "toc_visible": True}}
    made = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(made)
    return made


def build_wheel(folder: Path) -> Path:
    """Build the package's wheel from a copy of the sources, so that nothing stale gets in."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "project"
        shutil.copytree(ROOT / "unet_course", copy / "unet_course", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, copy], check=True)
    return next(folder.glob("unet_course-*.whl"))


def main() -> None:
    """Write the editions, and the wheel unless another one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all, if none is named")
    parser.add_argument("--wheel", help="what the first cell installs; the wheel beside the notebooks on the branch `colab` if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "colab")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    wheel = options.wheel or f"{RAW}/colab/{build_wheel(options.out).name}"
    for path in options.notebooks or chapters():
        nbformat.write(edition(path.resolve(), wheel), options.out / path.name)
    print(f"{len(list(options.out.glob('*.ipynb')))} notebooks in {options.out}")


if __name__ == "__main__":
    main()
