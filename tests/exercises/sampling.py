"""Wrong answers to the exercises on sampling, and what they must be told."""

from itertools import pairwise

import torch

from unet_course.diffusion import posterior
from unet_course.exercises.sampling import check_ancestral, check_blend, check_counts, check_jump, check_threshold


def walk(goal, times_of=lambda times: times, extra=False):
    """DDIM's walk; `goal` says where a step from t, towards s, ends."""

    def answer(predict, x, schedule, times):
        for t, s in pairwise([*times_of(times), None]):
            x0, noise = predict(x, t)
            if extra:
                predict(x, t)
            to = goal(t, s)
            x = x0 if to is None else schedule.alphas[to].item() * x0 + schedule.sigmas[to].item() * noise
        return x

    return answer


def ends_noisy(predict, x, schedule, times):
    for t, s in pairwise(times):
        x0, noise = predict(x, t)
        x = schedule.alphas[s].item() * x0 + schedule.sigmas[s].item() * noise
    return x


def steps_of_one(predict, x, schedule, times):
    for t in range(times[0], -1, -1):
        x0, noise = predict(x, t)
        x = x0 if t == 0 else schedule.alphas[t - 1].item() * x0 + schedule.sigmas[t - 1].item() * noise
    return x


def looks_up_none(item):
    """Takes the noise level of step None; with .item() or without."""

    def answer(predict, x, schedule, times):
        for t, s in pairwise([*times, None]):
            x0, noise = predict(x, t)
            alpha, sigma = schedule.alphas[s], schedule.sigmas[s]
            x = alpha.item() * x0 + sigma.item() * noise if item else alpha * x0 + sigma * noise
        return x

    return answer


def ends_at_zero(predict, x, schedule, times):
    """Right up to the last question, and then nothing of the guess."""
    for t, s in pairwise([*times, None]):
        x0, noise = predict(x, t)
        x = x0 / 2 if s is None else schedule.alphas[s].item() * x0 + schedule.sigmas[s].item() * noise
    return x


def dice(predict, x, schedule, times):
    for t, s in pairwise([*times, None]):
        x0, _ = predict(x, t)
        x = x0 if s is None else schedule.add_noise(x0, torch.randn(x.shape, dtype=x.dtype), s)
    return x


def ancestral(root, last, twice=False, noise=True, small=False, end=(None,), own=False, again=False):
    """The sampler of the exercise with one or two of its bugs, or others."""

    def answer(predict, x, schedule, times, fresh, generator):
        for t, s in pairwise([*times, *end]):
            x0, rest = predict(x, t)
            if not noise:
                x = x0 if s is None else schedule.alphas[s].item() * x0 + schedule.sigmas[s].item() * rest
                continue
            x, variance = posterior(schedule, x, x0, t, s)
            if s is not None or last:
                size = variance if small else fresh(t, s)
                z = torch.randn_like(x) if own else torch.randn(x.shape, generator=generator)
                z = torch.randn(x.shape, generator=generator) if again else z
                x = x + (2 if twice else 1) * (size**0.5 if root else size) * z
        return x

    return answer


def threshold(size=lambda x0, share: x0.abs().flatten(1).quantile(share, dim=1), least=1.0, cut=True, divide=True, noise=True):
    """Dynamic thresholding with something left out."""

    def wrapper(predict, schedule, share):
        def scaled(x, t):
            old, rest = predict(x, t)
            limit = size(old, share).reshape(-1, 1, 1, 1).clamp(min=least)
            x0 = old.clamp(-limit, limit) if cut else old
            x0 = x0 / limit if divide else x0
            alpha, sigma = schedule.at(t, x)
            return x0, (x - alpha * x0) / sigma if noise is True else (rest if noise is False else noise * rest)

        return scaled

    return wrapper


def clipped(predict, schedule, share):
    return lambda x, t: (predict(x, t)[0].clamp(-1, 1), x)


def flat(predict, schedule, share):
    """One threshold for each picture, in a shape that does not fit."""

    def scaled(x, t):
        x0, _ = predict(x, t)
        limit = x0.abs().flatten(1).quantile(share, dim=1).clamp(min=1)
        return x0.clamp(-limit, limit) / limit, x

    return scaled


def unit(x):
    return x / x.std()


WRONG = [
    (check_counts, (20, 9, 19), "at the end of the last one"),
    (check_counts, (10, 9, 10), "mark each call of predict"),
    (check_counts, (19, 10, 19), "leads to no noise at all"),
    (check_counts, (19, 11, 19), "from outside"),
    (check_counts, (19, 0, 19), "Under which condition".lower()),
    (check_counts, (19, 9, 10), "How often does Heun ask".lower()),
    (check_counts, (19, 9, 38), "asks the network once"),
    (check_jump, (walk(lambda t, s: t - 1 if t else None),), "noise is still there"),
    (check_jump, (walk(lambda t, s: 0 if s is None else s),), "step 0 of a schedule"),
    (check_jump, (ends_noisy,), "stops at the last of the times"),
    (check_jump, (walk(lambda t, s: t),), "never falls"),
    (check_jump, (walk(lambda t, s: None),), "all the way to the guess"),
    (check_jump, (walk(lambda t, s: s, extra=True),), "asked 12 times for 6 steps"),
    (check_jump, (walk(lambda t, s: s, times_of=lambda times: times[::2]),), "asked 3 times, at 999, 600, 200. Visit the 6 steps"),
    (check_jump, (steps_of_one,), "asked 1000 times, at 999, 998, 997"),
    (check_jump, (walk(lambda t, s: None if s is None else t - 1),), "told 800, your x still holds the noise of step 998"),
    (check_jump, (walk(lambda t, s: None if s is None else t),), "told 800, your x still holds the noise of step 999"),
    (check_jump, (looks_up_none(True),), "fails after the last question"),
    (check_jump, (looks_up_none(False),), "fails after the last question"),
    (check_jump, (ends_at_zero,), "up to the last question"),
    (check_jump, (dice,), "your step from 999 to 800"),
    (check_jump, (lambda *_: None,), "nothing back"),
    (check_ancestral, (ancestral(False, True),), "mended, it is 0.33"),
    (check_ancestral, (ancestral(True, True),), "where s is None"),
    (check_ancestral, (ancestral(False, False),), "fresh is a variance"),
    (check_ancestral, (ancestral(True, False, twice=True),), "it should be 0.33"),
    (check_ancestral, (ancestral(True, False, own=True),), "given generator, so nobody"),
    (check_ancestral, (ancestral(True, False, end=()),), "ends at step 20"),
    (check_ancestral, (ancestral(False, True, end=()),), "ends at step 20"),
    (check_ancestral, (ancestral(True, False, small=True),), "the small variance"),
    (check_ancestral, (ancestral(True, False, again=True),), "Draw once"),
    (check_ancestral, (ancestral(True, False, noise=False),), "without dice"),
    (check_threshold, (threshold(least=0.0),), "never less than 1"),
    (check_threshold, (threshold(divide=False),), "did not divide"),
    (check_threshold, (threshold(cut=False),), "without cutting off"),
    (check_threshold, (clipped,), "plain clipping"),
    (check_threshold, (threshold(size=lambda x0, share: x0.abs().quantile(share)),), "whole batch"),
    (check_threshold, (threshold(size=lambda x0, share: x0.flatten(1).quantile(share, dim=1)),), "absolute value"),
    (check_threshold, (lambda predict, schedule, share: predict,), "as it was"),
    (check_threshold, (threshold(size=lambda x0, share: x0.abs().flatten(1).amax(1)),), "largest absolute value"),
    (check_threshold, (threshold(size=lambda x0, share: x0.abs().flatten(1).quantile(0.5, dim=1)),), "the guess is not right"),
    (check_threshold, (flat,), "(batch, 1, 1, 1)"),
    (check_threshold, (threshold(noise=False),), "that of the old guess"),
    (check_threshold, (threshold(noise=0.5),), "what remains of x"),
    (check_threshold, (lambda predict, schedule, share: predict(torch.zeros(3, 1, 6, 7), 5),), "give back a function"),
    (check_threshold, (lambda predict, schedule, share: lambda x, t: predict(x, t)[0],), "two tensors"),
    (check_blend, (lambda a, b, share: (1 - share) * a + share * b,), "variances add"),
    (check_blend, (lambda a, b, share: share**0.5 * a + (1 - share) ** 0.5 * b,), "wrong way round"),
    (check_blend, (lambda a, b, share: (a + b) / 2**0.5,), "at the ends"),
    (check_blend, (lambda a, b, share: unit((1 - share) * a + share * b),), "rightly unmixed, but scaled"),
    (check_blend, (lambda a, b, share: ((1 - share) * a + share * b) / 0.5**0.5,), "1.414 · a"),
    (check_blend, (lambda a, b, share: (1 - share**2) * a + share**2 * b,), "squares of the two factors"),
    (check_blend, (lambda a, b, share: a if share < 0.5 else b,), "as much of a as of b"),
    (check_blend, (lambda a, b, share: unit(a + b) if 0 < share < 1 else (b if share else a),), "less and less of a"),
    (check_blend, (lambda a, b, share: None,), "nothing back"),
]
