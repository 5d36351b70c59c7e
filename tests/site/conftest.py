"""The built site behind a plain static server, and one headless Chromium that visits each page once."""

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import PAGES, SITE, Quiet, Visit, visit
from playwright.sync_api import Browser, sync_playwright

HERE = Path(__file__).parent
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    if not (SITE / "index.html").exists():
        pytest.fail(f"the site is not built: run `make book` first (looked in {SITE})", pytrace=False)
    return SITE


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where a plain static server shows the site."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    found = filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))])
    executable = next(found, None)
    if executable is None:
        pytest.fail("no Chromium found: install Debian's package `chromium`, or name one in the variable CHROMIUM", pytrace=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, the accessibility checker, at the version in package-lock.json."""
    source = HERE / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=HERE, check=True)
    return source.read_text()


@pytest.fixture(scope="session", params=PAGES or ["no site"], ids=lambda name: name.removesuffix(".html"))
def page(request, browser: Browser, address: str) -> Iterator[Visit]:
    """Each page in turn; pytest runs all tests of one page before it opens the next."""
    seen = visit(browser, address, request.param)
    yield seen
    seen.tab.close()
