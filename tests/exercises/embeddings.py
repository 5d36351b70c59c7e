"""Wrong answers to the exercises of the timestep embeddings, and what they must be told."""

import math

import torch

from unet_course.embeddings import timestep_embedding
from unet_course.exercises.embeddings import check_convert, check_idle, check_precision, check_shift, check_turns


def omega(half, steps=None):
    """The speeds of the hands."""
    return 10000 ** (-torch.arange(half) / (steps or half))


def turn(rows, angle, sign=1):
    """Turn each hand by an angle."""
    cos, sin = rows.chunk(2, dim=1)
    return torch.cat([cos * angle.cos() - sign * sin * angle.sin(), sin * angle.cos() + sign * cos * angle.sin()], dim=1)


def in_place(rows, k):
    """Right, but in the caller's tensor."""
    return rows.copy_(turn(rows, k * omega(rows.shape[1] // 2)))


def neighbours(rows, k):
    """Takes the channels 2i and 2i+1 for a pair."""
    cos, sin = rows[:, 0::2], rows[:, 1::2]
    angle = k * omega(cos.shape[1])
    return torch.stack([cos * angle.cos() - sin * angle.sin(), sin * angle.cos() + cos * angle.sin()], dim=2).flatten(1)


def off_the_fastest(rows, k):
    """Reads the time off one hand."""
    half = rows.shape[1] // 2
    return timestep_embedding(torch.atan2(rows[:, half], rows[:, 0]) + k, rows.shape[1])


def rounded_speed(timesteps, dim, dtype):
    """Only the speeds are rounded."""
    angles = timesteps.float()[:, None] * omega(dim // 2).to(dtype).float()
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)


def rounded_time(timesteps, dim, dtype):
    """Only the times are rounded."""
    return timestep_embedding(timesteps.to(dtype), dim).to(dtype)


def rounded_angle(timesteps, dim, dtype):
    """The product is rounded."""
    angles = (timesteps.float()[:, None] * omega(dim // 2)).to(dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


WRONG = [
    (check_turns, ([1.0, 10.0, 100.0, 1000.0],), "2π radians"),
    (check_turns, ([1.0, 0.1, 0.01, 0.001],), "these are the speeds"),
    (check_turns, ([2 * math.pi * 10000 ** (i / 3) for i in range(4)],), "DDPM's order"),
    (check_turns, ([2 * math.pi * 10000 ** (i / 8) for i in range(4)],), "divided the exponent by the width"),
    (check_turns, ([2 * math.pi * 10**i for i in (3, 2, 1, 0)],), "in reverse"),
    (check_turns, ([2 * math.pi * 10 ** (i / 2) for i in range(8)],), "four hands"),
    (check_turns, ([6.28, 62.8, 314, 6283],), "hand 2 is off"),
    (check_turns, ([1 / (2 * math.pi * 10**i) for i in range(4)],), "the other way up"),
    (check_idle, (20.8,), "whole numbers"),
    (check_idle, (22,), "round 20.8 up"),
    (check_idle, (48,), "logarithm"),
    (check_idle, (43,), "do not move"),
    (check_idle, (20,), "i = 0 as well"),
    (check_idle, (42,), "count channels"),
    (check_idle, (41,), "divided by the width"),
    (check_idle, (64,), "hardly move"),
    (check_idle, (12,), "Not 12"),
    (check_shift, (lambda rows, k: rows,), "nothing has moved"),
    (check_shift, (lambda rows, k: turn(rows, k * omega(rows.shape[1] // 2), -1),), "backwards"),
    (check_shift, (lambda rows, k: turn(rows, k * omega(rows.shape[1] // 2, rows.shape[1])),), "by the width"),
    (check_shift, (lambda rows, k: turn(rows, k * omega(rows.shape[1] // 2, max(rows.shape[1] // 2 - 1, 1))),), "h − 1"),
    (check_shift, (lambda rows, k: turn(rows, k * omega(rows.shape[1] // 2)).roll(rows.shape[1] // 2, dims=1),), "sines first"),
    (check_shift, (lambda rows, k: rows + timestep_embedding(torch.full((len(rows),), float(k)), rows.shape[1]),), "adding tips"),
    (check_shift, (lambda rows, k: turn(rows, torch.tensor(float(k)).expand(rows.shape[1] // 2)),), "wrong angles"),
    (check_shift, (off_the_fastest,), "only up to whole turns"),
    (check_shift, (neighbours,), "left the circle"),
    (check_shift, (in_place,), "changed the rows"),
    (check_shift, (lambda rows, k: None,), "return"),
    (check_precision, (lambda t, dim, dtype: timestep_embedding(t, dim),), "but in float32"),
    (check_precision, (lambda t, dim, dtype: timestep_embedding(t, dim).half(),), "float16"),
    (check_precision, (lambda t, dim, dtype: timestep_embedding(t, dim).bfloat16(),), "type from the argument"),
    (check_precision, (rounded_time,), "same row"),
    (check_precision, (rounded_angle,), "grows with the time"),
    (check_precision, (rounded_speed,), "grows with the time"),
    (check_precision, (lambda t, dim, dtype: timestep_embedding(t, dim).roll(dim // 2, dims=1).to(dtype),), "sines come first"),
    (check_convert, (lambda w: w,), "unchanged"),
    (check_convert, (lambda w: torch.cat([w[:, 0::2], w[:, 1::2]], dim=1),), "sines' columns first"),
    (check_convert, (lambda w: w.roll(w.shape[1] // 2, dims=1),), "exchanged the two halves"),
    (check_convert, (lambda w: torch.stack([w[:, w.shape[1] // 2 :], w[:, : w.shape[1] // 2]], dim=2).flatten(1),), "way back"),
    (check_convert, (lambda w: w.flip(1),), "wrong order"),
    (check_convert, (lambda w: w.flip(0),), "stay in their row"),
    (check_convert, (lambda w: w.T,), "shape (12, 5)"),
]
