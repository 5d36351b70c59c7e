"""Visiting the pages of the built site."""

import http.server
import os
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page

SITE = Path(os.environ.get("SITE", Path(__file__).parents[2] / "_build" / "html"))
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts and p != SITE / "index.html")
UNFOLD = """() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  document.querySelectorAll('.toggle-hidden button.toggle-button, button.toggle-button-hidden').forEach(b => b.click());
}"""
SETTLED = """async () => {
  await document.fonts.ready;
  try { await window.MathJax?.startup?.promise; } catch (error) { console.error(`${error}`); }
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
