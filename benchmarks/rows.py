"""The rows of the table: what is measured, and how each library does it with the same weights or the same number of parameters."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch
from measure import fill
from torch import Tensor, nn
from torch.nn import functional as F

from unet_course.clip import CLIPTextModel, small_tokenizer
from unet_course.diffusion import Schedule
from unet_course.latent_diffusion import VAES, CoordConv, TextToImage, t2i_recipe
from unet_course.sampling import choose_steps
from unet_course.stable_diffusion import PARTS, SD1, diffusers_slots, unet_to_diffusers
from unet_course.unet import UNetModel
from unet_course.vae import AutoencoderKL

SMALL = dict(image_size=32, in_channels=3, out_channels=3, model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=4,
             use_spatial_transformer=True, context_dim=64)  # fmt: skip
TINY = SMALL | dict(image_size=8, model_channels=32, channel_mult=(1, 2), attention_resolutions=(2,))
LUCIDRAINS = "denoising-diffusion-pytorch"
LUCIDRAINS_UNETS = {"small": dict(dim=48, dim_mults=(1, 2, 4)), "tiny": dict(dim=8, dim_mults=(1, 2))}
PEER_MODULES = {"ours": "unet_course", "diffusers": "diffusers", "transformers": "transformers", LUCIDRAINS: "denoising_diffusion_pytorch"}


@dataclass
class Side:
    """One of those who are compared."""

    network: nn.Module  # In float32
    inputs: tuple[Tensor, ...]  # What it is called with
    call: Callable[..., object] = lambda network, *inputs: network(*inputs)
    hot: nn.Module | None = None  # What `torch.compile` is given; None: the network
    autocast: bool = False  # Computes in bfloat16 with weights in float32: its layers cannot be cast

    def __post_init__(self):
        self.hot = self.hot or self.network


@dataclass(frozen=True)
class Row:
    """What is measured."""

    what: str  # For the table
    build: Callable[[str, nn.Module | None], Side]  # Called as build(who, ours): ours, or None where weights do not matter
    peers: tuple[str, ...] = ("diffusers",)  # Against whom
    train: bool = False  # A step of training instead of a call
    quick: bool = False  # Whether --quick measures it
    same: tuple[str, ...] = field(default=("diffusers", "transformers"))  # Those who have the same weights, so that answers can be compared

    def sides(self) -> tuple[str, ...]:
        """Ours, and those peers that are installed."""
        return tuple(who for who in ("ours", *self.peers) if find_spec(PEER_MODULES[who]))


def give_weights(ours: nn.Module | None, theirs: nn.Module, part: str, config: dict) -> None:
    """Copy each of our tensors to where diffusers has it; every one of theirs has to be met."""
    if ours is None:
        return
    mine, target = ours.state_dict(), theirs.state_dict()
    ways = diffusers_slots(dict.fromkeys(PARTS, ()) | {part: mine}, SD1 | {part: config})[part]
    way = next((way for way in ways if {slot.key for slot in way.values()} == target.keys()), None)
    if way is None:
        raise RuntimeError(f"the names of {part} have changed: {sorted({s.key for s in ways[0].values()} ^ target.keys())[:4]} …")
    with torch.no_grad():
        for name, weight in mine.items():
            target[way[name].key].copy_(weight.reshape(target[way[name].key].shape))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The same for everyone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class DiffusersUNet(nn.Module):
    """Diffusers' `UNet2DConditionModel`, called like ours."""

    def __init__(self, config: dict):
        from diffusers import UNet2DConditionModel

        super().__init__()
        settings = {key: value for key, value in unet_to_diffusers(config).items() if key != "_class_name"}
        if config.get("use_scale_shift_norm"):
            settings["resnet_time_scale_shift"] = "scale_shift"
        self.unet = UNet2DConditionModel(**settings)

    def forward(self, x: Tensor, times: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, times, context, return_dict=False)[0]


def lucidrains(size: str) -> nn.Module:
    """The U-Net of denoising-diffusion-pytorch with about as many parameters; torchvision and pytorch-fid, which it also imports, are not needed for that."""
    from training import lucidrains as classes

    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        return classes()[0](**LUCIDRAINS_UNETS[size], flash_attn=True)


def unet(config: dict, batch: int, side: int, who: str, ours: nn.Module | None, words: int = 77, size: str = "small") -> Side:
    """A U-Net on noise."""
    x, times = noise(batch, config["in_channels"], side, side), torch.full((batch,), 500)
    if who == LUCIDRAINS:
        return Side(lucidrains(size), (x, times), autocast=True)
    inputs = x, times, noise(batch, words, config["context_dim"], seed=1)
    if who == "ours":
        return Side(fill(UNetModel(**config)), inputs)
    theirs = DiffusersUNet(config)
    give_weights(ours, theirs.unet, "unet", config)
    return Side(theirs, inputs)


def decoder(who: str, ours: nn.Module | None, side: int = 64, **changes: object) -> Side:
    """Stable Diffusion's VAE: latents to a picture."""
    config, z = SD1["vae"] | changes, noise(1, 4, side, side)
    if who == "ours":
        network = fill(AutoencoderKL(**config))
        return Side(network, (z,), AutoencoderKL.decode, network.decoder)
    import diffusers

    levels = len(config["ch_mult"])
    theirs = diffusers.AutoencoderKL(
        block_out_channels=[config["ch"] * m for m in config["ch_mult"]], layers_per_block=config["num_res_blocks"], latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip
    give_weights(ours, theirs, "vae", config)
    return Side(theirs, (z,), lambda network, z: network.decode(z, return_dict=False)[0], theirs.decoder)


def their_text(config: dict, ours: nn.Module | None) -> nn.Module:
    """The text model of transformers with our weights."""
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs

    names = dict(vocab_size="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", length="max_position_embeddings",
                 mlp_width="intermediate_size", activation="hidden_act")  # fmt: skip
    settings = {"mlp_width": 4 * config["width"], "activation": "quick_gelu"} | config
    special = dict(bos_token_id=config["vocab_size"] - 2, eos_token_id=config["vocab_size"] - 1)
    theirs = Theirs(CLIPTextConfig(**{names[key]: value for key, value in settings.items()}, **special))
    give_weights(ours, theirs, "text", config)
    return theirs


def text(who: str, ours: nn.Module | None, batch: int = 2, **changes: object) -> Side:
    """Stable Diffusion's text model on two prompts of 77 tokens, as guidance needs them."""
    config = SD1["text"] | changes
    tokens = torch.randint(1, config["vocab_size"] - 2, (batch, config["length"]), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = config["vocab_size"] - 2, config["vocab_size"] - 1
    if who == "ours":
        return Side(fill(CLIPTextModel(**config)), (tokens,))
    return Side(their_text(config, ours), (tokens,), lambda network, tokens: network(tokens).last_hidden_state)


PROMPTS = [
    "a large red circle above a small blue ring", "a small green cross at the top left", "a large yellow triangle",
    "a small white square left of a large cyan diamond",
]  # fmt: skip
STEPS, GUIDANCE = 20, 3.0


class DiffusersWalk(nn.Module):
    """The course's text-to-image model from parts of diffusers and transformers, in a loop like `StableDiffusionPipeline`'s.

    U-Net, text model and scheduler (DPM-Solver++ 2M, at our noise levels) are theirs; tokens, noise, the U-Net's first layer (it is told where it is,
    for which they have nothing) and the small VAE are ours.
    """

    def __init__(self, ours: TextToImage | None):
        from diffusers import DPMSolverMultistepScheduler

        super().__init__()
        config = ours.config if ours else t2i_recipe("shapes")
        self.unet, self.text = DiffusersUNet(config["unet"]), their_text(config["text"], ours and ours.text)
        self.unet.unet.conv_in = CoordConv(config["unet"]["in_channels"], config["unet"]["model_channels"])
        give_weights(ours and ours.unet, self.unet.unet, "unet", config["unet"])
        self.vae, self.tokenizer, self.length = VAES[config["vae"]](), small_tokenizer(), config["text"]["length"]
        self.scale = ours.scale_factor if ours else 1.0
        schedule = Schedule.flow(**config["schedule"])
        self.sigmas = schedule.sigmas[choose_steps(schedule, STEPS)]
        self.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config["schedule"]["shift"])
        self.shape = (config["unet"]["in_channels"], *[config["unet"]["image_size"]] * 2)

    def start(self, prompts: list[str]) -> Tensor:
        """The scheduler at its beginning, and noise."""
        self.scheduler.set_timesteps(STEPS)
        self.scheduler.sigmas = torch.cat([self.sigmas, torch.zeros(1)]).float()
        self.scheduler.timesteps = 1000 * self.sigmas.float()
        return torch.stack([noise(*self.shape, seed=seed) for seed in range(len(prompts))])

    def forward(self, prompts: list[str]) -> Tensor:
        weight = next(self.unet.parameters())
        tokens = self.tokenizer([""] * len(prompts) + prompts, length=self.length).to(weight.device)
        context = self.text(tokens).last_hidden_state
        x = self.start(prompts).to(weight)
        for t in self.scheduler.timesteps:
            uncond, cond = self.unet(torch.cat([x, x]), t.to(weight.device), context).chunk(2)
            x = self.scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        return self.vae.decode(x / self.scale).clamp(-1, 1)


def picture(number: int, who: str, ours: nn.Module | None) -> Side:
    """Prompts to pictures, 20 steps, guided."""
    prompts = (PROMPTS * number)[:number]
    if who == "ours":
        model = TextToImage.from_pretrained("shapes")
        return Side(model, (), lambda network: network(prompts, steps=STEPS, guidance=GUIDANCE), model.unet)
    walk = DiffusersWalk(ours)
    return Side(walk, (), lambda network: network(prompts), walk.unet)


ROWS = {
    "unet-sd1-32": Row("U-Net of SD 1.x, 32² latents", partial(unet, SD1["unet"], 1, 32)),
    "unet-sd1-64": Row("U-Net of SD 1.x, 64² latents", partial(unet, SD1["unet"], 1, 64)),
    "unet-5m": Row("U-Net of 5 M, 16 pictures of 32²", partial(unet, SMALL, 16, 32), ("diffusers", LUCIDRAINS), quick=True),
    "train-5m": Row("training step of the same", partial(unet, SMALL, 16, 32), ("diffusers", LUCIDRAINS), train=True, quick=True),
    "train-sd1-32": Row("training step of SD 1.x, 32² latents", partial(unet, SD1["unet"], 1, 32), train=True),
    "picture": Row("text to picture, 20 steps, guided", partial(picture, 1), quick=True),
    "pictures-16": Row("the same, 16 pictures", partial(picture, 16)),
    "decode-512": Row("VAE of SD 1.x, decode 512²", decoder),
    "clip-text": Row("CLIP text model of SD 1.x, 2 × 77 tokens", text, ("transformers",)),
}
HIDDEN = {  # for the tests
    "tiny": Row("a tiny U-Net", partial(unet, TINY, 2, 8, words=5, size="tiny"), ("diffusers", LUCIDRAINS)),
    "tiny-train": Row("its training step", partial(unet, TINY, 2, 8, words=5, size="tiny"), train=True),
    "tiny-decode": Row("a tiny VAE", partial(decoder, side=8, ch=32)),
    "tiny-text": Row("a tiny text model", partial(text, vocab_size=100, width=32, layers=1, heads=2, mlp_width=64), ("transformers",)),
}
IMPORTS = {  # statement: module that has to be installed
    "import torch": "torch",
    "import unet_course": "unet_course",
    "from unet_course import UNetModel": "unet_course",
    "import diffusers": "diffusers",
    "from diffusers import UNet2DConditionModel": "diffusers",
    "from denoising_diffusion_pytorch import Unet": "denoising_diffusion_pytorch",
}


def job(side: Side, train: bool) -> Callable[[], object]:
    """What is timed: a call without gradients, or forward, mean squared error, backward and plain SGD, which keeps no state."""
    weight = next(side.network.parameters())
    precision = partial(torch.autocast, weight.device.type, torch.bfloat16, enabled=side.autocast and side.inputs[0].dtype == torch.bfloat16)
    if not train:
        side.network.eval()

        @torch.no_grad()
        def run() -> object:
            with precision():
                return side.call(side.network, *side.inputs)

        return run
    side.network.train().requires_grad_(True)
    optimizer = torch.optim.SGD(side.network.parameters(), lr=1e-6)

    def step() -> None:
        with precision():
            answer = side.call(side.network, *side.inputs)
        F.mse_loss(answer.float(), side.inputs[0].float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def warm_imports() -> None:
    """Load whatever any of them needs, so that its size counts for nobody."""
    from importlib import import_module

    for module in ("unet_course.cli", "unet_course.speed", *PEER_MODULES.values()):
        if find_spec(module) and module != PEER_MODULES[LUCIDRAINS]:
            import_module(module)
    if "diffusers" in sys.modules:
        from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401
    if find_spec(PEER_MODULES[LUCIDRAINS]):
        from training import lucidrains as classes

        classes()
