"""Wrong answers to the exercises on the OpenAI / Stable Diffusion U-Net, and what they must be told."""

import torch
from torch import nn
from torch.nn import functional as F

from unet_course.exercises.unet import check_add_class, check_decode, check_skips, check_words_only

KEPT, TAKES = [64, 64, 64, 64, 192, 192], [384, 384, 256, 256, 128, 128]


def decode_with(take=lambda skips: skips.pop(), join=lambda h, skip: [h, skip], time=1.0, resize=False):
    """The way up, with a mistake."""

    def decode(model, h, skips, emb):
        for block in model.output_blocks:
            skip = take(skips)
            h = F.interpolate(h, skip.shape[2:]) if resize else h
            h = block(torch.cat(join(h, skip), dim=1), time * emb)
        return F.interpolate(model.out(h), (8, 12)) if resize else model.out(h)

    return decode


def train_only(*parts):
    """Train the parameters whose names hold one of these."""

    def words_only(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))

    return words_only


def add_row(make, count=True, first=False, freeze=False):
    """Add a row to the labels' table, with a mistake."""

    def add_class(model):
        rows = model.label_emb.weight.detach()
        row = make(rows)
        model.label_emb = nn.Embedding.from_pretrained(torch.cat([row, rows] if first else [rows, row]), freeze=freeze)
        model.num_classes += count
        return model

    return add_class


def silence(rows):
    return torch.zeros_like(rows[:1])


WRONG = [
    (check_skips, ([64, 64, 64, 192, 192], TAKES), "has 5 entries"),
    (check_skips, ([64, 64, 192, 192], TAKES), "the first convolution and the downsampling are kept"),
    (check_skips, ([64, 64, 64, 192, 192, 192], TAKES), "does not change the channels"),
    (check_skips, (KEPT, [384, 384, 256, 128]), "one more"),
    (check_skips, (KEPT, [192, 192, 192, 64, 64, 64]), "what the blocks give"),
    (check_skips, (KEPT, KEPT[::-1]), "kept maps alone"),
    (check_skips, (KEPT, [384, 384, 384, 128, 128, 128]), "third block of the lower level"),
    (check_skips, (KEPT, [384, 384, 256, 128, 128, 128]), "still has the lower level's"),
    (check_skips, (KEPT, [384, 384, 256, 192, 128, 128]), "from the end"),
    (check_skips, (64, TAKES), "list of whole numbers"),
    (check_decode, (decode_with(lambda skips: skips.pop(0), resize=True),), "wrong end"),
    (check_decode, (decode_with(join=lambda h, skip: [skip, h]),), "h first"),
    (check_decode, (decode_with(join=lambda h, skip: [h, torch.zeros_like(skip)]),), "does not look"),
    (check_decode, (decode_with(time=0.0),), "not told the time"),
    (check_decode, (lambda model, h, skips, emb: h,), "was asked for"),
    (check_decode, (lambda *_: None,), "nothing back"),
    (check_words_only, (train_only(""),), "all parameters"),
    (check_words_only, (train_only("nothing"),), "nothing is trained"),
    (check_words_only, (train_only("to_k", "to_v"),), "pixels to pixels"),
    (check_words_only, (train_only("attn2.to_k"),), "keys and values"),
    (check_words_only, (train_only("attn2.to_k", "attn2.to_v", "attn2.to_q"),), "queries"),
    (check_words_only, (train_only("attn2.to_k", "attn2.to_v", "attn2.to_out"),), "after the keys"),
    (check_words_only, (train_only("attn2"),), "to_q.weight makes queries"),
    (check_words_only, (train_only("in_layers"),), "never touch the words"),
    (check_add_class, (lambda model: model,), "should have 4 rows"),
    (check_add_class, (add_row(silence, count=False),), "refuse y = 3"),
    (check_add_class, (add_row(silence, first=True),), "came first"),
    (check_add_class, (add_row(silence, freeze=True),), "is trained"),
    (check_add_class, (add_row(lambda rows: rows.mean(0, keepdim=True)),), "says something"),
    (check_add_class, (lambda model: 3,), "gave a int"),
]
