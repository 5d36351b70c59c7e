"""Text to image: a seed is a picture whatever else is drawn, guidance is chapter 13's, files give back what was saved, training resumes bit for bit."""

import json
import math
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from unet_course import latent_diffusion
from unet_course.clip import CLIPTextModel, pretrained_clip, small_tokenizer
from unet_course.data import draw_shapes, emoji, parse_scene, read_shapes, shape_captions, shape_split, shapes
from unet_course.diffusion import Schedule, diffusion_loss
from unet_course.evaluation import digit_classifier
from unet_course.guidance import Guided
from unet_course.latent_diffusion import (
    CAPTIONS,
    LOOKS,
    PROMPTS,
    RECIPES,
    CoordConv,
    EmojiScore,
    FoldedPixels,
    Prompted,
    Rate,
    TextToImage,
    build_networks,
    copies,
    draw_many,
    emoji_examples,
    encode_examples,
    evaluate_emoji,
    evaluate_shapes,
    found_by_clip,
    fingerprint,
    per_prompt,
    picture_seeds,
    playground,
    quality_of,
    scale_of,
    shape_examples,
    ship_text_to_image,
    t2i_recipe,
    text_to_image_loss,
    told_less,
    train_text_to_image,
    training_data,
    training_report,
)
from unet_course.sampling import denoiser, dpm_solver, sample
from unet_course.training import CheckpointError, Trainer, load_checkpoint, pretrained, save_checkpoint
from unet_course.unet import UNetModel
from unet_course.vae import DiagonalGaussian, pretrained_vae
from unet_course.workbench import randomize, relative_error

TINY = dict(
    unet=dict(image_size=4, in_channels=48, out_channels=48, model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1], num_heads=2,
              use_spatial_transformer=True, context_dim=16),
    text=dict(width=16, layers=1, heads=2, length=12, vocab_size=2048),
    tokenizer="small", vae="pixels", prediction="flow", schedule=dict(steps=50, shift=2.0),
)
BUILT = {name: json.loads(json.dumps(t2i_recipe(name))) for name in RECIPES}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    """Tiny, random, wide awake: every word and every place matters."""
    networks = randomize(build_networks(TINY)).double().eval().requires_grad_(False)
    return TextToImage(networks.unet, FoldedPixels(), networks.text, small_tokenizer(), schedule=Schedule.flow(**TINY["schedule"]), scale_factor=2.5,
                       length=12, config=TINY)


PROMPT = ["a red circle", "two cats above a tree", "pizza, noto"]


# Seeds


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim", "heun", "ddpm"])
def test_a_picture_does_not_depend_on_its_neighbours(model, sampler):
    batch = model(PROMPT, sampler=sampler, steps=4, seed=[5, 3, 5])
    alone = torch.cat([model(p, sampler=sampler, steps=4, seed=s) for p, s in zip(PROMPT, (5, 3, 5))])
    assert batch.shape == (3, 3, 16, 16) and (batch - alone).abs().max() < 1e-9
    assert (model(PROMPT, sampler=sampler, steps=4, seed=[5, 4, 5]) - batch).abs().amax((1, 2, 3)).gt(1e-6).tolist() == [False, True, False]


def test_a_single_seed_counts_up(model):
    assert torch.equal(model(PROMPT, steps=2, seed=7), model(PROMPT, steps=2, seed=[7, 8, 9]))
    assert not torch.allclose(*(model(PROMPT[0], steps=2, seed=s) for s in (0, 1)))


def test_the_global_generators_stay(model):
    before = torch.get_rng_state()
    model(PROMPT, steps=2, sampler="ddpm")
    assert torch.equal(before, torch.get_rng_state())


def test_more_steps_are_other_pictures(model):
    assert not torch.allclose(model("a", steps=2), model("a", steps=3))


# Guidance


def test_guidance_1_is_the_prompt_alone(model):
    """Bit for bit the conditional walk, whatever the negative prompt."""
    z = torch.stack([torch.randn(48, 4, 4, generator=seeded(s)) for s in range(3)]).double()
    predict = denoiser(model.unet, model.schedule, "flow", context=model.encode_text(PROMPT))
    by_hand = model.decode(sample(dpm_solver(predict, z, model.schedule, 3)))
    assert torch.equal(model(PROMPT, guidance=1, steps=3), by_hand)
    assert torch.equal(model(PROMPT, guidance=1, steps=3, negative="blue"), by_hand)


def test_guidance_0_is_no_prompt(model):
    assert torch.allclose(model(PROMPT, guidance=0, steps=3), model(["", "", ""], guidance=1, steps=3), atol=1e-9)


def test_guidance_is_chapter_13s(model):
    x, t = torch.randn(3, 48, 4, 4, generator=seeded(), dtype=torch.float64), 30
    guided = Guided(model.unet, 4.0, null=model.null)
    wanted = denoiser(guided, model.schedule, "flow", context=model.encode_text(PROMPT))(x, t)[0]
    assert torch.equal(model.predictor(PROMPT, guidance=4.0)(x, t)[0], wanted)
    away = Guided(model.unet, 4.0, null=model.encode_text(["green", "", "green"]))
    wanted = denoiser(away, model.schedule, "flow", context=model.encode_text(PROMPT))(x, t)[0]
    assert torch.equal(model.predictor(PROMPT, guidance=4.0, negative=["green", "", "green"])(x, t)[0], wanted)


def test_negative_prompt(model):
    """It matters, for each picture by itself, and the prompt as its own negative is no guidance."""
    plain = model(PROMPT, steps=3)
    mixed = model(PROMPT, steps=3, negative=["", "green", ""])
    assert (mixed - plain).abs().amax((1, 2, 3)).gt(1e-6).tolist() == [False, True, False]
    assert torch.allclose(model(PROMPT, steps=3, negative=PROMPT), model(PROMPT, steps=3, guidance=1), atol=1e-8)


@pytest.mark.parametrize("option", [dict(interval=(0.0, 1.0)), dict(rescale=0.8), dict(guidance=5), dict(prompts="b"), dict(size=24), dict(sampler="ddim")])
def test_every_option_changes_something(model, option):
    given_, usual = dict(prompts="a", steps=5) | option, dict(prompts="a", steps=5)
    other, plain = model(**given_), model(**usual)
    assert other.shape != plain.shape or not torch.allclose(other, plain)


def test_sizes(model):
    assert model("a", steps=1, size=(8, 20)).shape == (1, 3, 8, 20)
    assert model.latent_shape() == (48, 4, 4) and model.latent_shape(32) == (48, 8, 8)


@pytest.mark.parametrize("steps", [1, 2, 49, 50])
def test_heun_begins_where_the_noise_is_finite(model, steps):
    assert model("a", steps=steps, sampler="heun").isfinite().all()


def test_steps_are_the_walk(model):
    walk = list(model.steps(PROMPT, steps=5))
    assert [s.number for s in walk] == [1, 2, 3, 4, 5] and walk[-1].time is None
    assert torch.equal(model.decode(walk[-1].x), model(PROMPT, steps=5))


def test_progress_bar(model, capsys):
    model("a", steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err


# Encoding


def test_encode_and_decode(model):
    pictures = shapes(2, size=16)[0].double()
    z = model.encode(pictures)
    assert torch.equal(z, 2.5 * nn.functional.pixel_unshuffle(pictures, 4))
    assert torch.allclose(model.decode(z), pictures)
    kept = z.clone()
    assert model.decode(10 * z).abs().max() == 1 and torch.equal(z, kept)
    assert torch.allclose(model.encode(pictures, seeded()), z, atol=1e-5)


def test_null_is_the_empty_text(model):
    assert model.null.shape == (1, 12, 16) and torch.equal(model.null, model.encode_text([""]))


def test_coord_conv():
    """An ordinary convolution of the map and two more channels, at any size; and it is what tells places apart, far from every border."""
    layer, x = CoordConv(4, 8), torch.randn(2, 4, 5, 9, generator=seeded())
    rows, columns = torch.linspace(-1, 1, 5)[:, None].expand(5, 9), torch.linspace(-1, 1, 9).expand(5, 9)
    whole = torch.cat([x, torch.stack([rows, columns]).expand(2, -1, -1, -1)], 1)
    assert torch.equal(layer(x), F.conv2d(whole, layer.weight, layer.bias, padding=1))
    flat = layer(torch.zeros(1, 4, 5, 9))[..., 1:-1, 1:-1]
    assert len(flat.flatten(2).round(decimals=4).unique(dim=2)[0, 0]) == 21
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_coordinates_in_recipe():
    """The recipe of the shapes has them, that of the emoji has not; a network without gives shifted answers for shifted latents."""
    shapes_net, emoji_net = build_networks(t2i_recipe("shapes")), build_networks(t2i_recipe("emoji"))
    assert isinstance(shapes_net.unet.input_blocks[0][0], CoordConv) and not isinstance(emoji_net.unet.input_blocks[0][0], CoordConv)
    without = build_networks({**t2i_recipe("shapes"), "coordinates": False})
    assert without.unet.input_blocks[0][0].weight.shape[1] == 4 and shapes_net.unet.input_blocks[0][0].weight.shape[1] == 6


def test_large_tables():
    """Each word keeps its own vector: at its own place another word makes more difference than another colour five words before."""
    tokens = small_tokenizer()([f"a large {color} circle at the top {side}" for color, side in (("red", "left"), ("red", "right"), ("blue", "left"))], length=24)
    for seed in range(3):
        torch.manual_seed(seed)
        vectors = build_networks(t2i_recipe("shapes")).text(tokens)
        own, other = ((vectors[0] - vectors[i])[8].square().mean().sqrt() for i in (1, 2))
        assert own > 1 and own > 4 * other


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_folded_pixels(factor):
    x, vae = torch.randn(2, 3, 8, 12, generator=seeded()), FoldedPixels(factor)
    posterior = vae.encode(x)
    assert posterior.mode().shape == (2, 3 * factor**2, 8 // factor, 12 // factor)
    assert torch.equal(vae.decode(posterior.mode()), x) and (vae.decode(posterior.sample(seeded())) - x).abs().max() < 1e-5


# Files


def test_save_and_load_are_exact(model, tmp_path):
    whole = deepcopy(model).float()
    whole.save(tmp_path / "f.safetensors")
    again = TextToImage.load(tmp_path / "f.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(whole(PROMPT, steps=2), again(PROMPT, steps=2))
    assert (again.scale_factor, again.length, again.prediction) == (2.5, 12, "flow") and torch.equal(again.schedule.sigmas, model.schedule.sigmas)
    again.save(tmp_path / "h.safetensors", torch.float16)
    half = TextToImage.load(tmp_path / "h.safetensors")
    half.save(tmp_path / "i.safetensors", torch.float16)
    (first, about), (second, about_second) = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in "hi")
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items()) and about == about_second
    assert {p.dtype for p in half.parameters()} == {torch.float32} and {t.dtype for t in first.values()} == {torch.float16}


def test_load_with_another_vae(model, tmp_path):
    networks = build_networks(TINY)
    TextToImage(networks.unet, FoldedPixels(), networks.text, small_tokenizer(), schedule=model.schedule, scale_factor=1.0, length=12, config=TINY).save(tmp_path / "m")
    other = FoldedPixels(2)
    assert TextToImage.load(tmp_path / "m", vae=other).vae is other


@pytest.mark.parametrize("change", ["config", "text", "scale", "missing", "shape", "vae", "half"])
def test_other_files_are_refused(model, tmp_path, change):
    networks = build_networks(TINY)
    weights = {f"ema.{name}": t for name, t in networks.state_dict().items()}
    config = TINY | {"scale_factor": 1.0}
    if change == "config":
        config = {"model": "digits"}
    elif change == "text":
        config = config | {"text": 3}
    elif change == "scale":
        config = config | {"scale_factor": "large"}
    elif change == "missing":
        weights.pop("ema.unet.out.2.bias")
    elif change == "shape":
        weights["ema.unet.out.2.bias"] = torch.zeros(7)
    elif change == "vae":
        config = config | {"vae": "jpeg"}
    save_checkpoint(tmp_path / "m", weights, {"config": config})
    if change == "half":
        content = (tmp_path / "m").read_bytes()
        (tmp_path / "m").write_bytes(content[: len(content) // 2])
    said = dict.fromkeys(("config", "text", "scale"), "m does not say how") | {"vae": "jpeg", "half": "cut off"}
    with pytest.raises(CheckpointError, match=said.get(change, "out.2.bias")):
        TextToImage.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="cut off" if change == "half" else "m tells nothing of a training"):
        training_report("shapes", tmp_path / "m")


def parts_of(model):
    return [getattr(model, part) for part in ("unet", "vae", "text", "tokenizer")]


def test_what_is_loaded_is_what_was_saved(model, tmp_path):
    """Length and prediction go with it; another schedule is refused by `save`, another VAE by `load`."""
    common = dict(scale_factor=1.0, config=TINY)
    TextToImage(*parts_of(model), schedule=model.schedule, prediction="v", length=7, **common).save(tmp_path / "m")
    again = TextToImage.load(tmp_path / "m")
    assert (again.prediction, again.length) == ("v", 7)
    with pytest.raises(ValueError, match="schedule"):
        TextToImage(*parts_of(model), schedule=Schedule.flow(50, shift=3.0), length=12, **common).save(tmp_path / "n")
    with pytest.raises(ValueError, match="schedule"):
        TextToImage(*parts_of(model), schedule=model.schedule, length=12, scale_factor=1.0, config={"model": "mine"}).save(tmp_path / "n")
    again.vae = FoldedPixels(2)
    again.save(tmp_path / "o")
    with pytest.raises(CheckpointError, match="another VAE"):
        TextToImage.load(tmp_path / "o")
    assert TextToImage.load(tmp_path / "o", vae=again.vae).vae is again.vae and not (tmp_path / "n").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_models_are_saved(dtype, tmp_path):
    """The VAE is the shipped one, though rounded; and a compiled network has the names that it had."""
    whole = TextToImage.from_pretrained("shapes").to(dtype)
    whole.unet = torch.compile(whole.unet)
    whole.save(tmp_path / "m")
    again = TextToImage.load(tmp_path / "m")
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(again.unet.parameters(), whole.unet.parameters(), strict=True))
    assert again.vae.post_quant_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_walks_are_walked_in_float32(model, dtype):
    """Only the networks compute in half precision, and the noise is the seed's."""
    networks = build_networks(TINY).to(dtype).eval()
    other = TextToImage(networks.unet, FoldedPixels(), networks.text, small_tokenizer(), schedule=model.schedule, scale_factor=1.0, length=12)
    walk, seen = list(other.steps(PROMPT, steps=2)), []
    networks.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert all(step.x.dtype == step.x0.dtype == torch.float32 for step in walk)
    list(other.steps("a", steps=1, seed=4))
    assert torch.equal(seen[0][0], torch.randn(48, 4, 4, generator=seeded(4)))
    assert draw_many(other, PROMPT, batch=2, steps=1).dtype == torch.float32


def test_half_pictures_can_be_judged():
    """Whatever type a model draws in, judges get numbers that they can read, on the CPU."""
    assert draw_many(lambda prompts, seed: torch.zeros(len(prompts), 3, 8, 8).half(), PROMPT, batch=2).dtype == torch.float32


def test_save_needs_a_config(model, tmp_path):
    parts = (getattr(model, part) for part in ("unet", "vae", "text", "tokenizer"))
    with pytest.raises(ValueError, match="config"):
        TextToImage(*parts, schedule=model.schedule, scale_factor=1.0, length=12).save(tmp_path / "m")


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(prompts=[]), "prompts"),
        (dict(prompts=3), "prompts"),
        (dict(prompts=["a", 3]), "prompts"),
        (dict(prompts="a", sampler="euler"), "sampler"),
        (dict(prompts="a", steps=0), "steps"),
        (dict(prompts="a", steps=51), "steps"),
        (dict(prompts="a", size=18), "size"),
        (dict(prompts="a", size=(16, 16, 16)), "size"),
        (dict(prompts="a", size=0), "size"),
        (dict(prompts="a", seed=-1), "seed"),
        (dict(prompts="a", seed=0.5), "seed"),
        (dict(prompts="a", seed=True), "seed"),
        (dict(prompts=["a", "b"], seed=[1]), "seed"),
        (dict(prompts=["a", "b"], negative=["x"] * 3), "negative"),
        (dict(prompts="a", negative=None), "negative"),
        (dict(prompts="a", guidance=math.nan), "scale"),
        (dict(prompts="a", interval=(2, 1)), "interval"),
    ],
)
def test_bad_calls(model, arguments, name):
    with pytest.raises(ValueError, match=name):
        model(**arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize(("arguments", "name"), [(dict(scale_factor=0), "scale_factor"), (dict(scale_factor="1"), "scale_factor"), (dict(length=1), "length"),
                                                  (dict(length=13), "length"), (dict(prediction="noise"), "prediction")])
def test_bad_objects(model, arguments, name):
    parts = (getattr(model, part) for part in ("unet", "vae", "text", "tokenizer"))
    with pytest.raises(ValueError, match=name):
        TextToImage(*parts, schedule=model.schedule, **dict(scale_factor=1.0, length=12) | arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: TextToImage.from_pretrained("cats"), "cats"),
        (lambda: t2i_recipe("cats"), "cats"),
        (lambda: t2i_recipe("shapes", "jpeg"), "jpeg"),
        (lambda: training_report("cats"), "cats"),
        (lambda: train_text_to_image("cats"), "cats"),
        (lambda: quality_of(None, "cats"), "cats"),
        (lambda: FoldedPixels(0), "factor"),
        (lambda: FoldedPixels().encode(torch.zeros(1, 3, 10, 8)), "factor"),
        (lambda: FoldedPixels().decode(torch.zeros(1, 8, 2, 2)), "factor"),
        (lambda: told_less(parse_scene("a red circle"), 2), "what"),
        (lambda: list(shape_examples(2, seed=-1)), "seed"),
        (lambda: list(emoji_examples(-3)), "number"),
        (lambda: list(emoji_examples(3, seed="a")), "seed"),
        (lambda: train_text_to_image("shapes", seed=0.5), "seed"),
        (lambda: scale_of(torch.full((2, 8, 2, 2), -200.0)), "moments"),
        (lambda: scale_of(torch.full((2, 8, 2, 2), math.nan)), "moments must be of finite latents"),
        (lambda: scale_of(torch.full((2, 8, 2, 2), math.inf)), "moments must be of finite latents"),
        (lambda: scale_of(torch.zeros(0, 8, 2, 2)), "moments is empty"),
        (lambda: encode_examples([], FoldedPixels(), small_tokenizer(), 24), "examples"),
        (lambda: encode_examples([(torch.zeros(2, 3, 8, 8), [["a"], ["b", "c"]])], FoldedPixels(), small_tokenizer(), 24), "equally many captions"),
        (lambda: encode_examples([(torch.zeros(2, 3, 8, 8), [["a"]])], FoldedPixels(), small_tokenizer(), 24), "examples"),
        (lambda: Rate(0, 0), "number"),
        (lambda: Rate(4, 3), "hits"),
        (lambda: Rate(0.5, 3), "hits"),
        (lambda: draw_many(None, []), "prompts"),
        (lambda: draw_many(None, ["a"], seed=[1]), "seed"),
        (lambda: evaluate_shapes(None, 0), "number"),
        (lambda: evaluate_shapes(None, 5, things=3), "things"),
        (lambda: evaluate_shapes(None, 5, splits="all of it"), "split"),
        (lambda: copies(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "training"),
        (lambda: per_prompt("negative", ["a"], str, 2), "negative"),
        (lambda: list(shape_examples(0)), "number"),
    ],
)
def test_bad_names(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.bad_input
@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.one_of(st.integers(-2, 9), st.lists(st.integers(0, 9), max_size=4), st.booleans(), st.none()), number=st.integers(1, 4))
def test_seeds(seed, number):
    """A list of the right length, or an error that names the argument."""
    try:
        seeds = picture_seeds(seed, number)
    except ValueError as error:
        assert "seed" in str(error)
        assert seed is None or isinstance(seed, bool) or (seed < 0 if isinstance(seed, int) else len(seed) != number)
    else:
        assert seeds == (list(range(seed, seed + number)) if isinstance(seed, int) else seed)


# Data


def test_shape_examples():
    """Only training captions; drawn as they say; the short one is true, too."""
    (pictures, captions), = shape_examples(60, seed=3)
    assert pictures.shape == (60, 3, 32, 32) and all(len(c) == CAPTIONS and len(set(c)) == 2 for c in captions)
    assert latent_diffusion.shapes_match(pictures, [c[0] for c in captions]).all()
    assert latent_diffusion.shapes_match(pictures, [c[-1] for c in captions]).all()
    assert {shape_split(c[0]) for c in captions} == {"train"}
    assert {shape_split(str(scene)) for scene in read_shapes(pictures)} == {"train"}  # what is held out is not drawn under a shorter name either
    assert 0.4 < sum(parse_scene(c[0]).second is not None for c in captions) / 60 < 0.9
    again = next(shape_examples(60, seed=3))
    assert torch.equal(again[0], pictures) and again[1] == captions
    assert not torch.equal(next(shape_examples(60, seed=4))[0], pictures)


def test_told_less():
    scene = parse_scene("a large red circle at the top left")
    assert [told_less(scene, i) for i in (0, 1)] == ["a red circle at the top left", "a large red circle"]
    assert told_less(parse_scene("a large red circle above a small blue ring"), 0) == "a red circle above a blue ring"


def test_emoji_examples():
    """Training emoji only, each with its own name and one of its tags."""
    parts = list(emoji_examples(150, seed=1))
    pictures, captions = torch.cat([p for p, _ in parts]), [c for _, part in parts for c in part]
    known = dict(zip(emoji("train")[1], emoji("train")[0]))
    assert all(torch.equal(known[c[0]], x) for c, x in zip(captions, pictures))
    assert all(len(c) == CAPTIONS and c[-1].rsplit(", ", 1)[1] == c[0].rsplit(", ", 1)[1] for c in captions)
    assert sum(c[-1] != c[0] for c in captions) > 100 and len({c[0] for c in captions}) == 150


def test_prompts_are_what_they_are_said_to_be():
    names = {split: set(emoji(split)[1]) for split in ("train", "pairs", "concepts")}
    assert len(PROMPTS) == 16 and set(PROMPTS[:8]) <= names["pairs"] and set(PROMPTS[8:14]) <= names["train"] and PROMPTS[14] in names["concepts"]
    assert not any(PROMPTS[15] in captions for captions in names.values())
    assert len(LOOKS["shapes"]) == len(LOOKS["emoji"]) == 6


def test_encoded_examples():
    """Moments and tokens, in small types; the scale brings what is drawn from them to spread 1."""
    moments, tokens = encode_examples(shape_examples(40), FoldedPixels(), small_tokenizer(), 24)
    assert (moments.shape, moments.dtype, tokens.shape, tokens.dtype) == ((40, 96, 8, 8), torch.float16, (40, CAPTIONS, 24), torch.int32)
    latents = DiagonalGaussian(moments.float()).sample(seeded())
    assert abs(scale_of(moments) * latents.std().item() - 1) < 0.01
    wide = torch.cat([torch.randn(50, 4, 8, 8, generator=seeded()), torch.full((50, 4, 8, 8), math.log(3.0))], 1)
    assert abs(scale_of(wide) * DiagonalGaussian(wide).sample(seeded(1)).std().item() - 1) < 0.02
    assert all(small_tokenizer().decode(row[0].tolist()) == c[0] for row, c in zip(tokens, next(shape_examples(40))[1]))


def test_captions_fit():
    """No caption of shapes is cut off."""
    for things in (1, 2):
        assert max(len(small_tokenizer().ids(c)) for c in shape_captions(things)) + 2 <= RECIPES["shapes"]["text"]["length"]


def test_fingerprint():
    a = nn.Linear(2, 2)
    b = nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    b.weight.data[0, 0] += 1e-6
    assert fingerprint(a) != fingerprint(b)
    a.bfloat16()
    assert fingerprint(a) == fingerprint(deepcopy(a).float()) != fingerprint(b)  # the values count, not their type
    assert fingerprint(FoldedPixels(2)) != fingerprint(FoldedPixels(4)) and str(FoldedPixels(2)) == "FoldedPixels(factor=2)"


def test_training_data_are_kept(tmp_path):
    config = t2i_recipe("shapes", "pixels")
    first = training_data(tmp_path / "d", FoldedPixels(), config, 20, 0)
    again = training_data(tmp_path / "d", FoldedPixels(), config, 20, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for change in (dict(number=21), dict(seed=1), dict(vae=nn.Linear(1, 1)), dict(vae=FoldedPixels(2))):
        with pytest.raises(ValueError, match="folder"):
            training_data(tmp_path / "d", **dict(vae=FoldedPixels(), config=config, number=20, seed=0) | change)


# The loss


class Noting(nn.Module):
    """Answers nothing and remembers what it was told."""

    def forward(self, x, times, tokens):
        self.told = tokens
        return torch.zeros_like(x)


def test_captions_are_chosen_and_hidden_whole():
    moments = torch.randn(2000, 8, 2, 2, generator=seeded())
    tokens = (10 * torch.arange(5)[:, None] + torch.arange(6)).expand(2000, 5, 6).int()
    net, null = Noting(), torch.full((6,), 99)
    text_to_image_loss(net, (moments, tokens), seeded(), scale_factor=1.0, schedule=Schedule.flow(10), null=null)
    hidden = (net.told == 99).all(1)
    assert torch.equal(hidden, (net.told == 99).any(1)) and 0.07 < hidden.double().mean() < 0.13
    counts = torch.bincount(net.told[~hidden][:, 0] // 10, minlength=5) / (~hidden).sum()
    assert (counts - 0.2).abs().max() < 0.05 and net.told.dtype == torch.int64


def test_loss_is_chapter_09s():
    """With nothing hidden and one caption, the same number as by hand; drawn anew for each call; scaled."""
    networks = randomize(build_networks(TINY)).requires_grad_(False)
    moments, tokens = torch.randn(4, 96, 4, 4, generator=seeded()), torch.randint(2000, (4, 1, 12), generator=seeded()).int()
    schedule, call = Schedule.flow(10), partial(text_to_image_loss, networks, (moments, tokens), null=torch.zeros(12, dtype=torch.long), drop=0.0)
    dice = seeded(1)
    latents = 1.5 * DiagonalGaussian(moments).sample(dice)
    torch.randint(1, (4,), generator=dice), torch.rand(4, generator=dice)
    by_hand = diffusion_loss(networks, latents, schedule, "flow", generator=dice, tokens=tokens[:, 0].long())
    assert torch.equal(call(seeded(1), scale_factor=1.5, schedule=schedule), by_hand)
    assert not torch.equal(call(seeded(2), scale_factor=1.5, schedule=schedule), by_hand)
    assert not torch.equal(call(seeded(1), scale_factor=1.0, schedule=schedule), by_hand)


def test_gradients_reach_the_words():
    networks = randomize(build_networks(TINY))
    networks(torch.randn(2, 48, 4, 4), torch.tensor([10.0, 500.0]), torch.randint(2000, (2, 12))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in networks.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    """They can be written down, and build networks that fit together and to the pictures."""
    config = json.loads(json.dumps(t2i_recipe(name)))
    networks = build_networks(config)
    assert isinstance(networks, Prompted) and isinstance(networks.unet, UNetModel) and isinstance(networks.text, CLIPTextModel)
    size = networks.unet.image_size
    channels = networks.unet.in_channels
    assert channels == {"emoji": 4, "pixels": 48}[config["vae"]]
    out = networks(torch.randn(2, channels, *size), torch.tensor([1.0, 900.0]), small_tokenizer()(["a", "b"], length=config["text"]["length"]))
    assert out.shape == (2, channels, *size)
    other = t2i_recipe(name, "emoji" if config["vae"] == "pixels" else "pixels")
    assert other["unet"]["in_channels"] == 52 - channels and "in_channels" not in RECIPES[name]["unet"]  # recipes stay as they are


# Training


@pytest.fixture(scope="module")
def small_recipe():
    """A training of seconds."""
    patch = pytest.MonkeyPatch()
    training = dict(steps=4, batch_size=8, learning_rate=1e-3, warmup=1, ema=0.9, every=2)
    recipe = {key: TINY[key] for key in ("tokenizer", "vae", "prediction", "schedule")} | dict(
        unet=TINY["unet"] | dict(image_size=8), text=TINY["text"] | dict(length=16), training=training)
    patch.setitem(latent_diffusion.RECIPES, "shapes", recipe)
    yield recipe
    patch.undo()


class Stop(Exception):
    """A power cut."""


def test_resumes_bit_for_bit(small_recipe, tmp_path):
    """Stopped after a step and called again: the same weights, averages, losses and drawings as in one go."""
    through = train_text_to_image("shapes", tmp_path / "through", number=24, progress=False)

    def cut(trainer):
        if trainer.step == 2:
            raise Stop

    with pytest.raises(Stop):
        train_text_to_image("shapes", tmp_path / "cut", number=24, progress=False, callback=cut)
    assert not (tmp_path / "cut" / "last.safetensors").exists()  # the look was not over: all begins anew

    def late(trainer):
        if trainer.step == 4:
            raise Stop

    with pytest.raises(Stop):
        train_text_to_image("shapes", tmp_path / "cut", number=24, progress=False, callback=late)
    assert load_checkpoint(tmp_path / "cut" / "last.safetensors")[1]["step"] == 2
    resumed = train_text_to_image("shapes", tmp_path / "cut", number=24, progress=False)
    files = [load_checkpoint(tmp_path / folder / "last.safetensors") for folder in ("through", "cut")]
    assert files[0][0].keys() == files[1][0].keys() and all(torch.equal(t, files[1][0][name]) for name, t in files[0][0].items())
    assert resumed.history == through.history and files[0][1] == files[1][1]
    looks = [load_checkpoint(tmp_path / folder / "looks.safetensors")[0] for folder in ("through", "cut")]
    assert looks[0].keys() == looks[1].keys() == {"looks.2", "looks.4"} and all(torch.equal(t, looks[1][name]) for name, t in looks[0].items())


def test_checkpoint_ships(small_recipe, tmp_path):
    """A checkpoint is a model; the shipped file is half as large and keeps what was seen on the way."""
    trainer = train_text_to_image("shapes", tmp_path / "run", number=24, progress=False)
    model = TextToImage.load(tmp_path / "run" / "last.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.unet.state_dict().values(), trainer.ema_model.unet.state_dict().values()))
    assert model.scale_factor == trainer.config["scale_factor"] != 1 and model.config["text"]["length"] == 16
    ship_text_to_image(tmp_path / "run", tmp_path / "small", {"one": [3, 4]})
    shipped, report = TextToImage.load(tmp_path / "small"), training_report("shapes", tmp_path / "small")
    assert relative_error(shipped("a red circle", steps=2), model("a red circle", steps=2)) < 0.02
    assert report.quality == {"one": [3, 4]} and report.steps == 4 and list(report.looks) == [2, 4] and report.prompts == LOOKS["shapes"]
    assert report.looks[2].shape == (6, 48, 8, 8) and not torch.equal(report.looks[2], report.looks[4])


def test_own_data(small_recipe, tmp_path, monkeypatch):
    """An entry in three tables, and the command trains on pictures of your own; a short training can be shipped, too."""
    mine = lambda number=20, seed=0: [(shapes(number, seed=seed)[0], [["mine", "my own"]] * number)]
    for table, entry in (("EXAMPLES", mine), ("RECIPES", small_recipe), ("LOOKS", ["mine"])):
        monkeypatch.setitem(getattr(latent_diffusion, table), "mine", entry)
    trainer = train_text_to_image("mine", tmp_path, steps=1, progress=False)
    assert trainer.step == 1 and trainer.batches.number == 20 and not (tmp_path / "looks.safetensors").exists()
    ship_text_to_image(tmp_path, tmp_path / "small")
    assert TextToImage.load(tmp_path / "small").config["model"] == "t2i_mine"
    assert training_report("mine", tmp_path / "small").looks == {}
    small_recipe["text"]["length"] += 1
    try:
        with pytest.raises(ValueError, match="17"):
            train_text_to_image("mine", tmp_path, steps=1, progress=False)
    finally:
        small_recipe["text"]["length"] -= 1


def test_too_few_pictures_leave_nothing(small_recipe, tmp_path):
    with pytest.raises(ValueError, match="number=7 must be at least 8"):
        train_text_to_image("shapes", tmp_path / "few", number=7, progress=False)
    assert not (tmp_path / "few").exists()


def test_main_process_makes_the_data(small_recipe, tmp_path, monkeypatch):
    """The others wait until they can read them; and only the CPU's random numbers are touched."""
    import accelerate

    told, fork = [], torch.random.fork_rng

    @contextmanager
    def first(state):
        told.append("wait")
        yield
        told.append("go on")

    def data(*_):
        told.append("data")
        return training_data(*_)

    class Built(Trainer):
        def __init__(self, model, *_, **__):
            raise Stop(model)

    monkeypatch.setattr(accelerate.PartialState, "main_process_first", first)
    monkeypatch.setattr(latent_diffusion, "training_data", data)
    monkeypatch.setattr(latent_diffusion, "Trainer", Built)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *devices: told.append(devices) or fork(*devices))
    with pytest.raises(Stop) as stopped:
        train_text_to_image("shapes", tmp_path, seed=3, number=8, progress=False)
    assert told == ["wait", "data", "go on", ([],)]
    torch.manual_seed(3)
    same = build_networks(t2i_recipe("shapes")).parameters()
    assert all(torch.equal(a, b) for a, b in zip(stopped.value.args[0].parameters(), same, strict=True))


def test_only_trainings_of_this_kind_are_shipped(small_recipe, tmp_path):
    """And what is at the path stays there."""
    train_text_to_image("shapes", tmp_path / "run", number=24, progress=False)
    ship_text_to_image(tmp_path / "run", tmp_path / "shipped" / "last.safetensors")
    TextToImage.load(tmp_path / "run" / "last.safetensors").save(tmp_path / "saved" / "last.safetensors")
    tensors, state = load_checkpoint(tmp_path / "run" / "last.safetensors")
    save_checkpoint(tmp_path / "other" / "last.safetensors", tensors, state | {"config": {"model": "emoji_clip"}})
    (tmp_path / "good").write_text("good")
    for folder in ("shipped", "saved", "other"):
        with pytest.raises(CheckpointError, match="no training by train_text_to_image"):
            ship_text_to_image(tmp_path / folder, tmp_path / "good")
        assert (tmp_path / "good").read_text() == "good"


def test_other_data_are_refused(small_recipe, tmp_path):
    train_text_to_image("shapes", tmp_path, number=24, steps=2, progress=False)
    with pytest.raises(ValueError, match="folder"):
        train_text_to_image("shapes", tmp_path, number=16, steps=2, progress=False)


def test_seed_of_training(small_recipe, tmp_path):
    losses = [train_text_to_image("shapes", tmp_path / name, number=24, steps=2, seed=seed, progress=False).history["loss"] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert losses[0] == losses[1] != losses[2]


# What ships


@pytest.mark.parametrize("name", RECIPES)
def test_shipped(name):
    """It is what the recipe trains, with the VAE that is shipped beside it; finite, and deaf to nothing."""
    model, report = TextToImage.from_pretrained(name), training_report(name)
    assert all(model.config[key] == BUILT[name][key] for key in ("unet", "text", "prediction", "schedule"))
    assert len(report.loss) == report.steps // 50 and report.prompts == LOOKS[name] and not model.training
    pictures = model([PROMPTS[0], PROMPTS[1]], steps=2, seed=[0, 0])
    assert pictures.shape == (2, 3, *(model.vae.factor * n for n in model.unet.image_size)) and pictures.isfinite().all() and not torch.equal(*pictures)
    if report.quality:  # the shipped weights, not a stand-in
        assert model.config["vae_fingerprint"] == fingerprint(model.vae)


SHIPPED = {
    "digits": pretrained, "classifier": digit_classifier, "vae": pretrained_vae, "clip": pretrained_clip,
    **{name: partial(TextToImage.from_pretrained, name) for name in RECIPES},
}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_shipped_weights_whatever_the_default_type(name, dtype):
    """A program that builds its own networks in another type reads the same float32 weights, and the VAE of a model is known again."""
    usual = SHIPPED[name]().state_dict()
    torch.set_default_dtype(dtype)
    try:
        read = SHIPPED[name]().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert usual.keys() == read.keys()
    assert all(read[key].dtype == t.dtype and torch.equal(read[key], t) for key, t in usual.items())
    assert all(t.dtype == torch.float32 for t in read.values() if t.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize(("things", "least"), [(1, 0.8), (2, 0.55)])
def test_shipped_shapes_do_as_they_are_told(things, least):
    if not training_report("shapes").quality:
        pytest.skip("a stand-in for the shipped weights")
    rates = evaluate_shapes(TextToImage.from_pretrained("shapes"), 100, things=(things,), splits=("train", "combinations"))
    assert all(rate.interval[1] > least for rate in rates.values()), {key: str(rate) for key, rate in rates.items()}


# Judging


@settings(max_examples=50, deadline=None, derandomize=True)
@given(number=st.integers(1, 2000), share=st.floats(0, 1))
def test_wilson(number, share):
    """Its ends are the shares p for which the count lies 1.96 standard deviations away: Wilson's definition."""
    rate = Rate(round(share * number), number)
    low, high = rate.interval
    assert 0 <= low <= rate.value + 1e-12 and rate.value - 1e-12 <= high <= 1 and low < high
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert math.isclose(abs(rate.value - p), 1.96 * math.sqrt(p * (1 - p) / number), rel_tol=1e-6, abs_tol=1e-9)


def test_wilson_known():
    assert [round(x, 4) for x in Rate(10, 10).interval] == [0.7225, 1.0] and str(Rate(95, 100)) == "0.950 (0.888 to 0.978)"


class Perfect:
    """Draws what it is told, wrongly for large things."""

    def __call__(self, prompts, seed, **options):
        assert options == {"guidance": 2}
        return draw_shapes([p.replace("large", "small") for p in prompts], 32, seeded(seed))


def test_evaluate_shapes():
    rates = evaluate_shapes(Perfect(), 60, splits=("train", "pairs"), guidance=2)
    assert set(rates) == {(1, "train"), (1, "pairs"), (2, "train"), (2, "pairs")} and all(r.number == 60 for r in rates.values())
    assert 0.3 < rates[1, "train"].value < 0.7 and 0.1 < rates[2, "train"].value < 0.45


def test_draw_many(model):
    """As in one batch; and a text is one prompt, not so many letters."""
    prompts = [f"thing {i}" for i in range(5)]
    assert torch.equal(draw_many(model, "thing", steps=2), model("thing", steps=2))
    assert torch.allclose(draw_many(model, prompts, batch=2, steps=2, seed=4), model(prompts, steps=2, seed=4), atol=1e-9)


def test_copies():
    """A training picture and one close to it are copies; one far from all is none; an empty one is."""
    training = torch.randn(20, 3, 4, 4, generator=seeded())
    samples = torch.stack([training[3], training[5] + 0.01, 5 + training[0]])
    assert copies(samples, training) == Rate(2, 3)
    assert copies(torch.zeros(1, 3, 4, 4), training) == Rate(1, 1)


class Remembering:
    """Gives back real pictures, by their captions."""

    def __init__(self, *splits):
        self.known = {caption: x for split in splits for x, caption in zip(*emoji(split))}

    def __call__(self, prompts, seed):
        return torch.stack([self.known[p] for p in prompts])


def test_evaluate_emoji(monkeypatch):
    """Real pictures get what real pictures get, and are their own copies."""
    from unet_course.clip import emoji_clip

    clip = emoji_clip().eval().requires_grad_(False)
    monkeypatch.setattr(latent_diffusion, "pretrained_clip", lambda: clip)
    score = evaluate_emoji(Remembering("pairs", "train"), 130)
    assert isinstance(score, EmojiScore) and score.retrieval == score.retrieval_of_real and score.in_style == score.in_style_of_real
    assert score.frechet == pytest.approx(score.floor, rel=1e-3) and score.copies == score.copies_of_real and score.copies_of_known.value > 0.9
    assert score.retrieval.number == score.in_style.number == len(emoji("pairs")[1]) and score.frechet > 0
    assert f"retrieval of real {score.retrieval}" in str(score) and f"floor {score.floor:.4f}" in str(score)
    with pytest.raises(ValueError, match="number"):
        evaluate_emoji(Remembering("pairs", "train"), 100)


class Styled:
    """Sees nothing but the style, and breaks ties by chance: what a caption's last word is worth."""

    text = type("Text", (), {"length": 32})
    logit_scale = torch.zeros(())

    def __init__(self):
        self.dice = seeded()

    def about(self, styles):
        return torch.nn.functional.one_hot(torch.tensor(styles), 3).float()

    def encode_image(self, x):
        return torch.cat([x[:, 0, 0, :3], 1e-3 * torch.randn(len(x), 5, generator=self.dice)], 1)

    def encode_text(self, tokens):
        styles = [next(i for i, style in enumerate(("fluent", "noto", "twemoji")) if style in small_tokenizer().decode(row)) for row in tokens]
        return torch.cat([self.about(styles), torch.randn(len(tokens), 5, generator=self.dice)], 1)


@pytest.mark.bad_input
def test_what_the_style_alone_finds():
    """About 1 in 20 among captions of all styles; 1 in 60 among captions of its own."""
    captions = [f"thing {i}, {style}" for i in range(400) for style in ("fluent", "noto", "twemoji")]
    clip = Styled()
    pictures = torch.zeros(1200, 3, 8, 8)
    pictures[:, 0, 0, :3] = clip.about([i % 3 for i in range(1200)])
    mixed, alike = (found_by_clip(pictures, captions, clip, one_style) for one_style in (False, True))
    assert mixed.number == alike.number == 1200 and abs(mixed.value - 1 / 20) < 0.02 and abs(alike.value - 1 / 60) < 0.012


def test_quality_of():
    """By name, as JSON can hold it, and as the chapter reads it again."""
    quality = json.loads(json.dumps(quality_of(Perfect(), "shapes", number=30, splits="train", guidance=2)))
    assert set(quality) == {"1 train", "2 train"} and Rate(*quality["1 train"]) == evaluate_shapes(Perfect(), 30, things=1, splits="train", guidance=2)[1, "train"]


@pytest.mark.bad_input
def test_quality_of_emoji(monkeypatch):
    """The fields of the score, by name."""
    score = EmojiScore(*[Rate(i, 9) for i in range(4)], 0.5, 0.25, *[Rate(i, 9) for i in range(3)])
    monkeypatch.setitem(latent_diffusion.JUDGES, "emoji", lambda model, number: score)
    quality = quality_of(None, "emoji", number=3)
    assert quality["in_style"] == [2, 9] and quality["floor"] == 0.25 and json.loads(json.dumps(quality)) == quality


def test_playground(model):
    """A change of any field draws another picture."""
    widgets = pytest.importorskip("ipywidgets")
    box = playground(model, "a red circle")
    fields, picture = box.children[0].children, box.children[1]
    assert picture.value[:4] == b"\x89PNG" and isinstance(fields[0], widgets.Text)
    seen = {picture.value}
    for field, value in zip(fields, ("a cat", "a dog", 6.0, 3, 5)):
        field.value = value
        seen.add(picture.value)
    assert len(seen) == 6


def test_another_vae_is_noticed(monkeypatch):
    """Weights that were trained in the latents of one VAE are not drawn with another, unless it is given by hand."""
    other = randomize(latent_diffusion.VAES["emoji"]())
    monkeypatch.setitem(latent_diffusion.VAES, "emoji", lambda: other)
    with pytest.raises(CheckpointError, match="latents of another VAE"):
        TextToImage.from_pretrained("shapes")
