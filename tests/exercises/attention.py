"""Wrong answers to the exercises of chapter 04, and what they must be told."""

import torch

from unet_course.exercises.attention import check_bring_back, check_legacy_to_new, check_streamed, check_weights_prediction, check_windowed


def whole(q, k, v, block, scale=True):
    """All weights at once."""
    scores = q @ k.T / (q.shape[1] ** 0.5 if scale else 1)
    return scores.softmax(1) @ v


def averaged(q, k, v, block):
    """The answers of the blocks, averaged."""
    answers = [whole(q, a, b, block) for a, b in zip(k.split(block), v.split(block))]
    return sum(answers) / len(answers)


def no_maximum(q, k, v, block):
    """Two sums without a maximum: overflows."""
    total, answer = 0, 0
    for a, b in zip(k.split(block), v.split(block)):
        e = (q @ a.T / q.shape[1] ** 0.5).exp()
        total, answer = total + e.sum(1, keepdim=True), answer + e @ b
    return answer / total


def stale_maximum(q, k, v, block):
    """The sums are not corrected when the maximum changes."""
    top, total, answer = torch.full((len(q), 1), -torch.inf), 0, 0
    for a, b in zip(k.split(block), v.split(block)):
        s = q @ a.T / q.shape[1] ** 0.5
        top = torch.maximum(top, s.amax(1, keepdim=True))
        e = (s - top).exp()
        total, answer = total + e.sum(1, keepdim=True), answer + e @ b
    return answer / total


def starting_at_zero(q, k, v, block, shared=False, divide=True):
    """The maximum starts at 0; or is one for all queries, starting at minus infinity; or the division is forgotten."""
    top, total, answer = torch.full((len(q), 1), 0.0 if divide and not shared else -torch.inf), 0, 0
    for a, b in zip(k.split(block), v.split(block)):
        s = q @ a.T / q.shape[1] ** 0.5
        new = torch.maximum(top, s.max() if shared else s.amax(1, keepdim=True))
        e, shrink = (s - new).exp(), (top - new).exp()
        total, answer, top = total * shrink + e.sum(1, keepdim=True), answer * shrink + e @ b, new
    return answer / total if divide else answer


def full_blocks_only(q, k, v, block):
    """Right, but leaves out a last block that is shorter."""
    n = len(k) // block * block
    top, total, answer = torch.full((len(q), 1), -torch.inf), 0, 0
    for a, b in zip(k[:n].split(block), v[:n].split(block)):
        s = q @ a.T / q.shape[1] ** 0.5
        new = torch.maximum(top, s.amax(1, keepdim=True))
        e, shrink = (s - new).exp(), (top - new).exp()
        total, answer, top = total * shrink + e.sum(1, keepdim=True), answer * shrink + e @ b, new
    return answer / total


def cut(x, n, order):
    """Windows of n, with the axes of each side in one of two orders; applied to a mean."""
    b, c, h, w = x.shape
    if order == "dilated":
        y = x.reshape(b, c, n, h // n, n, w // n)
        return y.mean((2, 4), keepdim=True).expand_as(y).reshape(x.shape)
    y = x.reshape(b, c, h // n, n, w // n, n)
    return y.mean((3, 5), keepdim=True).expand_as(y).reshape(x.shape)


def only_right_for_this_block(block, x, window, order):
    """Windows by hand for the mean, the block itself where it changes nothing."""
    return x if torch.equal(block(x), x) else cut(x, window, order)


def few_windows(block, x, window):
    """Cuts each side into that many pieces, instead of pieces of that length."""
    b, c, h, w = x.shape
    y = x.reshape(b, c, window, h // window, window, w // window).permute(0, 2, 4, 1, 3, 5)
    y = block(y.flatten(0, 2)).reshape(y.shape)
    return y.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def unfinished(block, x, window):
    """Cuts in the right way, comes back in the wrong order."""
    b, c, h, w = x.shape
    y = x.reshape(b, c, h // window, window, w // window, window).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, window, window)
    return block(y).reshape(x.shape)


WRONG = [
    (check_weights_prediction, ((2, 4, 32, 32), 16), "channels by channels"),
    (check_weights_prediction, ((2, 4, 16, 12), 16), "the map itself"),
    (check_weights_prediction, ((2, 192, 192), 16), "each head"),
    (check_weights_prediction, ((2, 4, 192, 128), 16), "sums over them"),
    (check_weights_prediction, ((2, 4, 192, 192), 4), "pair of tokens"),
    (check_weights_prediction, ((2, 4, 192, 192), 2), "not 2"),
    (check_streamed, (whole,), "all weights at once"),
    (check_streamed, (lambda *a: whole(*a, scale=False),), "√d"),
    (check_streamed, (averaged,), "as if all blocks were alike"),
    (check_streamed, (no_maximum,), "overflows"),
    (check_streamed, (stale_maximum,), "old maximum"),
    (check_streamed, (starting_at_zero,), "far below 0"),
    (check_streamed, (lambda *a: starting_at_zero(*a, shared=True),), "each query its own"),
    (check_streamed, (lambda *a: starting_at_zero(*a, divide=False),), "divide it by the first"),
    (check_streamed, (full_blocks_only,), "last block is shorter"),
    (check_streamed, (lambda q, k, v, block: whole(q, k[-block:], v[-block:], block),), "last block alone"),
    (check_bring_back, (lambda h, space: h.reshape(len(h), -1, *space),), "of all twenty"),
    (check_bring_back, (lambda h, space: h.permute(0, 3, 1, 2).reshape(len(h), -1, *space),), "[dim, head]"),
    (check_bring_back, (lambda h, space: h.permute(0, 2, 1, 3).reshape(len(h), -1, *space),), "wrong way round"),
    (check_bring_back, (lambda h, space: h.mT.reshape(len(h), -1, *space[::-1]).mT,), "height and width"),
    (check_bring_back, (lambda h, space: h.mT.reshape(len(h), -1, 4, 5),), "signal"),
    (check_bring_back, (lambda h, space: h.mT,), "shape"),
    (check_legacy_to_new, (lambda w, heads: w,), "unchanged"),
    (check_legacy_to_new, (lambda w, heads: w.reshape(3, heads, -1, *w.shape[1:]).transpose(0, 1).reshape(w.shape),), "from new to legacy"),
    (check_legacy_to_new, (lambda w, heads: w.reshape(heads, -1, 3, *w.shape[1:]).movedim(2, 0).reshape(w.shape),), "EDM"),
    (check_legacy_to_new, (lambda w, heads: w.reshape(heads, 3, -1).transpose(0, 1).reshape(w.shape).flip(0),), "the first rows come from"),
    (check_windowed, (lambda block, x, window: block(x),), "whole picture"),
    (check_windowed, (lambda block, x, window: only_right_for_this_block(block, x, window, "dilated"),), "far apart"),
    (check_windowed, (lambda block, x, window: x if torch.equal(block(x), x) else x.mean(3, keepdim=True).expand_as(x),), "whole rows"),
    (check_windowed, (few_windows,), "into 2 pieces"),
    (check_windowed, (lambda block, x, window: x,), "never called"),
    (check_windowed, (unfinished,), "reverse order"),
    (check_windowed, (lambda block, x, window: only_right_for_this_block(block, x, window, "right"),), "raises RuntimeError"),
]
