"""Wrong answers to the exercises on CLIP, and what they must be told."""

import torch
from torch.nn import functional as F

from unet_course.exercises.clip import check_classify, check_loss, check_pieces, check_pool, check_row

LOWER = ["lowe", "r</w>"]


def row(cut=-2, pad=None, start=True):
    """A row that is cut, filled up or begun in another way."""

    def make(ids, length, start_id, end):
        text = [start_id, *ids[: length + cut], end] if start else [*ids[: length + cut], end]
        return (text + [end if pad is None else pad] * (length - len(text)))[:length]

    return make


def in_place(ids, length, start, end):
    ids.insert(0, start)
    return ids[: length - 1] + [end] * (length - len(ids[: length - 1]))


def loss(scaled=lambda s, scale: s * scale, first=lambda s: s, second=lambda s: s.T, factor=0.5):
    """The loss with something changed."""

    def value(pictures, texts, scale):
        similar, own = scaled(pictures @ texts.T, scale), torch.arange(len(pictures))
        return factor * (F.cross_entropy(first(similar), own) + F.cross_entropy(second(similar), own))

    return value


def pick(where):
    """The states at places that depend on the tokens."""
    return lambda states, tokens, end: states[torch.arange(len(states)), where(tokens, end)]


def first_end(tokens, end):
    return (tokens == end).int().argmax(1)


def last_end(tokens, end):
    return tokens.shape[1] - 1 - (tokens == end).int().flip(1).argmax(1)


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
    (check_row, (row(cut=-1),), "the end was cut off"),
    (check_row, (row(cut=0),), "the end was cut off"),
    (check_row, (row(pad=0),), "fill up with 0"),
    (check_row, (row(pad=5),), "until the row is full"),
    (check_row, (row(start=False),), "not with the start"),
    (check_row, (row(cut=-3),), "found room"),
    (check_row, (lambda ids, length, start, end: [start, *ids[: length - 2], end],), "8 were asked for"),
    (check_row, (lambda *given: torch.tensor(row()(*given)),), "a list was asked for"),
    (check_row, (in_place,), "has changed"),
    (check_row, (lambda *given: None,), "a list was asked for"),
    (check_loss, (loss(scaled=lambda s, scale: s / scale, second=lambda s: s),), "Both bugs"),
    (check_loss, (loss(second=lambda s: s),), "who looks for whom"),
    (check_loss, (loss(scaled=lambda s, scale: s / scale),), "the scale makes similarities larger"),
    (check_loss, (loss(scaled=lambda s, scale: s),), "not used"),
    (check_loss, (loss(first=lambda s: s.T),), "Only the texts"),
    (check_loss, (loss(factor=1),), "the sum of the two"),
    (check_loss, (loss(factor=0.1),), "it should be"),
    (check_loss, (lambda pictures, texts, scale: pictures @ texts.T,), "One number"),
    (check_pool, (lambda states, tokens, end: states[:, -1],), "the last place"),
    (check_pool, (lambda states, tokens, end: states[:, 0],), "the start"),
    (check_pool, (lambda states, tokens, end: states.mean(1),), "the mean"),
    (check_pool, (pick(last_end),), "the last end"),
    (check_pool, (pick(lambda tokens, end: first_end(tokens, end) - 1),), "the last word"),
    (check_pool, (pick(lambda tokens, end: tokens.argmin(1)),), "that is not the vector"),
    (check_pool, (pick(lambda tokens, end: tokens.argmax(1)),), "largest number"),
    (check_pool, (lambda states, tokens, end: states[:, first_end(tokens, end)],), "four vectors for each row"),
    (check_pool, (lambda states, tokens, end: states,), "shape (4, 6, 3)"),
    (check_pool, (lambda *given: None,), "nothing back"),
    (check_classify, (lambda p, q: (p @ q.mean(1).T).argmax(1),), "short"),
    (check_classify, (lambda p, q: cosines(p, q).amax(2).argmax(1),), "best single prompt"),
    (check_classify, (lambda p, q: cosines(p, q).flatten(1).argmax(1),), "number of a prompt"),
    (check_classify, (lambda p, q: cosines(p, q)[:, :, 0].argmax(1),), "first prompt"),
    (check_classify, (lambda p, q: (p @ F.normalize(q.mean(1), dim=1).T).argmin(1),), "fits worst"),
    (check_classify, (lambda p, q: p @ F.normalize(q.mean(1), dim=1).T,), "the best class was asked for"),
    (check_classify, (lambda p, q: torch.zeros(len(p), dtype=torch.long),), "get the right class"),
]
