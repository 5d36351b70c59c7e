"""Export the notebooks with nbdev: `python tools/export.py` for all of them, or name some.

The same as `nbdev-export`, with one difference: a cell marked `#| export exercises.NAME` starts the module
`unet_course/exercises/NAME.py` afresh, where nbdev would append to it on every run. A stale module, whose
notebook is gone, is removed.
"""

import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export
from nbdev.maker import ModuleMaker

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unet_course"


class Maker(ModuleMaker):
    """Writes each module anew: here no module is fed by two notebooks."""

    def __init__(self, dest, name, nb_path, is_new=True, **kwargs):
        (Path(dest) / name.replace(".", "/")).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(dest, name, nb_path, is_new=True, **kwargs)


def export(notebooks: list[Path]) -> None:
    """Export some notebooks and bring nbdev's index up to date."""
    for notebook in notebooks:
        nb_export(notebook, lib_path=get_config().lib_path, mod_maker=Maker)
    _build_modidx()


if __name__ == "__main__":
    chosen = [Path(p).resolve() for p in sys.argv[1:]]
    if not chosen:
        for module in [*PACKAGE.glob("*.py"), *PACKAGE.glob("exercises/*.py")]:
            if module.name not in ("__init__.py", "_modidx.py"):
                module.unlink()
    export(chosen or sorted((ROOT / "nbs").glob("[0-9]*.ipynb")))
