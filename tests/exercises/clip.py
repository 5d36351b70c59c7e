"""Wrong answers to the exercises on CLIP, and what they must be told."""

import math

import torch
from torch.nn import functional as F

from unet_course.exercises.clip import check_classify, check_loss, check_pieces, check_pool, check_rows

LOWER = ["lowe", "r</w>"]


def rows(room=-2, pad=None, start=True, least=1, beyond=0, keep=None):
    """Rows that are cut, filled up, begun or ended in another way."""

    def make(ids, length, start_id, end):
        size, made = length + room, []
        for i in range(0, max(len(ids), least) + beyond, size):
            row = [start_id, *ids[i : i + size], end] if start or not i else [*ids[i : i + size], end]
            made.append(row + [end if pad is None else pad] * (length - len(row)))
        return made[:keep]

    return make


def overlong(ids, length, start, end):
    row = [start, *ids]
    return [(row[i : i + length] + [end] * length)[:length] for i in range(0, len(row), length)]


def not_full(ids, length, start, end):
    return [[start, *ids[i : i + length - 2], end] for i in range(0, max(len(ids), 1), length - 2)]


def in_place(ids, length, start, end):
    made = []
    while ids or not made:
        made.append([start, *ids[: length - 2], end])
        made[-1] += [end] * (length - len(made[-1]))
        del ids[: length - 2]
    return made


def one_row(ids, length, start, end):
    return rows()(ids, length, start, end)[0]


NOTHING = -torch.inf


def loss(fill=NOTHING, own_too=False, scaled=lambda s, scale: s * scale, first=None, second=None, factor=0.5):
    """The loss with something changed; `first` and `second` take the table without false rivals, the whole one, and the mask."""

    def value(pictures, texts, scale, fits):
        whole, own = scaled(pictures @ texts.T, scale), torch.arange(len(pictures))
        mask = fits if own_too else fits & ~torch.eye(len(fits), dtype=torch.bool)
        table = whole.masked_fill(mask, fill)
        rows = first(table, whole, mask) if first else table
        columns = second(table, whole, mask) if second else table.T
        return factor * (F.cross_entropy(rows, own) + F.cross_entropy(columns, own))

    return value


def all_right(pictures, texts, scale, fits):
    s, f = scale * pictures @ texts.T, fits.float()
    return (F.cross_entropy(s, f / f.sum(1, keepdim=True)) + F.cross_entropy(s.T, f.T / f.T.sum(1, keepdim=True))) / 2


def spoils(pictures, texts, scale, fits):
    fits.fill_diagonal_(False)
    return loss()(pictures, texts, scale, fits | torch.eye(len(fits), dtype=torch.bool))


def first_end(tokens, end):
    return (tokens == end).int().argmax(1)


def last_end(tokens, end):
    return tokens.shape[1] - 1 - (tokens == end).int().flip(1).argmax(1)


def average(mask, divide=None):
    """The mean over what a mask of places and tokens takes."""

    def pool(states, tokens, end):
        chosen = mask(torch.arange(tokens.shape[1]), tokens, end)
        return (states * chosen[..., None]).sum(1) / (divide(chosen) if divide else chosen.sum(1, keepdim=True))

    return pool


def before_end(place, tokens, end):
    return place < first_end(tokens, end)[:, None]


def words(place, tokens, end):
    return (place > 0) & before_end(place, tokens, end)


def cosines(pictures, prompts):
    return torch.einsum("bd,cpd->bcp", pictures, prompts)


WRONG = [
    (check_pieces, (["low</w>"], ["low", "er</w>"]), "linguist"),
    (check_pieces, (["low</w>"], ["lo", "w", "er</w>"]), "too early"),
    (check_pieces, (["low</w>"], ["l", "ow", "er</w>"]), "then look again"),
    (check_pieces, (["lo", "w</w>"], LOWER), "second merge"),
    (check_pieces, (["l", "o", "w</w>"], LOWER), "begin with l, o, w"),
    (check_pieces, (["low"], LOWER), "end of the word"),
    (check_pieces, (["low</w>"], ["lowe"]), "loses no letter"),
    (check_pieces, ("low</w>", LOWER), "a list of strings"),
    (check_rows, (rows(keep=1),), "all of the text"),
    (check_rows, (rows(room=-3),), "would do"),
    (check_rows, (rows(room=-1),), "row 1 has 9 numbers"),
    (check_rows, (rows(room=0),), "row 1 has 9 numbers"),
    (check_rows, (overlong,), "has no end"),
    (check_rows, (rows(pad=0),), "fill up with 0"),
    (check_rows, (rows(pad=5),), "until the row is full"),
    (check_rows, (rows(start=False),), "row 2 begins with"),
    (check_rows, (rows(least=0),), "an empty text has one"),
    (check_rows, (rows(beyond=1),), "the next begins only if some are left"),
    (check_rows, (not_full,), "8 were asked for"),
    (check_rows, (one_row,), "each row is a list"),
    (check_rows, (lambda *given: rows()(*given)[::-1],), "in its order"),
    (check_rows, (lambda *given: torch.tensor(rows()(*given)),), "a list of rows"),
    (check_rows, (in_place,), "has changed"),
    (check_rows, (lambda *given: None,), "a list of rows"),
    (check_loss, (loss(fill=0, own_too=True),), "Both bugs"),
    (check_loss, (loss(fill=0),), "a 0 add"),
    (check_loss, (loss(own_too=True),), "own text fits it"),
    (check_loss, (lambda pictures, texts, scale, fits: loss()(pictures, texts, scale, torch.eye(5, dtype=torch.bool)),), "the loss of the chapter"),
    (check_loss, (loss(second=lambda table, whole, mask: whole.T),), "but the texts have"),
    (check_loss, (loss(first=lambda table, whole, mask: whole),), "but the pictures have"),
    (check_loss, (loss(second=lambda table, whole, mask: whole.T.masked_fill(mask, NOTHING)),), "turn `fits`"),
    (check_loss, (loss(second=lambda table, whole, mask: table),), "who looks for whom"),
    (check_loss, (all_right,), "neither right nor wrong"),
    (check_loss, (loss(factor=1),), "the sum of the two"),
    (check_loss, (loss(scaled=lambda s, scale: s / scale),), "right before"),
    (check_loss, (loss(scaled=lambda s, scale: s),), "not used"),
    (check_loss, (loss(scaled=lambda s, scale: s * math.exp(scale)),), "no `exp`"),
    (check_loss, (loss(factor=0.1),), "it should be"),
    (check_loss, (spoils,), "`fits` has changed"),
    (check_loss, (lambda pictures, texts, scale, fits: pictures @ texts.T,), "One number"),
    (check_pool, (average(before_end),), "the start is in your mean"),
    (check_pool, (average(lambda place, tokens, end: (place > 0) & (place <= first_end(tokens, end)[:, None])),), "the end is in your mean"),
    (check_pool, (average(lambda place, tokens, end: place <= first_end(tokens, end)[:, None]),), "start and end"),
    (check_pool, (lambda states, tokens, end: states.mean(1),), "mean over all places"),
    (check_pool, (lambda states, tokens, end: states[:, 1:].mean(1),), "follows the start"),
    (check_pool, (average(lambda place, tokens, end: (place > 0) & (tokens != end)),), "filled up with 0: there is more"),
    (check_pool, (average(lambda place, tokens, end: (place > 0) & (tokens != end) & (tokens != 0)),), "behind the first end: there is more"),
    (check_pool, (average(lambda place, tokens, end: tokens != end),), "it begins after the start"),
    (check_pool, (average(lambda place, tokens, end: (place > 0) & (place < last_end(tokens, end)[:, None])),), "the end token: that is not the mean"),
    (check_pool, (average(words, lambda chosen: 1),), "the sum of the words"),
    (check_pool, (average(words, lambda chosen: 6),), "length of the row"),
    (check_pool, (lambda states, tokens, end: states[torch.arange(4), first_end(tokens, end)],), "CLIP's way"),
    (check_pool, (lambda states, tokens, end: states[:, 1 : (tokens == end).int().argmax()].mean(1),), "same places"),
    (check_pool, (lambda states, tokens, end: states[(tokens == end).argmax(1)],), "True and False"),
    (check_pool, (lambda states, tokens, end: states[words(torch.arange(6), tokens, end)],), "one long list"),
    (check_pool, (lambda states, tokens, end: states,), "shape (4, 6, 3)"),
    (check_pool, (lambda *given: None,), "nothing back"),
    (check_classify, (lambda p, q: (p @ q.mean(1).T).argmax(1),), "short"),
    (check_classify, (lambda p, q: cosines(p, q).amax(2).argmax(1),), "best single prompt"),
    (check_classify, (lambda p, q: cosines(p, q).flatten(1).argmax(1),), "number of a prompt"),
    (check_classify, (lambda p, q: cosines(p, q)[:, :, 0].argmax(1),), "first prompt"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(1), dim=1).T).argmin(1),), "fits worst"),
    (check_classify, (lambda p, q: p @ F.normalize(q.mean(1), dim=1).T,), "the best class was asked for"),
    (check_classify, (lambda p, q: torch.zeros(len(p), dtype=torch.long),), "get the right class"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(1), dim=0).T).argmax(1),), "along the classes"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(0), dim=1).T).argmax(1),), "mean over the classes. `prompts` is"),
    (check_classify, (lambda p, q: (p @ q.mean(0).T).argmax(1),), "mean over the classes, and"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(1), dim=1).T).max(1),), "`argmax`"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(1), dim=1).T).argmax(0),), "a picture for each class"),
]
