"""The OpenAI / Stable Diffusion U-Net: official names, equal to diffusers', every argument does something, wrong ones are named."""

import copy
import inspect
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mappings import openai_rules, rename
from probing import assert_reaches_everything, mostly_valid
from torch import nn

from unet_course.attention import ATTENTION, register_attention
from unet_course.ddpm_unet import Level
from unet_course.resblock import Normalize, ResBlock
from unet_course.unet import TimestepEmbedSequential, UNetModel, count_heads, plan_levels
from unet_course.workbench import compare, count_parameters, randomize, relative_error

SMALL = dict(
    image_size=16,
    in_channels=3,
    model_channels=32,
    out_channels=3,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_heads=2,
)
TEXT = dict(use_spatial_transformer=True, context_dim=8)
SD = dict(image_size=64, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=2, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4])
SD1 = dict(**SD, num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=768, use_checkpoint=True, legacy=False)
SD2 = dict(**SD, num_head_channels=64, use_spatial_transformer=True, use_linear_in_transformer=True, context_dim=1024, legacy=False)
GUIDED = dict(in_channels=3, out_channels=6, num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True, num_classes=1000)
ARGUMENTS = list(inspect.signature(UNetModel).parameters)


@pytest.fixture(autouse=True)
def one_thread(request):
    """Networks as small as these lose time with a second thread, and much of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(threads)


def small(**changes) -> UNetModel:
    return UNetModel(**{**SMALL, **changes})


def on_meta(**arguments) -> UNetModel:
    with torch.device("meta"):
        return UNetModel(**arguments)


class TestNames:
    @pytest.mark.parametrize(("config", "parameters"), [(SD1, 859_520_964), (SD2, 865_910_724)], ids=["SD 1.x", "SD 2.x"])
    def test_stable_diffusion(self, config, parameters):
        model = on_meta(**config)
        assert len(model.state_dict()) == 686 and count_parameters(model) == parameters

    def test_stable_diffusion_keys(self):
        names = on_meta(**SD1).state_dict()
        for name in (
            "time_embed.0.weight",
            "time_embed.2.bias",
            "input_blocks.0.0.weight",
            "input_blocks.1.0.in_layers.0.weight",
            "input_blocks.1.0.emb_layers.1.weight",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias",
            "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight",
            "input_blocks.3.0.op.weight",
            "input_blocks.4.0.skip_connection.weight",
            "input_blocks.9.0.op.bias",
            "middle_block.1.proj_in.weight",
            "output_blocks.2.1.conv.weight",
            "output_blocks.5.2.conv.weight",
            "output_blocks.8.2.conv.weight",
            "output_blocks.11.1.norm.weight",
            "out.0.weight",
            "out.2.bias",
        ):
            assert name in names, name

    def test_skip_plan(self):
        """Decoder + skip → out, as COMPATIBILITY.md lists it."""
        blocks = [b[0] for b in on_meta(**SD1).output_blocks]
        plan = [*[(2560, 1280)] * 5, (1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320), *[(640, 320)] * 2]
        assert [(b.channels, b.out_channels) for b in blocks] == plan

    @pytest.mark.parametrize(
        ("config", "millions"),
        [
            (dict(image_size=64, model_channels=192, num_res_blocks=3, channel_mult=(1, 2, 3, 4), attention_resolutions=(2, 4, 8)), 296),
            (dict(image_size=128, model_channels=256, num_res_blocks=2, channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(4, 8, 16)), 422),
            (dict(image_size=256, model_channels=256, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32)), 554),
            (dict(image_size=512, model_channels=256, num_res_blocks=2, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32, 64)), 559),
        ],
        ids=["64", "128", "256", "512"],
    )
    def test_guided_diffusion(self, config, millions):
        """The sizes that Dhariwal and Nichol (2021) print."""
        model = on_meta(**config, **{**GUIDED, "num_classes": None if config["image_size"] == 256 else 1000})
        assert abs(count_parameters(model) / 1e6 - millions) < 1.5

    def test_guided_diffusion_keys(self):
        model = on_meta(
            image_size=512, model_channels=256, num_res_blocks=2, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32, 64), **GUIDED
        )
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert shapes["label_emb.weight"] == (1000, 1024) and shapes["time_embed.0.weight"] == (1024, 256)
        assert shapes["input_blocks.0.0.weight"] == (128, 3, 3, 3) and shapes["out.2.weight"] == (6, 128, 3, 3)
        assert shapes["input_blocks.3.0.in_layers.2.weight"] == (128, 128, 3, 3)  # a residual block where `op` was
        assert shapes["input_blocks.3.0.emb_layers.1.weight"] == (256, 1024)  # twice as many: scale and shift
        assert shapes["input_blocks.13.1.qkv.weight"] == (1536, 512, 1)
        assert shapes["middle_block.1.proj_out.weight"] == (1024, 1024, 1)
        assert shapes["output_blocks.2.2.out_layers.3.weight"] == (1024, 1024, 3, 3)
        assert not [n for n in shapes if ".op." in n or n.endswith(".conv.weight")]


def diffusers_text(blocks: int, channels: tuple[int, ...], heads, **options) -> nn.Module:
    """Diffusers' text-conditioned U-Net, without attention at its lowest level."""
    diffusers = pytest.importorskip("diffusers")
    low = len(channels) - 1
    return diffusers.UNet2DConditionModel(
        layers_per_block=blocks,
        block_out_channels=channels,
        attention_head_dim=heads,
        down_block_types=("CrossAttnDownBlock2D",) * low + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * low,
        **options,
    )


NARROW = dict(image_size=64, in_channels=4, model_channels=64, out_channels=4, use_spatial_transformer=True, context_dim=24, legacy=False)
TWO = dict(**NARROW, num_res_blocks=2, attention_resolutions=[1], channel_mult=[1, 2])
PAIRS = {  # name: ours, diffusers', how large the input is
    "SD 1.x": (
        dict(**NARROW, num_res_blocks=1, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 2, 2], num_heads=8),
        dict(blocks=1, channels=(64, 128, 128, 128), heads=8),
        (8, 16),
    ),
    "SD 2.x": (
        dict(**TWO, num_head_channels=32, use_linear_in_transformer=True),
        dict(blocks=2, channels=(64, 128), heads=(2, 4), use_linear_projection=True),
        (4, 8),
    ),
    "odd sizes": (dict(**TWO, num_heads=4), dict(blocks=2, channels=(64, 128), heads=4), (5, 9)),
    "deep": (
        dict(**{**TWO, "num_res_blocks": 1}, num_heads=4, transformer_depth=[2, 1]),
        dict(blocks=1, channels=(64, 128), heads=4, transformer_layers_per_block=(2, 1)),
        (4, 6),
    ),
    "scale and shift": (
        dict(**{**TWO, "num_res_blocks": 1}, num_heads=4, use_scale_shift_norm=True),
        dict(blocks=1, channels=(64, 128), heads=4, resnet_time_scale_shift="scale_shift"),
        (4, 6),
    ),
    "classes": (
        dict(**{**TWO, "num_res_blocks": 1}, num_heads=4, num_classes=5),
        dict(blocks=1, channels=(64, 128), heads=4, num_class_embeds=5),
        (4, 6),
    ),
    "a number": (
        dict(**{**TWO, "num_res_blocks": 1}, num_heads=4, num_classes="continuous"),
        dict(blocks=1, channels=(64, 128), heads=4, class_embed_type="simple_projection", projection_class_embeddings_input_dim=1),
        (4, 6),
    ),
}


class TestParity:
    @pytest.mark.parametrize("name", PAIRS)
    def test_with_text(self, name):
        ours, theirs, size = PAIRS[name]
        ours, reference = UNetModel(**ours), diffusers_text(**theirs, cross_attention_dim=24)
        names = rename(dict(ours.named_parameters()), openai_rules(len(ours.plan), ours.plan[0].blocks))
        inputs = [torch.randn(2, 4, *size), torch.tensor([3, 871]), torch.randn(2, 7, 24)]
        if name == "classes":
            inputs.append(torch.tensor([4, 0]))
        if name == "a number":
            inputs.append(torch.tensor([[0.3], [-2.0]]))

        def call(x, t, context, y=None):
            return reference(x, t, context, class_labels=y).sample

        result = compare(ours, reference, tuple(inputs), names, call)
        assert result, result

    def test_guided_diffusion(self):
        """OpenAI's layout, with residual blocks that resample, against diffusers' (which splits qkv)."""
        diffusers = pytest.importorskip("diffusers")
        ours = randomize(
            UNetModel(
                16, 3, 64, 6, 1, (2,), channel_mult=(1, 2), num_head_channels=32, resblock_updown=True, use_scale_shift_norm=True, num_classes=7
            )
        )
        reference = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(64, 128),
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=7,
            upsample_type="resnet",
            downsample_type="resnet",
            attn_norm_num_groups=32,
        )
        updown = [(r"^input_blocks\.2\.0\.", "down_blocks.0.downsamplers.0."), (r"^output_blocks\.1\.2\.", "up_blocks.0.upsamplers.0.")]
        attention = [(r"(attentions\.\d)\.norm", r"\1.group_norm"), (r"(attentions\.\d)\.proj_out", r"\1.to_out.0")]
        state = {}
        for name, new in rename(dict(ours.named_parameters()), updown + openai_rules(levels=2, blocks=1) + attention).items():
            value = ours.get_parameter(name)
            if ".qkv." in name:
                parts = value.squeeze().unflatten(0, (-1, 3, 32)).movedim(1, 0).flatten(1, 2)  # [head, 3, dim]
                state |= {new.replace("qkv", f"to_{part}"): v for part, v in zip("qkv", parts)}
            else:
                state[new] = value.squeeze(-1) if "to_out" in new and value.ndim == 3 else value
        reference.load_state_dict(state, strict=True)
        x, t, y = torch.randn(2, 3, 8, 12, requires_grad=True), torch.tensor([10, 700]), torch.tensor([6, 0])
        twin = x.detach().clone().requires_grad_()
        a, b = ours(x, t, y=y), reference(twin, t, class_labels=y).sample
        assert relative_error(a, b) < 1e-5
        a.square().sum().backward()
        b.square().sum().backward()
        assert relative_error(x.grad, twin.grad) < 1e-4
        assert relative_error(ours.out[2].weight.grad, reference.conv_out.weight.grad) < 1e-4
        assert relative_error(ours.input_blocks[0][0].weight.grad, reference.conv_in.weight.grad) < 1e-4

    @pytest.mark.slow
    def test_stable_diffusion_in_full(self):
        ours, reference = randomize(UNetModel(**SD1)).eval(), diffusers_text(2, (320, 640, 1280, 1280), 8, cross_attention_dim=768).eval()
        names = rename(dict(ours.named_parameters()), openai_rules(levels=4, blocks=2))
        theirs = dict(reference.named_parameters())
        with torch.no_grad():
            for n, p in ours.named_parameters():
                theirs[names[n]].copy_(p)
            inputs = torch.randn(1, 4, 16, 24), torch.tensor([981]), torch.randn(1, 77, 768)
            assert relative_error(ours(*inputs), reference(*inputs).sample) < 1e-5


class TestForward:
    @pytest.mark.slow
    def test_the_fields_example(self):
        model = UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=(1, 2, 4, 4),
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=1,
            context_dim=768,
            use_checkpoint=True,
            legacy=False,
            use_fp16=True,
            resblock_updown=True,
            use_scale_shift_norm=True,
            num_classes=10,
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def run(batch, size):
            inputs = torch.randn(batch, 4, size, size), torch.randint(0, 1000, (batch,)), torch.randn(batch, 77, 768), torch.randint(0, 10, (batch,))
            with torch.no_grad():
                out = model.to(device)(*(i.to(device) for i in inputs))
            assert out.shape == (batch, 4, size, size) and out.dtype == torch.float32 and out.isfinite().all()

        if device == "cpu":  # PyTorch convolves so slowly in float16 there that the whole example would take most of an hour
            run(1, 16)
            model.convert_to_fp32()
        run(4, 64)

    def test_the_fields_example_narrow(self):
        options = {**SD1, "model_channels": 32, "context_dim": 24, "use_fp16": True, "resblock_updown": True, "use_scale_shift_norm": True, "num_classes": 10}
        model = UNetModel(**options)
        out = model(torch.randn(2, 4, 8, 8), timesteps=torch.tensor([5, 999]), context=torch.randn(2, 77, 24), y=torch.tensor([0, 9]))
        assert out.shape == (2, 4, 8, 8) and out.dtype == torch.float32 and out.isfinite().all()

    @pytest.mark.parametrize("options", [{}, {"conv_resample": False}, {"resblock_updown": True}], ids=["conv", "pool", "resblock"])
    @pytest.mark.parametrize("size", [(7, 16), (5, 9), (2, 3)])
    def test_odd_sizes(self, size, options):
        x = torch.randn(2, 3, *size, requires_grad=True)
        out = small(**options)(x, 5)
        out.square().sum().backward()
        assert out.shape == x.shape and x.grad.isfinite().all()

    def test_single_pixel(self):
        x = torch.randn(2, 3, 1, 1)
        assert small()(x, 5).shape == x.shape
        with pytest.raises(ValueError, match="must be 2 or longer"):
            small(conv_resample=False)(x, 5)

    @pytest.mark.parametrize(("dims", "size"), [(1, (18,)), (2, (6, 9)), (3, (4, 3, 5)), (4, (2, 3, 2, 4))])
    @pytest.mark.parametrize("options", [{}, TEXT, {"resblock_updown": True}], ids=["attention", "text", "resblock"])
    def test_dims(self, dims, size, options):
        x = torch.randn(1, 3, *size)
        assert small(dims=dims, **options)(x, 5, torch.randn(1, 2, 8) if options is TEXT else None).shape == x.shape

    def test_text_of_any_length(self):
        model, x = randomize(small(**TEXT)), torch.randn(2, 3, 8, 8)
        for words in (1, 2, 77):
            assert model(x, 5, torch.randn(2, words, 8)).shape == x.shape

    def test_text_that_does_not_matter(self):
        """A word said twice changes nothing, nor does the order."""
        model, x, words = randomize(small(**TEXT)), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8)
        assert relative_error(model(x, 5, words), model(x, 5, words.repeat(1, 2, 1))) < 1e-5
        assert relative_error(model(x, 5, words), model(x, 5, words.flip(1))) < 1e-5
        assert relative_error(model(x, 5, words), model(x, 5, -words)) > 1e-3

    def test_a_text_for_each_depth(self):
        model, x = randomize(small(use_spatial_transformer=True, transformer_depth=2, context_dim=[8, 6])), torch.randn(1, 3, 8, 8)
        words = torch.randn(1, 3, 8), torch.randn(1, 5, 6)
        out = model(x, 5, words)
        assert relative_error(model(x, 5, [words[0], -words[1]]), out) > 1e-4

    def test_times_and_labels_in_every_form(self):
        model, x = randomize(small(num_classes=4)), torch.randn(2, 3, 8, 8)
        out = model(x, torch.tensor([5, 5]), y=torch.tensor([3, 3]))
        for t, y in ((5, 3), ([5], [3, 3]), (5.0, torch.tensor(3))):
            assert relative_error(model(x, t, y=y), out) < 1e-6
        assert relative_error(model(x, 5, y=[3, 0]), out) > 1e-3

    def test_examples_do_not_mix(self):
        model, x, words = randomize(small(num_classes=3, **TEXT)), torch.randn(3, 3, 8, 8), torch.randn(3, 4, 8)
        alone = torch.cat([model(x[i : i + 1], 10 * i, words[i : i + 1], i) for i in range(3)])
        assert relative_error(model(x, [0, 10, 20], words, [0, 1, 2]), alone) < 1e-5

    def test_starts_at_zero(self):
        """The last convolution starts at zero (its checkpoints overwrite it)."""
        assert small()(torch.randn(1, 3, 8, 8), 5).eq(0).all()

    def test_copies(self):
        model, x = randomize(small()), torch.randn(1, 3, 8, 8)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert relative_error(twin(x, 5), model(x, 5)) == 0

    def test_input_is_left_alone(self):
        inputs = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 2, 8)
        kept = [i.clone() for i in inputs]
        randomize(small(**TEXT))(*inputs)
        assert all(torch.equal(i, k) for i, k in zip(inputs, kept))


class TestPrecision:
    @pytest.mark.parametrize("option", ["use_fp16", "use_bf16"])
    def test_torso(self, option):
        full, model = randomize(small(num_classes=3, **TEXT)), randomize(small(num_classes=3, **TEXT, **{option: True}))
        expected = torch.float16 if option == "use_fp16" else torch.bfloat16
        kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
        assert kinds == {
            "time_embed": torch.float32,
            "label_emb": torch.float32,
            "input_blocks": expected,
            "middle_block": expected,
            "output_blocks": expected,
            "out": torch.float32,
        }
        inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 800]), torch.randn(2, 4, 8), torch.tensor([2, 0])
        out = model(*inputs)
        assert out.dtype == torch.float32 and model.dtype == expected
        assert 0 < relative_error(out, full(*inputs)) < 0.1

    def test_there_and_back(self):
        model = small()
        model.convert_to_fp16()
        assert model.dtype == torch.float16
        model.convert_to_fp32()
        assert model.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_whole(self, dtype):
        """As in `UNetModel(…).half().cuda()`, with inputs of either kind."""
        model, x = randomize(small(**TEXT)), torch.randn(1, 3, 8, 8)
        expected, words = model(x, 5, torch.ones(1, 2, 8)), torch.ones(1, 2, 8)
        model = model.to(dtype)
        assert model(x, 5, words).dtype == torch.float32 and model(x.to(dtype), 5, words.to(dtype)).dtype == dtype
        assert relative_error(model(x, 5, words), expected) < (1e-5 if dtype == torch.float64 else 0.1)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_cuda(self):
        model = randomize(small(**TEXT)).half().cuda()
        out = model(torch.randn(2, 3, 8, 8, device="cuda"), 5, torch.randn(2, 4, 8, device="cuda"))
        assert out.isfinite().all() and out.device.type == "cuda"


def kept(model: nn.Module, *inputs) -> int:
    """How many numbers the forward pass keeps for the backward pass."""
    seen = {}

    def note(tensor):
        seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(*inputs)
    return sum(seen.values()) - sum(p.numel() for p in model.parameters() if p.data_ptr() in seen)


class TestCheckpointing:
    @pytest.mark.parametrize("options", [{}, TEXT], ids=["attention", "text"])
    def test_memory_and_gradients(self, options):
        inputs = (torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 4, 8) if options else None)
        plain, saving = (randomize(small(use_checkpoint=u, **options)) for u in (False, True))
        assert kept(saving, *inputs) < 0.6 * kept(plain, *inputs)
        for model in (plain, saving):
            model(*inputs).square().sum().backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
            scale = a.grad.norm().item()
            assert (a.grad - b.grad).norm().item() <= 1e-4 * scale + 1e-5, name


def signs(model: UNetModel, *inputs) -> tuple:
    """What a change of an argument may change: the parameters, or what comes out."""
    randomize(model)
    torch.manual_seed(0)
    return {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}, model(*inputs)


CHANGES = {  # argument: (its other value, what else is needed for it to matter)
    "image_size": (32, {}),
    "in_channels": (4, {}),
    "model_channels": (64, {}),
    "out_channels": (4, {}),
    "num_res_blocks": ((1, 2), {}),
    "attention_resolutions": ((1,), {}),
    "dropout": (0.5, {}),
    "channel_mult": ((1, 3), {"num_heads": 1}),
    "conv_resample": (False, {}),
    "dims": (1, {}),
    "num_classes": (5, {}),
    "use_checkpoint": (True, {}),
    "use_fp16": (True, {}),
    "num_heads": (4, {}),
    "num_head_channels": (8, {}),
    "num_heads_upsample": (4, {}),
    "use_scale_shift_norm": (True, {}),
    "resblock_updown": (True, {}),
    "use_new_attention_order": (True, {}),
    "use_spatial_transformer": (True, {}),
    "transformer_depth": (2, TEXT),
    "context_dim": (4, TEXT),
    "n_embed": (8, {}),
    "legacy": (False, {"num_heads_upsample": 4}),
    "disable_self_attentions": ([False, True], {**TEXT, "context_dim": 4}),
    "num_attention_blocks": ([0, 1], {}),
    "disable_middle_self_attn": (True, {**TEXT, "context_dim": 4}),
    "use_linear_in_transformer": (True, TEXT),
    "use_bf16": (True, {}),
    "attn_type": ("linear", {}),
    "normalize": (Normalize, {}),
    "resblock": (lambda *a, **k: ResBlock(*a, **k).requires_grad_(False), {}),
}


class TestArguments:
    def test_all_are_listed(self):
        assert list(CHANGES) == ARGUMENTS

    @pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("image_size", "n_embed", "use_checkpoint", "normalize", "resblock")])
    def test_each_does_something(self, name):
        value, also = CHANGES[name]
        results = []
        for options in (also, {**also, name: value, **({"context_dim": 8} if name == "use_spatial_transformer" else {})}):
            model = small(**options, **({"num_heads": -1} if "attn_type" in options else {}))
            x = torch.randn((2, model.in_channels, *[8] * model.dims), generator=torch.Generator().manual_seed(0))
            words = None if model.context_dim is None else torch.ones(2, 3, model.context_dim)
            results.append(signs(model, x, 5, words, None if model.num_classes is None else 1))
        (shapes, out), (others, other) = results
        assert shapes != others or relative_error(out, other) > 1e-3

    def test_image_size(self):
        assert small(image_size=32).describe().levels[1].size == (16, 16)
        assert small(image_size=(9, 32)).describe().levels[1].size == (5, 16)
        assert small(image_size=(9, 32), conv_resample=False).describe().levels[1].size == (4, 16)

    def test_legacy_changes_nothing_else(self):
        x = torch.randn(1, 3, 8, 8)
        for options in ({}, {"num_head_channels": 8}, {"use_new_attention_order": True}, TEXT, {**TEXT, "num_head_channels": 8}):
            words = torch.ones(1, 2, 8) if "context_dim" in options else None
            old, new = (randomize(small(legacy=flag, **options))(x, 5, words) for flag in (True, False))
            assert relative_error(old, new) == 0
        plain, old, new = (randomize(small(**o))(x, 5) for o in ({}, {"num_heads_upsample": 4}, {"num_heads_upsample": 4, "legacy": False}))
        assert relative_error(new, plain) == 0 and relative_error(old, plain) > 1e-4

    def test_dropout_only_in_training(self):
        model, x = randomize(small(dropout=0.5)), torch.randn(1, 3, 8, 8)
        assert relative_error(model(x, 5), model(x, 5)) > 1e-3
        model.eval()
        assert relative_error(model(x, 5), model(x, 5)) == 0

    def test_describe(self):
        found = small().describe()
        assert found.levels == (Level("0", (16, 16), 32, 3, 0), Level("1", (8, 8), 64, 3, 3), Level("middle", (8, 8), 64, 2, 1))
        assert found.parameters == count_parameters(small())
        assert small(num_attention_blocks=[1, 1]).describe().levels[1].attention == 2
        assert all(level.attention == 0 for level in small(num_heads=-1, attn_type="none").describe().levels)

    def test_describe_counts_what_is_there(self):
        for options in ({}, {"resblock_updown": True}, {"num_res_blocks": [1, 2]}, {"attention_resolutions": [1, 2], "num_attention_blocks": [1, 0]}):
            model, found = small(**options), small(**options).describe()
            assert sum(level.blocks for level in found.levels) == sum(isinstance(m, ResBlock) for m in model.modules())
            assert sum(level.attention for level in found.levels) == sum(type(m).__name__ == "AttentionBlock" for m in model.modules())


class Doubles(nn.Module):
    """An attention block, or so it says."""

    def __init__(self, in_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.full((in_channels, 1, 1), 2.0))

    def forward(self, x):
        return x * self.scale


class Plain(nn.Module):
    """A residual block that knows only a few of the arguments."""

    def __init__(self, channels, emb_channels, out_channels, **others):
        super().__init__()
        self.conv, self.time, self.others = nn.Conv2d(channels, out_channels, 1), nn.Linear(emb_channels, out_channels), others

    def forward(self, x, temb):
        return self.conv(x) + self.time(temb)[..., None, None]


class TestExtensions:
    def test_attention(self):
        register_attention("doubles")(Doubles)
        try:
            model = small(num_heads=-1, attn_type="doubles")
        finally:
            del ATTENTION["doubles"]
        assert sum(isinstance(m, Doubles) for m in model.modules()) == 4
        assert model(torch.randn(1, 3, 8, 8), 5).shape == (1, 3, 8, 8)

    @pytest.mark.parametrize("options", [{}, TEXT, {"num_heads": -1, "attn_type": "linear"}], ids=["attention", "text", "linear"])
    def test_normalize(self, options):
        model = small(normalize=lambda channels: nn.GroupNorm(4, channels), model_channels=32 if options is TEXT else 20, **options)
        groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
        assert groups == {4}
        x = torch.randn(1, 3, 8, 8)
        assert model(x, 5, torch.ones(1, 2, 8) if options is TEXT else None).shape == x.shape

    @pytest.mark.parametrize("updown", [False, True])
    def test_resblock(self, updown):
        """A block that neither resamples nor is told much; its feature maps are fitted to the skips."""
        model, x = small(resblock=Plain, resblock_updown=updown), torch.randn(2, 3, 8, 8)
        blocks = [m for m in model.modules() if isinstance(m, Plain)]
        assert len(blocks) == 8 + 2 * updown and blocks[0].others["dims"] == 2
        randomize(model)
        assert relative_error(model(x, 5), model(x, 900)) > 1e-4  # it is given the time under its own name for it
        if updown:
            assert [b.others for b in blocks if "up" in b.others or "down" in b.others]

    def test_container(self):
        class Reports(nn.Module):
            def forward(self, x, context):
                return x + context.sum()

        layers = TimestepEmbedSequential(nn.Conv2d(3, 32, 1), ResBlock(32, 8, 0.0), Reports())
        assert layers.wants == [[], ["emb"], ["context"]]
        assert layers(torch.randn(1, 3, 4, 4), torch.randn(1, 8), torch.ones(1, 1, 2)).shape == (1, 32, 4, 4)

    def test_helpers(self):
        assert count_heads(64, 4) == (4, 16) and count_heads(64, 4, 32) == (2, 32)
        plan = plan_levels(32, (1, 2), [1, 3], {2}, transformer_depth=(1, 4))
        assert [p.blocks for p in plan] == [1, 3] and [p.attention for p in plan] == [0, 4] and plan[1].depth == 4


WRONG = [  # arguments, what the message must hold
    (dict(image_size=0), "image_size=0"),
    (dict(image_size=(8, 8, 8)), r"image_size=\(8, 8, 8\) has 3 entries for dims=2"),
    (dict(in_channels=0), "in_channels=0"),
    (dict(model_channels=48), "model_channels=48 .* 32 and 64"),
    (dict(out_channels=-1), "out_channels=-1"),
    (dict(num_res_blocks=0), "num_res_blocks=0"),
    (dict(num_res_blocks=[1, 2, 3]), "num_res_blocks=.* 3 entries for the 2 levels"),
    (dict(num_res_blocks="2"), "num_res_blocks='2'"),
    (dict(attention_resolutions=(4,)), "attention_resolutions has 4, .* 1, 2; leave out"),
    (dict(attention_resolutions="2,1"), "attention_resolutions='2,1'"),
    (dict(attention_resolutions=2), "attention_resolutions=2"),
    (dict(attention_resolutions=None), "attention_resolutions=None"),
    (dict(dropout=-0.1), "dropout"),
    (dict(channel_mult=()), "channel_mult"),
    (dict(channel_mult="1,2"), "channel_mult='1,2'"),
    (dict(channel_mult=(1, -2)), "channel_mult"),
    (dict(channel_mult=2), "channel_mult=2"),
    (dict(dims=0), "dims=0"),
    (dict(num_classes=0), "num_classes=0"),
    (dict(num_classes="many"), "num_classes='many'"),
    (dict(num_heads=-1), "num_heads or num_head_channels must be given"),
    (dict(num_heads=3), "num_heads=3 does not divide the 64 channels.* 2 and 4"),
    (dict(num_head_channels=24), "num_head_channels=24 does not divide"),
    (dict(num_heads_upsample=3), "num_heads=3"),
    (dict(num_heads_upsample=4, num_head_channels=8), "num_heads_upsample has no effect with num_head_channels"),
    (dict(num_heads_upsample=4, **TEXT), "num_heads_upsample has no effect with use_spatial_transformer"),
    (dict(use_new_attention_order=True, **TEXT), "use_new_attention_order has no effect"),
    (dict(use_spatial_transformer=True), "needs context_dim"),
    (dict(context_dim=8), "context_dim has no effect without use_spatial_transformer"),
    (dict(use_spatial_transformer=True, context_dim=0), "context_dim=0"),
    (dict(transformer_depth=2), "transformer_depth has no effect"),
    (dict(transformer_depth=0, **TEXT), "transformer_depth=0"),
    (dict(transformer_depth=[1], **TEXT), "transformer_depth"),
    (dict(n_embed=8), "n_embed=8"),
    (dict(disable_self_attentions=[True, True]), "disable_self_attentions has no effect"),
    (dict(disable_self_attentions=[True], **TEXT), "disable_self_attentions"),
    (dict(disable_self_attentions=[1, 0], **TEXT), "disable_self_attentions"),
    (dict(num_attention_blocks=[0, 2]), "num_attention_blocks=.* exceeds num_res_blocks"),
    (dict(num_attention_blocks=[0]), "num_attention_blocks"),
    (dict(disable_middle_self_attn=True), "disable_middle_self_attn has no effect"),
    (dict(use_linear_in_transformer=True), "use_linear_in_transformer has no effect"),
    (dict(use_fp16=True, use_bf16=True), "use_bf16 has no effect with use_fp16=True"),
    (dict(attn_type="linear"), "num_heads has no effect with attn_type='linear'"),
    (dict(attn_type="nope", num_heads=-1), "attn_type='nope'"),
    (dict(attn_type="linear", **TEXT), "attn_type has no effect with use_spatial_transformer"),
]
PICTURE = torch.randn(2, 3, 8, 8)


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
            ({}, dict(timesteps=[1, 2, 3]), "timesteps must be one number, or one for each of the 2 examples"),
            ({}, dict(x=torch.randn(1, 4, 8, 8)), "x has 4 channels, .* in_channels=3"),
            ({}, dict(x=torch.randn(1, 3, 8)), "x must be .* 2 axes of space"),
            ({}, dict(x=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "uint8"),
            ({}, dict(context=torch.randn(2, 4, 8)), "takes no context"),
            ({}, dict(y=torch.tensor([0, 1])), "takes no y"),
            (TEXT, {}, "needs a context"),
            (TEXT, dict(context=torch.randn(2, 4, 7)), r"context must be \(2, tokens, context_dim=8\), got \(2, 4, 7\)"),
            (TEXT, dict(context=torch.randn(1, 4, 8)), "context must be"),
            (TEXT, dict(context=torch.randn(2, 8)), "context must be"),
            (TEXT, dict(context=torch.randn(2, 0, 8)), "context must be"),
            (TEXT, dict(context=[torch.randn(2, 4, 8)] * 3), "context has 3 entries"),
            (TEXT, dict(context="a dog"), "context must be tensors"),
            ({"num_classes": 4}, {}, "needs labels y"),
            ({"num_classes": 4}, dict(y=torch.tensor([0, 4])), "y must be from 0 to 3"),
            ({"num_classes": 4}, dict(y=torch.tensor([0.0, 1.0])), "y must be whole numbers"),
            ({"num_classes": 4}, dict(y=torch.tensor([0, 1, 2])), "y must be one number, or one for each"),
            ({"num_classes": "continuous"}, dict(y=torch.ones(3)), "y must be one number"),
        ],
    )
    def test_forward(self, options, inputs, message):
        with pytest.raises(ValueError, match=message):
            small(**options)(**{"x": PICTURE, "timesteps": 5, **inputs})


@pytest.mark.bad_input
@pytest.mark.parametrize("y", [[0, 4], 4, -1, torch.tensor([0, 4])], ids=str)
def test_labels_are_looked_at_before_they_travel(y):
    """Labels that lie on the CPU are checked wherever the network is; on a GPU it would be too late."""
    net = small(num_classes=4).to("meta")
    with pytest.raises(ValueError, match="y must be from 0 to 3, got .*(4|-1)"):
        net(PICTURE.to("meta"), 5, y=y)
    assert net(PICTURE.to("meta"), 5, y=[0, 3]).shape == PICTURE.shape


BAD = {  # one of them may be put among arguments that fit
    "image_size": 0,
    "in_channels": 0,
    "model_channels": 20,
    "out_channels": -3,
    "num_res_blocks": [1, 1, 1, 1],
    "attention_resolutions": (3,),
    "dropout": 2.0,
    "channel_mult": (1, 0),
    "dims": 0,
    "num_classes": "three",
    "num_heads": 7,
    "num_head_channels": 5,
    "num_heads_upsample": 7,
    "use_bf16": True,
    "use_new_attention_order": True,
    "transformer_depth": 0,
    "context_dim": 0,
    "n_embed": 3,
    "disable_self_attentions": [True] * 4,
    "num_attention_blocks": [9],
    "attn_type": "nope",
}


@st.composite
def draws(draw) -> dict:
    """Arguments that fit together; in some cases one of them is replaced by one of `BAD`, which may still fit."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    levels = one_of(1, 2, 2, 3)
    factors = [2**i for i in range(levels)]
    width = one_of(32, 32, 32, 32, 64)
    arguments = dict(
        image_size=one_of(8, 13),
        in_channels=one_of(3, 1),
        model_channels=width,
        out_channels=one_of(3, 2),
        num_res_blocks=one_of(1, 1, 2, [1] * levels),
        attention_resolutions=one_of((), factors[-1:], tuple(factors)),
        dropout=one_of(0.0, 0.3),
        channel_mult=tuple(one_of(1, 1, 2) if width == 32 else one_of(0.5, 1, 1.5) for _ in factors),
        conv_resample=one_of(True, False),
        dims=one_of(2, 2, 2, 2, 1, 3),
        num_classes=one_of(None, 3, "continuous"),
        use_checkpoint=one_of(True, False),
        use_fp16=one_of(False, False, False, False, False, True),
        use_scale_shift_norm=one_of(True, False),
        resblock_updown=one_of(True, False),
        legacy=one_of(True, False),
        num_attention_blocks=one_of(None, None, [1] * levels),
        normalize=one_of(None, None, lambda channels: nn.GroupNorm(8, channels)),
        resblock=one_of(ResBlock, lambda *a, **k: ResBlock(*a, **{**k, "use_conv": True})),
    )
    if arguments["dims"] == 3:
        arguments["use_fp16"] = False  # on the CPU, PyTorch has no average over three axes in float16
    kind = one_of("block", "text", "text", "named")
    if kind == "named":
        arguments |= dict(attn_type=one_of("linear", "none", "vanilla"))
    else:
        arguments |= dict(num_heads=one_of(1, 2, 4), num_head_channels=one_of(-1, -1, 16))
    if kind == "block":
        arguments |= dict(use_new_attention_order=one_of(True, False))
        if arguments["num_head_channels"] == -1:
            arguments["num_heads_upsample"] = one_of(-1, 1, 2)
    if kind == "text":
        arguments |= dict(
            use_spatial_transformer=True,
            context_dim=one_of(8, 5),
            transformer_depth=one_of(1, 1, 2, [1] * levels),
            use_linear_in_transformer=one_of(True, False),
            disable_middle_self_attn=one_of(True, False),
            disable_self_attentions=one_of(None, [False] * levels, [True] * levels),
        )
    if one_of(False, False, False, True):
        name = one_of(*BAD)
        arguments[name] = BAD[name]
    return arguments


def explore(number: int) -> Counter:
    """Build, run forward and backward, `number` times; anything but a result or a clear error fails."""
    tally = Counter()
    torch.set_num_threads(1)  # also where it is slow for its number; `one_thread` sets it back

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(draws(), st.lists(st.integers(4, 6), min_size=3, max_size=3))
    def draw(arguments, size):
        size = size[: arguments["dims"]]
        context_dim, classes = arguments.get("context_dim"), arguments["num_classes"]
        try:
            model = UNetModel(**arguments)
            x = torch.randn(2, arguments["in_channels"], *size, requires_grad=True)
            out = model(x, [3, 500], torch.randn(2, 3, context_dim) if context_dim else None, None if classes is None else [1, 0])
        except (ValueError, TypeError) as error:
            tally["refused"] += 1
            assert any(name in str(error) for name in [*ARGUMENTS, "context", "y"]), error
            return
        tally["valid"] += 1
        assert out.shape == (2, arguments["out_channels"], *size) and out.isfinite().all()
        assert_reaches_everything(model, x, out)

    draw()
    return mostly_valid(tally)


class TestExplore:
    def test_some(self):
        assert explore(40)["refused"] > 0

    @pytest.mark.slow
    def test_many(self):
        assert explore(600).total() >= 500
