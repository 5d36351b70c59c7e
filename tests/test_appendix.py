"""The tools of the appendices: figures, workbench."""

import re
from base64 import b64decode
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unet_course import figures, workbench

pytestmark = pytest.mark.filterwarnings("ignore:Matplotlib is currently using")


@pytest.fixture(autouse=True)
def style():
    """Figures in the book's style, closed afterwards."""
    plt.switch_backend("agg")
    figures.use_style()
    yield
    plt.close("all")


def small_figure():
    """A figure with a line in it."""
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    return fig


def test_svg_follows_the_theme():
    text = figures.svg(small_figure(), "a line")
    assert "var(--figure-ink, currentColor)" in text and "var(--figure-data" in text
    assert figures.COLORS["ink"] not in text
    assert 'role="img"' in text and 'aria-label="a line"' in text
    assert not plt.get_fignums()


def test_ids_of_two_figures_differ():
    first, second = (set(re.findall(r'id="([^"]+)"', figures.svg(small_figure(), alt))) for alt in ("one", "two"))
    assert first and not first & second


def test_every_reference_in_a_figure_has_a_target():
    text = figures.svg(small_figure(), "a line")
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) and all(
        (a or b) in ids for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    )


def test_svg_needs_a_description():
    with pytest.raises(ValueError, match="alt is empty"):
        figures.svg(small_figure(), " ")


def test_scrubber_shows_one_frame_and_names_the_others():
    html = figures.scrubber({"a": small_figure(), "b": small_figure(), "c": small_figure()}, "letter", "A line", start=1).data
    frames = re.findall(r'<div class="frame"( hidden)?>', html)
    assert frames == [" hidden", "", " hidden"]
    assert 'aria-label="A line; letter: b"' in html and 'aria-valuetext="b"' in html


def test_scrubber_with_two_sliders():
    grid = {(a, b): small_figure() for a in "xy" for b in "123"}
    html = figures.scrubber(grid, ("letter", "number"), "A line", start=(1, 2)).data
    assert html.count('type="range"') == 2 and html.count('class="frame"') == 6
    assert "letter: y, number: 3" in html


@pytest.mark.parametrize(
    ("frames", "label", "options", "message"),
    [
        ({}, "n", {}, "need one entry"),
        ({("a", "1"): 0, ("b", "2"): 0}, ("l", "n"), {"start": (0, 0)}, "every combination"),
        ({"a": 0}, "n", {"start": 3}, r"start=\(3,\)"),
        ({"a": 0}, ("l", "n"), {}, "need one entry"),
        ({("a", "1"): 0}, ("l", "n"), {"start": (0, 0), "play": True}, "one slider"),
    ],
)
def test_scrubber_refuses(frames, label, options, message):
    with pytest.raises(ValueError, match=message):
        figures.scrubber(frames, label, "alt", **options)


@pytest.mark.parametrize(("shape", "titles", "message"), [((3, 28, 28), None, "batch"), ((2, 4, 8, 8), None, "1 or 3"), ((2, 1, 8, 8), ["a"], "titles has 1")])
def test_image_grid_refuses(shape, titles, message):
    with pytest.raises(ValueError, match=message):
        figures.image_grid(torch.zeros(shape), titles=titles)


def test_image_grid_takes_colour_and_non_square():
    assert len(figures.image_grid(torch.zeros(5, 3, 8, 16), columns=3).axes) == 6


def test_trace_lists_what_ran():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.SiLU(), nn.Conv2d(4, 2, 1)))
    assert [(s.name, s.kind) for s in figures.trace(model, torch.zeros(1, 1, 8, 8))] == [("0", "Conv2d"), ("1", "Sequential")]
    assert [s.name for s in figures.trace(model, torch.zeros(1, 1, 8, 8), depth=2)] == ["0", "1.0", "1.1"]
    assert not any(m._forward_hooks for m in model.modules())


BOXES = {
    "x": (0, 0, "", "time"),
    "conv": (1.5, 1, "3 × 3", "learned"),
    "a step": (1.5, 2, "", "faint"),
    "+": (0, 3, "", "faint"),
    "out": (0, -1, "", "ink"),
}


def test_blocks_and_wires_lie_where_they_should():
    """Every text is drawn inside the figure; wires end at the edge of what they lead to; colours and texts of wires are as asked for."""
    wires = [("x", "conv"), ("conv", "a step"), ("a step", "+", 2.5, "a label"), ("+", "out", "data")]
    fig = figures.draw_blocks(BOXES, wires, row=1.0)
    (ax,) = fig.axes
    assert sorted(t.get_text() for t in ax.texts if t.get_text()) == sorted(["x", "conv", "3 × 3", "a step", "+", "out", "a label"])
    fig.canvas.draw()
    page = fig.bbox
    for text in (t for t in ax.texts if t.get_text()):
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
    heads = {t.xy for t in ax.texts if not t.get_text() and hasattr(t, "xy")}
    frames = {name: figures._half_size(name, *BOXES[name][2:]) for name in BOXES}
    assert heads == {(1.5 - frames["conv"][0], 1), (1.5, 2 - frames["a step"][1]), (0, 3 - frames["+"][1]), (0, -1 + frames["out"][1])}
    assert [line.get_color() for line in ax.lines] == [figures.COLORS[c] for c in ("time", "faint", "faint", "data")]
    assert "var(--figure-time" in figures.svg(fig, "blocks")


def test_blocks_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="wires name .'z'."):
        figures.draw_blocks(BOXES, [("x", "z")])
    with pytest.raises(ValueError, match="colours .'red'."):
        figures.draw_blocks({"x": (0, 0, "", "red")}, [])


class Scaled(nn.Linear):
    """A linear layer that is off by a factor close to one in its backward pass or in its forward pass."""

    def __init__(self, *sizes, forward=1.0, backward=1.0):
        super().__init__(*sizes)
        self.factors = forward, backward

    def forward(self, x):
        y = super().forward(x)
        forward, backward = self.factors
        return forward * (y.detach() + backward * (y - y.detach()))


def test_compare_sees_outputs_and_gradients():
    x = torch.randn(4, 16)
    assert workbench.compare(Scaled(16, 8), nn.Linear(16, 8), (x,))
    wrong_output = workbench.compare(Scaled(16, 8, forward=1.001), nn.Linear(16, 8), (x,))
    wrong_gradient = workbench.compare(Scaled(16, 8, backward=1.001), nn.Linear(16, 8), (x,))
    assert not wrong_output and wrong_output.forward > 1e-4
    assert not wrong_gradient and wrong_gradient.forward < 1e-6 < 5e-4 < wrong_gradient.gradient
    with pytest.raises(ValueError, match="without a partner.*bias"):
        workbench.compare(nn.Linear(16, 8, bias=False), nn.Linear(16, 8), (x,))


def test_randomize_leaves_no_zeros():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    workbench.randomize(layer)
    assert all(p.abs().min() > 0 for p in layer.parameters())


def test_checker_reports_the_readers_own_error():
    @workbench.checker("right")
    def check(function):
        if function(1) != 1:
            raise workbench.Wrong("a < b")

    assert check(lambda x: x).passed and "right" in repr(check(lambda x: x))
    assert "a &lt; b" in check(lambda x: 0)._repr_html_()
    assert "KeyError" in check(lambda x: {}["k"]).message
    assert not check(None) and not check(...)


def test_relative_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2,\) against \(3,\)"):
        workbench.relative_error(torch.zeros(2), torch.zeros(3))
    assert workbench.relative_error(torch.ones(2), torch.zeros(2)) == 1.0


def test_pictures_in_figures_keep_every_pixel(monkeypatch):
    """Pictures of few colours are stored with a palette, without a change to any pixel."""

    def pictures(image):
        found = re.findall(r'data:image/png;base64,([^"]+)"', figures.svg(figures.image_grid(image), "noise"))
        return [Image.open(BytesIO(b64decode(png))) for png in found]

    image = torch.randint(0, 200, (1, 1, 20, 30)) / 100 - 1
    (small,) = pictures(image)
    monkeypatch.setattr(figures, "_lighten", lambda picture: picture[0])
    (large,) = pictures(image)
    assert (small.mode, large.mode) == ("P", "RGBA")
    assert np.array_equal(small.convert("RGBA"), large)
