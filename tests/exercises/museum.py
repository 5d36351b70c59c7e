"""Wrong answers to the exercises on the museum, and what they must be told."""

import math

import torch
from torch import nn

from unet_course.diffusion import Schedule
from unet_course.exercises.museum import check_escape, check_leaves_alone, check_letters, check_patients, check_repaired
from unet_course.training import EMA
from unet_course.vae import DiagonalGaussian

RIGHT = ("noise-by-variance", "padding-all-round", "dropout-at-inference", "sine-first", "guidance-plus-one")


def letters(**changes):
    return tuple(changes.get(name, right) for name, right in zip(("first", "second", "third", "fourth", "fifth"), RIGHT))


def broken(q, k, mask):
    return (q @ k.mT / 4).softmax(-1) * mask


def masked_late(q, k, mask):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) * mask


def fixed_width(q, k, mask):
    return (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1)


def unscaled(q, k, mask):
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1)


def by_width(q, k, mask):
    return (q @ k.mT / q.shape[-1]).masked_fill(~mask, -torch.inf).softmax(-1)


def other_axis(q, k, mask):
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-2)


def upside_down(q, k, mask):
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask, -torch.inf).softmax(-1)


def no_mask(q, k, mask):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def no_copy(function, *tensors):
    kept = list(tensors)
    function(*tensors)
    return all(torch.equal(x, y) for x, y in zip(tensors, kept))


def only_first(function, *tensors):
    kept = tensors[0].clone()
    function(*tensors)
    return torch.equal(tensors[0], kept)


def result(function, *tensors):
    kept = tensors[0].clone()
    return torch.equal(function(*tensors), kept)


def by_sum(function, *tensors):
    kept = [x.sum() for x in tensors]
    function(*tensors)
    return all(torch.isclose(x.sum(), y).item() for x, y in zip(tensors, kept))


def nearly(function, *tensors):
    kept = [x.clone() for x in tensors]
    function(*tensors)
    return all(torch.allclose(x, y) for x, y in zip(tensors, kept))


def by_version(function, *tensors):
    before = [x._version for x in tensors]
    function(*tensors)
    return before == [x._version for x in tensors]


def by_identity(function, *tensors):
    return function(*tensors) is not tensors[0]


def averages():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = EMA(layer, 0.5)
    nn.init.ones_(layer.weight)
    for _ in range(2):
        average.update(layer)
    return abs(average.model.weight.item() - 1 + 0.1 * 2 / 11) < 1e-4


def adds_up():
    linear = Schedule.linear()
    return torch.allclose(linear.alphas**2 + linear.sigmas**2, torch.ones_like(linear.alphas))


def scatters():
    return abs(DiagonalGaussian(torch.tensor([0.0, -2.0]).reshape(1, 2, 1)).std.item() - math.exp(-1)) < 1e-4


def all_three():
    return averages() and adds_up() and scatters()


def only_reads():
    x = torch.ones(1, 1, 2, 2)
    linear = Schedule.linear()
    return torch.allclose(linear.add_noise(x, x, 300), (linear.alphas[300] + linear.sigmas[300]).float() * x)


FOUND = {1: ("training.EMA.update", averages), 5: ("diffusion.Schedule.from_betas", adds_up), 7: ("vae.DiagonalGaussian.std", scatters)}
PLACES = {seed: place for seed, (place, _) in FOUND.items()}

WRONG = [  # checker, arguments, a part of the diagnosis it must give
    (check_letters, letters(first="guidance-plus-one"), "what does ddpm do"),
    (check_letters, letters(second=6), "not about short-schedule"),
    (check_letters, letters(third="changed-in-place"), "it is chance"),
    (check_letters, letters(fourth="heads-interleaved"), "told a time"),
    (check_letters, letters(fifth="no-scale"), "usual check"),
    (check_letters, letters(third="mask-upside-down"), "all inputs are kept"),
    (check_letters, letters(third="dropout"), "no name of an exhibit"),
    (check_repaired, (broken,), "only one of the two bugs"),
    (check_repaired, (masked_late,), "after the softmax"),
    (check_repaired, (fixed_width,), "wrong for 9"),
    (check_repaired, (unscaled,), "exhibit 3"),
    (check_repaired, (by_width,), "square root"),
    (check_repaired, (other_axis,), "over which axis"),
    (check_repaired, (upside_down,), "nan"),
    (check_repaired, (no_mask,), "mask forbids"),
    (check_leaves_alone, (no_copy,), "clone()"),
    (check_leaves_alone, (only_first,), "second argument"),
    (check_leaves_alone, (result,), "no crime"),
    (check_leaves_alone, (by_sum,), "number by number"),
    (check_leaves_alone, (by_identity,), "gives back its argument"),
    (check_leaves_alone, (lambda function, *tensors: None,), "True or False"),
    (check_leaves_alone, (nearly,), "millionth"),
    (check_leaves_alone, (by_version,), "numbers themselves"),
    (check_patients, (PLACES,), "can be guessed"),
    (check_patients, (FOUND | {5: ("diffusion.Schedule.add_noise", adds_up)},), "by hand"),
    (check_patients, (FOUND | {5: ("diffusion.Schedule.add_noise", only_reads)},), "does not see it"),
    (check_patients, (FOUND | {7: ("vae.DiagonalGaussian.kl", scatters)},), "kl is healthy"),
    (check_patients, (FOUND | {7: ("vae.DiagonalGaussian.std", lambda: True)},), "with the bug, too; it does not see it"),
    (check_patients, (FOUND | {7: ("vae.DiagonalGaussian.std", lambda: False)},), "alarm in the healthy program"),
    (check_patients, (FOUND | {1: ("training.EMA.update", all_three)},), "bug of patient 5, too"),
    (check_patients, (FOUND | {1: ("sampling.ddim", averages)},), "not among the suspects"),
    (check_patients, ({1: FOUND[1]},), "seeds 1, 5 and 7"),
    (check_patients, (FOUND | {1: ...},), "still waits"),
    (check_escape, ("attention.AttentionBlock.forward", "x + self.gather(x)", "self.gather(x)"), "no-residual"),
    (check_escape, ("resblock.ResBlock._forward", "scale, shift = time", "scale, shift = ("), "without a meaning"),
    (check_escape, ("resblock.ResBlock._forward", "time.chunk(2, dim=1)", "time.chunk(3, dim=1)"), "program stops"),
    (check_escape, ("diffusion.cosine_betas", ".008", ".009"), "stands 2 times"),
    (check_escape, ("diffusion.linear_betas", "torch.linspace(start, end,", "torch.linspace(start, 1.2 * end,"), "changes by 0 of its size"),
    (check_escape, ("resblock.ResBlock._forward", "1 + scale", "1.00001 + scale"), "more than 0.001"),
    (check_escape, ("resblock.ResBlock._forward", "1 + scale", "float('nan') + scale"), "not finite"),
    (check_escape, (1, 2, 3), "three strings"),
]
