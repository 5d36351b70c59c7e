"""The built site behind a plain static server, and one headless Chromium that visits each page once."""

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
SITE = Path(os.environ.get("SITE", HERE.parents[1] / "_build" / "html"))
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts and p != SITE / "index.html")
UNFOLD = """() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  document.querySelectorAll('.toggle-hidden button.toggle-button, button.toggle-button-hidden').forEach(b => b.click());
}"""
SETTLED = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await document.fonts.ready;
}"""


@dataclass
class Visit:
    """A page in the browser, and what happened while it loaded."""

    name: str  # The file, relative to the site
    tab: Page
    foreign: list[str] = field(default_factory=list)  # Requests to other hosts, all refused
    errors: list[str] = field(default_factory=list)  # From the console and from scripts

    def unfold(self) -> Page:
        """Open hints, solutions and folded code."""
        self.tab.evaluate(UNFOLD)
        return self.tab


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static server that keeps connections open and does not talk."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Say nothing."""


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


def visit(browser: Browser, address: str, name: str) -> Visit:
    """Open a page, refuse requests to other hosts, and wait until it is complete."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    seen = Visit(name, tab)

    def gate(route):
        """Let only the site's own requests through."""
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        seen.foreign.append(route.request.url)
        route.abort()

    tab.route("**/*", gate)
    tab.on("console", lambda message: message.type == "error" and seen.errors.append(message.text))
    tab.on("pageerror", lambda error: seen.errors.append(str(error)))
    tab.goto(address + name, wait_until="load")
    tab.evaluate(SETTLED)
    tab.wait_for_load_state("networkidle")
    return seen


@pytest.fixture(scope="session", params=PAGES or ["no site"], ids=lambda name: name.removesuffix(".html"))
def page(request, browser: Browser, address: str) -> Iterator[Visit]:
    """Each page in turn; pytest runs all tests of one page before it opens the next."""
    seen = visit(browser, address, request.param)
    yield seen
    seen.tab.close()
