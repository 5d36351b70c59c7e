"""Chapter 10: the trainer repeats itself to the last bit, keeps the last and the best, refuses what it should, and every argument does something."""

import io
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from unet_course import training
from unet_course.diffusion import diffusion_loss
from unet_course.training import (
    EMA,
    Batches,
    CheckpointError,
    Folded,
    NotFinite,
    Trainer,
    digits_loss,
    digits_unet,
    draw_history,
    epoch_order,
    learning_rate_factor,
    load_checkpoint,
    load_weights,
    parse_checkpoint,
    pretrained,
    save_checkpoint,
    ship,
)

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = X.prod(1, keepdim=True)


def net(seed=0, width=16, dropout=0.1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, 1))


def noisy_loss(model, batch, generator):
    x, y = batch
    return F.mse_loss(model(x + 0.1 * torch.randn(x.shape, generator=generator)), y)


def plain_loss(model, batch, generator):
    x, y = batch
    return F.mse_loss(model(x), y)


def make(model=None, loss=noisy_loss, data=(X, Y), **options):
    """A small trainer."""
    options = dict(validation=(X[:20], Y[:20]), batch_size=12, every=5, warmup=4) | options
    return Trainer(net() if model is None else model, loss, data, **options)


def difference(a, b):
    """The names of what differs between the states of two trainers."""
    a, b = a.state(), b.state()
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])]


# The average


def test_ema_is_its_formula():
    model, values = nn.Linear(1, 1, bias=False), [3.0, -1.0, 2.0, 5.0, 0.5] * 8
    ema, mean = EMA(model, 0.7), model.weight.item()
    for n, value in enumerate(values, 1):
        nn.init.constant_(model.weight, value)
        ema.update(model)
        decay = min(0.7, n / (n + 9))
        mean = decay * mean + (1 - decay) * value
        assert ema.model.weight.item() == pytest.approx(mean, rel=1e-5)
    assert ema.updates == len(values) and not ema.model.training and not ema.model.weight.requires_grad
    assert model.weight.requires_grad


def test_ema_copies_buffers_and_can_be_switched_off():
    model = net()
    ema, off = EMA(model, 0.999), EMA(model, 0.0)
    model(X)
    with torch.no_grad():
        model[0].weight.add_(1)
    for average in (ema, off):
        average.update(model)
    assert torch.equal(ema.model[2].running_mean, model[2].running_mean) and ema.model[2].num_batches_tracked == 1
    assert torch.equal(off.model[0].weight, model[0].weight) and not torch.equal(ema.model[0].weight, model[0].weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.5])
def test_ema_refuses(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(net(), decay)


def test_learning_rate():
    assert learning_rate_factor(0) == learning_rate_factor(10**6) == 1
    assert [learning_rate_factor(s, warmup=3) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert learning_rate_factor(50, 0, 100) == pytest.approx(0.5) and learning_rate_factor(100, 0, 100) == learning_rate_factor(900, 0, 100) == 0
    rates = [learning_rate_factor(s, 10, 100) for s in range(101)]
    assert all(a < b for a, b in zip(rates[:8], rates[1:])) and all(a > b for a, b in zip(rates[12:], rates[13:]))


# The order of the data


@pytest.mark.bad_input
@pytest.mark.parametrize("wrong", [dict(pieces=0), dict(pieces=-1), dict(ranks=0), dict(rank=-1), dict(workers=-1), dict(pieces=1.5), dict(ranks=True)], ids=str)
def test_batches_refuse(wrong):
    """Counts that are none name themselves."""
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        Batches(torch.arange(12), 4, **wrong)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(number=st.integers(4, 40), pieces=st.integers(1, 3), ranks=st.integers(1, 3), share=st.integers(1, 2), start=st.integers(0, 30), seed=st.integers(0, 5))
def test_batches(number, pieces, ranks, share, start, seed):
    size = pieces * ranks * share
    all_ranks = [Batches(torch.arange(number), size, seed, pieces, rank, ranks) for rank in range(ranks)]
    if size > number:
        assert all_ranks[0].per_epoch == 0
        return
    per_epoch = all_ranks[0].per_epoch
    streams = [b.since(start) for b in all_ranks]
    got = torch.stack([torch.stack([next(s) for _ in range(3 * pieces)]) for s in streams], dim=1)  # (3 · pieces, ranks, share)
    want = torch.cat([epoch_order(number, size, seed, e) for e in range(start // per_epoch, start // per_epoch + 4)])[start % per_epoch :][:3]
    assert torch.equal(got.reshape(3, size), want)
    assert len(epoch_order(number, size, seed, 0).unique()) == per_epoch * size


def test_batches_orders_differ():
    orders = [tuple(epoch_order(60, 10, seed, epoch).flatten().tolist()) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.tensor(float(i)), {"square": i * i}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_of_a_data_set(workers):
    state = torch.get_rng_state()
    batches = Batches(Squares(), 4, workers=workers)
    stream = batches.since(1)
    x, y = next(stream)
    assert torch.equal(x.long(), epoch_order(10, 4, 0, 0)[1]) and torch.equal(y["square"], x.long() ** 2)
    sizes = [size for _, size in batches.in_order()]
    assert sizes == [4, 4, 2] and torch.equal(torch.get_rng_state(), state)


def test_workers_draw_other_numbers(monkeypatch):
    """What a data set draws in workers depends on seed, epoch and rank, and on nothing else."""
    seeds = []

    def loader(data, batch_sampler, num_workers, generator):
        seeds.append(generator.initial_seed())
        return iter(batch_sampler)

    monkeypatch.setattr(training, "DataLoader", loader)

    def drawn(seed, rank):
        seeds.clear()
        stream = Batches(Squares(), 4, seed, rank=rank, ranks=2, workers=2).since(0)
        for _ in range(5):  # two steps an epoch
            next(stream)
        return list(seeds)

    runs = [drawn(seed, rank) for seed in (0, 1) for rank in (0, 1)]
    assert len({s for run in runs for s in run}) == 12 and drawn(1, 1) == runs[-1]


def test_data_in_any_form():
    """A tensor, tuples, lists and data sets give the same training."""

    class Pairs(Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, i):
            return X[i], Y[i]

    runs = [make(data=data).fit(7) for data in ((X, Y), [X, Y], Pairs())]
    assert not difference(runs[0], runs[1]) and not difference(runs[0], runs[2])
    alone = make(loss=lambda model, x, generator: model(x).square().mean(), data=X, validation=X[:5]).fit(3)
    assert alone.step == 3


# Bit for bit


@pytest.mark.parametrize("stop", [1, 5, 8, 13])
def test_resumes_bit_for_bit(tmp_path, stop):
    """2N steps are N steps, another process' worth of forgetting, and N steps; across an epoch, dropout and noise included."""
    whole = make(folder=tmp_path / "a", accumulate=2, decay=40).fit(20)
    make(folder=tmp_path / "b", accumulate=2, decay=40).fit(stop)
    torch.rand(7)
    second = make(net(seed=5), folder=tmp_path / "b", accumulate=2, decay=40)
    assert second.resume() == stop
    second.fit(20)
    assert [n for n in difference(whole, second) if "validation" not in n] == []  # a run that was stopped elsewhere has looked once more
    if stop % 5 == 0:
        assert not difference(whole, second) and second.best == whole.best


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam, partial(torch.optim.AdamW, amsgrad=True), torch.optim.RMSprop, torch.optim.Adagrad],
)
def test_resumes_with_any_optimizer(tmp_path, optimizer):
    whole = make(optimizer=optimizer).fit(10)
    make(optimizer=optimizer, folder=tmp_path).fit(5)
    second = make(net(seed=5), optimizer=optimizer, folder=tmp_path)
    second.resume()
    assert not difference(whole, second.fit(10))


def test_randomness_is_its_own():
    """What happens outside, in validation and in callbacks does not change the training, and the training does not change what is outside."""

    def disturb(trainer):
        torch.rand(3)

    torch.manual_seed(4)
    a = make(callback=disturb, every=3).fit(9)
    torch.rand(11)
    b = make(every=3).fit(4)
    torch.manual_seed(99)
    outside = torch.get_rng_state()
    b.fit(9)
    assert torch.equal(torch.get_rng_state(), outside)
    assert [n for n in difference(a, b) if "validation" not in n] == []


def test_other_devices_keep_their_numbers(monkeypatch):
    """A training on the CPU seeds no GPU."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    torch.default_generator.manual_seed(3)
    before = torch.get_rng_state()
    random = training.Randomness(torch.device("cpu"), 5)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(random.states["cpu"], torch.Generator().manual_seed(5).get_state())


def test_processes_agree_on_the_best(tmp_path):
    """Several processes decide by the mean of their exams."""

    class Two:
        """An accelerator as of two processes, the other of which has seen 7."""

        num_processes = 2

        def __init__(self, accelerator):
            self.accelerator = accelerator

        def __getattr__(self, name):
            return getattr(self.accelerator, name)

        def reduce(self, value, how):
            return (value + 7) / 2

    trainer = make(folder=tmp_path)
    trainer.accelerator, trainer.evaluate = Two(trainer.accelerator), lambda: 1.0
    trainer._look()
    assert trainer.history["validation"] == [4.0] and trainer.best == (0, 4.0)


def test_rates_of_groups():
    """An optimiser with a rate for each group keeps their ratio."""

    def two_rates(parameters, lr):
        parameters = list(parameters)
        return torch.optim.SGD([{"params": [p for p in parameters if p.ndim > 1], "lr": lr / 10}, {"params": [p for p in parameters if p.ndim < 2]}], lr=lr)

    rates = []
    trainer = make(optimizer=two_rates, learning_rate=0.5, every=1, callback=lambda t: rates.append([g["lr"] for g in t.optimizer.param_groups])).fit(6)
    assert rates == [[pytest.approx(rate / 10), rate] for rate in trainer.history["learning_rate"]]


def test_optimizer_of_other_parameters(tmp_path):
    """It cannot be looked ahead, and is told so instead of being taken for another model's; nothing is changed."""
    model = net()
    options = dict(optimizer=lambda parameters, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), folder=tmp_path)
    trainer = make(model, **options).fit(2)
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    with pytest.raises(ValueError, match="^optimizer takes parameters from elsewhere"):
        trainer.resume()
    assert all(torch.equal(tensor, trainer.state()[name]) for name, tensor in before.items())


def test_counts(tmp_path):
    """No off by one: n steps are n losses, n updates of the average, n counted by the optimiser; fit counts from the beginning."""
    trainer = make(folder=tmp_path)
    rates = []
    trainer.callback = lambda t: rates.append(t.history["learning_rate"][-1])
    trainer.fit(5)
    trainer.fit(5)
    assert trainer.step == len(trainer.history["loss"]) == trainer.ema.updates == 5 and trainer.optimizer.state_dict()["state"][0]["step"] == 5
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] == 5
    assert trainer.history["learning_rate"] == [1e-3 * learning_rate_factor(s, 4) for s in range(5)]
    trainer.fit(epochs=2)
    assert trainer.step == 10 and trainer.epoch == 2 and len(rates) == 2


def test_epoch_keeps_last_and_best(tmp_path):
    """Each epoch ends with a look; the best is the lowest validation, with the state of that step."""
    marks = iter([3.0, 1.0, 2.0, 4.0])
    trainer = make(folder=tmp_path, every=None)
    trainer.evaluate = lambda model=None: next(marks)
    at_best = {}
    trainer.callback = lambda t: at_best.setdefault(t.step, t.model[0].weight.detach().clone())
    trainer.fit(epochs=4)
    last, best = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("last", "best"))
    assert trainer.history["validation_step"] == [5, 10, 15, 20] and trainer.best == (10, 1.0)
    assert last[1]["step"] == 20 and best[1]["step"] == 10 and tuple(best[1]["best"]) == tuple(last[1]["best"]) == (10, 1.0)
    assert torch.equal(best[0]["model.0.weight"], at_best[10]) and torch.equal(last[0]["model.0.weight"], at_best[20])
    other = make(net(seed=3), folder=tmp_path)
    assert other.resume("best") == 10 and torch.equal(other.model[0].weight, at_best[10])


def test_evaluation_is_fixed():
    trainer = make(validation=(X[:17], Y[:17])).fit(3)
    assert trainer.evaluate() == trainer.evaluate() != trainer.evaluate(trainer.model)
    assert trainer.model.training and not trainer.ema_model.training
    exact = make(loss=plain_loss, validation=(X[:17], Y[:17]))
    exact.model.eval()
    assert exact.evaluate(exact.model) == pytest.approx(F.mse_loss(exact.model(X[:17]), Y[:17]).item(), rel=1e-5) and not exact.model.training
    with pytest.raises(ValueError, match="validation"):
        make(validation=None).evaluate()


# One step


def test_first_step_is_the_plain_loop():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    trainer = Trainer(model, plain_loss, (X, Y), batch_size=12, warmup=0, clip_gradients=math.inf, learning_rate=0.01).fit(3)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    twin.train()
    for pick in epoch_order(60, 12, 0, 0)[:3]:
        optimizer.zero_grad()
        F.mse_loss(twin(X[pick]), Y[pick]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


def test_accumulation_is_the_larger_batch():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1)).double()

    runs = [Trainer(model(), plain_loss, (X.double(), Y.double()), batch_size=12, accumulate=n).fit(8) for n in (1, 2, 3, 12)]
    for other in runs[1:]:
        for a, b in zip(runs[0].model.parameters(), other.model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert other.history["loss"] == pytest.approx(runs[0].history["loss"], rel=1e-6)


def test_clipping():
    free, short = (Trainer(net(dropout=0.0), plain_loss, (X, Y), batch_size=12, warmup=0, clip_gradients=c, optimizer=torch.optim.SGD, learning_rate=1.0) for c in (math.inf, 0.01))
    before = torch.cat([p.detach().flatten() for p in short.model.parameters()])
    free.fit(1), short.fit(1)
    assert free.history["gradient"] == short.history["gradient"] and free.history["gradient"][0] > 0.1
    after = torch.cat([p.detach().flatten() for p in short.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


# What is not a number


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard(tmp_path, bad):
    """Nothing that is not finite reaches weights, average or optimiser; the last good state stays on disk; training can go on."""
    data = X.clone()
    trainer = make(data=(data, Y), folder=tmp_path, every=2)
    trainer.fit(6)
    good = {name: tensor.clone() for name, tensor in trainer.state().items()}
    on_disk = (tmp_path / "last.safetensors").read_bytes()
    data[epoch_order(60, 12, 0, 1)[1][0], 2] = bad
    with pytest.raises(NotFinite, match=r"step 7 .*the weights are as step 6 left them.*last\.safetensors") as caught:
        trainer.fit(8)
    assert "learning rate" in str(caught.value) and trainer.step == 6
    assert all(torch.equal(tensor, trainer.state()[name]) for name, tensor in good.items() if not name.startswith("rng") and "running" not in name and "num_batches" not in name)
    assert (tmp_path / "last.safetensors").read_bytes() == on_disk
    data[epoch_order(60, 12, 0, 1)[1][0], 2] = 0.0
    trainer.model[2].reset_running_stats()  # batch norm has seen it
    assert trainer.fit(8).step == 8 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_guard_of_the_gradient():
    """A finite loss with an infinite gradient is stopped, too."""
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    trainer = Trainer(model, lambda model, x, generator: model(x).square().sum().sqrt(), X, batch_size=12)
    with pytest.raises(NotFinite, match="gradient"):
        trainer.fit(1)
    assert all(p.isfinite().all() for p in model.parameters())


# Files


def test_file_and_back(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b.c": torch.arange(5), "half": torch.randn(2).bfloat16(), "flag": torch.tensor(True), "turned": torch.randn(3, 2).T}
    state = {"step": 3, "best": [None, math.inf], "text": "grün", "nested": {"a": [1, 2.5, None]}}
    save_checkpoint(tmp_path / "deep" / "x.safetensors", tensors, state)
    found, told = load_checkpoint(tmp_path / "deep" / "x.safetensors")
    assert told == state and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors)
    assert os.listdir(tmp_path / "deep") == ["x.safetensors"]


def test_tied_weights(tmp_path):
    """Two names of one tensor are saved and come back."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    trainer = Trainer(model, lambda m, x, g: m(x).square().mean(), X, batch_size=12, folder=tmp_path).fit(2)
    other = Trainer(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lambda m, x, g: m(x).square().mean(), X, batch_size=12)
    load_weights(other.model, tmp_path / "last.safetensors", "model")
    assert torch.equal(other.model[1].weight, trainer.model[0].weight)


class Trap:
    """A pickle that runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def forgeries(good, folder):
    """Contents that are no checkpoint of the trainer: name → (bytes, a part of the complaint)."""
    tensors, state = parse_checkpoint(good)

    def remade(tensors=tensors, state=state):
        save_checkpoint(folder / "forged", tensors, state)
        return (folder / "forged").read_bytes()

    pickle = io.BytesIO()
    torch.save(Trap(folder / "trapped"), pickle)
    old = io.BytesIO()
    torch.save(Trap(folder / "trapped"), old, _use_new_zipfile_serialization=False)
    huge = (2**62).to_bytes(8, "little") + good[8:]
    without = lambda name: {k: v for k, v in tensors.items() if k != name}
    return {
        "empty": (b"", "safetensors"),
        "cut in the header": (good[:100], "safetensors"),
        "cut in the numbers": (good[:-1], "safetensors"),
        "too long": (good + b"x", "safetensors"),
        "absurd header": (huge, "safetensors"),
        "noise": (bytes(range(256)) * 20, "safetensors"),
        "pickle": (pickle.getvalue(), "pickle"),
        "old pickle": (old.getvalue(), "pickle"),
        "text": (b"<html>not found</html>" * 50, "safetensors"),
        "foreign": (save({"weight": torch.zeros(3)}), "not one of this course"),
        "foreign with a header": (save({"weight": torch.zeros(3)}, {"format": "pt"}), "not one of this course"),
        "another version": (save(tensors, {"format": "unet-course 99", "state": "{}"}), "not one of this course"),
        "no JSON": (save(tensors, {"format": training.FORMAT, "state": "{"}), "not one of this course"),
        "JSON list": (save(tensors, {"format": training.FORMAT, "state": "[1]"}), "not one of this course"),
        "tensor missing": (remade(without("model.0.weight")), "model"),
        "tensor too many": (remade(tensors | {"ema.9.weight": torch.zeros(1)}), "9.weight"),
        "wrong shape": (remade(tensors | {"model.0.weight": torch.zeros(16, 5)}), "(16, 5)"),
        "wrong shape of the average": (remade(tensors | {"ema.0.weight": torch.zeros(16, 5)}), "(16, 5)"),
        "wrong type": (remade(tensors | {"model.0.weight": torch.zeros(16, 4).double()}), "float64"),
        "wrong shape in the optimiser": (remade(tensors | {"optimizer.0.exp_avg": torch.zeros(3)}), "0.exp_avg"),
        "tensor missing in the optimiser": (remade(without("optimizer.0.exp_avg")), "0.exp_avg is here but not in the file"),
        "optimiser missing": (remade({k: v for k, v in tensors.items() if k[:9] != "optimizer"}), "0.exp_avg is here but not in the file"),
        "another optimiser": (remade(tensors | {"optimizer.0.momentum": torch.zeros(16, 4)}), "0.momentum"),
        "weights only": (remade({k: v for k, v in tensors.items() if k[:3] in ("mod", "ema")}, {"step": 3}), "weights alone?"),
        "no step": (remade(state={k: v for k, v in state.items() if k != "step"}), "weights alone?"),
        "step is text": (remade(state=state | {"step": "many"}), "weights alone?"),
        "best is nonsense": (remade(state=state | {"best": []}), "weights alone?"),
        "optimiser is nonsense": (remade(state=state | {"optimizer": {"a": {}}}), "weights alone?"),
        "random numbers are nonsense": (remade(tensors | {"rng.cpu": torch.full_like(tensors["rng.cpu"], 255)}), "weights alone?"),
        "generator is nonsense": (remade(tensors | {"rng.generator": torch.full_like(tensors["rng.generator"], 255)}), "weights alone?"),
        "history missing": (remade(without("history.loss")), "weights alone?"),
    }


def test_refuses_forgeries(tmp_path):
    """Each kind of file that is no checkpoint is refused with its reason, runs nothing, and leaves the running training as it was."""
    make(folder=tmp_path).fit(5)
    good = (tmp_path / "last.safetensors").read_bytes()
    trainer = make(net(seed=2), folder=tmp_path / "x").fit(3)
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    path = tmp_path / "x" / "last.safetensors"
    for name, (content, complaint) in forgeries(good, tmp_path).items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            trainer.resume()
        assert complaint in str(caught.value) and "nothing was changed" in str(caught.value), (name, caught.value)
        assert all(torch.equal(tensor, trainer.state()[key]) for key, tensor in before.items()) and trainer.step == 3, name
        if complaint != "weights alone?" and "optimiser" not in name:
            with pytest.raises(CheckpointError):
                load_weights(trainer.ema_model, path, "ema" if "average" in name or "many" in name else "model")
    assert not (tmp_path / "trapped").exists()
    path.write_bytes(good)
    assert trainer.resume() == 5


def test_saving_fails_and_the_old_file_stays(tmp_path, monkeypatch):
    """Whatever step of writing fails, the file is the old one."""
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 1})

    def fail(*_):
        raise OSError("disk full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, function, fail)
            save_checkpoint(path, {"a": torch.ones(2)}, {"step": 2})
        assert load_checkpoint(path)[1] == {"step": 1}


def test_resume_where_nothing_is(tmp_path):
    trainer = make(folder=tmp_path)
    assert trainer.resume() == 0 and trainer.fit(2).step == 2
    with pytest.raises(ValueError, match="resume"):
        make(folder=tmp_path).fit(3)
    with pytest.raises(ValueError, match="folder"):
        make().resume()


def test_resume_tells_of_changes(tmp_path):
    make(folder=tmp_path).fit(2)
    with pytest.warns(UserWarning, match="learning_rate"):
        make(folder=tmp_path, learning_rate=0.5).resume()
    tensors, state = load_checkpoint(tmp_path / "last.safetensors")
    tensors["rng.generator"] = tensors["rng.generator"][:, :16]  # as a GPU would write it
    save_checkpoint(tmp_path / "last.safetensors", tensors, state)
    other = make(folder=tmp_path)
    with pytest.warns(UserWarning, match="devices"):
        assert other.resume() == 2
    other.fit(4)


def test_checkpoint_says_what_it_is(tmp_path):
    import unet_course

    make(folder=tmp_path, config={"model": "mine", "widths": [1, 2]}).fit(2)
    tensors, state = load_checkpoint(tmp_path / "last.safetensors")
    assert state["config"] == {"model": "mine", "widths": [1, 2]} and state["settings"]["batch_size"] == 12
    assert state["versions"] == {"unet_course": unet_course.__version__, "torch": torch.__version__}
    assert {name.split(".")[0] for name in tensors} == {"model", "ema", "optimizer", "rng", "history"}


# Arguments


@pytest.mark.parametrize(
    "option",
    [
        dict(learning_rate=0.02), dict(warmup=0), dict(decay=5), dict(ema=0.2), dict(seed=3), dict(batch_size=20), dict(accumulate=2), dict(clip_gradients=0.01),
        dict(optimizer=torch.optim.SGD), dict(every=2), dict(validation=(X[20:], Y[20:])), dict(data=(X[:30], Y[:30])), dict(loss=plain_loss),
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_every_argument_changes_something(option):
    assert difference(make().fit(6), make(**option).fit(6))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("option", "name"),
    [
        (dict(batch_size=0), "batch_size"), (dict(batch_size=61), "batch_size"), (dict(batch_size=10, accumulate=3), "accumulate"), (dict(accumulate=0), "accumulate"),
        (dict(learning_rate=0), "learning_rate"), (dict(learning_rate=-1.0), "learning_rate"), (dict(warmup=-1), "warmup"), (dict(warmup=1.5), "warmup"), (dict(decay=0), "decay"),
        (dict(clip_gradients=0), "clip_gradients"), (dict(ema=1.0), "^ema=1.0"), (dict(every=0), "every"), (dict(log_with="tensorboard"), "log_with"),
        (dict(data=(X, Y[:3])), "different lengths"), (dict(mixed_precision="fp3"), "mixed_precision mode"),
        (dict(config={"data": Path("x")}), "^config="), (dict(model=net().bfloat16()), "bfloat16"), (dict(model=nn.Linear(4, 1).half()), "float16"),
    ],
)  # fmt: skip
def test_refuses_arguments(option, name):
    with pytest.raises(ValueError, match=name):
        make(**option)


def test_batches_of_ones_own():
    """What they have decided is taken from them; to say the same once more is no contradiction."""
    usual = make(accumulate=2, seed=3).fit(6)
    assert usual.seed == 3
    for options in (dict(batch_size=None), dict(accumulate=2), dict(batch_size=12, accumulate=2, seed=3, workers=0)):
        own = make(data=Batches((X, Y), 12, seed=3, pieces=2), **options).fit(6)
        assert not difference(usual, own) and own.settings == usual.settings and own.seed == 3
    left_out = make(data=(X.repeat(2, 1), Y.repeat(2, 1)), batch_size=None).settings
    assert (left_out["batch_size"], left_out["accumulate"], left_out["seed"]) == (64, 1, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize("option", [dict(batch_size=64), dict(accumulate=1), dict(seed=0), dict(workers=1)], ids=lambda option: next(iter(option)))
def test_refuses_to_change_batches_of_ones_own(option):
    """No argument is taken and not read, not even one that is the usual value."""
    (name, value), batches = *option.items(), Batches((X, Y), 12, seed=3, pieces=2)
    there = {"batch_size": 12, "accumulate": 2, "seed": 3, "workers": 0}[name]
    with pytest.raises(ValueError, match=f"^{name}={value}, but data are batches with {name}={there}: leave {name} out"):
        make(data=batches, **dict(batch_size=None) | option)


def test_half_precision_that_is_not_trained():
    """A frozen part may be in 16 bits."""
    frozen = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    trainer = make(nn.Sequential(nn.Linear(4, 1), frozen), loss=lambda model, batch, generator: plain_loss(model[0], batch, generator))
    assert trainer.fit(2).step == 2


@pytest.mark.bad_input
@pytest.mark.parametrize("goal", [dict(epochs=0.5), dict(steps=7.5), dict(steps=-1), dict(epochs=-1), dict(steps=True)], ids=str)
def test_fit_counts_whole(tmp_path, goal):
    """A goal that no step reaches would train without a look at the end."""
    with pytest.raises(ValueError, match=f"^{next(iter(goal))}="):
        make(folder=tmp_path).fit(**goal)


@pytest.mark.parametrize("arguments", [dict(), dict(steps=3, epochs=1)])
def test_fit_needs_a_goal(arguments):
    with pytest.raises(ValueError, match="steps or epochs"):
        make().fit(**arguments)


def test_load_weights(tmp_path):
    trainer = make(folder=tmp_path).fit(5)
    for part, model in (("ema", trainer.ema_model), ("model", trainer.model)):
        other = load_weights(net(seed=8), tmp_path / "last.safetensors", part)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="part"):
        load_weights(net(), tmp_path / "last.safetensors", "optimizer")


def test_load_weights_that_were_halved(tmp_path):
    trainer = make(folder=tmp_path).fit(5)
    ship(tmp_path / "last.safetensors", tmp_path / "small.safetensors")
    other = load_weights(net(seed=8), tmp_path / "small.safetensors")
    for a, b in zip(other.state_dict().values(), trainer.ema_model.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b.half().float() if b.is_floating_point() else b)
    ship(tmp_path / "last.safetensors", tmp_path / "short.safetensors", dtype=torch.bfloat16)
    assert torch.equal(load_weights(net(seed=8), tmp_path / "short.safetensors")[0].weight, trainer.ema_model[0].weight.bfloat16().float())


@pytest.mark.parametrize(("tensors", "state", "missing"), [({"ema.a": torch.zeros(1)}, {"config": {}}, "step, settings, versions"),
                                                           ({"model.a": torch.zeros(1)}, dict(step=1, settings={}, config={}, versions={}), "averaged weights")])
def test_ships_no_other_files(tmp_path, tensors, state, missing):
    save_checkpoint(tmp_path / "other.safetensors", tensors, state)
    with pytest.raises(CheckpointError, match=f"has no {missing}; nothing was written"):
        ship(tmp_path / "other.safetensors", tmp_path / "small.safetensors")
    assert not (tmp_path / "small.safetensors").exists()


def test_tracker(tmp_path):
    """What is recorded goes to Accelerate's trackers."""
    from accelerate.tracking import GeneralTracker

    class Notebook(GeneralTracker):
        name, requires_logging_directory = "notebook", False
        tracker = property(lambda self: self.lines)

        def __init__(self):
            super().__init__()
            self.lines = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.lines.append((step, values))

    tracker = Notebook()
    make(folder=tmp_path, log_with=tracker).fit(5)
    assert [step for step, values in tracker.lines if "loss" in values] == [1, 2, 3, 4, 5] and tracker.lines[-1][1].keys() == {"validation_step", "validation"}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    make(folder=tmp_path, log_with="tensorboard").fit(2)
    assert list(tmp_path.rglob("events*"))


# What one sees


def test_progress_bar(capsys):
    make().fit(4, progress=True)
    assert "4/4" in capsys.readouterr().err
    make().fit(4)
    assert capsys.readouterr().err == ""


def test_plot(monkeypatch):
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html.data)

    monkeypatch.setattr("IPython.display.display", lambda *_, display_id: Handle())
    monkeypatch.setattr(training, "Watch", partial(training.Watch, seconds=0.0))
    make().fit(4, plot=True)
    assert len(shown) >= 4 and "<svg" in shown[-1]
    drawing = draw_history(make().history)
    assert drawing.axes
    plt.close(drawing)


# In processes and precisions of their own


def script(code, tmp_path, *launch):
    path = tmp_path / "script.py"
    path.write_text(f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n" + code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *launch, path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_bfloat16(tmp_path):
    """Mixed precision reaches the model, leaves the weights in float32, and resumes bit for bit."""
    from accelerate.state import AcceleratorState

    def loss(model, batch, generator):
        answer = model(batch[0])
        return F.mse_loss(answer.float(), batch[1])

    exact = make(loss=loss).fit(6)
    AcceleratorState._reset_state()  # Accelerate allows one precision in a process
    try:
        whole = make(loss=loss, mixed_precision="bf16").fit(6)
        make(loss=loss, mixed_precision="bf16", folder=tmp_path).fit(5)
        second = make(net(seed=4), loss=loss, mixed_precision="bf16", folder=tmp_path)
        second.resume()
        second.fit(6)
        for other in (None, "no"):
            with pytest.raises(ValueError, match="trains in 'bf16' already"):
                make(mixed_precision=other)
    finally:
        AcceleratorState._reset_state()
    assert not [name for name in difference(whole, second) if "validation" not in name] and difference(exact, whole)
    assert whole.model[0].weight.dtype == torch.float32 and whole.settings["precision"] == "bf16"
    assert whole.history["loss"] == pytest.approx(exact.history["loss"], rel=0.05)


TWO = """
import torch
from torch import nn
from unet_course.training import Trainer
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1)).double()
def loss(model, x, generator):
    return (model(x) - x.prod(1, keepdim=True)).square().mean()
def make(**options):
    return Trainer(model(), loss, X, validation=X[:20], batch_size=12, every=4, accumulate=2, **options)
if __name__ == "__main__":
    a = make().fit(8)
    make(folder="x").fit(4)
    b = make(folder="x"); b.resume(); b.fit(8)
    sa, sb = a.state(), b.state()
    same = all(torch.equal(sa[k], sb[k]) for k in sa)
    if a.accelerator.is_main_process:
        print(a.accelerator.num_processes, same, tuple(sa["rng.cpu"].shape)[0], *[repr(v) for v in a.history["loss"]])
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Two processes make the training of one, and resume bit for bit."""
    number, same, rows, *losses = script(TWO, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2").split()
    assert (number, same, rows) == ("2", "True", "2")
    names = {}
    exec(TWO.partition("if __name__")[0], names)
    assert [float(v) for v in losses] == pytest.approx(names["make"]().fit(8).history["loss"], rel=1e-6)


# The digits


def test_folded():
    """Folding is only another layout: the network sees the squares, the world sees the picture."""
    seen = []

    class Inner(nn.Module):
        def forward(self, x, t, y=None):
            seen.append((x, t, y))
            return 2 * x

    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(Folded(Inner(), 4)(x, 5, y=1), 2 * x) and seen[0][0].shape == (2, 48, 2, 3) and seen[0][1:] == (5, 1)
    assert torch.equal(Folded(Inner(), 1)(x, 0), 2 * x)
    assert seen[0][0][0, :16, 1, 2].tolist() == x[0, 0, 4:8, 8:12].flatten().tolist()


@pytest.mark.bad_input
def test_folded_refuses():
    with pytest.raises(ValueError, match="multiples of factor=2"):
        Folded(nn.Identity())(torch.zeros(1, 1, 7, 8))


def test_digits_model_and_loss():
    model = digits_unet()
    assert 1.6e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    labels, draw = torch.randint(10, (400,)), torch.Generator().manual_seed(0)
    seen = []

    class Zero(nn.Module):
        def forward(self, x, t, y):
            seen.append((t, y))
            return torch.zeros_like(x)

    digits_loss(Zero(), (torch.zeros(400, 1, 28, 28), labels), draw)
    t, y = seen[0]
    hidden = y != labels
    assert (y[hidden] == training.NO_LABEL).all() and 20 <= hidden.sum() <= 65 and t.max() > 950 and t.min() < 50
    x = torch.zeros(4, 1, 28, 28)
    assert digits_loss(model, (x, labels[:4]), draw) > 0 and diffusion_loss(model, x, training.DIGITS_SCHEDULE, "v", y=labels[:4]) > 0


@pytest.mark.slow
def test_recipe_goes_on(tmp_path, monkeypatch):
    """The recipe makes the same training whether interrupted or not, and ships."""
    monkeypatch.setattr(training, "digits", lambda split: (torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(128) % 10))
    whole = training.train_digits(tmp_path / "a", steps=3)
    with pytest.warns(UserWarning, match="decay"):
        training.train_digits(tmp_path / "b", steps=2)
        second = training.train_digits(tmp_path / "b", steps=3)
    assert second.step == whole.step == 3
    ship(tmp_path / "a" / "last.safetensors", tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 3.6e6
    tensors, state = load_checkpoint(tmp_path / "small.safetensors")
    assert state["config"] == {"model": "digits"} and all(t.dtype == torch.float16 for t in tensors.values())


def test_shipped_file_is_read_back(tmp_path, monkeypatch):
    """`pretrained` builds the model, in eval mode and float32, with the weights of the file up to the rounding."""
    model = digits_unet()
    nn.init.normal_(model.model.out[-1].weight)
    save_checkpoint(tmp_path / "last", {f"ema.{k}": v for k, v in model.state_dict().items()}, dict(step=1, settings={}, config={"model": "digits"}, versions={}))
    ship(tmp_path / "last", tmp_path / "digits_unet.safetensors")
    monkeypatch.setattr(training, "read_asset", lambda name: (tmp_path / name).read_bytes())
    found = pretrained()
    assert not found.training and all(p.dtype == torch.float32 and not p.requires_grad for p in found.parameters())
    assert all(torch.equal(a, b.half().float()) for a, b in zip(found.state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="digits"):
        pretrained("cats")


def test_json_only():
    """The state that is no tensor is plain JSON."""
    json.dumps(make().fit(1)._counters())
