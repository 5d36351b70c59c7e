"""Put MathJax and the widget manager beside the book, so that its pages ask no other host for them."""

import shutil
import tempfile
from pathlib import Path

from registry import fetch

VENDOR = Path(__file__).resolve().parents[1] / "book" / "_static" / "vendor"


def main() -> None:
    """Replace book/_static/vendor."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mathjax = fetch("mathjax@3.2.2", "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09", folder / "mathjax")
        widgets = fetch("@jupyter-widgets/html-manager@1.0.15", "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638", folder / "widgets")
        shutil.rmtree(VENDOR, ignore_errors=True)
        (VENDOR / "mathjax").mkdir(parents=True)
        (VENDOR / "html-manager").mkdir()
        (VENDOR / "mathjax/input/tex/extensions").mkdir(parents=True)
        shutil.copy(mathjax / "es5/input/tex/extensions/html.js", VENDOR / "mathjax/input/tex/extensions")  # \\class
        for name in ("es5/tex-mml-chtml.js", "LICENSE"):
            shutil.copy(mathjax / name, VENDOR / "mathjax")
        shutil.copytree(mathjax / "es5/output/chtml/fonts/woff-v2", VENDOR / "mathjax/output/chtml/fonts/woff-v2")
        for file in [widgets / "dist/embed.js", widgets / "dist/embed.js.LICENSE.txt", *widgets.glob("dist/*.woff2")]:
            shutil.copy(file, VENDOR / "html-manager")


if __name__ == "__main__":
    main()
