"""Chapter 19: several processes, lost processes, sharded models, streams, and what a training costs."""

import json
import math
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from unet_course import scale
from unet_course.attention import AttentionBlock
from unet_course.ddpm_unet import Model
from unet_course.scale import (Estimate, LaunchError, Machine, Numbered, Stream, bytes_held, draw_each, estimate, generator_of, launch,
                               rank_and_ranks, shard, training_flops, whole_state, write_shards)
from unet_course.training import Batches, Trainer, load_checkpoint, load_weights
from unet_course.unet import UNetModel
from unet_course.unet_nd import UNetND
from unet_course.vae import AutoencoderKL

ROOT = Path(__file__).parents[2]
STEPS = 50

# A task that is over in a moment: a network of 700 weights, or a U-Net in float64.


TASK = """
import json, os, signal, sys
import torch
from torch import nn
from torch.nn import functional as F
from unet_course.diffusion import Schedule, diffusion_loss
from unet_course.scale import Numbered, draw_each, rank_and_ranks
from unet_course.training import Trainer
from unet_course.unet import UNetModel

schedule = Schedule.cosine()
RANK, RANKS = rank_and_ranks()
X = torch.randn(70, 2, 4, 4, generator=torch.Generator().manual_seed(0))

def network():
    torch.manual_seed(0)
    return UNetModel(image_size=4, in_channels=2, out_channels=2, model_channels=32, channel_mult=(1, 1), num_res_blocks=1,
                     attention_resolutions=(), num_heads=1)

def loss(model, batch, generator):
    x, numbers = batch
    if os.environ.get("KILL") and RANK == 1 and numbers[0] // 12 == 9 and not os.path.exists(sys.argv[1] + "/accident"):
        open(sys.argv[1] + "/accident", "w").close()
        if os.environ["KILL"] == "error":
            raise ArithmeticError("the third law of thermodynamics")
        os.kill(os.getpid(), signal.SIGKILL)
    t, noise, coin = draw_each(numbers, x.shape[1:], seed=3)
    return diffusion_loss(model, x + coin.reshape(-1, 1, 1, 1), schedule, "v", t=t, noise=noise)

def make(folder=None, pieces=1, **options):
    data = Numbered(X, 12, pieces=pieces)
    return Trainer(network(), loss, data, learning_rate=1e-3, warmup=5, every=4, folder=folder, **options)

if __name__ == "__main__":
    folder, steps, pieces = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trainer = make(folder, pieces)
    trainer.resume()
    trainer.fit(steps)
    print(json.dumps({"rank": RANK, "ranks": RANKS, "weights": sum(p.double().sum().item() for p in trainer.model.parameters())}) + "\\n", end="", flush=True)
    trainer.accelerator.end_training()
"""

SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from task import RANK, RANKS, X, loss, network
from unet_course.scale import Numbered, bytes_held, shard, whole_state
from unet_course.training import learning_rate_factor, save_checkpoint

dist.init_process_group("gloo")
model = shard(network())
optimizer = torch.optim.AdamW(model.parameters())
batches, losses = Numbered(X, 12).since(0), []
for step in range(int(sys.argv[2])):
    optimizer.param_groups[0]["lr"] = 1e-3 * learning_rate_factor(step, warmup=5)
    value = loss(model, next(batches), None)
    optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    value = value.detach() / RANKS
    dist.all_reduce(value)
    losses.append(value)
state = whole_state(model)
assert bool(state) == (RANK == 0)
if RANK == 0:
    save_checkpoint(sys.argv[1] + "/last.safetensors", {f"model.{k}": v for k, v in state.items()} | {"history.loss": torch.stack(losses)}, {})
print(json.dumps({"rank": RANK, **bytes_held(model, optimizer)}) + "\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The script, a folder to work in, and an environment in which it finds the package."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "sharded.py").write_text(SHARDED)
    names = {}
    exec(TASK.partition("if __name__")[0], names)
    return tmp_path / "task.py", names["make"]


def history(path):
    return load_checkpoint(path / "last.safetensors")[0]["history.loss"]


def close(a, b, limit=1e-3):
    assert len(a) == len(b)
    assert ((torch.as_tensor(a) - torch.as_tensor(b)).abs() / torch.as_tensor(b).abs()).max() < limit


# Several processes


@pytest.mark.slow
def test_two_processes_draw_the_curve_of_one(task, tmp_path):
    """50 steps, within a thousandth; pieces and processes do not matter; all processes end with the same weights."""
    script, make = task
    one = make().fit(STEPS)
    said = [json.loads(line) for line in launch(script, tmp_path / "two", STEPS, 1).splitlines()]
    assert sorted(s["rank"] for s in said) == [0, 1] and {s["ranks"] for s in said} == {2}
    assert len({s["weights"] for s in said}) == 1
    close(history(tmp_path / "two"), one.history["loss"])
    launch(script, tmp_path / "pieces", STEPS, 3, processes=2)
    close(history(tmp_path / "pieces"), one.history["loss"])
    model = load_weights(make().model, tmp_path / "two" / "last.safetensors")
    ours, theirs = (torch.cat([p.flatten() for p in m.parameters()]) for m in (model, one.ema_model))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.slow
def test_accelerate_launch(task, tmp_path):
    """The other launcher does the same. (With --cpu it would start one process; --multi_gpu takes torchrun's code, and the environment says processors.)"""
    script, make = task
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
               "--dynamo_backend=no", "--main_process_port=0", str(script), str(tmp_path / "x"), "10", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(s["rank"] for s in said) == [0, 1] and {s["ranks"] for s in said} == {2} and len({s["weights"] for s in said}) == 1
    close(history(tmp_path / "x"), make().fit(10).history["loss"])


@pytest.mark.slow
def test_two_machines(task, tmp_path):
    """Two agents of torchrun that find each other, as on two machines."""
    script, make = task
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
               "--local-addr=localhost", str(script), str(tmp_path / "x"), "10", "1"]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=600)
            assert agent.returncode == 0, errors[-2000:]
    finally:
        for agent in agents:
            agent.terminate()
    close(history(tmp_path / "x"), make().fit(10).history["loss"])


@pytest.mark.slow
def test_a_lost_process(task, tmp_path):
    """A clear error, a whole checkpoint, and three ways to go on: two processes again, one alone, or torchrun by itself."""
    script, make = task
    one = make().fit(20)
    for folder in ("again", "alone"):
        with pytest.raises(LaunchError, match=r"rank 1 was killed by signal 9 \(SIGKILL\); torchrun has stopped all"):
            launch(script, tmp_path / folder, 20, 1, environment={"KILL": "signal"})
        assert load_checkpoint(tmp_path / folder / "last.safetensors")[1]["step"] == 8
    launch(script, tmp_path / "again", 20, 1)
    close(history(tmp_path / "again"), one.history["loss"])
    survivor = make(tmp_path / "alone")
    with pytest.warns(UserWarning, match="number of devices"):
        assert survivor.resume() == 8
    close(survivor.fit(20).history["loss"], one.history["loss"])
    launch(script, tmp_path / "itself", 20, 1, environment={"KILL": "signal"}, restarts=1)
    close(history(tmp_path / "itself"), one.history["loss"])
    with pytest.raises(LaunchError, match="rank 1 stopped with exit code 1: ArithmeticError: the third law"):
        launch(script, tmp_path / "error", 20, 1, environment={"KILL": "error"})


@pytest.mark.slow
def test_launch_never_waits_for_ever(tmp_path):
    """After the time limit all processes are gone."""
    script = tmp_path / "sleep.py"
    script.write_text(f"import os, time\nopen(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(1000)")
    started = time.monotonic()
    with pytest.raises(LaunchError, match="processes were not done after 45 seconds"):
        launch(script, timeout=45)
    assert time.monotonic() - started < 200
    pids = [int((tmp_path / rank).read_text()) for rank in "01" if (tmp_path / rank).exists()]
    for pid in pids:
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()


def test_launch_says_what_happened():
    """torchrun's reports, in a sentence."""
    one = "  time : x\n  host : h\n  rank      : {} (local_rank: 1)\n  exitcode  : {} (pid: 7)\n  error_file: <N/A>\n"
    head, root = "x.py FAILED\n----\nFailures:\n", "----\nRoot Cause (first observed failure):\n[0]:\n"
    assert scale._what_happened(head + root + one.format(3, -9)) == "rank 3 was killed by signal 9 (SIGKILL)"
    assert scale._what_happened(head + one.format(2, -15) + root + one.format(3, -11)) == "rank 3 was killed by signal 11 (SIGSEGV)"
    assert scale._what_happened(head + one.format(3, -9) + root + one.format(0, 1)) == "rank 3 was killed by signal 9 (SIGKILL)"  # 0 lost its peer
    assert scale._what_happened(head + one.format(0, -15) + root + one.format(3, 2)) == "rank 3 stopped with exit code 2"
    trace = "[rank3]: Traceback (most recent call last):\n[rank3]:   File 'x', line 1\n[rank3]:     1 / 0\n[rank3]: ZeroDivisionError: division by zero\n"
    outer = "Traceback (most recent call last):\n  File 'y'\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    for errors in (trace, trace + outer):
        assert scale._what_happened(errors + head + root + one.format(3, 1)) == "rank 3 stopped with exit code 1: ZeroDivisionError: division by zero"
    assert "no such option" in scale._what_happened("torchrun: error: no such option")


@pytest.mark.bad_input
def test_launch_refuses(tmp_path):
    script = tmp_path / "s.py"
    script.write_text("")
    for options, message in (({"processes": 0}, "processes=0"), ({"restarts": -1}, "restarts=-1"), ({"timeout": 0}, "timeout=0"), ({"timeout": math.inf}, "timeout=inf"),
                             ({"processes": 1.5}, "processes=1.5")):
        with pytest.raises(ValueError, match=message):
            launch(script, **options)
    with pytest.raises(ValueError, match="is not a file"):
        launch(tmp_path / "other.py")


def test_rank_and_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False), monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_ranks() == (0, 1)
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "7")
    assert rank_and_ranks() == (3, 7)
    numbered = Numbered(torch.arange(30), 14)
    assert (numbered.rank, numbered.ranks) == (3, 7) and Numbered(torch.arange(30), 14, rank=0, ranks=1).ranks == 1


# Noise by number


def test_noise_depends_on_number_and_seed_only():
    whole = draw_each(torch.arange(5, 11), (2, 3), seed=4)
    assert [tuple(t.shape) for t in whole] == [(6,), (6, 2, 3), (6,)] and whole[0].dtype == torch.int64
    for pick in ([0, 1, 2], [5, 3], [4]):
        part = draw_each(torch.arange(5, 11)[pick], (2, 3), seed=4)
        assert all(torch.equal(a[pick], b) for a, b in zip(whole, part))
    other = draw_each(torch.arange(5, 11), (2, 3), seed=5)
    assert not (whole[1] == other[1]).any()
    assert not (draw_each(torch.tensor([0, 1]), (4,), seed=1)[1] == draw_each(torch.tensor([1, 2]), (4,), seed=0)[1]).any()
    state = torch.random.get_rng_state()
    draw_each(torch.arange(3), (2,))
    assert torch.equal(state, torch.random.get_rng_state())
    assert draw_each(torch.arange(200), (), steps=7)[0].max() == 6
    assert torch.equal(torch.rand(3, generator=generator_of(8, 2)), torch.rand(3, generator=generator_of(8, 2)))


def test_noise_is_normal():
    times, noise, coins = draw_each(torch.arange(3000), (8,), seed=1)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and abs((noise**4).mean() - 3) < 0.3
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.03 and abs((times.double() - 499.5).mean()) < 25
    assert abs(coins.mean() - 0.5) < 0.03 and abs(torch.corrcoef(torch.stack([coins, times.float(), noise[:, 0]]))).fill_diagonal_(0).max() < 0.08


@pytest.mark.bad_input
def test_noise_refuses():
    with pytest.raises(ValueError, match="steps=0"):
        draw_each(torch.arange(2), (2,), steps=0)
    for numbers in (torch.zeros(0, dtype=torch.long), torch.zeros(2), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="numbers must"):
            draw_each(numbers, (2,))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(sizes, st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_numbered_is_one_batch(shape, step, seed):
    """Whatever pieces and processes: together, examples and numbers of a step are those of one process in one piece."""
    pieces, ranks, share = shape
    data, size = torch.arange(31) * 3, pieces * ranks * share
    whole = next(Numbered(data, size, seed, rank=0, ranks=1).since(step))
    shares = [list(islice(Numbered(data, size, seed, pieces, rank, ranks).since(step), pieces)) for rank in range(ranks)]
    joined = [torch.cat([shares[rank][piece][i] for piece in range(pieces) for rank in range(ranks)]) for i in (0, 1)]
    assert torch.equal(joined[0], whole[0]) and torch.equal(joined[1], whole[1])
    assert torch.equal(whole[1], step * size + torch.arange(size)) and torch.equal(whole[0], next(Batches(data, size, seed).since(step)))


def test_numbered_kinds_of_data():
    """Tensors, tuples and data sets; workers; across epochs."""

    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return torch.tensor(i), torch.tensor(i * i)

    x = torch.arange(10)
    a = list(islice(Numbered((x, x * x), 4, rank=0, ranks=1).since(1), 5))
    b = list(islice(Numbered(Squares(), 4, rank=0, ranks=1).since(1), 5))
    assert all(torch.equal(p, q) for m, n in zip(a, b) for p, q in zip(m, n)) and a[0][2].tolist() == [4, 5, 6, 7] and a[-1][2][0] == 20
    assert len(next(Numbered(x, 4).since(0))) == 2


@pytest.mark.bad_input
def test_numbered_refuses():
    x = torch.arange(10)
    for options, message in (({"rank": 2, "ranks": 2}, "rank=2"), ({"rank": -1, "ranks": 2}, "rank=-1"), ({"rank": 0, "ranks": 0}, "ranks=0"),
                             ({"rank": 0, "ranks": 3}, "3 processes")):
        with pytest.raises(ValueError, match=message):
            Numbered(x, 4, **options)


def linear(model, batch, generator):
    return model(batch[0]).square().mean()


def test_trainer_takes_batches():
    """`Trainer` with batches of one's own is the trainer with the data; sizes and pieces come from the batches."""
    x = torch.randn(24, 3)

    def net():
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    plain = Trainer(net(), lambda model, x, g: linear(model, (x,), g), x, batch_size=6, accumulate=2).fit(7)
    numbered = Trainer(net(), linear, Numbered(x, 6, pieces=2)).fit(7)
    assert plain.history == numbered.history and numbered.settings["batch_size"] == 6 and numbered.settings["accumulate"] == 2 and numbered.every == 4
    assert Trainer(net(), linear, Numbered(x, 6, seed=3)).seed == 3
    for options in ({"batch_size": 64}, {"accumulate": 2}, {"seed": 1}, {"workers": 1}):
        (name, value), = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}, but data are batches with {name}="):
            Trainer(net(), linear, Numbered(x, 6), **options)
    with pytest.raises(ValueError, match="rank 1 of 2 processes; this is rank 0 of 1"):
        Trainer(net(), linear, Numbered(x, 6, rank=1, ranks=2))


def test_pieces_draw_one_curve(task):
    """A batch in pieces makes the curve of the whole."""
    _, make = task
    whole, pieces = make().fit(6), make(pieces=4).fit(6)
    close(pieces.history["loss"], whole.history["loss"], 1e-4)


# Sharded


@pytest.mark.slow
def test_sharded(task, tmp_path):
    """Two halves: the loss of one process, half of all bytes, and a file that an ordinary network loads."""
    script, make = task
    one = make(clip_gradients=0.05).fit(20)
    assert sum(length > 0.05 for length in one.history["gradient"]) > 10  # the shortening is put to the test, too: by the length of the whole
    said = [json.loads(line) for line in launch(script.with_name("sharded.py"), tmp_path / "s", 20).splitlines()]
    close(history(tmp_path / "s"), one.history["loss"])
    whole = bytes_held(one.model, one.optimizer)
    for name, number in whole.items():
        assert sum(s[name] for s in said) < 1.1 * number and all(0.45 * number < s[name] < 0.56 * number for s in said)
    model = load_weights(make().model, tmp_path / "s" / "last.safetensors", part="model")
    ours, theirs = (torch.cat([p.flatten() for p in m.parameters()]) for m in (model, one.model))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_bytes_held_and_whole_state():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.Adam(model.parameters())
    assert bytes_held(model, optimizer) == {"weights": 4 * 56, "gradients": 0, "optimizer": 0}
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    held = bytes_held(model, optimizer)
    assert held["gradients"] == 4 * 56 and held["optimizer"] == 4 * (2 * 56 + 4)  # a step counter for each of four tensors
    state = whole_state(model)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model[0].weight.data.zero_()
    assert state["0.weight"].abs().sum() > 0


@pytest.mark.bad_input
def test_shard_needs_processes():
    with pytest.raises(ValueError, match="init_process_group"):
        shard(nn.Linear(2, 2))


@pytest.fixture
def alone(tmp_path):
    """torch.distributed with a single process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: UNetModel(image_size=4, in_channels=2, out_channels=2, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(),
                           num_heads=1), (torch.randn(1, 2, 4, 4), torch.tensor([3]))),
        (lambda: Model(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=8), (torch.randn(1, 3, 8, 8), torch.tensor([3.0]))),
        (lambda: AutoencoderKL(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8), (torch.randn(1, 3, 8, 8), False)),
        (lambda: UNetND(2, 3, 2, channels=(32, 32)), (torch.randn(1, 3, 8, 8),)),
    ],
    ids=["UNetModel", "Model", "AutoencoderKL", "UNetND"],
)  # fmt: skip
def test_shard_takes_every_network(alone, make, inputs):
    """Blocks that are not called as a whole stay with the root; the answer is that of the whole network."""
    model = make().eval()

    def answer():
        return [part for part in torch.utils._pytree.tree_leaves(model(*inputs)) if isinstance(part, torch.Tensor)][0]

    before = answer()
    assert shard(model) is model and torch.equal(answer(), before)
    answer().sum().backward()
    assert all(hasattr(p, "full_tensor") for p in model.parameters())


@pytest.mark.bad_input
def test_shard_refuses_mixed_types(alone):
    unet = UNetModel(image_size=4, in_channels=2, out_channels=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_heads=1,
                     use_bf16=True)
    with pytest.raises(ValueError, match="torch.bfloat16, torch.float32; .*leave out use_fp16 and use_bf16"):
        shard(unet)
    assert not any(hasattr(p, "full_tensor") for p in unet.parameters())


# Streams


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    x = torch.arange(103)
    return write_shards(folder, (x, x.double()[:, None] / 2), rows=10)


def test_write_shards(files):
    parts = [load_file(path) for path in files]
    assert [len(p["000"]) for p in parts] == [10] * 10 + [3]
    values = torch.cat([p["000"] for p in parts])
    assert values.sort().values.tolist() == list(range(103)) and values.tolist() != list(range(103))
    assert all(torch.equal(p["000"].double()[:, None] / 2, p["001"]) for p in parts)


@given(st.integers(1, 3), st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)]), st.integers(0, 60), st.integers(0, 2))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_stream_is_one_stream(files, each, cut, step, seed):
    """The same batches for any number of processes and pieces, and wherever one enters."""
    pieces, ranks = cut
    size = 4 * each
    from_start = list(islice(Stream(files, size, seed, rank=0, ranks=1, lanes=4).since(0), step + 2))[step:]
    shares = [list(islice(Stream(files, size, seed, pieces, rank, ranks, lanes=4).since(step), 2 * pieces)) for rank in range(ranks)]
    for i, whole in enumerate(from_start):
        for column in range(3):
            joined = torch.cat([shares[rank][i * pieces + piece][column] for piece in range(pieces) for rank in range(ranks)])
            assert torch.equal(joined, whole[column])
        assert torch.equal(whole[2], (step + i) * size + torch.arange(size)) and torch.equal(whole[0].double()[:, None] / 2, whole[1])


def test_stream_epochs(files):
    """Each lane gives each of its examples once in an epoch, in another order each time."""
    stream = Stream(files, 4, lanes=4, rank=0, ranks=1)
    rows = torch.stack([x for x, _, _ in islice(stream.since(0), 60)]).T  # lane, position
    for lane in range(4):
        length = sum(stream.lengths[lane::4])
        first, second = rows[lane, :length], rows[lane, length : 2 * length]
        wanted = torch.cat([load_file(p)["000"] for p in stream.files[lane::4]]).sort().values
        assert torch.equal(first.sort().values, wanted) and torch.equal(second.sort().values, wanted) and not torch.equal(first, second)
    assert stream.number == 103 and stream.per_epoch == 25
    other = torch.stack([x for x, _, _ in islice(Stream(files, 4, 1, lanes=4, rank=0, ranks=1).since(0), 60)]).T
    assert not torch.equal(rows, other)
    seen = list(stream.in_order())
    assert sum(n for _, n in seen) == 103 and sorted(torch.cat([x for (x, _), _ in seen]).tolist()) == list(range(103))


def test_stream_reads_only_its_files(files, monkeypatch):
    """A process opens the files of its lanes, and entering late opens nothing that was before."""
    opened = []
    monkeypatch.setattr(scale, "load_file", lambda path: opened.append(path) or load_file(path))
    list(islice(Stream(files, 8, lanes=4, rank=1, ranks=2).since(0), 13))
    assert set(opened) == {path for i, path in enumerate(sorted(files)) if i % 4 in (2, 3)}
    opened.clear()
    next(Stream(files, 8, lanes=4, rank=0, ranks=1).since(6))
    assert len(opened) <= 8  # in each lane one file, or two where the batch crosses a border


def test_stream_trains(files):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.value - x.float()

    trainer = Trainer(Mean(), linear, Stream(files, 4, lanes=4), learning_rate=0.5, warmup=0).fit(3)
    assert trainer.batches.number == 103 and trainer.settings["batch_size"] == 4 and len(trainer.history["loss"]) == 3


@pytest.mark.bad_input
def test_write_shards_refuses(tmp_path):
    with pytest.raises(ValueError, match="^data must be a list of tensors"):
        write_shards(tmp_path / "a", torch.zeros(3, 2), 2)
    write_shards(tmp_path / "b", [torch.arange(6)], rows=2)
    with pytest.raises(ValueError, match="^folder=.*b' holds 00002.safetensors"):
        write_shards(tmp_path / "b", [torch.arange(6)], rows=3)
    assert len(load_file(tmp_path / "b" / "00000.safetensors")["000"]) == 2  # nothing was changed
    (tmp_path / "b" / "notes.txt").touch()
    again = write_shards(tmp_path / "b", [torch.arange(9)], rows=2, seed=1)  # these are written anew, all of them
    assert len(again) == 5 and sorted(torch.cat([load_file(path)["000"] for path in again]).tolist()) == list(range(9))


def test_write_shards_in_full_or_not_at_all(tmp_path, monkeypatch):
    def half(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(scale, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, [torch.arange(6)], rows=2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_stream_refuses_files_that_differ(tmp_path):
    """What is missing in one file, cut off or of another kind would be lost without a word."""

    def stream(**second):
        save_file({"000": torch.zeros(4, 2), "001": torch.arange(4)}, tmp_path / "a.safetensors")
        save_file(second, tmp_path / "b.safetensors")
        return Stream([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], 2, lanes=1)

    x, y = torch.zeros(3, 2), torch.arange(3)
    assert stream(**{"000": x, "001": y}).number == 7
    for second in ({"000": x}, {"000": x, "001": y, "002": y + 1}, {"000": x, "001": y.float()}, {"000": torch.zeros(3, 3), "001": y}, {"000": x, "002": y}):
        with pytest.raises(ValueError, match="b.safetensors holds other tensors than .*a.safetensors"):
            stream(**second)
    with pytest.raises(ValueError, match=r"different lengths \[3, 4\]"):
        stream(**{"000": x, "001": torch.arange(4)})
    for second in ({}, {"000": x[:0]}, {"000": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="holds no examples"):
            stream(**second)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="a.safetensors is damaged"):
        Stream([tmp_path / "a.safetensors"], 1, lanes=1)


@pytest.mark.bad_input
def test_stream_refuses(files, tmp_path):
    for options, message in (({"lanes": 12}, "11 files for lanes=12"), ({"lanes": 3}, "multiple of lanes"), ({"lanes": 4, "rank": 0, "ranks": 3}, "multiple of pieces"),
                             ({"lanes": 0}, "lanes=0"), ({"lanes": 4, "rank": 5, "ranks": 4}, "rank=5"), ({"lanes": 4, "pieces": 0}, "pieces=0")):
        with pytest.raises(ValueError, match=message):
            Stream(files, 8, **options)
    with pytest.raises(ValueError, match="lengths"):
        write_shards(tmp_path, (torch.zeros(3), torch.zeros(4)), 2)
    with pytest.raises(ValueError, match="rows=0"):
        write_shards(tmp_path, (torch.zeros(3),), 0)
    empty = write_shards(tmp_path / "e", (torch.zeros(0, 2),), 2) or [tmp_path / "none"]
    with pytest.raises((ValueError, FileNotFoundError)):
        Stream(empty, 1, lanes=1)


# Time and money


def test_training_flops():
    with torch.device("meta"):
        layer = nn.Linear(7, 5)
        assert training_flops(layer, torch.empty(4, 7)) == 3 * 2 * 7 * 5
    unet = UNetModel(image_size=8, in_channels=1, out_channels=1, model_channels=32, num_res_blocks=1, attention_resolutions=(), channel_mult=(1, 1), num_heads=1)
    real = training_flops(unet, torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        unet(x, torch.zeros(2, dtype=torch.long)).sum().backward()
    assert abs(counter.get_total_flops() / 2 / real - 1) < 0.02
    with torch.device("meta"):
        layer = AttentionBlock(32)
    wanted = 3 * 2 * (4 * 32 * 32 * 16 + 2 * 32 * 16 * 16)  # queries, keys, values and output of 16 pixels; scores and means
    assert training_flops(layer, torch.empty(2, 32, 4, 4, device="meta")) == training_flops(AttentionBlock(32), torch.zeros(2, 32, 4, 4)) == wanted


@pytest.mark.bad_input
def test_training_flops_refuses():
    with pytest.raises(ValueError, match="inputs"):
        training_flops(nn.Linear(2, 2))


def test_estimate():
    lone = estimate(Machine(1, 1e12, 2.0), 1000, 3e9, batch_size=10, parameters=1e6, utilisation=0.5)
    assert lone.step == pytest.approx(10 * 3e9 / 0.5e12) and lone.waiting == 0
    assert lone.hours == pytest.approx(lone.step * 100 / 3600) == lone.device_hours and lone.cost == pytest.approx(2 * lone.hours)
    pair = estimate(Machine(2, 1e12, 2.0, 1e9), 1000, 3e9, batch_size=10, parameters=1e6, utilisation=0.5)
    assert pair.waiting == 0 and pair.hours == pytest.approx(lone.hours / 2) and pair.cost == pytest.approx(lone.cost)
    slow = estimate(Machine(2, 1e12, 2.0, 1e6), 1000, 3e9, batch_size=10, parameters=1e6, utilisation=0.5)
    assert slow.waiting == pytest.approx(4.0 - lone.step / 3) and slow.cost > 10 * lone.cost
    frozen = estimate(Machine(2, 1e12, 2.0, 1e6), 1000, 3e9, batch_size=10, parameters=1e6, utilisation=0.5, backward=0.4)
    assert frozen.waiting == pytest.approx(4.0 - 0.4 * lone.step / 2)
    odd = estimate(Machine(4, 1e12, 2.0), 1000, 3e9, batch_size=10, parameters=1e6, utilisation=0.5)
    assert odd.step == pytest.approx(0.3 * lone.step)  # three examples on the fullest device
    assert isinstance(odd, Estimate)


@pytest.mark.bad_input
def test_estimate_refuses():
    usual = dict(machine=Machine(2, 1e12, 2.0, 1e9), examples=10, flops=1e9, batch_size=4, parameters=1e6)
    for change, message in (({"batch_size": 1}, "batch_size=1"), ({"examples": 0}, "examples=0"), ({"flops": -1}, "flops=-1"), ({"utilisation": 1.5}, "utilisation=1.5"),
                            ({"utilisation": 0}, "utilisation=0"), ({"backward": 0}, "backward=0"), ({"backward": 1.5}, "backward=1.5"), ({"machine": Machine(0, 1e12, 1.0)}, "machine.devices=0"), ({"parameters": 0}, "parameters=0"),
                            ({"machine": Machine(1, 0.0, 1.0)}, "peak=0"), ({"machine": Machine(1, 1e12, 1.0, 0.0)}, "bandwidth=0")):
        with pytest.raises(ValueError, match=message):
            estimate(**usual | change)
