"""Wrong answers to the exercises on training, and what they must be told."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from unet_course.exercises.training import check_accumulate, check_batch_at, check_exam, check_memory, check_save


def accumulate(scale="share", clear="first", backward=True):
    """The gradient from pieces, with a mistake."""

    def answer(model, loss, pieces):
        total = sum(len(x) for x, _ in pieces)
        if clear == "first":
            model.zero_grad()
        for x, y in pieces:
            if clear == "each":
                model.zero_grad()
            factor = {"share": len(x) / total, "number": 1 / len(pieces), "none": 1.0, "odd": 0.3}[scale]
            if backward:
                (loss(model, (x, y)) * factor).backward()

    return answer


def one_backward(model, loss, pieces):
    total = sum(len(x) for x, _ in pieces)
    model.zero_grad()
    sum(loss(model, piece) * len(piece[0]) / total for piece in pieces).backward()


def at_once(model, loss, pieces):
    model.zero_grad()
    loss(model, tuple(torch.cat(parts) for parts in zip(*pieces))).backward()


def left_in_eval(model, loss, pieces):
    accumulate()(model, loss, pieces)
    model.eval()


def exam(graph=False, mode="restore", seed=0, weigh=True, offset=0.0, returns=True):
    """An exam with a mistake."""

    def answer(model, loss, batches):
        training, generator = model.training, torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        if mode != "none":
            model.eval()
        with torch.set_grad_enabled(graph):
            marks = [loss(model, batch, generator) for batch in batches]
        model.train({"restore": training, "none": training, "left": False, "train": True}[mode])
        sizes = [len(batch) if weigh else 1 for batch in batches]
        total = sum(mark * size for mark, size in zip(marks, sizes)) / sum(sizes) + offset
        return (total if graph else total.item()) if returns else None

    return answer


def reseeded_exam(globally):
    """An exam that is the same at every visit, but at the cost of its own noise, or of the training's."""

    def answer(model, loss, batches):
        training, total = model.training, 0.0
        generator = torch.manual_seed(0)
        model.eval()
        with torch.no_grad():
            for batch in batches:
                generator = generator if globally else torch.Generator().manual_seed(0)
                total += loss(model, batch, generator).item() * len(batch)
        model.train(training)
        return total / sum(map(len, batches))

    return answer


def save(beside=True, sync=True, where=None, remove=False, close=True, clean=True, target=None):
    """Saving with a mistake."""

    def answer(path, text):
        path = Path(path)
        part = Path(where) / "x.part" if where else path.with_name("x.part")
        if remove:
            path.unlink()
        file = part.open("w")
        file.write(text)
        if close:
            file.flush()
            if sync:
                os.fsync(file.fileno())
            file.close()
        if not clean:
            path.with_name("more").write_text("")
        os.replace(part, path if target is None else path.with_name(target))

    return answer


def hasty_save(early=False):
    """Saving with an fsync that comes before the text."""

    def answer(path, text):
        with open(f"{path}.part", "w") as file:
            if early:
                os.fsync(file.fileno())
            file.write(text)
            if not early:
                os.fsync(file.fileno())
        os.replace(f"{path}.part", path)

    return answer


def save_to_path(path, text):
    beside = path.with_name("x.part")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


ELSEWHERE = tempfile.mkdtemp()


def copied(path, text):
    part = Path(path).with_name("x.part")
    part.write_text(text)
    shutil.copy(part, path)


def batch_at(mix=lambda seed, epoch: 1_000_003 * seed + epoch, draw=None, overlap=False):
    """An order of the data with a mistake."""

    def answer(step, number, size, seed):
        epoch, place = divmod(step, number // size)
        order = (draw or torch.randperm)(number, generator=torch.Generator().manual_seed(mix(seed, epoch)))
        return order[place : place + size] if overlap else order[place * size : (place + 1) * size]

    return answer


WRONG = [
    (check_memory, (0.999, 0.6), "old* average"),
    (check_memory, (0.5, 0.6), "multiplied by 1"),
    (check_memory, (0.001, 1.0), "kept its share"),
    (check_memory, (0.001, 0.999**1000), "older* than these"),
    (check_memory, (0.001, 0.9), "add up"),
    (check_accumulate, (accumulate(backward=False),), "No gradient"),
    (check_accumulate, (accumulate(clear="each"),), "Only the last piece"),
    (check_accumulate, (accumulate(scale="none"),), "too long"),
    (check_accumulate, (accumulate(scale="number"),), "4, 4 and 2"),
    (check_accumulate, (accumulate(scale="odd"),), "two pieces of five"),
    (check_accumulate, (accumulate(clear="never"),), "in the gradients before"),
    (check_accumulate, (one_backward,), "before the next"),
    (check_accumulate, (at_once,), "at once"),
    (check_accumulate, (left_in_eval,), "another mode"),
    (check_exam, (exam(returns=False),), "nothing back"),
    (check_exam, (exam(graph=True),), "graph"),
    (check_exam, (exam(mode="left"),), "After the exam"),
    (check_exam, (exam(mode="train"),), "not any more"),
    (check_exam, (exam(seed=None),), "from which seed"),
    (check_exam, (exam(mode="none"),), "dropout in the model"),
    (check_exam, (exam(weigh=False),), "last batch"),
    (check_exam, (exam(offset=0.1),), "mean over all examples"),
    (check_exam, (reseeded_exam(globally=False),), "same noise"),
    (check_exam, (reseeded_exam(globally=True),), "global generator"),
    (check_save, (lambda path, text: Path(path).write_text(text),), "into the file itself"),
    (check_save, (copied,), "into the file itself"),
    (check_save, (lambda path, text: "saved",), "Nothing was saved"),
    (check_save, (save(remove=True),), "gone already"),
    (check_save, (save(target="other.txt"),), "rename to"),
    (check_save, (save(where=ELSEWHERE),), "another folder"),
    (check_save, (save(close=False),), "closed, or flushed"),
    (check_save, (save(sync=False),), "os.fsync"),
    (check_save, (save(clean=False),), "it holds"),
    (check_save, (hasty_save(),), "file.flush()"),
    (check_save, (hasty_save(early=True),), "not written yet"),
    (check_save, (save_to_path,), "as a string"),
    (check_batch_at, (lambda step, number, size, seed: torch.randperm(number)[:size],), "asked again"),
    (check_batch_at, (batch_at(mix=lambda seed, epoch: seed),), "same order"),
    (check_batch_at, (batch_at(overlap=True),), "comes twice"),
    (check_batch_at, (batch_at(mix=lambda seed, epoch: epoch),), "Another seed"),
    (check_batch_at, (batch_at(mix=lambda seed, epoch: seed + epoch),), "neighbouring seeds"),
    (check_batch_at, (batch_at(mix=lambda seed, epoch: seed * epoch),), "Epoch 0"),
    (check_batch_at, (batch_at(mix=lambda seed, epoch: seed * (epoch + 1)),), "With seed 0"),
    (check_batch_at, (batch_at(draw=lambda n, generator: 1 + torch.randperm(n, generator=generator)),), "indices go from"),
    (check_batch_at, (lambda step, number, size, seed: [0, 1, 2],), "a list"),
]
