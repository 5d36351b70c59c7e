"""Training speed on digits against diffusers and denoising-diffusion-pytorch: pictures per second and peak memory.

    pip install --no-deps -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python benchmarks/training.py                 # about four minutes on one thread
    OMP_NUM_THREADS=1 python benchmarks/training.py --rounds 3      # a quick look

Every contestant has 1.7 million parameters (ours and theirs within 2 %), batches of 64 digits, v-prediction on the cosine schedule, AdamW with the same
settings, gradients clipped to 1 and averaged weights (EMA 0.999, updated at each step); no labels. Network, loss, average and sampler are each library's
own. All run in one process in turns.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from measure import alternate, machine, own_peak, peak_memory, summary
from torch import Tensor, nn
from torch.nn import functional as F

from unet_course.data import digits
from unet_course.diffusion import diffusion_loss
from unet_course.sampling import ddim, denoiser, sample
from unet_course.training import DIGITS_SCHEDULE, DIGITS_UNET, EMA, Batches, Folded, Trainer, learning_rate_factor
from unet_course.unet import UNetModel
from unet_course.workbench import count_parameters

BATCH, DECAY, LEARNING_RATE, WARMUP = 64, 0.999, 1e-3, 100
SHAPE = (1, 28, 28)


@cache
def lucidrains() -> tuple[type, type, type]:
    """The package's `Unet`, `GaussianDiffusion` and `EMA`, also where torchvision and pytorch-fid are missing: they serve what is not used here."""
    import accelerate  # noqa: F401  these look for torchvision themselves
    import diffusers  # noqa: F401

    names = ["torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"]
    missing = [name for name in names if find_spec(name.split(".")[0]) is None]
    sys.modules |= {name: MagicMock() for name in missing}
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package
    from ema_pytorch import EMA as Average  # noqa: N811

    for name in missing:
        del sys.modules[name]
    package.tqdm = lambda steps, **_: steps  # no bar while it samples
    return package.Unet, package.GaussianDiffusion, Average


class Contestant:
    """A training: network, loss, average and sampler of a library; the optimiser is the same for all."""

    def __init__(self, network: nn.Module):
        self.network, self.steps = network.train(), 0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)

    def step(self, x: Tensor) -> float:
        """One step of training with these pictures; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(self.steps, WARMUP)
        loss = self.loss(x)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        self.steps += 1
        return loss.item()

    def run(self, batches: Iterator[Tensor], steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.step(next(batches))

    def state(self) -> dict:
        """All that is needed to go on."""
        return dict(network=self.network.state_dict(), optimizer=self.optimizer.state_dict(), average=self.average_state(), steps=self.steps)

    def load(self, state: dict) -> None:
        """Go on."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_average(state["average"])
        self.steps = state["steps"]


class Course(Contestant):
    """Ours, the U-Net of chapter 10 without labels."""

    CONFIG = DIGITS_UNET | {"num_classes": None}

    def __init__(self):
        super().__init__(self.build())
        self.ema = EMA(self.network, DECAY)

    def build(self) -> nn.Module:
        return Folded(UNetModel(**self.CONFIG), factor=2)

    def loss(self, x: Tensor) -> Tensor:
        return diffusion_loss(self.network, x, DIGITS_SCHEDULE, "v")

    def average(self) -> None:
        self.ema.update(self.network)

    def average_state(self) -> dict:
        return {"model": self.ema.model.state_dict(), "updates": self.ema.updates}

    def load_average(self, state: dict) -> None:
        self.ema.model.load_state_dict(state["model"])
        self.ema.updates = state["updates"]

    def sample(self, number: int, steps: int) -> Tensor:
        """DDIM from noise of torch's global generator."""
        return sample(ddim(denoiser(self.ema.model, DIGITS_SCHEDULE, "v", clip=1.0), torch.randn(number, *SHAPE), DIGITS_SCHEDULE, steps))


class CourseUnfolded(Course):
    """Ours with pixels left as they are: the architecture that diffusers' own course gives its U-Net for 28×28 digits."""

    CONFIG = dict(image_size=28, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2,
                  attention_resolutions=(2, 4), num_head_channels=8)

    def build(self) -> nn.Module:
        return UNetModel(**self.CONFIG)


class CourseTrainer(Course):
    """Ours, by `Trainer`: Accelerate, history, guard against NaN, random numbers of its own."""

    def __init__(self):
        network = self.build()
        self.trainer = Trainer(network, lambda model, x, generator: diffusion_loss(model, x, DIGITS_SCHEDULE, "v", generator=generator), digits("train")[0],
                               batch_size=BATCH, learning_rate=LEARNING_RATE, warmup=WARMUP, ema=DECAY, every=10**9)
        self.network = network

    def run(self, batches: Iterator[Tensor], steps: int) -> None:
        self.trainer.fit(self.trainer.step + steps, progress=False)


class Diffusers(Contestant):
    """Diffusers: `UNet2DModel` as its course has it for digits, the loop of its example train_unconditional.py."""

    CONFIG = dict(sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64), time_embedding_dim=144,
                  down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

    def __init__(self):
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        super().__init__(UNet2DModel(**self.CONFIG))
        self.scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        self.sampler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        self.ema = EMAModel(self.network.parameters(), decay=DECAY, model_cls=UNet2DModel, model_config=self.network.config)

    def loss(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),))
        noisy = self.scheduler.add_noise(x, noise, t)
        return F.mse_loss(self.network(noisy, t).sample, self.scheduler.get_velocity(x, noise, t))

    def average(self) -> None:
        self.ema.step(self.network.parameters())

    def average_state(self) -> dict:
        return self.ema.state_dict()

    def load_average(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    @torch.no_grad()
    def sample(self, number: int, steps: int) -> Tensor:
        """DDIM from noise of torch's global generator."""
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        self.network.eval()
        x = torch.randn(number, *SHAPE)
        self.sampler.set_timesteps(steps)
        for t in self.sampler.timesteps:
            x = self.sampler.step(self.network(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
        self.network.train()
        self.ema.restore(self.network.parameters())
        return x


class Lucidrains(Contestant):
    """denoising-diffusion-pytorch: `Unet`, `GaussianDiffusion`, and the average that its `Trainer` keeps."""

    CONFIG = dict(dim=16, dim_mults=(2, 4, 6), channels=1, flash_attn=True)

    def __init__(self):
        Unet, GaussianDiffusion, Average = lucidrains()  # noqa: N806
        diffusion = GaussianDiffusion(Unet(**self.CONFIG), image_size=28, objective="pred_v", beta_schedule="cosine", auto_normalize=False)
        diffusion.loss_weight.fill_(1.0)  # its v-loss counts high noise less; here it is the same as the others'
        super().__init__(diffusion)
        self.ema = Average(diffusion, beta=DECAY, update_every=1, update_after_step=0, inv_gamma=9.0, power=1.0)  # the others' warm-up

    def loss(self, x: Tensor) -> Tensor:
        return self.network(x)

    def average(self) -> None:
        self.ema.update()

    def average_state(self) -> dict:
        return self.ema.state_dict()

    def load_average(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    def sample(self, number: int, steps: int) -> Tensor:
        """DDIM from noise of torch's global generator."""
        diffusion = self.ema.ema_model.eval()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
        return diffusion.sample(batch_size=number)


CONTESTANTS: dict[str, Callable[[], Contestant]] = {
    "ours": Course,
    "ours, Trainer": CourseTrainer,
    "ours, unfolded": CourseUnfolded,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}
PEERS = ("diffusers", "denoising-diffusion-pytorch")


def start(who: str, seed: int = 0) -> Contestant:
    """An untrained contestant."""
    torch.manual_seed(seed)
    return CONTESTANTS[who]()


def memory_of(who: str, steps: int) -> float:
    """Peak memory of a few steps in this process, less what it held before."""
    from accelerate import Accelerator  # noqa: F401  held by all, so that their size does not count
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel  # noqa: F401

    lucidrains()
    batches = Batches(digits("train")[0], BATCH).since(0)
    next(batches)
    before = own_peak()
    start(who).run(batches, steps)
    return own_peak() - before


def timed(run: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """Also note the processor time of each run: a busy machine shows in the difference to the wall clock's."""

    def job() -> None:
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)

    return job


def measure(names: list[str], rounds: int, steps: int) -> list[dict]:
    """A row for each contestant."""
    images = digits("train")[0]
    contestants, processor, jobs = {who: start(who) for who in names}, {who: [] for who in names}, {}
    for who, contestant in contestants.items():
        batches = Batches(images, BATCH).since(0)
        jobs[who] = timed(lambda c=contestant, b=batches: c.run(b, steps), processor[who])
    wall = alternate(jobs, rounds)
    rows = []
    for who, contestant in contestants.items():
        cpu, pictures = processor[who][-rounds:], BATCH * steps
        row = dict(who=who, parameters=count_parameters(contestant.network), batch=BATCH, steps=steps, rounds=rounds, threads=torch.get_num_threads())
        row |= dict(per_second=pictures / summary(wall[who], wall[who])["ours"], per_core_second=pictures / summary(cpu, cpu)["ours"])
        for peer in (p for p in PEERS if p in names and p != who):
            row[f"to {peer}"] = {key: value for key, value in summary(wall[who], wall[peer]).items() if key in ("ratio", "low", "high")}
            row[f"cpu to {peer}"] = {key: value for key, value in summary(cpu, processor[peer][-rounds:]).items() if key in ("ratio", "low", "high")}
        row["mib"] = peak_memory(__file__, "--memory", who, "--threads", str(torch.get_num_threads()), "--steps", str(steps))
        rows.append(row)
    return rows


def ratio(row: dict, key: str) -> str:
    """A ratio of times with its quartiles."""
    return f"{row[key]['ratio']:.2f} ({row[key]['low']:.2f}–{row[key]['high']:.2f})" if key in row else "–"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=11, help="timed runs of each contestant (default: 11)")
    parser.add_argument("--steps", type=int, default=2, help="steps of training in a run (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, help="also append each row to this file, as JSON lines")
    parser.add_argument("--memory", choices=CONTESTANTS, help=argparse.SUPPRESS)  # one measurement in a process of its own
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(memory_of(options.memory, options.steps)))
        return
    print(machine(), flush=True)
    print("| contestant | parameters | pictures/s | pictures per processor second | peak MiB | time / diffusers' | time / denoising-diffusion-pytorch's |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in measure(options.contestants, options.rounds, options.steps):
        ratios = " | ".join(ratio(row, f"to {peer}") for peer in PEERS)
        print(f"| {row['who']} | {row['parameters']:,} | {row['per_second']:.0f} | {row['per_core_second']:.0f} | {row['mib']:.0f} | {ratios} |", flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
