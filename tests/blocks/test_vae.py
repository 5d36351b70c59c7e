"""The VAE: equal to diffusers' with the same weights, official names, exact tiles, every argument does something, wrong ones are named."""

import copy
import inspect
import math
import re
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mappings import rename
from probing import assert_reaches_everything, mostly_valid
from torch import nn

from unet_course.attention import ATTENTION, register_attention
from unet_course.data import shape_scores, shapes
from unet_course.latent_diffusion import FoldedPixels
from unet_course.training import save_checkpoint
from unet_course.vae import (
    KL_WEIGHT,
    AutoencoderKL,
    Decoder,
    DiagonalGaussian,
    Encoder,
    _climb,
    decoder_reach,
    emoji_vae,
    pretrained_vae,
    psnr,
    scale_factor,
    ship_vae,
    tiled_decode,
    train_vae,
    vae_loss,
)
from unet_course.workbench import compare, count_parameters, randomize, relative_error

SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16)
ARGUMENTS = list(inspect.signature(AutoencoderKL).parameters)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**changes) -> AutoencoderKL:
    return AutoencoderKL(**{**SMALL, **changes})


def vae_rules(levels: int) -> list[tuple[str, str]]:
    """`AutoencoderKL` → diffusers', which counts the way up from the bottom."""
    return [
        (r"\bnorm_out", "conv_norm_out"),
        (r"\bmid\.block_1", "mid_block.resnets.0"),
        (r"\bmid\.block_2", "mid_block.resnets.1"),
        (r"\bmid\.attn_1", "mid_block.attentions.0"),
        (r"\bdown\.", "down_blocks."),
        *[(rf"\bup\.{i}\.", f"up_blocks.{levels - 1 - i}.") for i in range(levels)],
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.nin_shortcut", ".conv_shortcut"),
        (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out", r"\1.to_out.0"),
    ]


def reference(ch=32, ch_mult=(1, 2), num_res_blocks=1, attention=None, channels=3, z=4) -> nn.Module:
    """diffusers' network of the same configuration; `attention` says which levels have it."""
    diffusers = pytest.importorskip("diffusers")
    attention = attention or [False] * len(ch_mult)
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)),
        block_out_channels=tuple(ch * m for m in ch_mult),
        layers_per_block=num_res_blocks,
        latent_channels=z,
    )


class Both(nn.Module):
    """All that a VAE gives, in one tensor: moments, and the picture that comes of a latent drawn with fixed noise."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        for name, module in vae.named_modules():  # biases of keys have no gradient to compare
            if name.endswith((".k", ".to_k")):
                module.bias = None

    def forward(self, x):
        found = self.vae.encode(x)
        dist = getattr(found, "latent_dist", found)
        image = self.vae.decode(dist.mean + dist.std * torch.linspace(-1, 1, dist.mean.numel()).view_as(dist.mean))
        return torch.cat([part.flatten(1) for part in (dist.mean, dist.logvar, getattr(image, "sample", image))], 1)


def agreement(x, **options):
    attends = options.pop("attn_resolutions", ())
    options = {"ch": 64, **options}  # two channels a group: with one, normalisation takes away what the biases before it add
    ours = Both(small(**options, attn_resolutions=attends))
    levels = [SMALL["resolution"] // 2**i for i in range(len(options.get("ch_mult", (1, 2))))]
    keys = {"in_channels": "channels", "z_channels": "z"}
    theirs = Both(reference(**{keys.get(k, k): v for k, v in options.items() if k not in ("out_ch", "embed_dim")}, attention=[n in attends for n in levels]))
    return compare(ours, theirs, (x,), rename(dict(ours.named_parameters()), vae_rules(len(levels))))


class TestParity:
    @pytest.mark.parametrize(
        ("size", "options"),
        [
            ((16, 16), {}),
            ((8, 12), dict(ch_mult=(1, 1, 2), num_res_blocks=2)),
            ((11, 7), {}),
            ((13, 9), dict(ch_mult=(1, 2, 2))),
            ((8, 8), dict(ch_mult=(1,))),
            ((8, 12), dict(attn_resolutions=(8,))),
            ((8, 8), dict(in_channels=1, out_ch=1, z_channels=3, embed_dim=3)),
        ],
    )
    def test_equal(self, size, options):
        assert (result := agreement(torch.randn(2, options.get("in_channels", 3), *size), **options)), result

    @pytest.mark.slow
    def test_wide(self):
        assert (result := agreement(torch.randn(1, 3, 48, 32), ch=64, ch_mult=(1, 2, 4, 4), num_res_blocks=2)), result

    def test_stable_diffusion(self):
        """Number, names and shapes of the tensors; the names are read by diffusers' own converter."""
        with torch.device("meta"):
            ours, theirs = AutoencoderKL(), reference(128, (1, 2, 4, 4), 2)
        state = ours.state_dict()
        assert len(state) == 248 and count_parameters(ours) == 83_653_863 and ours.factor == 8
        table = rename(state, vae_rules(4))
        assert set(table.values()) == set(theirs.state_dict())
        for name, tensor in state.items():
            assert tensor.numel() == theirs.state_dict()[table[name]].numel(), name
        convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_ldm_vae_checkpoint
        found = convert({f"first_stage_model.{name}": tensor for name, tensor in state.items()}, theirs.config)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in theirs.state_dict().items()}

    def test_official_names(self):
        names = AutoencoderKL(ch=32, ch_mult=(1, 2, 1), num_res_blocks=2).state_dict()
        for name in (
            "encoder.conv_in.weight",
            "encoder.down.0.block.1.conv2.bias",
            "encoder.down.0.downsample.conv.weight",
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.mid.attn_1.proj_out.weight",
            "encoder.norm_out.weight",
            "decoder.conv_in.bias",
            "decoder.mid.block_2.norm1.weight",
            "decoder.up.0.block.2.conv1.weight",
            "decoder.up.0.block.0.nin_shortcut.weight",
            "decoder.up.2.upsample.conv.weight",
            "decoder.norm_out.bias",
            "quant_conv.weight",
            "post_quant_conv.bias",
        ):
            assert name in names, name
        assert not [n for n in names if n.startswith(("encoder.down.2.downsample", "decoder.up.0.upsample"))]

    def test_ddconfig(self):
        """The configuration of Stable Diffusion, word for word."""
        config = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
        with torch.device("meta"):
            assert count_parameters(AutoencoderKL(**config, attn_resolutions=[], dropout=0.0, embed_dim=4)) == 83_653_863


class TestDistribution:
    @pytest.mark.parametrize("size", [1, 30])
    def test_equals_diffusers(self, size):
        kind = pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
        moments = size * torch.randn(3, 8, 5, 4, generator=seeded())
        ours, theirs = DiagonalGaussian(moments), kind(moments)
        z = torch.randn(3, 4, 5, 4, generator=seeded(1))
        for a, b in (
            (ours.mean, theirs.mean),
            (ours.logvar, theirs.logvar),
            (ours.std, theirs.std),
            (ours.var, theirs.var),
            (ours.mode(), theirs.mode()),
            (ours.kl(), theirs.kl()),
            (ours.nll(z), theirs.nll(z)),
            (ours.sample(seeded(2)), theirs.sample(seeded(2))),
        ):
            assert relative_error(a, b) < 1e-6

    def test_equals_torch(self):
        moments = torch.randn(3, 6, 5, generator=seeded(), dtype=torch.float64)
        dist = DiagonalGaussian(moments)
        normal, z = torch.distributions.Normal(dist.mean, dist.std), torch.randn(3, 3, 5, dtype=torch.float64)
        divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros(()), torch.ones(())))
        assert relative_error(dist.kl(), divergence.sum((1, 2))) < 1e-12
        assert relative_error(dist.nll(z), -normal.log_prob(z).sum((1, 2))) < 1e-12

    def test_sample(self):
        """The standard deviation, not the variance, and a generator of one's own."""
        moments = torch.cat([torch.full((1, 1, 200_000), 0.5), torch.full((1, 1, 200_000), -2.0)], 1)
        dist = DiagonalGaussian(moments)
        z = dist.sample(seeded())
        assert abs(z.mean() - 0.5) < 0.01 and abs(z.std() - math.exp(-1)) < 0.01
        assert torch.equal(z, dist.sample(seeded())) and not torch.equal(z, dist.sample(seeded(1)))

    def test_gradient_reaches_both(self):
        moments = torch.randn(2, 4, 3, requires_grad=True)
        DiagonalGaussian(moments).sample(seeded()).square().sum().backward()
        assert (moments.grad != 0).all()

    def test_clamp(self):
        dist = DiagonalGaussian(torch.tensor([[0.0, 0.0, -1000.0, 1000.0]]).view(1, 4, 1))
        assert dist.logvar.flatten().tolist() == [-30, 20] and dist.std.isfinite().all() and dist.kl().isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_precisions(self, dtype):
        dist = DiagonalGaussian(torch.randn(2, 4, 3).to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert dist.sample(seeded()).dtype == dtype and dist.kl().dtype == dist.nll(dist.mean).dtype == wide

    def test_half_does_not_overflow(self):
        """In float16 a variance of e⁻²⁰ is zero and a sum over a latent of 16,384 numbers too large."""
        moments = torch.cat([torch.zeros(1, 4, 64, 64), torch.full((1, 4, 64, 64), -20.0)], 1)
        half, full = (DiagonalGaussian(moments.to(dtype)) for dtype in (torch.float16, torch.float32))
        z = torch.full((1, 4, 64, 64), 2.0**-10)
        assert full.nll(z).abs() > 70_000 and relative_error(half.nll(z.half()), full.nll(z)) < 1e-3

    @pytest.mark.bad_input
    def test_other_latents(self):
        with pytest.raises(ValueError, match=r"z has shape \(1, 1, 4\), .*\(1, 2, 4\)"):
            DiagonalGaussian(torch.zeros(1, 4, 4)).nll(torch.zeros(1, 1, 4))

    @pytest.mark.bad_input
    def test_odd_channels(self):
        with pytest.raises(ValueError, match=r"moments must be .*\(1, 3, 4\)"):
            DiagonalGaussian(torch.zeros(1, 3, 4))


class TestForward:
    def test_parts_fit(self):
        vae, x = randomize(small()), torch.randn(2, 3, 8, 12)
        image, posterior = vae(x, sample=False)
        assert relative_error(image, vae.decode(vae.encode(x).mode())) == 0 and posterior.mean.shape == (2, 4, 4, 6)
        drawn, _ = vae(x, generator=seeded())
        assert relative_error(drawn, vae.decode(posterior.sample(seeded()))) < 1e-6 and relative_error(drawn, image) > 1e-3
        moments = vae.quant_conv(vae.encoder(x))
        assert relative_error(torch.cat([posterior.mean, posterior.logvar], 1), moments) < 1e-6

    def test_odd_sizes(self):
        """They round down, as everywhere in the field."""
        vae = small(ch_mult=(1, 1, 1))
        image, posterior = vae(torch.randn(1, 3, 15, 9))
        assert vae.factor == 4 and posterior.mean.shape == (1, 4, 3, 2) and image.shape == (1, 3, 12, 8)

    @pytest.mark.parametrize(("dims", "size"), [(1, (16,)), (2, (8, 4)), (3, (4, 6, 2))])
    def test_dims(self, dims, size):
        x = torch.randn(1, 3, *size)
        assert small(dims=dims)(x)[0].shape == x.shape

    def test_examples_do_not_mix(self):
        vae, x = randomize(small()), torch.randn(3, 3, 8, 8)
        alone = torch.cat([vae(x[i : i + 1], sample=False)[0] for i in range(3)])
        assert relative_error(vae(x, sample=False)[0], alone) < 1e-5

    def test_unscaled_and_untouched(self):
        vae, x, z = randomize(small()), torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
        kept, first = (x.clone(), z.clone()), (vae.encode(x).mean, vae.decode(z))
        vae.scale_factor = 0.5
        assert torch.equal(x, kept[0]) and torch.equal(z, kept[1])
        assert torch.equal(vae.encode(x).mean, first[0]) and torch.equal(vae.decode(z), first[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        vae, x = randomize(small()), torch.randn(1, 3, 8, 8)
        expected = vae(x, sample=False)[0]
        vae = copy.deepcopy(vae).to(dtype)
        assert vae(x.to(dtype))[0].dtype == dtype and vae(x)[0].dtype == torch.float32
        assert relative_error(vae(x, sample=False)[0], expected) < (1e-5 if dtype == torch.float64 else 0.1)

    def test_padding(self):
        """Zeros on the right and at the bottom only: the first output of a downsampling does not see them."""
        vae = small()
        step = vae.encoder.down[0].downsample
        x = torch.randn(1, 32, 8, 8)
        inner = torch.nn.functional.conv2d(x, step.conv.weight, step.conv.bias, stride=2)
        assert relative_error(step(x)[:, :, :3, :3], inner) < 1e-6

    def test_own_attention(self):
        @register_attention("halves")
        class Halves(nn.Module):
            def __init__(self, in_channels):
                super().__init__()
                self.scale = nn.Parameter(torch.full((in_channels, 1, 1), 0.5))

            def forward(self, x):
                return x * self.scale

        try:
            assert small(attn_type="halves").decoder.mid.attn_1.scale.shape == (64, 1, 1)
        finally:
            del ATTENTION["halves"]


CHANGES = {
    "ch": 64,
    "out_ch": 4,
    "ch_mult": (1, 1),
    "num_res_blocks": 2,
    "attn_resolutions": (8,),
    "dropout": 0.5,
    "resamp_with_conv": False,
    "in_channels": 4,
    "resolution": None,  # where attention goes
    "z_channels": 3,
    "double_z": None,  # must be true
    "attn_type": "none",
    "embed_dim": 3,
    "dims": 1,
}


class TestArguments:
    def test_all_are_listed(self):
        assert list(CHANGES) == ARGUMENTS

    @pytest.mark.parametrize("name", [n for n, value in CHANGES.items() if value is not None])
    def test_each_does_something(self, name):
        results = []
        for vae in (small(), small(**{name: CHANGES[name]})):
            x = torch.randn(1, vae.encoder.in_channels, *[8] * vae.dims, generator=seeded())
            results.append(({n: p.shape for n, p in vae.named_parameters()}, randomize(vae)(x, sample=False)[0]))
        (shapes, out), (others, other) = results
        assert shapes != others or relative_error(out, other) > 1e-3

    def test_resolution(self):
        first, second = (dict(small(attn_resolutions=(16,), resolution=r).named_parameters()) for r in (16, 32))
        assert "encoder.down.0.attn.0.q.weight" in first and "encoder.down.1.attn.0.q.weight" in second

    def test_iterators(self):
        """Both arms read the list; an iterator can be read once."""
        vae = small(attn_resolutions=iter((8,)))
        assert len(vae.encoder.down[1].attn) == 1 and len(vae.decoder.up[1].attn) == 2

    @pytest.mark.bad_input
    def test_iterator_of_levels(self):
        assert small(ch_mult=iter((1, 2))).factor == 2 and Encoder(ch=32, ch_mult=iter((1, 2)))(torch.randn(1, 3, 8, 8)).shape == (1, 8, 4, 4)

    @pytest.mark.bad_input
    def test_double_z(self):
        assert Encoder(**SMALL, double_z=False)(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)
        with pytest.raises(ValueError, match="double_z=False"):
            small(double_z=False)

    def test_dropout_only_in_training(self):
        vae, x = randomize(small(dropout=0.5)), torch.randn(1, 3, 8, 8)
        assert relative_error(vae(x, sample=False)[0], vae(x, sample=False)[0]) > 1e-3
        vae.eval()
        assert relative_error(vae(x, sample=False)[0], vae(x, sample=False)[0]) == 0

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(ch=48), "ch=48 .* 32 and 64"),
            (dict(ch=32.0), "ch=32.0"),
            (dict(out_ch=0), "out_ch=0"),
            (dict(ch_mult=()), "ch_mult"),
            (dict(ch_mult="12"), "ch_mult='12'"),
            (dict(ch_mult=(1, 0)), "ch_mult=0"),
            (dict(num_res_blocks=0), "num_res_blocks=0"),
            (dict(attn_resolutions=(4,)), "attn_resolutions has 4, .* 16, 8"),
            (dict(attn_resolutions="16"), "attn_resolutions='16'"),
            (dict(dropout=1.5), "dropout=1.5"),
            (dict(dropout=True), "dropout=True"),
            (dict(dropout=math.nan), "dropout=nan"),
            (dict(dropout=None), "dropout=None"),
            (dict(dropout="x"), "dropout='x'"),
            (dict(in_channels=0), "in_channels=0"),
            (dict(resolution=1), "resolution=1 .* halved 1 times"),
            (dict(z_channels=0), "z_channels=0"),
            (dict(embed_dim=-1), "embed_dim=-1"),
            (dict(attn_type="nope"), "attn_type='nope'"),
            (dict(dims=0), "dims=0"),
        ],
        ids=lambda v: str(v) if isinstance(v, dict) else "",
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            small(**arguments)

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda vae: vae.encode(torch.randn(1, 4, 8, 8)), "x has 4 channels, .* in_channels=3"),
            (lambda vae: vae.encode(torch.randn(3, 8, 8)), "x must be .*2 axes of space"),
            (lambda vae: vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "uint8"),
            (lambda vae: vae.encode(torch.randn(1, 3, 8, 1)), "must be 2 or longer"),
            (lambda vae: vae.decode(torch.randn(1, 3, 8, 8)), r"z must be .*embed_dim=4, .*\(1, 3, 8, 8\)"),
            (lambda vae: vae.decoder(torch.randn(1, 3, 8, 8)), r"z must be .*z_channels=4, "),
            (lambda vae: vae.decode(torch.randn(4, 8, 8)), r"2 axes of space.*\(4, 8, 8\)"),
            (lambda vae: psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 4)), "one shape"),
            (lambda vae: psnr(torch.zeros(8), torch.zeros(8)), r"\(batch, channels"),
            (lambda vae: psnr(*[torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 2), "uint8"),
            (lambda vae: scale_factor(vae, torch.zeros(0, 3, 8, 8)), "images is empty"),
            (lambda vae: scale_factor(vae, torch.full((2, 3, 8, 8), math.nan)), "images must give finite latents .* nan"),
            (lambda vae: train_vae("nowhere", steps=0), "steps=0"),
            (lambda vae: train_vae("nowhere", seed=0.5), "seed=0.5"),
            (lambda vae: scale_factor(vae, torch.randn(2, 3, 8, 8), batch_size=0), "batch_size=0"),
            (lambda vae: tiled_decode(vae, torch.randn(1, 4, 8, 8), tile=0), "tile=0"),
            (lambda vae: tiled_decode(vae, torch.randn(1, 4, 8, 8), tile=4, overlap=1), "overlap=1 is too small .* up to 7"),
            (lambda vae: tiled_decode(vae, torch.randn(1, 3, 8, 8)), "embed_dim=4"),
            (lambda vae: tiled_decode(small(attn_resolutions=(8,)), torch.randn(1, 4, 8, 8)), "attn_resolutions"),
        ],
    )
    def test_inputs(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(small())


class TestMeasures:
    def test_psnr(self):
        b = torch.zeros(2, 1, 10, 10)
        a = torch.stack([b[0] + 0.02, b[1] + 0.2])
        assert torch.allclose(psnr(a, b), torch.tensor([40.0, 20.0]), atol=1e-3)
        assert psnr(b, b).isinf().all() and psnr(b + 5, b + 1)[0] == math.inf  # what is out of range is cut off

    def test_scale_factor(self):
        vae, images = randomize(small()).eval(), torch.randn(10, 3, 8, 8)
        latents = vae.encode(images).sample(seeded())
        assert scale_factor(vae, images, seeded(), batch_size=10) == pytest.approx(1 / latents.std().item())
        assert scale_factor(vae, images, seeded(), batch_size=3) == pytest.approx(1 / latents.std().item(), rel=0.1)

    @pytest.mark.bad_input  # for it is no `AutoencoderKL`
    def test_scale_factor_without_weights(self):
        images = 3 * torch.randn(10, 3, 8, 8)
        assert scale_factor(FoldedPixels(), images) == pytest.approx(1 / images.std().item(), rel=1e-4)

    def test_training_asks_no_gpu(self, monkeypatch):
        """Only the CPU's random numbers are set aside and seeded; the weights are those of the seed."""
        asked, fork, seed_all = [], torch.random.fork_rng, torch.manual_seed

        def built(model, *_, **__):
            raise StopIteration(model)

        monkeypatch.setattr(torch.random, "fork_rng", lambda *devices: asked.append(devices) or fork(*devices))
        monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every GPU was seeded"))
        monkeypatch.setattr("unet_course.vae._pictures", lambda split: None)
        monkeypatch.setattr("unet_course.vae.Trainer", built)
        with pytest.raises(StopIteration) as stopped:
            train_vae("nowhere", seed=3)
        seed_all(3)
        assert asked == [([],)] and all(torch.equal(a, b) for a, b in zip(stopped.value.value.parameters(), emoji_vae().parameters(), strict=True))

    def test_loss(self):
        """Absolute and squared error, per number; the divergence per number of the latent, weighted; the mean over sizes; half are mirrored."""

        class Off(nn.Module):
            def __init__(self, by=0.0, mean=0.0):
                super().__init__()
                self.by, self.mean = by, mean

            def forward(self, x, generator=None):
                means = torch.full((len(x), 2, 4, 4), self.mean)
                return x + self.by * x.shape[-1] / 16, DiagonalGaussian(torch.cat([means, torch.zeros_like(means)], 1))

        large, little = torch.zeros(4, 3, 16, 16), torch.zeros(4, 3, 8, 8)
        assert vae_loss(Off(by=0.5), large, seeded()).item() == pytest.approx(0.5 + 0.25)
        assert vae_loss(Off(mean=2.0), large, seeded()).item() == pytest.approx(2 * KL_WEIGHT)
        assert vae_loss(Off(by=1.0), (large, little), seeded()).item() == pytest.approx((2 + 0.75) / 2)

        class Returns(nn.Module):
            def forward(self, x, generator=None):
                self.seen = x
                return x, DiagonalGaussian(torch.zeros(len(x), 2, 1))

        net, ramp = Returns(), torch.linspace(-1, 1, 8).expand(64, 3, 8, 8)
        assert vae_loss(net, ramp, seeded()) == 0
        assert 16 < (net.seen[:, 0, 0, 0] > 0).sum() < 48


class TestTiles:
    @pytest.mark.parametrize(
        ("size", "tile", "overlap", "options"),
        [
            ((24, 24), 8, 8, {}),
            ((25, 13), 7, 9, dict(ch_mult=(1, 2, 2))),
            ((20, 9), 16, 7, dict(resamp_with_conv=False)),
            ((9, 9), 64, 16, {}),
            ((9, 9), 9, 0, {}),
            ((20, 9), 8, 7, dict(attn_resolutions=(8,), attn_type="none")),
            ((16, 16), 4, 16, dict(ch_mult=(1,), num_res_blocks=2)),
        ],
    )
    def test_equal(self, size, tile, overlap, options):
        vae, z = randomize(small(**options)).eval(), torch.randn(2, 4, *size)
        assert relative_error(tiled_decode(vae, z, tile, overlap), vae.decode(z)) < 1e-5

    @pytest.mark.parametrize(("size", "tile"), [((50,), 11), ((9, 5, 6), 4)])
    def test_other_dims(self, size, tile):
        vae, z = randomize(small(dims=len(size))).eval(), torch.randn(2, 4, *size)
        assert relative_error(tiled_decode(vae, z, tile, 7), vae.decode(z)) < 1e-5

    @torch.no_grad()
    def test_all_that_waits_is_at_home(self):
        """A generator that is suspended keeps its variables: none of them may lie where the model works."""
        decoder, home = small(ch_mult=(1, 2, 2)).decoder.eval(), torch.device("cpu", 0)  # for torch a place of its own: `to` copies
        walk = _climb(decoder, torch.randn(1, 64, 5, 4), home)
        norm, x = next(walk)
        while norm is not None:
            for name, value in walk.gi_frame.f_locals.items():
                if isinstance(value, torch.Tensor):
                    assert name == "h" or value is x, name
            norm, x = walk.send(norm(x))
        assert x.shape == (1, 3, 20, 16) and not [v for k, v in walk.gi_frame.f_locals.items() if isinstance(v, torch.Tensor) and k != "h"]

    def test_precision(self):
        vae, z = randomize(small()).eval(), torch.randn(1, 4, 24, 24)
        half = copy.deepcopy(vae).bfloat16()
        assert relative_error(tiled_decode(half, z, 8, 8), vae.decode(z)) < 0.05 and tiled_decode(half, z, 8, 8, home="cpu").dtype == torch.float32

    @pytest.mark.parametrize("options", [{}, dict(ch_mult=(1, 1, 1)), dict(resamp_with_conv=False), dict(num_res_blocks=2)])
    def test_reach(self, options):
        """Beyond its reach a change of what leaves the middle does not show, in a decoder that does not normalise; near it, it may."""
        decoder = small(**options).decoder.double()
        for module in decoder.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
        decoder.mid = nn.Identity()
        decoder.z_channels = decoder.conv_in.out_channels
        decoder.conv_in = nn.Conv2d(decoder.z_channels, decoder.z_channels, 1).double()
        reach, zoom = decoder_reach(decoder), 2 ** (len(decoder.up) - 1)
        z = torch.randn(1, decoder.z_channels, 41, 5, dtype=torch.float64)
        other = z.clone()
        other[:, :, 20] += 1
        rows = (decoder(z) - decoder(other)).abs().amax((0, 1, 3)).unflatten(0, (41, zoom)).amax(1) > 0
        touched = rows.nonzero().flatten()
        assert 20 - reach <= touched.min() and touched.max() <= 20 + reach and max(20 - touched.min(), touched.max() - 20) >= reach - 1

    def test_stable_diffusion(self):
        with torch.device("meta"):
            assert decoder_reach(AutoencoderKL().decoder) == 13


class TestTraining:
    def test_recipe(self, tmp_path, monkeypatch):
        """The same seed, the same weights, and asking again changes nothing; what is shipped is what was averaged."""
        emojis, drawn = torch.rand(48, 3, 16, 16) * 2 - 1, torch.rand(48, 3, 8, 8) * 2 - 1
        monkeypatch.setattr("unet_course.vae._pictures", lambda split: (emojis, drawn) if split == "train" else (emojis[:16], drawn[:16]))
        whole = train_vae(tmp_path / "a", steps=4, progress=False)
        for again in (train_vae(tmp_path / "b", steps=4, progress=False), train_vae(tmp_path / "a", steps=4, progress=False)):
            assert again.step == 4
            assert all(torch.equal(a, b) for a, b in zip(whole.ema_model.parameters(), again.ema_model.parameters(), strict=True))
        monkeypatch.setattr("unet_course.vae.emoji", lambda split: (emojis, []))
        factor = ship_vae(tmp_path / "a" / "last.safetensors", tmp_path / "shipped.safetensors")
        monkeypatch.setattr("unet_course.vae.read_asset", lambda name: (tmp_path / "shipped.safetensors").read_bytes())
        vae = pretrained_vae()
        assert vae.scale_factor == factor > 0 and not vae.training
        assert relative_error(vae.decode(torch.ones(1, 4, 4, 4)), whole.ema_model.decode(torch.ones(1, 4, 4, 4))) < 1e-2

    def test_shipped(self):
        """Good on concepts never seen, drawings are read as before, and latents have standard deviation 1 when scaled."""
        from unet_course.data import emoji

        vae, unseen = pretrained_vae(), emoji("concepts")[0][::4]
        drawings, captions = shapes(100, split="pairs", seed=5)
        with torch.no_grad():
            back, posterior = vae(unseen, sample=False)
            read = shape_scores(vae(drawings, sample=False)[0], captions)["everything"]
        assert 0.9 < posterior.mean.std() * vae.scale_factor < 1.1
        assert psnr(back, unseen).mean() > 30 and read > 0.95

    def test_sizes(self):
        assert 0.5e6 < count_parameters(emoji_vae()) < 1.3e6 and emoji_vae().factor == 4


BAD = {
    "ch": 40,
    "out_ch": 0,
    "ch_mult": (1, 0),
    "num_res_blocks": 0,
    "attn_resolutions": (5,),
    "dropout": 1.5,
    "in_channels": -1,
    "resolution": 1,
    "z_channels": 0,
    "double_z": False,
    "attn_type": "nope",
    "embed_dim": 0,
    "dims": 0,
}


@st.composite
def draws(draw) -> tuple[dict, tuple[int, ...], str | None]:
    """Arguments that fit together and an input size; in some cases one argument is replaced by one of `BAD`, and named."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    levels, resolution = one_of(1, 2, 2, 3), one_of(16, 8, 12, 17)
    reached = [resolution // 2**i for i in range(levels)]
    arguments = dict(
        ch=32,
        out_ch=one_of(3, 1),
        ch_mult=one_of(list, tuple)(one_of(1, 1, 1, 2) for _ in range(levels)),
        num_res_blocks=one_of(1, 2),
        attn_resolutions=one_of((), reached[-1:], reached),
        dropout=one_of(0.0, 0.5),
        resamp_with_conv=one_of(True, False),
        in_channels=one_of(3, 2),
        resolution=resolution,
        z_channels=one_of(1, 4),
        double_z=True,
        attn_type=one_of("vanilla", "linear", "none"),
        embed_dim=one_of(1, 4),
        dims=one_of(2, 2, 2, 2, 1, 3),
    )
    wrong = one_of(*BAD) if one_of(False, False, False, True) else None
    if wrong:
        arguments[wrong] = BAD[wrong]
    return arguments, tuple(one_of(4, 5, 6) for _ in range(max(arguments["dims"], 1))), wrong


def explore(number: int) -> Counter:
    """Build, run forward and backward, `number` times; anything but a result or a clear error fails."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(draws())
    def draw(case):
        arguments, size, wrong = case
        try:
            vae = AutoencoderKL(**arguments)
            x = torch.randn(2, arguments["in_channels"], *size, requires_grad=True)
            out, posterior = vae(x, generator=seeded())
        except ValueError as error:
            tally["refused"] += 1
            blamed = ("resolution", "attn_resolutions") if wrong == "resolution" else (wrong,)  # either of the two may be at fault
            assert any(re.match(rf"{name}\b", str(error)) for name in blamed), (wrong, error)
            return
        tally["valid"] += 1
        small_size = [n // vae.factor for n in size]
        assert posterior.mean.shape == (2, arguments["embed_dim"], *small_size)
        assert out.shape == (2, arguments["out_ch"], *(n * vae.factor for n in small_size))
        assert_reaches_everything(vae, x, torch.cat([out.flatten(1), posterior.kl()[:, None]], 1))

    draw()
    return mostly_valid(tally)


class TestExplore:
    def test_some(self):
        assert explore(20)["refused"] > 0

    @pytest.mark.slow
    def test_many(self):
        assert explore(500).total() >= 400


def test_decoder_alone():
    assert Decoder(**SMALL)(torch.randn(1, 4, 4, 6)).shape == (1, 3, 8, 12)


def test_quiet(tmp_path):
    """Nothing here warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae = small()
        image, posterior = vae(torch.randn(1, 3, 16, 12), generator=seeded())
        (image.square().mean() + posterior.kl().mean()).backward()
        tiled_decode(vae, posterior.mode(), tile=4, overlap=7)
        save_checkpoint(tmp_path / "x.safetensors", vae.state_dict(), {})
