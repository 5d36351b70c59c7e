"""Wrong answers to the exercises on the VAE, and what they must be told."""

import torch
from torch import nn

from unet_course.exercises.vae import check_divergence, check_draw, check_fold, check_places, check_standardise


def draw(formula, clamp=True, order=1):
    def answer(moments, noise):
        mean, logvar = moments.chunk(2, 1)[::order]
        return formula(mean, logvar.clamp(-30, 20) if clamp else logvar, noise)

    return answer


def right(mean, logvar, noise):
    return mean + (0.5 * logvar).exp() * noise


def striped(moments, noise):
    return right(moments[:, ::2], moments[:, 1::2], noise)


def divergence(formula, reduce=lambda terms: terms.flatten(1).sum(1)):
    return lambda mean, logvar: reduce(formula(mean, logvar))


def terms(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


AXES = (0, 2, 3)


def standardise(shift, scale):
    return lambda z: (shift(z), scale(z))


def mean(z):
    return z.mean(AXES, keepdim=True)


def one_over_std(z):
    return 1 / z.std(AXES, keepdim=True)


def fold(bias=lambda mixing, conv, point: mixing @ conv.bias + point.bias, equation="om,mihw->oihw", padding=1, change=False):
    def answer(conv, point):
        mixing = point.weight[:, :, 0, 0]
        one = (conv if change else nn.Conv2d(conv.in_channels, point.out_channels, 3, padding=padding)).to(mixing)
        with torch.no_grad():
            weight = torch.einsum(equation, mixing, conv.weight) if equation else conv.weight
            one.weight.copy_(weight[: len(one.weight)])
            one.bias.copy_(bias(mixing, conv, point)[: len(one.bias)])
        return one

    return answer


def recorded(conv, point):
    one = nn.Conv2d(conv.in_channels, point.out_channels, 3, padding=1)
    one.bias.copy_(point.bias)
    return one


def overwritten(conv, point):
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("om,mihw->oihw", point.weight[:, :, 0, 0], conv.weight))
    return conv


WRONG = [
    (check_places, ((8, 64, 96), 48, (600, 448)), "four of them are means"),
    (check_places, ((4, 32, 48), 48, (600, 448)), "three"),
    (check_places, ((4, 96, 64), 48, (600, 448)), "height comes before width"),
    (check_places, ((4, 512, 768), 48, (600, 448)), "how often"),
    (check_places, ((4, 64, 96), 192, (600, 448)), "each place holds four"),
    (check_places, ((4, 64, 96), 64, (600, 448)), "a pixel has three numbers"),
    (check_places, ((4, 64, 96), 12, (600, 448)), "count the numbers"),
    (check_places, ((1, 4, 64, 96), 48, (600, 448)), "the axis of the batch"),
    (check_places, ((4, 64, 96), 48, (3, 600, 448)), "height and width only"),
    (check_places, ((4, 64, 96), 48, (601, 450)), "whole places only"),
    (check_places, ((4, 64, 96), 48, (608, 456)), "not up"),
    (check_places, ((4, 64, 96), 48, (75, 56)), "double three times"),
    (check_draw, (draw(lambda m, v, n: m + v.exp() * n),), "by the variance"),
    (check_draw, (draw(lambda m, v, n: m + v * n),), "logarithm itself"),
    (check_draw, (draw(lambda m, v, n: m + (-0.5 * v).exp() * n),), "minus sign"),
    (check_draw, (draw(right, order=-1),), "changed places"),
    (check_draw, (draw(lambda m, v, n: m),), "noise is missing"),
    (check_draw, (draw(lambda m, v, n: m + 2 ** (0.5 * v) * n),), "natural"),
    (check_draw, (striped,), "two halves"),
    (check_draw, (draw(lambda m, v, n: right(m, v, torch.randn_like(m))),), "dice of your own"),
    (check_draw, (draw(lambda m, v, n: torch.normal(m, (0.5 * v).exp())),), "dice of your own"),
    (check_draw, (draw(lambda m, v, n: right(m, v, torch.ones_like(m))),), "dice of your own"),
    (check_draw, (lambda moments, noise: right(*moments.chunk(2), noise),), "halves the batch"),
    (check_draw, (lambda moments, noise: right(moments[:, :3], moments[:, 3:].clamp_(-30, 20), noise),), "`clamp`, not"),
    (check_draw, (lambda moments, noise: right(*moments.chunk(2, 1), noise.long() @ noise),), "raised"),
    (check_draw, (draw(lambda m, v, n: 2 * right(m, v, n)),), "DiagonalGaussian"),
    (check_draw, (draw(lambda m, v, n: right(m, v, n).detach()),), "no gradient"),
    (check_draw, (draw(lambda m, v, n: m.detach() + (0.5 * v).exp() * n),), "only one of mean and log-variance"),
    (check_draw, (draw(lambda m, v, n: m + (0.5 * v).exp().detach() * n),), "only one of mean and log-variance"),
    (check_draw, (draw(right, clamp=False),), "cut off"),
    (check_draw, (lambda moments, noise: right(*moments.clamp(-30, 20).chunk(2, 1), noise),), "only the log-variance is cut off"),
    (check_draw, (lambda moments, noise: right(*moments.chunk(2, 1), noise)[:1],), "shape"),
    (check_divergence, (divergence(lambda m, v: 0.5 * (m + v.exp() - 1 + v), lambda t: t.flatten(1).mean(1)),), "3 still to find"),
    (check_divergence, (divergence(terms, lambda t: t.flatten(1).mean(1)),), "not their mean"),
    (check_divergence, (divergence(lambda m, v: 0.5 * (m**2 + v.exp() - 1 + v)),), "the sign of the log-variance"),
    (check_divergence, (divergence(lambda m, v: 0.5 * (m + v.exp() - 1 - v)),), "with its square"),
    (check_divergence, (divergence(lambda m, v: 2 * terms(m, v)),), "the half"),
    (check_divergence, (divergence(lambda m, v: -terms(m, v)),), "never be negative"),
    (check_divergence, (divergence(terms, torch.sum),), "leave the batch alone"),
    (check_divergence, (divergence(lambda m, v: 0.5 * (m**2 + (0.5 * v).exp() - 1 - v)),), "standard deviation where the variance"),
    (check_divergence, (divergence(lambda m, v: m),), "where is it zero"),
    (check_standardise, (standardise(mean, lambda z: z.std(AXES, keepdim=True)),), "multiplied"),
    (check_standardise, (standardise(mean, lambda z: 1 / z.var(AXES, keepdim=True)),), "one over the variance"),
    (check_standardise, (standardise(lambda z: -mean(z), one_over_std),), "subtracted"),
    (check_standardise, (standardise(lambda z: 0 * mean(z), one_over_std),), "subtracted"),
    (check_standardise, (standardise(lambda z: z.mean(), lambda z: 1 / z.std()),), "one number for all"),
    (check_standardise, (standardise(lambda z: z.mean(AXES), lambda z: 1 / z.std(AXES)),), "keep the axes"),
    (check_standardise, (standardise(lambda z: z.mean((0, 1), keepdim=True), lambda z: 1 / z.std((0, 1), keepdim=True)),), "3 channels"),
    (check_standardise, (lambda z: z,), "two things"),
    (check_standardise, (standardise(mean, lambda z: 2 / z.std(AXES, keepdim=True)),), "1 was asked for"),
    (check_fold, (fold(lambda mixing, conv, point: point.bias),), "the bias of the first layer"),
    (check_fold, (fold(lambda mixing, conv, point: mixing @ conv.bias),), "own bias is missing"),
    (check_fold, (fold(lambda mixing, conv, point: 0 * point.bias),), "when the input is 0"),
    (check_fold, (fold(equation="om,mihw->oiwh"),), "sum the kernels"),
    (check_fold, (fold(padding=0),), "the padding of conv"),
    (check_fold, (lambda conv, point: nn.Sequential(conv, point),), "two layers"),
    (check_fold, (lambda conv, point: lambda x: point(conv(x)),), "two layers"),
    (check_fold, (lambda conv, point: conv.weight,), "a layer to call"),
    (check_fold, (recorded,), "no_grad"),
    (check_fold, (fold(lambda mixing, conv, point: conv.bias + point.bias),), "through the mixing"),
    (check_fold, (overwritten,), "a new one"),
    (check_fold, (lambda conv, point: conv.weight @ point.bias,), "raised"),
    (check_fold, (fold(change=True, equation="", bias=lambda mixing, conv, point: conv.bias + 1),), "have changed"),
]
