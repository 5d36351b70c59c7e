"""Timestep embeddings: equal to the references, exact in every number format, clear about what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_course.embeddings import TimestepEmbedding, get_timestep_embedding, timestep_embedding
from unet_course.workbench import compare, randomize, relative_error

NAMES = {f"{ours}.{p}": f"{linear}.{p}" for ours, linear in (("0", "linear_1"), ("2", "linear_2")) for p in ("weight", "bias")}
TIMES = torch.tensor([0.0, 0.25, 1.0, 17.5, 500.0, 999.0])


# The references


@pytest.mark.parametrize("dim", [4, 5, 32, 127, 320])
@pytest.mark.parametrize("max_period", [10, 10000])
def test_openai_order_equals_diffusers(dim, max_period):
    reference = pytest.importorskip("diffusers.models.embeddings").get_timestep_embedding
    theirs = reference(TIMES, dim, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=max_period)
    assert relative_error(timestep_embedding(TIMES, dim, max_period), theirs) <= 1e-6


@pytest.mark.parametrize("dim", [4, 5, 32, 127, 320])
def test_ddpm_order_equals_diffusers(dim):
    reference = pytest.importorskip("diffusers.models.embeddings").get_timestep_embedding
    theirs = reference(TIMES, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
    assert relative_error(get_timestep_embedding(TIMES, dim), theirs) <= 1e-6


@pytest.mark.parametrize(("width", "out"), [(32, 128), (33, 20), (320, 1280)])
def test_layers_equal_diffusers(width, out):
    reference = pytest.importorskip("diffusers.models.embeddings").TimestepEmbedding
    agreement = compare(TimestepEmbedding(width, out), reference(width, out), (timestep_embedding(TIMES, width),), NAMES)
    assert agreement and agreement.tensors == 5, agreement


def test_layers_equal_a_plain_sequential():
    """The names of the official checkpoints, and nothing beside them."""
    official = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
    ours = TimestepEmbedding(8)
    ours.load_state_dict(official.state_dict(), strict=True)
    rows = timestep_embedding(TIMES, 8)
    assert list(ours.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"] and torch.equal(ours(rows), official(rows))


def test_transformer_order_is_a_permutation():
    half = 8
    exact = torch.stack([f(TIMES.double() * 10000 ** (-i / half)) for i in range(half) for f in (torch.sin, torch.cos)], 1)
    ours = timestep_embedding(TIMES, 2 * half)
    interleaved = torch.stack([ours[:, half:], ours[:, :half]], 2).flatten(1)
    assert (interleaved - exact).abs().max() < 2e-4


# What the numbers are


def test_against_float64():
    exact = torch.tensor([[f(t * 10000 ** (-i / 32)) for f in (math.cos, math.sin) for i in range(32)] for t in range(1000)])
    assert (timestep_embedding(torch.arange(1000), 64) - exact).abs().max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", [timestep_embedding, get_timestep_embedding])
def test_any_number_format_in_float32_out(function, dtype):
    times = torch.tensor([0, 1, 100, 250])
    rows = function(times.to(dtype), 16)
    assert rows.dtype == torch.float32 and torch.equal(rows, function(times, 16))


def test_autocast_does_not_round():
    with torch.autocast("cpu", torch.bfloat16):
        rows = timestep_embedding(torch.tensor([997.0]), 64)
    assert torch.equal(rows, timestep_embedding(torch.tensor([997.0]), 64))


def test_very_large_times_stay_on_the_circle():
    cos, sin = timestep_embedding(torch.tensor([10**6, 10**9, 2**40]), 32).chunk(2, dim=1)
    assert torch.allclose(cos.square() + sin.square(), torch.ones(3, 16), atol=1e-5)


@pytest.mark.parametrize("function", [timestep_embedding, get_timestep_embedding])
def test_odd_width_appends_a_zero(function):
    rows = function(TIMES, 9)
    assert torch.equal(rows[:, :8], function(TIMES, 8)) and not rows[:, 8].any()


def test_every_argument_does_something():
    rows = timestep_embedding(TIMES, 8)
    assert not torch.allclose(rows, timestep_embedding(TIMES, 8, max_period=100))
    assert torch.equal(timestep_embedding(TIMES, 8, repeat_only=True), TIMES[:, None].expand(6, 8))
    assert timestep_embedding(torch.arange(3), 2, repeat_only=True).dtype == torch.float32
    assert timestep_embedding(TIMES, 6).shape == (6, 6) and TimestepEmbedding(4, 10)[2].out_features == 10
    assert TimestepEmbedding(4)[0].out_features == 16


def test_smallest_widths():
    assert torch.allclose(timestep_embedding(torch.tensor([1]), 2), torch.tensor([[math.cos(1), math.sin(1)]]))
    assert torch.allclose(get_timestep_embedding(torch.tensor([1]), 4)[0, 1], torch.tensor(1e-4).sin())
    assert timestep_embedding(TIMES[:0], 8).shape == (0, 8)


def test_gradient_reaches_the_time():
    """Fractional times can be optimised: d cos(ωt)/dt = -ω sin(ωt)."""
    t = torch.tensor([3.0], requires_grad=True)
    timestep_embedding(t, 2)[0, 0].backward()
    assert t.grad.item() == pytest.approx(-math.sin(3.0), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_in_another_number_format(dtype):
    """After `.half()` the layers accept the float32 sinusoid."""
    layers = randomize(TimestepEmbedding(32))
    rows = timestep_embedding(TIMES, 32)
    exact = layers(rows)
    out = layers.to(dtype)(rows)
    assert out.dtype == dtype and relative_error(out, exact) < 0.02


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize("function", [timestep_embedding, get_timestep_embedding])
@pytest.mark.parametrize(("times", "told"), [(torch.tensor(5), "expand"), (torch.zeros(3, 1), "flatten"), (torch.zeros(2, 3, 4), "flatten")])
def test_times_must_be_a_list(function, times, told):
    with pytest.raises(ValueError, match=f"timesteps.*{told}"):
        function(times, 8)


@pytest.mark.bad_input
@pytest.mark.parametrize("dim", [1, 0, -4, 8.0])
def test_bad_widths(dim):
    with pytest.raises(ValueError, match="^dim must be a whole number, 2 or more"):
        timestep_embedding(TIMES, dim)
    with pytest.raises(ValueError, match="^embedding_dim must be a whole number, 4 or more"):
        get_timestep_embedding(TIMES, dim)
    if dim != 1:
        with pytest.raises(ValueError, match="in_channels=.* must be a whole number"):
            TimestepEmbedding(dim)
        with pytest.raises(ValueError, match="time_embed_dim=.* must be a whole number"):
            TimestepEmbedding(8, dim)


def test_ddpm_order_needs_two_hands():
    for dim in (2, 3):
        with pytest.raises(ValueError, match="embedding_dim"):
            get_timestep_embedding(TIMES, dim)


@pytest.mark.parametrize("max_period", [0, -1, math.inf, math.nan])
def test_bad_period(max_period):
    with pytest.raises(ValueError, match="max_period"):
        timestep_embedding(TIMES, 8, max_period)


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(6,), (6, 7), (6, 8, 1)])
def test_layers_say_that_times_must_be_embedded(shape):
    with pytest.raises(ValueError, match=r"embedding must be \(batch, 8\).*embed the timesteps first"):
        TimestepEmbedding(8)(torch.zeros(shape))


# Random arguments


def hypothesise(check, arguments, draws):
    """Run a check that says whether a draw was valid, and return the share that was."""
    valid = []

    @settings(max_examples=draws, deadline=None, derandomize=True, database=None)
    @given(**arguments)
    def run(**kwargs):
        valid.append(check(**kwargs))

    run()
    return sum(valid) / len(valid)


def layers_work_or_refuse(in_channels, time_embed_dim, batch):
    try:
        layers = TimestepEmbedding(in_channels, time_embed_dim)
    except ValueError as error:
        name = "in_channels" if in_channels < 1 else "time_embed_dim"
        assert name in str(error)
        return False
    rows = timestep_embedding(torch.rand(batch) * 1000, in_channels) if in_channels > 1 else torch.rand(batch, 1)
    out = randomize(layers)(rows)
    out.sum().backward()
    assert out.shape == (batch, 4 * in_channels if time_embed_dim is None else time_embed_dim)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())
    return True


def rows_or_refuse(dim, max_period, repeat_only, batch):
    times = torch.rand(batch, requires_grad=True)
    try:
        rows = timestep_embedding(times, dim, max_period, repeat_only)
    except ValueError as error:
        assert ("dim" if dim < 2 else "max_period") in str(error)
        return False
    rows.sum().backward()
    assert rows.shape == (batch, dim) and rows.isfinite().all() and times.grad.isfinite().all()
    return True


WIDTHS = st.sampled_from([*range(1, 65), -1, 0, 1])
LAYERS = dict(in_channels=WIDTHS, time_embed_dim=st.none() | WIDTHS, batch=st.integers(1, 4))
ROWS = dict(
    dim=WIDTHS,
    max_period=st.sampled_from([0.5, 1, 2.0, 10, 100, 1000.0, 10000, 10**6, 1e12, 0, -1.0, math.inf]),
    repeat_only=st.booleans(),
    batch=st.integers(1, 4),
)


@pytest.mark.parametrize("draws", [50, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("check", "arguments"), [(layers_work_or_refuse, LAYERS), (rows_or_refuse, ROWS)])
def test_random_arguments(check, arguments, draws):
    assert hypothesise(check, arguments, draws) >= 0.6
