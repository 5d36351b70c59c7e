"""The U-Net in any number of dimensions: equal to the U-Net of 2015 written by hand, every argument does something, wrong ones are named."""

import copy
import inspect
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probing import assert_reaches_everything, mostly_valid
from torch import nn
from torch.nn import functional as F

from unet_course.attention import ATTENTION, AttentionBlock, AttnBlock, register_attention
from unet_course.resampling import resize_nearest
from unet_course.unet_nd import ACTIVATIONS, DOWN, NORMS, UP, BatchNormNd, UNetND, count_groups, fit_end, resize_linear
from unet_course.workbench import compare, count_parameters, randomize, relative_error

SMALL = dict(dims=2, in_channels=2, out_channels=3, channels=(8, 12), blocks_per_level=1)
PLAIN = dict(activation="relu", norm="none", residual=False, down="max", up="transposed", blocks_per_level=1)  # as in 2015
ARGUMENTS = list(inspect.signature(UNetND).parameters)
SIZES = {1: (21,), 2: (7, 10), 3: (5, 4, 6), 4: (3, 4, 5, 2), 5: (2, 3, 2, 3, 2)}


def small(**changes) -> UNetND:
    return UNetND(**{**SMALL, **changes})


def two_convs(n: int, m: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n, m, 3, padding=1), nn.ReLU(), nn.Conv2d(m, m, 3, padding=1), nn.ReLU())


class ByHand(nn.Module):
    """Ronneberger, Fischer and Brox (2015), figure 1, with padded convolutions."""

    def __init__(self, in_channels: int, out_channels: int, channels: list[int]):
        super().__init__()
        self.contracting = nn.ModuleList(two_convs(n, m) for n, m in pairwise([in_channels, *channels]))
        self.up_convs = nn.ModuleList(nn.ConvTranspose2d(n, m, 2, stride=2) for n, m in pairwise(channels[::-1]))
        self.expanding = nn.ModuleList(two_convs(2 * m, m) for m in channels[-2::-1])
        self.last = nn.Conv2d(channels[0], out_channels, 1)

    def forward(self, x):
        maps = []
        for i, block in enumerate(self.contracting):
            x = block(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        for i, (up_conv, block) in enumerate(zip(self.up_convs, self.expanding)):
            x = block(torch.cat([up_conv(x), maps[-2 - i]], dim=1))
        return self.last(x)


def names_by_hand(model: UNetND) -> dict[str, str]:
    """Our parameters' names and those of `ByHand`: both list them level by level, but the way up in another order."""
    levels = len(model.down)
    names = {}
    for name, _ in model.named_parameters():
        part, *rest = name.split(".")
        kind = rest[-1]
        if part == "head":
            names[name] = f"last.{kind}"
        elif part == "up" and rest[1] == "0":
            names[name] = f"up_convs.{rest[0]}.{kind}"
        else:
            index = {"down": lambda: rest[0], "bottom": lambda: levels, "up": lambda: rest[0]}[part]()
            conv = 0 if "first" in rest else 2
            names[name] = f"{'expanding' if part == 'up' else 'contracting'}.{index}.{conv}.{kind}"
    return names


class TestTheOriginal:
    @pytest.mark.parametrize("channels", [[5], [4, 6], [4, 8, 6], [3, 4, 5, 6]])
    def test_equals_2015(self, channels):
        ours, reference = UNetND(2, 2, 3, channels, **PLAIN), ByHand(2, 3, channels)
        result = compare(ours, reference, (torch.randn(2, 2, 16, 24),), names_by_hand(ours))
        assert result, result
        assert result.tensors == len(list(ours.parameters())) + 1

    def test_odd_sizes(self):
        """By hand an odd size does not fit together; ours repeats the last row that came from below."""
        ours, x = randomize(UNetND(2, 1, 1, (4, 6), **PLAIN)), torch.randn(1, 1, 9, 8)
        h = ours.down[0][0](x)
        below = ours.up[0][0].conv(ours.bottom(F.max_pool2d(h, 2)))
        grown = torch.cat([below, below[:, :, -1:]], dim=2)
        assert torch.allclose(ours(x), ours.head(ours.up[0][1](torch.cat([grown, h], dim=1))), atol=1e-6)

    def test_counts(self):
        """The paper's 23 convolutional layers."""
        with torch.device("meta"):
            model = UNetND(2, 1, 2, (64, 128, 256, 512, 1024), **PLAIN)
        convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(convs) == 23 and count_parameters(model) == 31_030_658
        assert model.sizes(572) == [(572, 572), (286, 286), (143, 143), (71, 71), (35, 35)]


class TestForward:
    @pytest.mark.parametrize("dims", SIZES)
    @pytest.mark.parametrize("up", UP)
    @pytest.mark.parametrize("down", DOWN)
    def test_dims(self, dims, up, down):
        """Forward and backward, at odd sizes that differ between the axes; dims=5 included."""
        model = randomize(small(dims=dims, up=up, down=down, channels=(4, 6)))
        x = torch.randn(2, 2, *SIZES[dims], requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        assert out.shape == (2, 3, *SIZES[dims]) and x.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("options", [{}, {"down": "avg"}, PLAIN, {"up": "linear"}], ids=["conv", "avg", "2015", "linear"])
    @pytest.mark.parametrize("size", [(4, 4), (4, 7), (31, 9), (16, 5)])
    def test_sizes(self, size, options):
        model = small(channels=(4, 6, 8), **{**options, "blocks_per_level": 2})
        assert model(torch.randn(1, 2, *size)).shape == (1, 3, *size)

    def test_single_pixel(self):
        x = torch.randn(2, 2, 1, 1)
        assert small()(x).shape == (2, 3, 1, 1)
        with pytest.raises(ValueError, match="must be .2, 2. or longer"):
            small(down="max")(x)

    def test_the_same_in_every_dimension(self):
        """A volume that repeats one picture, through kernels that are zero beside their middle slice, is that picture's answer."""
        options = dict(in_channels=1, out_channels=2, channels=(4, 8), norm="none", factor=1)
        flat, deep = randomize(UNetND(2, **options)), UNetND(3, **options)
        with torch.no_grad():
            for p, q in zip(flat.parameters(), deep.parameters()):
                q.zero_()
                (q[:, :, q.shape[2] // 2] if q.ndim == 5 else q).copy_(p)
        x = torch.randn(2, 1, 6, 5)
        repeated = x[:, :, None].expand(-1, -1, 3, -1, -1)
        assert relative_error(deep(repeated), flat(x)[:, :, None].expand(-1, -1, 3, -1, -1)) < 1e-5

    def test_skips_come_from_the_same_level(self):
        """Each join gets two maps of one size; what is pushed last is taken first."""
        seen = []

        class Spy(UNetND):
            def join(self, h, skip):
                seen.append((tuple(h.shape[1:]), tuple(skip.shape[1:])))
                return super().join(h, skip)

        Spy(2, 1, 1, (4, 6, 8), blocks_per_level=2)(torch.randn(1, 1, 9, 14))
        assert seen == [((6, 5, 7), (6, 5, 7)), ((4, 9, 14), (4, 9, 14))]

    def test_factor_per_axis(self):
        model = small(dims=3, factor=(1, 2, 3), channels=(4, 6, 8))
        assert model.sizes((5, 12, 18)) == [(5, 12, 18), (5, 6, 6), (5, 3, 2)]
        for up in UP:
            for down in DOWN:
                net = small(dims=3, factor=(1, 2, 3), channels=(4, 6, 8), up=up, down=down)
                assert net(torch.randn(1, 2, 3, 8, 10)).shape == (1, 3, 3, 8, 10)

    def test_dtypes(self):
        x = torch.randn(1, 2, 8, 8)
        for dtype in (torch.float64, torch.bfloat16):
            model = small(time_embedding=True).to(dtype)
            assert model(x, 3).dtype == torch.float32 and model(x.to(dtype), 3).dtype == dtype

    def test_caller_keeps_its_tensor(self):
        x = torch.randn(1, 2, 8, 8)
        before = x.clone()
        randomize(small(residual=False))(x)
        assert torch.equal(x, before)

    def test_deepcopy_pickle_state(self):
        model = randomize(small(attention="linear", norm="batch", time_embedding=True)).eval()
        x = torch.randn(1, 2, 8, 8)
        again = pickle.loads(pickle.dumps(model))
        fresh = small(attention="linear", norm="batch", time_embedding=True).eval()
        fresh.load_state_dict(model.state_dict())
        for other in (copy.deepcopy(model), again, fresh):
            assert torch.equal(other(x, 5), model(x, 5))

    def test_compiles_to_a_graph(self):
        """No step depends on the values of a tensor: the network can be exported."""
        model, x = small(residual=False).eval(), torch.randn(1, 2, 9, 10)
        exported = torch.export.export(model, (x,))
        assert relative_error(exported.module()(x), model(x)) < 1e-6

    def test_learns(self):
        """A few steps on one example bring the loss down, in any dimension and with both kinds of blocks."""
        for dims, residual in ((1, True), (2, False), (3, True)):
            model, x = small(dims=dims, residual=residual, out_channels=2), torch.randn(2, 2, *SIZES[dims])
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            losses = []
            for _ in range(30):
                loss = (model(x) - x.flip(1)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < 0.5 * losses[0], (dims, residual, losses)


class TestTime:
    @pytest.mark.parametrize(("residual", "norm"), [(r, n) for r in (True, False) for n in NORMS if n != "instance"])
    def test_is_heard(self, residual, norm):
        """Whatever is built hears the time; batch norm in use (in training it subtracts what a whole batch shares)."""
        model, x = randomize(small(time_embedding=True, residual=residual, norm=norm)).eval(), torch.randn(2, 2, 8, 8)
        assert relative_error(model(x, 900), model(x, 10)) > 1e-3
        each = model(x, torch.tensor([900, 10]))
        for i, t in enumerate((900, 10)):
            assert relative_error(each[i], model(x, t)[i]) < 1e-5
        assert relative_error(model(x, [900, 10]), each) == 0

    @pytest.mark.parametrize("residual", [True, False])
    def test_reaches_every_block(self, residual):
        model = randomize(small(time_embedding=True, residual=residual, blocks_per_level=2))
        model(torch.randn(1, 2, 8, 8), 5).square().sum().backward()
        layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert len(layers) == 2 + 6 and all(m.weight.grad.abs().sum() > 0 for m in layers)

    @pytest.mark.bad_input
    def test_required_and_refused(self):
        x = torch.randn(2, 2, 8, 8)
        with pytest.raises(ValueError, match="time_embedding=True and needs t"):
            small(time_embedding=True)(x)
        with pytest.raises(ValueError, match="time_embedding=False and takes no t"):
            small()(x, 5)
        with pytest.raises(ValueError, match="t must be one number, or one for each of the 2 examples"):
            small(time_embedding=True)(x, [1, 2, 3])


class TestParts:
    def test_groups(self):
        for channels in range(1, 1025):
            groups = count_groups(channels)
            assert channels % groups == 0 and groups <= 32 and (channels // groups >= 4 or groups == 1)
        assert [count_groups(n) for n in (8, 12, 64, 128, 256, 320, 7)] == [2, 3, 16, 32, 32, 32, 1]

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_norms_equal_torch(self, dims):
        x = 3 * torch.randn(3, 8, *SIZES[dims]) + 1
        reference = {"batch": nn.BatchNorm1d, "instance": nn.InstanceNorm1d} if dims == 1 else {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
        reference = {"batch": nn.BatchNorm3d, "instance": nn.InstanceNorm3d} if dims == 3 else reference
        for name, norm in reference.items():
            assert relative_error(NORMS[name](8)(x), norm(8)(x)) < 1e-5
        assert relative_error(NORMS["layer"](8)(x), F.layer_norm(x, x.shape[1:])) < 1e-5
        assert relative_error(NORMS["group"](8)(x), F.group_norm(x, 2)) < 1e-5
        assert torch.equal(NORMS["none"](8)(x), x)

    def test_batch_norm_collects_statistics(self):
        ours, theirs, x = BatchNormNd(4), nn.BatchNorm2d(4), 2 * torch.randn(5, 4, 3, 6) - 1
        for _ in range(3):
            ours(x), theirs(x)
        assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-6
        assert BatchNormNd(4)(torch.randn(2, 4, 2, 3, 2, 3)).shape == (2, 4, 2, 3, 2, 3)

    @pytest.mark.parametrize(("dims", "mode"), [(1, "linear"), (2, "bilinear"), (3, "trilinear")])
    def test_linear_equals_torch(self, dims, mode):
        x, size = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64), [2 * n + 1 for n in SIZES[dims]]
        assert relative_error(resize_linear(x, size), F.interpolate(x, size=size, mode=mode)) < 1e-12

    def test_linear_keeps_a_ramp(self):
        """In four dimensions: what is linear stays linear, away from the ends."""
        ramp = torch.arange(4.0).reshape(4, 1, 1, 1) + 10 * torch.arange(4.0)
        grown = resize_linear(ramp.expand(1, 1, 4, 4, 4, 4), (8, 8, 8, 8))
        inner = grown[0, 0, 1:-1, 1:-1, 1:-1, 1:-1]
        assert torch.allclose(inner.diff(dim=0), torch.tensor(0.5)) and torch.allclose(inner.diff(dim=3), torch.tensor(5.0))

    def test_fit_end(self):
        x = torch.arange(6.0).reshape(1, 1, 2, 3)
        assert fit_end(x, (3, 2)).tolist() == [[[[0, 1], [3, 4], [3, 4]]]]
        assert fit_end(x, (2, 3)) is x

    def test_nearest_is_repetition(self):
        model = randomize(small(up="nearest"))
        h = torch.randn(1, 12, 3, 4)
        assert torch.equal(model.up[0][0](h, size=(5, 8)), model.up[0][0].conv(resize_nearest(h, (5, 8))))


class TestAttention:
    def test_where(self):
        for attention, where in (("none", 0), ("vanilla", 1), (("vanilla", "none"), 2), (["vanilla", "vanilla"], 3)):
            model = small(attention=attention)
            assert sum(isinstance(m, AttnBlock) for m in model.modules()) == where
            assert sum(v.attention for v in model.describe(16).levels) == where

    def test_is_global(self):
        """With attention at the bottom, the far end matters; without norm and attention it does not."""
        x = torch.randn(1, 2, 64)
        far = x.clone()
        far[..., -1] += 100
        for attention, reached in (("none", False), ("vanilla", True), ("linear", True)):
            model = randomize(small(dims=1, norm="none", attention=attention)).requires_grad_(False)
            assert bool((model(far) - model(x))[..., :16].abs().max() > 0) == reached

    def test_own_blocks(self):
        """Registered blocks get what they take: `dims`, `normalize`, both, or neither; in `forward` the time, if they name it."""

        class Gate(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.scale = nn.Linear(128, channels)

            def forward(self, x, emb):
                return x * self.scale(emb).reshape(*x.shape[:2], 1, 1)

        before = dict(ATTENTION)
        try:
            register_attention("test-gate")(Gate)
            register_attention("test-openai")(AttentionBlock)
            register_attention("test-kwargs")(lambda channels, **kwargs: AttnBlock(channels, **kwargs))
            x = torch.randn(2, 2, 8, 8)
            assert randomize(small(attention="test-gate", time_embedding=True))(x, 7).shape == (2, 3, 8, 8)
            for name in ("test-openai", "test-kwargs"):
                assert small(attention=name)(x).shape == (2, 3, 8, 8)
                assert small(attention=name, dims=3)(x[..., None]).shape == (2, 3, 8, 8, 1)
        finally:
            ATTENTION.clear()
            ATTENTION.update(before)


class TestDescribe:
    def test_levels(self):
        found = small(channels=(4, 6, 8), blocks_per_level=2, attention=("none", "linear", "vanilla")).describe((21, 64))
        assert [(v.size, v.channels, v.blocks, v.attention) for v in found.levels] == [((21, 64), 4, 4, 0), ((11, 32), 6, 4, 4), ((6, 16), 8, 2, 2)]
        assert "residual" not in repr(small(residual=False).describe()) and "blocks " in repr(found)
        assert "UNetND" in repr(found) and "11 × 32" in repr(found) and f"{found.parameters:,}" in repr(found)

    @pytest.mark.parametrize("options", [{}, PLAIN, {"down": "avg", "factor": (2, 1)}], ids=["conv", "2015", "avg"])
    def test_sizes_are_the_real_ones(self, options):
        model, seen = small(channels=(4, 6, 8), **{**options, "blocks_per_level": 1}), []
        for part in [*(blocks for blocks, _ in model.down), model.bottom]:
            part.register_forward_hook(lambda module, _, out: seen.append(tuple(out.shape[2:])))
        model(torch.randn(1, 2, 13, 18))
        assert seen == model.sizes((13, 18)) == [v.size for v in model.describe((13, 18)).levels]
        assert model.describe().levels[0].size == (64, 64)


CHANGES = {  # argument: its other value
    "dims": 1,
    "in_channels": 4,
    "out_channels": 2,
    "channels": (8, 16),
    "blocks_per_level": 2,
    "activation": "relu",
    "norm": "layer",
    "attention": "vanilla",
    "residual": False,
    "time_embedding": True,
    "down": "max",
    "up": "transposed",
    "dropout": 0.5,
    "factor": 1,
}


def signs(model: UNetND, x: torch.Tensor) -> tuple:
    """What an argument may change: the parameters, or what comes out."""
    randomize(model)
    torch.manual_seed(0)
    t = 5 if model.time_embed is not None else None
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, model(x, t)


class TestArguments:
    def test_all_are_listed(self):
        assert list(CHANGES) == ARGUMENTS

    @pytest.mark.parametrize("name", CHANGES)
    def test_each_does_something(self, name):
        x = torch.randn(2, 2, 8, 10)
        other = {"dims": x[..., 0], "in_channels": torch.cat([x, x], dim=1)}.get(name, x)
        (shapes, out), (changed_shapes, changed) = signs(small(), x), signs(small(**{name: CHANGES[name]}), other)
        assert shapes != changed_shapes or relative_error(changed, out) > 1e-3

    @pytest.mark.parametrize(("name", "known"), [("activation", ACTIVATIONS), ("norm", NORMS), ("down", DOWN), ("up", UP)])
    @pytest.mark.parametrize("residual", [True, False])
    def test_all_values_differ(self, name, known, residual):
        """No two values of an option give the same network."""
        x, outs = torch.randn(2, 2, 8, 10), []
        for value in known:
            shapes, out = signs(small(**{name: value}, residual=residual), x)
            assert all(shapes != s or relative_error(out, o) > 1e-4 for s, o in outs), value
            outs.append((shapes, out))

    def test_dropout_only_in_training(self):
        for residual in (True, False):
            model, x = randomize(small(dropout=0.5, residual=residual)), torch.randn(1, 2, 8, 8)
            assert not torch.equal(model(x), model(x))
            model.eval()
            assert torch.equal(model(x), model(x))

    def test_residual_block_starts_as_nothing(self):
        """A fresh residual network is its stem, its resampling and its shortcuts: the blocks' insides are silent."""
        model, x = small(channels=(8, 8)), torch.randn(1, 2, 8, 8)
        assert torch.equal(model.bottom(model.stem(x)), model.stem(x))

    def test_own_options(self):
        """The tables are open: a new entry is a new option."""
        try:
            ACTIVATIONS["test-sine"] = lambda: type("Sine", (nn.Module,), {"forward": lambda self, x: x.sin()})()
            NORMS["test-half"] = lambda channels: nn.GroupNorm(2, channels)
            assert small(activation="test-sine", norm="test-half")(torch.randn(1, 2, 8, 8)).shape == (1, 3, 8, 8)
        finally:
            del ACTIVATIONS["test-sine"], NORMS["test-half"]


WRONG = [
    (dict(dims=0), "dims=0 must be a whole number of at least 1"),
    (dict(dims=2.0), "dims=2.0"),
    (dict(in_channels=0), "in_channels=0"),
    (dict(out_channels=True), "out_channels=True"),
    (dict(channels=()), r"channels=\(\) must be a list"),
    (dict(channels=64), "channels=64 must be a list"),
    (dict(channels="64"), "channels='64' must be a list"),
    (dict(channels=(8, 0)), "channels=0 must be a whole number"),
    (dict(channels=(8, 1.5)), "channels=1.5"),
    (dict(blocks_per_level=0), "blocks_per_level=0"),
    (dict(activation="swish"), "activation='swish' is unknown; there are relu, leaky_relu, elu, silu, gelu"),
    (dict(activation=nn.ReLU), "activation=.* is unknown"),
    (dict(norm="weight"), "norm='weight' is unknown; there are group, batch, instance, layer, none"),
    (dict(norm=None), "norm=None is unknown"),
    (dict(norm="instance", time_embedding=True), "norm='instance' subtracts again what time_embedding=True adds"),
    (dict(norm="instance", time_embedding=True, residual=False), "norm='instance' subtracts again"),
    (dict(attention="flash"), "attention='flash' is unknown; there are vanilla, linear, none"),
    (dict(attention=("none",)), r"attention=\('none',\) has 1 entries for the 2 levels"),
    (dict(attention=("none", "soft")), "attention='soft' is unknown"),
    (dict(attention=True), "attention=True is unknown"),
    (dict(down="stride"), "down='stride' is unknown; there are conv, avg, max"),
    (dict(up="cubic"), "up='cubic' is unknown; there are nearest, linear, transposed"),
    (dict(dropout=1.0), "dropout=1.0 must be a probability"),
    (dict(dropout=-0.1), "dropout=-0.1"),
    (dict(dropout="0.1"), "dropout='0.1'"),
    (dict(factor=0), "factor=0"),
    (dict(factor=(2, 2, 2)), r"factor=\(2, 2, 2\) has 3 entries for dims=2"),
    (dict(factor=4), "factor=.* skips positions"),
]


class TestErrors:
    @pytest.mark.bad_input
    @pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            small(**arguments)

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("options", "x", "message"),
        [
            ({}, torch.randn(1, 3, 8, 8), "x has 3 channels, this network takes in_channels=2"),
            ({}, torch.randn(1, 2, 8), "x must be .* 2 axes of space"),
            ({}, torch.randn(2, 8, 8), "x must be"),
            ({}, torch.zeros(1, 2, 8, 8, dtype=torch.int64), "int64"),
            ({"down": "max", "channels": (4, 4, 4)}, torch.randn(1, 2, 3, 8), r"size \(3, 8\) does not reach the lowest level; its axes must be \(4, 4\)"),
            ({"norm": "instance"}, torch.randn(3, 2, 2, 2), "norm='instance' would normalise single values"),
            ({"norm": "batch"}, torch.randn(1, 2, 2, 2), "norm='batch' would normalise single values"),
            ({"channels": (8, 1)}, torch.randn(1, 2, 2, 2), "norm='group' would normalise single values"),
        ],
    )
    def test_forward(self, options, x, message):
        with pytest.raises(ValueError, match=message):
            small(**options)(x)

    @pytest.mark.bad_input
    def test_describe(self):
        with pytest.raises(ValueError, match=r"size=\(8,\) has 1 entries for dims=2"):
            small().describe((8,))
        with pytest.raises(ValueError, match="size=0"):
            small().describe(0)

    def test_batch_norm_of_one_in_eval(self):
        assert small(norm="batch").eval()(torch.randn(1, 2, 2, 2)).shape == (1, 3, 2, 2)


BAD = {  # one of them may be put among arguments that fit
    "dims": 0,
    "in_channels": -1,
    "out_channels": 0,
    "channels": (4, "8"),
    "blocks_per_level": 1.5,
    "activation": "softmax",
    "norm": "weight",
    "attention": ["none"] * 9,
    "dropout": 7,
    "down": "nearest",
    "up": "max",
    "factor": -2,
}


@st.composite
def draws(draw) -> dict:
    """Arguments that fit together; in some cases one of them is replaced by one of `BAD`."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    dims, levels = one_of(1, 1, 2, 2, 2, 3, 3, 4, 5), one_of(1, 2, 2, 3)
    arguments = dict(
        dims=dims,
        in_channels=one_of(1, 2, 3),
        out_channels=one_of(1, 4),
        channels=tuple(one_of(4, 6, 8, 3) if dims > 3 else one_of(8, 12, 7, 32, 4) for _ in range(levels)),
        blocks_per_level=1 if dims > 3 else one_of(1, 1, 2),
        activation=one_of(*ACTIVATIONS),
        norm=one_of(*NORMS),
        attention=one_of("none", "none", "vanilla", "linear", ["linear"] * levels),
        residual=one_of(True, False),
        time_embedding=one_of(True, False),
        down=one_of(*DOWN),
        up=one_of(*UP),
        dropout=one_of(0.0, 0, 0.3),
        factor=one_of(2, 2, 2, 1, 3, [2] * dims, [1] + [2] * (dims - 1)),
    )
    if one_of(False, False, False, False, True):
        name = one_of(*BAD)
        arguments[name] = BAD[name]
    return arguments


def explore(number: int) -> Counter:
    """Build, run forward and backward, `number` times; anything but a result or a clear error fails."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(draws(), st.lists(st.integers(3, 9), min_size=5, max_size=5))
    def draw(arguments, size):
        size = [min(n, 5) for n in size] if arguments["dims"] > 3 else size
        size = size[: max(arguments["dims"], 1)]
        try:
            model = UNetND(**arguments)
            x = torch.randn(2, max(arguments["in_channels"], 1), *size, requires_grad=True)
            out = model(x, [3, 500] if arguments["time_embedding"] else None)
        except (ValueError, TypeError) as error:
            tally["refused"] += 1
            assert any(name in str(error) for name in [*ARGUMENTS, "size"]), error
            return
        tally["valid"] += 1
        assert out.shape == (2, arguments["out_channels"], *size) and out.isfinite().all()
        assert_reaches_everything(model, x, out)
        assert model.describe(size).levels[0].size == tuple(size)

    draw()
    return mostly_valid(tally)


class TestExplore:
    def test_some(self):
        assert explore(40)["refused"] > 0

    @pytest.mark.slow
    def test_many(self):
        assert explore(600).total() >= 500
