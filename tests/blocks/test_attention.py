"""Attention: backends, layouts and blocks against the libraries that others use."""

import importlib
import subprocess
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from unet_course.attention import (
    ATTENTION,
    BACKENDS,
    QKV_ORDERS,
    AttentionBlock,
    AttnBlock,
    CrossAttention,
    LinearAttention,
    LinearAttentionBlock,
    attention,
    attention_weights,
    causal_mask,
    flash_problem,
    linear_attention,
    make_attention,
    register_attention,
    split_qkv,
)
from unet_course.workbench import compare, randomize, relative_error


module = importlib.import_module("unet_course.attention")  # the package has a function of that name, too


def qkv(batch=2, heads=3, queries=7, keys=7, dim=8, width=None, dtype=torch.float32):
    """Random queries, keys and values."""
    return (
        torch.randn(batch, heads, queries, dim, dtype=dtype),
        torch.randn(batch, heads, keys, dim, dtype=dtype),
        torch.randn(batch, heads, keys, width or dim, dtype=dtype),
    )


# --- the function and its backends


def test_vanilla_is_the_loop():
    """Against the definition, one query of one head at a time."""
    q, k, v = qkv(queries=5, keys=6, width=4)
    got = attention(q, k, v, backend="vanilla")
    for b in range(2):
        for h in range(3):
            for i in range(5):
                scores = torch.stack([q[b, h, i] @ k[b, h, j] / 8**0.5 for j in range(6)])
                weights = scores.exp() / scores.exp().sum()
                assert torch.allclose(got[b, h, i], sum(w * x for w, x in zip(weights, v[b, h])), atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}, {"mask": 1}, {"mask": 1, "causal": True}])
def test_backends_agree(backend, options):
    """Exact backends: outputs and gradients."""
    inputs = qkv(queries=9, keys=9, width=5)
    if "mask" in options:
        options = options | {"mask": torch.rand(2, 1, 9, 9) > 0.4}
        options["mask"][0, 0, 3] = False  # a query that may look at nothing
    a, b = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    out_a, out_b = attention(*a, backend=backend, **options), attention(*b, backend="vanilla", **options)
    assert relative_error(out_a, out_b) < 1e-5
    weights = torch.randn_like(out_a)
    (out_a * weights).sum().backward()
    (out_b * weights).sum().backward()
    assert all(relative_error(x.grad, y.grad) < 1e-4 for x, y in zip(a, b))


def test_query_that_may_look_at_nothing_gets_zeros():
    """And no NaN in its gradients."""
    for backend in ("vanilla", "sdpa"):
        q, k, v = (x.requires_grad_() for x in qkv())
        out = attention(q, k, v, backend=backend, mask=torch.zeros(1, 1, 1, 7, dtype=torch.bool))
        assert not out.any()
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_flags_change_something():
    """causal, mask, scale and the linear backend are no dead arguments."""
    q, k, v = qkv()
    plain = attention(q, k, v)
    for options in ({"causal": True}, {"mask": causal_mask(7)[None, None].flip(-1)}, {"scale": 1.0}, {"backend": "linear"}):
        assert relative_error(attention(q, k, v, **options), plain) > 1e-2


def test_causal_hides_the_future():
    """An output depends on its own and on earlier tokens, in every backend that knows causal."""
    for backend in ("vanilla", "sdpa", "auto"):
        q, k, v = qkv()
        v.requires_grad_()
        attention(q, k, v, backend=backend, causal=True)[:, :, 3].sum().backward()
        assert v.grad[:, :, :4].abs().sum(-1).gt(0).all() and not v.grad[:, :, 4:].any()


def test_weights_are_averages():
    """Rows sum to 1; equal values come back; shuffled tokens give shuffled answers."""
    q, k, v = qkv()
    assert torch.allclose(attention_weights(q, k).sum(-1), torch.ones(2, 3, 7))
    order = torch.randperm(7)
    for backend in ("vanilla", "sdpa", "linear"):
        assert torch.allclose(attention(q, k, torch.ones_like(v), backend=backend), torch.ones_like(v), atol=1e-5)
        assert torch.allclose(attention(q[:, :, order], k, v, backend=backend), attention(q, k, v, backend=backend)[:, :, order], atol=1e-5)
        assert torch.allclose(attention(q, k[:, :, order], v[:, :, order], backend=backend), attention(q, k, v, backend=backend), atol=1e-5)


def test_linear_never_holds_the_scores():
    """It equals the product of both softmaxes, and what it keeps grows with the tokens, not their square."""
    q, k, v = qkv(queries=11, keys=13, width=6)
    weights = q.softmax(-1) @ k.softmax(-2).mT
    assert relative_error(linear_attention(q, k, v), weights @ v) < 1e-5
    assert relative_error(linear_attention(q, k, v, softmax_queries=False), q @ k.softmax(-2).mT @ v) < 1e-5

    def largest(tokens):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            linear_attention(*(x.requires_grad_() for x in qkv(1, 1, tokens, tokens)))
        return max(sizes)

    assert largest(400) == 2 * largest(200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """16-bit and double precision come back as they went in, near the float32 result."""
    q, k, v = qkv(dtype=dtype)
    for backend in ("vanilla", "sdpa", "linear"):
        out = attention(q, k, v, backend=backend)
        assert out.dtype == dtype
        assert relative_error(out, attention(q.float(), k.float(), v.float(), backend=backend)) < 3e-2


def test_large_scores_do_not_overflow():
    """Scores in the thousands are fine in float32."""
    q, k, v = qkv()
    for backend in ("vanilla", "sdpa"):
        assert attention(100 * q, 100 * k, v, backend=backend).isfinite().all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backend": "flsh"}, "vanilla, sdpa, linear, flash"),
        ({"q": torch.randn(2, 7, 8)}, "batch, heads, tokens, dim"),
        ({"k": torch.randn(2, 2, 7, 8)}, "share"),
        ({"k": torch.randn(2, 3, 6, 8)}, "share"),
        ({"v": torch.randn(2, 3, 6, 8)}, "share"),
        ({"q": torch.randn(2, 3, 7, 4)}, "share"),
        ({"q": torch.randn(2, 3, 5, 8), "causal": True}, "as many queries as keys"),
        ({"mask": torch.zeros(2, 3, 7, 7)}, "boolean"),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, "got .7, 7."),
        ({"mask": torch.ones(2, 1, 7, 6, dtype=torch.bool)}, "mask must be .batch, heads, queries, keys. = .2, 3, 7, 7."),
        ({"backend": "linear", "causal": True}, "linear"),
        ({"backend": "linear", "scale": 1.0}, "linear"),
        ({"backend": "linear", "mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, "linear"),
        ({"backend": "flash"}, "CUDA"),
    ],
)
def test_bad_arguments(change, said):
    """Each is refused at the door, in words."""
    arguments = dict(zip("qkv", qkv())) | change
    with pytest.raises(ValueError, match=said):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


# --- flash-attn, against a stand-in with its layout


@pytest.fixture
def stand_in(monkeypatch):
    """A module `flash_attn` whose function has the package's layout and argument names; yields its calls."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append({"dropout_p": dropout_p, "shape": tuple(q.shape)})
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale  # (batch, tokens, heads, dim)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    module.flash_attn_func.cache_clear()
    yield calls
    module.flash_attn_func.cache_clear()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.2}])
def test_flash_layout(stand_in, monkeypatch, options):
    """Equal to vanilla, which a wrong layout would not be; no dropout is asked for."""
    monkeypatch.setattr(module, "flash_problem", lambda *_: "")
    q, k, v = qkv(queries=5, keys=5)
    assert relative_error(attention(q, k, v, backend="flash", **options), attention(q, k, v, backend="vanilla", **options)) < 1e-5
    assert stand_in == [{"dropout_p": 0.0, "shape": (2, 5, 3, 8)}]


def test_flash_in_a_block(stand_in, monkeypatch):
    """The blocks hand the backend on, and auto takes flash where it is usable."""
    monkeypatch.setattr(module, "flash_problem", lambda *_: "")
    x = torch.randn(2, 32, 3, 5)
    for make in (lambda b: AttentionBlock(32, 4, backend=b), lambda b: AttnBlock(32, backend=b)):
        outputs = [randomize(make(b))(x) for b in ("flash", "auto", "vanilla")]
        assert relative_error(outputs[0], outputs[2]) < 1e-5 and relative_error(outputs[1], outputs[2]) < 1e-5
    assert len(stand_in) == 4


def test_flash_is_not_hidden_from_those_who_count(stand_in, monkeypatch):
    """While operations are counted, auto takes PyTorch's kernel, of which it is known what it multiplies."""
    monkeypatch.setattr(module, "flash_problem", lambda *_: "")
    with FlopCounterMode(display=False):
        attention(*qkv())
    assert stand_in == []
    attention(*qkv())
    assert len(stand_in) == 1


@pytest.mark.bad_input
def test_flash_problems(stand_in, monkeypatch):
    """Each thing that speaks against it is named; nothing does on the right GPU."""

    def fake(kind="cuda", dtype=torch.bfloat16, dim=64):
        return SimpleNamespace(device=SimpleNamespace(type=kind), dtype=dtype, shape=(2, 4, 10, dim))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert flash_problem(fake(), fake()) == ""
    assert "CUDA" in flash_problem(fake("cpu"), fake("cpu"))
    assert "float16" in flash_problem(fake(dtype=torch.float32), fake())
    assert "256" in flash_problem(fake(dim=512), fake(dim=512)) and "256" in flash_problem(fake(), fake(dim=32))
    assert "mask" in flash_problem(fake(), fake(), mask=torch.ones(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "Ampere" in flash_problem(fake(), fake())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    module.flash_attn_func.cache_clear()
    assert "not installed" in flash_problem(fake(), fake())


def test_auto_without_flash_never_raises():
    """On any device and dtype auto falls back to PyTorch."""
    for dtype in (torch.float16, torch.float32):
        assert attention(*qkv(dtype=dtype)).dtype == dtype


def test_flash_attn_is_imported_lazily():
    """Importing the module does not look for the package."""
    code = "import sys, unet_course.attention; assert 'flash_attn' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_on_a_gpu():
    """The real package, where there is one."""
    q, k, v = (x.cuda().half() for x in qkv(queries=33, keys=33, dim=32))
    if problem := flash_problem(q, v):
        pytest.skip(problem)
    assert relative_error(attention(q, k, v, backend="flash"), attention(q.float(), k.float(), v.float(), backend="vanilla")) < 5e-3


# --- the three channel orders


def by_index(x, heads, order):
    """Queries, keys and values by plain index arithmetic."""
    dim = x.shape[1] // (3 * heads)
    place = {
        "legacy": lambda head, part, d: (head * 3 + part) * dim + d,
        "new": lambda head, part, d: (part * heads + head) * dim + d,
        "edm": lambda head, part, d: (head * dim + d) * 3 + part,
    }[order]
    return [torch.stack([torch.stack([x[:, place(h, part, d)] for d in range(dim)], -1) for h in range(heads)], 1) for part in range(3)]


@pytest.mark.parametrize("order", QKV_ORDERS)
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_split_qkv(order, heads):
    """All three orders, against index arithmetic."""
    x = torch.randn(2, 3 * heads * 4, 5)
    for a, b in zip(split_qkv(x, heads, order), by_index(x, heads, order)):
        assert torch.equal(a, b)


def test_split_qkv_as_published():
    """The very expressions of guided-diffusion (both) and EDM."""
    b, heads, dim, t = 2, 2, 5, 7
    x = torch.randn(b, 3 * heads * dim, t)
    legacy = x.reshape(b * heads, 3 * dim, t).split(dim, dim=1)
    new = [part.reshape(b * heads, dim, t) for part in x.chunk(3, dim=1)]
    edm = x.reshape(b * heads, dim, 3, t).unbind(2)
    for order, parts in (("legacy", legacy), ("new", new), ("edm", edm)):
        for ours, theirs in zip(split_qkv(x, heads, order), parts):
            assert torch.equal(ours, theirs.reshape(b, heads, dim, t).mT)


def test_orders_differ():
    """A wrong order on the same weights is another function."""
    x = torch.randn(2, 64, 4, 3)
    a, b = (randomize(AttentionBlock(64, 4, use_new_attention_order=new)) for new in (False, True))
    assert relative_error(a(x), b(x)) > 1e-2


@pytest.mark.parametrize(("heads", "order", "said"), [(2, "old", "legacy, new, edm"), (5, "new", "num_heads=5"), (0, "new", "num_heads=0")])
def test_split_qkv_bad(heads, order, said):
    """Unknown orders and unfit heads are refused."""
    with pytest.raises(ValueError, match=said):
        split_qkv(torch.randn(1, 24, 3), heads, order)


# --- parity of the blocks


class DiffusersTwin(nn.Module):
    """diffusers' attention, fed from parameters that are named and laid out like ours."""

    def __init__(self, channels, heads, order):
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.order, self.heads = order, heads
        self.inner = [Attention(channels, heads=heads, dim_head=channels // heads, bias=True, norm_num_groups=32, eps=1e-5, residual_connection=True, _from_deprecated_attn_block=True)]

    def forward(self, x):
        split = {f"to_{n}.{p}": v for p in ("weight", "bias") for n, v in zip("qkv", by_index(getattr(self.qkv, p).reshape(1, len(self.qkv.bias), -1), self.heads, self.order))}
        split = {n: rearrange(v, "1 h t d -> (h d) t" if n.endswith("weight") else "1 h 1 d -> (h d)") for n, v in split.items()}
        outer = {"group_norm.weight": self.norm.weight, "group_norm.bias": self.norm.bias, "to_out.0.weight": self.proj_out.weight[..., 0], "to_out.0.bias": self.proj_out.bias}
        tokens = x.flatten(2).mT  # also for one and three axes
        return functional_call(self.inner[0], split | outer, (tokens,)).mT.reshape(x.shape)


@pytest.mark.parametrize(
    ("space", "heads", "new"),
    [((9,), 4, False), ((6, 5), 1, False), ((6, 5), 4, False), ((4, 4), 8, True), ((7, 3), 4, True), ((2, 3, 5), 4, False), ((2, 3, 5), 8, True)],
)
def test_attention_block_parity(space, heads, new):
    """AttentionBlock against diffusers', both orders, in one to three dimensions."""
    pytest.importorskip("diffusers")
    ours = AttentionBlock(64, num_heads=heads, use_new_attention_order=new)
    assert compare(ours, DiffusersTwin(64, heads, "new" if new else "legacy"), (torch.randn(2, 64, *space),))


def test_attention_block_parity_in_edm_order():
    """The third order through the same code."""
    pytest.importorskip("diffusers")
    ours = AttentionBlock(64, num_heads=4)
    ours.order = "edm"
    assert compare(ours, DiffusersTwin(64, 4, "edm"), (torch.randn(2, 64, 3, 5),))


def test_attention_block_diffusers_processor():
    """Also against diffusers' two-dimensional path, with its explicit processor."""
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    twin = DiffusersTwin(64, 2, "legacy")
    twin.inner[0].set_processor(diffusers.AttnProcessor())
    assert compare(AttentionBlock(64, num_head_channels=32), twin, (torch.randn(3, 64, 5, 8),))


ATTN_NAMES = {
    f"{ours}.{p}": f"{theirs}.{p}"
    for ours, theirs in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
    for p in ("weight", "bias")
}


def vae_attention():
    """The attention block of diffusers' autoencoder."""
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    return diffusers.Attention(64, heads=1, dim_head=64, bias=True, norm_num_groups=32, eps=1e-6, residual_connection=True, _from_deprecated_attn_block=True)


@pytest.mark.parametrize("size", [(6, 5), (4, 4), (1, 7)])
def test_attn_block_parity(size):
    """AttnBlock against diffusers'; without the keys' bias, whose gradient is zero but for rounding."""
    ours, theirs = AttnBlock(64), vae_attention()
    ours.k.bias = theirs.to_k.bias = None
    assert compare(ours, theirs, (torch.randn(2, 64, *size),), {n: m for n, m in ATTN_NAMES.items() if n != "k.bias"})


def test_attn_block_with_every_bias():
    """With the keys' bias the output agrees as well, and both gradients of that bias vanish."""
    ours, theirs, x = AttnBlock(64), vae_attention(), torch.randn(2, 64, 5, 3)
    assert compare(ours, theirs, (x,), ATTN_NAMES).forward < 1e-5
    for q, k in ((ours.q, ours.k), (theirs.to_q, theirs.to_k)):
        assert k.bias.grad.norm() < 1e-5 * q.bias.grad.norm()


@pytest.mark.parametrize("space", [(9,), (2, 3, 5), (2, 3, 2, 2)])
def test_attn_block_in_other_dimensions(space):
    """The same weights on the flattened map give the same numbers."""
    block, flat = (randomize(AttnBlock(32, dims=dims)) for dims in (len(space), 1))
    with torch.no_grad():
        for a, b in zip(block.parameters(), flat.parameters()):
            b.copy_(a.reshape(b.shape))
    x = torch.randn(2, 32, *space)
    assert relative_error(block(x).flatten(2), flat(x.flatten(2))) < 1e-5


@pytest.mark.parametrize(("context_dim", "keys"), [(None, None), (48, 7), (48, 1)])
@pytest.mark.parametrize(("heads", "dim_head"), [(8, 64), (3, 5)])
def test_cross_attention_parity(context_dim, keys, heads, dim_head):
    """CrossAttention against diffusers', with and without a context."""
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    theirs = diffusers.Attention(32, cross_attention_dim=context_dim, heads=heads, dim_head=dim_head)
    inputs = (torch.randn(2, 11, 32),) + ((torch.randn(2, keys, context_dim),) if keys else ())
    assert compare(CrossAttention(32, context_dim, heads, dim_head), theirs, inputs)


def test_cross_attention_mask_parity():
    """True keeps a token, as in diffusers' boolean masks."""
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    mask = torch.rand(2, 9) > 0.4
    mask[:, 0] = True
    bias = torch.zeros(2, 9).masked_fill(~mask, -1e9)[:, None]
    theirs = diffusers.Attention(32, cross_attention_dim=16, heads=2, dim_head=8)
    ours = CrossAttention(32, 16, 2, 8)
    masked = nn.Module.__new__(type("Masked", (CrossAttention,), {"forward": lambda self, x, c: CrossAttention.forward(self, x, c, mask)}))
    masked.__dict__ = ours.__dict__
    assert compare(masked, theirs, (torch.randn(2, 5, 32), torch.randn(2, 9, 16)), call=lambda x, c: theirs(x, c, attention_mask=bias))


def test_multihead_attention_parity():
    """torch's own layer has the new order."""

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.GroupNorm(32, 64), nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            t = self.norm(x).flatten(2).mT
            return x + self.inner(t, t, t)[0].mT.reshape(x.shape)

    names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias", "qkv.weight": "inner.in_proj_weight", "qkv.bias": "inner.in_proj_bias"}
    names |= {"proj_out.weight": "inner.out_proj.weight", "proj_out.bias": "inner.out_proj.bias"}
    assert compare(AttentionBlock(64, 4, use_new_attention_order=True), Twin(), (torch.randn(2, 64, 5, 3),), names)


@pytest.mark.parametrize(("heads", "dim_head"), [(4, 32), (1, 24)])
def test_linear_attention_is_that_of_compvis(heads, dim_head):
    """Against the einsums of latent-diffusion: softmax over the keys' tokens, none over the queries."""

    class CompVis(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv = nn.Conv2d(20, 3 * heads * dim_head, 1, bias=False)
            self.to_out = nn.Conv2d(heads * dim_head, 20, 1)

        def forward(self, x):
            h, w = x.shape[2:]
            q, k, v = rearrange(self.to_qkv(x), "b (qkv heads c) h w -> qkv b heads c (h w)", heads=heads, qkv=3)
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
            out = torch.einsum("bhde,bhdn->bhen", context, q)
            return self.to_out(rearrange(out, "b heads c (h w) -> b (heads c) h w", h=h, w=w))

    assert compare(LinearAttention(20, heads, dim_head), CompVis(), (torch.randn(2, 20, 6, 5),))


def test_linear_attention_block_adds_norm_and_residual():
    """It is x + LinearAttention(norm(x))."""
    block, inner = randomize(LinearAttentionBlock(32)), LinearAttention(32, heads=1, dim_head=32)
    inner.load_state_dict({n: p for n, p in block.state_dict().items() if not n.startswith("norm")})
    x = torch.randn(2, 32, 5, 3)
    assert relative_error(block(x), x + inner(block.norm(x))) < 1e-6


# --- names, flags and behaviour


def test_checkpoint_names():
    """The official ones."""
    assert list(dict(AttentionBlock(32).named_parameters())) == [f"{n}.{p}" for n in ("norm", "qkv", "proj_out") for p in ("weight", "bias")]
    assert AttentionBlock(32).qkv.weight.shape == (96, 32, 1)
    assert list(dict(AttnBlock(32).named_parameters())) == [f"{n}.{p}" for n in ("norm", "q", "k", "v", "proj_out") for p in ("weight", "bias")]
    assert AttnBlock(32).q.weight.shape == (32, 32, 1, 1)
    assert list(CrossAttention(32).state_dict()) == ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"]
    assert set(LinearAttention(32).state_dict()) == {"to_qkv.weight", "to_out.weight", "to_out.bias"}
    assert set(LinearAttentionBlock(32).state_dict()) == {"norm.weight", "norm.bias", "to_qkv.weight", "to_out.weight", "to_out.bias"}


def test_eps():
    """1e-5 in OpenAI's block, 1e-6 in DDPM's."""
    assert AttentionBlock(32).norm.eps == 1e-5 and AttnBlock(32).norm.eps == 1e-6 and LinearAttentionBlock(32).norm.eps == 1e-6


def test_zero_initialised_block_is_the_identity():
    """AttentionBlock starts by changing nothing, and its output projection still gets a gradient."""
    block, x = AttentionBlock(32, 2), torch.randn(2, 32, 4, 3)
    out = block(x)
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    assert block.proj_out.weight.grad.abs().sum() > 0


def test_use_checkpoint_recomputes():
    """The same numbers and gradients, with a second run of the inside in the backward pass."""
    x, runs = torch.randn(2, 32, 4, 3), []
    grads = []
    for flag in (False, True):
        block, count = randomize(AttentionBlock(32, 2, use_checkpoint=flag)), []
        block.norm.register_forward_hook(lambda *_, count=count: count.append(1))
        y = x.clone().requires_grad_()
        (block(y) ** 2).sum().backward()
        grads.append([y.grad] + [p.grad for p in block.parameters()])
        runs.append(len(count))
        with torch.no_grad():
            block(x)
    assert runs == [1, 2]
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*grads))


def test_num_head_channels():
    """It decides, whatever num_heads says."""
    assert AttentionBlock(64, num_heads=-1, num_head_channels=16).num_heads == 4
    x = torch.randn(1, 64, 3, 4)
    assert relative_error(randomize(AttentionBlock(64, num_heads=1))(x), randomize(AttentionBlock(64, num_head_channels=16))(x)) > 1e-3


@pytest.mark.parametrize("make", [lambda **k: AttentionBlock(32, **k), lambda **k: AttnBlock(32, **k), lambda **k: LinearAttentionBlock(32, **k)])
def test_normalize_is_used(make):
    """A factory of the caller's replaces the norm."""
    assert isinstance(make(normalize=lambda channels: nn.Identity()).norm, nn.Identity)


@pytest.mark.parametrize("backend", ["vanilla", "sdpa", "auto", "linear"])
def test_backend_is_used(backend, monkeypatch):
    """Blocks hand it on."""
    seen = []
    monkeypatch.setattr(module, "attention", lambda *a, backend, **k: seen.append(backend) or attention(*a, backend=backend, **k))
    AttentionBlock(32, backend=backend)(torch.randn(1, 32, 4))
    AttnBlock(32, backend=backend)(torch.randn(1, 32, 4, 3))
    CrossAttention(32, backend=backend)(torch.randn(1, 4, 32))
    assert seen == [backend] * 3


def test_dropout_only_while_training():
    """Random in training, fixed after eval; zero probability changes nothing."""
    cross, x = CrossAttention(32, dropout=0.5), torch.randn(2, 6, 32)
    assert not torch.equal(cross(x), cross(x))
    assert torch.equal(cross.eval()(x), cross(x))
    plain = CrossAttention(32).train()
    assert torch.equal(plain(x), plain(x))


def test_cross_attention_mask():
    """Masked tokens have no influence; the others do."""
    cross, x, context = CrossAttention(32, 16, 2, 8), torch.randn(2, 5, 32), torch.randn(2, 7, 16, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[3], [6]])
    cross(x, context, mask).sum().backward()
    assert torch.equal(context.grad.abs().sum(-1) > 0, mask)


@pytest.mark.bad_input
def test_bad_inputs_of_blocks():
    """Maps and sequences of a wrong shape are refused at the door."""
    for block, x in [
        (AttentionBlock(32), torch.randn(2, 32)),
        (AttentionBlock(32), torch.randn(2, 16, 4, 4)),
        (AttnBlock(32), torch.randn(2, 32, 4)),
        (AttnBlock(32, dims=3), torch.randn(2, 32, 4, 4)),
        (LinearAttention(32), torch.randn(2, 31, 4, 4)),
        (LinearAttentionBlock(32), torch.randn(2, 32, 4, 4, 4)),
        (CrossAttention(32), torch.randn(2, 3, 16)),
        (CrossAttention(32), torch.randn(2, 32, 4, 4)),
    ]:
        with pytest.raises(ValueError, match=r"x must be \(batch"):
            block(x)
    cross, x = CrossAttention(32, 16), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="context must be"):
        cross(x)  # 32 channels are not the 16 of a context
    with pytest.raises(ValueError, match="context must be"):
        cross(x, torch.randn(3, 4, 16))
    with pytest.raises(ValueError, match="mask must be"):
        cross(x, torch.randn(2, 4, 16), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AttentionBlock(64, num_heads=6), "num_heads=6.*4 and 8"),
        (lambda: AttentionBlock(64, num_heads=65), "num_heads=65.*32 and 64|num_heads=65.*64"),
        (lambda: AttentionBlock(64, num_head_channels=48), "num_head_channels=48.*32 and 64"),
        (lambda: AttentionBlock(64, num_heads=-1), "num_heads=-1"),
        (lambda: AttentionBlock(33), "num_channels=33"),
        (lambda: AttentionBlock(64, backend="x"), "backend='x'"),
        (lambda: AttnBlock(64, dims=0), "dims=0"),
        (lambda: LinearAttentionBlock(64, heads=5), "heads=5.*4 and 8"),
        (lambda: LinearAttention(64, heads=0), "heads=0"),
        (lambda: CrossAttention(64, dim_head=0), "dim_head=0"),
        (lambda: CrossAttention(64, dropout=2.0), "dropout"),
    ],
)
def test_bad_constructor_arguments(make, said):
    """The argument, its value and the nearest valid ones are named."""
    with pytest.raises(ValueError, match=said):
        make()


# --- the registry


def test_make_attention():
    """Names give classes; unknown ones an error that lists what there is."""
    assert type(make_attention(32)) is AttnBlock and type(make_attention(32, "linear")) is LinearAttentionBlock
    x = torch.randn(2, 32, 4, 3)
    assert make_attention(32, "none", dims=2)(x) is x
    assert make_attention(32, "vanilla", dims=1)(torch.randn(2, 32, 5)).shape == (2, 32, 5)
    with pytest.raises(ValueError, match="'axial'.*vanilla, linear, none"):
        make_attention(32, "axial")


def test_register_attention(monkeypatch):
    """A new name is found; a taken one is refused; registering the same class again is fine."""
    monkeypatch.setattr(module, "ATTENTION", dict(ATTENTION))

    @register_attention("mine")
    class Mine(AttnBlock):
        pass

    assert type(make_attention(32, "mine")) is Mine and register_attention("mine")(Mine) is Mine
    with pytest.raises(ValueError, match="'vanilla' is taken by AttnBlock"):
        register_attention("vanilla")(Mine)
    short = partial(AttnBlock, backend="vanilla")  # no class, and without a name of its own
    register_attention("short")(short), register_attention("short")(partial(AttnBlock, backend="vanilla"))
    assert make_attention(32, "short").backend == "vanilla"
    for name, other in (("short", partial(AttnBlock, backend="sdpa")), ("short", Mine), ("mine", short)):
        with pytest.raises(ValueError, match=f"name='{name}' is taken by"):
            register_attention(name)(other)


# --- any arguments: a result, or an error that says which argument is wrong


def draws(**choices):
    """A strategy for keyword arguments."""
    return st.fixed_dictionaries({n: st.sampled_from(c) for n, c in choices.items()})


MAPS = {  # mostly valid: about one value in ten is not
    AttentionBlock: draws(
        channels=[32, 64, 96, 32, 64, 32, 32, 64, 96, 33],
        num_heads=[1, 2, 4, 8, 16, 1, 2, 4, 8, 3],
        num_head_channels=[-1, -1, 8, 16, 32, 4, 2, 1, 32, 7],
        use_checkpoint=[False, True],
        use_new_attention_order=[False, True],
        backend=["auto", "sdpa", "vanilla", "linear", "auto", "sdpa", "vanilla", "linear", "sdpa", "flash"],
    ),
    AttnBlock: draws(in_channels=[32, 64, 96, 32, 32, 64, 32, 20], dims=[1, 2, 3, 4, 1, 2, 3, 0], backend=["auto", "sdpa", "vanilla", "linear", "auto", "sdpa", "vanilla", "flesh"]),
    LinearAttention: draws(dim=[1, 8, 32, 33, 64, 7, 5, -1], heads=[1, 2, 4, 3, 5, 6, 8, 0], dim_head=[1, 8, 32, 5, 2, 3, 4, 2.5], dims=[1, 2, 3, 4]),
    LinearAttentionBlock: draws(in_channels=[32, 64, 96, 32, 32, 64, 32, 48], heads=[1, 2, 4, 8, 16, 1, 2, 3], dim_head=[None, 8, 5, 1], dims=[1, 2, 3, 4]),
    CrossAttention: draws(
        query_dim=[1, 8, 32, 33, 0, 16, 5, 7, 3, 9, 12, 14],
        context_dim=[None, 8, 17, 32, "8", 1, 2, 3, 4, 5, None, 7],
        heads=[1, 2, 3, 8, 4, -2, 5, 6, 7, 1, 2, 3],
        dim_head=[1, 8, 16, 64],
        dropout=[0.0, 0.1, 0.5, 0.9, -1.0, 1.0, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8],
        backend=["auto", "vanilla", "linear", "sdpa"],
    ),
}


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", MAPS, ids=lambda b: b.__name__)
def test_any_arguments(block, many):
    """Works forward and backward with the right shape, or names what is wrong."""
    outcomes = []

    @settings(max_examples=1000 if many else 30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(MAPS[block])
    def attempt(arguments):
        try:
            made = block(**arguments)
            if block is CrossAttention:
                inputs = torch.randn(2, 3, arguments["query_dim"]), torch.randn(2, 5, arguments["context_dim"] or arguments["query_dim"])
            else:
                channels = arguments[{AttentionBlock: "channels", LinearAttention: "dim"}.get(block, "in_channels")]
                inputs = (torch.randn(2, channels, *(3, 2, 4, 2)[: arguments.get("dims", 2)]),)
            inputs = [x.requires_grad_() for x in inputs]
            out = made(*inputs)
        except (ValueError, TypeError) as error:
            assert any(name in str(error) for name in [*arguments, "channels"]), f"{arguments}: {error}"
            outcomes.append(False)
            return
        assert out.shape == inputs[0].shape and out.isfinite().all()
        out.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
        outcomes.append(True)

    attempt()
    assert sum(outcomes) >= 0.6 * len(outcomes), f"{sum(outcomes)} of {len(outcomes)} draws were valid"


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_shapes(many):
    """Whatever the shapes, the exact backends agree and linear gives the same shape."""

    @settings(max_examples=1000 if many else 30, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*(st.integers(1, n) for n in (3, 4, 9, 9, 12, 12))), st.booleans())
    def attempt(sizes, causal):
        batch, heads, queries, keys, dim, width = sizes
        keys = queries if causal else keys
        q, k, v = qkv(batch, heads, queries, keys, dim, width)
        expected = attention(q, k, v, backend="vanilla", causal=causal)
        assert expected.shape == (batch, heads, queries, width)
        assert torch.allclose(attention(q, k, v, causal=causal), expected, atol=1e-5)
        if not causal:
            assert attention(q, k, v, backend="linear").shape == expected.shape

    attempt()


def test_backends_are_listed():
    """Every name in the list is known to the function."""
    for backend in BACKENDS:
        try:
            attention(*qkv(), backend=backend)
        except ValueError as error:
            assert backend == "flash" and "cannot be used here" in str(error)


def test_compiles(request):
    """Under torch.compile the block is one graph."""
    if request.config.getoption("--shape-check"):
        pytest.skip("the shape checker cannot be compiled")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    block, x = randomize(AttentionBlock(32, 2)), torch.randn(2, 32, 4, 3)
    torch._dynamo.reset()
    assert relative_error(torch.compile(block, backend=count, fullgraph=True)(x), block(x)) < 1e-6 and len(graphs) == 1


def test_reference_scaled_dot_product():
    """auto is PyTorch's function on a CPU, to the bit."""
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
