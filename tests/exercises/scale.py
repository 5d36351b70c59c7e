"""Wrong answers to the exercises on scale, and what they must be told."""

import torch

from unet_course.exercises.scale import check_bytes, check_noise, check_place, check_ring


def ring(add=True, laps=2, divide=True, whole=False):
    """The ring, with something missing."""

    def answer(parts, send):
        n = len(parts)
        for turn in range((n - 1) * laps):
            pieces = [(rank - turn) % n for rank in range(n)]
            arrived = [send(rank, parts[rank] if whole else parts[rank, piece]) for rank, piece in enumerate(pieces)]
            for rank, piece in enumerate(pieces):
                new = arrived[rank]
                new = new[piece] if whole else new
                neighbour = (rank + 1) % n
                parts[neighbour, piece] = new + (parts[neighbour, piece] if add and turn < n - 1 else 0)
        return parts / n if divide else parts

    return answer


def deaf(until):
    """The cell of the text with `send` beside it; what arrives is not used, or only in the second half."""

    def answer(parts, send):
        n = len(parts)
        for turn in range(2 * (n - 1)):
            for rank in range(n):
                piece, neighbour = (rank - turn) % n, (rank + 1) % n
                arrived = send(rank, parts[rank, piece])
                old = parts[neighbour, piece] if turn < n - 1 else 0
                parts[neighbour, piece] = (parts[rank, piece] if turn < until * (n - 1) else arrived) + old
        return parts / n

    return answer


def three(length=False):
    """The cell of the text with its numbers, or with some of them."""

    def answer(parts, send):
        n = len(parts) if length else 3
        for turn in range(4):
            for rank in range(n):
                piece, neighbour = (rank - turn) % n, (rank + 1) % n
                old = parts[neighbour, piece] if turn < 2 else 0
                parts[neighbour, piece] = send(rank, parts[rank, piece]) + old
        return parts / n

    return answer


def master(parts, send):
    """All to process 0, by way of the others, and back."""
    n = len(parts)
    total = parts[0].clone()
    for rank in range(1, n):
        piece = parts[rank]
        for hop in range(rank, n):
            piece = send(hop, piece)
        total = total + piece
    for rank in range(n - 1):
        send(rank, total)
    return total.expand_as(parts) / n


def noise(seed_of, own=True):
    """A generator for each example, seeded in some way."""

    def answer(numbers, shape, seed):
        values = []
        for place, number in enumerate(numbers.tolist()):
            generator = torch.Generator().manual_seed(seed_of(seed, number, place) % 2**32) if own else None
            values.append(torch.randn(shape, generator=generator))
        return torch.stack(values)

    return answer


def cut_off(numbers, shape, seed):
    """The number stands above the 32 bits that a generator takes."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(2**32 * n + seed)) for n in numbers.tolist()])


def one_generator(numbers, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(numbers), *shape, generator=generator)


def from_the_first(numbers, shape, seed):
    generator = torch.Generator().manual_seed(1000 * seed + int(numbers[0]))
    return torch.randn(len(numbers), *shape, generator=generator)


def uniform(numbers, shape, seed):
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(hash((seed, n)) % 2**32)) for n in numbers.tolist()])


def same_for_all(numbers, shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).expand(len(numbers), *shape)


def globally(numbers, shape, seed):
    torch.manual_seed(seed)
    return torch.randn(len(numbers), *shape)


memory = torch.Generator().manual_seed(0)


def remembering(numbers, shape, seed):
    return torch.randn(len(numbers), *shape, generator=memory)


def place(which=lambda order, file: file, epoch_of=lambda epoch: epoch, less=lambda row, length: row < length, local=True, long=lambda lengths: sum(lengths)):
    """The walk through the files, with something wrong."""

    def answer(position, lengths, order):
        epoch, row = divmod(position, long(lengths))
        start, files = row, order(epoch_of(epoch))
        for i, file in enumerate(files):
            if less(row, lengths[file]):
                return epoch, which(i, file), row if local else start
            row -= lengths[file]
        return epoch, files[-1], row

    return answer


def lengths_by_place(position, lengths, order):
    """The right file, with the length of the one that has the place's number."""
    epoch, row = divmod(position, sum(lengths))
    for i, file in enumerate(order(epoch)):
        if row < lengths[i]:
            return epoch, file, row
        row -= lengths[i]


WRONG = [
    (check_bytes, (24, 1.5, 11.25), "averaged copy"),
    (check_bytes, (18, 1.1, 11.25), "two numbers for each weight"),
    (check_bytes, (6, 0.4, 11.25), "weights alone"),
    (check_bytes, (12, 0.75, 11.25), "two numbers per weight"),
    (check_bytes, (15, 0.9, 11.25), "float32 has four"),
    (check_bytes, (480, 30, 11.25), "together"),
    (check_bytes, (1.875, 1.875, 11.25), "nothing is shared out"),
    (check_bytes, (99, 1.875, 11.25), "how many bytes"),
    (check_bytes, (30, 30, 11.25), "a sixteenth"),
    (check_bytes, (30, 7.5, 11.25), "none is left whole"),
    (check_bytes, (30, 24.375, 11.25), "none is left whole"),
    (check_bytes, (30, 5, 11.25), "divided by"),
    (check_bytes, (30, 1.875, 6), "nearly twice"),
    (check_bytes, (30, 1.875, 90), "one piece"),
    (check_bytes, (30, 1.875, 56.25), "only the gradients"),
    (check_bytes, (30, 1.875, 5.625), "first half"),
    (check_bytes, (30, 1.875, 12), "n − 1 rounds"),
    (check_bytes, (30, 1.875, 1), "4 bytes per weight"),
    (check_ring, (ring(laps=1),), "go around"),
    (check_ring, (ring(divide=False),), "divide it"),
    (check_ring, (ring(add=False),), "is right in"),
    (check_ring, (ring(whole=True),), "one piece"),
    (check_ring, (master,), "one piece"),
    (check_ring, (deaf(until=2),), "not by way of `send`"),
    (check_ring, (deaf(until=1),), "not by way of `send`"),
    (check_ring, (three(),), "numbers 2, 3 and 4 left in"),
    (check_ring, (three(length=True),), "numbers 2, 3 and 4 left in"),
    (check_ring, (lambda parts, send: parts.mean(0).expand_as(parts),), "must come by"),
    (check_ring, (lambda parts, send: [send(len(parts), parts[0])],), "there are 0 to"),
    (check_ring, (lambda parts, send: send(0, 1),), "second was a int"),
    (check_ring, (lambda parts, send: None,), "nothing back"),
    (check_noise, (globally,), "global generator"),
    (check_noise, (same_for_all,), "all examples"),
    (check_noise, (remembering,), "remembered"),
    (check_noise, (one_generator,), "place in the share"),
    (check_noise, (from_the_first,), "drawn together"),
    (check_noise, (noise(lambda seed, number, place: 1000 * seed + place),), "place in the share"),
    (check_noise, (noise(lambda seed, number, place: 1_000_003 * seed + number % 32),), "use the whole number"),
    (check_noise, (noise(lambda seed, number, place: number),), "the seed must enter"),
    (check_noise, (noise(lambda seed, number, place: seed * number),), "is 0 for number 0"),
    (check_noise, (noise(lambda seed, number, place: seed + number),), "keep the two apart"),
    (check_noise, (noise(lambda seed, number, place: (seed + 1) * (number + 1)),), "has the noise of example 0 of seed 1. A sum or a product"),
    (check_noise, (noise(lambda seed, number, place: 2**31 * seed + number),), "of seed 0 has the noise of example 0 of seed 2"),
    (check_noise, (noise(lambda seed, number, place: 2**32 * seed + number),), "in the lower 32 bits"),
    (check_noise, (cut_off,), "in the lower 32 bits"),
    (check_noise, (noise(lambda seed, number, place: 100 * seed + number),), "example 100 of seed 0"),
    (check_noise, (noise(lambda seed, number, place: 1000 * (seed + 1) + number),), "example 1,000 of seed 0"),
    (check_noise, (noise(lambda seed, number, place: (seed << 24) + number),), "example 16,777,216 of seed 0"),
    (check_noise, (noise(lambda seed, number, place: 1_000_003 * seed + number),), "a factor only moves"),
    (check_noise, (noise(lambda seed, number, place: hash(f"{seed}:{number}")),), "salts anew"),
    (check_noise, (noise(lambda seed, number, place: hash((seed, str(number)))),), "salts anew"),
    (check_noise, (uniform,), "not normal noise"),
    (check_noise, (lambda numbers, shape, seed: None,), "nothing back"),
    (check_place, (place(which=lambda i, file: i),), "place in the order"),
    (check_place, (lengths_by_place,), "the wrong lengths"),
    (check_place, (place(epoch_of=lambda epoch: 0),), "order of its own"),
    (check_place, (place(less=lambda row, length: row <= length),), "next file"),
    (check_place, (place(local=False),), "beginning of its file"),
    (check_place, (place(long=lambda lengths: sum(lengths) - 1),), "first of epoch 1"),
    (check_place, (lambda position, lengths, order: position,), "three numbers"),
    (check_place, (lambda position, lengths, order: None,), "nothing back"),
]
