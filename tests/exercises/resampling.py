"""Wrong answers to the exercises of chapter 02, and what they must be told."""

import torch

from unet_course.exercises.resampling import check_frames, check_nearest_as_transposed, check_same_padding, check_sizes, check_thirds

UP = [(23, 14), (12, 7), (6, 4)]
DOWN = [(22, 14), (11, 7), (5, 3)]


def folded(x, layer):
    """The layer on frames that were folded properly."""
    return layer(x.transpose(1, 2).flatten(0, 1))


def mixed(layer, x):
    """Reshapes without exchanging the axes."""
    b, c, t, h, w = x.shape
    return layer(x.reshape(b * t, c, h, w)).reshape(b, -1, t, h, w)


def mixed_on_the_way_in(layer, x):
    """Mended on one side only."""
    b, c, t, h, w = x.shape
    return layer(x.reshape(b * t, c, h, w)).reshape(b, t, -1, h, w).transpose(1, 2)


def mixed_on_the_way_out(layer, x):
    """Mended on the other side only."""
    b, c, t, h, w = x.shape
    return folded(x, layer).reshape(b, -1, t, h, w)


def forgot_to_exchange_back(layer, x):
    """Leaves the time in front of the channels."""
    return folded(x, layer).unflatten(0, (len(x), x.shape[2]))


WRONG = [  # checker, arguments, a part of the diagnosis it must give
    (check_sizes, (DOWN, DOWN), "symmetric: you round odd sizes down"),
    (check_sizes, (UP, UP), "asymmetric: you round odd sizes up"),
    (check_sizes, (DOWN, UP), "wrong names"),
    (check_sizes, ([(14, 23), (7, 12), (4, 6)], DOWN), "height and width are exchanged"),
    (check_sizes, ([(22.5, 14), (11.25, 7), (5.625, 3.5)], DOWN), "half pixels do not exist"),
    (check_sizes, (UP, [(22, 14), (11, 7), (6, 3)]), "level 3"),
    (check_sizes, (UP[:2], DOWN), "three sizes"),
    (check_sizes, ([23, 12, 6], [22, 11, 5]), "two numbers"),
    (check_thirds, (1, 0), "the first level"),
    (check_thirds, (2, 0), "three input pixels wide"),
    (check_thirds, (-4, 0), "the direction is not"),
    (check_thirds, (1.5, 0), "the answer for halving"),
    (check_thirds, (3, 0), "The first has moved"),
    (check_thirds, (4, 1), "which padding centres"),
    (check_thirds, (4, 2), "where would it have to start"),
    (check_thirds, (4, (0, 0)), "one whole number"),
    (check_frames, (mixed,), "mixes channels and frames"),
    (check_frames, (mixed_on_the_way_in,), "mixes channels and frames"),
    (check_frames, (mixed_on_the_way_out,), "the way out is not"),
    (check_frames, (forgot_to_exchange_back,), "was asked for"),
    (check_frames, (lambda layer, x: torch.stack([layer(x[:, :, t]) for t in (2, 1, 0)], 2),), "reversed"),
    (check_same_padding, (lambda n, k, s: (0, 1),), "for n=5, k=1, s=1"),
    (check_same_padding, (lambda n, k, s: (k // 2, k // 2),), "more than needed"),
    (check_same_padding, (lambda n, k, s: ((-(-n // s) - 1) * s + k - n, 0),), "negative"),
    (check_same_padding, (lambda n, k, s: (-(-max((-(-n // s) - 1) * s + k - n, 0) // 2), max((-(-n // s) - 1) * s + k - n, 0) // 2),), "belongs at the end"),
    (check_same_padding, (lambda n, k, s: (max((n // s - 1) * s + k - n, 0) // 2, -(-max((n // s - 1) * s + k - n, 0) // 2)),), "too little"),
    (check_same_padding, (lambda n, k, s: (0, max((-(-n // s) - 1) * s + k - n, 0)),), "evenly"),
    (check_same_padding, (lambda n, k, s: n,), "two whole numbers"),
    (check_nearest_as_transposed, (lambda k: torch.stack([k[0], k[0] + k[1], k[1] + k[2], k[2]]),), "reversed order"),
    (check_nearest_as_transposed, (lambda k: torch.stack([k[2], k[1], k[1], k[0]]),), "two positions"),
    (check_nearest_as_transposed, (lambda k: torch.stack([k[0], k[1], k[1], k[2]]),), "two positions"),
    (check_nearest_as_transposed, (lambda k: torch.cat([k, k[:1]]),), "a single 1 between zeros"),
    (check_nearest_as_transposed, (lambda k: k,), "was asked for"),
]
