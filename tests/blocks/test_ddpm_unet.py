"""The DDPM U-Net: equal to diffusers' with the same weights, every argument does something, wrong ones are named."""

import copy
import inspect
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mappings import ddpm_rules, rename
from probing import assert_reaches_everything, mostly_valid
from torch import nn

from unet_course.attention import ATTENTION, register_attention
from unet_course.ddpm_unet import Level, Model, attention_levels, check_groups, check_map, per_example
from unet_course.workbench import check_positive, check_probability, check_whole, compare, count_parameters, randomize, relative_error

SMALL = dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16)
ARGUMENTS = list(inspect.signature(Model).parameters)


def small(**changes) -> Model:
    return Model(**{**SMALL, **changes})


def cifar10(ch: int) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers' in the configuration of google/ddpm-cifar10-32, `ch` channels wide at the top."""
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(ch, 2 * ch, 2 * ch, 2 * ch),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    return Model(ch, 3, (1, 2, 2, 2), 2, (16,), resolution=32), reference


def key_biases(model: nn.Module, key: str) -> list[nn.Module]:
    """The layers that make keys. Their bias adds the same to all scores of a query, so that its gradient is zero but for rounding."""
    return [m for n, m in model.named_modules() if n.endswith(key)]


def agreement(ch: int, batch: int, size: tuple[int, int]):
    """Ours against diffusers', all parameters random; without the keys' biases, which have no gradient to compare."""
    ours, reference = cifar10(ch)
    for layer in key_biases(ours, ".k") + key_biases(reference, ".to_k"):
        layer.bias = None
    names = rename(dict(ours.named_parameters()), ddpm_rules(levels=4))
    inputs = torch.randn(batch, 3, *size), torch.tensor([7, 900, 31])[:batch]
    return compare(ours, reference, inputs, names, call=lambda x, t: reference(x, t).sample)


class TestParity:
    def test_cifar10_narrow(self):
        assert (result := agreement(64, 2, (8, 16))), result
        assert result.tensors > 300

    def test_biases_of_keys(self):
        """With the keys' biases the output agrees as well, and both gradients of theirs vanish."""
        ours, reference = cifar10(32)
        names = rename(dict(randomize(ours).named_parameters()), ddpm_rules(levels=4))
        theirs = dict(reference.named_parameters())
        with torch.no_grad():
            for n, p in ours.named_parameters():
                theirs[names[n]].copy_(p.reshape(theirs[names[n]].shape))
        x, t = torch.randn(1, 3, 16, 8), torch.tensor([400])
        a, b = ours(x, t), reference(x, t).sample
        assert relative_error(a, b) < 1e-5
        for out, keys, queries in ((a, ".k", ".q"), (b, ".to_k", ".to_q")):
            model = ours if out is a else reference
            out.square().sum().backward()
            for k, q in zip(key_biases(model, keys), key_biases(model, queries)):
                assert k.bias.grad.norm() < 1e-4 * q.bias.grad.norm()

    @pytest.mark.slow
    def test_cifar10(self):
        assert (result := agreement(128, 1, (32, 24))), result

    def test_sizes_of_the_paper(self):
        """35.7 and 114 million parameters (Ho et al. 2020, appendix B)."""
        with torch.device("meta"):
            assert round(count_parameters(Model(128, 3, (1, 2, 2, 2), 2, (16,), resolution=32)) / 1e5) == 357
            assert round(count_parameters(Model(128, 3, (1, 1, 2, 2, 4, 4), 2, (16,), resolution=256)) / 1e6) == 114

    def test_official_names(self):
        names = dict(small(num_res_blocks=2, ch_mult=(1, 1, 2)).named_parameters())
        for name in (
            "temb.dense.0.weight",
            "temb.dense.1.bias",
            "conv_in.weight",
            "down.0.block.1.temb_proj.weight",
            "down.0.downsample.conv.weight",
            "down.1.attn.1.q.weight",
            "down.2.block.0.nin_shortcut.weight",
            "mid.block_1.norm1.weight",
            "mid.attn_1.proj_out.bias",
            "mid.block_2.conv2.weight",
            "up.2.upsample.conv.weight",
            "up.1.attn.2.k.weight",
            "up.0.block.2.nin_shortcut.bias",
            "norm_out.weight",
            "conv_out.bias",
        ):
            assert name in names, name
        assert not [n for n in names if n.startswith(("down.2.downsample", "up.0.upsample", "down.0.attn"))]


class TestForward:
    @pytest.mark.slow
    def test_the_fields_example(self):
        model = Model(ch=128, out_ch=3, num_res_blocks=2, attn_resolutions=[16], in_channels=3, resolution=256, ch_mult=(1, 1, 2, 2, 4))
        with torch.no_grad():
            for t in (torch.tensor([1000]), [1000]):
                assert model(torch.randn(1, 3, 256, 256), t).shape == (1, 3, 256, 256)

    @pytest.mark.parametrize("size", [(7, 16), (5, 9), (2, 3)])
    @pytest.mark.parametrize("conv", [True, False])
    def test_odd_sizes(self, size, conv):
        model, x = small(resamp_with_conv=conv), torch.randn(2, 3, *size, requires_grad=True)
        out = model(x, 5)
        out.square().sum().backward()
        assert out.shape == x.shape and x.grad.isfinite().all()

    @pytest.mark.parametrize(("dims", "size"), [(1, (20,)), (2, (8, 12)), (3, (4, 6, 5)), (4, (3, 4, 2, 4))])
    def test_dims(self, dims, size):
        x = torch.randn(1, 3, *size)
        assert small(dims=dims)(x, 5).shape == x.shape

    def test_times_in_every_form(self):
        model, x = randomize(small()), torch.randn(2, 3, 8, 8)
        out = model(x, torch.tensor([5, 5]))
        for t in (5, 5.0, [5], [5, 5], torch.tensor(5), torch.tensor([5.0])):
            assert relative_error(model(x, t), out) < 1e-6
        assert relative_error(model(x, [5, 900]), out) > 1e-3
        assert relative_error(model(x, 5.5), out) > 1e-6

    def test_examples_do_not_mix(self):
        model, x = randomize(small()), torch.randn(3, 3, 8, 8)
        alone = torch.cat([model(x[i : i + 1], 10 * i) for i in range(3)])
        assert relative_error(model(x, [0, 10, 20]), alone) < 1e-5

    def test_context_is_more_channels(self):
        model, x, context = randomize(small(in_channels=5)), torch.randn(2, 3, 8, 8), torch.randn(2, 2, 8, 8)
        assert relative_error(model(x, 5, context), model(torch.cat([x, context], 1), 5)) == 0
        assert relative_error(model(x, 5, context), model(x, 5, -context)) > 1e-3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype):
        model, x = randomize(small()), torch.randn(1, 3, 8, 8)
        expected = model(x, 5)
        model = copy.deepcopy(model).to(dtype)
        assert model(x.to(dtype), 5).dtype == dtype and model(x, 5).dtype == torch.float32
        assert relative_error(model(x, 5), expected) < (1e-5 if dtype == torch.float64 else 0.1)

    def test_copies(self):
        model, x = randomize(small()), torch.randn(1, 3, 8, 8)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert relative_error(twin(x, 5), model(x, 5)) == 0
        twin = small()
        twin.load_state_dict(model.state_dict(), strict=True)
        assert relative_error(twin(x, 5), model(x, 5)) == 0

    def test_input_is_left_alone(self):
        x, context = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8)
        kept = x.clone(), context.clone()
        small(in_channels=5)(x, 5, context)
        assert torch.equal(x, kept[0]) and torch.equal(context, kept[1])


def signs(model: Model, **inputs) -> tuple:
    """What a change of an argument may change: the parameters, or what comes out."""
    torch.manual_seed(0)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, randomize(model)(**inputs)


CHANGES = {  # argument: (its other value, what else is needed for it to matter)
    "ch": (64, {}),
    "out_ch": (4, {}),
    "ch_mult": ((1, 3), {}),
    "num_res_blocks": (2, {}),
    "attn_resolutions": ((16,), {}),
    "dropout": (0.5, {}),
    "resamp_with_conv": (False, {}),
    "in_channels": (4, {}),
    "resolution": (8, {}),
    "use_timestep": (False, {}),
    "use_linear_attn": (True, {}),
    "attn_type": ("none", {}),
    "dims": (1, {}),
}


class TestArguments:
    def test_all_are_listed(self):
        assert list(CHANGES) == ARGUMENTS

    @pytest.mark.parametrize("name", CHANGES)
    def test_each_does_something(self, name):
        value, also = CHANGES[name]
        before, after = small(**also), small(**{name: value, **also})
        if name == "resolution":  # where attention goes
            assert "down.1.attn.0.q.weight" in dict(before.named_parameters()) and "down.0.attn.0.q.weight" in dict(after.named_parameters())
            assert before.describe() != after.describe()
            return
        shapes, out = signs(before, x=torch.randn(2, 3, 8, 8), t=5)
        channels = 4 if name == "in_channels" else 3
        x = torch.randn(2, channels, 8) if name == "dims" else torch.randn(2, channels, 8, 8)
        others, other = signs(after, x=x, t=None if name == "use_timestep" else 5)
        assert shapes != others or relative_error(out, other) > 1e-3

    def test_dropout_only_in_training(self):
        model, x = randomize(small(dropout=0.5)), torch.randn(1, 3, 8, 8)
        assert relative_error(model(x, 5), model(x, 5)) > 1e-3
        model.eval()
        assert relative_error(model(x, 5), model(x, 5)) == 0

    def test_linear_attention_has_two_names(self):
        x = torch.randn(1, 3, 8, 8)
        first, second = (randomize(small(**k)) for k in ({"use_linear_attn": True}, {"attn_type": "linear"}))
        assert relative_error(first(x, 5), second(x, 5)) == 0

    def test_own_attention(self):
        class Doubles(nn.Module):
            def __init__(self, in_channels):
                super().__init__()
                self.scale = nn.Parameter(torch.full((in_channels, 1, 1), 2.0))

            def forward(self, x):
                return x * self.scale

        register_attention("doubles")(Doubles)
        try:
            model = small(attn_type="doubles")
            assert model.mid.attn_1.scale.shape == (64, 1, 1)
            assert model(torch.randn(1, 3, 8, 8), 5).shape == (1, 3, 8, 8)
        finally:
            del ATTENTION["doubles"]

    def test_default_attention(self):
        """The default means 16 × 16 where there is such a level; a 16 that is asked for must be there."""
        assert Model(32, 3).describe().levels[-2].attention == 0
        assert Model(32, 3, resolution=32).describe().levels[1].attention == 5
        with pytest.raises(ValueError, match="attn_resolutions has 16, .*256, 128, 64, 32"):
            Model(32, 3, attn_resolutions=[16])

    def test_describe(self):
        found = small().describe()
        assert found.levels[0] == Level("0", (16, 16), 32, 3, 0)
        assert found.levels[1] == Level("1", (8, 8), 64, 3, 3)
        assert found.levels[2] == Level("middle", (8, 8), 64, 2, 1)
        assert found.parameters == count_parameters(small()) and f"{found.parameters:,}" in repr(found)
        assert all(level.attention == 0 for level in small(attn_type="none").describe().levels)


WRONG = [  # arguments, what the message must hold
    (dict(ch=48), "ch=48 .* 32 and 64"),
    (dict(ch=0), "ch=0"),
    (dict(ch=32.0), "ch=32.0"),
    (dict(out_ch=0), "out_ch=0"),
    (dict(ch_mult=()), "ch_mult"),
    (dict(ch_mult="1,2"), "ch_mult='1,2'"),
    (dict(ch_mult=(1, 0)), "ch_mult=0"),
    (dict(ch_mult=2), "ch_mult=2"),
    (dict(num_res_blocks=0), "num_res_blocks=0"),
    (dict(num_res_blocks=True), "num_res_blocks=True"),
    (dict(attn_resolutions=(4,)), "attn_resolutions has 4, .* 16, 8"),
    (dict(attn_resolutions="16,8"), "attn_resolutions='16,8'"),
    (dict(attn_resolutions=("16",)), "attn_resolutions has '16'"),
    (dict(attn_resolutions=8), "attn_resolutions=8"),
    (dict(attn_resolutions=None), "attn_resolutions=None"),
    (dict(dropout=1.5), "dropout"),
    (dict(in_channels=0), "in_channels=0"),
    (dict(resolution=1, attn_resolutions=()), "resolution=1 .* halved 1 times"),
    (dict(resolution=(16, 16)), "resolution"),
    (dict(attn_type="none", use_linear_attn=True), "use_linear_attn=True and attn_type='none'"),
    (dict(attn_type="nope"), "attn_type='nope'"),
    (dict(dims=0), "dims=0"),
]


class TestErrors:
    @pytest.mark.bad_input
    @pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            small(**arguments)

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("options", "inputs", "message"),
        [
            ({}, dict(x=torch.randn(1, 3, 8, 8)), "needs the times t"),
            ({}, dict(x=torch.randn(2, 3, 8, 8), t=[1, 2, 3]), "t must be one number, or one for each of the 2 examples"),
            ({}, dict(x=torch.randn(2, 3, 8, 8), t=torch.ones(2, 1)), "t must be one number"),
            ({}, dict(x=torch.randn(1, 4, 8, 8), t=1), "x has 4 channels, .* in_channels=3"),
            ({}, dict(x=torch.randn(1, 3, 8), t=1), "x must be .*2 axes of space"),
            ({}, dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), t=1), "uint8"),
            ({}, dict(x=torch.randn(1, 3, 8, 1), t=1), "must be 2 or longer"),
            ({}, dict(x=torch.randn(1, 3, 8, 8), t=1, context=torch.randn(1, 1, 8, 8)), "x has 4 channels"),
            ({"in_channels": 4}, dict(x=torch.randn(1, 3, 8, 8), t=1), "x has 3 channels, .* in_channels=4"),
            ({"in_channels": 4}, dict(x=torch.randn(1, 3, 8, 8), t=1, context=torch.randn(1, 1, 4, 4)), "context must be"),
            ({"use_timestep": False}, dict(x=torch.randn(1, 3, 8, 8), t=1), "takes no t"),
        ],
    )
    def test_forward(self, options, inputs, message):
        with pytest.raises(ValueError, match=message):
            small(**options)(**inputs)

    def test_helpers(self):
        assert check_whole("n", 3) == 3 and attention_levels("a", {8}, [16, 8]) == [False, True]
        with pytest.raises(ValueError, match="n=1 must be a whole number of at least 2"):
            check_whole("n", 1, least=2)
        assert check_probability("p", 1) == 1.0
        for value in (-0.1, 1.1, float("nan"), True, "x", None):
            with pytest.raises(ValueError, match=f"p={value!r} must be a probability"):
                check_probability("p", value)
        assert check_positive("p", 1) == 1.0 and check_positive("p", 0.5, most=0.5) == 0.5
        for value in (0, -1.0, 2.1, float("nan"), True, "x", None):
            with pytest.raises(ValueError, match=f"p={value!r} must be positive and at most 2, a number"):
                check_positive("p", value, most=2)
        with pytest.raises(ValueError, match="width gives a level of 16 channels.*: 32$"):
            check_groups("width", [32, 16])
        check_map(torch.randn(1, 3, 4), 3, dims=1)
        assert per_example("t", 3, torch.randn(2, 1, 4)).tolist() == [3, 3]


BAD = {  # one of them may be put among arguments that fit
    "ch": 40,
    "out_ch": 0,
    "ch_mult": (1, 0),
    "num_res_blocks": 0,
    "attn_resolutions": (5,),
    "dropout": 1.5,
    "in_channels": -1,
    "resolution": 1,
    "attn_type": "nope",
    "dims": 0,
}


@st.composite
def draws(draw) -> tuple[dict, tuple[int, ...], bool]:
    """Arguments that fit together, an input size, and whether a time is given; in some cases one argument is replaced by one of `BAD`."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    levels, resolution = one_of(1, 2, 2, 3), one_of(16, 8, 12, 17)
    reached = [resolution // 2**i for i in range(levels)]
    linear = one_of(False, False, True)
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
        use_timestep=one_of(True, False),
        use_linear_attn=linear,
        attn_type=one_of("vanilla", "linear") if linear else one_of("vanilla", "linear", "none"),
        dims=one_of(2, 2, 2, 2, 1, 3),
    )
    if one_of(False, False, False, True):
        name = one_of(*BAD)
        arguments[name] = BAD[name]
    size = tuple(one_of(4, 5, 6) for _ in range(max(arguments["dims"], 1)))
    return arguments, size, one_of(*[True] * 9, False)


def explore(number: int) -> Counter:
    """Build, run forward and backward, `number` times; anything but a result or a clear error fails."""
    tally = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(draws())
    def draw(case):
        arguments, size, give_time = case
        try:
            model = Model(**arguments)
            x = torch.randn(2, arguments["in_channels"], *size, requires_grad=True)
            out = model(x, [3, 500] if give_time and arguments["use_timestep"] else None)
        except (ValueError, TypeError) as error:
            tally["refused"] += 1
            assert any(name in str(error) for name in [*ARGUMENTS, "t"]), error
            return
        tally["valid"] += 1
        assert out.shape == (2, arguments["out_ch"], *size)
        assert_reaches_everything(model, x, out)

    draw()
    return mostly_valid(tally)


class TestExplore:
    def test_some(self):
        assert explore(20)["refused"] > 0

    @pytest.mark.slow
    def test_many(self):
        assert explore(600).total() >= 500
