"""Draw the two pictures of the README: `preview` from the built chapter 00, `results` from the models that ship with the course."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import nbformat
import typer
from PIL import Image

from unet_course.latent_diffusion import TextToImage

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book/_static"
CELL = 30  # pixels of a digit with its margin
ROWS = 8
PROMPTS = {
    "shapes": ["a large red circle", "a small blue cross", "a large green ring at the bottom left", "a large blue square above a small yellow circle", "a small red ring left of a large green triangle", "a large magenta diamond"],
    "emoji": ["red heart, noto", "grinning face, fluent", "cat face, noto", "dog face, fluent", "red apple, twemoji", "watermelon, noto"],
}

app = typer.Typer(help=__doc__)


@app.command()
def preview() -> None:
    """The animation of chapter 00, one moment a row, noise at the top: book/_static/preview.png."""
    notebook = nbformat.read(ROOT / "_build/jupyter_execute/nbs/00_five_minutes.ipynb", as_version=4)
    pages = [output.data["text/html"] for cell in notebook.cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]
    (animation,) = (page for page in pages if "what we hold" in page)
    frames = animation.split('<div class="frame"')[1:]
    chosen = [frames[round(i * (len(frames) - 1) / (ROWS - 1))] for i in range(ROWS)]
    pictures = [Image.open(BytesIO(b64decode(re.search(r"data:image/png;base64,([^\"]+)", frame)[1]))).convert("L") for frame in chosen]
    strips = [picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if "scale(1 -1)" in frame else picture for picture, frame in zip(pictures, chosen)]
    sheet = Image.new("L", (strips[0].width, CELL * ROWS))
    for row, strip in enumerate(strips):
        sheet.paste(strip.crop((0, 0, strip.width, CELL)), (0, CELL * row))
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(STATIC / "preview.png", optimize=True)


@app.command()
def results() -> None:
    """A walk from noise to a drawing, and drawings with their prompts, seeds 0 to 5 as they come: book/_static/results.png."""
    models = {name: TextToImage.from_pretrained(name) for name in PROMPTS}
    walk = [step.x for step in models["shapes"].steps(["a large red circle at the top left"])]
    rows = [[(models["shapes"].decode(walk[i])[0], f"step {i + 1}") for i in (0, 2, 4, 7, 12, 19)]]
    rows += [list(zip(models[name](prompts), prompts)) for name, prompts in PROMPTS.items()]
    fig, axes = plt.subplots(3, 6, figsize=(9, 5.4), layout="constrained")
    for ax, (picture, label) in zip(axes.flat, sum(rows, [])):
        ax.imshow(((picture + 1) / 2).permute(1, 2, 0).clamp(0, 1))
        ax.set_axis_off()
        ax.text(0.5, -0.05, fill(label, 22), transform=ax.transAxes, ha="center", va="top", fontsize=8)
    fig.savefig(STATIC / "results.png", dpi=130)


if __name__ == "__main__":
    app()
