"""Wrong answers to the exercises on the U-Net in any number of dimensions, and what they must be told."""

import torch
from torch.nn import functional as F

from unet_course.exercises.unet_nd import check_dice_per_class, check_loss_and_guess, check_scan, check_sizes, check_tiled
from unet_course.unet_nd import UNetND

MAX, CONV = [100, 50, 25, 12], [100, 50, 25, 13]
SCAN = dict(dims=3, in_channels=1, out_channels=3, channels=(8, 16, 32, 64), blocks_per_level=1, attention="linear", factor=(1, 2, 2))


def scan(**changes) -> UNetND:
    """A network for the scans, with a mistake."""
    return UNetND(**{**SCAN, **changes})


def dice_with(absent=1.0, twice=2, union=False, dim=2, soft=False):
    """Dice scores for several classes, with a mistake."""

    def dice_per_class(logits, labels):
        classes = logits.shape[1]
        one_hot = lambda v: F.one_hot(v, classes).movedim(-1, 1).flatten(2).float()  # noqa: E731
        guess, truth = logits.softmax(1).flatten(2) if soft else one_hot(logits.argmax(1)), one_hot(labels)
        dims = (0, 2) if dim == "batch" else dim
        overlap, areas = (guess * truth).sum(dims), (guess + truth).sum(dims)
        if dim == "batch":
            return (2 * overlap / areas).expand(3, -1)
        if absent is None:
            return twice * overlap / areas
        return torch.where(areas > 1e-6, twice * overlap / ((areas - overlap) if union else areas).clamp(min=1e-6), absent)

    return dice_per_class


def once_per_class(logits, labels):
    return dice_with()(logits, labels).mean(0)


def tiles(margin_used=True, offset=True, keep_margins=False, pad=False, everything=False):
    """Tiles, with a mistake."""

    def tiled(unet, x, tile, margin):
        if everything:
            return unet(x)
        length, parts = x.shape[-1], []
        x = F.pad(x, (margin, margin)) if pad else x
        margin = margin if margin_used else 0
        for start in range(0, length, tile):
            left = start if pad else max(0, start - margin)
            answer = unet(x[..., left : start + tile + (2 if pad else 1) * margin])
            begin = margin if pad else start - left if offset else min(margin, answer.shape[-1] - tile)
            parts.append(answer if keep_margins else answer[..., begin : begin + min(tile, length - start)])
        return torch.cat(parts, dim=-1)

    return tiled


def still_twice(unet, x, y):
    p = torch.sigmoid(unet(x))
    return F.binary_cross_entropy_with_logits(p, y), p > 0.5


def twice_and_everywhere(unet, x, y):
    p = torch.sigmoid(unet(x))
    return F.binary_cross_entropy_with_logits(p, y), p > 0


def wrong_threshold(unet, x, y):
    return F.binary_cross_entropy_with_logits(unet(x), y), unet(x) > 0.5


def by_probability(unet, x, y):
    p = torch.sigmoid(unet(x))
    return F.binary_cross_entropy(p, y), p > 0.5


def never(unet, x, y):
    return F.binary_cross_entropy_with_logits(unet(x), y), torch.zeros_like(y, dtype=torch.bool)


WRONG = [
    (check_sizes, (CONV, CONV, 3, 128), "drops the last position"),
    (check_sizes, (MAX, MAX, 3, 128), "rounds up"),
    (check_sizes, ([100, 50, 25], CONV, 3, 128), "three entries"),
    (check_sizes, (MAX, [100, 50, 25, 13, 7], 3, 128), "five entries"),
    (check_sizes, ([50, 25, 12, 6], CONV, 3, 128), "start with the full size"),
    (check_sizes, (100, CONV, 3, 128), "list of whole numbers"),
    (check_sizes, (MAX, CONV, 27, 128), "27 taps"),
    (check_sizes, (MAX, CONV, 1.5, 128), "number of taps"),
    (check_sizes, (MAX, CONV, 3, 3), "do not care for the kernel"),
    (check_sizes, (MAX, CONV, 3, 64), "compare 128"),
    (check_dice_per_class, (once_per_class,), "one number for each class"),
    (check_dice_per_class, (dice_with(absent=None),), "0 / 0"),
    (check_dice_per_class, (dice_with(absent=0.0),), "should score 1"),
    (check_dice_per_class, (dice_with(twice=1),), "half of the right numbers"),
    (check_dice_per_class, (dice_with(twice=1, union=True),), "overlap over union"),
    (check_dice_per_class, (dice_with(dim="batch"),), "over the batch"),
    (check_dice_per_class, (dice_with(soft=True),), "the largest logit"),
    (check_dice_per_class, (lambda logits, labels: torch.zeros(3, 4),), "are not the Dice scores"),
    (check_dice_per_class, (lambda *_: None,), "nothing back"),
    (check_loss_and_guess, (still_twice,), "and not 0"),
    (check_loss_and_guess, (twice_and_everywhere,), "squashed twice"),
    (check_loss_and_guess, (wrong_threshold,), "threshold for probabilities"),
    (check_loss_and_guess, (by_probability,), "as large as 200"),
    (check_loss_and_guess, (never,), "exceeds one half"),
    (check_loss_and_guess, (lambda unet, x, y: F.mse_loss(unet(x), y),), "two things"),
    (check_loss_and_guess, (lambda unet, x, y: (F.mse_loss(unet(x), y), unet(x) > 0),), "and should be"),
    (check_scan, ("a network",), "a UNetND was asked for"),
    (check_scan, (scan(dims=2, factor=2),), "3 axes"),
    (check_scan, (scan(out_channels=1),), "3 out"),
    (check_scan, (scan(factor=2),), "one number for each axis"),
    (check_scan, (scan(channels=(8, 16, 32)),), "more levels"),
    (check_scan, (scan(channels=(8, 16, 32, 32, 32)),), "fewer levels"),
    (check_scan, (scan(norm="batch"),), "one at a time"),
    (check_scan, (scan(norm="none"),), "without any norm"),
    (check_scan, (scan(attention=["linear"] * 4),), "lowest level only"),
    (check_scan, (scan(attention="none"),), "no attention"),
    (check_scan, (scan(attention="vanilla"),), "23 million"),
    (check_scan, (scan(channels=(16, 32, 64, 128)),), "one million was the limit"),
    (check_tiled, (tiles(margin_used=False),), "a seam at each border"),
    (check_tiled, (tiles(offset=False),), "where in its answer"),
    (check_tiled, (tiles(keep_margins=True),), "belong to what a tile sees"),
    (check_tiled, (tiles(pad=True),), "not the same as nothing"),
    (check_tiled, (tiles(everything=True),), "samples at once"),
    (check_tiled, (lambda unet, x, tile, margin: torch.zeros(1, 1, 90),), "do not fit"),
    (check_tiled, (lambda *_: None,), "nothing back"),
]
