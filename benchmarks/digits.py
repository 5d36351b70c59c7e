"""How good the samples of a digits model are.

    python benchmarks/digits.py                                  # the shipped model, 2,000 samples
    python benchmarks/digits.py runs/digits/last.safetensors     # a checkpoint of `train_digits`
    python benchmarks/digits.py --samplers                       # every sampler, by the number of questions it asks the network

Samples are compared with 2,000 real digits in the 64 features of the course's classifier (chapter 12); they are asked for with the labels of 2,000 other
real digits, so that the kinds are equally frequent. No guidance; guesses clipped to [-1, 1]. "As many real digits" is the mean over ten random splits of
4,000 real digits, with its standard deviation from split to split: what differs from it by less is not told apart.
"""

import argparse
import time

import torch
from torch import Tensor

from unet_course.data import digits
from unet_course.evaluation import digit_classifier, judge, unseen_digits
from unet_course.sampling import choose_steps, ddim, ddpm, denoiser, dpm_solver, heun, sample
from unet_course.training import DIGITS_SCHEDULE, digits_unet, load_weights, pretrained

SAMPLERS = {"DDPM": ddpm, "DDIM": ddim, "DPM-Solver++": dpm_solver, "Heun": heun}


def draw(model: torch.nn.Module, name: str, questions: int, asked: Tensor, seed: int = 0, spacing: str = "trailing", batch: int = 100) -> Tensor:
    """Samples with these labels; the noise of each batch has a seed of its own."""
    made = []
    for number, y in enumerate(asked.split(batch)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        noise = torch.randn(len(y), 1, 28, 28, generator=generator)
        predict = denoiser(model, DIGITS_SCHEDULE, "v", clip=1.0, y=y)
        steps = choose_steps(DIGITS_SCHEDULE, (questions + 1) // 2 if name == "Heun" else questions, "karras" if name == "Heun" else spacing)
        dice = {"generator": generator} if name == "DDPM" else {}
        made.append(sample(SAMPLERS[name](predict, noise, DIGITS_SCHEDULE, steps, **dice)))
    return torch.cat(made)


@torch.no_grad()
def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="of `train_digits`; the shipped model if left out")
    parser.add_argument("--number", type=int, default=2000, help="of samples (default: 2000)")
    parser.add_argument("--questions", type=int, nargs="+", help="how often the network is asked (default: 25, with --samplers 5 9 19)")
    parser.add_argument("--samplers", action="store_true", help="all samplers instead of DDIM")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions (default: 1)")
    options = parser.parse_args()
    model = load_weights(digits_unet(), options.checkpoint).eval() if options.checkpoint else pretrained("digits")
    images, labels = digits("test")
    print(f"real test digits read right: {(digit_classifier()(images).argmax(1) == labels).double().mean():.3f} of {len(images)}")
    (_, _), (others, asked) = unseen_digits()
    print("real digits, one pair of crowds:", judge(others[: options.number], asked[: options.number]), flush=True)
    for name in SAMPLERS if options.samplers else ["DDIM"]:
        for questions in options.questions or ([5, 9, 19] if options.samplers else [25]):
            for seed in range(options.seeds):
                start = time.process_time()
                score = judge(draw(model, name, questions, asked[: options.number], seed), asked[: options.number])
                print(f"{name}, {questions} questions, seed {seed}: {score} ({time.process_time() - start:.0f} core-s)", flush=True)


if __name__ == "__main__":
    main()
