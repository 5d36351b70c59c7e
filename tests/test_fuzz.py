"""Everything public, with arguments that fit and with some that do not: a result or a clear error, and what is loaded is loaded in full or not at all."""

import json
import math
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from probing import mostly_valid
from test_cli import any_precision, idle, never_a_traceback, sensible, tiny  # noqa: F401
from torch import Tensor, nn

import unet_course as u
from unet_course.attention import ATTENTION
from unet_course.data import folder, read_asset
from unet_course.latent_diffusion import FoldedPixels, build_networks, training_report
from unet_course.scale import write_shards
from unet_course.stable_diffusion import TensorFile, build
from unet_course.training import parse_checkpoint

pytestmark = pytest.mark.bad_input


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these lose time with a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# How a case is drawn

Pick = Callable[..., object]  # pick(a, b, …): one of these


class Entry(NamedTuple):
    """How something public is called."""

    call: Callable[..., object]  # Makes it, and runs it on something small
    arguments: Callable[[Pick], dict]  # Draws arguments that fit together
    also: dict[str, str]  # Argument → under what other name a message may speak of it
    unlike: tuple[str, ...]  # Arguments that are never replaced
    typed: bool  # Whether whole numbers in the place of fractions are refused, too
    numbers: bool  # Whether numbers are replaced by numbers only: not everything asks what type it is given


TABLE: dict[str, Entry] = {}


def entry(name: str, call: Callable[..., object] | None = None, *inputs: str, also: dict[str, str] = {}, unlike: tuple[str, ...] = (), typed: bool = False,
          numbers: bool = False):
    """Put something into the table: a function that is called, or a class that is made from its arguments and then called on some of them."""
    thing = getattr(u, name) if call is None else call

    def made(**arguments: object) -> object:
        given = {key: arguments.pop(key) for key in inputs if key in arguments}
        module = thing(**arguments)
        return module(*given.values()) if len(given) == 1 else module(**given)

    def register(arguments: Callable[[Pick], dict]) -> None:
        TABLE[name] = Entry(made if inputs else thing, arguments, also, unlike, typed, numbers)

    return register


NUMBERS = (0, -1, 1.5, True, None, "x", [], (), math.nan, math.inf)


def wrong_ones(value: object, typed: bool = False, numbers: bool = False) -> list:
    """What may take the place of an argument that fits; some of it may fit, too."""
    if numbers:
        return [0, -1, math.nan, math.inf] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
    if isinstance(value, bool):
        return [0, "x"]
    if isinstance(value, (int, float)):
        return [*NUMBERS]
    if isinstance(value, str):
        return ["x", "", None, 3, []]
    if isinstance(value, (list, tuple)):
        odd = [kind([*value[:-1], last]) for kind in (list, tuple) for last in (-1, 1.5, "x", None, math.nan)]
        return [(), [], None, "x", 0, 1.5, (*value, *value), *(odd if value else [])]
    if isinstance(value, Tensor):
        other = [value.long() if value.is_floating_point() else value.float()] if typed else []
        return [value[..., None], value.flatten()[: len(value)], torch.cat([value, value], -1), torch.cat([value, value[:1]]), *other]
    return []


@st.composite
def cases(draw, name: str) -> tuple[dict, str]:
    """Arguments that fit, and the name of the one that was replaced by a wrong one, if any was."""
    arguments = TABLE[name].arguments(lambda *values: draw(st.sampled_from(values)))
    wrong = {key: wrong_ones(value, TABLE[name].typed, TABLE[name].numbers) for key, value in arguments.items() if key not in TABLE[name].unlike}
    wrong = {key: values for key, values in wrong.items() if values}
    if not wrong or not draw(st.sampled_from((False, False, True))):
        return arguments, ""
    key = draw(st.sampled_from(sorted(wrong)))
    return {**arguments, key: draw(st.sampled_from(wrong[key]))}, key


def tensors_in(result: object) -> list[Tensor]:
    """All tensors of an answer."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def attempt(name: str, arguments: dict, wrong: str) -> bool:
    """Whether the call gave a result; if not, it gave a `ValueError` that names what is wrong. Warnings are errors, and no result holds a nan that was not put in."""
    found = TABLE[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = found.call(**arguments)
    except ValueError as error:
        assert wrong, f"{name}({arguments}) fits, and is refused: {error}"
        names = wrong, *found.also.get(wrong, "").split()
        assert any(part in str(error) for part in names), f"{name}: {wrong}={arguments[wrong]!r} is refused, but not named: {error}"
        return False
    except Exception as error:
        raise AssertionError(f"{name}: {wrong or arguments}={arguments.get(wrong)!r} raises {type(error).__name__}: {error}") from error
    if str(arguments.get(wrong)) != "inf" and "nan" not in str(arguments.get(wrong)):  # what is not finite may come out so
        assert not any(tensor.isnan().any() for tensor in tensors_in(result)), f"{name}: {wrong or arguments}={arguments.get(wrong)!r} makes nan"
    return True


# What the arguments are made of


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def picture(pick: Pick, channels: int, dims: int = 2, sizes: tuple[int, ...] = (4, 5, 6)) -> Tensor:
    return noise(2, channels, *(pick(*sizes) for _ in range(dims)))


def flags(pick: Pick, *names: str) -> dict[str, bool]:
    return {name: pick(False, True) for name in names}


@cache
def text_model() -> u.CLIPTextModel:
    return u.CLIPTextModel(vocab_size=2048, width=16, layers=1, heads=2, length=12)


@cache
def text_to_image() -> u.TextToImage:
    """Tiny and random."""
    networks = build_networks(TINY)
    return u.TextToImage(networks.unet, FoldedPixels(), networks.text, u.small_tokenizer(), schedule=u.Schedule.flow(**TINY["schedule"]), scale_factor=2.5,
                         length=12, config=TINY)


TINY = dict(
    unet=dict(image_size=2, in_channels=48, out_channels=48, model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1], num_heads=2,
              use_spatial_transformer=True, context_dim=16),
    text=dict(width=16, layers=1, heads=2, length=12, vocab_size=2048),
    tokenizer="small", vae="pixels", prediction="flow", schedule=dict(steps=50, shift=2.0),
)
THIN = {
    **u.SD1,
    "unet": dict(image_size=4, in_channels=4, out_channels=4, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), num_heads=2,
                 use_spatial_transformer=True, transformer_depth=1, context_dim=16),
    "vae": dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8, in_channels=3, out_ch=3, z_channels=4, embed_dim=4),
    "text": dict(vocab_size=2048, width=16, layers=1, heads=2, length=12, mlp_width=32, activation="quick_gelu"),
}


@cache
def stable_diffusion() -> u.StableDiffusion:
    torch.manual_seed(0)
    return build(THIN, tokenizer=u.small_tokenizer())


def guess(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """What samplers ask."""
    return 0.5 * x, 0.5 * x


# Chapter 01


@entry("timestep_embedding")
def _(pick):
    return dict(timesteps=pick(torch.tensor([3, 500]), torch.tensor([0.5, 7.0])), dim=pick(2, 5, 32), max_period=pick(100, 10000.0), repeat_only=pick(False,
                    True))


@entry("get_timestep_embedding")
def _(pick):
    return dict(timesteps=pick(torch.tensor([3, 500]), torch.tensor([0.5, 7.0])), embedding_dim=pick(4, 5, 32))


@entry("TimestepEmbedding", None, "embedding")
def _(pick):
    width = pick(4, 7)
    return dict(in_channels=width, time_embed_dim=pick(None, 8), embedding=noise(2, width))


# Chapter 02


def convolution(pick):
    dims = pick(1, 2, 2, 3, 4)
    each = lambda *values: pick(*values, (values[0],) * dims)  # noqa: E731
    return dict(dims=dims, in_channels=pick(2, 4), out_channels=pick(2, 4), kernel_size=each(1, 2, 3), stride=each(1, 2), padding=each(0, 1),
                    dilation=each(1, 2),
                groups=pick(1, 2), bias=pick(True, False))


for _name in ("ConvNd", "ConvTransposeNd", "conv_nd", "conv_transpose_nd"):

    @entry(_name, None, "x", unlike=("x",) if _name[0] == "c" else ())  # up to three axes they are PyTorch's, and so are the complaints about x
    def _(pick, name=_name):
        found = convolution(pick) | (dict(native=pick(1, 2, 3)) if name[0] == "C" else {})
        if "ranspose" in name:
            found["output_padding"] = pick(0, 0, (0,) * found["dims"])
        return found | dict(x=noise(2, found["in_channels"], *[5] * found["dims"]))


for _name in ("avg_pool_nd", "max_pool_nd"):

    @entry(_name, None, "x", unlike=("x",))
    def _(pick):
        dims = pick(1, 2, 3, 4)
        return dict(dims=dims, kernel_size=pick(2, 3, (2,) * dims), stride=pick(None, 1, 2), padding=pick(0, 1), x=picture(pick, 2, dims))


@entry("zero_module")
def _(pick):
    return dict(module=pick(nn.Linear(2, 3), nn.Identity()))


for _name in ("Downsample", "Upsample"):

    @entry(_name, None, "x")
    def _(pick):
        dims, use_conv = pick(1, 2, 2, 3), pick(True, True, False)
        more = dict(out_channels=pick(None, 2, 4), padding=pick(1, 0)) if use_conv else {}
        return dict(channels=3, use_conv=use_conv, dims=dims, factor=pick(2, (2,) * dims), x=picture(pick, 3, dims)) | more


@entry("AsymmetricDownsample", None, "x")
def _(pick):
    dims = pick(1, 2, 2, 3, 4)
    return dict(channels=3, with_conv=pick(True, False), dims=dims, x=picture(pick, 3, dims))


# Chapter 03


def with_x(arguments, name):
    return arguments | dict(x=noise(2, arguments[name], 4, 4))


@entry("GroupNorm32", None, "x", unlike=("x",))
def _(pick):
    groups = pick(1, 2, 4)
    return with_x(dict(num_groups=groups, num_channels=pick(groups, 2 * groups), eps=pick(1e-5, 1e-3)), "num_channels")


@entry("normalization", None, "x", unlike=("x",))
def _(pick):
    return with_x(dict(channels=pick(32, 64)), "channels")


@entry("Normalize", None, "x", unlike=("x",))
def _(pick):
    return with_x(dict(channels=pick(32, 64), num_groups=pick(32, 4), eps=pick(1e-6, 1e-3)), "channels")


@entry("ResBlock", None, "x", "emb", also={"emb": "embedding", "emb_channels": "embedding", "x": "embedding"})
def _(pick):
    dims, emb = pick(1, 2, 2, 3), pick(None, 8)
    options = dict(use_scale_shift_norm=pick(False, True), emb=noise(pick(1, 2), emb)) if emb else {}
    way = pick({}, {}, {"up": True}, {"down": True})
    return dict(channels=32, emb_channels=emb, dropout=pick(0.0, 0.5), out_channels=pick(None, 32, 64), use_conv=pick(False, True), dims=dims,
                use_checkpoint=pick(False, True), x=picture(pick, 32, dims)) | options | way


@entry("ResnetBlock", None, "x", "temb", also={"temb": "embedding", "temb_channels": "embedding", "x": "embedding"})
def _(pick):
    dims, temb = pick(1, 2, 2, 3), pick(0, 8)
    return dict(in_channels=32, out_channels=pick(None, 32, 64), conv_shortcut=pick(False, True), dropout=pick(0.0, 0.5), temb_channels=temb, dims=dims,
                x=picture(pick, 32, dims)) | (dict(temb=noise(2, temb)) if temb else {})


# Chapter 04

BACKENDS = ("auto", "vanilla", "sdpa", "linear")


@entry("AttentionBlock", None, "x")
def _(pick):
    return dict(channels=32, num_heads=pick(1, 2, 4), num_head_channels=pick(-1, -1, 8), backend=pick(*BACKENDS), x=picture(pick, 32, pick(1, 2, 3)),
                **flags(pick, "use_checkpoint", "use_new_attention_order"))


@entry("AttnBlock", None, "x")
def _(pick):
    dims = pick(1, 2, 2, 3)
    return dict(in_channels=32, dims=dims, backend=pick(*BACKENDS), x=picture(pick, 32, dims))


@entry("LinearAttention", None, "x")
def _(pick):
    dims = pick(1, 2, 2, 3)
    return dict(dim=6, heads=pick(1, 3), dim_head=pick(2, 5), dims=dims, x=picture(pick, 6, dims))


@entry("LinearAttentionBlock", None, "x", unlike=("x",))
def _(pick):
    dims = pick(1, 2, 2, 3)
    return dict(in_channels=32, heads=pick(1, 2), dim_head=pick(None, 5), dims=dims, x=picture(pick, 32, dims))


@entry("CrossAttention", None, "x", "context", "mask", also={"context_dim": "context", "x": "context"})
def _(pick):
    width, words = pick(None, 5), pick(1, 3)
    tokens = noise(2, words, width or 6)
    backend, mask = pick(*BACKENDS), {}
    if backend != "linear":
        mask = pick({}, dict(mask=torch.tensor([True] * words).expand(2, -1)))
    return dict(query_dim=6, context_dim=width, heads=pick(1, 2), dim_head=pick(2, 5), dropout=pick(0.0, 0.5), backend=backend, x=noise(2, 4, 6),
                    context=tokens) | mask


@entry("make_attention", None, "x", unlike=("x",))
def _(pick):
    return dict(in_channels=32, attn_type=pick("vanilla", "linear", "none"), x=noise(2, 32, 4, 4))


def registered(name):
    u.register_attention(name)(u.AttnBlock)
    if name not in ("vanilla",):
        del ATTENTION[name]


@entry("register_attention", registered)
def _(pick):
    return dict(name=pick("mine", "vanilla"))


# Chapter 05


@entry("GEGLU", None, "x", unlike=("x",))
def _(pick):
    return dict(dim_in=4, dim_out=pick(3, 4), x=noise(2, 5, 4))


@entry("FeedForward", None, "x", unlike=("x",))
def _(pick):
    return dict(dim=4, dim_out=pick(None, 3), mult=pick(1, 2.5), glu=pick(False, True), dropout=pick(0.0, 0.5), x=noise(2, 5, 4))


@entry("BasicTransformerBlock", None, "x", "context", unlike=("x",), also={"context_dim": "context"})
def _(pick):
    width = pick(None, 5)
    return dict(dim=6, n_heads=pick(1, 2), d_head=pick(2, 3), dropout=pick(0.0, 0.5), context_dim=width, x=noise(2, 4, 6), context=noise(2, 3, width or 6),
                **flags(pick, "gated_ff", "checkpoint", "disable_self_attn"))


@entry("SpatialTransformer", None, "x", "context", also={"context_dim": "context", "x": "context"})
def _(pick):
    dims, depth = pick(1, 2, 2, 3), pick(1, 2)
    return dict(in_channels=32, n_heads=pick(1, 2), d_head=pick(2, 4), depth=depth, dropout=pick(0.0, 0.5), context_dim=pick(5, [5] * depth), dims=dims,
                x=picture(pick, 32, dims), context=noise(2, 3, 5), **flags(pick, "disable_self_attn", "use_linear", "use_checkpoint"))


# Chapters 06 to 08


@entry("Model", None, "x", "t", typed=True, also={"use_timestep": " t"})
def _(pick):
    dims, levels, timed = pick(1, 2, 2, 3), pick(1, 2), pick(True, True, False)
    return dict(ch=32, out_ch=pick(1, 3), ch_mult=pick((1,) * levels, [1, 2][:levels]), num_res_blocks=pick(1, 2), attn_resolutions=pick((), (8,)),
                dropout=pick(0.0, 0.1), in_channels=3, resolution=8, use_timestep=timed, attn_type=pick("vanilla", "linear", "none"), dims=dims,
                resamp_with_conv=pick(True, False), x=picture(pick, 3, dims), t=pick(5, [1, 2], torch.tensor([3, 4])) if timed else None)


@entry("TimestepEmbedSequential", lambda x, emb: u.TimestepEmbedSequential(nn.Conv2d(3, 32, 1), u.ResBlock(32, 8, 0.0))(x, emb), unlike=("x",),
       also={"emb": "embedding"})
def _(pick):
    return dict(x=picture(pick, 3), emb=noise(2, 8))


@entry("UNetModel", None, "x", "timesteps", "context", "y", also={"num_head_channels": "num_heads", "model_channels": "channels", "context_dim": "context",
       "x": "timesteps context y"}, typed=True)
def _(pick):
    dims, levels = pick(1, 2, 2, 2, 3), pick(1, 2)
    more = pick(
        dict(num_heads=pick(1, 2), use_new_attention_order=pick(False, True)),
        dict(num_head_channels=pick(8, 16)),
        dict(attn_type=pick("linear", "none", "vanilla")),
        dict(use_spatial_transformer=True, context_dim=5, num_heads=2, transformer_depth=pick(1, [1] * levels), context=noise(2, 3, 5)),
    )
    classes = pick({}, {}, dict(num_classes=3, y=torch.tensor([0, 2])), dict(num_classes="continuous", y=torch.tensor([0.5, 2.0])))
    return dict(image_size=pick(8, (8,) * dims), in_channels=3, model_channels=32, out_channels=pick(1, 3), num_res_blocks=pick(1, [1] * levels),
                attention_resolutions=pick((), (1,), [levels]), dropout=pick(0.0, 0.1), channel_mult=pick((1, 2)[:levels], [1] * levels), dims=dims,
                x=picture(pick, 3, dims), timesteps=pick(5, 2.5, [1, 2], torch.tensor([3, 4])),
                **flags(pick, "conv_resample", "use_scale_shift_norm", "resblock_updown", "use_checkpoint"), **more, **classes)


@entry("DoubleConv", None, "x", "emb", unlike=("x", "emb"))
def _(pick):
    dims, emb = pick(1, 2, 2, 3), pick(None, 8)
    return dict(channels=3, emb_channels=emb, dropout=pick(0.0, 0.5), out_channels=pick(4, 6), dims=dims, normalize=nn.Identity, activation=nn.SiLU,
                x=picture(pick, 3, dims)) | (dict(emb=noise(2, emb)) if emb else {})


@entry("UNetND", None, "x", "t", also={"t": "time"}, typed=True)
def _(pick):
    dims, levels, timed = pick(1, 2, 2, 3), pick(1, 2), pick(False, True)
    return dict(dims=dims, in_channels=2, out_channels=pick(1, 3), channels=pick((32,) * levels, [32, 64][:levels]), blocks_per_level=1,
                activation=pick("silu", "relu", "gelu"), norm=pick("group", "batch", "layer", "none"), attention=pick("none", "linear", ("none",) * levels),
                residual=pick(True, False), time_embedding=timed, down=pick("conv", "avg", "max"), up=pick("nearest", "linear", "transposed"),
                dropout=pick(0.0, 0.1), factor=pick(2, (2,) * dims), x=picture(pick, 2, dims), t=pick(5, [1, 2], torch.tensor([3, 4])) if timed else None)


# Chapter 09


@entry("Schedule")
def _(pick):
    line = torch.linspace(0, 1, pick(3, 7) + 2)[1:-1].double()
    kind = pick(list, tuple, torch.stack)
    alphas, sigmas = ([*values] for values in (1 - line, line))
    return dict(alphas=kind(alphas), sigmas=kind(sigmas)) | pick({}, dict(times=[float(i) for i in range(len(line))]))


for _name in ("linear_betas", "scaled_linear_betas"):

    @entry(_name)
    def _(pick):
        return dict(steps=pick(1, 2, 50), start=pick(1e-4, 0.01), end=pick(0.02, 0.5, 1))


@entry("cosine_betas")
def _(pick):
    return dict(steps=pick(1, 2, 50), max_beta=pick(0.999, 0.5))


@entry("zero_terminal_snr")
def _(pick):
    return dict(betas=pick(u.linear_betas(50), u.cosine_betas(3), [0.1, 0.2, 0.3]))


@entry("diffusion_loss", also={"x0": "noise like t", "noise": "x0"}, typed=True)
def _(pick):
    return dict(model=lambda x, times: x, x0=picture(pick, 3), schedule=u.Schedule.cosine(50), prediction=pick("epsilon", "x0", "v"),
                min_snr=pick(None, 5, 2.5)) | pick({}, dict(t=torch.tensor([3, 40]))) | pick({}, {"noise": noise(2, 3, 4, 4), "x0": noise(2, 3, 4, 4)})


# Chapter 10


def averaged(decay):
    model = nn.Linear(2, 2)
    u.EMA(model, decay).update(model)


@entry("EMA", averaged)
def _(pick):
    return dict(decay=pick(0, 0.5, 0.999))


def trained(steps, **options):
    return u.Trainer(nn.Linear(4, 2), lambda model, batch, generator: (model(batch[0]) - batch[1]).square().mean(), **options).fit(steps,
        progress=False).history["loss"]


@entry("Trainer", trained, also={"ema": "decay", "validation": "data"}, unlike=("steps", "seed"))
def _(pick):
    return dict(steps=pick(1, 2), data=(noise(12, 4), noise(12, 2)), validation=pick(None, (noise(3, 4), noise(3, 2))), batch_size=pick(4, 6),
                    accumulate=pick(None, 1, 2),
                learning_rate=pick(0.1, 1e-3), warmup=pick(0, 3), decay=pick(None, 5), clip_gradients=pick(1.0, math.inf), ema=pick(0, 0.9),
                    every=pick(None, 1, 5),
                seed=pick(None, 0, 7))


# Chapter 11


@entry("choose_steps")
def _(pick):
    return dict(schedule=u.Schedule.cosine(50), steps=pick(1, 7, 50), spacing=pick("trailing", "leading", "linspace", "karras"))


@entry("denoiser", lambda x, **options: u.denoiser(lambda x, times: x, u.Schedule.cosine(50), **options)(x, 7), also={"x": "like"}, typed=True)
def _(pick):
    return dict(prediction=pick("epsilon", "x0", "v"), clip=pick(None, 1, 2.5), x=picture(pick, 3))


@entry("sample", lambda steps: u.sample(u.ddim(guess, noise(1, 2), u.Schedule.cosine(50), steps)))
def _(pick):
    return dict(steps=pick(1, 5, [40, 3]))


OPTIONS = {"ddpm": lambda pick: dict(variance=pick("small", "large")), "ddim": lambda pick: dict(eta=pick(0, 0.5, 1.0)), "heun": lambda pick: {},
    "dpm_solver": lambda pick: {}}
for _name, _options in OPTIONS.items():

    @entry(_name, lambda name=_name, **options: u.sample(getattr(u, name)(guess, schedule=u.Schedule.cosine(50), **options)))
    def _(pick, options=_options):
        return dict(x=picture(pick, 3), steps=pick(1, 2, 5, [40, 20, 3], (7,))) | options(pick)


@entry("img2img", lambda x0, **options: u.sample(u.img2img(u.ddim, guess, x0, noise(2, 3, 4, 4), u.Schedule.cosine(50), **options)), also={"x0": "noise"})
def _(pick):
    return dict(x0=noise(2, 3, 4, 4), steps=pick(1, 5, [40, 20, 3]), strength=pick(0, 0.6, 1.0))


@entry("inpaint", lambda **options: u.inpaint(guess, u.Schedule.cosine(50), **options)(noise(2, 3, 4, 4), 7), unlike=("x0",), typed=True)
def _(pick):
    return dict(x0=noise(2, 3, 4, 4), known=pick(torch.ones(4, 4) > 0, torch.ones(2, 1, 4, 4) > 0))


@entry("ddim_invert", lambda x0, **options: u.sample(u.ddim_invert(guess, x0, u.Schedule.cosine(50), **options)))
def _(pick):
    return dict(x0=picture(pick, 3), steps=pick(1, 5, [40, 20, 3]), rounds=pick(1, 2))


# Chapter 12


@entry("frechet_distance", typed=True)
def _(pick):
    return dict(a=noise(pick(2, 9), 3), b=noise(pick(2, 9), 3))


@entry("kernel_distance", typed=True)
def _(pick):
    return dict(a=noise(pick(2, 9), 3), b=noise(pick(2, 9), 3))


@entry("precision_recall", typed=True)
def _(pick):
    return dict(real=noise(pick(5, 9), 3), fake=noise(pick(5, 9), 3), k=pick(1, 3))


@entry("nearest", typed=True)
def _(pick):
    return dict(samples=noise(pick(1, 3), 2, 2), references=noise(pick(1, 5), 2, 2))


@entry("digit_classifier", lambda x: u.digit_classifier()(x))
def _(pick):
    return dict(x=noise(pick(1, 2), 1, 28, 28))


# Chapter 13


@entry("Guided", None, "x", "times", "y", also={"y": "null"})
def _(pick):
    interval = pick({}, dict(interval=pick((0, 1.0), [0.5, math.inf]), schedule=u.Schedule.cosine(50)))
    return dict(model=lambda x, times, y: x * torch.as_tensor(y).reshape(-1, *[1] * (x.ndim - 1)), scale=pick(0, 1, 2.5), null=pick(0, 3), rescale=pick(0,
                    0.5, 1.0), x=picture(pick, 3),
                times=pick(5, [1, 2], torch.tensor([3, 4])), y=pick(1, [1, 2], torch.tensor([3, 4]))) | interval


@entry("drop_labels", also={"labels": "null"})
def _(pick):
    return dict(labels=pick(torch.tensor([1, 2, 3]), noise(3, 4)), probability=pick(0, 0.5, 1), null=pick(0, 7))


# Chapter 14


@entry("AutoencoderKL", lambda x, **options: u.AutoencoderKL(**options)(x)[0], typed=True)
def _(pick):
    dims, levels, channels = pick(1, 2, 2), pick(1, 2), pick(1, 3)
    return dict(ch=32, out_ch=3, ch_mult=(1,) * levels, num_res_blocks=1, attn_resolutions=pick((), (8,)), dropout=pick(0.0, 0.1), in_channels=channels,
                resamp_with_conv=pick(True, False), resolution=8, z_channels=pick(2, 4), attn_type=pick("vanilla", "linear", "none"), embed_dim=pick(2, 4),
                    dims=dims,
                x=picture(pick, channels, dims))


@entry("DiagonalGaussian", lambda moments: (lambda d: [d.sample(), d.kl(), d.std, d.nll(d.mode())])(u.DiagonalGaussian(moments)))
def _(pick):
    return dict(moments=noise(2, pick(2, 8), 3, 4))


@cache
def vae() -> u.AutoencoderKL:
    return u.AutoencoderKL(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8).eval()


@entry("psnr", typed=True)
def _(pick):
    a = picture(pick, 3)
    return dict(a=a, b=a + 0.1)


@entry("scale_factor", lambda **options: u.scale_factor(vae(), **options), also={"images": "x"})
def _(pick):
    return dict(images=picture(pick, 3), batch_size=pick(1, 64))


@entry("tiled_decode", lambda **options: u.tiled_decode(vae(), **options))
def _(pick):
    return dict(z=picture(pick, 4), tile=pick(4, 64), overlap=pick(9, 16))


# Chapter 15


@entry("CLIPTextModel", None, "tokens")
def _(pick):
    return dict(vocab_size=9, width=8, layers=pick(1, 2), heads=pick(1, 2), length=pick(4, 6), mlp_width=pick(None, 5), activation=pick("gelu", "quick_gelu"),
                end=pick(None, 3), tokens=pick(torch.tensor([[1, 2, 8], [0, 3, 3]]), torch.ones(1, 4, dtype=torch.int32)))


@entry("ImageEncoder", None, "images", also={"channels": "in_channels"})
def _(pick):
    levels, channels = pick(1, 2), pick(1, 3)
    return dict(channels=pick((32, 64)[:levels], [32] * levels), in_channels=channels, dropout=pick(0.0, 0.5), images=picture(pick, channels))


@entry("CLIP", None, "images", "tokens", unlike=())
def _(pick):
    return dict(text=text_model(), image=u.ImageEncoder((32,)), dim=pick(1, 8), images=picture(pick, 3), tokens=torch.tensor([[1, 2047], [3, 2047]]))


@entry("contrastive_loss", also={"image_features": "features", "text_features": "features"})
def _(pick):
    return dict(image_features=noise(3, 4), text_features=noise(3, 4), scale=pick(1, 2.5))


@entry("Tokenizer", None, "texts", "length", "pad")
def _(pick):
    return dict(merges=pick([], [("a", "b</w>")], [("a", "b"), ("ab", "c</w>")]), texts=pick("ab", ["a b c", ""]), length=pick(2, 5), pad=pick(None, 0, 7))


@entry("train_bpe", also={"texts": "text"})
def _(pick):
    return dict(texts=pick(["a cat", "a car"], ("",)), merges=pick(0, 1, 5))


@entry("small_tokenizer", lambda **options: u.small_tokenizer()(**options))
def _(pick):
    return dict(texts=pick("fox, noto", ["a", "b"]), length=pick(2, 32), pad=pick(None, 0))


# Chapters 16 and 17


PROMPTS = ("", "a red circle", ["a cat", "two dogs"])


def drawn(prompts, seed=0, steps=2, guidance=3.0, negative="", sampler="ddim", size=8, interval=(0.0, math.inf), rescale=0.0, **options):
    whole = text_to_image()
    model = u.TextToImage(whole.unet, whole.vae, whole.text, whole.tokenizer, schedule=whole.schedule, **dict(scale_factor=1.0, length=12) | options)
    return model(prompts, seed=seed, steps=steps, guidance=guidance, negative=negative, sampler=sampler, size=size, interval=interval, rescale=rescale)


def request(pick, **more):
    return dict(prompts=pick(*PROMPTS), seed=pick(0, 7), steps=pick(1, 3), guidance=pick(1, 3.0), negative=pick("", "blue"),
                sampler=pick("dpm_solver", "ddim", "heun", "ddpm"), interval=pick((0.0, math.inf), [0, 1.0]), rescale=pick(0, 0.5), **more)


@entry("TextToImage", drawn, also={"guidance": "scale"})
def _(pick):
    return request(pick, size=pick(None, 8, (4, 8)), scale_factor=pick(1, 0.5), prediction=pick("flow", "v"), length=pick(4, 12))


@entry("StableDiffusion", lambda **options: stable_diffusion()(**options), also={"guidance": "scale"})
def _(pick):
    return request(pick, size=pick(None, 4, (4, 8))) | pick({}, {"steps": [900, 400, 3]}) | pick({}, {"steps": [900, 400], "until": 0})


@entry("evaluate_shapes", lambda **options: u.evaluate_shapes(lambda prompts, seed: torch.zeros(len(prompts), 3, 32, 32), **options),
       also={"splits": "split"})
def _(pick):
    return dict(number=pick(1, 5), things=pick(1, (1, 2)), splits=pick("train", ["pairs", "combinations"]), seed=pick(0, 7))


# Chapters 18 to 20


@entry("estimate", lambda devices, peak, price, bandwidth, **options: u.estimate(u.Machine(devices, peak, price, bandwidth), **options),
       also={"batch_size": "machine.devices"})
def _(pick):
    return dict(devices=pick(1, 8), peak=pick(1e14, 10**15), price=pick(0, 2.5), bandwidth=pick(math.inf, 1e10), examples=pick(1000, 1e6), flops=pick(1e9,
                    10**10),
                batch_size=pick(8, 256), parameters=pick(10**6, 1e9), utilisation=pick(1, 0.35), backward=pick(0.5, 1))


TABLE["Machine"] = TABLE["estimate"]  # it is a record, which this function reads


@entry("Numbered", lambda step, **options: next(u.Numbered(**options).since(step)), also={"size": "batch_size"}, unlike=("step", "seed", "pieces"))
def _(pick):
    ranks = pick(1, 2)
    return dict(data=pick(noise(24, 3), (noise(24, 3), noise(24))), size=pick(4, 8), seed=pick(0, 5), pieces=pick(1, 2), rank=pick(*range(ranks)),
                    ranks=ranks, step=pick(0, 7))


@cache
def shards() -> list[Path]:
    return write_shards(tempfile.mkdtemp(), (noise(24, 3), noise(24)), 4)


@entry("Stream", lambda step, **options: next(u.Stream(shards(), **options).since(step)), unlike=("step", "seed"))
def _(pick):
    ranks = pick(1, 2)
    return dict(size=pick(4, 8), seed=pick(0, 5), pieces=pick(1, 2), rank=pick(*range(ranks)), ranks=ranks, lanes=4, step=pick(0, 7))


def inside(manager: Callable) -> Callable[..., object]:
    def call(**options):
        with manager(**options):
            return None

    return call


@entry("inject", inside(lambda **options: u.inject(**options)))
def _(pick):
    return dict(bug=pick(1, 12, "no-scale"))


@entry("cached_text", inside(lambda **options: u.cached_text(text_to_image(), **options)))
def _(pick):
    return dict(keep=pick(1, 4))


@entry("reuse_features", inside(lambda **options: u.reuse_features(text_to_image(), **options)))
def _(pick):
    return dict(every=pick(1, 3), shallow=pick(1, 2))


@entry("time_operations")
def _(pick):
    return dict(function=lambda: noise(2, 2) @ noise(2, 2), rounds=pick(1, 3))


@entry("measure_work")
def _(pick):
    return dict(function=lambda: noise(2, 2) @ noise(2, 2))


# Data


@entry("digits", lambda split: u.digits(split)[0][:1])
def _(pick):
    return dict(split=pick("train", "test"))


@entry("emoji", lambda **options: u.emoji(**options)[0][:1], also={"styles": "style"})
def _(pick):
    return dict(split=pick("pairs", "concepts"), styles=pick("noto", ["noto"], ("fluent", "twemoji")), size=pick(64, 32, 16))


@entry("shapes", lambda **options: u.shapes(**options)[0])
def _(pick):
    return dict(number=pick(1, 3), size=pick(16, 32), things=pick(1, 2), position=pick(True, False), split=pick("train", "combinations", "pairs", "all"),
                    seed=pick(0, 7))


@cache
def album() -> Path:
    """Two pictures with captions of all three kinds."""
    root = Path(tempfile.mkdtemp()) / "album"
    root.mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (8, 6 + i), color).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"{color} thing")
    (root / "metadata.csv").write_text("file_name,text\n0.png,red\n1.png,blue\n")
    return root


@entry("FolderDataset", lambda **options: u.FolderDataset(album(), **options)[1])
def _(pick):
    return dict(size=pick(8, (4, 6), [5, 5]), channels=pick(1, 3), captions=pick("auto", "txt", "folder", None, album() / "metadata.csv"))


@entry("read_picture", lambda **options: u.read_picture(album() / "0.png", **options))
def _(pick):
    return dict(size=pick(8, (4, 6), [5, 5]))


@entry("write_picture", lambda picture: u.write_picture(picture, album().parent / "written.png"))
def _(pick):
    return dict(picture=noise(3, pick(4, 5), pick(4, 5)))


# What is not called here, and why

TRAINED = "trains for minutes; tests/blocks and tests/test_cli.py train small ones, and stop them"
EXEMPT = {
    "SD1": "a dictionary", "SD2": "a dictionary", "SD2_BASE": "a dictionary",
    "train_clip": TRAINED, "train_digits": TRAINED, "train_text_to_image": TRAINED, "train_vae": TRAINED,
    "make_fast": "measures for minutes", "machine_peaks": "measures for seconds", "time_in_turns": "measures for seconds",
    "launch": "starts processes", "shard": "needs several processes", "examine": "takes nothing", "judge": "looks at thousands of digits",
        "retrieval": "looks at hundreds of emoji",
}  # fmt: skip
LOADERS = {"load_checkpoint", "load_weights", "load_stable_diffusion", "save_checkpoint", "save_stable_diffusion", "pretrained", "pretrained_clip",
    "pretrained_vae"}


def test_nothing_public_is_left_out():
    """A class or a function added tomorrow has to be added to a table here, or to the exceptions."""
    public = {name for name in u.__all__ if not isinstance(getattr(u, name), ModuleType)}
    assert public == TABLE.keys() | EXEMPT.keys() | LOADERS
    assert not TABLE.keys() & EXEMPT.keys() and not LOADERS & EXEMPT.keys()
    assert not [name for name in EXEMPT if isinstance(getattr(u, name), type)]
    loading = {name for name in public if name.startswith(("load", "save", "pretrained"))}
    assert loading <= LOADERS


def explore(name: str, number: int) -> Counter:
    """Draw cases of one entry; how many gave a result."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(name))
    def draw(case):
        tally["valid" if attempt(name, *case) else "refused"] += 1

    draw()
    return tally


@pytest.mark.parametrize("name", TABLE)
def test_some(name):
    explore(name, 2)


# Loaders: files that are whole, and files to which something happened


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def trainer(folder: Path) -> u.Trainer:
    loss = lambda model, batch, generator: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    return u.Trainer(network(), loss, (noise(12, 4), noise(12, 2)), batch_size=4, folder=folder)


@cache
def shelf() -> Path:
    """One whole file, or folder, of each kind."""
    root = Path(tempfile.mkdtemp())
    trainer(root / "run").fit(2, progress=False)
    text_to_image().save(root / "t2i.safetensors")
    tensors, state = u.load_checkpoint(root / "t2i.safetensors")
    u.save_checkpoint(root / "report.safetensors", tensors | {"history.loss": noise(3), "looks.250": noise(2, 2)}, state | dict(prompts=["a"], quality={},
        step=250))
    for name in ("sd.safetensors", "sd.ckpt", "sd"):
        u.save_stable_diffusion(stable_diffusion(), root / name)
    shutil.copytree(album(), root / "album")
    return root


def weights_of(path: Path, part: str) -> None:
    """Take over weights, all or none."""
    model = network()
    before = [p.clone() for p in model.parameters()]
    try:
        u.load_weights(model, path, part)
    except Exception:
        assert all(map(torch.equal, before, model.parameters())), "half loaded"
        raise


def resumed(path: Path) -> None:
    """Go on with a training, or let it be as it was."""
    here = trainer(path.parent)
    before = {name: tensor.clone() for name, tensor in here.state().items()}
    try:
        here.resume(path.stem)
    except Exception:
        assert here.step == 0 and all(torch.equal(tensor, before[name]) for name, tensor in here.state().items()), "half loaded"
        raise


def sd(path: Path, **options: object) -> u.StableDiffusion:
    return u.load_stable_diffusion(path, tokenizer=u.small_tokenizer(), **({} if path.is_dir() else dict(config=THIN)) | options)


READERS = {  # name: what is read, and how
    "load_checkpoint": ("run/last.safetensors", u.load_checkpoint),
    "parse_checkpoint": ("run/last.safetensors", lambda path: parse_checkpoint(path.read_bytes(), str(path))),
    "load_weights": ("run/last.safetensors", lambda path: weights_of(path, "ema")),
    "Trainer.resume": ("run/last.safetensors", resumed),
    "TextToImage.load": ("t2i.safetensors", u.TextToImage.load),
    "StableDiffusion.load": ("t2i.safetensors", u.StableDiffusion.load),
    "training_report": ("report.safetensors", lambda path: training_report("emoji", path)),
    "TensorFile": ("sd.safetensors", lambda path: TensorFile(path)["first_stage_model.quant_conv.weight"]),
    "load_stable_diffusion": ("sd.safetensors", sd),
    "load_stable_diffusion, pickle": ("sd.ckpt", sd),
    "load_stable_diffusion, folder": ("sd", sd),
    "FolderDataset": ("album", lambda path: [*u.FolderDataset(path, 8)]),
    "folder": ("album", lambda path: folder(path, 8)),
}


def spoil(content: dict | list, dice: random.Random) -> None:
    """Take something out of what JSON holds, or put something else in its place."""
    key = dice.choice([*content] if isinstance(content, dict) else range(len(content)))
    if isinstance(content[key], (dict, list)) and content[key] and dice.random() < 0.7:
        spoil(content[key], dice)
    elif dice.random() < 0.4:
        del content[key]
    else:
        content[key] = dice.choice([None, -1, 0, 1.5, "x", [], {}, True, "F64"])


def spoilt(whole: bytes, json_only: bool, dice: random.Random) -> bytes:
    """A file with other JSON, or a safetensors file with another header."""
    if json_only:
        spoil(content := json.loads(whole), dice)
        return json.dumps(content).encode()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    state = json.loads(header.get("__metadata__", {}).get("state", "null"))
    if state and dice.random() < 0.7:
        spoil(state, dice)
        header["__metadata__"]["state"] = json.dumps(state)
    else:
        spoil(header, dice)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + whole[end:]


DAMAGES = ("none",) * 10 + ("numbers",) * 4 + ("flip", "head", "cut", "longer", "empty", "text", "gone", "folder", "json", "json", "json")


def damage(path: Path, kind: str, dice: random.Random) -> None:
    """Let something happen to a file, or to one in a folder."""
    path = dice.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.name != "vocab.json")) if path.is_dir() else path
    whole = path.read_bytes()
    flip = lambda places: bytes(b ^ 1 << dice.randrange(8) if i in places else b for i, b in enumerate(whole))  # noqa: E731
    if kind == "numbers" and path.suffix == ".safetensors":  # the last few: no harm, but other numbers
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ dice.randrange(128), whole[-1]]))
    elif kind in ("flip", "head"):
        path.write_bytes(flip({dice.randrange(len(whole) if kind == "flip" else min(500, len(whole))) for _ in range(3)}))
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "json" and path.suffix in (".json", ".safetensors"):
        path.write_bytes(spoilt(whole, path.suffix == ".json", dice))
    elif kind in ("cut", "longer", "empty", "text"):
        path.write_bytes({"cut": whole[: dice.randrange(len(whole))], "longer": whole + b"x", "empty": b"", "text": b"<html>not found</html>"}[kind])


def read(name: str, kind: str, seed: int) -> bool:
    """Whether a file could be read; if not, the error is clear and names it."""
    source, reader = READERS[name]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / source.replace("/", "-")
        (shutil.copytree if (shelf() / source).is_dir() else shutil.copy)(shelf() / source, path)
        damage(path, kind, random.Random(seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                reader(path)
        except ValueError as error:
            assert place in str(error), f"{name}, {kind} {seed}: the file is not named: {error}"
        except OSError as error:
            assert kind in ("gone", "folder") and place in str(error), f"{name}, {kind} {seed}: {error!r}"
        except UserWarning as warning:
            assert "settings" in str(warning) or "devices" in str(warning), f"{name}, {kind} {seed}: {warning}"  # of a training that goes on otherwise
        except Exception as error:
            raise AssertionError(f"{name}, {kind} {seed}: {type(error).__name__}: {error}") from error
        else:
            return True
        assert kind != "none", f"{name}: the whole file is refused"
        return False


def explore_files(name: str, number: int) -> Counter:
    """Read so many files."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(DAMAGES), st.integers(0, 2**32))
    def draw(kind, seed):
        tally["valid" if read(name, kind, seed) else "refused"] += 1

    draw()
    return tally


@pytest.mark.parametrize("name", READERS)
def test_some_files(name):
    explore_files(name, 3)


NAMED = (u.pretrained, u.TextToImage.from_pretrained, read_asset, training_report, u.load_checkpoint, u.load_stable_diffusion, u.TextToImage.load,
    u.FolderDataset)


@pytest.mark.parametrize("load", NAMED, ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("name", ["", "x", "no/such", "../digits", 3, None], ids=repr)
def test_names_of_nothing(load, name):
    """What is not there is not loaded."""
    if not isinstance(name, str) and load in (u.load_checkpoint, u.load_stable_diffusion, u.TextToImage.load, u.FolderDataset):
        pytest.skip("what is no path is pathlib's to refuse")
    with pytest.raises((ValueError, FileNotFoundError, IsADirectoryError)) as caught:
        load(name)
    assert str(name) in str(caught.value)


def test_shipped():
    assert not u.pretrained_vae().training and not u.pretrained_clip().training and not u.pretrained("digits").training


# The command line


def explore_commands(number: int) -> Counter:
    """Type so many."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(sensible())
    def type_it(words):
        for place in ("new", "runs"):  # of earlier examples
            shutil.rmtree(place, ignore_errors=True)
        tally["valid" if never_a_traceback(words) else "refused"] += 1

    type_it()
    return tally


def test_some_commands(idle):  # noqa: F811
    """Commands as someone might mean them; test_cli.py types wilder ones, too."""
    explore_commands(20)


# All together


@pytest.mark.slow
def test_two_thousand_cases(idle, capsys):  # noqa: F811
    """Constructors, loaders, the command line: each case a result or a clear error, most of them results."""
    jobs = {name: lambda name=name: explore(name, 22) for name in TABLE} | {f"{name} (file)": lambda name=name: explore_files(name, 30) for name in READERS}
    tallies, failures = {}, []
    for name, job in (jobs | {"command line": lambda: explore_commands(300)}).items():
        try:
            tallies[name] = job()
        except AssertionError as failure:
            failures.append(str(failure)[:1000])
    total = sum(tallies.values(), Counter())
    with capsys.disabled():
        print("", *(f"{name:36}{tally['valid']:6} valid{tally['refused']:6} refused" for name, tally in (tallies | {"in all": total}).items()), sep="\n")
    assert not failures, "\n\n".join(failures)
    assert mostly_valid(total).total() >= 2000
