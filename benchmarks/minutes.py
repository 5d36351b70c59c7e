"""Processor time until a digits model reaches a fixed Fréchet distance: ours, diffusers, denoising-diffusion-pytorch.

    pip install --no-deps -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python benchmarks/minutes.py                        # about an hour; call it again and it goes on where it stopped
    OMP_NUM_THREADS=1 python benchmarks/minutes.py --folder /tmp/try --seconds 5 --cap 10 --first 4 --number 100 --evaluations 4

The contestants of training.py train in turns in one process. After the same numbers of steps each draws equally many digits by its own DDIM from its averaged
weights; sampling and judging are not counted. A contestant stops at its first look at or below the smallest of the distances, or when its time is up.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import torch
from measure import machine
from torch import Tensor
from training import BATCH, CONTESTANTS, Contestant, start

from unet_course.data import digits
from unet_course.evaluation import digit_classifier, frechet_distance
from unet_course.training import Batches
from unet_course.workbench import count_parameters

DEFAULT = ["ours", "diffusers", "denoising-diffusion-pytorch"]


class Judge:
    """Fréchet distance to 2,000 real digits, in the features of the course's classifier."""

    def __init__(self):
        self.classifier = digit_classifier()
        self.images = digits("train")[0]
        self.real = self.features(self.images[5000:7000])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(500)])

    def distance(self, images: Tensor) -> float:
        """Of these pictures."""
        return float(frechet_distance(self.features(images), self.real))

    def floor(self, number: int) -> float:
        """Of as many other real digits, which the classifier has not been trained on either."""
        return self.distance(self.images[7000 : 7000 + number])


class Run:
    """A contestant's training, its clock and its looks."""

    def __init__(self, who: str, folder: Path, log: Path, seed: int):
        self.who, self.path, self.log, self.seed = who, folder / f"{who}.pt", log, seed
        self.contestant: Contestant = start(who, seed)
        self.seconds, self.looks, self.random = 0.0, [], torch.get_rng_state()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.contestant.load(state["contestant"])
            self.seconds, self.looks, self.random = state["seconds"], [tuple(look) for look in state["looks"]], state["random"]
        self.batches = Batches(digits("train")[0], BATCH, seed).since(self.contestant.steps)

    def train(self, seconds: float, steps: int) -> None:
        """Train until the clock shows so many processor seconds, or until so many steps were made."""
        torch.set_rng_state(self.random)
        while self.seconds < seconds and self.contestant.steps < steps:
            begin = time.process_time()
            self.contestant.step(next(self.batches))
            self.seconds += time.process_time() - begin
        self.random = torch.get_rng_state()

    def look(self, judge: Judge, number: int, evaluations: int) -> float:
        """The distance now; noted in the log and saved with the training."""
        wall, begin = time.time(), time.process_time()
        samples = []
        for i, part in enumerate(torch.arange(number).split(250)):
            torch.manual_seed(1000 + i)
            samples.append(self.contestant.sample(len(part), evaluations))
        distance = judge.distance(torch.cat(samples).clamp(-1, 1))
        self.looks.append((self.seconds, distance))
        row = dict(who=self.who, seed=self.seed, steps=self.contestant.steps, seconds=round(self.seconds, 2), distance=round(distance, 3))
        row |= dict(number=number, evaluations=evaluations, look_seconds=round(time.process_time() - begin, 1), look_wall=round(time.time() - wall, 1))
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {self.who}: step {row['steps']}, {self.seconds:.0f} s, distance {distance:.2f}", flush=True)
        self.save()
        return distance

    def save(self) -> None:
        """Keep all that is needed to go on."""
        state = dict(contestant=self.contestant.state(), seconds=self.seconds, looks=self.looks, random=self.random)
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)


def crossing(looks: list[tuple[float, float]], target: float) -> float | None:
    """Processor seconds at which the distance fell to the target: on the straight line, in logarithms, between the looks around it."""
    before = None
    for seconds, distance in looks:
        if distance <= target:
            if before is None:
                return seconds
            share = math.log(before[1] / target) / math.log(before[1] / distance)
            return before[0] * (seconds / before[0]) ** share
        before = seconds, distance
    return None


def race(runs: list[Run], judge: Judge, options: argparse.Namespace) -> None:
    """Let the contestants train in turns, in slices, until each has arrived or its time is up."""
    turn = 0
    while active := [run for run in runs if crossing(run.looks, min(options.distances)) is None and not (run.looks and run.looks[-1][0] >= options.cap)]:
        for run in active[:: 1 if turn % 2 == 0 else -1]:
            steps = round(options.first * options.growth ** len(run.looks))
            run.train(min(options.cap, run.seconds + options.seconds), steps)
            if run.contestant.steps >= steps or run.seconds >= options.cap:
                run.look(judge, options.number, options.evaluations)
        turn += 1


def main() -> None:
    """Race and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestants", nargs="+", choices=[who for who in CONTESTANTS if who != "ours, Trainer"], default=DEFAULT)
    parser.add_argument("--distances", nargs="+", type=float, default=[5.0, 2.0, 1.0], help="to be reached (default: 5 2 1)")
    parser.add_argument("--cap", type=float, default=900, help="processor seconds of training that each contestant has at most (default: 900)")
    parser.add_argument("--seconds", type=float, default=60, help="processor seconds of a turn (default: 60)")
    parser.add_argument("--first", type=int, default=160, help="steps before the first look (default: 160)")
    parser.add_argument("--growth", type=float, default=1.6, help="from look to look the number of steps grows by this factor (default: 1.6)")
    parser.add_argument("--number", type=int, default=1000, help="of samples at a look (default: 1000)")
    parser.add_argument("--evaluations", type=int, default=10, help="of the network for each sample (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/minutes"), help="where an interrupted race is kept (default: runs/minutes)")
    parser.add_argument("--out", type=Path, help="the log, as JSON lines (default: log.jsonl in the folder)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    judge = Judge()
    print(machine())
    print(f"floor ({options.number} real digits against 2,000 others): {judge.floor(options.number):.3f}", flush=True)
    runs = [Run(who, options.folder, options.out or options.folder / "log.jsonl", options.seed) for who in options.contestants]
    race(runs, judge, options)
    distances = sorted(options.distances, reverse=True)
    print(f"| contestant | parameters | processor seconds per step | {' | '.join(f'seconds to {d:g}' for d in distances)} | last distance |")
    print("| --- " * (4 + len(distances)) + "|")
    for run in runs:
        reached = [crossing(run.looks, d) for d in distances]
        cells = [f"{seconds:.0f}" if seconds else f"not in {run.seconds:.0f}" for seconds in reached]
        speed = run.seconds / run.contestant.steps
        print(f"| {run.who} | {count_parameters(run.contestant.network):,} | {speed:.3f} | {' | '.join(cells)} | {run.looks[-1][1]:.2f} |")


if __name__ == "__main__":
    main()
