"""`UNetModel` against diffusers' U-Nets with the same weights: time and peak memory.

    python benchmarks/unet.py                    # everything, about half an hour on two cores
    python benchmarks/unet.py --models small --dtypes bfloat16 --modes eager

Both run in one process in turns; the ratio is the median of ours/theirs over neighbouring runs. Peak memory is measured in a process of its own for each.
The optimiser of the training step is plain SGD, which keeps no state: Stable Diffusion 1.x and its twin then fit into 24 GiB.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import alternate, fill, machine, own_peak, peak_memory, summary
from torch import Tensor, nn
from torch.nn import functional as F

from unet_course.unet import UNetModel
from unet_course.workbench import best_device

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mappings import openai_rules, rename  # noqa: E402  the tables of names that the tests use

MODELS = {  # name: ours, the arguments of diffusers' UNet2DConditionModel or UNet2DModel, batch, size
    "sd15": (
        dict(
            image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=2, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4],
            num_heads=8, use_spatial_transformer=True, context_dim=768, legacy=False,
        ),
        dict(
            in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
        1,
        32,
    ),
    "small": (
        dict(
            image_size=32, in_channels=3, model_channels=64, out_channels=3, num_res_blocks=1, attention_resolutions=[4], channel_mult=[1, 2, 2],
            num_heads=4, use_spatial_transformer=True, context_dim=64, legacy=False,
        ),
        dict(
            in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(64, 128, 128), attention_head_dim=4, cross_attention_dim=64,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        ),
        16,
        32,
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Theirs(nn.Module):
    """Diffusers' network, called like ours."""

    def __init__(self, **config):
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel(**config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context, return_dict=False)[0]


def build(model: str, who: str, dtype: str, layout: str, alone: bool = False) -> nn.Module:
    """One of the two networks, both with the same random weights; `alone` leaves theirs as they are and never builds ours."""
    ours, theirs, _, _ = MODELS[model]
    network = Theirs(**theirs) if who == "theirs" else fill(UNetModel(**ours))
    if who == "theirs" and not alone:
        weights = dict((twin := fill(UNetModel(**ours))).named_parameters())
        names = rename(weights, openai_rules(len(twin.plan), twin.plan[0].blocks))
        network.unet.load_state_dict({names[n]: w.detach() for n, w in weights.items()}, strict=True)
    return network.to(best_device(), DTYPES[dtype], memory_format=LAYOUTS[layout])


def inputs(model: str, dtype: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch: pictures, times, words."""
    ours, _, batch, size = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, ours["in_channels"], size, size, generator=generator)
    context = torch.randn(batch, 77, ours["context_dim"], generator=generator)
    device = best_device()
    return x.to(device, DTYPES[dtype], memory_format=LAYOUTS[layout]), torch.full((batch,), 500, device=device), context.to(device, DTYPES[dtype])


def job(network: nn.Module, task: str, batch: tuple[Tensor, ...], compiled: bool) -> Callable[[], object]:
    """What is timed: a forward pass without gradients, or a whole training step."""
    run = torch.compile(network) if compiled else network
    if task == "forward":
        network.eval()
        return torch.no_grad()(lambda: run(*batch))
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)

    def step() -> None:
        F.mse_loss(run(*batch), batch[0]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def memory_of(model: str, who: str, dtype: str, layout: str, task: str) -> float:
    """Peak memory of a few runs in this process, less what it held before."""
    import diffusers  # noqa: F401  held by both, so that its size does not count

    before = own_peak()
    run = job(build(model, who, dtype, layout, alone=True), task, inputs(model, dtype, layout), compiled=False)
    for _ in range(3):
        run()
    return own_peak() - before


def measure(model: str, task: str, dtype: str, layout: str, mode: str, rounds: int) -> dict:
    """One row of the table."""
    torch._dynamo.reset()
    networks = {who: build(model, who, dtype, layout) for who in ("ours", "theirs")}
    batch = inputs(model, dtype, layout)
    with torch.no_grad():
        a, b = (networks[who].eval()(*batch).float() for who in networks)
    error = ((a - b).norm() / b.norm()).item()
    seconds = alternate({who: job(network, task, batch, mode == "compiled") for who, network in networks.items()}, rounds)
    row = dict(model=model, task=task, dtype=dtype, layout=layout, mode=mode, difference=error, **summary(seconds["ours"], seconds["theirs"]))
    if mode == "eager":
        for who in networks:
            row[f"{who}_mib"] = peak_memory(__file__, "--memory", model, who, dtype, layout, task)
    return row


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each network (default: 9)")
    parser.add_argument("--out", type=Path, help="also append each row to this file, as JSON lines")
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)  # one measurement in a process of its own
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.memory:
        print(json.dumps(memory_of(*options.memory)))
        return
    print(machine(), flush=True)
    print("| model | task | dtype | layout | mode | ours s | theirs s | ours/theirs (quartiles) | peak MiB ours / theirs | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for key in ((m, t, d, layout, mode) for m in options.models for mode in options.modes for t in options.tasks for d in options.dtypes for layout in options.layouts):
        row = measure(*key, options.rounds)
        memory = f"{row['ours_mib']:.0f} / {row['theirs_mib']:.0f}" if "ours_mib" in row else "–"
        print(
            f"| {' | '.join(key)} | {row['ours']:.4f} | {row['theirs']:.4f} | {row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f}) | {memory} | {row['difference']:.0e} |",
            flush=True,
        )
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
