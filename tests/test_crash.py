"""Kill −9 at random moments: never a lost or half-written checkpoint, and the training goes on bit for bit."""

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unet_course.training import load_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 150
TASK = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from torch import nn
from unet_course.training import Trainer

def make(folder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    def loss(model, batch, generator):
        return (model(batch + 0.1 * torch.randn(batch.shape, generator=generator)) - batch.prod(1, keepdim=True)).square().mean()
    return Trainer(net, loss, x, validation=x[:20], batch_size=10, every=3, folder=folder, ema=0.99)

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = make(sys.argv[1])
    trainer.resume()
    print("running", trainer.step, flush=True)
    trainer.fit({STEPS})
    print("done", flush=True)
"""


def kill_until_done(tmp_path: Path, kills: int, seed: int) -> int:
    """Start the training again and again, kill it after a random time, look at its files. How many kills found it running."""
    script, folder, chance, hit = tmp_path / "task.py", tmp_path / "run", random.Random(seed), 0
    script.write_text(TASK)
    reached = 0
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout.readline() == f"running {reached}\n"
        time.sleep(chance.uniform(0, 0.25))
        child.send_signal(signal.SIGKILL)
        finished = "done" in child.stdout.read()
        child.wait()
        hit += not finished
        found = {name: load_checkpoint(folder / f"{name}.safetensors")[1] for name in ("last", "best") if (folder / f"{name}.safetensors").exists()}
        if "last" in found:
            assert found["last"]["step"] >= reached and "best" in found
            reached = found["last"]["step"]
        if finished:
            break
    return hit


def compare_with_unbroken(tmp_path: Path) -> None:
    """Train to the end, and compare the files with those of a training that nobody interrupted."""
    make = runpy.run_path(str(tmp_path / "task.py"))["make"]
    survivor = make(tmp_path / "run")
    survivor.resume()
    survivor.fit(STEPS)
    make(tmp_path / "whole").fit(STEPS)
    for name in ("last", "best"):
        (ours, state), (theirs, expected) = (load_checkpoint(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        assert state == expected
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {p for p in os.listdir(tmp_path / "run") if not p.endswith(".part")} == {"last.safetensors", "best.safetensors"}


def test_killed_a_few_times(tmp_path):
    """Two kills, then to the end."""
    assert kill_until_done(tmp_path, kills=2, seed=0)
    compare_with_unbroken(tmp_path)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    """Fifty kills that found it running, over as many trainings as that takes."""
    hits = 0
    for attempt in range(50):
        run = tmp_path / str(attempt)
        run.mkdir()
        hits += kill_until_done(run, kills=10, seed=attempt)
        compare_with_unbroken(run)
        if hits >= 50:
            break
    assert hits >= 50
