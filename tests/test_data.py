"""The data sets of appendix 90: what is shipped, what is drawn, and what readers bring."""

import csv
import json
import math
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unet_course import data
from unet_course.training import Trainer

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "unet_course" / "assets"


# Shipped files


def test_every_shipped_file_is_listed_and_has_a_licence():
    shipped = {p.name for p in ASSETS.iterdir() if p.name != "SHA256SUMS" and not p.name.endswith(".LICENSE.txt")}
    assert shipped == set(data.checksums())
    for name in shipped:
        assert sha256((ASSETS / name).read_bytes()).hexdigest() == data.checksums()[name], name
        assert (ASSETS / f"{Path(name).stem}.LICENSE.txt").is_file(), name


def test_shipped_data_is_small():
    assert sum((ASSETS / name).stat().st_size for name in data.checksums() if name.startswith("emoji") and not name.endswith(".safetensors")) < 7e6


def test_damaged_file_is_refused(monkeypatch):
    monkeypatch.setitem(data.checksums(), "digits.npz", "0" * 64)
    with pytest.raises(ValueError, match="digits.npz is damaged"):
        data.read_asset("digits.npz")
    with pytest.raises(ValueError, match="not a shipped file"):
        data.read_asset("secrets.npz")


def test_rebuilding_touches_its_own_lines_only(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import build_assets

    monkeypatch.setattr(build_assets, "ASSETS", tmp_path)
    (tmp_path / "SHA256SUMS").write_text("aa  other.npz\nbb  mine.png\ncc  another.npz\n")
    (tmp_path / "mine.png").write_bytes(b"1"), (tmp_path / "new.png").write_bytes(b"2")
    build_assets.record("mine.png", "new.png")
    mine, new = (sha256(b).hexdigest() for b in (b"1", b"2"))
    assert (tmp_path / "SHA256SUMS").read_text() == f"aa  other.npz\n{mine}  mine.png\ncc  another.npz\n{new}  new.png\n"


def test_imports_light():
    code = "import sys, unet_course.data; print(*[m for m in ('PIL', 'matplotlib', 'datasets', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (done.stdout.strip(), done.stderr) == ("", "")


# Digits


def test_digits():
    images, labels = data.digits()
    held_out, _ = data.digits("test")
    assert images.shape == (9000, 1, 28, 28) and held_out.shape == (1000, 1, 28, 28) and labels.shape == (9000,)
    assert (images.min(), images.max()) == (-1, 1)
    everything = torch.cat([images, held_out]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 10_000  # no duplicate, so none of the test digits was trained on
    with pytest.raises(ValueError, match="split='validation'.*'train'"):
        data.digits("validation")


# Shapes


@pytest.mark.parametrize("things", [1, 2])
def test_captions_say_what_they_mean(things):
    captions = data.shape_captions(things, split="all")
    assert len(set(captions)) == len(captions) == (8 * 6 * 2 * 9 if things == 1 else 4 * 96 * 84)
    for caption in captions[:: 1 if things == 1 else 37]:
        scene = data.parse_scene(caption)
        assert str(scene) == caption
        assert data.parse_scene(str(scene.turned())).turned() == scene


def test_captions_may_leave_things_open():
    assert data.parse_scene("a red ring") == data.Scene(data.Thing(None, "red", "ring"))
    assert data.parse_scene("a small red ring at the top").first.position == "top"
    assert len(data.shape_captions(position=False, split="all")) == 96


@pytest.mark.parametrize(
    "caption",
    [
        *("", "a red", "a purple ring", "a red ring at the moon", "red ring", "a red ring above", "a red ring above a red square"),
        *("a red ring above a blue ring at the top", "a red ring at the top above a blue ring"),
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="describes no scene.*large red circle"):
        data.parse_scene(caption)


@pytest.mark.parametrize("things", [1, 2])
def test_splits_of_shapes(things):
    parts = {split: set(data.shape_captions(things, split=split)) for split in data.SHAPE_SPLITS}
    assert sum(map(len, parts.values())) == len(data.shape_captions(things, split="all"))
    assert not parts["train"] & parts["combinations"] and not parts["train"] & parts["pairs"] and all(parts.values())
    scenes = {split: [data.parse_scene(c) for c in captions] for split, captions in parts.items()}
    seen = {(t.color, t.shape) for s in scenes["train"] for t in (s.first, s.second) if t}
    assert seen == {(c, s) for c in data.SHAPE_COLORS for s in data.SHAPES} - set(data.HELD_OUT)
    assert all(any(t and (t.color, t.shape) in data.HELD_OUT for t in (s.first, s.second)) for s in scenes["pairs"])
    assert {t.size for s in scenes["train"] for t in (s.first, s.second) if t} == set(data.SHAPE_SIZES)
    assert 0.05 < len(parts["combinations"]) / len(parts["train"]) < 0.2
    assert all(data.shape_split(str(s.turned())) == split for split, some in scenes.items() for s in some[:200])
    assert set(data.HELD_OUT) and {c for c, _ in data.HELD_OUT} == set(data.SHAPE_COLORS) and {s for _, s in data.HELD_OUT} == set(data.SHAPES)


def test_shapes_depend_on_the_seed_alone():
    (a, said), (b, again), (c, other) = data.shapes(20, seed=1), data.shapes(20, seed=1), data.shapes(20, seed=2)
    assert torch.equal(a, b) and said == again and said != other and a.shape == (20, 3, 32, 32)
    assert a.min() >= -1 and a.max() <= 1 and a.dtype == torch.float32
    assert all(data.shape_split(c) == "train" for c in said)
    assert all(data.shape_split(c) == "pairs" for c in data.shapes(20, split="pairs")[1])


def test_edges_are_smooth():
    values = data.draw_shapes(["a large white circle"] * 20, 64, torch.Generator().manual_seed(0))
    share = ((values > 0.05) & (values < 0.95)).float().mean()
    assert 0.005 < share < 0.05
    areas = values[:, 0].mean((1, 2))
    assert torch.allclose(areas, torch.tensor(math.pi * data.SHAPE_SIZES["large"] ** 2), rtol=0.01)


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("things", [1, 2])
def test_checker_accepts_every_drawing(size, things):
    number = 3000 if size == 32 else 200
    assert data.shapes_match(*data.shapes(number, size, things, split="all", seed=5)).all()


@pytest.mark.parametrize("things", [1, 2])
def test_checker_accepts_a_models_small_errors(things):
    images, captions = data.shapes(300, things=things, split="all", seed=6)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    pale, moved = 0.75 * images, images.roll((1, 1), (2, 3))
    coarse = F.interpolate(F.interpolate(images, (24, 24), mode="bilinear", antialias=True), (32, 32), mode="bilinear")
    for view in (images + 0.1 * noise, images + 0.2 * noise, pale, moved, coarse, images + 0.08):
        assert data.shapes_match(view, captions).float().mean() > 0.97


@pytest.mark.parametrize("things", [1, 2])
def test_checker_refuses_other_captions(things):
    images, _ = data.shapes(3000, things=things, split="all", seed=5)
    others = data.shapes(3000, things=things, split="all", seed=50)[1]
    assert data.shapes_match(images, others).float().mean() < 0.005


@pytest.mark.parametrize("part", ["size", "color", "shape", "position"])
def test_checker_refuses_one_wrong_word(part):
    words = dict(size=list(data.SHAPE_SIZES), color=data.SHAPE_COLORS, shape=data.SHAPES, position=data.POSITIONS)[part]
    images, captions = data.shapes(300, split="all", seed=9)
    wrong = []
    for caption in captions:
        thing = data.parse_scene(caption).first
        other = words[(words.index(getattr(thing, part)) + 1) % len(words)]
        wrong.append(str(data.Scene(thing._replace(**{part: other}))))
    assert not data.shapes_match(images, wrong).any()
    scores = data.shape_scores(images, wrong)
    assert scores.pop(part) == 0 and scores.pop("everything") == 0 and set(scores.values()) == {1.0}


def test_checker_and_relations():
    captions = ["a large red circle above a small blue ring", "a green cross left of a white square"] * 50
    images = data.draw_shapes(captions, 32, torch.Generator().manual_seed(0))
    turned = [str(data.parse_scene(c).turned()) for c in captions]
    swapped = [str(data.Scene(s.second, s.relation, s.first)) for s in map(data.parse_scene, captions)]
    across = [str(s._replace(relation="left of" if s.relation == "above" else "above")) for s in map(data.parse_scene, captions)]
    assert data.shapes_match(images, captions).all() and data.shapes_match(images, turned).all()
    assert not data.shapes_match(images, swapped).any() and not data.shapes_match(images, across).any()
    scores = data.shape_scores(images, swapped)
    assert (scores["relation"], scores["color"], scores["shape"], scores["everything"]) == (0, 1, 1, 0) and "position" not in scores
    assert not data.shapes_match(images, ["a red circle"] * 100).any()  # there is one thing too many


def test_checker_on_pictures_of_nothing():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(50, 3, 32, 32, generator=generator) * 2 - 1
    three = sum(data.draw_shapes([c] * 50, 32, generator) for c in ("a red ring at the top left", "a blue ring at the bottom", "a white ring at the right"))
    assert data.read_shapes(torch.zeros(3, 3, 32, 32)) == [None] * 3 == data.read_shapes(three)[:3]
    for images in (noise, three, torch.ones(50, 3, 32, 32), torch.zeros(50, 3, 32, 32)):
        assert not data.shapes_match(images, data.shapes(50)[1]).any()
    whole = data.read_shapes(torch.ones(1, 3, 32, 32))[0]
    assert whole.first.color == "white" and whole.first.shape is None and "something" in str(whole)


def test_open_captions_match():
    images = data.draw_shapes(["a red ring"] * 40, 32, torch.Generator().manual_seed(0))
    assert data.shapes_match(images, ["a red ring"] * 40).all()
    assert len({str(s) for s in data.read_shapes(images)}) > 8  # sizes and places were left to chance


def test_drawn_with_the_dice_of_any_device(monkeypatch):
    """A generator on a GPU is asked there. (Where there is none, something has to stand in for it.)"""
    plain, asked = torch.rand, []
    monkeypatch.setattr(data.torch, "rand", lambda *shape, generator, device: asked.append(device) or plain(*shape))
    dice = type("Dice", (), {"device": torch.device("cuda")})()
    data.draw_shapes(["a red ring"], 32, dice)
    assert asked == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.shapes(0), "number=0 must be"),
        (lambda: data.shapes(5, size=8), "size=8 must be .* 16"),
        (lambda: data.shapes(5, things=3), r"things=3 is unknown; there are \[1, 2\]"),
        (lambda: data.shapes(5, split="test"), "split='test'.*'pairs'"),
        (lambda: data.shapes(5, seed=-1), "seed=-1"),
        (lambda: data.shapes_match(torch.zeros(2, 3, 32, 32), ["a red ring"]), "1 entries for 2 images"),
        (lambda: data.shape_scores(torch.zeros(0, 3, 32, 32), []), "empty"),
        (lambda: data.signals(0), "number=0"),
        (lambda: data.signals(5, noise=-1.0), "noise=-1.0"),
        (lambda: data.signals(5, length=4), "length=4"),
        (lambda: data.volumes(5, size=4), "size=4"),
        (lambda: data.emoji("test"), "split='test'.*'concepts'"),
        (lambda: data.emoji(styles="apple"), "style='apple'.*'noto'"),
        (lambda: data.emoji(styles=()), "styles=.* is empty"),
        (lambda: data.emoji(size=48), "size=48.*64"),
        (lambda: data.emoji_split("grinning", "noto"), "name='grinning'"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 32, 16)])
def test_read_shapes_refuses(shape):
    with pytest.raises(ValueError, match="images must be"):
        data.read_shapes(torch.zeros(shape))


# Emoji


@pytest.mark.parametrize("style", data.EMOJI_STYLES)
def test_emoji(style):
    parts = {split: data.emoji(split, style) for split in data.EMOJI_SPLITS}
    everything, captions = data.emoji("all", style)
    assert len(everything) == len(captions) == len(set(captions)) == sum(len(c) for _, c in parts.values()) > 1500
    assert set(captions) == {c for _, some in parts.values() for c in some}
    assert everything.shape[1:] == (3, 64, 64) and -1 <= everything.min() < -0.9 and everything.max() == 1
    assert (everything[:, :, 0, 0] > 0.9).float().mean() > 0.98  # on white
    for split, (images, some) in parts.items():
        assert torch.equal(images[:50], everything[[captions.index(c) for c in some[:50]]]), split
    assert len(everything) - len(torch.unique(everything[:, :, ::2, ::2].flatten(1), dim=0)) < 20


def test_emoji_held_out():
    pairs = {split: set() for split in data.EMOJI_SPLITS}
    for name, concept in data.emoji_concepts().items():
        for style in concept.styles:
            pairs[data.emoji_split(name, style)].add((name, style))
    names = {split: {name for name, _ in some} for split, some in pairs.items()}
    assert not names["concepts"] & (names["train"] | names["pairs"])
    assert names["pairs"] <= names["train"]  # in another style
    assert not pairs["pairs"] & pairs["train"]
    for split in ("pairs", "concepts"):
        assert 0.03 < len(pairs[split]) / sum(map(len, pairs.values())) < 0.08
    some = ("noto", "fluent")
    assert data.emoji("pairs", some)[1] == [f"{n}, {s}" for s in some for n, c in data.emoji_concepts().items() if (n, s) in pairs["pairs"]]


def test_emoji_names_and_styles():
    concepts = data.emoji_concepts()
    apple = concepts["red apple"]
    assert (apple.emoji, apple.group, apple.styles) == ("🍎", "food & drink", data.EMOJI_STYLES) and "fruit" in apple.tags
    for style in data.EMOJI_STYLES:
        assert sum(style in c.styles for c in concepts.values()) == len(data._strip(style))
    images, captions = data.emoji("all", "noto", 16)
    image = images[captions.index("red apple, noto")]
    assert image[0].mean() > image[1].mean() + 0.1  # it is the apple
    assert not [n for n, c in concepts.items() if "fluent" in c.styles and c.subgroup == "country-flag"]
    data.emoji_concepts().clear()
    assert data.emoji_concepts()


def test_emoji_smaller():
    large, small = data.emoji("concepts", "noto"), data.emoji("concepts", "noto", 32)
    assert large[1] == small[1] and torch.allclose(F.avg_pool2d(large[0], 2), small[0])
    large[0].zero_()
    assert data.emoji("concepts", "noto")[0].abs().max() == 1  # callers cannot spoil each other's copy


# Signals and volumes


def test_signals():
    x, labels = data.signals(3000)
    again, other = data.signals(3000), data.signals(500, seed=1)
    assert torch.equal(x, again[0]) and not torch.equal(x[:500], other[0])
    assert x.shape == (3000, 1, 40) and x.abs().max() <= 1 and set(labels.tolist()) == set(range(10))
    nearest = torch.cdist(other[0][:, 0], x[:, 0]).argmin(1)
    share = (labels[nearest] == other[1]).float().mean()
    assert 0.7 < share < 0.999  # the kinds can be told apart, but not without learning something
    assert data.signals(10, 64, 0.0)[0].shape == (10, 1, 64)
    assert not torch.equal(data.signals(10, noise=0.0)[0], data.signals(10, noise=0.1)[0])


@pytest.mark.parametrize("size", [16, 24, 32])
def test_volumes(size):
    x, labels = data.volumes(60, size)
    assert torch.equal(x, data.volumes(60, size)[0]) and not torch.equal(x, data.volumes(60, size, seed=1)[0])
    assert x.shape == (60, 1, size, size, size) and x.min() == -1 and x.max() == 1 and set(labels.tolist()) == {0, 1, 2}
    filled = ((x + 1) / 2).mean((1, 2, 3, 4))
    assert filled.min() > 0.005 and filled.max() < 0.5
    border = torch.cat([x[:, :, 0].flatten(1), x[:, :, -1].flatten(1)], 1)
    assert (border > 0).float().mean() < 0.01
    hollow = x[labels == 1]  # the middle of a torus is empty
    middle = hollow[:, 0, size // 2, size // 2, size // 2]
    assert (middle < 0).float().mean() > 0.8


# Your own pictures


def picture(width=40, height=30, mode="RGB"):
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def place(tmp_path):
    """A folder with three pictures of different sizes, one of them in a folder inside."""
    (tmp_path / "b").mkdir()
    picture().save(tmp_path / "c.png")
    picture(64, 64).save(tmp_path / "a.PNG")
    picture(30, 50).save(tmp_path / "b" / "z.png")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / ".cache").mkdir()
    picture().save(tmp_path / ".cache" / "x.png")
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def test_folder(place):
    images, captions = data.folder(place, size=32)
    assert images.shape == (3, 3, 32, 32) and captions is None
    assert [p.relative_to(place).as_posix() for p in data.FolderDataset(place, 32).paths] == ["a.PNG", "b/z.png", "c.png"]
    red, blue = images[:, :, 16, 4], images[:, :, 16, 28]
    assert torch.allclose(red, torch.tensor([1.0, -1, -1]), atol=0.02) and torch.allclose(blue, torch.tensor([-1.0, -1, 1]), atol=0.02)
    assert data.folder(str(place), (16, 24), 1)[0].shape == (3, 1, 16, 24)


def test_folder_cuts_the_middle(tmp_path):
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (data.folder(tmp_path, 20, 1)[0] > 0.99).all()


def test_mixed_sizes_need_a_size(place):
    with pytest.raises(ValueError, match=r"different sizes, such as a.PNG \(64 × 64\) and z.png \(30 × 50\); size=64"):
        data.folder(place)
    (place / "c.png").unlink(), (place / "b" / "z.png").unlink()
    assert data.folder(place)[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    file = tmp_path / f"x.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}"
    picture(mode=mode).save(file)
    colour, grey = data.folder(tmp_path)[0], data.folder(tmp_path, channels=1)[0]
    assert colour.shape == (1, 3, 30, 40) and grey.shape == (1, 1, 30, 40) and colour.abs().max() <= 1
    if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
        assert colour[0, 0, :, 5].mean() > 0.9 and colour[0, 2, :, 5].mean() < -0.9


def test_sixteen_bits(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    image = data.folder(tmp_path, channels=1)[0][0, 0]
    assert torch.allclose(image, torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1, atol=0.005)


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "b.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "c.png", transparency=0)
    a, b, c = data.folder(tmp_path)[0]
    assert (a == 1).all() and (b.abs() < 0.02).all() and (c == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path, orientation):
    upright = picture(40, 30)
    back = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]  # of Image.Transpose
    stored = upright
    for turn in back:
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = data.folder(tmp_path)[0][0]
    assert image.shape == (3, 30, 40) and image[0, :, 5].mean() > 0.9 and image[2, :, 35].mean() > 0.9
    picture(40, 30).save(tmp_path / "y.png")
    assert len(data.folder(tmp_path)[0]) == 2  # the size that counts is the one after turning


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is not a folder"):
        data.folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures.*and no other files"):
        data.folder(tmp_path)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no pictures \(.png.*other files, such as .*a.heic"):
        data.folder(tmp_path)
    picture().save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch(), (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="2 of 3 files are not pictures, or damaged: .*empty.png.*text.jpg"):
        data.folder(tmp_path, 16)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_files_are_named(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("good", "bad"):
        Image.fromarray(noise).save(tmp_path / f"{name}.{kind}")
    assert len(data.folder(tmp_path)[0]) == 2
    content = (tmp_path / f"bad.{kind}").read_bytes()
    (tmp_path / f"bad.{kind}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"1 of 2 .*bad.{kind}"):
        data.folder(tmp_path)


def test_truncated_file_in_a_worker(tmp_path):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-100])
    with pytest.raises(ValueError, match="b.jpg cannot be read as a picture"):
        list(DataLoader(data.FolderDataset(tmp_path), num_workers=1))


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="x.tiff .*floating-point"):
        data.folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels=2"),
        ({"size": 0}, "size=0"),
        ({"size": (8, 2.5)}, "size=2.5"),
        ({"captions": "json"}, "captions='json' is neither"),
        ({"captions": "no.csv"}, "neither"),
        ({"captions": 3}, "captions='3' is neither"),
    ],
)
@pytest.mark.bad_input
def test_folder_refuses(place, options, message):
    with pytest.raises(ValueError, match=message):
        data.folder(place, **{"size": 32} | options)


def test_captions_from_text_files(place):
    for name, text in {"a": "\ufeffone\n", "b/z": " two", "c": "thrée"}.items():
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    assert data.folder(place, 16)[1] == ["one", "two", "thrée"] == data.folder(place, 16, captions="txt")[1]
    assert data.folder(place, 16, captions=None)[1] is None
    assert data.folder(place, 16, captions="folder")[1] == [place.name, "b", place.name]
    (place / "c.txt").unlink(), (place / "b" / "z.txt").write_text("")
    with pytest.raises(ValueError, match="2 of 3 pictures have no caption: .*z.png.*c.png"):
        data.folder(place, 16)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_from_metadata(place, column):
    rows = [{"file_name": name, column: f"it is {name}", "other": 1} for name in ("c.png", "a.PNG", "b/z.png")]
    wanted = ["it is a.PNG", "it is b/z.png", "it is c.png"]
    (place / "c.txt").write_text("the file with all captions comes first")
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert data.folder(place, 16)[1] == wanted
    (place / "metadata.jsonl").rename(place / "mine.jsonl")
    assert data.folder(place, 16, captions=place / "mine.jsonl")[1] == wanted
    with (place / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader(), writer.writerows(rows)
    assert data.folder(place, 16)[1] == wanted


@pytest.mark.parametrize("spelt", ["here", "in full", "roundabout"])
def test_captions_of_a_path_spelt_otherwise(place, monkeypatch, spelt):
    """The list may be named in another way than the folder."""
    monkeypatch.chdir(place.parent)
    (place / "mine.csv").write_text(f"file_name,text\nc.png,three\n../{place.name}/a.PNG,one\nb/z.png,two\n")
    spellings = {"here": Path(place.name), "in full": place, "roundabout": Path(place.name) / "b" / ".."}
    for folder in spellings.values():
        assert data.folder(folder, 16, captions=spellings[spelt] / "mine.csv")[1] == ["one", "two", "three"]


def test_captions_that_csv_refuses(place):
    (place / "metadata.csv").write_text("file_name,text\nc.png," + 140_000 * "x")
    with pytest.raises(ValueError, match="metadata.csv holds a line that is not CSV: field larger"):
        data.folder(place, 16)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "a line that is not JSON"),
        ('{"file_name": "c.png"}', "entry 1 of .*needs 'file_name' and one of"),
        ("[1]", "entry 1"),
        ('{"file_name": "c.png", "text": "x"}', "2 of 3 pictures have no caption: .*a.PNG"),
        ('{"file_name": "q.png", "text": "x"}', "names files that are not there: .*q.png"),
    ],
)
def test_captions_that_cannot_be_read(place, lines, message):
    (place / "metadata.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        data.folder(place, 16)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "c.txt"])
def test_captions_in_another_encoding(place, name):
    (place / name).write_bytes("file_name,text\nc.png,Löwe".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not text in UTF-8"):
        data.folder(place, 16)


@pytest.mark.parametrize("size", [64.0, "64", 0, (16,), (16, 16, 3), (16, "16")])
def test_sizes_that_are_none(place, size):
    with pytest.raises(ValueError, match="^size="):
        data.FolderDataset(place, size)


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_reads_folders(place, workers):
    """Chapter 10's Trainer takes the lazy data set, with and without captions, and with workers."""
    seen = []

    def loss(model, batch, generator):
        images, captions = batch if isinstance(batch, (tuple, list)) else (batch, None)
        seen.append((images.shape, captions))
        return model(images).square().mean()

    for source in (None, "folder"):
        folder = data.FolderDataset(place, 16, captions=source)
        Trainer(nn.Conv2d(3, 1, 1), loss, folder, batch_size=2, workers=workers).fit(steps=2)
    assert [s for s, _ in seen] == [(2, 3, 16, 16)] * 4
    assert seen[0][1] is None and set(seen[-1][1]) <= {place.name, "b"}


# The Hub


class FakeLabel:
    """A feature of classes, as `datasets` has it."""

    def int2str(self, number):
        return ["cat", "dog"][number]


def fake_datasets(monkeypatch, rows, features=None):
    """A module `datasets` that needs no network."""

    class Rows(list):
        pass

    def load_dataset(name, split, streaming, **options):
        if name == "missing":
            raise ConnectionError("no route")
        assert streaming
        found = Rows(rows)
        found.features = features
        return found

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub(monkeypatch):
    rows = [{"image": picture(mode="RGBA"), "label": i % 2, "text": f"number {i}"} for i in range(6)]
    fake_datasets(monkeypatch, rows, {"label": FakeLabel()})
    images, captions = data.hub("someone/pictures", number=4, size=16)
    assert images.shape == (4, 3, 16, 16) and captions == [f"number {i}" for i in range(4)]
    assert data.hub("x", size=(8, 16), channels=1, caption="label")[1] == ["cat", "dog"] * 3
    assert data.hub("x", caption=None)[1] is None
    with pytest.raises(ValueError, match="caption='name'.*'text'"):
        data.hub("x", caption="name")
    fake_datasets(monkeypatch, [{"text": "no picture"}])
    with pytest.raises(ValueError, match="x has no column of pictures.*'text'"):
        data.hub("x")
    with pytest.raises(OSError, match="missing.*ConnectionError: no route.*internet.*folder"):
        data.hub("missing")


@pytest.mark.parametrize("caption", ["auto", "caption"])
@pytest.mark.parametrize("odd", [None, ["Two men.", "Some men."], 0.5, {}])
def test_hub_makes_up_no_captions(monkeypatch, caption, odd):
    fake_datasets(monkeypatch, [{"image": picture(), "caption": "a man"}, {"image": picture(), "caption": odd}])
    with pytest.raises(ValueError, match="caption='caption' holds .*, which is no text; take another column"):
        data.hub("x", size=16, caption=caption)


@pytest.mark.parametrize("odd", [None, Image.new("F", (8, 8))])
def test_hub_names_the_row(monkeypatch, odd):
    fake_datasets(monkeypatch, [{"image": picture()}, {"image": odd}])
    with pytest.raises(ValueError, match="row 1 of x holds no picture that can be read in 'image'"):
        data.hub("x", size=16)


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets.*never needs it"):
        data.hub("x")


def test_read_image(place):
    """A single file, as it is or in another size; nothing is guessed."""
    assert data.read_image(place / "a.PNG").shape == (3, 64, 64) and data.read_image(str(place / "a.PNG"), 16, 1).shape == (1, 16, 16)
    with pytest.raises(ValueError, match="channels=2"):
        data.read_image(place / "a.PNG", 16, 2)
    with pytest.raises(ValueError, match="notes.md cannot be read as a picture"):
        data.read_image(place / "notes.md")
