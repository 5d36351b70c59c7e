"""Edit chapters as text: `pull` a notebook into .nbtext/NAME.md, edit it, `push` it back.

    python tools/notebook.py pull 03_residual_blocks     # nbs/03_….ipynb -> .nbtext/03_….md
    python tools/notebook.py push 03_residual_blocks     # back, then cleaned and exported
    python tools/notebook.py run  03_residual_blocks     # execute it alone in an empty folder

The notebook is the source; the text file is a convenience that git ignores. A push keeps the ids of
cells that did not change, so the diff of a notebook stays as small as the edit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / ".nbtext"
BIN = Path(sys.executable).parent


def jupytext(*arguments: str | Path) -> None:
    """Run jupytext quietly."""
    subprocess.run([BIN / "jupytext", "--quiet", *arguments], check=True, cwd=ROOT)


def pull(name: str) -> None:
    """Write the notebook's text to .nbtext."""
    TEXT.mkdir(exist_ok=True)
    jupytext("--to", "md:myst", "--output", TEXT / f"{name}.md", ROOT / "nbs" / f"{name}.ipynb")


def push(name: str) -> None:
    """Write the text back into the notebook, clean it and export its module."""
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    keep_ids = ["--update"] if notebook.exists() else []
    jupytext("--to", "ipynb", *keep_ids, "--output", notebook, TEXT / f"{name}.md")
    subprocess.run([BIN / "nbdev-clean", "--fname", notebook], check=True, cwd=ROOT)
    subprocess.run([sys.executable, ROOT / "tools" / "export.py", notebook], check=True, cwd=ROOT)


def run(name: str) -> None:
    """Execute the notebook alone, in a folder that holds nothing but it, and say how long each slow cell took."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}})
        start = time.time()
        try:
            client.execute(env={**os.environ, "PYTHONPATH": ""})
        finally:
            out = TEXT / f"{name}.executed.ipynb"
            TEXT.mkdir(exist_ok=True)
            nbformat.write(notebook, out)
        print(f"{name}: {time.time() - start:.0f} s, outputs in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pull", "push", "run"])
    parser.add_argument("name", help="the notebook's name without its ending")
    options = parser.parse_args()
    {"pull": pull, "push": push, "run": run}[options.action](options.name)
