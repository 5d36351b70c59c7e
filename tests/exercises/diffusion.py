"""Wrong answers to the exercises on noise schedules, and what they must be told."""

import torch

from unet_course.diffusion import Schedule, target, to_x0
from unet_course.exercises.diffusion import check_as_v, check_chain, check_from_log_snr, check_prices, check_shifted


def walk(keep=lambda b: (1 - b) ** 0.5, add=lambda b: b**0.5, fresh=True, shape=None, seeded=True, in_place=False):
    """A chain, with a mistake."""

    def chain(x, betas, generator):
        noise = torch.randn(shape or x.shape, generator=generator)
        for beta in betas:
            if fresh:
                noise = torch.randn(shape or x.shape, generator=generator if seeded else None)
            if in_place:
                x *= keep(beta)
                x += add(beta) * noise
            else:
                x = keep(beta) * x + add(beta) * noise
        return x

    return chain


def shares(alphas, sigmas):
    """A schedule from two functions of the log SNR."""
    return lambda log_snr: Schedule(alphas(log_snr), sigmas(log_snr))


def levels_times(multiply, levels_of=lambda schedule: schedule.noise_levels):
    """Change the noise levels, then compute the shares from them."""

    def shifted(schedule, factor):
        levels = levels_of(schedule) * multiply(factor)
        return Schedule(1 / (1 + levels**2).sqrt(), levels / (1 + levels**2).sqrt())

    return shifted


def answer_with(make):
    """Wrap a model, and answer with some function of picture, noise, x_t and the shares."""

    def as_v(model, schedule):
        def wrapped(x_t, t):
            noise = model(x_t, t)
            alpha, sigma = schedule.at(t, x_t)
            return make(to_x0("epsilon", noise, x_t, alpha, sigma), noise, x_t, alpha, sigma)

        return wrapped

    return as_v


def asked_later(model, schedule):
    """Asks the model about another time."""
    return lambda x_t, t: answer_with(lambda x0, e, x, a, s: target("v", x0, e, a, s))(lambda x, t: model(x, t + 1), schedule)(x_t, t)


WRONG = [
    (check_prices, (0.54, 0.36, 0.45), "counted all of it"),
    (check_prices, (0.09, 0.36, 0.45), "squared error of the picture. In the bound"),
    (check_prices, (0.9, 0.36, 0.45), "error 0.3 itself"),
    (check_prices, (0.0675, 0.36, 0.45), "you took lambda"),
    (check_prices, (-0.27, 0.36, 0.45), "sign in the bound"),
    (check_prices, (0.5, 0.36, 0.45), "does not cost 0.5"),
    (check_prices, (0.27, 0.09, 0.45), "read as noise"),
    (check_prices, (0.27, 0.0225, 0.45), "divided by the SNR"),
    (check_prices, (0.27, 0.9, 0.45), "the network sees x_t"),
    (check_prices, (0.27, 0.18, 0.45), "root of the SNR multiplies the error"),
    (check_prices, (0.27, 0.6, 0.45), "the loss squares it"),
    (check_prices, (0.27, 0.5, 0.45), "does not show 0.5"),
    (check_prices, (0.27, 0.36, 0.36), "the price of epsilon"),
    (check_prices, (0.27, 0.36, 0.018), "multiplied by sigma²"),
    (check_prices, (0.27, 0.36, 0.81), "what flow would show"),
    (check_prices, (0.27, 0.36, 0.99), "of the step before"),
    (check_prices, (0.27, 0.36, 0.7), "SNR + 1 times"),
    (check_chain, (walk(fresh=False),), "same noise again"),
    (check_chain, (walk(add=lambda b: b),), "by the root of beta"),
    (check_chain, (walk(keep=lambda b: 1 - b),), "fades too fast"),
    (check_chain, (walk(shape=(1,)),), "needs the shape of x"),
    (check_chain, (walk(seeded=False),), "generator=generator"),
    (check_chain, (walk(in_place=True),), "changes the x"),
    (check_chain, (walk(keep=lambda b: 1),), "should end with mean"),
    (check_chain, (lambda x, betas, generator: x,), "Nothing happened"),
    (check_chain, (lambda x, betas, generator: None,), "nothing back"),
    (check_from_log_snr, (shares(torch.sigmoid, lambda l: (-l).sigmoid()),), "Take its root"),
    (check_from_log_snr, (shares(lambda l: (-l).sigmoid().sqrt(), lambda l: l.sigmoid().sqrt()),), "exchanged"),
    (check_from_log_snr, (shares(lambda l: (l / 2).exp(), torch.ones_like),), "should be 1 at every step"),
    (check_from_log_snr, (shares(lambda l: (2 * l).sigmoid().sqrt(), lambda l: (-2 * l).sigmoid().sqrt()),), "is twice"),
    (check_from_log_snr, (shares(lambda l: (l / 2).sigmoid().sqrt(), lambda l: (-l / 2).sigmoid().sqrt()),), "is half"),
    (check_from_log_snr, (shares(lambda l: (l + 1).sigmoid().sqrt(), lambda l: (-l - 1).sigmoid().sqrt()),), "Asked for log SNR"),
    (check_from_log_snr, (lambda l: (l.sigmoid().sqrt(), (-l).sigmoid().sqrt()),), "it gave tuple"),
    (check_from_log_snr, (lambda l: None,), "nothing back"),
    (check_from_log_snr, (lambda l: Schedule(l[:9].sigmoid().sqrt(), (-l[:9]).sigmoid().sqrt()),), "not 9"),
    (check_shifted, (levels_times(lambda f: f),), "infinite"),
    (check_shifted, (levels_times(lambda f: f**0.5),), "root of the factor"),
    (check_shifted, (levels_times(lambda f: f**2),), "square of the factor"),
    (check_shifted, (levels_times(lambda f: 1 / f),), "became smaller"),
    (check_shifted, (lambda schedule, f: Schedule(f * schedule.alphas, f * schedule.sigmas),), "what they were"),
    (check_shifted, (lambda schedule, f: Schedule(schedule.alphas, f * schedule.sigmas),), "Divide both shares"),
    (check_shifted, (levels_times(lambda f: f - 1),), "at the last step yours are 3 times"),
    (check_shifted, (lambda schedule, f: Schedule.cosine(7),), "same number of steps"),
    (check_shifted, (lambda schedule, f: Schedule.flow(len(schedule), shift=f),), "Start from `schedule`"),
    (check_shifted, (lambda schedule, f: Schedule.cosine(len(schedule)),), "Two schedules gave you the same answer"),
    (check_shifted, (lambda schedule, f: None,), "nothing back"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: e),), "the noise itself"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: x0),), "That is the picture"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: a * e - s * x),), "in the place of the picture"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: s * x0 - a * e),), "sign is wrong"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: s * e - a * x0),), "exchanged"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: a * x0 + s * e),), "x_t again"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: e - x0),), "target of flow"),
    (check_as_v, (answer_with(lambda x0, e, x, a, s: 2 * e),), "That is not v"),
    (check_as_v, (asked_later,), "unchanged"),
    (check_as_v, (lambda model, schedule: None,), "nothing back"),
    (check_as_v, (lambda model, schedule: torch.zeros(3),), "give back a function"),
]
