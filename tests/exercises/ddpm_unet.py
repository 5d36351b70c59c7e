"""Wrong answers to the exercises of the DDPM U-Net, and what they must be told."""

import torch
from torch.nn import functional as F

from unet_course.ddpm_unet import Model
from unet_course.embeddings import get_timestep_embedding
from unet_course.exercises.ddpm_unet import check_attention_count, check_freeze_time, check_kept_numbers, check_way_up
from unet_course.resblock import ResnetBlock


def kept(entry=True, down=True, last=False, up=False, late=False):
    """The exercise's function with a mistake."""

    def kept_numbers(size, ch, ch_mult, num_res_blocks):
        total = ch * size**2 if entry else 0
        for level, mult in enumerate(ch_mult):
            total += num_res_blocks * ch * mult * size**2
            if last or level < len(ch_mult) - 1:
                size = (size + 1) // 2 if up else size // 2
                width = ch_mult[min(level + 1, len(ch_mult) - 1)] if late else mult
                total += ch * width * size**2 if down else 0
        return total

    return kept_numbers


def climb(order=-1, size=True, attention=True, time=True, take=False, swap=False, own=False):
    """The way up with a mistake."""

    def way_up(model, h, kept, temb):
        for level in reversed(range(len(model.up))):
            stage, maps = model.up[level], kept[level]
            for i, (block, attn) in enumerate(stage.steps()):
                skip = maps.pop() if take else maps[::order][i]
                h = block(torch.cat([skip, h] if swap else [h, skip], dim=1), temb if time else None)
                h = attn(h) if attention else h
            if level:
                above = kept[level if own else level - 1][0]
                h = stage.upsample(h, size=above.shape[2:]) if size else stage.upsample(h)
        return h

    return way_up


def freeze(silu=True, inner=True, bias=True, copy=True, blocks=slice(None), fixed=None, same=False, load=True, add=True):
    """Freezing the time with a mistake."""

    def freeze_time(model, t):
        new = Model(64, 3, (1, 2), 1, (8,), resolution=16, use_timestep=False)
        if load:
            new.load_state_dict(model.state_dict(), strict=False)
        first, second = model.temb.dense
        hidden = first(get_timestep_embedding(torch.tensor([t if fixed is None else fixed]), 64))
        temb = second(F.silu(hidden) if inner else hidden)
        olds, news = ([m for m in net.modules() if isinstance(m, ResnetBlock)] for net in (model, model if same else new))
        for old, block in list(zip(olds, news))[blocks]:
            with torch.no_grad():
                shift = old.temb_proj(F.silu(temb) if silu else temb)[0] - (0 if bias else old.temb_proj.bias)
                if copy:
                    block.conv1.bias.copy_(block.conv1.bias + shift if add else shift)
        return new

    return freeze_time


WRONG = [
    (check_attention_count, (14,), "middle"),
    (check_attention_count, (13,), "way up"),
    (check_attention_count, (12,), "way up"),
    (check_attention_count, (8,), "one level"),
    (check_attention_count, (5,), "every residual block"),
    (check_attention_count, (29,), "all four levels"),
    (check_attention_count, (99,), "not 99"),
    (check_kept_numbers, (kept(entry=False),), "first convolution"),
    (check_kept_numbers, (kept(down=False),), "steps down"),
    (check_kept_numbers, (kept(last=True),), "after the last level"),
    (check_kept_numbers, (kept(up=True),), "rounds up"),
    (check_kept_numbers, (kept(late=True),), "does not change the channels"),
    (check_kept_numbers, (kept(entry=False, down=False),), "only the maps of the residual blocks"),
    (check_kept_numbers, (lambda size, ch, ch_mult, n: size,), "there are"),
    (check_way_up, (climb(order=1),), "each other's skips"),
    (check_way_up, (climb(size=False),), "right for even sizes"),
    (check_way_up, (climb(attention=False),), "attention is missing"),
    (check_way_up, (climb(time=False),), "not told the time"),
    (check_way_up, (climb(take=True),), "belongs to the caller"),
    (check_way_up, (climb(swap=True),), "stands in front"),
    (check_way_up, (climb(own=True),), "level *above*"),
    (check_way_up, (lambda model, h, kept, temb: climb()(model, h, kept, temb) + 1,), "off by"),
    (check_freeze_time, (freeze(silu=False),), "silu of temb"),
    (check_freeze_time, (freeze(inner=False),), "between the two layers"),
    (check_freeze_time, (freeze(bias=False),), "bias of temb_proj"),
    (check_freeze_time, (freeze(copy=False),), "nowhere in them"),
    (check_freeze_time, (freeze(blocks=slice(0, 2)),), "received nothing"),
    (check_freeze_time, (freeze(load=False),), "must be copied"),
    (check_freeze_time, (freeze(add=False),), "must be added to it"),
    (check_freeze_time, (freeze(fixed=500),), "off by"),
    (check_freeze_time, (freeze(same=True),), "changed the network"),
    (check_freeze_time, (lambda model, t: model,), "use_timestep=False"),
]
