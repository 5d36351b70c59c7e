"""Residual blocks: equal to diffusers' in every setting, every flag does something, bad arguments are told what is wrong."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from unet_course.resblock import GroupNorm32, Normalize, ResBlock, ResnetBlock, normalization
from unet_course.workbench import compare, randomize, relative_error

OPENAI = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
DDPM = {k: k for k in ("norm1", "conv1", "norm2", "conv2")} | {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def renamed(block, table):
    """Our parameter names → those of diffusers."""
    pairs = ((name, *name.rsplit(".", 1)) for name, _ in block.named_parameters())
    return {name: f"{table[layer]}.{kind}" for name, layer, kind in pairs}


def groups_of_4(channels):
    return GroupNorm32(4, channels)


# ---------------------------------------------------------------- parity


SIZES = [(32, (9, 6)), (64, (8, 13)), (96, (7, 5))]
PARITY = [  # quick: both ways of time with every resampling, each at one of the sizes; slow: at all of them
    pytest.param(scale_shift, resample, *size, marks=() if (i + scale_shift) % 3 == j else pytest.mark.slow)
    for scale_shift in (False, True)
    for i, resample in enumerate(({}, {"up": True}, {"down": True}))
    for j, size in enumerate(SIZES)
]


@pytest.mark.parametrize(("scale_shift", "resample", "out_channels", "size"), PARITY)
def test_resblock_is_diffusers(scale_shift, resample, out_channels, size):
    resnet = pytest.importorskip("diffusers.models.resnet")
    ours = ResBlock(64, 48, 0.0, out_channels, use_scale_shift_norm=scale_shift, **resample)
    reference = resnet.ResnetBlock2D(
        in_channels=64,
        out_channels=out_channels,
        temb_channels=48,
        eps=1e-5,
        time_embedding_norm="scale_shift" if scale_shift else "default",
        **resample,
    )
    agreement = compare(ours, reference, (random(3, 64, *size), random(3, 48, seed=1)), renamed(ours, OPENAI))
    assert agreement, agreement


@pytest.mark.parametrize("temb_channels", [0, 48])
@pytest.mark.parametrize("out_channels", [32, 64])
def test_resnet_block_is_diffusers(out_channels, temb_channels):
    resnet = pytest.importorskip("diffusers.models.resnet")
    ours = ResnetBlock(in_channels=64, out_channels=out_channels, temb_channels=temb_channels)
    reference = resnet.ResnetBlock2D(in_channels=64, out_channels=out_channels, temb_channels=temb_channels or None, eps=1e-6)
    x, temb = random(2, 64, 9, 6), random(2, 48, seed=1)
    if temb_channels:
        agreement = compare(ours, reference, (x, temb), renamed(ours, DDPM))
    else:
        agreement = compare(ours, reference, (x,), renamed(ours, DDPM), call=lambda x: reference(x, None))
    assert agreement, agreement


def test_a_block_without_time_is_diffusers():
    resnet = pytest.importorskip("diffusers.models.resnet")
    ours, reference = ResBlock(64, None, 0.0, 32), resnet.ResnetBlock2D(in_channels=64, out_channels=32, temb_channels=None, eps=1e-5)
    agreement = compare(ours, reference, (random(2, 64, 9, 6),), renamed(ours, OPENAI), call=lambda x: reference(x, None))
    assert agreement, agreement


def test_parity_sees_a_wrong_eps():
    resnet = pytest.importorskip("diffusers.models.resnet")
    ours, reference = ResBlock(64, 48, 0.0), resnet.ResnetBlock2D(in_channels=64, temb_channels=48, eps=1e-6)
    assert not compare(ours, reference, (0.1 * random(2, 64, 9, 6), random(2, 48)), renamed(ours, OPENAI))


def by_hand(block, x, emb):
    """The block in 1, 2 or 3 dimensions, written with torch's functions only."""
    state, dims = block.state_dict(), x.ndim - 2
    conv, pool = (F.conv1d, F.conv2d, F.conv3d)[dims - 1], (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]

    def layer(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    h = F.silu(F.group_norm(x, 4, *layer("in_layers.0"), 1e-5))
    if not isinstance(block.x_upd, nn.Identity):
        h, x = ((pool(v, 2) if "Down" in type(block.x_upd).__name__ else F.interpolate(v, scale_factor=2)) for v in (h, x))
    h = conv(h, *layer("in_layers.2"), padding=1)
    if emb is None:
        h = F.group_norm(h, 4, *layer("out_layers.0"), 1e-5)
    else:
        time = F.linear(F.silu(emb), *layer("emb_layers.1"))[(..., *[None] * dims)]
        if time.shape[1] == h.shape[1]:
            h = F.group_norm(h + time, 4, *layer("out_layers.0"), 1e-5)
        else:
            half = h.shape[1]
            h = F.group_norm(h, 4, *layer("out_layers.0"), 1e-5) * (1 + time[:, :half]) + time[:, half:]
    h = conv(F.silu(h), *layer("out_layers.3"), padding=1)
    if "skip_connection.weight" in state:
        x = conv(x, *layer("skip_connection"), padding=state["skip_connection.weight"].shape[-1] // 2)
    return x + h


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}])
@pytest.mark.parametrize(("emb_channels", "scale_shift"), [(None, False), (6, False), (6, True)])
@pytest.mark.parametrize(("out_channels", "use_conv"), [(8, False), (12, False), (4, True)])
def test_any_dims_against_plain_torch(dims, resample, emb_channels, scale_shift, out_channels, use_conv):
    block = ResBlock(8, emb_channels, 0.0, out_channels, use_conv, scale_shift, dims, normalize=groups_of_4, **resample)
    randomize(block)
    x, emb = random(2, 8, *(5, 4, 3)[:dims]), None if emb_channels is None else random(2, 6)
    assert relative_error(block(x, emb), by_hand(block, x, emb)) < 1e-5


def test_four_dimensions():
    block = randomize(ResBlock(8, 6, 0.0, 12, dims=4, down=True, normalize=groups_of_4))
    x = random(2, 8, 3, 4, 2, 2).requires_grad_()
    out = block(x, random(2, 6))
    out.square().mean().backward()
    assert out.shape == (2, 12, 1, 2, 1, 1) and x.grad.abs().sum() > 0
    assert randomize(ResnetBlock(in_channels=32, dims=4, temb_channels=0))(random(1, 32, 2, 3, 2, 2)).shape == (1, 32, 2, 3, 2, 2)


# ---------------------------------------------------------------- names


def test_openai_names():
    block = ResBlock(64, 48, 0.1, 32, use_scale_shift_norm=True)
    assert {n: tuple(p.shape) for n, p in block.state_dict().items()} == {
        "in_layers.0.weight": (64,),
        "in_layers.0.bias": (64,),
        "in_layers.2.weight": (32, 64, 3, 3),
        "in_layers.2.bias": (32,),
        "emb_layers.1.weight": (64, 48),
        "emb_layers.1.bias": (64,),
        "out_layers.0.weight": (32,),
        "out_layers.0.bias": (32,),
        "out_layers.3.weight": (32, 32, 3, 3),
        "out_layers.3.bias": (32,),
        "skip_connection.weight": (32, 64, 1, 1),
        "skip_connection.bias": (32,),
    }
    for resample in ({"up": True}, {"down": True}):
        assert list(ResBlock(64, 48, 0.1, 32, use_scale_shift_norm=True, **resample).state_dict()) == list(block.state_dict())


def test_ddpm_names():
    def layers(**arguments):
        return list(dict.fromkeys(n.rsplit(".", 1)[0] for n in ResnetBlock(in_channels=64, temb_channels=48, **arguments).state_dict()))

    assert layers() == ["norm1", "conv1", "temb_proj", "norm2", "conv2"] == layers(conv_shortcut=True)
    assert layers(out_channels=32)[-1] == "nin_shortcut"
    assert layers(out_channels=32, conv_shortcut=True)[-1] == "conv_shortcut"
    assert "temb_proj.weight" not in ResnetBlock(in_channels=32, temb_channels=0).state_dict()
    assert ResnetBlock(in_channels=32).temb_proj.in_features == 512


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("convert_weights", [False, True])
def test_group_norm_keeps_the_dtype(dtype, convert_weights):
    norm = randomize(GroupNorm32(4, 8))
    x = random(2, 8, 5, 3)
    reference = F.group_norm(x.to(dtype).float(), 4, norm.weight, norm.bias, 1e-5)
    if convert_weights:
        norm = norm.to(dtype)
    out = norm(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out, reference) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_group_norm_is_the_same_with_channels_last(dtype):
    """Two paths lead to the result: PyTorch's kernel where it is fast, the conversion elsewhere."""
    norm = randomize(GroupNorm32(4, 8)).to(dtype)
    x = random(2, 8, 5, 3).to(dtype)
    out = norm(x.to(memory_format=torch.channels_last))
    assert out.dtype == dtype and relative_error(out, norm(x)) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)


def test_group_norm_survives_values_that_half_cannot_square():
    norm = GroupNorm32(1, 2).half()
    out = norm(torch.tensor([[[30000.0, -30000.0], [10000.0, -10000.0]]]).half())
    assert out.isfinite().all() and abs(out.float().square().mean().item() - 1) < 1e-2


def test_eps():
    x = 1e-3 * random(2, 32, 4, 4)
    assert normalization(32).eps == 1e-5 and Normalize(32).eps == 1e-6 and GroupNorm32(8, 32).eps == 1e-5
    assert relative_error(Normalize(32)(x), Normalize(32, eps=1e-5)(x)) > 0.1
    assert relative_error(GroupNorm32(32, 32)(x), GroupNorm32(32, 32, eps=1e-6)(x)) > 0.1
    assert torch.equal(Normalize(32, eps=1e-5)(x), nn.GroupNorm(32, 32)(x)) and torch.equal(normalization(32)(x), nn.GroupNorm(32, 32)(x))
    assert not torch.allclose(Normalize(32, 8)(x), Normalize(32)(x))


def test_half():
    for block in (ResBlock(32, 16, 0.0, 64, use_scale_shift_norm=True), ResnetBlock(in_channels=32, out_channels=64, temb_channels=16)):
        randomize(block)
        x, emb = random(2, 32, 6, 5), random(2, 16)
        reference = block(x, emb)
        for dtype in (torch.float16, torch.bfloat16):
            out = copy.deepcopy(block).to(dtype)(x.to(dtype), emb.to(dtype))
            assert out.dtype == dtype and relative_error(out, reference) < 3e-2


def test_half_convolutions_with_float_norms():
    """guided-diffusion's `convert_to_fp16` turns only the convolutions into half precision."""
    block = randomize(ResBlock(32, 16, 0.0, 64))
    x, emb = random(2, 32, 6, 5), random(2, 16)
    reference = block(x, emb)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    assert relative_error(block(x.half(), emb), reference) < 1e-2


# ---------------------------------------------------------------- every flag does something


def test_starts_as_its_skip():
    x, emb = random(2, 64, 6, 4), random(2, 16)
    assert torch.equal(ResBlock(64, 16, 0.0)(x, emb), x)
    assert torch.equal(ResBlock(64, 16, 0.0, down=True)(x, emb), F.avg_pool2d(x, 2))
    assert torch.equal(ResBlock(64, 16, 0.0, up=True)(x, emb), F.interpolate(x, scale_factor=2))
    assert not torch.allclose(ResnetBlock(in_channels=64, temb_channels=16)(x, emb), x)  # DDPM's starts with ordinary weights


@pytest.mark.parametrize("make", [lambda p: ResBlock(32, None, p), lambda p: ResnetBlock(in_channels=32, dropout=p, temb_channels=0)])
def test_dropout_only_in_training(make):
    block, x = randomize(make(0.5)), random(2, 32, 6, 6)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    same = randomize(make(0.0))
    assert torch.equal(same(x), same(x)) and torch.equal(same(x), block(x))


def test_checkpointing_gives_the_same_gradients_and_recomputes():
    x, emb = random(2, 32, 6, 6), random(2, 16)
    results = []
    for use_checkpoint in (False, True):
        block, calls = randomize(ResBlock(32, 16, 0.2, 64, use_checkpoint=use_checkpoint)), []
        block.in_layers[2].register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(3)
        out = block(x.clone().requires_grad_(), emb.clone().requires_grad_())
        out.square().sum().backward()
        results.append((out, [p.grad for p in block.parameters()]))
        assert len(calls) == 1 + use_checkpoint
        with torch.no_grad():
            calls.clear()
            block(x, emb)
            assert len(calls) == 1
    (a, grads), (b, others) = results
    assert torch.equal(a, b) and all(torch.allclose(g, o) for g, o in zip(grads, others))


def test_conv_skip_sees_the_neighbours():
    """Only a 3×3 skip lets one pixel reach another while the inside is still zero."""
    x = torch.zeros(1, 32, 5, 5)
    x[0, 0, 2, 2] = 1
    for make in (
        lambda flag: ResBlock(32, None, 0.0, 64, use_conv=flag),
        lambda flag: ResnetBlock(in_channels=32, out_channels=64, temb_channels=0, conv_shortcut=flag),
    ):
        for flag in (False, True):
            block = make(flag)
            last = block.out_layers[3] if isinstance(block, ResBlock) else block.conv2
            nn.init.zeros_(last.weight)
            reached = (block(x) - block(torch.zeros_like(x))).abs().sum(1)[0] > 0
            assert reached.sum() == (9 if flag else 1)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_reaches_the_output(scale_shift):
    block = randomize(ResBlock(64, 16, 0.0, use_scale_shift_norm=scale_shift))
    x = random(1, 64, 5, 5)
    assert relative_error(block(x, random(1, 16)), block(x, random(1, 16, seed=1))) > 1e-3


def test_one_group_per_channel_erases_an_added_time():
    """A constant added to a whole group disappears in its mean: with 32 channels in 32 groups, added time has no effect."""
    x = random(1, 32, 5, 5)
    added, scaled = (randomize(ResBlock(32, 16, 0.0, use_scale_shift_norm=flag)) for flag in (False, True))
    difference = [relative_error(b(x, random(1, 16)), b(x, random(1, 16, seed=1))) for b in (added, scaled)]
    assert difference[0] < 1e-5 < 1e-2 < difference[1]


def test_scale_then_shift():
    """The first half of the projection scales (around 1), the second half shifts."""
    block = ResBlock(32, 16, 0.0, use_scale_shift_norm=True)
    seen = []
    block.out_layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nn.init.zeros_(block.emb_layers[1].weight)
    for scale, shift in ((0.0, 0.0), (0.5, 0.0), (0.0, 3.0)):
        with torch.no_grad():
            block.emb_layers[1].bias[:32], block.emb_layers[1].bias[32:] = scale, shift
        block(random(1, 32, 5, 5), random(1, 16))
    assert torch.allclose(seen[1], 1.5 * seen[0]) and torch.allclose(seen[2], seen[0] + 3)


def test_factories():
    x = random(2, 48, 5, 5)
    block = randomize(ResBlock(48, None, 0.0, normalize=lambda c: nn.GroupNorm(6, c)))
    other = randomize(ResBlock(48, None, 0.0, normalize=lambda c: nn.GroupNorm(6, c), activation=nn.ReLU))
    third = randomize(ResBlock(48, None, 0.0, normalize=lambda c: nn.GroupNorm(3, c)))
    assert relative_error(block(x), other(x)) > 1e-3 and relative_error(block(x), third(x)) > 1e-3


def test_one_embedding_for_the_whole_batch():
    block = randomize(ResBlock(64, 16, 0.0))
    x, emb = random(3, 64, 5, 5), random(1, 16)
    assert torch.allclose(block(x, emb), block(x, emb.expand(3, -1)), atol=1e-6)


def test_ddpm_block_without_a_time_adds_none():
    block = randomize(ResnetBlock(in_channels=64, temb_channels=16))
    x = random(2, 64, 5, 5)
    assert torch.isfinite(block(x)).all() and not torch.allclose(block(x), block(x, random(2, 16)))


@pytest.mark.parametrize("make", [lambda: ResBlock(64, 16, 0.0, 32, use_scale_shift_norm=True), lambda: ResnetBlock(in_channels=64, out_channels=32, temb_channels=16)])
def test_inputs_are_left_alone(make):
    block, x, emb = randomize(make()), random(2, 64, 5, 5), random(2, 16)
    before = x.clone(), emb.clone()
    block(x, emb)
    assert torch.equal(x, before[0]) and torch.equal(emb, before[1])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normalization(48), "48.*32 and 64"),
        (lambda: Normalize(16), "16.*nearest that can: 32$"),
        (lambda: Normalize(30, 8), "30.*24 and 32"),
        (lambda: Normalize(32, 0), "num_groups=0"),
        (lambda: GroupNorm32(-1, 32), "num_groups=-1"),
        (lambda: ResBlock(48, 16, 0.0), "channels=48.*32 and 64"),
        (lambda: ResBlock(32, 16, 0.0, 100), "out_channels=100.*96 and 128"),
        (lambda: ResBlock(32, 16, 0.0, up=True, down=True), "up=True and down=True"),
        (lambda: ResBlock(32, 0, 0.0), "emb_channels=0"),
        (lambda: ResBlock(32, None, 0.0, use_scale_shift_norm=True), "use_scale_shift_norm.*emb_channels"),
        (lambda: ResBlock(32, 16, 1.5), "dropout"),
        (lambda: ResBlock(32, 16, 0.0, dims=0), "dims"),
        (lambda: ResnetBlock(in_channels=48), "in_channels=48.*32 and 64"),
        (lambda: ResnetBlock(in_channels=32, out_channels=33), "out_channels=33.*32 and 64"),
        (lambda: ResnetBlock(in_channels=32, temb_channels=-1), "temb_channels=-1"),
        (lambda: ResnetBlock(in_channels=32, dropout=-0.5), "dropout"),
        (lambda: ResnetBlock(in_channels=32, dims=-2), "dims"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.bad_input
@pytest.mark.parametrize("eps", [-1, float("nan"), "x", None])
def test_bad_eps(eps):
    for make in (GroupNorm32, lambda groups, channels, eps: Normalize(channels, groups, eps)):
        with pytest.raises(ValueError, match=f"eps={eps!r}"):
            make(2, 4, eps=eps)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 32, 5), (2, 16)), "x must be"),
        (((2, 64, 5, 5), (2, 16)), "x must be"),
        (((2, 32, 5, 5), (2, 8)), "embedding must be"),
        (((2, 32, 5, 5), (3, 16)), "embedding must be"),
        (((2, 32, 5, 5), (2, 16, 1)), "embedding must be"),
    ],
)
@pytest.mark.parametrize("make", [lambda: ResBlock(32, 16, 0.0), lambda: ResnetBlock(in_channels=32, temb_channels=16)])
def test_bad_shapes(make, shapes, message):
    with pytest.raises(ValueError, match=message):
        make()(*(random(*s) for s in shapes))


def test_time_where_none_is_wanted():
    with pytest.raises(ValueError, match="without a time"):
        ResBlock(32, None, 0.0)(random(1, 32, 4, 4), random(1, 16))
    with pytest.raises(ValueError, match="needs a time embedding"):
        ResBlock(32, 16, 0.0)(random(1, 32, 4, 4))
    with pytest.raises(ValueError, match="without a time"):
        ResnetBlock(in_channels=32, temb_channels=0)(random(1, 32, 4, 4), random(1, 16))


def test_too_small_to_halve():
    with pytest.raises(ValueError, match="at least"):
        ResBlock(32, None, 0.0, down=True)(random(1, 32, 1, 4))


# ---------------------------------------------------------------- any arguments


def mostly(good, *bad):
    """A strategy that rarely draws a value that is wrong."""
    return st.integers(0, 29).flatmap(lambda n: st.sampled_from(bad) if bad and n == 17 else good)  # hypothesis favours 0


WIDTHS, FOURS = st.sampled_from([32, 64]), st.sampled_from([4, 8, 12])
RESBLOCK = st.fixed_dictionaries(
    dict(
        channels=mostly(FOURS, 0, 6, -4, "8", 8.5, 8.0),
        emb_channels=mostly(st.sampled_from([None, 1, 8, 16, 17]), 0, -4, "8", 8.0),
        dropout=mostly(st.floats(0, 0.9), -0.1, 1.5, "much"),
        out_channels=mostly(st.none() | FOURS, 0, 7, -4, "8"),
        use_conv=st.booleans(),
        use_scale_shift_norm=st.booleans(),
        dims=mostly(st.integers(1, 4), 0, -1, "2"),
        use_checkpoint=st.booleans(),
        resample=mostly(st.sampled_from([(False, False), (True, False), (False, True)]), (True, True)),
    )
)
RESNET_BLOCK = st.fixed_dictionaries(
    dict(
        in_channels=mostly(WIDTHS, 0, 48, -32, "32"),
        out_channels=mostly(st.none() | WIDTHS, 0, 31, "64"),
        conv_shortcut=st.booleans(),
        dropout=mostly(st.floats(0, 0.9), -0.1, 1.5, "much"),
        temb_channels=mostly(st.sampled_from([0, 1, 8, 512]), -1, "8", None),
        dims=mostly(st.integers(1, 4), 0, -1, "2"),
    )
)
NORM = st.tuples(mostly(st.integers(1, 8), 0, -2, "4"), mostly(st.integers(1, 4), 0, -1), mostly(st.floats(1e-8, 1e-2)), st.sampled_from([GroupNorm32, Normalize]))


def try_block(cls, arguments, width, emb_name, factor=1.0):
    """Build, run forward and backward; or a clear error. Whether it was a valid draw."""
    try:
        block = cls(**arguments)
    except ValueError as error:
        assert any(name in str(error) for name in (*arguments, "up", "down")), error
        return False
    except TypeError:
        assert isinstance(arguments["dropout"], str)  # torch's own complaint; all other mistakes name the argument
        return False
    dims, emb_channels = arguments["dims"], arguments[emb_name]
    space = (4, 3, 2, 2)[:dims]
    x = random(2, width, *space).requires_grad_()
    out = randomize(block)(x, random(2, emb_channels) if emb_channels else None)
    out.square().mean().backward()
    out_channels = arguments["out_channels"] or width
    assert out.shape == (2, out_channels, *(int(n * factor) for n in space))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters()) and x.grad.isfinite().all()
    return True


def try_resblock(arguments):
    up, down = arguments.pop("resample")
    return try_block(ResBlock, arguments | dict(up=up, down=down, normalize=groups_of_4), arguments["channels"], "emb_channels", {up: 2.0, down: 0.5}.get(True, 1.0))


def try_resnet_block(arguments):
    return try_block(ResnetBlock, arguments, arguments["in_channels"], "temb_channels")


def try_norm(arguments):
    num_groups, per_group, eps, make = arguments
    try:
        channels = num_groups * per_group
        norm = GroupNorm32(num_groups, channels, eps) if make is GroupNorm32 else Normalize(channels, num_groups, eps)
    except ValueError as error:
        assert "num_groups" in str(error) or "num_channels" in str(error)
        return False
    x = random(2, channels, 3, 5).requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert out.shape == x.shape and torch.allclose(out, F.group_norm(x, num_groups, eps=eps), atol=1e-5)
    return True


DRAWS = [(RESBLOCK, try_resblock), (RESNET_BLOCK, try_resnet_block), (NORM, try_norm)]


def draw_many(strategy, attempt, examples):
    """At least 60 % of the draws must be valid."""
    valid = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(arguments):
        valid.append(attempt(arguments))
        event(f"valid: {valid[-1]}")

    run()
    assert sum(valid) / len(valid) >= 0.6, f"{sum(valid)} of {len(valid)} draws were valid"


@pytest.mark.bad_input
@pytest.mark.parametrize(("strategy", "attempt"), DRAWS)
def test_any_arguments(strategy, attempt):
    draw_many(strategy, attempt, 25 if attempt is try_resnet_block else 50)  # its 32 channels are the slow ones


@pytest.mark.slow
@pytest.mark.bad_input
@pytest.mark.parametrize(("strategy", "attempt"), DRAWS)
def test_any_arguments_many(strategy, attempt):
    draw_many(strategy, attempt, 600)
