"""Lighthouse's scores of some pages of the built site: `python tools/lighthouse.py [PAGE …]`; reported, not a gate.

The site is served with gzip and caching headers, as GitHub Pages does: without them the scores say nothing.
"""

import argparse
import functools
import gzip
import json
import os
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parents[1] / "_build" / "html"
LIGHTHOUSE = "lighthouse@12.8.2"  # 13 wants Node 22
CATEGORIES = ["performance", "accessibility", "best-practices", "seo"]
CHROME = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
TEXT = ("text", "javascript", "json", "svg")


@functools.cache
def compressed(path: Path) -> bytes:
    """A file as gzip sends it."""
    return gzip.compress(path.read_bytes(), 6)


class Pages(SimpleHTTPRequestHandler):
    """A static server with GitHub Pages' headers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Say nothing."""

    def do_GET(self):
        """Send a file, compressed where that helps."""
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            return self.send_error(404)
        kind = self.guess_type(str(path))
        zipped = "gzip" in self.headers.get("Accept-Encoding", "") and any(t in kind for t in TEXT)
        body = compressed(path) if zipped else path.read_bytes()
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "max-age=600"}.items():
            self.send_header(name, str(value))
        if zipped:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body)


def scores(address: str, device: str) -> dict[str, int]:
    """One run of Lighthouse."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chrome = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if chrome is None:
        raise SystemExit("no Chromium found: install it, or name one in the variable CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = ["npx", "--yes", LIGHTHOUSE, address, "--quiet", "--output=json", f"--output-path={out}", f"--chrome-flags={CHROME}"]
        command += [f"--only-categories={','.join(CATEGORIES)}"] + ["--preset=desktop"] * (device == "desktop")
        subprocess.run(command, check=True, env={**os.environ, "CHROME_PATH": chrome}, stderr=subprocess.DEVNULL)
        report = json.loads(out.read_text())
    return {name: round(100 * (report["categories"][name]["score"] or 0)) for name in CATEGORIES}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="relative to the site; the preface and every chapter, if none is named")
    parser.add_argument("--site", type=Path, default=SITE)
    options = parser.parse_args()
    found = [options.site / "book" / "intro.html", *sorted(options.site.glob("nbs/[0-9]*.html"))]
    pages = options.pages or [p.relative_to(options.site).as_posix() for p in found]
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Pages, directory=options.site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{'page':40} {'device':8} {' '.join(f'{name:>14}' for name in CATEGORIES)}")
    for page in pages:
        for device in ("desktop", "mobile"):
            row = scores(f"http://127.0.0.1:{server.server_port}/{page}", device)
            print(f"{page:40} {device:8} {' '.join(f'{row[name]:14}' for name in CATEGORIES)}", flush=True)


if __name__ == "__main__":
    main()
