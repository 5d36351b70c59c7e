"""Wrong answers to the exercises on guidance, and what they must be told."""

import torch

from unet_course.exercises.guidance import check_clipped, check_guide, check_hide, check_line, check_numbers


def both(model, x, times, labels, null, label_first=False):
    """Both answers from one call."""
    halves = [labels, torch.full_like(labels, null)] if label_first else [torch.full_like(labels, null), labels]
    return model(torch.cat([x, x]), torch.cat([times, times]), y=torch.cat(halves))


def guide(formula, label_first=False):
    """One call, and a formula of its halves."""

    def answer(model, x, times, labels, null, scale):
        return formula(*both(model, x, times, labels, null, label_first).chunk(2), scale)

    return answer


def right(uncond, cond, scale):
    return uncond + scale * (cond - uncond)


def two_calls(model, x, times, labels, null, scale):
    return right(model(x, times, y=torch.full_like(labels, null)), model(x, times, y=labels), scale)


def not_split(model, x, times, labels, null, scale):
    return both(model, x, times, labels, null)


def times_once(model, x, times, labels, null, scale):
    return model(torch.cat([x, x]), times, y=torch.cat([labels, labels]))


def stacked(model, x, times, labels, null, scale):
    uncond, cond = model(torch.stack([x, x]), torch.stack([times, times]), y=torch.stack([torch.full_like(labels, null), labels]))
    return right(uncond, cond, scale)


def null_as_it_is(model, x, times, labels, null, scale, of=lambda null: null):
    """The number `null` where labels are joined."""
    return right(*model(torch.cat([x, x]), torch.cat([times, times]), y=torch.cat([of(null), labels])).chunk(2), scale)


def interleaved(model, x, times, labels, null, scale):
    """Pictures in the order 0 0 1 1 2 2, labels in the order of two halves."""
    x, times = x.repeat_interleave(2, 0), times.repeat_interleave(2, 0)
    return right(*model(x, times, y=torch.cat([torch.full_like(labels, null), labels])).chunk(2), scale)


def halved_channels(model, x, times, labels, null, scale):
    uncond, cond = both(model, x, times, labels, null).chunk(2, 1)
    return right(uncond, cond, scale)


def hide(mask, write=False, null=lambda null: null):
    """Hide labels where the mask says."""

    def answer(labels, probability, null_label, generator):
        hidden = mask(len(labels), probability, generator)
        if write:
            labels[hidden] = null(null_label)
            return labels
        return labels.masked_fill(hidden, null(null_label))

    return answer


def proper(n, probability, generator):
    return torch.rand(n, generator=generator) < probability


def inverted(n, probability, generator):
    return torch.rand(n, generator=generator) > probability


def clipped(formula=lambda cond, uncond, scale, cut: cut(uncond + scale * (cond - uncond)), noise="new"):
    """Two predicts made into one."""

    def wrapper(with_label, without, schedule, scale, limit):
        def predict(x, t):
            (cond, cond_noise), (uncond, uncond_noise) = with_label(x, t), without(x, t)
            x0 = formula(cond, uncond, scale, lambda guess: guess.clamp(-limit, limit))
            alpha, sigma = schedule.at(t, x)
            noises = {"new": (x - alpha * x0) / sigma, "old": uncond_noise + scale * (cond_noise - uncond_noise), "cond": cond_noise}
            return x0, noises[noise]

        return predict

    return wrapper


WRONG = [
    (check_numbers, (2, 320, 200), "what they call it"),
    (check_numbers, (1, 320, 200), "wrong way round"),
    (check_numbers, (4, 320, 200), "write their formula"),
    (check_numbers, (3, 160, 200), "without guidance"),
    (check_numbers, (3, 40, 200), "not calls"),
    (check_numbers, (3, 100, 200), "Steps times pictures"),
    (check_numbers, (3, 320, 80), "but only once"),
    (check_numbers, (3, 320, 320), "one answer is enough"),
    (check_numbers, (3, 320, 120), "15 steps outside"),
    (check_numbers, (3, 320, 240), "three times"),
    (check_numbers, (3, 320, 100), "outside of it apart"),
    (check_guide, (guide(right, label_first=True),), "changed places"),
    (check_guide, (guide(lambda u, c, s: c + s * (c - u)),), "paper's convention"),
    (check_guide, (guide(lambda u, c, s: u + s * c),), "difference"),
    (check_guide, (guide(lambda u, c, s: c),), "with label, without guidance"),
    (check_guide, (guide(lambda u, c, s: u),), "without label"),
    (check_guide, (guide(lambda u, c, s: s * (c - u)),), "must be added"),
    (check_guide, (guide(lambda u, c, s: (u + c) / 2),), "two separate calls"),
    (check_guide, (two_calls,), "called 2 times"),
    (check_guide, (not_split,), "two halves and combine"),
    (check_guide, (times_once,), "3 times and 6 labels"),
    (check_guide, (stacked,), "`torch.stack` adds an axis"),
    (check_guide, (null_as_it_is,), "a label of its own"),
    (check_guide, (lambda *given: null_as_it_is(*given, of=torch.tensor),), "a label of its own"),
    (check_guide, (interleaved,), "wrong for several"),
    (check_guide, (lambda model, x, times, labels, null, scale: guide(right)(model, x, times, labels, 10, scale),), "whatever `null` is"),
    (check_guide, (halved_channels,), "along the batch"),
    (check_guide, (lambda *_: None,), "nothing back"),
    (check_hide, (hide(inverted),), "kept or hidden"),
    (check_hide, (hide(inverted, write=True),), "one bug of two"),
    (check_hide, (hide(proper, write=True),), "next epoch"),
    (check_hide, (hide(lambda n, p, g: torch.rand(1, generator=g).expand(n) < p),), "a random number of its own"),
    (check_hide, (hide(lambda n, p, g: torch.rand(n) < p),), "given generator"),
    (check_hide, (hide(lambda n, p, g: torch.rand(n, generator=g) < 2 * p),), "20 % of 20,000"),
    (check_hide, (hide(lambda n, p, g: torch.rand(n, generator=g) < 0.1),), "with probability 0"),
    (check_hide, (hide(proper, null=lambda null: null + 1),), "something else than `null`"),
    (check_hide, (hide(proper, null=lambda null: 10),), "which is -1 here"),
    (check_hide, (lambda *_: None,), "nothing back"),
    (check_clipped, (clipped(lambda c, u, s, cut: cut(u) + s * (cut(c) - cut(u))),), "out of range again"),
    (check_clipped, (clipped(lambda c, u, s, cut: cut(cut(u) + s * (cut(c) - cut(u)))),), "Cut off once"),
    (check_clipped, (clipped(lambda c, u, s, cut: u + s * (c - u)),), "not cut off"),
    (check_clipped, (clipped(lambda c, u, s, cut: cut(c + s * (u - c))),), "changed places"),
    (check_clipped, (clipped(lambda c, u, s, cut: cut(c + s * (c - u))),), "smaller by one"),
    (check_clipped, (clipped(lambda c, u, s, cut: cut(c)),), "the guess is not right"),
    (check_clipped, (clipped(lambda c, u, s, cut: (u + s * (c - u)).clamp(-1, 1)),), "at ±1, whatever `limit` is"),
    (check_clipped, (clipped(lambda c, u, s, cut: (u + s * (c - u)).clamp(max=0.6)),), "above, but not below"),
    (check_clipped, (clipped(lambda c, u, s, cut: (u + s * (c - u)).clamp(min=-0.6)),), "below, but not above"),
    (check_clipped, (lambda *given: lambda x, t: clipped()(*given)(x, t)[::-1],), "first the guess, then the noise"),
    (check_clipped, (clipped(noise="old"),), "before it was cut off"),
    (check_clipped, (clipped(noise="cond"),), "what remains of x"),
    (check_clipped, (lambda a, b, schedule, scale, limit: a(torch.zeros(3, 1, 6, 7), 5),), "give back a function"),
    (check_clipped, (lambda a, b, schedule, scale, limit: lambda x, t: a(x, t)[0],), "two tensors"),
    (check_line, (lambda f, a, s, b, g: f + g * (s - f),), "as the answer without label"),
    (check_line, (lambda f, a, s, b, g: s + (g - a) / (b - a) * (f - s),), "wrong way"),
    (check_line, (lambda f, a, s, b, g: s + (g - a) / (b - a) * (s - f),), "start at the second"),
    (check_line, (lambda f, a, s, b, g: f + (g - a) * (s - f),), "divide by that step"),
    (check_line, (lambda f, a, s, b, g: f + (g - a) / b * (s - f),), "divide by the second scale"),
    (check_line, (lambda f, a, s, b, g: f * g / a if a else s * g / b,), "in proportion to its scale"),
    (check_line, (lambda f, a, s, b, g: (f + s) / 2,), "straight line"),
    (check_line, (lambda f, a, s, b, g: None,), "nothing back"),
]
