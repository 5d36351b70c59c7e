"""The Colab edition: plain Markdown, code that parses, nothing of MyST or nbdev left over."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import colab  # noqa: E402

CODE = re.compile(r"^([ >]*)(```|~~~).*?^\1\2\s*$|`[^`\n]+`", re.M | re.S)
LEFTOVERS = re.compile(r"\{[\w:-]+\}`|^[ >]*(`{3,}|:{3,})\{|:::|^:[\w-]+:|\\(learned|given|oftime|ofnoise)\b|^\(.+\)=$|<references>", re.M)
WHEEL = "unet_course.whl"

SAMPLE = """# Sample

> A subtitle.

Text with {cite}`ho2020denoising`, {cite:t}`nichol2021improved`, {eq}`eq-a`, {py:class}`~torch.nn.Linear`, {glue:text}`no-such-value`,
[a page](../book/notation.md), [a chapter](90_data.ipynb), [a part of it](90_data.ipynb#licence) and $\\learned{W_{\\given{x}}}\\oftime t$.

$$
a = b
$$ (eq-a)

:::{note}
Mind {math}`x`.
:::

```{exercise} Twice
:label: ex-a

Do it.

- like `{this}`
```

````{dropdown} Hint
```python
x = {1}
```
````

![A picture](../book/_static/favicon.svg)
"""
CELLS = [
    "#| default_exp sample",
    "#| hide\nimport os\nhidden = 1",
    "#| hide\nassert hidden == 1",
    "#| hide\n#| export exercises.sample\ndef check(): ...",
    "#| export\ndef visible(): return hidden",
    "#| code-fold: true\nprint(visible())",
    "#| code-fold: true\n#| code-summary: What is seen\nprint(visible())",
    "#| eval: false\n!ls",
]


def leftovers(text: str) -> list[str]:
    """MyST syntax outside of code."""
    return [m.group() for m in LEFTOVERS.finditer(CODE.sub("", text))]


@pytest.mark.parametrize("path", colab.chapters(), ids=lambda p: p.stem)
def test_edition(path):
    """Each notebook converts; what comes out is valid, plain and parses."""
    made = colab.edition(path, WHEEL)
    nbformat.validate(made)
    ids = [c.id for c in made.cells]
    assert len(ids) == len(set(ids))
    assert ids == [c.id for c in colab.edition(path, WHEEL).cells], "ids change from run to run"
    assert made.cells[0].source.startswith("# ") and made.cells[2].source.count("%pip") == 2
    for cell in made.cells:
        if cell.cell_type == "markdown":
            assert not leftovers(cell.source), cell.source
        else:
            assert not re.search(r"^\s*#\s*\|", cell.source, re.M), cell.source
            colab.statements(cell.source)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """The edition of a notebook with one of everything."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "references.bib").write_text((ROOT / "book" / "references.bib").read_text())
    parts = ["```{solution-start} ex-a\n:class: dropdown\n```\n\nBecause.", "```{solution-end}\n```\n\n## After"]
    cells = [nbformat.v4.new_markdown_cell(SAMPLE), *map(nbformat.v4.new_code_cell, CELLS)]
    cells += [nbformat.v4.new_markdown_cell(parts[0]), nbformat.v4.new_code_cell("#| solution\ny = 2"), nbformat.v4.new_markdown_cell(parts[1])]
    path = tmp_path / "nbs" / "01_sample.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    for kept in (colab.labels, colab.values):
        kept.cache_clear()
    yield colab.edition(path, WHEEL)
    for kept in (colab.labels, colab.values):
        kept.cache_clear()


def test_text(sample):
    """Each kind of syntax becomes what Colab shows."""
    text = "\n\n".join(c.source for c in sample.cells if c.cell_type == "markdown")
    assert not leftovers(text)
    for part in (
        "(Ho et al., 2020), Nichol and Dhariwal (2021), (1), `Linear`, (see the output above)",
        f"[a page]({colab.BOOK}/book/notation.html), [a chapter]({colab.COLAB}/90_data.ipynb) and".replace(" and", f", [a part of it]({colab.BOOK}/nbs/90_data.html#licence) and"),
        r"${\color{#b45309}{W_{{\color{#2468b4}{x}}}}}{\color{#0f7b5f}{t}}$",
        "$$\na = b \\tag{1}\n$$",
        "> **Note**\n>\n> Mind $x$.",
        "### Exercise 1: Twice\n\nDo it.\n\n- like `{this}`",
        "<details><summary>Hint</summary>\n\n```python\nx = {1}\n```\n\n</details>",
        f"![A picture]({colab.RAW}/main/book/_static/favicon.svg)",
        "<details><summary>Worked solution</summary>\n\nBecause.\n\n</details>",
        "## References\n\n- ",
    ):
        assert part in text


def test_code(sample):
    """Directive lines and hidden assertions go; what later cells need stays, folded."""
    sources = {c.source: c.metadata for c in sample.cells if c.cell_type == "code"}
    assert list(sources)[1:] == [
        "#@title Code behind the scenes (click to show)\nimport os\nhidden = 1",
        "def visible(): return hidden",
        "#@title Code of the figure (click to show)\nprint(visible())",
        "#@title What is seen (click to show)\nprint(visible())",
        "# The book shows this cell without running it.\n!ls",
        "#@title Worked solution (click to show)\ny = 2",
    ]
    assert [bool(m.get("cellView")) for m in sources.values()] == [True, True, False, True, True, False, True]


def test_unknown_syntax(tmp_path):
    """What the converter does not know is an error that names it."""
    for text in ("```{mermaid}\nx\n```", "{rocket}`x`"):
        with pytest.raises(ValueError, match="mermaid|rocket"):
            colab.Text("01_sample").translate(text)


def test_torch_is_left_alone():
    """The first cell installs neither torch nor anything else that Colab has."""
    install = colab.head("01_sample", WHEEL)[1].source
    assert f'--no-deps "{WHEEL}"' in install and "einops" in install
    assert not re.search("torch|numpy|matplotlib|ipywidgets", install)
