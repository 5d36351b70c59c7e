"""Wrong answers to the exercises on Stable Diffusion, and what they must be told."""

import torch

from unet_course.exercises.stable_diffusion import check_average, check_begin, check_merge, check_numbers, check_thirds


def averages(key):
    """Look for the average of a name under this key."""
    return lambda tensors, names: {name: tensors[key(name)] for name in names}


def emptied(tensors, names):
    answer = averages(flat)(tensors, names)
    tensors.clear()
    return answer


def flat(name):
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def shuffled(tensors, names):
    return dict(zip(names, averages(flat)(tensors, names[::-1]).values()))


def everything(tensors, names):
    return averages(flat)(tensors, names) | {"decay": tensors["model_ema.decay"]}


def thirds(cut=lambda t: t.chunk(3), letters="qkv", name="{}.{}_proj.{}", kinds=("weight", "bias"), keep=False, error=ValueError, copy=torch.clone):
    """Cut each piece in some way; right as it is."""

    def separate(tensors):
        answer = {}
        for key, t in tensors.items():
            before, found, kind = key.partition(".in_proj_")
            if keep or not found:
                answer[key] = t
            if found and kind in kinds:
                if error and len(t) % 3:
                    raise error(key)
                answer |= {name.format(before, letter, kind): copy(part) for letter, part in zip(letters, cut(t))}
        return answer

    return separate


def replaced(tensors):
    """Right, but in the dictionary that was given."""
    answer = thirds()(tensors)
    tensors.clear()
    tensors.update(answer)
    return tensors


def columns(t):
    return t.chunk(3, dim=-1)


def everything_cut(tensors):
    return {name: t.flip(0) if t.ndim == 1 else t + 1 for name, t in tensors.items() if "in_proj" not in name} | thirds()(
        {name: t for name, t in tensors.items() if "in_proj" in name})


def merge(formula, check=True, write=False):
    """A mixture by a formula."""

    def answer(first, second, share):
        if check and {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
            raise ValueError("no")
        mixed = {name: formula(t, second[name], share) for name, t in first.items()}
        if write:
            for name in first:
                first[name] += 1
        return mixed

    return answer


def begin(rest=lambda visits, count: visits[len(visits) - count :], level=lambda rest, visits: rest[0], empty=True, write=False):
    """Begin a walk in some way; right as it is."""

    def answer(picture, noise, schedule, visits, strength):
        left = rest(visits, round(strength * len(visits)))
        if empty and not left:
            return left, picture
        noisy = schedule.add_noise(picture, noise, level(left, visits))
        return left, picture.copy_(noisy) if write else noisy

    return answer


def eager(picture, noise, schedule, visits, strength):
    return begin()(picture, noise, schedule, visits, strength)[0], schedule.add_noise(picture, noise, 0)


def only_zero(picture, noise, schedule, visits, strength):
    if strength == 0:
        return [], picture
    return begin(rest=lambda visits, count: visits[-count:])(picture, noise, schedule, visits, strength)


def still_noisy(picture, noise, schedule, visits, strength):
    return ([], schedule.add_noise(picture, noise, visits[-1])) if not strength else begin()(picture, noise, schedule, visits, strength)


def eaten(picture, noise, schedule, visits, strength):
    del visits[: len(visits) - round(strength * len(visits))]
    return visits, schedule.add_noise(picture, noise, visits[0])


def counted(first, second, share):
    if len(first) != len(second):
        raise ValueError("no")
    return merge(right, check=False)(first, second, share)


def lenient(first, second, share):
    if set(second) - set(first):
        raise ValueError("no")
    return {name: right(t, second[name], share) for name, t in first.items()}


def ordered(first, second, share):
    """Refuses the same names in another order."""
    if list(first) != list(second):
        raise ValueError("no")
    return merge(right)(first, second, share)


def by_place(first, second, share):
    """Mixes the first with the first, whatever their names."""
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        raise ValueError("no")
    return {n: right(a, b.to(a.dtype), share) for (n, a), b in zip(first.items(), second.values())}


def right(a, b, share):
    return torch.lerp(a, b, share)


WRONG = [
    (check_numbers, (4.3, 599, 120), "twice"),
    (check_numbers, (3.9, 599, 120), "half of it"),
    (check_numbers, (8.5, 599, 120), "Only the U-Net"),
    (check_numbers, (1.9, 599, 120), "four bytes"),
    (check_numbers, (7.0, 599, 120), "add up"),
    (check_numbers, (7.7, 999, 120), "from pure noise"),
    (check_numbers, (7.7, 600, 120), "numbered from 0"),
    (check_numbers, (7.7, 399, 120), "share of the steps that is"),
    (check_numbers, (7.7, 15, 120), "Which number"),
    (check_numbers, (7.7, 639, 120), "the tenth"),
    (check_numbers, (7.7, 559, 120), "the twelfth"),
    (check_numbers, (7.7, [599], 120), "write down"),
    (check_numbers, (7.7, 599, 60), "twice"),
    (check_numbers, (7.7, 599, 30), "four prompts"),
    (check_numbers, (7.7, 599, 15), "guidance asks twice"),
    (check_numbers, (7.7, 599, 200), "all 25"),
    (check_numbers, (7.7, 599, 240), "heun"),
    (check_numbers, (7.7, 599, [7]), "times two"),
    (check_average, (averages(lambda name: f"model.diffusion_model.{name}"),), "as training left them"),
    (check_average, (averages(lambda name: f"model_ema.diffusion_model.{name}"),), "there still are dots"),
    (check_average, (averages(lambda name: f"model_ema.diffusion_model.{name}".replace(".", "")),), "dot after `model_ema` stays"),
    (check_average, (averages(lambda name: "model_ema." + f"model.diffusion_model.{name}".replace(".", "")),), "not the `model.` before it"),
    (check_average, (averages(lambda name: "model_ema." + name.replace(".", "")),), "stands `diffusion_model`"),
    (check_average, (averages(lambda name: name),), "has no such name"),
    (check_average, (lambda tensors, names: list(names),), "a dictionary"),
    (check_average, (everything,), "one too many"),
    (check_average, (shuffled,), "another one's tensor"),
    (check_average, (emptied,), "has changed"),
    (check_thirds, (lambda tensors: None,), "a dictionary"),
    (check_thirds, (replaced,), "has changed"),
    (check_thirds, (dict,), "'transformer.resblocks.0.attn.k_proj.bias' is missing"),
    (check_thirds, (thirds(name="{}.{}_proj_{}"),), "with a dot before the last word"),
    (check_thirds, (thirds(kinds=("weight",)),), "The biases are in one piece as well"),
    (check_thirds, (thirds(keep=True),), "still there"),
    (check_thirds, (lambda tensors: thirds()(tensors) | {"more": torch.ones(1)},), "one name too many"),
    (check_thirds, (lambda tensors: {n: t for n, t in thirds()(tensors).items() if "ln_final" not in n},), "'ln_final.bias' is missing"),
    (check_thirds, (lambda tensors: dict.fromkeys(thirds()(tensors), 1.0),), "should be a tensor"),
    (check_thirds, (everything_cut,), "nobody wants cut"),
    (check_thirds, (thirds(cut=lambda t: [t] * 3),), "the whole piece"),
    (check_thirds, (thirds(cut=columns),), "you cut the columns"),
    (check_thirds, (thirds(cut=lambda t: t.split(4)),), "a third of the rows"),
    (check_thirds, (thirds(letters="kqv"),), "holds the keys"),
    (check_thirds, (thirds(cut=lambda t: [t[i::3] for i in range(3)]),), "every third row"),
    (check_thirds, (thirds(cut=lambda t: t.flip(0).chunk(3)[::-1]),), "other numbers"),
    (check_thirds, (thirds(copy=lambda t: t),), "share the memory"),
    (check_thirds, (thirds(error=None),), "you gave back [3, 3, 1]"),
    (check_thirds, (thirds(error=IndexError),), "raised IndexError"),
    (check_begin, (begin(rest=lambda visits, count: visits[:count], level=lambda rest, visits: rest[-1], empty=False),), "the noisiest"),
    (check_begin, (begin(rest=lambda visits, count: visits),), "2 are to be made"),
    (check_begin, (begin(rest=lambda visits, count: visits[::-1][:count]),), "in their order"),
    (check_begin, (begin(level=lambda rest, visits: rest[-1]),), "have the noise of step 199"),
    (check_begin, (begin(level=lambda rest, visits: visits[0]),), "have the noise of step 999"),
    (check_begin, (begin(empty=False),), "empty list"),
    (check_begin, (begin(rest=lambda visits, count: visits[-count:]),), "−0 is 0"),
    (check_begin, (only_zero,), "−0 is 0"),
    (check_begin, (begin(rest=lambda visits, count: visits[len(visits) - count :] if count != 4 else visits[2:]),), "rounded"),
    (check_begin, (eager,), "any step of this walk"),
    (check_begin, (still_noisy,), "may be added"),
    (check_begin, (begin(write=True),), "has changed"),
    (check_begin, (eaten,), "has changed"),
    (check_begin, (lambda picture, noise, schedule, visits, strength: picture,), "end as it did"),
    (check_begin, (lambda picture, noise, schedule, visits, strength: (visits[3:], None),), "nothing back"),
    (check_merge, (merge(lambda a, b, share: torch.lerp(b, a, share)),), "other way round"),
    (check_merge, (merge(lambda a, b, share: (a + b) / 2),), "half of each"),
    (check_merge, (merge(lambda a, b, share: a + share * b),), "(1 − share)"),
    (check_merge, (merge(lambda a, b, share: right(a.float(), b.float(), share)),), "and is torch.float32 now"),
    (check_merge, (merge(right, write=True),), "was changed"),
    (check_merge, (merge(right, check=False),), "a name that only one"),
    (check_merge, (lambda a, b, share: {n: right(t, b[n], share) for n, t in a.items()} if a.keys() == b.keys() else merge(right)(a, b, share),), "two shapes"),
    (check_merge, (lambda a, b, share: None,), "a dictionary"),
    (check_merge, (lenient,), "KeyError"),
    (check_merge, (counted,), "KeyError"),
    (check_merge, (ordered,), "not its place in the list"),
    (check_merge, (by_place,), "Go by the names"),
]
