"""Wrong answers to the exercises on text to image, and what they must be told."""

import torch
from torch import Generator

from unet_course.diffusion import to_noise
from unet_course.exercises.latent_diffusion import check_both, check_choose, check_decode, check_noise, check_numbers


def shared(seeds, shape):
    """One generator for the batch, the first picture's."""
    return torch.randn(len(seeds), *shape, generator=Generator().manual_seed(seeds[0]))


def reseeding(seeds, shape):
    """Right numbers, at the cost of everybody else's."""
    noise = []
    for seed in seeds:
        torch.manual_seed(seed)
        noise.append(torch.randn(shape))
    return torch.stack(noise)


def each(draw):
    return lambda seeds, shape: torch.stack([draw(shape, Generator().manual_seed(s)) for s in seeds])


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def choose(which, hidden, write=False):
    """Which caption, and which are hidden."""

    def answer(tokens, null, drop, generator):
        chosen = which(tokens, generator)
        mask = hidden(chosen, drop, generator)
        if write:
            tokens[:, 0] = torch.where(mask, null, tokens[:, 0])
        return torch.where(mask, null, chosen)

    return answer


def own(tokens, generator):
    return tokens[torch.arange(len(tokens)), torch.randint(tokens.shape[1], (len(tokens),), generator=generator)]


def one_for_all(tokens, generator):
    return tokens[:, torch.randint(tokens.shape[1], (1,), generator=generator)[0]]


def shuffled(tokens, generator):
    return own(tokens, generator)[torch.randperm(len(tokens), generator=generator)]


def never_last(tokens, generator):
    return own(tokens[:, :-1], generator)


def whole(chosen, drop, generator):
    return torch.rand(len(chosen), 1, generator=generator) < drop


def holes(chosen, drop, generator):
    return torch.rand(chosen.shape, generator=generator) < drop


def in_place(vae, latents, factor):
    latents /= factor
    return vae.decode(latents)


def multiplied_in_place(vae, latents, factor):
    latents *= factor
    return vae.decode(latents)


def both(formula, noise="new"):
    """Three predicts made into one."""

    def wrapper(nothing, first, second, scales, schedule):
        def predict(x, t):
            (n, _), (a, a_noise), (b, _) = (part(x, t) for part in (nothing, first, second))
            x0 = formula(n, a, b, *scales)
            return x0, to_noise("x0", x0, x, *schedule.at(t, x)) if noise == "new" else a_noise

        return predict

    return wrapper


def right(n, a, b, s, u):
    return n + s * (a - n) + u * (b - n)


WRONG = [
    (check_numbers, (512 * 512 * 3, 60, 5.06), "counts pixels"),
    (check_numbers, (64 * 64, 60, 5.06), "How many numbers has each place"),
    (check_numbers, (8 * 8 * 4, 60, 5.06), "channels × rows × columns"),
    (check_numbers, (16384, 30, 5.06), "each question is two"),
    (check_numbers, (16384, 120, 5.06), "heun would ask twice"),
    (check_numbers, (16384, 7, 5.06), "steps × questions"),
    (check_numbers, (16384, 60, 2.25), "compares each place with each"),
    (check_numbers, (16384, 60, 4), "how many pairs of places"),
    (check_noise, (shared,), "shared by the whole batch"),
    (check_noise, (reseeding,), "global generator"),
    (check_noise, (lambda seeds, shape: torch.randn(len(seeds), *shape),), "just seeded"),
    (check_noise, (each(lambda shape, generator: torch.rand(shape, generator=generator)),), "not standard normal"),
    (check_noise, (each(lambda shape, generator: -normal(shape, generator)),), "this very seed"),
    (check_noise, (lambda seeds, shape: torch.stack([normal(shape, Generator().manual_seed(0)) for _ in seeds]),), "Seeds 5 and 3"),
    (check_noise, (lambda seeds, shape: normal(shape, Generator().manual_seed(seeds[0])),), "of shape (4, 6, 7)"),
    (check_noise, (lambda seeds, shape: torch.stack([normal(shape, Generator().manual_seed(s + len(seeds))) for s in seeds]),), "depends on its neighbours"),
    (check_noise, (lambda seeds, shape: torch.stack([normal(shape, Generator().manual_seed(s + i)) for i, s in enumerate(seeds)]),), "place in the batch"),
    (check_numbers, (16384, 60, "5"), "a number was asked for"),
    (check_choose, (choose(own, lambda c, d, g: torch.rand(len(c), 1) < d),), "in the same state"),
    (check_choose, (choose(own, lambda c, d, g: torch.rand(len(c), generator=g) < d),), "an axis of length 1"),
    (check_decode, (lambda vae, latents, factor: vae.decode(latents) / factor,), "latents that have to be divided"),
    (check_choose, (choose(one_for_all, holes),), "have holes"),
    (check_choose, (choose(own, holes),), "have holes"),
    (check_choose, (choose(one_for_all, whole),), "should choose for itself"),
    (check_choose, (choose(shuffled, whole),), "caption of another"),
    (check_choose, (choose(never_last, whole),), "equally often"),
    (check_choose, (choose(own, lambda c, d, g: torch.rand(len(c), 1, generator=g) > d),), "20 % were asked for"),
    (check_choose, (choose(own, lambda c, d, g: torch.rand(1, generator=g) < -d),), "random number of its own"),
    (check_choose, (choose(own, whole, write=True),), "gone for good"),
    (check_choose, (lambda tokens, null, drop, generator: tokens[:, torch.zeros(len(tokens), dtype=torch.long)],), "was asked for"),
    (check_decode, (multiplied_in_place,), "one bug of two"),
    (check_decode, (lambda vae, latents, factor: vae.decode(latents * factor),), "multiplied by the factor once more"),
    (check_decode, (lambda vae, latents, factor: vae.decode(latents),), "does nothing"),
    (check_decode, (lambda vae, latents, factor: vae.decode(latents) / factor**2,), "not what the VAE makes"),
    (check_decode, (in_place,), "writes into the tensor"),
    (check_decode, (lambda vae, latents, factor: None,), "nothing back"),
    (check_both, (both(lambda n, a, b, s, u: right(n, b, a, s, u)),), "changed places"),
    (check_both, (both(lambda n, a, b, s, u: n + s * a + u * b),), "the *differences*"),
    (check_both, (both(lambda n, a, b, s, u: s * (a - n) + u * (b - n)),), "is missing"),
    (check_both, (both(lambda n, a, b, s, u: right(n, a, b, s, u) + n),), "counted twice"),
    (check_both, (both(lambda n, a, b, s, u: (right(n, a, a, s, 0) + right(n, b, b, u, 0)) / 2),), "halves both"),
    (check_both, (both(lambda n, a, b, s, u: a + u * (b - a)),), "first prompt to the second"),
    (check_both, (both(lambda n, a, b, s, u: (a + b) / 2),), "is not nothing"),
    (check_both, (both(right, noise="old"),), "the noise is not"),
    (check_both, (lambda *given: lambda x, t: both(right)(*given)(x, t)[::-1],), "first the guess, then the noise"),
    (check_both, (lambda n, a, b, scales, schedule: a(torch.zeros(3, 4, 5, 6), 5),), "give back a function"),
    (check_both, (lambda n, a, b, scales, schedule: lambda x, t: a(x, t)[0],), "two tensors"),
]
