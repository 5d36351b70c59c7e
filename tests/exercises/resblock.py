"""Wrong answers to the exercises on residual blocks, and what they must be told."""

import copy

from torch import nn
from torch.nn import functional as F

from unet_course.exercises.resblock import check_block_parameters, check_deepen, check_grain, check_group_norm, check_time_heard
from unet_course.resblock import ResBlock


def norm_by(reshape, axes, unbiased=False, root_eps=False, affine=True):
    """A group norm with one mistake."""

    def group_norm(x, num_groups, weight, bias, eps):
        sets = reshape(x, num_groups)
        mean, variance = sets.mean(axes, keepdim=True), sets.var(axes, keepdim=True, unbiased=unbiased)
        h = ((sets - mean) / (variance.sqrt() + eps if root_eps else (variance + eps).sqrt())).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return h * weight.reshape(shape) + bias.reshape(shape) if affine else h

    return group_norm


def in_groups(x, num_groups):
    return x.reshape(len(x), num_groups, -1)


def pictures_only(x, num_groups, weight, bias, eps):
    batch, channels, height, width = x.shape
    return F.group_norm(x, num_groups, weight, bias, eps)


class Grainy(nn.Module):
    """The block of the exercise; `mode` says what its dropout is told."""

    def __init__(self, channels, p, mode="always"):
        super().__init__()
        self.p, self.mode = p, mode
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        training = {"always": True, "never": False, "inverted": not self.training}.get(self.mode, self.training)
        h = F.dropout(F.silu(self.norm(x)), self.p, training)
        return self.conv(h) if self.mode == "no shortcut" else x + self.conv(h)


def grainy(mode):
    return lambda channels, p: Grainy(channels, p, mode)


def count(affine=True, biases=True, doubled=True, skip=True, always_skip=False, time_in=False):
    """The number of parameters, with something forgotten."""

    def answer(channels, out_channels, emb_channels, scale_shift):
        total = 9 * out_channels * (channels + out_channels) + 2 * out_channels * biases + 2 * (channels + out_channels) * affine
        total += (emb_channels + 1) * (channels if time_in else out_channels) * (2 if scale_shift and doubled else 1)
        return total + (channels + 1) * out_channels * (always_skip or (skip and channels != out_channels))

    return answer


def deepen_with(make):
    return lambda blocks: [b for block in blocks for b in (block, make(block))]


def fresh(block):
    return ResBlock(block.out_channels, block.emb_channels, 0.0)


def all_zero(block):
    """A new block whose every parameter is zero."""
    new = fresh(block)
    for p in new.parameters():
        nn.init.zeros_(p)
    return new


class Pass(nn.Module):
    def forward(self, x, emb):
        return x


WRONG = [
    (check_time_heard, (True, True, True), "how many channels share a mean"),
    (check_time_heard, (False, False, True), "two channels share a mean"),
    (check_time_heard, (False, True, False), "the norm comes first"),
    (check_time_heard, ("no", True, True), "True or False"),
    (check_group_norm, (norm_by(lambda x, n: x, (0, 2, 3)),), "batch norm"),
    (check_group_norm, (norm_by(lambda x, n: x.reshape(len(x), n, -1), (0, 2)),), "across the batch"),
    (check_group_norm, (norm_by(lambda x, n: x, (2, 3)),), "each channel alone"),
    (check_group_norm, (norm_by(lambda x, n: x.reshape(len(x), 1, -1), (2,)),), "ignore num_groups"),
    (check_group_norm, (norm_by(in_groups, (2,), unbiased=True),), "n - 1"),
    (check_group_norm, (norm_by(in_groups, (2,), root_eps=True),), "belongs to the variance"),
    (check_group_norm, (norm_by(in_groups, (2,), affine=False),), "multiply each channel"),
    (check_group_norm, (lambda x, n, w, b, eps: F.group_norm(x, n, w, b, 0.0),), "left eps out"),
    (check_group_norm, (lambda x, n, w, b, eps: F.group_norm(x, n, b, w, eps),), "numbers are not those"),
    (check_group_norm, (pictures_only,), "axes of space it fails"),
    (check_group_norm, (lambda x, n, w, b, eps: F.group_norm(x, n, w, b, eps)[0],), "was asked for"),
    (check_group_norm, (lambda *_: None,), "nothing back"),
    (check_grain, (grainy("always"),), "goes on dropping"),
    (check_grain, (grainy("never"),), "never drops"),
    (check_grain, (grainy("inverted"),), "wrong way round"),
    (check_grain, (grainy("no shortcut"),), "x + conv(silu(norm(x)))"),
    (check_block_parameters, (count(affine=False),), "norms: each has a weight and a bias"),
    (check_block_parameters, (count(biases=False),), "biases of the two 3 × 3"),
    (check_block_parameters, (count(doubled=False),), "doubles it"),
    (check_block_parameters, (count(skip=False),), "1 × 1 convolution"),
    (check_block_parameters, (count(always_skip=True),), "where there is none"),
    (check_block_parameters, (count(time_in=True),), "per incoming channel"),
    (check_block_parameters, (lambda *_: 1000,), "the block has"),
    (check_deepen, (lambda blocks: blocks,), "should come 4"),
    (check_deepen, (deepen_with(copy.deepcopy),), "do not fit together"),
    (check_deepen, (deepen_with(lambda block: block),), "run a trained block twice"),
    (check_deepen, (lambda blocks: [b for block in blocks for b in (fresh(block), block)],), "positions 0 and 2"),
    (check_deepen, (deepen_with(lambda block: nn.init.normal_((new := fresh(block)).out_layers[3].weight) is None or new),), "something else"),
    (check_deepen, (deepen_with(lambda block: Pass()),), "no ResBlocks"),
    (check_deepen, (deepen_with(all_zero),), "only biases"),
    (check_deepen, (deepen_with(lambda block: fresh(block).requires_grad_(False)),), "no gradient"),
]
