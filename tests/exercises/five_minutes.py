"""Wrong answers to the exercises of chapter 00, and what they must be told."""

import torch

from unet_course.exercises.five_minutes import (
    check_best_guess,
    check_one_step,
    check_recover_noise,
    check_redraw,
    check_up1_shape,
    check_walk,
)


def column(t):
    """One level for each picture."""
    return t.reshape(-1, 1, 1, 1)


def in_place(x, guess, t):
    """Right, but it changes what it was given."""
    x -= (1 - column(t)) * guess
    x /= column(t)
    return x


def walk(step, first=1.0, last=0.0, extra=1):
    """A walk with a step of its own."""

    def function(guess, x, steps):
        times = torch.linspace(first, last, steps + extra)
        for t, t_next in zip(times, times[1:]):
            x = step(x, guess(x, t), t, t_next)
        return x

    return function


def forgetful(guess, x, steps):
    """Shrinks x itself instead of its distance from the guess."""
    return walk(lambda x, g, t, u: u / t * x)(guess, x, steps)


def redraw(start=lambda p, n, t: (1 - t) * p + t * n, first=lambda t: t, extra=1, step=lambda x, g, t, u: g + u / t * (x - g)):
    """A walk from the middle with one thing changed."""

    def function(guess, picture, noise, t_start, steps):
        x = start(picture, noise, t_start)
        times = torch.linspace(first(t_start), 0, steps + extra)
        for t, t_next in zip(times, times[1:]):
            x = step(x, guess(x, t), t, t_next)
        return x

    return function


def asking_twice(guess, picture, noise, t_start, steps):
    """Right, but the network is asked twice in each step."""
    x = (1 - t_start) * picture + t_start * noise
    times = torch.linspace(t_start, 0, steps + 1)
    for t, t_next in zip(times, times[1:]):
        x = guess(x, t) + t_next / t * (x - guess(x, t))
    return x


def walk_asking_twice(guess, x, steps):
    """The same from pure noise."""
    return asking_twice(guess, x, x, 1.0, steps)


WRONG = [  # checker, arguments, a part of the diagnosis it must give
    (check_best_guess, (-1.0, 1.0), "most common pixel"),
    (check_best_guess, (0.0, 1.0), "middle of the range"),
    (check_best_guess, (0.5, 0.75), "not the best guess"),
    (check_best_guess, (-0.5, 0.0), "never equal"),
    (check_best_guess, (-0.5, 0.866), "root"),
    (check_best_guess, (-0.5, 3.0), "added the four squares"),
    (check_best_guess, (-0.5, 0.5), "average the four squared distances"),
    (check_one_step, ("noise",), "nothing of the noise is kept"),
    (check_one_step, ("A crisp digit",), "from pure noise"),
    (check_one_step, ("crisp digit",), "what are they at t = 1"),
    (check_one_step, ("a cat",), "choose one"),
    (check_recover_noise, (lambda x, guess, t: x - guess,), "subtracted the whole picture"),
    (check_recover_noise, (lambda x, guess, t: x - (1 - column(t)) * guess,), "t times the noise"),
    (check_recover_noise, (lambda x, guess, t: (x - guess) / column(t),), "noise minus picture"),
    (check_recover_noise, (lambda x, guess, t: (x - column(t) * guess) / (1 - column(t)),), "exchanged"),
    (check_recover_noise, (lambda x, guess, t: (x - (1 - t) * guess) / t,), "along the width"),
    (check_recover_noise, (lambda x, guess, t: (x - (1 - t[:, None]) * guess) / t[:, None],), "along the height"),
    (check_recover_noise, (in_place,), "changed x itself"),
    (check_recover_noise, (lambda x, guess, t: x + guess,), "solve for the noise"),
    (check_recover_noise, (lambda x, guess, t: None,), "gave nothing back"),
    (check_walk, (walk(lambda x, g, t, u: x + u / t * (g - x)),), "must end there"),
    (check_walk, (walk(lambda x, g, t, u: x + (t - u) * (g - x)),), "must end there"),
    (check_walk, (walk(lambda x, g, t, u: x + (1 - u) * (g - x)),), "wrong pace"),
    (check_walk, (walk(lambda x, g, t, u: g),), "wrong pace"),
    (check_walk, (walk(lambda x, g, t, u: u / t * (x - g)),), "leaves the straight line"),
    (check_walk, (forgetful,), "leaves the straight line"),
    (check_walk, (walk(lambda x, g, t, u: g + u / t * (x - g), first=0.001, last=1.0),), "first at t = 1"),
    (check_walk, (walk(lambda x, g, t, u: g + u / t * (x - g), extra=0),), "asked 4 times"),
    (check_walk, (walk(lambda x, g, t, u: g + t / u * (x - g)),), "divide by it"),
    (check_walk, (walk_asking_twice,), "twice at each level"),
    (check_walk, (lambda guess, x, steps: [x := guess(x, 1.0) for _ in range(steps)][-1],), "wrong pace"),
    (check_walk, (walk(lambda x, g, t, u: x.add_((1 - u / t) * (g - x))),), "changes the noise"),
    (check_up1_shape, (1, 160, 16, 16), "five pictures"),
    (check_up1_shape, (5, 160, 32, 32), "folded"),
    (check_up1_shape, (5, 160, 8, 8), "level below"),
    (check_up1_shape, (5, 160, 14, 14), "follow one side"),
    (check_up1_shape, (5, 96, 16, 16), "one of the two"),
    (check_up1_shape, (5, 64, 16, 16), "one of the two"),
    (check_up1_shape, (5, 224, 16, 16), "add what comes"),
    (check_redraw, (redraw(start=lambda p, n, t: p),), "clean picture"),
    (check_redraw, (redraw(start=lambda p, n, t: n),), "bare noise"),
    (check_redraw, (redraw(start=lambda p, n, t: n, first=lambda t: 1.0),), "start at t_start"),
    (check_redraw, (redraw(first=lambda t: 1.0),), "start at t_start"),
    (check_redraw, (redraw(start=lambda p, n, t: t * p + (1 - t) * n),), "exchanged"),
    (check_redraw, (redraw(start=lambda p, n, t: p + t * n),), "first stop"),
    (check_redraw, (redraw(extra=0),), "n + 1 times"),
    (check_redraw, (asking_twice,), "twice at each level"),
    (check_redraw, (redraw(first=lambda t: t / 2),), "three equal steps"),
    (check_redraw, (redraw(step=lambda x, g, t, u: x + u / t * (g - x)),), "keep the share"),
    (check_redraw, (lambda guess, picture, noise, t_start, steps: picture,), "never asked"),
]
