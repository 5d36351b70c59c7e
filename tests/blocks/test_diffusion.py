"""Noise schedules and targets: equal to diffusers', exact in float64, convertible into each other, clear about what they refuse."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_course.diffusion import (
    PREDICTIONS,
    Schedule,
    cosine_betas,
    diffusion_loss,
    linear_betas,
    loss_weight,
    posterior,
    scaled_linear_betas,
    target,
    to_noise,
    to_x0,
    zero_terminal_snr,
)
from unet_course.workbench import relative_error

BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "squaredcos_cap_v2": cosine_betas}
RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (1e-4, 0.02)}  # diffusers does not use the last
ALL = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "cosine": Schedule.cosine,
    "flow": Schedule.flow,
    "flow, shifted": lambda steps=1000: Schedule.flow(steps, shift=3.0),
    "zero terminal": lambda steps=1000: Schedule.from_betas(zero_terminal_snr(scaled_linear_betas(steps))),
    "exploding": lambda steps=1000: Schedule([1.0] * steps, torch.logspace(-2, 2, steps).tolist()),
}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def theirs(kind="DDPMScheduler", schedule="linear", steps=1000, **kwargs):
    """A scheduler of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    start, end = RANGES[schedule]
    return getattr(diffusers, kind)(num_train_timesteps=steps, beta_schedule=schedule, beta_start=start, beta_end=end, **kwargs)


def exactly(reference, schedule):
    """The same scheduler with tables in float64: in float32, 1 − alphas_cumprod loses three digits where there is little noise."""
    reference.alphas_cumprod, reference.one = schedule.alphas_cumprod, torch.tensor(1.0, dtype=torch.float64)
    return reference


# The references


@pytest.mark.parametrize("steps", [1, 10, 200, 1000])
@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_betas_equal_diffusers(kind, name, steps):
    reference, betas = theirs(kind, name, steps), BETAS[name](steps)
    schedule = Schedule.from_betas(betas)
    assert betas.dtype == schedule.alphas.dtype == schedule.sigmas.dtype == torch.float64
    assert (betas - reference.betas).abs().max() < 1e-6
    assert (schedule.alphas_cumprod - reference.alphas_cumprod).abs().max() < 1e-5
    assert (schedule.alphas - reference.alphas_cumprod.sqrt()).abs().max() < 1e-5
    assert torch.allclose(schedule.betas, betas, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BETAS)
def test_zero_terminal_snr_equals_diffusers(name):
    reference, betas = theirs("DDIMScheduler", name, rescale_betas_zero_snr=True), zero_terminal_snr(BETAS[name]())
    schedule = Schedule.from_betas(betas)
    assert (betas - reference.betas).abs().max() < 1e-5 and (schedule.alphas_cumprod - reference.alphas_cumprod).abs().max() < 1e-5
    assert betas[-1] == 1 and schedule.alphas[-1] == 0 and schedule.sigmas[-1] == 1 and schedule.noise_levels[-1] == math.inf
    assert schedule.log_snr[-1] == -math.inf and schedule.snr[-1] == 0
    assert betas[0].item() == pytest.approx(BETAS[name]()[0].item(), rel=1e-9)  # the first step stays as it was


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [10, 1000])
def test_flow_equals_diffusers(steps, shift):
    reference = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    schedule = Schedule.flow(steps, shift)
    assert (schedule.sigmas - reference.sigmas.flip(0)).abs().max() < 1e-6
    assert torch.allclose(schedule.times * steps / 1000, reference.timesteps.flip(0), rtol=1e-6)
    x0, noise, t = random(4, 1, 5, 3), random(4, 1, 5, 3, seed=1), torch.tensor([0, 3, 7, steps - 1])
    scaled = reference.scale_noise(x0, reference.timesteps.flip(0)[t], noise)
    assert relative_error(schedule.add_noise(x0, noise, t), scaled) < 1e-6


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6, 5), (2, 3, 4, 5)])
def test_noise_and_velocity_equal_diffusers(name, zero, shape):
    reference = theirs("DDIMScheduler", name, rescale_betas_zero_snr=zero)
    schedule = Schedule.from_betas(zero_terminal_snr(BETAS[name]()) if zero else BETAS[name]())
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    x0, noise = random(6, *shape), random(6, *shape, seed=1)
    assert relative_error(schedule.add_noise(x0, noise, t), reference.add_noise(x0, noise, t)) < 1e-5
    velocity = target("v", x0, noise, *schedule.at(t, x0))
    assert relative_error(velocity, reference.get_velocity(x0, noise, t)) < 1e-5
    x0, noise = x0.double(), noise.double()
    assert (schedule.add_noise(x0, noise, t) - exactly(reference, schedule).add_noise(x0, noise, t)).abs().max() < 1e-9
    assert (target("v", x0, noise, *schedule.at(t, x0)) - reference.get_velocity(x0, noise, t)).abs().max() < 1e-9


@pytest.mark.parametrize("name", BETAS)
def test_posterior_equals_a_step_of_ddpm(name):
    """diffusers' step adds noise of a known seed: subtract it."""
    schedule = Schedule.from_betas(BETAS[name]())
    reference = exactly(theirs("DDPMScheduler", name, prediction_type="sample", clip_sample=False), schedule)
    x_t, x0 = random(2, 1, 4, 3, dtype=torch.float64), random(2, 1, 4, 3, seed=1, dtype=torch.float64)
    for t in (0, 1, 2, 500, 998, 999):
        mean, variance = posterior(schedule, x_t, x0, t, t - 1 if t else None)
        assert variance == pytest.approx(float(reference._get_variance(t)), rel=1e-9, abs=1e-19)
        step = reference.step(x0, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
        noise = random(2, 1, 4, 3, seed=5, dtype=torch.float64) if t else torch.zeros_like(x0)
        assert (mean + variance**0.5 * noise - step).abs().max() < 1e-9


def test_min_snr_weights_are_those_of_the_training_scripts():
    snr = Schedule.scaled_linear().snr
    capped = torch.stack([snr, torch.full_like(snr, 5.0)], 1).min(1)[0]
    assert torch.allclose(loss_weight("epsilon", snr), capped / snr, rtol=1e-12)
    assert torch.allclose(loss_weight("v", snr), capped / (snr + 1), rtol=1e-12)
    assert torch.equal(loss_weight("x0", snr), capped)
    compute_snr = pytest.importorskip("diffusers.training_utils").compute_snr
    assert torch.allclose(compute_snr(theirs(schedule="scaled_linear"), torch.arange(1000)).double(), snr, rtol=1e-4)


# Schedules


@pytest.mark.parametrize("name", ALL)
def test_views_agree(name):
    schedule = ALL[name]()
    assert len(schedule) == len(schedule.times) == 1000 and "1000 steps" in repr(schedule)
    assert (schedule.snr.diff() < 0).all() and (schedule.noise_levels.diff() > 0).all()
    assert torch.allclose(schedule.snr, schedule.noise_levels**-2) and torch.allclose(schedule.log_snr.exp(), schedule.snr)
    if name in ("flow", "flow, shifted", "exploding"):
        with pytest.raises(ValueError, match="betas exist only where"):
            schedule.betas
        with pytest.raises(ValueError, match="betas exist only where"):
            schedule.alphas_cumprod
    else:
        assert torch.allclose(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(Schedule.from_betas(schedule.betas).alphas, schedule.alphas, rtol=1e-9, atol=1e-12)


def test_every_argument_does_something():
    for function in (linear_betas, scaled_linear_betas):
        assert len(function(7)) == 7
        assert function(7, 0.001, 0.5)[[0, -1]].tolist() == pytest.approx([0.001, 0.5])
    assert not torch.allclose(linear_betas(), scaled_linear_betas(start=1e-4, end=0.02))
    assert cosine_betas(10, max_beta=0.5).max() == 0.5 and cosine_betas(10).max() == 0.999
    assert len(Schedule.linear(5)) == len(Schedule.scaled_linear(5)) == len(Schedule.cosine(5)) == len(Schedule.flow(5)) == 5
    for make in (Schedule.linear, Schedule.scaled_linear):
        assert make(3, 0.1, 0.3).betas[[0, -1]].tolist() == pytest.approx([0.1, 0.3])
    assert Schedule.cosine(10, max_beta=0.5).betas[-1].item() == pytest.approx(0.5)
    assert Schedule([0.9, 0.1], [0.1, 0.9]).times.tolist() == [0, 1] and Schedule([0.9, 0.1], [0.1, 0.9], [3.5, 7]).times.tolist() == [3.5, 7]


def test_the_shift_multiplies_noise_levels():
    plain, shifted = Schedule.flow(100), Schedule.flow(100, shift=3.0)
    assert torch.allclose(shifted.noise_levels, 3 * plain.noise_levels, rtol=1e-10)
    assert torch.allclose(shifted.times, (1000 * shifted.sigmas).float()) and (shifted.alphas + shifted.sigmas - 1).abs().max() < 1e-15


def test_the_published_facts():
    assert Schedule.linear(200).alphas[-1].item() == pytest.approx(0.36, abs=0.005)
    assert Schedule.linear().alphas[-1].item() == pytest.approx(0.006, abs=0.0005)
    assert Schedule.scaled_linear().alphas[-1].item() == pytest.approx(0.068, abs=0.0005)


def test_tables_are_the_schedules_own():
    alphas, sigmas = torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5])
    schedule = Schedule(alphas, sigmas)
    alphas[0] = 0.0
    assert schedule.alphas[0].item() == pytest.approx(0.9)
    x = random(2, 3)
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert torch.equal(other.add_noise(x, x, 1), schedule.add_noise(x, x, 1))


# At some steps


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 4, 5), (1, 3, 4, 5), (1, 2, 2, 2, 2)])
def test_any_number_of_axes(shape):
    schedule, t = Schedule.cosine(), torch.tensor([0, 500, 999])
    x0, noise = random(3, *shape), random(3, *shape, seed=1)
    alpha, sigma = schedule.at(t, x0)
    assert alpha.shape == sigma.shape == (3,) + (1,) * len(shape)
    x_t = schedule.add_noise(x0, noise, t)
    for i, step in enumerate(t.tolist()):
        assert torch.allclose(x_t[i], schedule.alphas[step].float() * x0[i] + schedule.sigmas[step].float() * noise[i], atol=1e-6)
        assert torch.equal(schedule.add_noise(x0, noise, step)[i], x_t[i])  # a whole number means all
    model = lambda x, times: x * 0.5
    for prediction in PREDICTIONS:
        assert diffusion_loss(model, x0, schedule, prediction, min_snr=5.0).shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_number_formats_are_kept(dtype):
    schedule, t = Schedule.scaled_linear(), torch.tensor([3, 900])
    x0, noise = random(2, 1, 4, 4).to(dtype), random(2, 1, 4, 4, seed=1).to(dtype)
    alpha, sigma = schedule.at(t, x0)
    x_t = schedule.add_noise(x0, noise, t)
    assert alpha.dtype == sigma.dtype == x_t.dtype == dtype
    exact = schedule.add_noise(x0.double(), noise.double(), t)
    assert relative_error(x_t, exact) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    for prediction in PREDICTIONS:
        wanted = target(prediction, x0, noise, alpha, sigma)
        assert wanted.dtype == to_x0(prediction, wanted, x_t, alpha, sigma).dtype == to_noise(prediction, wanted, x_t, alpha, sigma).dtype == dtype
        loss = diffusion_loss(lambda x, times: 0 * x, 200 * x0, schedule, prediction, t=t, noise=200 * noise)
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.isfinite()  # the squares do not fit into float16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_whole_number_is_a_step(dtype):
    schedule, x = Schedule.linear(), random(2, 3)
    assert torch.equal(schedule.add_noise(x, x, torch.tensor([3, 200 if dtype == torch.uint8 else 999]).to(dtype))[0], schedule.add_noise(x, x, 3)[0])


def test_follows_the_pictures_to_their_device():
    """PyTorch's meta device stands for any other."""
    schedule, x = Schedule.flow(), torch.zeros(2, 1, 3, 3, device="meta")
    for t in (torch.tensor([0, 5]), torch.tensor([0, 5], device="meta"), 5):
        assert schedule.add_noise(x, x, t).device.type == "meta"
    assert schedule.time(torch.tensor([0, 5], device="meta")).device.type == "meta"
    seen = []
    diffusion_loss(lambda x, times: seen.append(times) or x, x, schedule, "v", min_snr=5.0, generator=torch.Generator())
    assert seen[0].device.type == "meta"  # drawn where the generator lives, sent to where the pictures are


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The same numbers as on the CPU, from a generator on either side, with steps on either side."""
    schedule, x0 = Schedule.cosine(), random(4, 1, 5, 5)
    losses = [diffusion_loss(lambda x, times: x, x, schedule, "v", min_snr=5.0, generator=torch.Generator().manual_seed(0)) for x in (x0, x0.cuda())]
    assert losses[1].is_cuda and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    t = torch.tensor([0, 10, 500, 999])
    for steps in (t, t.cuda(), 500):
        x_t = schedule.add_noise(x0.cuda(), x0.cuda(), steps)
        assert x_t.is_cuda and torch.allclose(x_t.cpu(), schedule.add_noise(x0, x0, steps if isinstance(steps, int) else t), atol=1e-6)
    assert torch.allclose(schedule.add_noise(x0, x0, t.cuda()), schedule.add_noise(x0, x0, t))
    generator = torch.Generator("cuda").manual_seed(0)
    assert diffusion_loss(lambda x, times: x, x0.half().cuda(), schedule, "v", generator=generator).isfinite()


def test_first_use_in_inference_mode_does_no_harm():
    schedule, x = Schedule.linear(), random(2, 3)
    with torch.inference_mode():
        schedule.add_noise(x, x, 5)
    output = x.clone().requires_grad_()
    to_x0("epsilon", output, x, *schedule.at(5, x)).sum().backward()
    assert output.grad.isfinite().all()


def test_gradients_reach_the_picture():
    """For sampling methods that differentiate with respect to x."""
    schedule, x = Schedule.cosine(), random(2, 3).requires_grad_()
    schedule.add_noise(x, torch.zeros(2, 3), 400).sum().backward()
    assert torch.allclose(x.grad, schedule.alphas[400].float().expand(2, 3))


# The chain of small steps


def test_one_jump_is_many_steps():
    """Mean and variance of the chain, exactly and by Monte Carlo."""
    schedule, mean, variance = Schedule.linear(50, 0.001, 0.2), 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        assert mean == pytest.approx(schedule.alphas[t].item(), rel=1e-9) and variance == pytest.approx(schedule.sigmas[t].item() ** 2, rel=1e-9)
    generator, x = torch.Generator().manual_seed(0), torch.full((20000,), 0.7)
    for beta in schedule.betas.tolist():
        x = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=generator)
    assert abs(x.mean() - 0.7 * schedule.alphas[-1]) < 0.04 and abs(x.var() - schedule.sigmas[-1] ** 2) < 0.05


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("t", "s"), [(999, 998), (999, 500), (500, 499), (500, 3), (1, 0), (999, None), (0, None)])
def test_posterior_by_brute_force(name, t, s):
    """Bayes' rule on a fine grid, in one dimension."""
    schedule, x0 = ALL[name](), 0.4
    alpha_t, sigma_t = schedule.alphas[t].item(), schedule.sigmas[t].item()
    alpha_s, sigma_s = (1.0, 0.0) if s is None else (schedule.alphas[s].item(), schedule.sigmas[s].item())
    x_t = alpha_t * x0 - 1.7 * sigma_t
    mean, variance = posterior(schedule, torch.full((1,), x_t, dtype=torch.float64), torch.full((1,), x0, dtype=torch.float64), t, s)
    if s is None:
        assert mean.item() == pytest.approx(x0) and variance == 0
        return
    grid = torch.linspace(alpha_s * x0 - 12 * sigma_s, alpha_s * x0 + 12 * sigma_s, 400001, dtype=torch.float64)
    keep = alpha_t / alpha_s
    log_density = -((grid - alpha_s * x0) ** 2) / (2 * sigma_s**2) - (x_t - keep * grid) ** 2 / (2 * (sigma_t**2 - (keep * sigma_s) ** 2))
    density = (log_density - log_density.max()).exp()
    density /= density.sum()
    expected = (density * grid).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=1e-6 * (alpha_s + sigma_s))
    assert variance == pytest.approx((density * (grid - expected) ** 2).sum().item(), rel=1e-5)


# Targets and conversions


def test_targets_are_what_their_names_say():
    x0, noise, alpha, sigma = random(2, 3), random(2, 3, seed=1), 0.8, 0.6
    assert torch.equal(target("epsilon", x0, noise, alpha, sigma), noise) and torch.equal(target("x0", x0, noise, alpha, sigma), x0)
    assert torch.equal(target("flow", x0, noise, alpha, sigma), noise - x0)
    assert torch.allclose(target("v", x0, noise, alpha, sigma), 0.8 * noise - 0.6 * x0)


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(ALL)), st.sampled_from(PREDICTIONS), st.sampled_from(PREDICTIONS), st.integers(0, 999), SIZES, st.integers(0, 9))
def test_round_trips(name, first, second, t, sizes, seed):
    """From one prediction to picture and noise, to another one and back, at any step of any schedule."""
    schedule = ALL[name]()
    x0, noise = random(*sizes, seed=seed, dtype=torch.float64), random(*sizes, seed=seed + 10, dtype=torch.float64)
    alpha, sigma = schedule.at(t, x0)
    x_t = alpha * x0 + sigma * noise
    if not alpha.all() and "epsilon" in (first, second):
        with pytest.raises(ValueError, match="prediction='epsilon' does not tell the picture.*alpha is 0"):
            to_x0("epsilon", noise, x_t, alpha, sigma)
        return
    told = target(first, x0, noise, alpha, sigma)
    picture, rest = to_x0(first, told, x_t, alpha, sigma), to_noise(first, told, x_t, alpha, sigma)
    assert torch.allclose(picture, x0, atol=1e-8) and torch.allclose(rest, noise, atol=1e-8)
    other = target(second, picture, rest, alpha, sigma)
    back = target(first, to_x0(second, other, x_t, alpha, sigma), to_noise(second, other, x_t, alpha, sigma), alpha, sigma)
    assert torch.allclose(back, told, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_answer_fits_what_was_shown(prediction):
    """Also a wrong answer is turned into picture and noise that give x_t together."""
    schedule, x_t, answer = Schedule.cosine(), random(3, 1, 4, 4), random(3, 1, 4, 4, seed=1)
    alpha, sigma = schedule.at(torch.tensor([10, 400, 900]), x_t)
    picture, noise = (f(prediction, answer, x_t, alpha, sigma) for f in (to_x0, to_noise))
    assert torch.allclose(alpha * picture + sigma * noise, x_t, atol=1e-4)
    assert torch.allclose(target(prediction, picture, noise, alpha, sigma), answer, atol=1e-3)


def test_what_no_answer_tells():
    x = random(2, 3)
    with pytest.raises(ValueError, match="prediction='epsilon' does not tell the picture at a step where alpha is 0"):
        to_x0("epsilon", x, x, 0.0, 1.0)
    with pytest.raises(ValueError, match="prediction='x0' does not tell the noise at a step where sigma is 0"):
        to_noise("x0", x, x, 1.0, 0.0)
    assert torch.equal(to_noise("epsilon", x, x, 0.0, 1.0), x) and torch.equal(to_x0("x0", x, x, 1.0, 0.0), x)
    for prediction in ("v", "flow"):
        for alpha, sigma in ((0.0, 1.0), (1.0, 0.0)):
            assert to_x0(prediction, x, x, alpha, sigma).isfinite().all() and to_noise(prediction, x, x, alpha, sigma).isfinite().all()


# Weights and the loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "zero terminal"])
def test_weights_count_the_pictures_error_alike(prediction, name):
    """The weighted error of any prediction is min(snr, 5) times the squared error of the picture."""
    if prediction == "v" and name == "flow":
        return  # its v is no rotation: the weight is for alpha² + sigma² = 1
    schedule, t = ALL[name](), torch.tensor([0, 1, 100, 500, 900, 998])
    x_t, answer, wanted = (random(6, 8, seed=s, dtype=torch.float64) for s in range(3))
    alpha, sigma = schedule.at(t, x_t)
    picture_error = (to_x0(prediction, answer, x_t, alpha, sigma) - to_x0(prediction, wanted, x_t, alpha, sigma)).square().mean(1)
    weighted = loss_weight(prediction, schedule.snr[t]) * (answer - wanted).square().mean(1)
    assert torch.allclose(weighted, schedule.snr[t].clamp(max=5) * picture_error, rtol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_at_the_ends(prediction):
    ends = loss_weight(prediction, torch.tensor([0.0, math.inf]))
    assert ends.tolist() == {"epsilon": [1.0, 0.0], "x0": [0.0, 5.0], "v": [0.0, 0.0], "flow": [0.0, 0.0]}[prediction]
    snr = torch.logspace(-2, 2, 9)
    assert torch.equal(loss_weight(prediction, snr, None), torch.ones(9))
    assert not torch.allclose(loss_weight(prediction, snr, 1.0), loss_weight(prediction, snr, 5.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_by_hand(prediction):
    schedule, x0, noise, t = Schedule.cosine(), random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1), torch.tensor([10, 300, 950])
    calls = []

    def model(x, times, **conditioning):
        calls.append((x, times, conditioning))
        return torch.tanh(x)

    loss = diffusion_loss(model, x0, schedule, prediction, t=t, noise=noise, y=torch.arange(3), context="words")
    (x_t, times, conditioning), error = calls[0], []
    assert torch.equal(times, schedule.times[t]) and torch.equal(x_t, schedule.add_noise(x0, noise, t))
    assert torch.equal(conditioning["y"], torch.arange(3)) and conditioning["context"] == "words"
    alpha, sigma = schedule.at(t, x0)
    error = (torch.tanh(x_t) - target(prediction, x0, noise, alpha, sigma)).square()
    assert loss.item() == pytest.approx(error.mean().item(), rel=1e-6)
    weighted = diffusion_loss(model, x0, schedule, prediction, t=t, noise=noise, min_snr=2.0)
    by_hand = (loss_weight(prediction, schedule.snr[t], 2.0) * error.mean((1, 2, 3))).mean()
    assert weighted.item() == pytest.approx(by_hand.item(), rel=1e-6) and weighted.item() != pytest.approx(loss.item(), rel=1e-3)


def test_loss_tells_flow_models_their_time():
    seen = []
    diffusion_loss(lambda x, times: seen.append(times) or x, random(2, 3), Schedule.flow(shift=2.0), "flow", t=torch.tensor([0, 999]))
    assert torch.allclose(seen[0], Schedule.flow(shift=2.0).times[[0, 999]]) and seen[0][1] == 1000 and seen[0].dtype == torch.float32


def test_loss_is_seeded_by_its_generator():
    schedule, x0 = Schedule.linear(), random(4, 1, 3, 3)
    draw = lambda seed: diffusion_loss(lambda x, times: x, x0, schedule, generator=torch.Generator().manual_seed(seed)).item()
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.get_rng_state())  # nothing global is touched
    steps = []
    for seed in range(40):
        diffusion_loss(lambda x, times: steps.append(times) or x, x0, Schedule.linear(5), generator=torch.Generator().manual_seed(seed))
    assert sorted(set(torch.cat(steps).tolist())) == [0, 1, 2, 3, 4]  # all steps, no others


def test_the_loss_learns_the_conditional_mean():
    """A free table for x0 in two noise bins converges to the mean of the pictures that look like that."""
    schedule, table = Schedule([0.6], [0.8]), torch.zeros(2, requires_grad=True)  # one step; answers depend on the sign of x_t
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(2, (4000,), generator=generator).float() * 2 - 1
    optimizer = torch.optim.SGD([table], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        diffusion_loss(lambda x, times: table[(x > 0).long()], x0, schedule, "x0", generator=generator).backward()
        optimizer.step()
    exact = math.erf(0.75 / 2**0.5)  # E[x0 | x_t > 0] for x0 = ±1: P(noise < 0.75) − P(noise > 0.75)
    assert torch.allclose(table.detach(), torch.tensor([-exact, exact]), atol=0.08)


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize("function", [*BETAS.values(), *(Schedule.linear, Schedule.scaled_linear, Schedule.cosine, Schedule.flow)])
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
def test_bad_number_of_steps(function, steps):
    with pytest.raises(ValueError, match=f"steps={steps!r} must be a whole number"):
        function(steps)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, math.nan])
def test_bad_betas(value):
    for function in (linear_betas, scaled_linear_betas):
        with pytest.raises(ValueError, match="start=.*must lie between 0 and 1"):
            function(10, start=value)
        with pytest.raises(ValueError, match="end=.*must lie between 0 and 1"):
            function(10, end=value)
    with pytest.raises(ValueError, match="max_beta=.*must lie between 0 and 1"):
        cosine_betas(10, value)
    for function in (Schedule.from_betas, zero_terminal_snr):
        with pytest.raises(ValueError, match="betas must"):
            function([0.1, value, 0.3])
        with pytest.raises(ValueError, match="only the last may be 1"):
            function([0.1, 1.0, 0.3])


def test_bad_shift():
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="shift=.*positive and finite"):
            Schedule.flow(10, shift)
    with pytest.raises(ValueError, match="at least two steps"):
        zero_terminal_snr([0.5])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("alphas", "sigmas", "times", "told"),
    [
        ([0.9, 0.1], [0.1], None, "2 alphas, 1 sigmas"),
        ([0.9, 0.1], [0.1, 0.9], [1], "1 times"),
        ([], [], None, "alphas must be a list with a number for each step"),
        (["a", "b"], [0.1, 0.9], None, "alphas must be a list with a number for each step"),
        (torch.ones(2, 2), torch.ones(2, 2), None, "alphas must be a list"),
        ([0.9, -0.1], [0.1, 0.9], None, "alphas must be finite and not negative"),
        ([0.9, 0.1], [0.1, math.inf], None, "sigmas must be finite"),
        ([0.1, 0.9], [0.9, 0.1], None, "signal-to-noise ratio.*must fall at every step"),
        ([0.9, 0.9], [0.1, 0.1], None, "signal-to-noise ratio.*must fall at every step"),
        ([0.9, 0.0], [0.1, 0.0], None, "signal-to-noise ratio.*must fall at every step"),
        ([0.0], [0.0], None, "signal-to-noise ratio.*must fall at every step"),
        ([1.0, 0.9], [0.0, 0.0], None, "signal-to-noise ratio.*must fall at every step"),
    ],
)
def test_bad_tables(alphas, sigmas, times, told):
    with pytest.raises(ValueError, match=told):
        Schedule(alphas, sigmas, times)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("t", "told"),
    [
        (torch.tensor([0.5, 1.0]), "whole numbers.*float32"),
        (torch.tensor([True, False]), "whole numbers.*bool"),
        (torch.tensor([0, 1, 2]), r"each of the 2 examples.*\(3,\)"),
        (torch.tensor(3), r"each of the 2 examples.*\(\)"),
        (torch.tensor([[0], [1]]), r"each of the 2 examples.*\(2, 1\)"),
        (torch.tensor([0, 1000]), "t=1000 is not a step of the schedule, which has the steps 0 … 999"),
        (torch.tensor([-1, 0]), "t=-1 is not a step"),
        (1000, "t=1000 is not a step"),
        (-1, "t=-1 is not a step"),
    ],
)
def test_bad_steps(t, told):
    schedule, x = Schedule.linear(), random(2, 3)
    with pytest.raises(ValueError, match=told):
        schedule.at(t, x)
    with pytest.raises(ValueError, match=told):
        schedule.add_noise(x, x, t)
    if isinstance(t, torch.Tensor) and t.shape == (2,):
        with pytest.raises(ValueError, match=told):
            schedule.time(t)
        with pytest.raises(ValueError, match=told):
            diffusion_loss(lambda x, times: x, x, schedule, t=t)


def test_bad_steps_of_the_posterior():
    schedule, x = Schedule.linear(), random(2, 3)
    for t, s, told in ((5, 5, "s=5 must be an earlier step than t=5"), (5, 6, "s=6"), (1000, 3, "t=1000"), (5, -1, "t=-1"), (-1, None, "t=-1")):
        with pytest.raises(ValueError, match=told):
            posterior(schedule, x, x, t, s)
    with pytest.raises(ValueError, match="t=0 must hold noise"):
        posterior(Schedule([1.0, 0.5], [0.0, 0.5]), x, x, 0, None)


@pytest.mark.bad_input
def test_bad_shapes():
    schedule, x, t = Schedule.linear(), random(4, 1, 5, 4), torch.arange(4)
    with pytest.raises(ValueError, match=r"noise must have the shape of x0, \(4, 1, 5, 4\); got \(1, 5, 4\)"):
        schedule.add_noise(x, x[0], t)
    with pytest.raises(ValueError, match="noise must have the shape of x0"):
        diffusion_loss(lambda x, times: x, x, schedule, noise=x[:2])
    with pytest.raises(ValueError, match="like must hold floating-point numbers.*int64"):
        schedule.add_noise(x.long(), x.long(), t)  # alpha and sigma would be rounded to 0
    for function in (target, to_x0, to_noise):
        with pytest.raises(ValueError, match=r"alpha must have as many axes as the pictures, 4; got the shape \(4,\)"):
            function("v", x, x, schedule.alphas[t].float(), 1.0)  # would be spread along the width
        with pytest.raises(ValueError, match="sigma must have as many axes"):
            function("v", x, x, 1.0, schedule.sigmas[t].float())
    with pytest.raises(ValueError, match=r"the model answers with the shape \(4, 2, 5, 4\)"):
        diffusion_loss(lambda x, times: torch.cat([x, x], 1), x, schedule)
    with pytest.raises(ValueError, match=r"the model answers with the shape \(4, 1, 1, 1\)"):
        diffusion_loss(lambda x, times: x[:, :, :1, :1], x, schedule)


@pytest.mark.parametrize("name", ["eps", "v_prediction", ""])
def test_unknown_prediction(name):
    x = random(2, 3)
    told = rf"prediction='{name}' is unknown; there are \['epsilon', 'x0', 'v', 'flow'\]"
    for function in (target, to_x0, to_noise):
        with pytest.raises(ValueError, match=told):
            function(name, x, x, 0.8, 0.6)
    with pytest.raises(ValueError, match=told):
        loss_weight(name, torch.ones(2))
    with pytest.raises(ValueError, match=told):
        diffusion_loss(lambda x, times: x, x, Schedule.linear(), name)


@pytest.mark.parametrize("min_snr", [0.0, -1.0, math.inf, math.nan])
def test_bad_min_snr(min_snr):
    with pytest.raises(ValueError, match="min_snr=.*positive and finite"):
        loss_weight("v", torch.ones(2), min_snr)


# Random arguments

NUMBERS = st.sampled_from([1e-6, 1e-4, 0.00085, 0.002, 0.01, 0.012, 0.02, 0.05, 0.1, 0.2, 0.5, 1.5, 0.0])
STEPS = st.sampled_from([1, 2, 3, 10, 25, 50, 100, 200, 500, 1000, 4000, 0])
DRAWS = st.one_of(
    st.tuples(st.just("linear"), st.fixed_dictionaries(dict(steps=STEPS, start=NUMBERS, end=NUMBERS))),
    st.tuples(st.just("scaled_linear"), st.fixed_dictionaries(dict(steps=STEPS, start=NUMBERS, end=NUMBERS))),
    st.tuples(st.just("cosine"), st.fixed_dictionaries(dict(steps=STEPS, max_beta=NUMBERS))),
    st.tuples(st.just("flow"), st.fixed_dictionaries(dict(steps=STEPS, shift=st.sampled_from([0.1, 1.0, 3.0, 12.0, 1e3, 0.0, -1.0])))),
)


def make_and_use(name, arguments):
    """Make a schedule and train one step with it; or a clear error. Whether it was a valid draw."""
    try:
        schedule = getattr(Schedule, name)(**arguments)
    except ValueError as error:
        largest = max(arguments.get("start", 0), arguments.get("end", 0))
        too_much = largest < 1 and -arguments["steps"] * math.log1p(-largest) > 300  # nothing is left long before the end
        assert any(f"{key}=" in str(error) for key in arguments) or (too_much and "signal-to-noise" in str(error)), (arguments, error)
        return False
    weight = torch.ones(1, requires_grad=True)
    t = torch.tensor([0, len(schedule) - 1])
    for prediction in PREDICTIONS:
        loss = diffusion_loss(lambda x, times: weight * x, random(2, 1, 3, 2), schedule, prediction, t=t, min_snr=5.0)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert loss.isfinite() and gradient.isfinite().all()
    return True


@pytest.mark.parametrize("draws", [80, pytest.param(800, marks=pytest.mark.slow)])
def test_any_arguments(draws):
    valid = []

    @settings(max_examples=draws, deadline=None, derandomize=True, database=None)
    @given(DRAWS)
    def run(draw):
        valid.append(make_and_use(*draw))

    run()
    assert sum(valid) / len(valid) >= 0.6, f"{sum(valid)} of {len(valid)}"
