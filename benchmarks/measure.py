"""Measuring fairly: alternating runs in one process for time, a fresh process for peak memory."""

import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn


def alternate(
    contenders: dict[str, Callable[[], object]],  # Name → what is timed
    rounds: int = 7,  # Timed runs of each, in turns; every other round in the opposite order
    warmup: int = 2,  # Untimed runs of each before
) -> dict[str, list[float]]:  # Name → seconds of each run
    """Time several functions in turns, so that whatever else slows the machine slows them all."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
                start = time.perf_counter()
                contenders[name]()
                _wait()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def _wait() -> None:
    """A GPU works behind Python's back; wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(
    ours: list[float],  # Seconds of each run
    theirs: list[float],  # The same rounds
) -> dict[str, float]:
    """Medians, and the median of the ratios of neighbouring runs with its quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ours": statistics.median(ours), "theirs": statistics.median(theirs), "ratio": middle, "low": low, "high": high}


def peak_memory(
    script: str,  # A script that understands the arguments, runs its job and prints `own_peak()` as its last line
    *arguments: str,
) -> float:  # MiB
    """Peak memory of a job that has a process of its own, less what the process held before the model was built."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def own_peak() -> float:
    """The most memory this process has held so far, in MiB: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if platform.system() == "Linux":  # ru_maxrss would count the parent's memory, too
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def machine() -> str:
    """The processor, how many threads torch uses, and the versions that matter."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if not torch.cuda.is_available() and platform.system() == "Linux":
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of sensible size, zero-initialised ones included; drawn in place, for a copy would count as memory of the network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=generator)
            p.div_(p[0].numel() ** 0.5) if p.ndim > 1 else p.mul_(0.3).add_(1)
    return module
