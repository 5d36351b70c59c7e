"""Draw the README's picture from the built book: the animation of chapter 00, one moment a row, noise at the top."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CELL = 30  # pixels of a digit with its margin
ROWS = 8


def main() -> None:
    """Write book/_static/preview.png."""
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
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(ROOT / "book/_static/preview.png", optimize=True)


if __name__ == "__main__":
    main()
