"""Wrong answers to the exercises of chapter 18, and what each must be told."""

import statistics

import torch

from unet_course.exercises.speed import check_compare, check_numbers, check_remember, check_sliced


def race(warm=True, turns=True, average=statistics.median, ratio=lambda a, b: a / b, rounds=lambda n: n):
    """How many times as fast, with some of it wrong."""

    def compare(old, new, n, clock):
        if warm:
            old(), new()
        times = {old: [], new: []}
        pairs = [(old, new)] * rounds(n)
        for function in [f for pair in pairs for f in pair] if turns else [p[i] for i in (0, 1) for p in pairs]:
            start = clock()
            function()
            times[function].append(clock() - start)
        return ratio(average(times[old]), average(times[new]))

    return compare


def whole(q, k, v, rows):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def cut(q, k, v, rows, weights=lambda q, k: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)):
    return torch.cat([weights(part, k) @ v for part in q.split(rows, 2)], 2)


def rows_whole(q, k, v, rows):
    """The last rows are forgotten and stay zero."""
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for i in range(q.shape[2] // rows):
        out[:, :, i * rows : (i + 1) * rows] = whole(q[:, :, i * rows : (i + 1) * rows], k, v, rows)
    return out


def keys_too(q, k, v, rows):
    return torch.cat([whole(a, b, c, rows) for a, b, c in zip(q.split(rows, 2), k.split(rows, 2), v.split(rows, 2))], 2)


def weights_kept(q, k, v, rows):
    return torch.cat([(part @ k.mT * q.shape[-1] ** -0.5).softmax(-1) for part in q.split(rows, 2)], 2) @ v


def over_queries(q, k, v, rows):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-2) @ v


def cache(same, keep=lambda x: x):
    """A cache of one answer that decides by `same`."""

    def remember(layer):
        kept = {}

        def function(x):
            if not kept or not same(kept["x"], x):
                kept.update(x=keep(x), answer=layer(x))
            return kept["answer"]

        return function

    return remember


def stretched(a, b):
    try:
        return bool((a == b).all())
    except RuntimeError:
        return False


def half(layer):
    """Keeps the question and forgets to keep its answer."""
    kept = {}

    def function(x):
        if "x" in kept and torch.equal(kept["x"], x):
            return kept["answer"]
        kept["x"] = x.clone()
        kept.setdefault("answer", layer(x))
        return kept["answer"]

    return function


WRONG = [
    (check_numbers, (4, 7.25, 7.2), "other fifth"),
    (check_numbers, (3.2, 7.25, 7.2), "no speed"),
    (check_numbers, (3.4, 7.25, 7.2), "averaged"),
    (check_numbers, (0.4, 7.25, 7.2), "share of the time"),
    (check_numbers, (2, 7.25, 7.2), "old time be 1"),
    (check_numbers, ("2.5", 7.25, 7.2), "should be a number"),
    (check_numbers, (2.5, 5, 7.2), "cost something"),
    (check_numbers, (2.5, 8, 7.2), "too many"),
    (check_numbers, (2.5, 15.75, 7.2), "wrong way round"),
    (check_numbers, (2.5, 9, 7.2), "1, 5, 9"),
    (check_numbers, (2.5, 8.1, 7.2), "seem to have 6"),
    (check_numbers, (2.5, 6.4, 7.2), "seem to have 4"),
    (check_numbers, (2.5, 3.0, 7.2), "nothing yet to reuse"),
    (check_numbers, (2.5, 7.25, 2.4), "the old one, too"),
    (check_numbers, (2.5, 7.25, 4.8), "the old copy alone"),
    (check_numbers, (2.5, 7.25, 9.6), "2 bytes, not 4"),
    (check_numbers, (2.5, 7.25, 57.6), "gigabits"),
    (check_numbers, (2.5, 7.25, 1), "two copies"),
    (check_compare, (race(ratio=lambda a, b: b / a),), "divide the new"),
    (check_compare, (race(ratio=lambda a, b: a - b),), "instead of 2"),
    (check_compare, (race(warm=False, average=statistics.fmean),), "call both once"),
    (check_compare, (race(turns=False),), "take turns"),
    (check_compare, (race(average=statistics.fmean),), "the median is not"),
    (check_compare, (race(rounds=lambda n: 1),), "timed 9 times"),
    (check_compare, (lambda *_: "twice",), "give a number"),
    (check_sliced, (whole,), "formed before it is cut"),
    (check_sliced, (weights_kept,), "are the parts of it kept"),
    (check_sliced, (keys_too,), "keys and values into slices"),
    (check_sliced, (rows_whole,), "leave 6"),
    (check_sliced, (lambda q, k, v, rows: cut(q, k, v, rows, lambda q, k: (q @ k.mT).softmax(-1)),), "square root"),
    (check_sliced, (over_queries,), "each *row*"),
    (check_sliced, (lambda q, k, v, rows: cut(q, k, v, rows, lambda q, k: (q @ k.mT).sigmoid()),), "differs from attention"),
    (check_sliced, (lambda q, k, v, rows: cut(q, k, v, rows)[:, :, :64],), "was asked for"),
    (check_sliced, (lambda *_: None,), "nothing back"),
    (check_remember, (lambda layer: layer,), "computed twice"),
    (check_remember, (cache(lambda a, b: a is b),), "objects, not numbers"),
    (check_remember, (cache(torch.equal),), "keep a *copy*"),
    (check_remember, (cache(lambda a, b: a.shape == b.shape, torch.clone),), "not only the shape"),
    (check_remember, (cache(lambda a, b: True),), "not only the shape"),
    (check_remember, (cache(stretched, torch.clone),), "stretches a row"),
    (check_remember, (cache(lambda a, b: bool((a == b).all()) if a.shape == b.shape else True, torch.clone),), "another shape"),
    (check_remember, (cache(lambda a, b: bool((a == b).all()), torch.clone),), "stops with an error"),
    (check_remember, (cache(lambda a, b: a.shape == b.shape and torch.allclose(a, b), torch.clone),), "last digit"),
    (check_remember, (cache(lambda a, b: a.shape == b.shape and (a - b).abs().max() < 1e-6, torch.clone),), "last digit"),
    (check_remember, (half,), "the old answer"),
    (check_remember, (lambda layer: layer(torch.ones(2, 3)),), "a function of x"),
    (check_remember, (lambda layer: lambda x: None,), "nothing back"),
    (check_remember, (lambda layer: lambda x: 3 * x,), "wrong already"),
]
