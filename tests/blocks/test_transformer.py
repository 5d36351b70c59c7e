"""Chapter 05: the feed-forward layer, the transformer block and the spatial transformer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import Transformer2DModel
from diffusers.models import attention as theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from unet_course.resblock import Normalize
from unet_course.transformer import GEGLU, BasicTransformerBlock, FeedForward, SpatialTransformer, attention_maps, quick_gelu
from unet_course.workbench import compare, count_parameters, randomize, relative_error


def noise(*shape, seed=0):
    """Reproducible input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ parity


def test_quick_gelu_is_transformers():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(quick_gelu(x), activations.QuickGELUActivation()(x))
    assert 1.9e-2 < (quick_gelu(x) - F.gelu(x)).abs().max() < 2.1e-2


def test_geglu():
    assert compare(GEGLU(24, 40), theirs.GEGLU(24, 40), (noise(2, 7, 24),))


def test_the_gate_is_the_second_half():
    layer = randomize(GEGLU(8, 5))
    x = noise(3, 8)
    values, gates = layer.proj(x)[:, :5], layer.proj(x)[:, 5:]
    torch.testing.assert_close(layer(x), values * F.gelu(gates))
    assert relative_error(layer(x), gates * F.gelu(values)) > 0.1


@pytest.mark.parametrize("out", [None, 17])
@pytest.mark.parametrize("mult", [4, 2])
def test_feed_forward_gated(out, mult):
    assert compare(FeedForward(24, out, mult, glu=True), theirs.FeedForward(24, out, mult, activation_fn="geglu"), (noise(2, 7, 24),))


def test_feed_forward_plain():
    names = {f"net.{a}.{k}": f"net.{b}.{k}" for a, b in (("0.0", "0.proj"), ("2", "2")) for k in ("weight", "bias")}
    assert compare(FeedForward(24), theirs.FeedForward(24, activation_fn="gelu"), (noise(2, 7, 24),), names)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("words", [1, 11])
def test_block(gated, words):
    ours = BasicTransformerBlock(48, 3, 16, context_dim=20, gated_ff=gated)
    reference = theirs.BasicTransformerBlock(48, 3, 16, cross_attention_dim=20, activation_fn="geglu" if gated else "gelu")
    names = {n: n if gated else n.replace("net.0.0", "net.0.proj") for n, _ in ours.named_parameters()}
    agreement = compare(ours, reference, (noise(2, 15, 48), noise(2, words, 20, seed=1)), names, lambda x, c: reference(x, encoder_hidden_states=c))
    assert agreement, agreement


def test_block_of_two_cross_attentions():
    ours = BasicTransformerBlock(32, 2, 16, context_dim=20, disable_self_attn=True)
    reference = theirs.BasicTransformerBlock(32, 2, 16, cross_attention_dim=20, only_cross_attention=True)
    assert compare(ours, reference, (noise(2, 15, 32), noise(2, 5, 20, seed=1)), call=lambda x, c: reference(x, encoder_hidden_states=c))


def test_block_of_two_self_attentions():
    ours = BasicTransformerBlock(32, 2, 16)
    assert compare(ours, theirs.BasicTransformerBlock(32, 2, 16, double_self_attention=True), (noise(2, 15, 32),))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("size", "words", "depth"), [((5, 7), 11, 1), ((8, 4), 1, 3), ((1, 9), 77, 2)])
def test_spatial_transformer(linear, size, words, depth):
    ours = SpatialTransformer(64, 3, 16, depth=depth, context_dim=20, use_linear=linear)
    reference = Transformer2DModel(3, 16, in_channels=64, num_layers=depth, cross_attention_dim=20, use_linear_projection=linear)
    inputs = noise(2, 64, *size), noise(2, words, 20, seed=1)
    agreement = compare(ours, reference, inputs, call=lambda x, c: reference(x, encoder_hidden_states=c, return_dict=False)[0])
    assert agreement, agreement


def test_eps_matters():
    """On a faint map, the group norm's eps decides: 1e-6, not 1e-5."""
    ours = randomize(SpatialTransformer(32, 2, 16))
    assert ours.norm.eps == 1e-6 and all(m.eps == 1e-5 for m in ours.modules() if isinstance(m, nn.LayerNorm))
    x = 3e-3 * noise(1, 32, 4, 4)
    before = ours(x)
    ours.norm.eps = 1e-5
    assert relative_error(ours(x), before) > 1e-2


# ------------------------------------------------------------------------------------------------ structure


def test_names_and_counts_of_stable_diffusion():
    with torch.device("meta"):
        block = SpatialTransformer(320, 8, 40, context_dim=768)
    assert {n for n, _ in block.named_parameters() if n.endswith("weight")} == {
        "norm.weight", "proj_in.weight", "proj_out.weight",
        *(f"transformer_blocks.0.attn{i}.{n}.weight" for i in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.0.norm{i}.weight" for i in (1, 2, 3)),
        "transformer_blocks.0.ff.net.0.proj.weight", "transformer_blocks.0.ff.net.2.weight",
    }  # fmt: skip
    assert block.proj_in.weight.shape == (320, 320, 1, 1) and block.transformer_blocks[0].ff.net[0].proj.weight.shape == (2560, 320)
    assert block.transformer_blocks[0].attn1.to_q.bias is None


def test_first_output_is_the_input():
    x = noise(2, 32, 3, 5)
    for linear in (False, True):
        assert torch.equal(SpatialTransformer(32, 2, 16, use_linear=linear)(x), x)


def test_convolutions_are_linear_layers():
    conv, linear = SpatialTransformer(32, 3, 16, depth=2), SpatialTransformer(32, 3, 16, depth=2, use_linear=True)
    randomize(conv)
    linear.load_state_dict({k: v.squeeze((2, 3)) if v.ndim == 4 else v for k, v in conv.state_dict().items()})
    x = noise(2, 32, 4, 6)
    assert relative_error(linear(x), conv(x)) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_any_number_of_axes(linear):
    """A long map and the same tokens as a picture, a volume or four axes give the same."""
    x, context = noise(1, 32, 24), noise(1, 5, 8, seed=1)
    line = randomize(SpatialTransformer(32, 2, 16, context_dim=8, use_linear=linear, dims=1))
    for space in ((4, 6), (2, 3, 4), (2, 2, 3, 2)):
        net = SpatialTransformer(32, 2, 16, context_dim=8, use_linear=linear, dims=len(space))
        net.load_state_dict({k: v.reshape(net.state_dict()[k].shape) for k, v in line.state_dict().items()})
        out = net(x.reshape(1, 32, *space), context)
        assert out.shape == (1, 32, *space)
        assert relative_error(out.flatten(2), line(x, context)) < 1e-5


def test_context_for_each_block():
    net = randomize(SpatialTransformer(32, 2, 16, depth=2, context_dim=[8, 12]))
    x, first, second = noise(2, 32, 3, 5), noise(2, 4, 8, seed=1), noise(2, 6, 12, seed=2)
    out = net(x, [first, second])
    assert net.transformer_blocks[0].attn2.to_k.in_features == 8 and net.transformer_blocks[1].attn2.to_k.in_features == 12
    assert relative_error(net(x, [first + 1, second]), out) > 1e-4
    assert relative_error(net(x, [first, second + 1]), out) > 1e-4


def test_one_context_for_all_blocks():
    """As Stable Diffusion 2's configurations give it: one number, or a list with one."""
    x, context = noise(2, 32, 3, 5), noise(2, 4, 8, seed=1)
    one, listed = (randomize(SpatialTransformer(32, 2, 16, depth=2, context_dim=c)) for c in (8, [8]))
    expected = one(x, context)
    assert torch.equal(listed(x, [context]), expected) and torch.equal(one(x, (context, context)), expected)


def test_no_context_means_self_attention():
    net = randomize(SpatialTransformer(32, 2, 16))
    x = noise(2, 32, 3, 5)
    assert torch.equal(net(x), net(x, [None]))


def test_half_precision():
    net = randomize(SpatialTransformer(32, 2, 16, context_dim=8)).bfloat16()
    assert net(noise(1, 32, 4, 4).bfloat16(), noise(1, 3, 8).bfloat16()).dtype == torch.bfloat16


def test_input_is_not_changed():
    """CompVis' first version adds in place."""
    net, x, context = randomize(SpatialTransformer(32, 2, 16, context_dim=8)), noise(1, 32, 4, 4), noise(1, 3, 8)
    copies = x.clone(), context.clone()
    net(x, context)
    assert torch.equal(x, copies[0]) and torch.equal(context, copies[1])


# ------------------------------------------------------------------------------------------------ every flag does something


@pytest.mark.parametrize(
    "change",
    [dict(dim_out=24), dict(mult=2), dict(mult=1.5), dict(glu=True), dict(dropout=0.5)],
    ids=str,
)
def test_flags_of_feed_forward(change):
    before, after = (randomize(FeedForward(16, **kwargs)) for kwargs in ({}, change))
    x = noise(2, 5, 16)
    a, b = before(x), after(x)
    assert a.shape != b.shape or relative_error(b, a) > 1e-3
    if "dropout" in change:
        assert torch.equal(after.eval()(x), a)


@pytest.mark.parametrize(
    "change",
    [dict(n_heads=4, d_head=8), dict(dropout=0.5), dict(context_dim=8), dict(gated_ff=False), dict(disable_self_attn=True)],
    ids=str,
)
def test_flags_of_block(change):
    base = dict(n_heads=2, d_head=16, context_dim=None)
    before, after = (randomize(BasicTransformerBlock(32, **{**base, **kwargs})) for kwargs in ({}, change))
    x, context = noise(2, 5, 32), noise(2, 3, 32, seed=1)
    a, b = before(x, context), after(x, context[..., : change.get("context_dim", 32)])
    assert relative_error(b, a) > 1e-3
    if "dropout" in change:
        assert torch.equal(after.eval()(x, context), a)


@pytest.mark.parametrize(
    "change",
    [dict(n_heads=3), dict(d_head=8), dict(depth=2), dict(dropout=0.5), dict(context_dim=8), dict(disable_self_attn=True)],
    ids=str,
)
def test_flags_of_spatial_transformer(change):
    base = dict(n_heads=2, d_head=16, context_dim=16)
    before, after = (randomize(SpatialTransformer(32, **{**base, **kwargs})) for kwargs in ({}, change))
    x, context = noise(2, 32, 3, 5), noise(2, 3, 16, seed=1)
    assert relative_error(after(x, context[..., : change.get("context_dim", 16)]), before(x, context)) > 1e-3


def test_normalize_of_spatial_transformer():
    """A factory of the caller's makes the norm of the map, and is asked for its channels; those of the tokens stay."""
    asked, x, context = [], noise(2, 20, 3, 5), noise(2, 3, 8, seed=1)

    def groups_of_five(channels):
        asked.append(channels)
        return nn.GroupNorm(channels // 5, channels)

    net = randomize(SpatialTransformer(20, 2, 16, context_dim=8, normalize=groups_of_five))
    other = randomize(SpatialTransformer(20, 2, 16, context_dim=8, normalize=lambda channels: nn.GroupNorm(1, channels)))
    assert asked == [20] and net.norm.num_groups == 4
    assert all(isinstance(norm, nn.LayerNorm) for name, norm in net.transformer_blocks.named_modules() if "norm" in name)
    assert net(x, context).shape == x.shape and relative_error(other(x, context), net(x, context)) > 1e-3


@pytest.mark.bad_input
def test_normalize_is_keyword_only_and_names_the_channels():
    with pytest.raises(TypeError, match="positional"):
        SpatialTransformer(32, 2, 16, 1, 0.0, None, False, False, True, 2, nn.Identity)
    with pytest.raises(ValueError, match="in_channels=20"):
        SpatialTransformer(20, 2, 16)


# ------------------------------------------------------------------------------------------------ gradient checkpointing


def counting(block):
    """Counts how often the feed-forward layer runs."""
    calls = []
    block.ff.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("checkpoint", "runs"), [(True, 2), (False, 1)])
def test_checkpoint_computes_again(checkpoint, runs):
    block = BasicTransformerBlock(32, 2, 16, checkpoint=checkpoint)
    calls = counting(block)
    block(noise(1, 5, 32).requires_grad_()).sum().backward()
    assert len(calls) == runs


@pytest.mark.parametrize(("checkpoint", "runs"), [(True, 2), (False, 1)])
def test_checkpoint_of_spatial_transformer(checkpoint, runs):
    net = randomize(SpatialTransformer(32, 2, 16, depth=2, use_checkpoint=checkpoint))
    calls = [counting(block) for block in net.transformer_blocks]
    net(noise(1, 32, 3, 5)).sum().backward()
    assert [len(c) for c in calls] == [runs, runs]


def test_checkpoint_only_in_training():
    block = BasicTransformerBlock(32, 2, 16).eval()
    calls = counting(block)
    block(noise(1, 5, 32).requires_grad_()).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        block.train()(noise(1, 5, 32))
    assert len(calls) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoint_changes_no_gradient(dropout):
    results = []
    for checkpoint in (False, True):
        net = randomize(SpatialTransformer(32, 2, 16, depth=2, context_dim=8, dropout=dropout, use_checkpoint=checkpoint))
        x, context = noise(2, 32, 3, 5).requires_grad_(), noise(2, 4, 8, seed=1).requires_grad_()
        torch.manual_seed(0)
        net(x, context).square().sum().backward()
        results.append([x.grad, context.grad, *(p.grad for p in net.parameters())])
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*results))


def test_checkpoint_without_gradient_at_the_input():
    """The reentrant variant loses the weights' gradients here."""
    block = BasicTransformerBlock(32, 2, 16)
    block(noise(1, 5, 32)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


# ------------------------------------------------------------------------------------------------ attention maps


def test_attention_maps_are_those_used():
    net = randomize(SpatialTransformer(32, 2, 16, depth=2, context_dim=8)).eval()
    x, context = noise(2, 32, 3, 5), noise(2, 4, 8, seed=1)
    with attention_maps(net, "") as maps, torch.no_grad():
        net(x, context)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        f"transformer_blocks.{i}.attn{j}": (2, 2, 15, 15 if j == 1 else 4) for i in (0, 1) for j in (1, 2)
    }
    inputs = []
    attention = net.transformer_blocks[1].attn2
    handle = attention.register_forward_hook(lambda m, a, o: inputs.append((a[1], o)))
    net(x, context)
    handle.remove()
    values, out = attention.to_v(inputs[0][0]).unflatten(-1, (2, 16)).transpose(1, 2), inputs[0][1]
    again = attention.to_out((maps["transformer_blocks.1.attn2"] @ values).transpose(1, 2).flatten(2))
    assert relative_error(again, out) < 1e-5


def test_attention_maps_know_masks():
    block = BasicTransformerBlock(32, 2, 16, context_dim=8)
    mask = torch.tensor([[True, True, False]])
    with attention_maps(block) as maps:
        block.attn2(noise(1, 5, 32), context=noise(1, 3, 8), mask=mask)
    (weights,) = maps.values()
    assert (weights[..., 2] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5))


def test_attention_maps_leave_no_hook():
    block = BasicTransformerBlock(32, 2, 16)
    with pytest.raises(RuntimeError), attention_maps(block):
        raise RuntimeError
    assert not block.attn2._forward_pre_hooks
    with pytest.raises(ValueError, match="part="), attention_maps(block, "attn3"):
        pass


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GEGLU(0, 4), "dim_in=0"),
        (lambda: GEGLU(4, -1), "dim_out=-1"),
        (lambda: FeedForward(0), "dim=0"),
        (lambda: FeedForward(8, 0), "dim_out=0"),
        (lambda: FeedForward(8, mult=0), "mult=0"),
        (lambda: FeedForward(8, dropout=1.5), "dropout=1.5"),
        (lambda: FeedForward(8, dropout=float("nan")), "dropout=nan"),
        (lambda: BasicTransformerBlock(32, 0, 16), "n_heads=0"),
        (lambda: BasicTransformerBlock(32, 2, 0), "d_head=0"),
        (lambda: BasicTransformerBlock(32, 2, 16, context_dim=0), "context_dim=0"),
        (lambda: BasicTransformerBlock(32, 2, 16, dropout=-0.1), "dropout=-0.1"),
        (lambda: SpatialTransformer(33, 2, 16), "in_channels=33"),
        (lambda: SpatialTransformer(0, 2, 16), "in_channels=0"),
        (lambda: SpatialTransformer(32, 2, 16, depth=0), "depth=0"),
        (lambda: SpatialTransformer(32, 2, 16, dims=0), "dims=0"),
        (lambda: SpatialTransformer(32, 2, 16, depth=3, context_dim=[8, 8]), "context_dim has 2 entries for depth=3"),
        (lambda: SpatialTransformer(32, 2, 16, context_dim=[0]), "context_dim=0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GEGLU(2.5, 4), "dim_in=2.5"),
        (lambda: FeedForward(8, mult=float("inf")), "mult=inf"),
        (lambda: FeedForward(8, dropout="x"), "dropout='x'"),
        (lambda: BasicTransformerBlock(32, "8", 16), "n_heads='8'"),
        (lambda: SpatialTransformer(32, 2, 16, depth=True), "depth=True"),
    ],
)
def test_wrong_types(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        ((2, 64, 4, 4), (2, 3, 8), "x must be"),
        ((2, 32, 16), (2, 3, 8), "dims=2"),
        ((2, 32, 4, 4), (2, 3, 9), "context must be"),
        ((2, 32, 4, 4), (3, 3, 8), "context must be"),
        ((2, 32, 4, 4), (2, 8), "context must be"),
        ((2, 32, 4, 4), None, "context must be"),
    ],
)
def test_wrong_input(x, context, message):
    net = SpatialTransformer(32, 2, 16, context_dim=8)
    with pytest.raises(ValueError, match=message):
        net(noise(*x), None if context is None else noise(*context))


def test_wrong_number_of_contexts():
    net = SpatialTransformer(32, 2, 16, depth=3, context_dim=8)
    with pytest.raises(ValueError, match="context has 2 entries for depth=3"):
        net(noise(1, 32, 4, 4), [noise(1, 3, 8)] * 2)


# ------------------------------------------------------------------------------------------------ any arguments

VALID = {
    GEGLU: dict(dim_in=st.integers(1, 40), dim_out=st.integers(1, 40)),
    FeedForward: dict(
        dim=st.integers(1, 40), dim_out=st.none() | st.integers(1, 40), mult=st.integers(1, 4) | st.floats(1, 3), glu=st.booleans(), dropout=st.floats(0, 1)
    ),
    BasicTransformerBlock: dict(
        dim=st.integers(1, 40),
        n_heads=st.integers(1, 3),
        d_head=st.integers(1, 6),
        dropout=st.floats(0, 1),
        context_dim=st.none() | st.integers(1, 20),
        gated_ff=st.booleans(),
        checkpoint=st.booleans(),
        disable_self_attn=st.booleans(),
    ),
    SpatialTransformer: dict(
        in_channels=st.sampled_from([32, 64]),
        n_heads=st.integers(1, 3),
        d_head=st.integers(1, 6),
        depth=st.integers(1, 2),
        dropout=st.floats(0, 1),
        context_dim=st.none() | st.integers(1, 20) | st.lists(st.integers(1, 9), min_size=1, max_size=2),
        disable_self_attn=st.booleans(),
        use_linear=st.booleans(),
        use_checkpoint=st.booleans(),
        dims=st.integers(1, 3),
        normalize=st.sampled_from([Normalize, lambda channels: nn.GroupNorm(8, channels)]),
    ),
}  # fmt: skip
SPOILED = dict(
    dim_in=0, dim_out=-1, dim=0, mult=0, n_heads=0, d_head=-2, dropout=1.5, in_channels=40, depth=0, context_dim=0, dims=0
)  # fmt: skip


@st.composite
def arguments(draw, cls):
    """Valid arguments, of which in one draw out of seven one is spoiled."""
    kwargs = draw(st.fixed_dictionaries(VALID[cls]))
    if draw(st.sampled_from([False] * 6 + [True])):
        name = draw(st.sampled_from([n for n in kwargs if n in SPOILED]))
        kwargs[name] = SPOILED[name]
    return kwargs


def build_and_run(cls, kwargs):
    """Forward and backward; the expected and the real shape."""
    module = cls(**kwargs)
    if cls in (GEGLU, FeedForward):
        width = kwargs["dim_in" if cls is GEGLU else "dim"]
        x, inputs = noise(2, 3, width).requires_grad_(), ()
        expected = (2, 3, kwargs["dim_out"] or width)
    else:
        depth, context_dim = kwargs.get("depth", 1), kwargs["context_dim"]
        if cls is BasicTransformerBlock:
            x = noise(2, 3, kwargs["dim"]).requires_grad_()
        else:
            x = noise(2, kwargs["in_channels"], *range(2, 2 + kwargs["dims"])).requires_grad_()
        if isinstance(context_dim, list):
            inputs = ([noise(2, 5, c) for c in (context_dim if len(context_dim) == depth else context_dim * depth)],)
        else:
            inputs = () if context_dim is None else (noise(2, 5, context_dim),)
        expected = x.shape
    out = module(x, *inputs)
    out.square().sum().backward()
    assert x.grad is not None and out.isfinite().all()
    return tuple(out.shape), tuple(expected)


def check_arguments(cls, examples):
    """Each draw works, or a ValueError or TypeError names an argument; at least 60 % work."""
    outcomes = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(cls))
    def run(kwargs):
        try:
            real, expected = build_and_run(cls, kwargs)
        except (ValueError, TypeError) as error:
            outcomes.append(False)
            assert any(name in str(error) for name in kwargs), error
        else:
            outcomes.append(True)
            assert real == expected

    run()
    assert sum(outcomes) / len(outcomes) >= 0.6, f"{sum(outcomes)} of {len(outcomes)} draws were valid"


@pytest.mark.parametrize("cls", VALID, ids=lambda c: c.__name__)
def test_any_arguments(cls):
    check_arguments(cls, 40)


@pytest.mark.slow
@pytest.mark.parametrize("cls", VALID, ids=lambda c: c.__name__)
def test_many_arguments(cls):
    check_arguments(cls, 1000)


@pytest.mark.slow
def test_every_combination_against_diffusers():
    for linear, depth, heads, words, size in itertools.product((False, True), (1, 2), (1, 4), (1, 9), ((3, 3), (1, 6), (7, 2))):
        ours = SpatialTransformer(32, heads, 8, depth=depth, context_dim=12, use_linear=linear)
        reference = Transformer2DModel(heads, 8, in_channels=32, num_layers=depth, cross_attention_dim=12, use_linear_projection=linear)
        inputs = noise(2, 32, *size), noise(2, words, 12, seed=1)
        assert compare(ours, reference, inputs, call=lambda x, c, r=reference: r(x, encoder_hidden_states=c, return_dict=False)[0])
        assert count_parameters(ours) == count_parameters(reference)
