"""Speed: counts that are right, settings that can be taken back, caches that are exact, reuse that is what it says."""

import gc
import math
import pickle
import weakref
from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.probing import mostly_valid
from unet_course import speed
from unet_course.attention import attention
from unet_course.clip import CLIPTextModel
from unet_course.ddpm_unet import Model
from unet_course.diffusion import Schedule
from unet_course.guidance import Guided
from unet_course.latent_diffusion import FoldedPixels, TextToImage
from unet_course.sampling import ddim, denoiser, dpm_solver, heun, sample
from unet_course.speed import (
    SETTINGS,
    Peaks,
    SpeedReport,
    Trial,
    Work,
    _choose,
    _parts,
    _Weights,
    best_time,
    cached_text,
    machine_peaks,
    make_fast,
    measure_work,
    pack,
    reuse_features,
    time_in_turns,
    time_operations,
    unpack,
)
from unet_course.stable_diffusion import SD1, InTurn, build, tiny
from unet_course.unet import UNetModel
from unet_course.unet_nd import UNetND
from unet_course.vae import AutoencoderKL
from unet_course.workbench import randomize, relative_error

SMALL = dict(image_size=8, in_channels=3, out_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
             num_head_channels=16)
TEXT = SMALL | dict(use_spatial_transformer=True, context_dim=12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def unet(**options):
    return randomize(UNetModel(**SMALL | options)).eval().requires_grad_(False)


def text_unet(**options):
    return unet(**dict(use_spatial_transformer=True, context_dim=12) | options)


def small_pipe():
    """A pipeline of random networks."""
    net = randomize(UNetModel(**TEXT | dict(in_channels=12, out_channels=12))).eval()
    text = randomize(CLIPTextModel(vocab_size=40, width=12, layers=1, heads=2, length=5)).eval()

    def tokenizer(prompts, length):
        return torch.tensor([[len(p) % 30 + 1, 3, 39, 39, 39][:length] for p in prompts])

    return TextToImage(net, FoldedPixels(2), text, tokenizer, schedule=Schedule.flow(100), scale_factor=1.0, length=5).eval().requires_grad_(False)


# Counting


@pytest.mark.parametrize("inference", [False, True])
def test_products_are_counted(inference):
    a, b = random(3, 4), random(4, 5)
    with torch.inference_mode(inference):
        assert measure_work(lambda: a @ b) == Work(60, 4 * (12 + 20 + 15), 4 * 15)


@pytest.mark.parametrize("inference", [False, True])
def test_attention_is_counted(inference):
    """SDPA's two products, which PyTorch's own list leaves out on a CPU; and no matrix of scores is held."""
    q, k, v = random(2, 3, 64, 8), random(2, 3, 96, 8), random(2, 3, 96, 8)
    with torch.inference_mode(inference):
        quick, formula = (measure_work(lambda: attention(q, k, v, backend=name)) for name in ("sdpa", "vanilla"))
    assert quick.multiply_adds == formula.multiply_adds == 2 * 2 * 3 * 64 * 96 * 8
    assert formula.peak >= 4 * 2 * 3 * 64 * 96 > 2 * quick.peak


def test_agrees_with_pytorch():
    """Forward and backward of a network without attention, as PyTorch's counter has it."""
    net, x = randomize(UNetModel(**SMALL | dict(attention_resolutions=(), attn_type="none", num_head_channels=-1))), random(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        net(x, 5).sum().backward()
    net.zero_grad()
    assert measure_work(lambda: net(x, 5).sum().backward()).multiply_adds == counter.get_total_flops() // 2


def test_peak_memory():
    """Two of three are alive at once; views and what is let go do not count."""

    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b.view(10, 100) + 1
        return c

    assert measure_work(run).peak == 8000
    assert measure_work(lambda: random(10).view(5, 2).t()).peak <= 2 * 40


def test_views_move_nothing():
    x = random(10, 10)
    assert measure_work(lambda: x.view(100).reshape(10, 10).t()).moved == 0
    assert measure_work(lambda: x.add_(1)).moved == 800


def test_gradients_are_held():
    net, x = unet(), random(2, 3, 8, 8)
    with torch.no_grad():
        without = measure_work(lambda: net(x, 5))
    net.requires_grad_(True)
    assert measure_work(lambda: net(x, 5)).peak > 2 * without.peak


@pytest.mark.parametrize("inference", [False, True])
def test_operations(inference):
    """One by one, and together what `measure_work` counts; the shortest of the runs."""
    a, b, net, x = random(3, 4), random(4, 5), unet(), random(2, 3, 8, 8)
    with torch.inference_mode(inference):
        product, total = time_operations(lambda: (a @ b).relu_().t().sum(), rounds=2)[0], measure_work(lambda: net(x, 5))
        parts = time_operations(lambda: net(x, 5))
    assert product[:3] == ("mm", 60, 4 * (12 + 20 + 15)) and product.seconds > 0
    assert sum(o.multiply_adds for o in parts) == total.multiply_adds and sum(o.moved for o in parts) == total.moved
    assert min(o.seconds for o in parts) > 0 and {"convolution", "native_group_norm"} <= {o.name for o in parts}


def test_shortest_run_of_each_operation(monkeypatch):
    """By a clock that says what each operation of each run takes."""
    ticks = iter([0, 5, 5, 6, 0, 1, 1, 9, 0, 3, 3, 6])
    monkeypatch.setattr("unet_course.speed.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert [o.seconds for o in time_operations(lambda: torch.ones(3) + 1, rounds=3)] == [1, 1]


def test_other_operations_each_time():
    sizes = iter([3, 3, 4])
    with pytest.raises(ValueError, match="function did not consist of the same"):
        time_operations(lambda: torch.ones(next(sizes)), rounds=3)


# Timing


def test_turns():
    """Every contender equally often, in turns, the order reversed every other round."""
    order = []
    seconds = time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=2)
    assert "".join(order) == "abab" + "abbaab" and {name: len(runs) for name, runs in seconds.items()} == {"a": 3, "b": 3}
    assert all(s >= 0 for runs in seconds.values() for s in runs)


def test_waits_for_every_gpu_in_use(monkeypatch):
    """The current one, and others that hold memory; a GPU that nobody uses is not woken."""
    waited = []
    stand_ins = dict(is_initialized=lambda: True, device_count=lambda: 4, current_device=lambda: 1, memory_reserved=lambda i: [0, 7, 7, 0][i],
                     synchronize=lambda device=None: waited.append(device))
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    speed._wait()
    assert waited == [None, 2]


def test_best_time():
    calls = []
    assert 0 <= best_time(lambda: calls.append(1), 0) < 1 and len(calls) == 4


def test_peaks_take_the_faster_of_two_ways(monkeypatch):
    seconds, made = iter([2.0, 1.0, 4.0]), []
    monkeypatch.setattr(speed, "best_time", lambda run: (made.append(run()), next(seconds))[1])
    peaks = machine_peaks([torch.float32], sizes=(8,), copied=1)
    assert peaks.multiply_adds == {torch.float32: 8**3 / 1.0} and peaks.bandwidth == 2 * 2**20 / 4
    assert made[0].shape == (8, 8) and torch.allclose(made[1][0, :, :, 0].T, made[0], atol=1e-5)  # the same product


def test_peaks():
    peaks = machine_peaks(sizes=(64,), copied=1)
    assert set(peaks.multiply_adds) == {torch.float32, torch.bfloat16} and min(*peaks.multiply_adds.values(), peaks.bandwidth) > 0
    roof = Peaks({torch.float32: 100.0, torch.bfloat16: 300.0}, 10.0)
    assert [roof.attainable(i) for i in (1, 10, 50)] == [10, 100, 100] and roof.attainable(50, torch.bfloat16) == 300
    with pytest.raises(ValueError, match=r"dtype=torch.float16 was not measured; there are \[torch.float32, torch.bfloat16\]"):
        roof.attainable(1, torch.float16)


@pytest.mark.parametrize("arguments", [dict(rounds=0), dict(warmup=-1), dict(rounds=True)])
@pytest.mark.bad_input
def test_wrong_numbers_of_runs(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        time_in_turns({}, **arguments)


@pytest.mark.bad_input
def test_wrong_number_of_rounds():
    with pytest.raises(ValueError, match="rounds"):
        time_operations(lambda: None, rounds=0)


# Making fast


MODELS = {
    "UNetModel": (lambda: UNetModel(**SMALL), (random(2, 3, 8, 6), [1, 500]), {}),
    "with text": (lambda: UNetModel(**TEXT), (random(1, 3, 8, 8), 7), dict(context=random(1, 4, 12))),
    "with classes": (lambda: UNetModel(**SMALL, num_classes=4), (random(2, 3, 8, 8), 7), dict(y=torch.tensor([1, 3]))),
    "Model": (lambda: Model(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=8),
              (random(1, 3, 8, 8), torch.tensor([3.0])), {}),
    "UNetND 1": (lambda: UNetND(1, 3, 2, channels=(32, 32)), (random(1, 3, 16),), {}),
    "UNetND 3": (lambda: UNetND(3, 3, 2, channels=(32, 32)), (random(1, 3, 4, 4, 4),), {}),
    "VAE": (lambda: AutoencoderKL(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8), (random(1, 3, 8, 8),), {}),
    "CLIP": (lambda: CLIPTextModel(vocab_size=40, width=16, layers=2, heads=2, length=8), (torch.arange(8)[None],), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_network(name):
    """Every setting runs, stays within the bound, and is undone to the last bit; dtype and strides, too."""
    make, inputs, options = MODELS[name]
    model = randomize(make()).eval()
    state = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    same, report = make_fast(model, *inputs, rounds=1, **options)
    assert same is model and not any(t.note for t in report.trials), report
    maps = name not in ("UNetND 1", "CLIP")
    layers = name not in ("UNetND 1", "UNetND 3")  # has some that can be packed
    assert [t.setting for t in report.trials] == [s for s, (_, last, packed) in SETTINGS.items() if (maps or not last) and (layers or not packed)]
    errors = {t.setting: t.error for t in report.trials}
    assert errors["float32"] == 0 and 1e-4 < errors["bfloat16"] <= 0.02 and sum(t.chosen for t in report.trials) == 1
    if maps:
        assert errors["float32, channels last"] < 1e-5
    if layers:
        assert errors["float32, packed"] < 1e-5 and abs(errors["bfloat16, packed"] - errors["bfloat16"]) < 0.005
    report.undo()
    assert not any("forward" in m.__dict__ for m in model.modules())
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key][0]) and value.stride() == state[key][1], key


def test_each_setting_is_put_on():
    """What is chosen is what the network is left in."""
    for setting, (dtype, last, packed) in SETTINGS.items():
        net = unet()
        _Weights(net).put_on(setting)
        layer = net.input_blocks[1][0].in_layers[2]
        weight = layer.weight
        assert ("forward" in layer.__dict__) == packed and unpack(net) == (len(speed._packable(net)) if packed else 0)
        assert weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last) == last
        assert net.time_embed[0].weight.dtype == torch.float32


def test_gradients_come_back():
    """A network that was trained has gradients; after undo they are the same tensors, in float32."""
    for setting in SETTINGS:
        net, (x, t) = unet().requires_grad_(True), MODELS["UNetModel"][1]
        net(x, t).square().sum().backward()
        before = {name: (p.grad, p.grad.clone()) for name, p in net.named_parameters()}
        weights = _Weights(net)
        weights.put_on(setting)
        weights.restore()
        assert all(p.grad is before[name][0] and torch.equal(p.grad, before[name][1]) for name, p in net.named_parameters())


def test_bound_decides():
    """With a bound below bfloat16's error nothing in bfloat16 is chosen, and the report says why."""
    net, (x, t) = unet(), MODELS["UNetModel"][1]
    _, report = make_fast(net, x, t, bound=1e-4, settings=["bfloat16"], rounds=1)
    assert [(r.setting, r.chosen) for r in report.trials] == [("float32", True), ("bfloat16", False)]
    assert "error above 0.0001" in report.trials[1].note and "error above" in repr(report) and report.gains == {"UNetModel": 1.0}


def test_choice_by_time():
    """The fastest within the bound; a gain of less than the margin is none."""
    def chosen(**seconds):
        measured = {"float32": (1.0, 0.0, "")} | {name.replace("_", " "): value for name, value in seconds.items()}
        return next(t.setting for t in _choose("net", measured, 0.02) if t.chosen)

    assert chosen(bfloat16=(0.5, 0.01, "")) == "bfloat16" and chosen(bfloat16=(0.98, 0.01, "")) == "float32"
    assert chosen(bfloat16=(0.5, 0.03, "")) == "float32" and chosen(bfloat16=(0.5, math.nan, "")) == "float32"
    assert chosen(bfloat16=(math.nan, math.nan, "not here: RuntimeError")) == "float32"
    assert chosen(a=(0.6, 0.0, ""), b=(0.5, 0.01, ""), c=(0.55, 0.0, "")) == "b"


def test_a_setting_that_fails_drops_out():
    class NoBfloat16(nn.Linear):
        def forward(self, x):
            if self.weight.dtype == torch.bfloat16:
                raise RuntimeError("no kernel")
            return super().forward(x)

    _, report = make_fast(NoBfloat16(4, 4).eval(), random(2, 4), rounds=2)
    assert "not here: RuntimeError" in report.trials[1].note and report.trials[0].chosen


def test_pipeline():
    """Unet and text are raced, a VAE without parameters is not; the pipeline still draws, close to what it drew."""
    pipe = small_pipe()
    before = pipe(["a", "bcd"], steps=3)
    _, report = make_fast(pipe, ["a", "bcd"], rounds=1, guidance=2.0)
    assert {t.part for t in report.trials} == {"text", "unet"}
    after = pipe(["a", "bcd"], steps=3)
    assert after.dtype == torch.float32 and relative_error(after, before) < 0.1
    report.undo()
    assert torch.equal(pipe(["a", "bcd"], steps=3), before)


def test_several_calls_are_compared():
    """Errors are measured at the beginning, in the middle and at the end of a walk, and for prompts and for none."""
    parts = _parts(small_pipe(), ["a", "bcd"], dict(guidance=2.0))
    times = [run.args[1][0].item() for run in parts["unet"][1]]
    assert len(times) == 3 and times == sorted(times, reverse=True) and len(parts["text"][1]) == 2


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError])
def test_as_it_was_after_an_error(problem):
    """Whatever goes wrong leaves all parts as they were."""
    net, (x, t) = unet(), MODELS["UNetModel"][1]
    before = net(x, t)

    def call(net, x, t):
        if net.dtype == torch.bfloat16:
            raise problem
        return net(x, t) if problem is KeyboardInterrupt else torch.rand(3)

    with pytest.raises((KeyboardInterrupt, ValueError)):
        make_fast(net, x, t, call=call, rounds=1)
    assert torch.equal(net(x, t), before) and {p.dtype for p in net.parameters()} == {torch.float32}


def test_u_net_within():
    """In a wrapper, too, only the blocks are converted."""
    net = unet()
    _Weights(InTurn(net)).put_on("bfloat16")
    assert net.dtype == torch.bfloat16 and net.time_embed[0].weight.dtype == net.out[-1].weight.dtype == torch.float32


def test_compiled_before():
    """Blocks that somebody had compiled stay so."""
    net, (x, t) = unet(), MODELS["UNetModel"][1]
    block = net.input_blocks[1][0]
    block._compiled_call_impl = block._call_impl
    _, report = make_fast(net, x, t, settings=["bfloat16"], rounds=1)
    assert block._compiled_call_impl == block._call_impl
    report.undo()
    assert block._compiled_call_impl == block._call_impl


@pytest.mark.slow
def test_stable_diffusion():
    model = build(tiny(SD1)).requires_grad_(False)
    before = model("a cat", steps=2, size=64)
    _, report = make_fast(model, "a cat", rounds=1, size=64)
    assert {t.part for t in report.trials} == {"text", "unet", "vae"}
    report.undo()
    assert torch.equal(model("a cat", steps=2, size=64), before)


@pytest.mark.slow
def test_compiled():
    """Compiled by region, each shape of a block once however often settings take turns: the same within rounding, or a note why not; and undone."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net, x = unet(channel_mult=(1,), attention_resolutions=()), random(1, 3, 8, 8)
    before = net(x, 5)
    _, report = make_fast(net, x, 5, settings=["float32"], compile=True, rounds=3)
    last = report.trials[-1]
    assert last.setting == "float32, compiled" and (last.note or last.error < 1e-4)
    assert last.note or counters["stats"]["unique_graphs"] == 2
    assert any(m._compiled_call_impl for m in net.modules()) == last.chosen
    report.undo()
    assert torch.equal(net(x, 5), before) and not any(m._compiled_call_impl for m in net.modules())


LAYERS = {
    "linear": (lambda: nn.Linear(13, 7), [random(3, 13), random(13), random(2, 4, 13), random(4, 13, 2).mT]),
    "linear without bias": (lambda: nn.Linear(64, 32, bias=False), [random(5, 64)]),
    "groups, stride": (lambda: nn.Conv2d(6, 9, 3, 2, 1, groups=3),
                       [random(1, 6, 9, 7), random(2, 6, 8, 8).contiguous(memory_format=torch.channels_last), random(6, 9, 9), random(2, 6, 16, 16)[:, :, ::2]]),
    "dilation": (lambda: nn.Conv2d(4, 8, 3, padding=(1, 0), dilation=2, bias=False), [random(2, 4, 11, 5), random(0, 4, 11, 5)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_packed_layers_compute_the_same(name, dtype):
    """For any shape, strides and order of sizes; after a change of the weights; in copies, which are not packed."""
    make, inputs = LAYERS[name]
    layer, bound = make().to(dtype), 1e-5 if dtype == torch.float32 else 0.01
    truths = [layer(x.to(dtype)) for x in inputs]
    assert pack(layer) == 1 and pack(layer) == 0
    for x, truth in [*zip(inputs, truths)] * 2:
        answer = layer(x.to(dtype))
        unfit = not x.numel() or (x.ndim == 3 and isinstance(layer, nn.Conv2d))
        assert unfit or layer.forward.weight.is_mkldnn  # it was packed
        assert answer.shape == truth.shape and answer.dtype == dtype and (not x.numel() or relative_error(answer.float(), truth.float()) < bound)
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copy(inputs[0].to(dtype)), truths[0]) and copy.weight is not layer.weight and pack(copy) == 1
    layer.weight.mul_(2)
    layer.bias is not None and layer.bias.mul_(2)
    assert relative_error(layer(inputs[0].to(dtype)).float(), 2 * truths[0].float()) < bound
    for _ in range(3):  # other tensors, of which one may lie where an earlier one was
        layer.weight.data = torch.randn_like(layer.weight)
        assert relative_error(layer(inputs[0].to(dtype)).float(), type(layer).forward(layer, inputs[0].to(dtype)).float()) < bound
    layer.load_state_dict(make().to(dtype).state_dict())
    new = layer(inputs[0].to(dtype))
    assert unpack(layer) == 1 and unpack(layer) == 0
    assert relative_error(new.float(), layer(inputs[0].to(dtype)).float()) < bound


def test_packed_hands_over():
    """To the layer's own way for gradients, meters, other numbers; and what has a way of its own is not touched."""
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.Conv2d(2, 2, 3, padding="same"), nn.Conv1d(2, 2, 3))
    covered = nn.Linear(4, 4)
    covered.forward = lambda x: x
    net.append(covered)
    assert pack(net) == 1 and "forward" in net[0].__dict__ and covered(3) == 3
    x = random(2, 4).requires_grad_(True)
    net[0](x).sum().backward()
    assert x.grad is not None and net[0].weight.grad is not None
    with torch.no_grad():
        net[0](x)
        assert measure_work(lambda: net[0](x)).multiply_adds == 2 * 4 * 4
        with torch.autocast("cpu"):
            assert net[0](x).dtype == torch.bfloat16
        net[0].double()
        assert net[0](x.double()).dtype == torch.float64
        net[0].float()
        assert torch.func.jvp(net[0], (x,), (x,))[1].abs().max() > 0 and torch.func.vmap(net[0])(x).shape == (2, 4)
    with torch.inference_mode():
        other = nn.Linear(4, 4)
        assert pack(other) == 1 and other(x).shape == (2, 4)
    assert unpack(net) == 1 and covered(3) == 3
    nn.utils.parametrizations.weight_norm(net[0])
    assert pack(net) == 0


def test_packed_model_lets_go():
    """Nothing keeps a packed layer alive when its owner has let it go."""
    layer = nn.Linear(4, 4)
    pack(layer)
    gone = weakref.ref(layer)
    with torch.no_grad():
        layer(random(2, 4))
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_packed_text_is_remembered():
    """`cached_text` covers packed layers, too, and gives them back packed."""
    net, x = unet(use_spatial_transformer=True, context_dim=8), random(1, 3, 8, 8)
    words = random(1, 5, 8)
    with torch.no_grad():
        truth = net(x, 5, words)
        pack(net)
        with cached_text(net) as cache:
            assert relative_error(net(x, 5, words), truth) < 1e-5 and relative_error(net(x, 5, words), truth) < 1e-5
        assert cache.hits == cache.misses > 0
        with cached_text(net), pytest.raises(ValueError, match="nested"), cached_text(net):
            pass
    assert unpack(net) == len(speed._packable(net))


def test_nothing_to_pack():
    """The setting drops out by itself, and with a note where it was asked for."""
    net = randomize(UNetND(1, 3, 2, channels=(32, 32))).eval()
    _, report = make_fast(net, random(1, 3, 16), settings=["float32, packed"], rounds=1)
    assert report.trials[1].note == "not here: ValueError" and report.trials[0].chosen


@pytest.mark.slow
def test_packed_compiled():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1)).requires_grad_(False)
    x = random(1, 3, 8, 8)
    truth = net(x)
    assert pack(net) == 2
    assert relative_error(torch.compile(net)(x), truth) < 1e-5 and relative_error(net(x), truth) < 1e-5


def test_packed_is_not_made_fast():
    net, (x, t) = unet(), MODELS["UNetModel"][1]
    assert pack(net) > 5
    with pytest.raises(ValueError, match="model is packed"):
        make_fast(net, x, t, rounds=1)
    unpack(net)
    _, report = make_fast(net, x, t, settings=["float32, packed"], rounds=1)
    assert [r.setting for r in report.trials] == ["float32", "float32, packed"] and report.trials[1].error < 1e-5


def test_report(monkeypatch):
    report = SpeedReport([Trial("unet", "float32", 0.2, 0.0, False), Trial("unet", "bfloat16", 0.1, 0.004, True), Trial("vae", "float32", 0.3, 0.0, True)])
    assert report.gains == {"unet": 2.0, "vae": 1.0} and "→ bfloat16" in repr(report) and "2.00×" in repr(report) and "4e-03" in repr(report)
    with pytest.raises(ValueError, match="nothing to go back to"):
        report.undo()
    assert repr(SpeedReport([], device="cuda:1")).endswith("\non cuda:1")
    for number, end in ((1, "\non 1 thread"), (2, "\non 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert repr(report).endswith(end) and max(map(len, repr(report).splitlines())) <= 75


def test_forget():
    net, (x, t) = unet(), MODELS["UNetModel"][1]
    _, report = make_fast(net, x, t, settings=["bfloat16"], rounds=1)
    report.forget()
    with pytest.raises(ValueError, match="forget"):
        report.undo()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Identity(), {}, "model=Identity"),
        (lambda: unet().train(), {}, "eval"),
        (lambda: nn.ModuleList([unet().train()]).train(False).append(nn.Dropout()), {}, "eval"),
        (lambda: unet().half(), {}, "float32"),
        (unet, dict(bound=0), "bound=0"),
        (unet, dict(bound=math.nan), "bound=nan"),
        (unet, dict(bound=True), "bound=True"),
        (unet, dict(rounds=0), "rounds=0"),
        (unet, dict(settings=["float8"]), "float8"),
        (unet, dict(call=lambda net, x, t: torch.rand(3)), "two calls"),
        (unet, dict(call=lambda net, x, t: SimpleNamespace(mean=net(x, t))), "call must give a tensor, .*; it gave SimpleNamespace"),
        (small_pipe, dict(call=lambda pipe, x, t: x), "call is for a single network"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_fast(model(), random(1, 3, 8, 8), 5, **options)


# Text


def walk(net, sampler=ddim, steps=4, scale=3.0, words=2, seed=0, **options):
    schedule = Schedule.cosine(50)
    context, null = random(words, 5, 12, seed=seed), random(1, 5, 12, seed=99)
    guided = Guided(net, scale, null=null[0], schedule=schedule, **options)
    return sample(sampler(denoiser(guided, schedule, "v", context=context), random(words, 3, 8, 8, seed=seed), schedule, steps))


@pytest.mark.parametrize("options", [{}, dict(interval=(0.2, 3.0)), dict(scale=1.0)])
@pytest.mark.parametrize("network", [{}, dict(disable_self_attentions=(False, True), transformer_depth=2)])
def test_text_is_exact(options, network):
    """Bit for bit, and each layer computes once for each set of words."""
    net = text_unet(**network)
    plain = walk(net, **options)
    with cached_text(net) as cache:
        assert torch.equal(walk(net, **options), plain)
        computed = cache.misses
        assert torch.equal(walk(net, **options), plain) and cache.misses == computed
    assert cache.hits > cache.misses and not any("forward" in vars(m) for m in net.modules())
    assert torch.equal(walk(net, **options), plain)


def test_text_never_old():
    """Other words, other weights, numbers written into a tensor, another dtype, gradients: nothing old is handed out."""
    net, x = text_unet(), random(1, 3, 8, 8)
    words = random(1, 5, 12)
    with cached_text(net, keep=1), torch.no_grad():
        first = net(x, 5, words)
        words.mul_(2)
        doubled = net(x, 5, words)
        for p in net.parameters():
            p.mul_(1.1)
        heavier = net(x, 5, words)
        net.convert_torso(torch.bfloat16)
        rough = net(x, 5, words)
    net.convert_torso(torch.float32)
    plain = text_unet()
    with torch.no_grad():
        assert torch.equal(first, plain(x, 5, words / 2)) and torch.equal(doubled, plain(x, 5, words))
        for p in plain.parameters():
            p.mul_(1.1)
        assert torch.equal(heavier, plain(x, 5, words)) and 0 < relative_error(rough, heavier) < 0.05


def test_text_other_tensors():
    """Weights that are replaced by others, and another precision of the computation."""
    net, x, words = text_unet(), random(1, 3, 8, 8), random(1, 5, 12)
    attn = next(m for m in net.modules() if hasattr(m, "disable_self_attn")).attn2
    with cached_text(net), torch.no_grad():
        plain = attn.to_k(words).clone()
        for factor in (2, 3, 4):
            attn.to_k.weight.data = attn.to_k.weight.data * factor  # the old one is let go, and its place may be taken
        assert torch.allclose(attn.to_k(words), 24 * plain, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert attn.to_k(words).dtype == torch.bfloat16
        assert attn.to_k(words).dtype == torch.float32
        net(x, 5, words)


def test_text_two_networks():
    """Each layer has its own memory."""
    one, two, x, words = text_unet(), randomize(text_unet(), 1), random(1, 3, 8, 8), random(1, 5, 12)
    plain = one(x, 5, words), two(x, 5, words)
    with cached_text(one) as first, cached_text(two), torch.inference_mode():
        for _ in range(2):
            assert torch.equal(one(x, 5, words), plain[0]) and torch.equal(two(x, 5, words), plain[1])
    assert first.hits == first.misses > 0


def test_text_with_gradients():
    """Where gradients are wanted, nothing is kept, and they are right."""
    net = text_unet().requires_grad_(True)
    x, words = random(1, 3, 8, 8), random(1, 5, 12).requires_grad_()
    with cached_text(net) as cache:
        for _ in range(2):
            words.grad = None
            net(x, 5, words).sum().backward()
    kept = words.grad.clone()
    words.grad = None
    net(x, 5, words).sum().backward()
    assert (cache.hits, cache.misses) == (0, 0) and torch.allclose(kept, words.grad)


def test_text_undone_after_an_error():
    net = text_unet()
    with pytest.raises(RuntimeError), cached_text(net):
        raise RuntimeError
    assert not any("forward" in vars(m) for m in net.modules())


@pytest.mark.bad_input
def test_text_refused():
    with pytest.raises(ValueError, match="no cross-attention"), cached_text(unet()):
        pass
    with pytest.raises(ValueError, match="keep=0"), cached_text(text_unet(), keep=0):
        pass
    with pytest.raises(ValueError, match="nested"), cached_text(net := text_unet()), cached_text(net):
        pass
    assert not any("forward" in vars(m) for m in net.modules())


# Reuse


NETWORKS = {
    "plain": dict(),
    "text": dict(use_spatial_transformer=True, context_dim=12),
    "classes": dict(num_classes=4),
    "updown": dict(resblock_updown=True),
    "three levels": dict(channel_mult=(1, 1, 2), num_res_blocks=2),
}


def told(name, batch=2):
    return {"text": dict(context=random(batch, 5, 12)), "classes": dict(y=torch.arange(batch))}.get(name, {})


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("name", NETWORKS)
def test_reuse_every_time_is_none(name, size):
    """every=1 is the network, bit for bit, at any depth and odd sizes."""
    net, x = unet(**NETWORKS[name]), random(2, 3, *size)
    for shallow in range(1, len(net.input_blocks) + 1):
        with reuse_features(net, every=1, shallow=shallow) as memory:
            for t in (40, 30):
                assert torch.equal(net(x, t, **told(name)), UNetModel.forward(net, x, t, **told(name)))
        assert (memory.full, memory.partial) == (2, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_reuse_is_what_it_says(name):
    """A partial call: the outer blocks with x and time of now, and from below what came up in the call before."""
    net, x, y = unet(**NETWORKS[name]), random(2, 3, 9, 8), random(2, 3, 9, 8, seed=1)
    for shallow in range(1, len(net.input_blocks) + 1):
        below, seen = net.output_blocks[-shallow - 1] if shallow < len(net.output_blocks) else net.middle_block, []
        handle = below.register_forward_hook(lambda module, given, out: seen.append(out))
        net(x, 40, **told(name))
        handle.remove()
        handle = below.register_forward_hook(lambda module, given, out: seen[0])  # whatever comes up is what came up then
        wanted = net(y, 30, **told(name))
        handle.remove()
        with reuse_features(net, every=2, shallow=shallow) as memory:
            net(x, 40, **told(name))
            assert torch.allclose(net(y, 30, **told(name)), wanted, atol=1e-5)
        assert (memory.full, memory.partial) == (1, 1)


@pytest.mark.parametrize(("every", "full"), [(1, 10), (2, 5), (3, 4), (4, 3), (10, 1), (99, 1)])
def test_reuse_counts(every, full):
    net = text_unet()
    with reuse_features(net, every=every) as memory:
        walk(net, dpm_solver, steps=10)
    assert (memory.full, memory.partial) == (full, 10 - full)


def test_reuse_saves_work():
    net, x = unet(channel_mult=(1, 2, 2)), random(1, 3, 8, 8)
    with reuse_features(net, shallow=1):
        works = [measure_work(lambda: net(x, t)).multiply_adds for t in (40, 30)]
    assert works[1] < 0.5 * works[0] and works[0] == measure_work(lambda: net(x, 40)).multiply_adds


def test_reuse_begins_anew():
    """Another walk (the time has not fallen), another size, another block of `with`: never what belongs elsewhere."""
    net, x, y = unet(), random(1, 3, 8, 8), random(1, 3, 8, 8, seed=1)
    with reuse_features(net, every=99) as memory:
        net(x, 40)
        for t in (40, 900):
            assert torch.equal(net(y, t), UNetModel.forward(net, y, t)), t
        big = random(2, 3, 8, 8)
        assert torch.equal(net(big, 20), UNetModel.forward(net, big, 20))
        assert memory.partial == 0
        net(big, 10)
        assert memory.partial == 1
    with reuse_features(net, every=99) as memory:
        assert torch.equal(net(big, 5), UNetModel.forward(net, big, 5)) and memory.full == 1
    assert memory.features is None and "forward" not in vars(net)


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddpm"])
def test_reuse_side_by_side(sampler):
    """Pictures that are drawn side by side, one call for each, never get each other's features."""
    pipe = small_pipe()
    walk = dict(prompts=["a", "bcd"], steps=3, sampler=sampler)
    if sampler == "dpm_solver":
        pipe.unet = InTurn(pipe.unet)
        pipe.unet.in_channels, pipe.unet.image_size = pipe.unet.model.in_channels, pipe.unet.model.image_size
    plain = sample(pipe.steps(**walk))
    with reuse_features(pipe, every=99) as memory:
        assert torch.equal(sample(pipe.steps(**walk)), plain) and memory.partial == 0
        sample(pipe.steps("a", steps=3, guidance=1.0, sampler=sampler))
    assert memory.partial > 0


def test_reuse_and_gradients():
    """Features through which a gradient flows are not kept for the next call, and a time tensor may be written into."""
    net, x, t = unet(), random(1, 3, 8, 8), torch.tensor([40.0])
    with reuse_features(net, every=99) as memory:
        for scale in (1, 2):
            asked = x.clone().requires_grad_()
            (net(asked, t) * scale).sum().backward()
            t -= 10
            assert asked.grad is not None
        assert memory.partial == 0
        for _ in range(2):
            net(x, t)
            t -= 5
        assert memory.partial == 1
        net.requires_grad_(True)
        net(x, t).sum().backward()  # what is at hand was computed without gradients
        assert memory.partial == 1 and all(p.grad.abs().sum() > 0 for p in net.middle_block.parameters())
        with torch.no_grad():
            for _ in range(2):
                t -= 5
                net(x, t)
        assert memory.partial == 2


def test_reuse_with_a_list_of_contexts():
    """Each block of a transformer has words of its own; with gradients allowed, but none asked for."""
    net = randomize(UNetModel(**SMALL | dict(use_spatial_transformer=True, transformer_depth=2, context_dim=[12, 10]))).eval().requires_grad_(False)
    words = [random(1, 5, 12), random(1, 4, 10)]
    with reuse_features(net, every=99) as memory:
        for t in (40, 30):
            net(random(1, 3, 8, 8), t, context=words)
        assert memory.partial == 1
        net(random(1, 3, 8, 8), 20, context=[words[0], words[1].clone().requires_grad_()]).sum().backward()
        assert memory.partial == 1


@pytest.mark.parametrize("sampler", [ddim, dpm_solver, heun])
def test_reuse_in_samplers(sampler):
    """Different from the full walk, finite, and with an interval of guidance, too."""
    net = text_unet()
    for options in ({}, dict(interval=(0.2, 3.0))):
        plain = walk(net, sampler, steps=6, **options)
        with reuse_features(net, every=3) as memory, cached_text(net):
            reused = walk(net, sampler, steps=6, **options)
        assert memory.partial > 0 and reused.isfinite().all() and 0 < relative_error(reused, plain)


@pytest.mark.bad_input
def test_reuse_refused():
    net = unet()
    for options, message in ((dict(every=0), "every=0"), (dict(shallow=0), "shallow=0"), (dict(shallow=99), "at most 4"), (dict(every=1.5), "every=1.5")):
        with pytest.raises(ValueError, match=message), reuse_features(net, **options):
            pass
    with pytest.raises(ValueError, match="it has 0"), reuse_features(nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match="it has 2"), reuse_features(nn.ModuleList([net, unet()])):
        pass
    with pytest.raises(ValueError, match="nested"), reuse_features(net), reuse_features(net):
        pass
    assert "forward" not in vars(net)


def probe_reuse(examples):
    """Draws of arguments: a walk as it should be, or an error that names the argument."""
    net, tally = text_unet(), Counter()
    plain = walk(net, steps=5)
    often = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 30, 99, 0, 2.5, "2"])
    deep = st.sampled_from([1, 2, 3, 4] * 3 + [0, 9])

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(often, deep)
    def probe(every, shallow):
        try:
            with reuse_features(net, every, shallow) as memory:
                out = walk(net, steps=5)
        except (ValueError, TypeError) as error:
            tally["refused"] += 1
            assert "every" in str(error) or "shallow" in str(error)
        else:
            tally["valid"] += 1
            assert memory.full == -(-5 // every) and memory.full + memory.partial == 5
            assert out.shape == plain.shape and torch.equal(out, plain) == (every == 1)
        assert "forward" not in vars(net)

    probe()
    return tally


@pytest.mark.bad_input
def test_reuse_arguments():
    mostly_valid(probe_reuse(40))


@pytest.mark.slow
@pytest.mark.bad_input
def test_reuse_many_arguments():
    mostly_valid(probe_reuse(300))
