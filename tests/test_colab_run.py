"""Every Colab edition runs outside the repository, with the libraries that Colab has and the built wheel, and no others."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import colab  # noqa: E402

TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
PREINSTALLED = [TORCH, "numpy", "matplotlib", "ipywidgets==7.7.1", "ipykernel"]  # no diffusers, no tools of the book

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with an environment like Colab's, its kernel and the package's wheel."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PREINSTALLED], check=True)
    subprocess.run([python, "-m", "ipykernel", "install", "--prefix", folder, "--name", "colab"], check=True)
    colab.build_wheel(folder)
    return folder


@pytest.mark.parametrize("path", colab.chapters(), ids=lambda p: p.stem)
def test_runs(path: Path, place: Path, tmp_path: Path, monkeypatch):
    """From the installation in its first cell to its last cell, in an empty folder; torch stays as it was."""
    monkeypatch.setenv("JUPYTER_PATH", str(place / "share" / "jupyter"))
    (wheel,) = place.glob("*.whl")
    notebook = colab.edition(path, str(wheel))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    client = NotebookClient(notebook, kernel_name="colab", timeout=900, resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)
    outputs = [o for c in notebook.cells if c.cell_type == "code" and c.id != "colab-install" for o in c.outputs]
    assert not [o.text for o in outputs if o.get("name") == "stderr"]
    show = [place / "venv" / "bin" / "python", "-c", "import torch, unet_course; print(torch.__version__, unet_course.__file__)"]
    version, file = subprocess.run(show, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert version.startswith(TORCH.removeprefix("torch==")) and file.startswith(str(place))
