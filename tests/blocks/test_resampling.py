"""Convolution and resampling: against the definition, against torch, against diffusers; odd sizes, flags, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from unet_course.resampling import (
    AsymmetricDownsample,
    AvgPoolNd,
    ConvNd,
    ConvTransposeNd,
    Downsample,
    MaxPoolNd,
    Upsample,
    avg_pool_nd,
    conv_folded,
    conv_nd,
    conv_transpose_folded,
    conv_transpose_nd,
    max_pool_nd,
    resize_nearest,
    zero_module,
)
from unet_course.workbench import compare, randomize, relative_error

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = (6, 5, 7, 4, 5)  # of the axes, in the order of their use; odd and even, none alike with its neighbour


def noise(*shape, seed=0):
    """A random tensor, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The definition, written down once more: all windows laid out, one sum of products --------------------------------------------------------


def brute_conv(x, weight, bias, stride, padding, dilation, groups):
    """The sum over all taps and channels, for each position of the output."""
    windows = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for axis, (k, s, d) in enumerate(zip(weight.shape[2:], stride, dilation), start=2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # the taps of this axis come last
    sizes = windows.shape[2 : x.ndim]
    windows = windows.flatten(x.ndim).flatten(2, -2).unflatten(1, (groups, -1))
    out = torch.einsum("bgcpt,goct->bgop", windows, weight.flatten(2).unflatten(0, (groups, -1))).flatten(1, 2)
    return (out + bias[:, None]).unflatten(2, sizes)


def brute_transposed(x, weight, bias, stride, padding, output_padding, dilation, groups):
    """The gradient of the convolution with the same weights, plus the bias."""
    kernel = weight.shape[2:]
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, o, d in zip(x.shape[2:], kernel, stride, padding, output_padding, dilation)]
    out_channels = weight.shape[1] * groups
    source = torch.zeros(len(x), out_channels, *sizes, dtype=x.dtype, requires_grad=True)
    image = brute_conv(source, weight, torch.zeros(len(weight), dtype=x.dtype), stride, padding, dilation, groups)
    image = image[(slice(None), slice(None), *map(slice, x.shape[2:]))]  # a large output_padding has room for more windows
    gradient = torch.autograd.grad(image, source, x, create_graph=True)[0]
    return gradient + bias.reshape(-1, *[1] * len(kernel))


def assert_same(ours, definition, *tensors):
    """Equal outputs, and equal gradients with respect to the tensors."""
    assert relative_error(ours, definition) <= 1e-5
    weights = noise(*ours.shape, seed=9)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), tensors) for y in (ours, definition))
    for a, b in zip(mine, theirs):
        assert relative_error(a, b) <= 1e-4


FIVE = [  # kernel, stride, padding, dilation, groups: one entry for each of five axes; fewer axes take the first ones
    ((2, 3, 2, 1, 2), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1), 1),
    ((3, 2, 3, 2, 2), (2, 1, 2, 1, 2), (1, 1, 0, 2, 1), (1, 2, 1, 1, 2), 1),
    ((2, 1, 3, 2, 3), (2, 3, 1, 2, 2), (1, 0, 2, 0, 1), (2, 1, 2, 1, 1), 2),
]


@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), FIVE)
def test_conv_against_the_definition(dims, kernel, stride, padding, dilation, groups):
    arguments = [a[:dims] for a in (kernel, stride, padding, dilation)]
    layer = randomize(conv_nd(dims, 2, 4, *arguments, groups))
    x = noise(2, 2, *(4, 3, 5, 4, 3)[:dims]).requires_grad_()
    assert isinstance(layer, ConvNd)
    assert_same(layer(x), brute_conv(x, layer.weight, layer.bias, *arguments[1:], groups), x, layer.weight, layer.bias)


@pytest.mark.parametrize("dims", [4, 5])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), FIVE)
def test_transposed_against_the_definition(dims, kernel, stride, padding, dilation, groups):
    kernel, stride, dilation = kernel[:dims], stride[:dims], dilation[:dims]
    padding = tuple(min(p, 1) for p in padding[:dims])
    extra = tuple(max(s, d) - 1 for s, d in zip(stride, dilation))
    layer = randomize(conv_transpose_nd(dims, 4, 2, kernel, stride, padding, extra, groups, True, dilation))
    x = noise(1, 4, *(2, 3, 2, 3, 2)[:dims]).requires_grad_()
    assert isinstance(layer, ConvTransposeNd)
    assert_same(layer(x), brute_transposed(x, layer.weight, layer.bias, stride, padding, extra, dilation, groups), x, layer.weight, layer.bias)


def test_the_definition_is_torchs():
    x, w, b = noise(2, 4, 7, 6), noise(6, 2, 3, 2, seed=1), noise(6, seed=2)
    options = (2, 1), (1, 2), (1, 2), 2
    assert relative_error(brute_conv(x, w, b, *options), F.conv2d(x, w, b, *options)) < 1e-6
    w, b = noise(4, 3, 3, 2, seed=1), noise(6, seed=2)
    reference = F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 1), 2, (1, 2))
    assert relative_error(brute_transposed(x, w, b, (2, 1), (1, 0), (1, 1), (1, 2), 2), reference) < 1e-6


# Against torch, by folding what torch could do itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_torchs_convolution(dims, native, bias):
    options = dict(kernel_size=(3, 2, 3)[:dims], stride=(2, 1, 3)[:dims], padding=(1, 0, 2)[:dims], dilation=(1, 2, 1)[:dims], groups=2, bias=bias)
    x = noise(2, 4, *SIZES[:dims])
    assert compare(ConvNd(dims, 4, 6, native=native, **options), CONVS[dims](4, 6, **options), (x,))
    options["output_padding"] = (1, 1, 2)[:dims]
    assert compare(ConvTransposeNd(dims, 4, 6, native=native, **options), TRANSPOSED[dims](4, 6, **options), (x,))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_up_to_three_axes_torchs_own_layers(dims):
    assert type(conv_nd(dims, 2, 4, 3)) is CONVS[dims]
    assert type(conv_transpose_nd(dims, 2, 4, 3)) is TRANSPOSED[dims]
    assert type(avg_pool_nd(dims, 2)) is (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
    assert type(max_pool_nd(dims, 2)) is (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    torch.manual_seed(3)
    ours = conv_nd(dims, 2, 4, 3, 2, 1, 1, 2, False)
    torch.manual_seed(3)
    assert torch.equal(ours.weight, CONVS[dims](2, 4, 3, 2, 1, 1, 2, False).weight)  # draws as many random numbers


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_initial_values_are_spread_like_torchs(dims):
    for ours, reference in [(ConvNd(dims, 16, 64, 3), CONVS[dims](16, 64, 3)), (ConvTransposeNd(dims, 64, 32, 3), TRANSPOSED[dims](64, 32, 3))]:
        for a, b in zip(ours.parameters(), reference.parameters()):
            assert a.shape == b.shape
            assert a.abs().max() <= 1.02 * b.abs().max() / 0.95 and abs(a.std() / b.std() - 1) < 0.35


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pooling_is_torchs(dims):
    x = noise(2, 3, *SIZES[:dims])
    for kernel, stride, padding in [(2, None, 0), (3, 2, 1), ((3, 2, 1)[:dims], (1, 2, 3)[:dims], (1, 1, 0)[:dims])]:
        for ours, reference in [(AvgPoolNd, avg_pool_nd), (MaxPoolNd, max_pool_nd)]:
            a, b = (x.clone().requires_grad_() for _ in range(2))
            mine, theirs = ours(dims, kernel, stride, padding)(a), reference(dims, kernel, stride, padding)(b)
            assert relative_error(mine, theirs) <= 1e-6
            weights = noise(*mine.shape, seed=1)
            (mine * weights).sum().backward()
            (theirs * weights).sum().backward()
            assert relative_error(a.grad, b.grad) <= 1e-6


@pytest.mark.parametrize("dims", [4, 5])
def test_pooling_against_the_definition(dims):
    x = noise(2, 2, *SIZES[:dims])
    windows = x
    for axis in range(dims):
        windows = windows.unfold(axis + 2, 3, 2)
    windows = windows.flatten(dims + 2)
    assert relative_error(avg_pool_nd(dims, 3, 2)(x), windows.mean(-1)) <= 1e-6
    assert torch.equal(max_pool_nd(dims, 3, 2)(x), windows.amax(-1))


def test_nearest():
    """Whole factors and the sizes of odd skips are exact; more axes do what torch does with one."""
    for m in range(1, 65):
        x = torch.arange(m).float()[None, None]
        for n in {1, m, 2 * m - 1, 2 * m, 2 * m + 1, 3 * m, 4 * m, 8 * m}:
            assert torch.equal(resize_nearest(x, (n,))[0, 0], torch.arange(n) * m // n)
    x = noise(2, 3, 14, 3, 26, 2)
    expected = x
    for axis, n in enumerate((46, 5, 22, 3), start=2):  # among them sizes where torch's float32 rounds
        index = F.interpolate(torch.arange(x.shape[axis]).float()[None, None], size=n)[0, 0].long()
        expected = expected.index_select(axis, index)
    assert torch.equal(resize_nearest(x, (46, 5, 22, 3)), expected)


# Resampling -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(11, 8), (9, 9), (6, 13)])
def test_parity_with_diffusers(size):
    downsampling = pytest.importorskip("diffusers.models.downsampling")
    upsampling = pytest.importorskip("diffusers.models.upsampling")
    x = noise(2, 6, *size)
    op, conv = ({f"{name}.{p}": f"conv.{p}" for p in ("weight", "bias")} for name in ("op", "conv"))
    assert compare(Downsample(6, out_channels=4), downsampling.Downsample2D(6, True, 4, padding=1, name="op"), (x,), op)
    assert compare(AsymmetricDownsample(6), downsampling.Downsample2D(6, True, padding=0, name="op"), (x,), conv)
    assert compare(Upsample(6, out_channels=4), upsampling.Upsample2D(6, True, out_channels=4), (x,), conv)
    skip = (2 * size[0] - 1, 2 * size[1] + 3)
    ours, theirs = Upsample(6), upsampling.Upsample2D(6, True)
    theirs.load_state_dict(ours.state_dict())
    assert relative_error(ours(x, skip), theirs(x, skip)) <= 1e-5
    pool = downsampling.Downsample2D(6, use_conv=False)
    assert relative_error(Downsample(6, False)(x), pool(x)) <= 1e-6
    assert relative_error(AsymmetricDownsample(6, False)(x), pool(x)) <= 1e-6


@pytest.mark.parametrize("dims", [1, 3, 4])
def test_folded_resampling_is_the_same_in_every_dimension(dims):
    """Data that is constant along all axes but one behaves like 1-d data away from the border of the others."""
    row = noise(1, 2, 8)
    x = row.reshape(1, 2, *[1] * (dims - 1), 8).expand(1, 2, *[6] * (dims - 1), 8)
    inside = (slice(None), slice(None), *[2] * (dims - 1))
    for cls, key in [(Downsample, "op"), (AsymmetricDownsample, "conv"), (Upsample, "conv")]:
        layer, line = randomize(cls(2, dims=dims)), cls(2, dims=1)
        state = layer.state_dict()
        line.load_state_dict({f"{key}.weight": state[f"{key}.weight"].flatten(2, -2).sum(2) if dims > 1 else state[f"{key}.weight"], f"{key}.bias": state[f"{key}.bias"]})
        middle = layer(x)[inside] if cls is Upsample else layer(x)[(slice(None), slice(None), *[1] * (dims - 1))]
        assert relative_error(middle, line(row)) <= 1e-5


def test_checkpoint_names():
    assert set(Downsample(4).state_dict()) == {"op.weight", "op.bias"}
    assert set(AsymmetricDownsample(4).state_dict()) == set(Upsample(4).state_dict()) == {"conv.weight", "conv.bias"}
    assert not any(m.state_dict() for m in (Downsample(4, False), AsymmetricDownsample(4, False), Upsample(4, False)))


def test_arguments_in_guided_diffusions_order():
    x = noise(1, 4, 6, 7)
    assert Downsample(4, True, dims=2, out_channels=6)(x).shape == Downsample(4, True, 2, 6, 1)(x).shape == (1, 6, 3, 4)
    assert Upsample(4, True, dims=2, out_channels=6)(x).shape == Upsample(4, True, 2, 6, 1)(x).shape == (1, 6, 12, 14)
    assert Downsample(4, False, dims=2, out_channels=4)(x).shape == (1, 4, 3, 3)


def test_padding_is_right_and_bottom():
    """The two kinds differ by a shift of the input by one pixel, and by nothing else."""
    symmetric, asymmetric = Downsample(3), AsymmetricDownsample(3)
    randomize(symmetric)
    asymmetric.load_state_dict({k.replace("op", "conv"): v for k, v in symmetric.state_dict().items()})
    x = noise(2, 3, 8, 10)
    assert symmetric(x).shape == asymmetric(x).shape
    assert relative_error(symmetric(x)[:, :, 1:, 1:], asymmetric(x)[:, :, 1:, 1:]) > 0.1
    moved = F.pad(x, (1, 0, 1, 0))  # one pixel to the right and down
    assert relative_error(asymmetric(moved), symmetric(x)) <= 1e-5
    assert relative_error(asymmetric(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), asymmetric.conv.weight, asymmetric.conv.bias, 2)) <= 1e-6


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_wrong_padding_moves_the_picture(levels):
    """By 2**levels - 1 pixels, for any weights."""
    n = 16 * 2**levels
    right, wrong = (nn.Sequential(*[cls(2) for _ in range(levels)]) for cls in (AsymmetricDownsample, Downsample))
    randomize(right)
    wrong.load_state_dict(dict(zip(wrong.state_dict(), right.state_dict().values())))
    x = noise(1, 2, n, n)
    moved = x.roll((2**levels - 1,) * 2, (2, 3))
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    assert relative_error(wrong(x)[inside], right(moved)[inside]) <= 1e-5
    assert relative_error(wrong(x)[inside], right(x)[inside]) > 0.1


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_odd_sizes(dims):
    for sizes in [(5, 6, 7, 8)[:dims], (7, 3, 5, 2)[:dims]]:
        x = noise(1, 2, *sizes)
        up, down = [-(-n // 2) for n in sizes], [n // 2 for n in sizes]
        assert list(Downsample(2, dims=dims)(x).shape[2:]) == up
        assert list(Downsample(2, False, dims=dims)(x).shape[2:]) == down
        assert list(AsymmetricDownsample(2, dims=dims)(x).shape[2:]) == list(AsymmetricDownsample(2, False, dims=dims)(x).shape[2:]) == down
        for layer in (Upsample(2, dims=dims), Upsample(2, False, dims), Upsample(2, dims=dims, padding=0)):
            assert layer(Downsample(2, dims=dims)(x), size=x.shape[2:]).shape == x.shape


def test_size_is_the_outputs_whatever_the_padding():
    x = noise(1, 2, 4, 5)
    for padding in (0, 1, 2):
        assert Upsample(2, padding=padding)(x, size=(7, 9)).shape[2:] == (7, 9)
    assert Upsample(2, dims=1)(x[..., 0], size=7).shape[2:] == (7,)


def test_every_axis_is_resampled_unless_told_otherwise():
    x = noise(1, 2, 4, 6, 8)
    assert Upsample(2, dims=3)(x).shape[2:] == (8, 12, 16) and Downsample(2, dims=3)(x).shape[2:] == (2, 3, 4)
    assert Upsample(2, dims=3, factor=(1, 2, 2))(x).shape[2:] == (4, 12, 16)
    assert Downsample(2, dims=3, factor=(1, 2, 2))(x).shape[2:] == Downsample(2, False, 3, factor=(1, 2, 2))(x).shape[2:] == (4, 3, 4)
    assert Upsample(2, factor=3)(noise(1, 2, 3, 4)).shape[2:] == (9, 12) and Downsample(2, factor=3)(noise(1, 2, 7, 9)).shape[2:] == (3, 3)
    assert Downsample(2, False, factor=4)(noise(1, 2, 8, 9)).shape[2:] == (2, 2)


def test_constants_survive():
    """No zero is mixed in where there is no convolution, and no checkerboard comes in where there is one."""
    for dims in (1, 2, 3, 4):
        x = torch.full((1, 2, *[6] * dims), 3.0)
        for layer in (Downsample(2, False, dims), AsymmetricDownsample(2, False, dims), Upsample(2, False, dims)):
            assert torch.equal(layer(x), torch.full_like(layer(x), 3.0))
        inside = (slice(None), slice(None), *[slice(1, -1)] * dims)
        out = randomize(Upsample(2, dims=dims))(x)[inside].flatten(2)
        assert (out.amax(-1) - out.amin(-1)).max() < 1e-4


def test_every_argument_does_something():
    """Each one changes the output's shape, its values or the parameters."""

    def fingerprint(module, x):
        out = randomize(module)(x)
        return out.shape, round(out.double().abs().sum().item(), 3), sum(p.numel() for p in module.parameters())

    x4, x2 = noise(1, 4, 5, 4, 5, 4), noise(1, 4, 8, 9)
    cases = [
        (conv_nd, (4, 4, 4, 2), x4, [dict(stride=2), dict(padding=1), dict(dilation=2), dict(groups=2), dict(bias=False)]),
        (conv_transpose_nd, (4, 4, 4, 2), x4, [dict(stride=2), dict(padding=1), dict(stride=2, output_padding=1), dict(dilation=2), dict(groups=2), dict(bias=False)]),
        (avg_pool_nd, (4, 2), x4, [dict(stride=1), dict(padding=1)]),
        (max_pool_nd, (4, 2), x4, [dict(stride=1), dict(padding=1)]),
        (Downsample, (4,), x2, [dict(use_conv=False), dict(out_channels=6), dict(padding=0), dict(factor=(1, 2))]),
        (AsymmetricDownsample, (4,), x2, [dict(with_conv=False)]),
        (Upsample, (4,), x2, [dict(use_conv=False), dict(out_channels=6), dict(padding=0), dict(factor=(1, 2))]),
    ]
    for make, arguments, x, changes in cases:
        prints = [fingerprint(make(*arguments, **change), x) for change in [{}, *changes]]
        assert len(set(prints)) == len(prints), make
    assert AvgPoolNd(4, 2)(x4).ne(MaxPoolNd(4, 2)(x4)).all()


def test_native_changes_only_the_way(monkeypatch):
    """native=1 never calls conv2d or conv3d."""

    def forbidden(*_, **__):
        raise AssertionError("called")

    layers = [(ConvNd, 1), (ConvTransposeNd, 1)]
    for name in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"):
        monkeypatch.setattr(F, name, forbidden)
    for cls, native in layers:
        cls(4, 2, 2, 2, native=native)(noise(1, 2, 3, 3, 3, 3))
        with pytest.raises(AssertionError):
            cls(4, 2, 2, 2)(noise(1, 2, 3, 3, 3, 3))


def test_the_bias_is_added_once():
    for dims in (1, 2, 3, 4):
        for native in (1, 3):
            for cls in (ConvNd, ConvTransposeNd):
                layer = cls(dims, 1, 1, 3, padding=1, native=native)
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, 0.5)
                out = layer(torch.zeros(1, 1, *[3] * dims))
                assert torch.equal(out, torch.full_like(out, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    x = noise(1, 2, 4, 4, 4, 4).to(dtype)
    layers = [conv_nd(4, 2, 2, 3), conv_transpose_nd(4, 2, 2, 3), avg_pool_nd(4, 2), max_pool_nd(4, 2), Downsample(2, dims=4), AsymmetricDownsample(2, dims=4), Upsample(2, dims=4)]
    assert all(layer.to(dtype)(x).dtype == dtype for layer in layers)


def test_zero_module():
    module = zero_module(nn.Sequential(nn.Linear(3, 3), conv_nd(4, 1, 1, 2)))
    assert isinstance(module, nn.Sequential)
    assert all(p.requires_grad and not p.any() for p in module.parameters())


def test_prints():
    assert "kernel_size=(3, 3, 3, 3)" in str(ConvNd(4, 2, 3, 3)) and "stride=(2, 2, 2, 2)" in str(avg_pool_nd(4, 2)) + str(ConvTransposeNd(4, 1, 1, 2, 2))


# Bad input --------------------------------------------------------------------------------------------------------------------------------

BAD = [  # what is built, what its message must say
    (lambda: conv_nd(0, 1, 1, 3), "dims=0"),
    (lambda: conv_nd(2.0, 1, 1, 3), "dims=2.0"),
    (lambda: conv_nd(2, 0, 1, 3), "in_channels=0"),
    (lambda: conv_nd(2, 1, -1, 3), "out_channels=-1"),
    (lambda: conv_nd(2, 1, 1, (3, 3, 3)), "kernel_size=(3, 3, 3) has 3 entries for dims=2"),
    (lambda: conv_nd(4, 1, 1, 0), "kernel_size=0"),
    (lambda: conv_nd(2, 1, 1, 3, stride=0), "stride=0"),
    (lambda: conv_nd(2, 1, 1, 3, padding=-1), "padding=-1"),
    (lambda: conv_nd(2, 1, 1, 3, padding="same"), "padding='same'"),
    (lambda: conv_nd(4, 4, 6, 3, groups=4), "groups=4 must divide in_channels=4 and out_channels=6"),
    (lambda: ConvNd(2, 1, 1, 3, native=4), "native=4"),
    (lambda: conv_transpose_nd(2, 1, 1, 3, 2, 1, 2), "output_padding=2"),
    (lambda: conv_transpose_nd(4, 1, 1, 3, 2, 1, 2), "output_padding=2"),
    (lambda: conv_folded(noise(1, 1, 4, 4), noise(1, 1, 2, 2), None, (1,), (0, 0), (1, 1)), "stride=(1,) must have one entry for each of 2 axes"),
    (lambda: conv_folded(noise(1, 1, 4, 4), noise(1, 1, 2), None, (1, 1), (0, 0), (1, 1)), "equally many"),
    (lambda: conv_folded(noise(1, 1, 4, 4), noise(1, 1, 2, 2), None, (1, 1), (0, 0), (1, 1), 1, 5), "native=5"),
    (lambda: conv_folded(noise(1, 1, 4, 2), noise(1, 1, 5, 2), None, (1, 1), (0, 0), (1, 1), 1, 1), "x is smaller than the kernel"),
    (lambda: conv_transpose_folded(noise(1, 1, 4), noise(1, 1, 2), None, (1,), (0,), 0, (1,)), "output_padding=0"),
    (lambda: resize_nearest(noise(1, 1, 4, 4), (8,)), "size=(8,) has 1 entries for dims=2"),
    (lambda: avg_pool_nd(0, 2), "dims=0"),
    (lambda: max_pool_nd(4, 2, padding=2), "padding=2"),
    (lambda: avg_pool_nd(2, 2, 0), "stride=0"),
    (lambda: Downsample(0), "channels=0"),
    (lambda: Downsample(4, factor=4), "factor=4 skips positions"),
    (lambda: Downsample(4, dims=3, factor=(2, 2)), "factor=(2, 2) has 2 entries for dims=3"),
    (lambda: Downsample(4, False, out_channels=8), "out_channels=8"),
    (lambda: Downsample(4, False, padding=0), "padding=0"),
    (lambda: Upsample(4, False, out_channels=8), "out_channels=8"),
    (lambda: Upsample(4, dims=-1), "dims=-1"),
    (lambda: AsymmetricDownsample(4, dims=0), "dims=0"),
    (lambda: Downsample(4)(noise(1, 3, 8, 8)), "x has 3 channels, this module was built for channels=4"),
    (lambda: AsymmetricDownsample(4)(noise(1, 3, 8, 8)), "channels=4"),
    (lambda: Upsample(4)(noise(1, 3, 8, 8)), "channels=4"),
    (lambda: Upsample(4)(noise(1, 4, 8)), "dims=2"),
    (lambda: Upsample(4)(noise(1, 4, 8, 8), size=(16, 16, 16)), "size=(16, 16, 16)"),
    (lambda: Upsample(4)(noise(1, 4, 8, 8), size=(0, 16)), "size=(0, 16)"),
    (lambda: Upsample(4, padding=0)(noise(1, 4, 1, 1)), "padding=0"),
    (lambda: Downsample(4, padding=0)(noise(1, 4, 2, 8)), "at least (3, 3)"),
    (lambda: Downsample(4, False)(noise(1, 4, 1, 8)), "at least (2, 2)"),
    (lambda: AsymmetricDownsample(4)(noise(1, 4, 1, 8)), "at least 2"),
    (lambda: ConvNd(4, 1, 1, 3)(noise(1, 1, 4, 4, 4, 2)), "smaller than kernel_size=(3, 3, 3, 3)"),
    (lambda: ConvTransposeNd(4, 1, 1, 1, padding=2)(noise(1, 1, 2, 2, 2, 2)), "padding=(2, 2, 2, 2)"),
    (lambda: avg_pool_nd(4, 3)(noise(1, 1, 4, 4, 4, 2)), "smaller than kernel_size"),
    (lambda: avg_pool_nd(4, 3)(noise(1, 1, 4, 4, 4)), "dims=4"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("act", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(act, words):
    with pytest.raises(ValueError) as caught:
        act()
    assert words in str(caught.value)


# Random arguments: it works, or says what is wrong ------------------------------------------------------------------------------------------


SPOILED = {  # values that no class accepts
    "dims": (0, -1, 2.5), "channels": (0,), "in_channels": (0, -2), "out_channels": (0,), "kernel_size": (0, (1, 2, 3, 1, 2, 3)), "stride": (0, (2, -1)), "padding": (-1, 1.5),
    "dilation": (0,), "groups": (3, 0), "output_padding": (5,), "native": (0, 4), "factor": (0, "2"),
}


@st.composite
def draws(draw):
    """A class, its arguments, and the number of axes of the input. One draw in four is spoiled."""
    dims, channels = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))

    def each(low, high):
        one = st.integers(low, high)
        return draw(one | st.lists(one, min_size=dims, max_size=dims) | st.tuples(*[one] * dims))

    kind = draw(st.sampled_from([ConvNd, conv_nd, ConvTransposeNd, conv_transpose_nd, avg_pool_nd, max_pool_nd, AvgPoolNd, MaxPoolNd, Downsample, AsymmetricDownsample, Upsample]))
    options = dict(dims=dims)
    if kind in (ConvNd, conv_nd, ConvTransposeNd, conv_transpose_nd):
        transposed = kind in (ConvTransposeNd, conv_transpose_nd)
        options |= dict(kernel_size=each(1, 3), stride=each(1, 3), padding=each(0, 1 if transposed else 2), dilation=each(1, 2), bias=draw(st.booleans()))
        options |= dict(in_channels=channels, out_channels=4, groups=draw(st.sampled_from([1, channels])))
        if transposed:
            options["output_padding"] = draw(st.sampled_from([0, 0, 0, 1]))
        if kind in (ConvNd, ConvTransposeNd):
            options["native"] = draw(st.integers(1, 3))
    elif kind in (avg_pool_nd, max_pool_nd, AvgPoolNd, MaxPoolNd):
        options |= dict(kernel_size=each(2, 3), stride=draw(st.sampled_from([None, 1, 2, 3])), padding=each(0, 1))
    elif kind is AsymmetricDownsample:
        options |= dict(channels=channels, with_conv=draw(st.booleans()))
    else:
        options |= dict(channels=channels, use_conv=draw(st.booleans()), factor=each(1, 3))
        if options["use_conv"]:
            options |= dict(out_channels=draw(st.sampled_from([None, 4])), padding=draw(st.integers(0, 2)))
    if draw(st.sampled_from([False, False, False, True])):
        name = draw(st.sampled_from(sorted(SPOILED.keys() & options.keys())))
        options[name] = draw(st.sampled_from(SPOILED[name]))
    return kind, options, channels, dims


COUNT = {"valid": 0, "all": 0}


def works_or_says_why(case):
    """One draw."""
    kind, options, channels, axes = case
    COUNT["all"] += 1
    try:
        module = kind(**options)
    except (ValueError, TypeError) as error:
        assert any(f"{name}=" in str(error) for name in options), error
        return
    x = noise(1, channels, *(5, 7, 5, 6, 5)[:axes]).requires_grad_()
    try:
        out = module(x)
    except ValueError as error:
        assert "x has" in str(error), error
        return
    out.sum().backward()
    assert x.grad.shape == x.shape
    width = options.get("out_channels") or channels
    assert out.shape[:2] == (1, width) and out.ndim == axes + 2
    if kind in (ConvNd, conv_nd):
        full = {k: v if isinstance(v, (tuple, list)) else (v,) * axes for k, v in options.items()}
        meta = zip(x.shape[2:], *(full[k] for k in ("kernel_size", "stride", "padding", "dilation")))
        assert list(out.shape[2:]) == [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in meta]
    COUNT["valid"] += 1


@pytest.mark.bad_input
def test_random_arguments():
    COUNT.update(valid=0, all=0)
    settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(given(draws())(works_or_says_why))()
    assert COUNT["valid"] >= 0.6 * COUNT["all"], COUNT


@pytest.mark.slow
@pytest.mark.bad_input
def test_many_random_arguments():
    COUNT.update(valid=0, all=0)
    settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))(given(draws())(works_or_says_why))()
    assert COUNT["valid"] >= 0.6 * COUNT["all"], COUNT
