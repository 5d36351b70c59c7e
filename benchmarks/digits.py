"""How many samples of a digits model are read as the digit that was asked for.

    python benchmarks/digits.py                                  # the shipped model
    python benchmarks/digits.py runs/digits/last.safetensors     # a checkpoint of `train_digits`

The reader is a small classifier, trained here in half a minute; what it reads of real test digits is printed first and is the most that samples can be expected to reach.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from unet_course.data import digits
from unet_course.sampling import ddim, denoiser, sample
from unet_course.training import DIGITS_SCHEDULE, digits_unet, load_weights, pretrained


def conv(channels: int, out_channels: int) -> list[nn.Module]:
    """Halve the picture."""
    return [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]


def train_judge(epochs: int = 5, batch: int = 100) -> nn.Module:
    """A classifier of real digits."""
    torch.manual_seed(1)
    images, labels = digits("train")
    judge = nn.Sequential(*conv(1, 32), *conv(32, 64), *conv(64, 64), nn.Flatten(), nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * len(images) // batch)
    for _ in range(epochs):
        for pick in torch.randperm(len(images)).split(batch):
            F.cross_entropy(judge(images[pick]), labels[pick]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="of `train_digits`; the shipped model if left out")
    parser.add_argument("--number", type=int, default=500, help="of samples (default: 500)")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM (default: 25)")
    options = parser.parse_args()
    with torch.enable_grad():
        judge = train_judge()
    images, labels = digits("test")
    print(f"real test digits read right: {(judge(images).argmax(1) == labels).float().mean():.3f} of {len(images)}")
    model = load_weights(digits_unet(), options.checkpoint).eval() if options.checkpoint else pretrained("digits")
    right = 0
    for seed, asked in enumerate((torch.arange(options.number) % 10).split(100)):
        predict = denoiser(model, DIGITS_SCHEDULE, "v", clip=1.0, y=asked)
        noise = torch.randn(len(asked), 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        right += (judge(sample(ddim(predict, noise, DIGITS_SCHEDULE, options.steps))).argmax(1) == asked).sum().item()
    print(f"samples read as asked: {right / options.number:.3f} of {options.number} (DDIM, {options.steps} steps, x0 clipped, no guidance)")


if __name__ == "__main__":
    main()
