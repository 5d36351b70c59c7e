"""Samplers: equal to diffusers', right in distribution and in order of accuracy, exact about what was asked, clear about what they refuse."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_course.diffusion import Schedule, posterior, scaled_linear_betas, target, zero_terminal_snr
from unet_course.sampling import Step, choose_steps, ddim, ddim_invert, ddpm, denoiser, dpm_solver, heun, img2img, inpaint, sample
from unet_course.workbench import relative_error

ZERO = Schedule.from_betas(zero_terminal_snr(scaled_linear_betas()))
ALL = {
    "linear": Schedule.linear(),
    "scaled_linear": Schedule.scaled_linear(),
    "cosine": Schedule.cosine(),
    "flow": Schedule.flow(),
    "flow, shifted": Schedule.flow(shift=3.0),
    "zero terminal": ZERO,
    "exploding": Schedule([1.0] * 1000, torch.logspace(-2, 2, 1000).tolist()),
}
SAMPLERS = {"ddpm": ddpm, "ddpm large": partial(ddpm, variance="large"), "ddim": ddim, "ddim half": partial(ddim, eta=0.5),
            "ddim one": partial(ddim, eta=1), "dpm_solver": dpm_solver, "heun": heun}  # fmt: skip
DETERMINISTIC = {"ddim": ddim, "dpm_solver": dpm_solver, "heun": heun}
CHANCE = {name: s for name, s in SAMPLERS.items() if name not in DETERMINISTIC}
PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}  # ours: diffusers' name
RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(x, times, y=0.0):
    """Fixed, smooth, different at every pixel and time; its Jacobian is not small."""
    times = times.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.7 * torch.tanh(x + 0.5 * x.roll(1, -1) - times / 700) + 0.2 * x + y


def theirs(kind, betas, **kwargs):
    """A scheduler of diffusers with its tables in float64."""
    diffusers = pytest.importorskip("diffusers")
    start, end = RANGES[betas]
    reference = getattr(diffusers, kind)(num_train_timesteps=1000, beta_schedule=betas, beta_start=start, beta_end=end, **kwargs)
    reference.alphas_cumprod, reference.one = ALL[betas].alphas_cumprod, torch.tensor(1.0, dtype=torch.float64)
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(reference, name):
            setattr(reference, name, torch.tensor(1.0, dtype=torch.float64))
    return reference


def walk_theirs(reference, prediction, x, times, **kwargs):
    """Their whole walk with our network: x after every step."""
    path, levels = [], ALL[reference.config.beta_schedule].noise_levels
    if hasattr(reference, "sigmas"):  # in float64, too
        exact = torch.cat([levels[times], levels.new_zeros(1)])
        twice = "Heun" in type(reference).__name__
        reference.sigmas = torch.cat([exact[:1], exact[1:-1].repeat_interleave(2), exact[-1:]]) if twice else exact
    for t in reference.timesteps:
        shown = reference.scale_model_input(x, t)
        output = network(shown, torch.full((len(x),), float(t)))
        x = reference.step(output, t if hasattr(reference, "sigmas") else int(t), x, return_dict=False, **kwargs)[0]
        path.append(x)
    return path


# The references


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_steps_equal_diffusers(spacing):
    """Every number of steps from 1 to 1000, exactly as many, all different, none outside."""
    reference, schedule = theirs("DDIMScheduler", "linear", timestep_spacing=spacing), ALL["linear"]
    for steps in [*range(1, 200), 250, 333, 499, 500, 501, 667, 998, 999, 1000]:
        times = choose_steps(schedule, steps, spacing)
        assert len(times) == steps and all(t > s for t, s in zip(times, times[1:])) and 0 <= times[-1] and times[0] <= 999
        reference.set_timesteps(steps)
        if spacing == "linspace" and steps == 1:
            assert times == [999]  # diffusers: [0], to begin at no noise
        elif len(reference.timesteps) == steps:  # theirs are 62 if 61 are asked for
            exact = 1000 % steps == 0 or steps in (15, 30, 60, 90, 99) or spacing == "leading"
            apart = [abs(a - b) for a, b in zip(times, reference.timesteps.tolist())]  # a tie may be rounded otherwise
            assert max(apart) <= (0 if exact else 1) and sum(apart) <= 0.1 * steps, steps


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("betas", RANGES)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddpm_equals_diffusers(variance, betas, prediction, clip):
    schedule, x = ALL[betas], random(2, 3, 5, 4, dtype=torch.float64)
    clipping = dict(clip_sample=clip is not None, clip_sample_range=clip or 1.0)
    reference = theirs("DDPMScheduler", betas, variance_type=f"fixed_{variance}", prediction_type=PREDICTION[prediction], **clipping)
    predict = denoiser(network, schedule, prediction, clip=clip)
    for times in (choose_steps(schedule, 20), choose_steps(schedule, 7, "leading"), [999, 998, 997], [3, 2, 1, 0]):
        reference.set_timesteps(timesteps=times)
        path = walk_theirs(reference, prediction, x, times, generator=seeded(1))
        ours = list(ddpm(predict, x, schedule, times, variance=variance, generator=seeded(1)))
        assert len(ours) == len(path)
        # one thing is theirs: their last step of a list goes to step -1 with the variance left out only at t = 0
        same = len(path) if times[-1] == 0 else len(path) - 1
        assert all(relative_error(step.x, other) < 1e-6 for step, other in zip(ours[:same], path))


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("betas", RANGES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_ddim_equals_diffusers(eta, betas, prediction, clip):
    schedule, x = ALL[betas], random(2, 3, 5, 4, dtype=torch.float64)
    clipping = dict(clip_sample=clip is not None, clip_sample_range=clip or 1.0)
    predict = denoiser(network, schedule, prediction, clip=clip)
    for steps, spacing in ((1, "trailing"), (50, "trailing"), (20, "leading")):
        reference = theirs("DDIMScheduler", betas, prediction_type=PREDICTION[prediction], timestep_spacing=spacing, **clipping)
        reference.set_timesteps(steps)
        times = choose_steps(schedule, steps, spacing)
        assert times == reference.timesteps.tolist()
        path = walk_theirs(reference, prediction, x, times, eta=eta, generator=seeded(1), use_clipped_model_output=clip is not None)
        ours = list(ddim(predict, x, schedule, times, eta=eta, generator=seeded(1)))
        same = steps if eta == 0 else steps - 1  # with eta they add noise of almost no variance at the very end
        assert all(relative_error(step.x, other) < 1e-6 for step, other in zip(ours[:same], path))
        assert relative_error(ours[-1].x, path[-1]) < 0.05


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("betas", RANGES)
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_dpm_solver_equals_diffusers(steps, betas, prediction):
    schedule, x = ALL[betas], random(2, 3, 5, 4, dtype=torch.float64)
    reference = theirs("DPMSolverMultistepScheduler", betas, prediction_type=PREDICTION[prediction], timestep_spacing="trailing", solver_order=2)
    reference.set_timesteps(steps)
    times = choose_steps(schedule, steps)
    assert times == reference.timesteps.tolist()
    path = walk_theirs(reference, prediction, x, times)
    ours = list(dpm_solver(denoiser(network, schedule, prediction), x, schedule, times))
    assert all(relative_error(step.x, other) < 1e-5 for step, other in zip(ours, path)) and len(ours) == len(path)


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("betas", RANGES)
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_heun_equals_diffusers(steps, betas, prediction):
    schedule, x = ALL[betas], random(2, 3, 5, 4, dtype=torch.float64)
    reference = theirs("HeunDiscreteScheduler", betas, prediction_type=PREDICTION[prediction], timestep_spacing="trailing")
    reference.set_timesteps(steps)
    times = choose_steps(schedule, steps)
    path = walk_theirs(reference, prediction, x / schedule.alphas[times[0]], times)  # theirs stops twice in each step but the last
    ours = list(heun(denoiser(network, schedule, prediction), x, schedule, times))
    assert len(path) == 2 * steps - 1 and len(ours) == steps and ours[-1].time is None
    assert all(relative_error(step.x, schedule.alphas[step.time] * other) < 1e-6 for step, other in zip(ours[:-1], path[1::2]))
    assert relative_error(ours[-1].x, path[-1]) < 1e-6


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "exploding"])
def test_heun_equals_algorithm_1(name, prediction):
    """Karras et al. 2022, written down once more in their own variables: x / alpha, sigma / alpha and a denoiser D."""
    schedule, x = ALL[name], random(2, 3, dtype=torch.float64)
    predict, times = denoiser(network, schedule, prediction), choose_steps(schedule, 12, "karras")
    levels, at = [*schedule.noise_levels[times].tolist(), 0.0], x / schedule.alphas[times[0]]
    for i, t in enumerate(times):
        d = (at - predict(schedule.alphas[t] * at, t)[0]) / levels[i]
        euler = at + (levels[i + 1] - levels[i]) * d
        if levels[i + 1]:
            there = (euler - predict(schedule.alphas[times[i + 1]] * euler, times[i + 1])[0]) / levels[i + 1]
            euler = at + (levels[i + 1] - levels[i]) * (d + there) / 2
        at = euler
    assert relative_error(sample(heun(predict, x, schedule, 12)), at) < 1e-9


@pytest.mark.parametrize("betas", RANGES)
def test_inversion_equals_diffusers(betas):
    schedule, x = ALL[betas], random(2, 3, 5, 4, dtype=torch.float64)
    reference = theirs("DDIMInverseScheduler", betas, clip_sample=False, timestep_spacing="trailing")
    reference.set_timesteps(20)
    path = walk_theirs(reference, "epsilon", x, None)
    ours = list(ddim_invert(denoiser(network, schedule), x, schedule, 20))
    assert [step.time for step in ours] == reference.timesteps.tolist()
    assert all(relative_error(step.x, other) < 1e-6 for step, other in zip(ours, path))


# A data distribution whose denoiser is known


def gaussian(schedule, prediction="x0", mean=0.5, std=0.3):
    """The exact denoiser where each number of a picture is normal."""

    def model(x, times):
        t = (schedule.times - times[0].cpu()).abs().argmin().item()
        alpha, sigma = schedule.alphas[t].item(), schedule.sigmas[t].item()
        x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return target(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return denoiser(model, schedule, prediction)


def exactly(schedule, x, t, s, mean=0.5, std=0.3):
    """Where the probability flow of that distribution leads: a linear map."""
    (a, c), (b, d) = ((schedule.alphas[i].item(), schedule.sigmas[i].item()) if i is not None else (1.0, 0.0) for i in (t, s))
    return b * mean + math.sqrt((b**2 * std**2 + d**2) / (a**2 * std**2 + c**2)) * (x - a * mean)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_and_spread_come_out_right(sampler, name):
    schedule = ALL[name]
    times = choose_steps(schedule, 100, "karras" if sampler == "heun" or name == "exploding" else "trailing")
    x = schedule.sigmas[times[0]] * random(20_000, 1, dtype=torch.float64) + schedule.alphas[times[0]] * 0.5
    options = {} if sampler in DETERMINISTIC else dict(generator=seeded(1))
    made = sample(SAMPLERS[sampler](gaussian(schedule, "v"), x, schedule, times, **options))
    loose = {"ddpm large": 0.06}.get(sampler, 0.02 if sampler in DETERMINISTIC else 0.04)  # 100 steps of chance: a little too narrow or too wide
    assert abs(made.mean().item() - 0.5) < 0.02 and abs(made.std().item() - 0.3) < loose


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_every_step_of_ddpm(name, variance):
    """With all steps, both variances are right."""
    schedule, x = ALL[name], random(4000, dtype=torch.float64)
    made = sample(ddpm(gaussian(schedule, "v"), x, schedule, variance=variance, generator=seeded(1)))
    assert abs(made.mean().item() - 0.5) < 0.025 and abs(made.std().item() - 0.3) < 0.02


@pytest.mark.parametrize("name", ["cosine", "flow", "linear"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver", 2), ("heun", 2)])
def test_order_of_accuracy(sampler, order, name):
    """Twice as many steps divide the error by 2 to the order."""
    schedule = {"cosine": Schedule.cosine, "flow": Schedule.flow, "linear": lambda n: Schedule.linear(n, 1e-4 * 1000 / n, 20 / n)}[name](8192)
    first, last, x = 6400, 1280, random(50, dtype=torch.float64)
    errors = []
    for steps in (64, 128, 256):
        times = list(range(first, last - 1, (last - first) // steps))
        end = next(step for step in SAMPLERS[sampler](gaussian(schedule), x, schedule, times) if step.time == last)
        errors.append((end.x - exactly(schedule, x, first, last)).abs().max().item())
    measured = math.log2(errors[-2] / errors[-1])
    assert abs(measured - order) < 0.25, (errors, measured)


@pytest.mark.parametrize("name", ALL)
def test_few_steps_of_higher_order_beat_many_of_the_first(name):
    schedule, x = ALL[name], random(50, dtype=torch.float64)
    times = choose_steps(schedule, 20, "karras")
    error = {n: (sample(s(gaussian(schedule), x, schedule, times)) - exactly(schedule, x, times[0], None)).abs().max() for n, s in DETERMINISTIC.items()}
    assert error["heun"] < error["ddim"] / 2 and error["dpm_solver"] < error["ddim"] / 2, error


# What was asked for


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_number_and_order_of_steps(sampler, name):
    schedule, x = ALL[name], random(2, 3)
    for steps in (1, 2, 7, 30):
        asked = []
        predict = denoiser(lambda x, times: asked.append(times.tolist()) or 0.5 * x, schedule, "v")
        walked = list(SAMPLERS[sampler](predict, x, schedule, steps))
        times = choose_steps(schedule, steps, "karras" if sampler == "heun" else "trailing")
        told = [[v] * 2 for v in schedule.times[times].tolist()]
        if sampler == "heun":
            assert asked == told[:1] + [v for v in told[1:] for _ in range(2)] and len(asked) == 2 * steps - 1
        else:
            assert asked == told
        assert [step.number for step in walked] == list(range(1, steps + 1)) and [step.time for step in walked] == [*times[1:], None]
        assert all(step.x.shape == x.shape and step.x.isfinite().all() and step.x0.isfinite().all() for step in walked)
        assert torch.allclose(walked[-1].x, walked[-1].x0, atol=1e-5)  # the last step goes to the guess: no noise at the end


def test_every_step_unless_told():
    schedule = Schedule.cosine(30)
    assert len(list(ddpm(gaussian(schedule), random(1, 2), schedule))) == 30
    assert [len(list(s(gaussian(ALL["cosine"]), random(1, 2), ALL["cosine"]))) for s in (ddim, dpm_solver, heun)] == [50, 20, 18]


@pytest.mark.parametrize("name", ALL)
def test_karras_steps(name):
    """Any number of different steps, between noise levels 80 and 0.002 where there are such, near the paper's equation."""
    schedule = ALL[name]
    levels = schedule.noise_levels
    for steps in (1, 2, 5, 18, 40, 200, 999, 1000):
        times = choose_steps(schedule, steps, "karras")
        assert len(times) == steps and all(t > s for t, s in zip(times, times[1:])) and 0 <= times[-1] and times[0] <= 999
        assert levels[times[-1]].isfinite() and (steps > 900 or levels[times[0]].isfinite())
    high, low = min(80.0, levels[-1].item()), max(0.002, levels[0].item())
    wanted = torch.tensor([(high ** (1 / 7) + i / 7 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(8)], dtype=torch.float64)
    got = levels[choose_steps(schedule, 8, "karras")]
    assert ((got / wanted).log().abs()[:-1] < 0.35).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_own_steps(sampler):
    schedule, x, predict = ALL["linear"], random(2, 3), denoiser(network, ALL["linear"])
    for steps in ([900, 400, 3], (900, 400, 3), range(900, 0, -100)):
        options = {} if sampler in DETERMINISTIC else dict(generator=seeded())
        assert [s.time for s in SAMPLERS[sampler](predict, x, schedule, steps, **options)] == [*list(map(int, steps))[1:], None]


def test_chance_and_its_absence():
    schedule, x = ALL["cosine"], random(2, 3, 4, 4)
    predict, state = denoiser(network, schedule, "v"), torch.get_rng_state()
    for sampler in CHANCE.values():
        draw = lambda seed: sample(sampler(predict, x, schedule, 8, generator=seeded(seed)))  # noqa: B023
        assert torch.equal(draw(1), draw(1)) and not torch.allclose(draw(1), draw(2), atol=0.01)
    for sampler in DETERMINISTIC.values():
        assert torch.equal(sample(sampler(predict, x, schedule, 8)), sample(sampler(predict, x, schedule, 8)))
    assert torch.equal(state, torch.get_rng_state())  # nothing global is touched
    sample(ddpm(predict, x, schedule, 3))
    assert not torch.equal(state, torch.get_rng_state())  # unless no generator is given


def test_noise_is_drawn_in_double_precision_where_asked():
    x = random(2, 3, dtype=torch.float64)
    for sampler in SAMPLERS.values():
        assert sample(sampler(denoiser(network, ALL["linear"]), x, ALL["linear"], 4)).dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_ddim_with_all_noise_is_ddpm(name):
    schedule, x = ALL[name], random(2, 3, 4, dtype=torch.float64)
    predict = denoiser(network, schedule, "v")
    a = list(ddim(predict, x, schedule, 20, eta=1, generator=seeded()))
    b = list(ddpm(predict, x, schedule, 20, generator=seeded()))
    assert all(relative_error(i.x, j.x) < 1e-9 for i, j in zip(a, b))


def test_one_step_is_the_guess():
    schedule, x = ALL["cosine"], random(2, 3)
    predict = denoiser(network, schedule, "v")
    for sampler in SAMPLERS.values():
        assert torch.allclose(sample(sampler(predict, x, schedule, [999])), predict(x, 999)[0], atol=1e-6)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_step_by_hand(variance):
    """Mean from the posterior; variance that of the posterior, or that of the forward step."""
    schedule, x = ALL["linear"], random(2, 3, dtype=torch.float64)
    predict = denoiser(network, schedule)
    first = next(ddpm(predict, x, schedule, variance=variance, generator=seeded()))
    mean, small = posterior(schedule, x, predict(x, 999)[0], 999, 998)
    spread = small if variance == "small" else schedule.betas[999].item()
    assert torch.allclose(first.x, mean + spread**0.5 * random(2, 3, dtype=torch.float64), atol=1e-9)


def test_generators_can_be_left_early_and_are_lazy():
    asked = []
    predict = denoiser(lambda x, times: asked.append(times) or x, ALL["linear"])
    walk = ddim(predict, random(1, 2), ALL["linear"], 10)
    assert not asked
    assert isinstance(next(walk), Step) and len(asked) == 1
    walk.close()
    assert len(asked) == 1


# The denoiser


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_guess_and_noise_fit_together(prediction, clip):
    schedule, x = ALL["cosine"], random(3, 2, 4, dtype=torch.float64)
    x0, noise = denoiser(network, schedule, prediction, clip=clip)(x, 700)
    assert torch.allclose(schedule.alphas[700] * x0 + schedule.sigmas[700] * noise, x, atol=1e-9)
    assert clip is None or x0.abs().max() == clip
    assert clip is not None or x0.abs().max() > 0.5


def test_denoiser_tells_the_model():
    seen = []

    def model(x, times, **conditioning):
        seen.append((times, conditioning))
        assert not torch.is_grad_enabled()
        return x

    denoiser(model, Schedule.flow(shift=3.0), "flow", y=torch.arange(2), context="words")(random(2, 3), 10)
    times, conditioning = seen[0]
    assert torch.equal(times, Schedule.flow(shift=3.0).times[[10, 10]]) and torch.equal(conditioning["y"], torch.arange(2)) and conditioning["context"] == "words"
    assert not torch.allclose(denoiser(network, ALL["linear"])(random(1, 3), 5)[0], denoiser(network, ALL["linear"], y=1.0)(random(1, 3), 5)[0])


def test_gradients_are_not_recorded():
    weight = torch.ones(1, requires_grad=True)
    made = sample(ddim(denoiser(lambda x, times: weight * x, ALL["linear"]), random(1, 3), ALL["linear"], 3))
    assert not made.requires_grad and weight.grad is None and torch.is_grad_enabled()


# From a picture to a picture


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength(sampler):
    schedule, x0, noise = ALL["linear"], random(2, 3), random(2, 3, seed=1)
    predict = denoiser(network, schedule)
    options = lambda: {} if sampler in DETERMINISTIC else dict(generator=seeded())
    (only,) = img2img(SAMPLERS[sampler], predict, x0, noise, schedule, 10, strength=0, **options())
    assert only.x is x0 and only.time is None and only.number == 0
    for strength, count in ((1.0, 10), (0.6, 6), (0.24, 2), (0.01, 0)):
        walked = list(img2img(SAMPLERS[sampler], predict, x0, noise, schedule, 10, strength=strength, **options()))
        assert walked[-1].number == count
        if count:
            times = choose_steps(schedule, 10)[10 - count :]
            plain = sample(SAMPLERS[sampler](predict, schedule.add_noise(x0, noise, times[0]), schedule, times, **options()))
            assert torch.equal(walked[-1].x, plain)
    assert len(list(img2img(SAMPLERS[sampler], predict, x0, noise, schedule, [800, 500, 200], strength=0.7))) == 2


def test_strength_is_how_far_the_picture_may_change():
    schedule, x0, noise = ALL["cosine"], 2 * random(500, 1), random(500, 1, seed=1)
    kept = [torch.corrcoef(torch.stack([x0[:, 0], sample(img2img(ddim, gaussian(schedule), x0, noise, schedule, 20, s))[:, 0]]))[0, 1] for s in (0.1, 0.4, 0.7, 1)]
    assert all(a > b for a, b in zip(kept, kept[1:])) and kept[0] > 0.95 and abs(kept[-1]) < 0.2


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "zero terminal"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_what_is_known(sampler, name):
    schedule, truth, known = ALL[name], random(2, 1, 4, 6), torch.zeros(4, 6, dtype=torch.bool)
    known[:, :3] = True
    predict = denoiser(network, schedule, "v")
    options = {} if sampler in DETERMINISTIC else dict(generator=seeded())
    walked = list(SAMPLERS[sampler](inpaint(predict, schedule, truth, known), random(2, 1, 4, 6, seed=3), schedule, 12, **options))
    assert torch.equal(walked[-1].x[..., :3], truth[..., :3])
    free = sample(SAMPLERS[sampler](predict, random(2, 1, 4, 6, seed=3), schedule, 12))
    assert not torch.allclose(walked[-1].x[..., 3:], free[..., 3:], atol=1e-3)  # the network saw the known part


def test_known_part_is_noised_like_training_data():
    """Along a deterministic walk the known part is the true picture, mixed with always the same noise."""
    schedule, truth = ALL["cosine"], random(1, 5, dtype=torch.float64)
    x = random(1, 5, seed=1, dtype=torch.float64)
    predict = inpaint(gaussian(schedule), schedule, truth, torch.ones(5, dtype=torch.bool))
    for sampler in DETERMINISTIC.values():
        times = choose_steps(schedule, 10, "karras")
        noise = (x - schedule.alphas[times[0]] * truth) / schedule.sigmas[times[0]]
        for step in sampler(predict, x, schedule, times):
            expected = truth if step.time is None else schedule.alphas[step.time] * truth + schedule.sigmas[step.time] * noise
            assert torch.allclose(step.x, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_there_and_back(name, prediction):
    """More rounds invert DDIM's step exactly; more steps make even one round good."""
    schedule, x0 = ALL[name], 0.5 + 0.3 * random(3, 2, 4, dtype=torch.float64)
    predict = gaussian(schedule, prediction)
    back = lambda steps, rounds: sample(ddim(predict, sample(ddim_invert(predict, x0, schedule, steps, rounds=rounds)), schedule, steps))
    times = choose_steps(schedule, 20)[1:]  # at the last step (almost) nothing of the picture is left
    assert relative_error(back(times, 60), x0) < 1e-3
    one = {steps: relative_error(back(choose_steps(schedule, steps)[1:], 1), x0) for steps in (10, 40, 160)}
    assert one[160] < one[40] < one[10] and one[160] < 0.06, one


def test_inverted_noise_looks_like_noise():
    schedule, x0 = ALL["cosine"], 0.5 + 0.3 * random(5000, dtype=torch.float64)
    walked = list(ddim_invert(gaussian(schedule), x0, schedule, 100, rounds=3))
    assert abs(walked[-1].x.mean()) < 0.05 and abs(walked[-1].x.std() - 1) < 0.05
    assert [step.time for step in walked] == choose_steps(schedule, 100)[::-1] and [step.number for step in walked] == list(range(1, 101))


# Any number of axes, any precision


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 7), (2, 3, 5, 4), (1, 2, 3, 4, 5), (3,)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_axes(sampler, shape):
    schedule, x = ALL["cosine"], random(*shape)
    predict = denoiser(network, schedule, "v", clip=1)
    predict = inpaint(predict, schedule, torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    made = sample(img2img(SAMPLERS[sampler], predict, x, random(*shape, seed=1), schedule, 6, 0.8))
    assert made.shape == shape and made.isfinite().all() and made.dtype == torch.float32


def test_half_precision_stays_near():
    schedule, x = ALL["cosine"], random(2, 8)
    exact, half = (sample(dpm_solver(denoiser(network, schedule, "v", clip=1), y, schedule, 10)) for y in (x, x.bfloat16()))
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), exact) < 0.1


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize("steps", [0, -1, 1001, True, 2.5, "20", None])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps!r} must be a whole number from 1 to 1000"):
        choose_steps(ALL["linear"], steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("steps", "told"),
    [(0, "whole number from 1 to 1000"), (1001, "whole number"), ([], "the noisiest first"), ([1, 2, 3], "the noisiest first"), ([40, math.nan], "the noisiest first"), (2.5, "the noisiest first"), ([5, 5], "the noisiest first"),
     ([1000, 3], "0 … 999"), ([3, -1], "0 … 999"), ([3.5, 1], "whole numbers that fall")],
)  # fmt: skip
@pytest.mark.bad_input
def test_bad_steps(sampler, steps, told):
    with pytest.raises(ValueError, match=f"steps=.*{told}"):
        next(SAMPLERS[sampler](denoiser(network, ALL["linear"]), random(1, 2), ALL["linear"], steps))


def test_bad_options():
    schedule, x = ALL["linear"], random(1, 2)
    predict = denoiser(network, schedule)
    for call, told in (
        (lambda: choose_steps(schedule, 10, "even"), r"spacing='even' is unknown; there are \['trailing', 'leading', 'linspace', 'karras'\]"),
        (lambda: next(ddpm(predict, x, schedule, variance="fixed")), r"variance='fixed' is unknown; there are \['small', 'large'\]"),
        (lambda: next(ddim(predict, x, schedule, eta=1.5)), "eta=1.5 must lie between 0"),
        (lambda: next(ddim(predict, x, schedule, eta=-0.1)), "eta=-0.1"),
        (lambda: next(ddim(predict, x, schedule, eta=math.nan)), "eta=nan"),
        (lambda: denoiser(network, schedule, clip=0), "clip=0 must be positive"),
        (lambda: denoiser(network, schedule, clip=-1.0), "clip=-1.0"),
        (lambda: denoiser(network, schedule, "eps"), r"prediction='eps' is unknown; there are \['epsilon', 'x0', 'v', 'flow'\]"),
        (lambda: next(img2img(ddim, predict, x, x, schedule, strength=1.2)), "strength=1.2 must lie between 0"),
        (lambda: next(img2img(ddim, predict, x, x, schedule, strength=-0.1)), "strength=-0.1"),
        (lambda: next(ddim_invert(predict, x, schedule, rounds=0)), "rounds=0 must be a whole number"),
        (lambda: inpaint(predict, schedule, x, torch.ones(3, dtype=torch.bool)), r"known must broadcast to the pictures, \(1, 2\); got \(3,\)"),
        (lambda: sample(iter([])), "can be walked once"),
        (lambda: denoiser(lambda x, t: x[:, :1], schedule)(x, 3), r"answers with the shape \(1, 1\) to pictures of the shape \(1, 2\)"),
        (lambda: predict(x, 1000), "t=1000 is not a step"),
        (lambda: next(heun(denoiser(network, ZERO, "v"), x, ZERO, [999, 3])), "step 999, whose noise level sigma / alpha is infinite"),
        (lambda: next(ddim(denoiser(network, ZERO), x, ZERO, 5)), "prediction='epsilon' does not tell the picture.*alpha is 0"),
        (lambda: next(ddim(predict, x, Schedule([1.0, 0.5], [0.0, 0.5]), [1, 0])), "ends at step 0, where there is no noise left"),
        (lambda: next(ddim(predict, x, Schedule([1.0, 0.5], [0.0, 0.5]), 2)), "ends at step 0, where there is no noise left"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


# Random arguments

DRAWS = st.fixed_dictionaries(
    dict(
        name=st.sampled_from(list(ALL)),
        sampler=st.sampled_from([*SAMPLERS, "img2img", "ddim_invert"]),
        steps=st.one_of(st.integers(1, 40), st.integers(-2, 1010), st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True).map(lambda v: sorted(v)[::-1])),
        prediction=st.sampled_from(["epsilon", "x0", "v", "flow"]),
        clip=st.sampled_from([None, 1.0, 3]),
        shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        value=st.sampled_from([0.0, 0.3, 1.0, 1.1]),
    )
)


def run(name, sampler, steps, prediction, clip, shape, dtype, value):
    """A few steps of anything."""
    schedule, x = ALL[name], random(*shape, dtype=dtype)
    predict = denoiser(lambda x, times: 0.1 * x, schedule, prediction, clip=clip)
    if sampler == "img2img":
        return sample(img2img(heun, predict, x, random(*shape, seed=1, dtype=dtype), schedule, steps, value))
    if sampler == "ddim_invert":
        return sample(ddim_invert(predict, x, schedule, steps, rounds=1 + round(2 * value)))
    return sample(ddim(predict, x, schedule, steps, eta=value) if sampler == "ddim" else SAMPLERS[sampler](predict, x, schedule, steps))


@pytest.mark.parametrize("draws", [80, pytest.param(800, marks=pytest.mark.slow)])
def test_any_arguments(draws):
    valid = []

    @settings(max_examples=draws, deadline=None, derandomize=True, database=None)
    @given(DRAWS)
    def check(draw):
        try:
            made = run(**draw)
        except ValueError as error:
            assert any(f"{word}=" in str(error) for word in ("steps", "eta", "strength", "prediction")), (draw, error)
            valid.append(False)
            return
        assert made.shape == torch.Size(draw["shape"]) and made.dtype == draw["dtype"] and made.isfinite().all(), draw
        valid.append(True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()
    assert sum(valid) / len(valid) >= 0.6, f"{sum(valid)} of {len(valid)}"


def test_inpaint_keeps_the_type_of_the_walk():
    """What is known may lie elsewhere or in a wider type; the walk stays as it is."""
    x0, known = random(2, 1, 4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bool)
    schedule = Schedule.cosine()
    for x in (random(2, 1, 4, 4).bfloat16(), random(2, 1, 4, 4)):
        guess, noise = inpaint(denoiser(network, schedule), schedule, x0, known)(x, 500)
        assert guess.dtype == noise.dtype == x.dtype and torch.equal(guess, x0.to(x.dtype))
