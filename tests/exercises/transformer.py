"""Wrong answers to the exercises of chapter 05, and what they must be told."""

import torch
from einops import rearrange

from unet_course.exercises.transformer import check_block, check_multiplier, check_over_time, check_sizes, check_word_maps


def network(proj, out, bias=0.0):
    """Gives a network these weights."""

    def multiplier(net):
        with torch.no_grad():
            net[0].proj.weight.copy_(torch.tensor(proj))
            net[1].weight.copy_(torch.tensor([out]))
            net[0].proj.bias.fill_(bias)
            net[1].bias.zero_()

    return multiplier


RIGHT = [[1.0, 0], [1, 0], [0, 1], [0, -1]]


def reading_first(readers=("attn2",), stream=False, post=False, raw=None, bare=None, order=("attn2", "attn1", "ff"), norms="213", listen=lambda block, c: c):
    """The block with the words first, and one mistake of one's choice."""

    def forward(block, x, context):
        words = listen(block, context)
        x = block.norm2(x) if stream else x
        for name, number in zip(order, norms):
            part, norm = getattr(block, name), getattr(block, f"norm{number}")
            read = (words,) if name in readers else ()
            if post:
                x = norm(x + part(x, *read))
            else:
                branch = part(x if name == raw else norm(x), *read)
                x = branch if name == bare else x + branch
        return x

    return forward


def untouched(block, x, context):
    """As the exercise shows it."""
    x = block.norm2(x)
    x = x + block.attn2(x)
    x = x + block.attn1(block.norm1(x))
    return x + block.ff(block.norm3(x))


def of_the_chapter(block, x, context):
    """Copied from the class."""
    x = x + block.attn1(block.norm1(x))
    x = x + block.attn2(block.norm2(x), context)
    return x + block.ff(block.norm3(x))


def maps(axis=-1, scale=0.5, early=False):
    """Word maps with a softmax of one's choice."""

    def word_maps(q, k, height, width):
        scores = q @ k.mT * q.shape[-1] ** -scale
        weights = scores.mean(0).softmax(-1) if early else scores.softmax(axis).mean(0)
        return weights.T.reshape(-1, height, width)

    return word_maps


def weights_of(q, k):
    """The right weights, averaged over the heads."""
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)


def inside_frames(block, x):
    """Space and time exchanged."""
    b, c, t, h, w = x.shape
    return rearrange(block(rearrange(x, "b c t h w -> (b t) (h w) c")), "(b t) (h w) c -> b c t h w", t=t, h=h)


def everywhere(block, x):
    """One long row."""
    return block(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def cut(block, x):
    """A reshape where a permute is needed."""
    return block(x.reshape(-1, x.shape[2], x.shape[1])).reshape(x.shape)


def not_back(block, x):
    """A reshape on the way back."""
    return block(rearrange(x, "b c t h w -> (b h w) t c")).reshape(x.shape)


def crossed(block, x):
    """Height and width exchanged on the way back."""
    return rearrange(block(rearrange(x, "b c t h w -> (b h w) t c")), "(b w h) t c -> b c t h w", h=x.shape[3], w=x.shape[4])


def over_time(block, x):
    """The right answer."""
    return rearrange(block(rearrange(x, "b c t h w -> (b h w) t c")), "(b h w) t c -> b c t h w", h=x.shape[3], w=x.shape[4])


def alone(block, x):
    """Each pixel of each frame is a row of its own."""
    b, c, t, h, w = x.shape
    return rearrange(block(rearrange(x, "b c t h w -> (b t h w) 1 c")), "(b t h w) 1 c -> b c t h w", b=b, t=t, h=h)


WRONG = [  # checker, arguments, a part of the diagnosis it must give
    (check_sizes, (512, 768, 21), "one bias for each output"),
    (check_sizes, (520, 840, 20), "(a) is not 520"),
    (check_sizes, (552, 552, 20), "twice as wide"),
    (check_sizes, (552, 1104, 20), "only the first layer is doubled"),
    (check_sizes, (552, 840, 21), "554 parameters"),
    (check_sizes, (552, 840, 16), "(c) is not 16"),
    (check_multiplier, (network(RIGHT, [1.0, 1.0]),), "subtracted, not added"),
    (check_multiplier, (network(RIGHT[2:] + RIGHT[:2], [1.0, -1.0]),), "exchanged"),
    (check_multiplier, (network(RIGHT, [0.5, -0.5]),), "+1 and −1"),
    (check_multiplier, (network(RIGHT, [-1.0, 1.0]),), "+1 and −1"),
    (check_multiplier, (network([[1.0, 0], [0, 1], [1, 0], [0, -1]], [1.0, -1.0]),), "alternate"),
    (check_multiplier, (network([[1.0, 0], [1, 0], [1, 0], [-1, 0]], [1.0, -1.0]),), "Hidden number 0 multiplies a by a gate that is made of a"),
    (check_multiplier, (network([[0.0, 2], [0, 1], [1, 1], [0, -1]], [1.0, -1.0]),), "Hidden number 1 multiplies b"),
    (check_multiplier, (network(RIGHT, [1.0, 0.0]),), "one half is right"),
    (check_multiplier, (network([[1.0, 0], [0, 0], [0, 1], [0, 1]], [1.0, 1.0]),), "one half is right"),
    (check_multiplier, (network(RIGHT, [1.0, -1.0], 0.1),), "biases are not zero"),
    (check_multiplier, (lambda net: net,), "still the random ones"),
    (check_multiplier, (network([[1.0, 1], [0, 1], [1, 0], [1, 1]], [1.0, 1.0]),), "instead of −6"),
    (check_block, (untouched,), "both mistakes"),
    (check_block, (reading_first(stream=True, raw="attn2"),), "still replaced by its normalised copy"),
    (check_block, (reading_first(readers=()),), "give it the context"),
    (check_block, (reading_first(readers=("attn1",)),), "went to attn1"),
    (check_block, (reading_first(readers=("attn1", "attn2")),), "so does attn1"),
    (check_block, (reading_first(post=True),), "post-norm"),
    (check_block, (of_the_chapter,), "block of the chapter"),
    (check_block, (lambda block, x, context: block(x, context),), "block of the chapter"),
    (check_block, (lambda block, x, context: block._forward(x, context),), "block of the chapter"),
    (check_block, (reading_first(norms="123"),), "each other's norms"),
    (check_block, (reading_first(listen=lambda block, c: block.norm2(c)),), "context is normalised"),
    *((check_block, (reading_first(bare=name),), f"What {name} returns") for name in ("attn1", "attn2", "ff")),
    *((check_block, (reading_first(raw=name),), f"{norm} is missing") for name, norm in (("attn1", "norm1"), ("attn2", "norm2"), ("ff", "norm3"))),
    (check_block, (reading_first(order=("ff", "attn2", "attn1"), norms="321"),), "in this order"),
    (check_word_maps, (maps(axis=1),), "wrong axis"),
    (check_word_maps, (maps(scale=0),), "too sharp"),
    (check_word_maps, (maps(scale=1),), "too flat"),
    (check_word_maps, (maps(early=True),), "each head has its own weights"),
    (check_word_maps, (lambda q, k, h, w: (q @ k.mT / q.shape[-1] ** 0.5).mean(0).T.reshape(-1, h, w),), "softmax is missing"),
    (check_word_maps, (lambda q, k, h, w: weights_of(q, k).reshape(-1, h, w),), "does not move an axis"),
    (check_word_maps, (lambda q, k, h, w: weights_of(q, k).T.reshape(-1, w, h).mT,), "by columns"),
    (check_word_maps, (lambda q, k, h, w: weights_of(q, k).T.reshape(-1, h, w) * len(q),), "take the mean"),
    (check_word_maps, (lambda q, k, h, w: weights_of(q, k).T,), "shape"),
    (check_word_maps, (lambda q, k, h, w: weights_of(q, k).T.reshape(-1, h, w) ** 2,), "should sum to 1"),
    (check_over_time, (inside_frames,), "frames stand in the batch"),
    (check_over_time, (everywhere,), "one long row"),
    (check_over_time, (cut,), "permute first"),
    (check_over_time, (not_back,), "way back the axes"),
    (check_over_time, (crossed,), "height and width are exchanged"),
    (check_over_time, (lambda block, x: x,), "unchanged"),
    (check_over_time, (lambda block, x: x + over_time(block, x),), "add the input once more"),
    (check_over_time, (alone,), "a row of one token"),
    (check_over_time, (lambda block, x: 2 * crossed(block, x),), "own time line"),
]
