"""Guidance: equal to what diffusers' pipelines compute, asked as rarely as possible, the same in every form of answer, clear about what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_course.diffusion import PREDICTIONS, Schedule, to_noise, to_x0
from unet_course.guidance import Guided, drop_labels
from unet_course.sampling import choose_steps, ddim, ddpm, denoiser, dpm_solver, heun, sample
from unet_course.training import DIGITS_SCHEDULE, NO_LABEL, digits_loss
from unet_course.unet import UNetModel
from unet_course.workbench import randomize, relative_error

NULL = 10


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


class Network(nn.Module):
    """Fixed and smooth; different for every pixel, time and label; notes how many pictures it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, times, y=None, context=None, size=None):
        self.seen.append(len(x))
        assert times.shape == (len(x),)
        told = torch.zeros(len(x), dtype=x.dtype)
        for value in (y, context, size):
            if value is not None:
                assert len(value) == len(x)
                told = told + torch.sin(value.to(x.dtype).reshape(len(x), -1) * (1 + torch.arange(value[0].numel()))).sum(1)
        told, times = (part.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for part in (told, times))
        return torch.tanh(x - times / 400 + 0.5 * told) + 0.3 * told * x.roll(1, -1)


def ask(scale, x, times, y, null=NULL, **options):
    return Guided(Network(), scale, null=null, **options)(x, times, y=y)


X, TIMES, LABELS = random(4, 1, 5, 3), torch.tensor([10, 400, 700, 999]), torch.tensor([3, 1, 4, 1])
COND, UNCOND = Network()(X, TIMES, y=LABELS), Network()(X, TIMES, y=torch.full((4,), NULL))


# What it computes


@pytest.mark.parametrize("scale", [-1, 0, 0.5, 1, 1.5, 3, 7.5])
def test_formula(scale):
    assert relative_error(ask(scale, X, TIMES, LABELS), UNCOND + scale * (COND - UNCOND)) < 1e-12


@pytest.mark.parametrize(("scale", "pictures"), [(1, 4), (1.0, 4), (0, 4), (0.0, 4), (0.5, 8), (2, 8), (-1, 8)])
def test_asked_once(scale, pictures):
    """One call; a batch twice as large only where two answers are needed."""
    guided = Guided(Network(), scale, null=NULL)
    guided(X, TIMES, y=LABELS)
    assert guided.model.seen == [pictures]


@pytest.mark.parametrize("scale", [1, 0])
def test_one_answer_is_exact(scale):
    """Without guidance it is the model, bit for bit."""
    assert torch.equal(ask(scale, X, TIMES, LABELS), COND if scale == 1 else UNCOND)


def test_rescale_equals_diffusers():
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    theirs = pipeline.rescale_noise_cfg(UNCOND + 4 * (COND - UNCOND), COND, guidance_rescale=0.6)
    ours = ask(4, X, TIMES, LABELS, rescale=0.6)
    assert relative_error(ours, theirs) < 1e-12
    full = ask(4, X, TIMES, LABELS, rescale=1)
    assert torch.allclose(full.std((1, 2, 3)), COND.std((1, 2, 3)))  # what it is for


def tiny_pipeline(prediction):
    """Stable Diffusion's pipeline of diffusers, with tiny random networks and no text encoder."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=True,
        prediction_type=prediction, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipeline = diffusers.StableDiffusionPipeline(vae, None, None, randomize(unet).eval(), scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_equals_diffusers_pipeline(prediction, rescale):
    """A whole guided walk with a negative prompt, as Stable Diffusion's pipeline makes it."""
    pipeline = tiny_pipeline(prediction)
    text, negative, latents = (random(2, *shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(5, 6), (5, 6), (4, 8, 8)]))
    theirs = pipeline(prompt_embeds=text, negative_prompt_embeds=negative, latents=latents, height=8, width=8, num_inference_steps=10,
                      guidance_scale=7.5, guidance_rescale=rescale, output_type="latent").images  # fmt: skip

    def network(x, times, context):
        return pipeline.unet(x, times, encoder_hidden_states=context).sample

    guided = Guided(network, 7.5, null={"context": negative}, rescale=rescale)
    schedule = Schedule.scaled_linear()
    ours = sample(ddim(denoiser(guided, schedule, prediction.removesuffix("_prediction"), context=text), latents, schedule, choose_steps(schedule, 10)))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["cosine", "flow", "scaled_linear"])
def test_every_form_of_answer(name):
    """Guided noise, picture, v and flow are one answer in four languages."""
    schedule = getattr(Schedule, name)()
    network = Network()

    def speaking(form):
        def answer(x, times, y):
            t = torch.tensor([(schedule.times - time).abs().argmin() for time in times])
            v, (alpha, sigma) = network(x, times, y=y), schedule.at(t, x)
            x0, noise = to_x0("v", v, x, alpha, sigma), to_noise("v", v, x, alpha, sigma)
            return {"epsilon": noise, "x0": x0, "v": v, "flow": noise - x0}[form]

        return answer

    for t in (5, 500, 990):
        found = [denoiser(Guided(speaking(form), 4, null=NULL), schedule, form, y=LABELS)(X, t) for form in PREDICTIONS]
        for x0, noise in found[1:]:
            assert relative_error(x0, found[0][0]) < 1e-8 and relative_error(noise, found[0][1]) < 1e-8


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
def test_in_every_sampler(sampler):
    """In the place of the network, also with clipping."""
    schedule = Schedule.cosine()
    options = {"generator": seeded()} if sampler is ddpm else {}
    predict = denoiser(Guided(Network(), 3, null=NULL), schedule, "v", clip=1, y=LABELS)
    guided = sample(sampler(predict, X, schedule, choose_steps(schedule, 8, "karras"), **options))
    assert guided.abs().max() <= 1 and guided.isfinite().all()


# What it is told


def test_one_for_all_or_one_each():
    """Labels and times as numbers, as one for all, or as one for each."""
    one, seven = torch.tensor(500), torch.full((4,), 7)
    reference = ask(3, X, one.expand(4), seven)
    for times, y in ((500, 7), (one, torch.tensor(7)), (torch.tensor([500]), torch.tensor([7])), ([500] * 4, [7] * 4), (500.0, seven)):
        assert relative_error(ask(3, X, times, y), reference) < 1e-12


def test_null_by_name():
    """Some conditioning is exaggerated, the rest told to both halves."""
    size, network = torch.tensor([0.1, 0.2, 0.3, 0.4]), Network()
    cond, uncond = network(X, TIMES, y=LABELS, size=size), network(X, TIMES, y=torch.full((4,), NULL), size=size)
    guided = Guided(network, 3, null={"y": NULL})(X, TIMES, y=LABELS, size=size)
    assert relative_error(guided, uncond + 3 * (cond - uncond)) < 1e-12
    alone = Guided(network, 3, null={"y": NULL})(X, TIMES, y=LABELS, size=None)  # what is no tensor goes on as it is
    assert relative_error(alone, ask(3, X, TIMES, LABELS)) < 1e-12


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (4, 5, 6)])
def test_null_of_texts(shape):
    """An empty prompt for all, or a negative one for each."""
    context, empty, network = random(4, 5, 6, seed=1), random(*shape, seed=2), Network()
    cond, uncond = network(X, TIMES, context=context), network(X, TIMES, context=empty.expand(4, 5, 6))
    for null in (empty, {"context": empty}):
        assert relative_error(Guided(network, 7.5, null=null)(X, TIMES, context=context), uncond + 7.5 * (cond - uncond)) < 1e-12
    text = context[:1]  # one prompt for all
    guided = Guided(network, 2, null=empty)(X, TIMES, context=text)
    assert relative_error(guided, uncond + 2 * (network(X, TIMES, context=text.expand(4, 5, 6)) - uncond)) < 1e-12


def test_two_nulls():
    context, network = random(4, 5, 6, seed=1), Network()
    null = {"y": NULL, "context": torch.zeros(5, 6)}
    uncond = network(X, TIMES, y=torch.full((4,), NULL), context=torch.zeros(4, 5, 6))
    guided = Guided(network, 0, null=null)(X, TIMES, y=LABELS, context=context)
    assert torch.equal(guided, uncond)


def test_null_takes_type():
    """A null in double precision does not make the network's input double; a number stands for a vector of it."""
    seen = []

    def network(x, times, context):
        seen.append(context.dtype)
        return x * context.mean((1, 2)).reshape(-1, 1, 1, 1).to(x)

    Guided(network, 2, null=torch.zeros(5, 6, dtype=torch.float64))(X.float(), TIMES, context=torch.ones(4, 5, 6))
    Guided(network, 2, null=0)(X.float(), TIMES, context=torch.ones(4, 5, 6))
    assert seen == [torch.float32] * 2


def test_real_network():
    """The course's U-Net, gradients included, in 1, 2 and 3 dimensions."""
    for dims, shape in ((1, (2, 3, 8)), (2, (2, 3, 8, 6)), (3, (2, 3, 4, 4, 4))):
        unet = randomize(UNetModel(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(),
                                   channel_mult=(1, 1), num_heads=1, dims=dims, num_classes=11))  # fmt: skip
        x, y, times = random(*shape, dtype=torch.float32).requires_grad_(), torch.tensor([1, 2]), torch.tensor([5, 800])
        answer = Guided(unet, 3, null=NULL)(x, times, y=y)
        uncond = unet(x, times, y=torch.full((2,), NULL))
        assert relative_error(answer, uncond + 3 * (unet(x, times, y=y) - uncond)) < 1e-5
        answer.square().sum().backward()
        assert x.grad.isfinite().all() and unet.label_emb.weight.grad[[1, 2, NULL]].abs().sum(1).min() > 0


def test_is_a_module():
    guided = Guided(nn.Sequential(nn.Linear(2, 2)), 2, null=0)
    assert len(list(guided.parameters())) == 2 and guided.eval().model.training is False and "scale=2" in repr(guided)


# The interval


@pytest.mark.parametrize("name", ["cosine", "flow", "linear"])
def test_interval_is_in_noise_levels(name):
    """Guided where sigma / alpha lies in the interval, ends included; one evaluation elsewhere; by the times that the network is told."""
    schedule = getattr(Schedule, name)()
    low, high = schedule.noise_levels[[200, 700]].tolist()
    guided = Guided(Network(), 3, null=NULL, interval=(low, high), schedule=schedule)
    everywhere = Guided(Network(), 3, null=NULL)
    for t in (0, 199, 200, 450, 700, 701, 998):
        times = schedule.time(torch.full((4,), t))
        guided.model.seen.clear()
        inside = 200 <= t <= 700
        reference = everywhere(X, times, y=LABELS) if inside else Network()(X, times, y=LABELS)
        assert torch.equal(guided(X, times, y=LABELS), reference)
        assert guided.model.seen == [8 if inside else 4], t


def test_interval_of_a_mixed_batch():
    """Every example has its own time."""
    schedule = Schedule.cosine()
    guided = Guided(Network(), 3, null=NULL, interval=schedule.noise_levels[[300, 800]].tolist(), schedule=schedule)
    answer = guided(X, TIMES, y=LABELS)
    inside = torch.tensor([False, True, True, False]).reshape(4, 1, 1, 1)
    assert relative_error(answer, torch.where(inside, UNCOND + 3 * (COND - UNCOND), COND)) < 1e-12
    assert guided.model.seen == [8]


@pytest.mark.parametrize("scale", [0, 3])
def test_interval_counts(scale):
    """In a walk: as many pictures as needed."""
    schedule = Schedule.cosine()
    guided = Guided(Network(), scale, null=NULL, interval=schedule.noise_levels[[400, 799]].tolist(), schedule=schedule)
    sample(ddim(denoiser(guided, schedule, y=LABELS), X, schedule, 20))  # 999, 949, …: 8 of them from 400 to 799
    assert sorted(guided.model.seen) == ([4] * 20 if scale == 0 else [4] * 12 + [8] * 8)


def test_infinite_noise_level():
    """Pure noise belongs to an interval without upper end, and to no other."""
    schedule = Schedule.flow()
    assert schedule.noise_levels[-1] == math.inf
    for high, pictures in ((math.inf, 8), (1e9, 4)):
        guided = Guided(Network(), 3, null=NULL, interval=(1.0, high), schedule=schedule)
        guided(X, 1000.0, y=LABELS)
        assert guided.model.seen == [pictures]


def test_interval_with_rescale():
    """Outside of the interval nothing is rescaled."""
    schedule = Schedule.cosine()
    guided = Guided(Network(), 3, null=NULL, interval=(0.5, 1.0), schedule=schedule, rescale=1.0)
    assert torch.equal(guided(X, 999, y=LABELS), Network()(X, torch.full((4,), 999), y=LABELS))


# Dropping labels


def test_drop_labels_share():
    """The asked share, one draw for each example, and what is not hidden stays."""
    labels = torch.arange(50_000) % 10
    for probability in (0.1, 0.5, 0.9):
        dropped = drop_labels(labels, probability, NULL, seeded())
        assert abs((dropped == NULL).double().mean() - probability) < 0.01
        assert torch.equal(dropped[dropped != NULL], labels[dropped != NULL])
    assert torch.equal(labels, torch.arange(50_000) % 10)


def test_drop_labels_ends():
    """0 and 1 are exact, and give something new."""
    labels = torch.arange(1000)
    kept, gone = drop_labels(labels, 0, NULL), drop_labels(labels, 1, NULL)
    assert torch.equal(kept, labels) and kept.data_ptr() != labels.data_ptr() and (gone == NULL).all()


def test_drop_labels_of_texts():
    """Whole examples, with vectors for a null; the type stays."""
    texts, empty = random(500, 3, 2, dtype=torch.float32), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    dropped = drop_labels(texts, 0.5, empty, seeded())
    hidden = (dropped == empty.float()).all((1, 2))
    assert dropped.dtype == torch.float32 and 150 < hidden.sum() < 350 and torch.equal(dropped[~hidden], texts[~hidden])
    assert torch.equal(drop_labels(texts, 1, 0), torch.zeros_like(texts))


def test_drop_labels_generator():
    labels = torch.arange(1000)
    assert torch.equal(drop_labels(labels, 0.5, -1, seeded(1)), drop_labels(labels, 0.5, -1, seeded(1)))
    assert not torch.equal(drop_labels(labels, 0.5, -1, seeded(1)), drop_labels(labels, 0.5, -1, seeded(2)))
    torch.manual_seed(3)
    assert not torch.equal(drop_labels(labels, 0.5, -1), drop_labels(labels, 0.5, -1))
    if torch.cuda.is_available():
        assert drop_labels(labels.cuda(), 0.5, -1, seeded()).device.type == "cuda"


def test_equals_chapter_10():
    """The same numbers hide the same labels as in the loss that trained the shipped model."""
    seen = []

    class Listener(nn.Module):
        def forward(self, x, times, y):
            seen.append(y)
            return x

    labels = torch.arange(256) % 10
    digits_loss(Listener(), (torch.zeros(256, 1, 2, 2), labels), seeded(5))
    assert torch.equal(seen[0], drop_labels(labels, 0.1, NO_LABEL, seeded(5))) and (seen[0] == NO_LABEL).sum() > 5
    assert len(DIGITS_SCHEDULE) == 1000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    scale=st.sampled_from([-2, 0, 0.3, 1, 2.0, 9]),
    rescale=st.sampled_from([0, 0.4, 1.0]),
    low=st.sampled_from([0.0, 0.1, 1.0]),
    high=st.sampled_from([2.0, 50, math.inf]),
    by_name=st.booleans(),
    step=st.integers(0, 999),
    shape=st.sampled_from([(2,), (1, 4), (3, 2, 5), (2, 2, 2, 2)]),
)
def test_random_arguments(batch, scale, rescale, low, high, by_name, step, shape):
    """Any combination works forward and backward, and is one of three answers."""
    schedule = Schedule.cosine()
    guided = Guided(Network(), scale, null={"y": NULL} if by_name else NULL, interval=(low, high), schedule=schedule, rescale=rescale)
    x, y = random(batch, *shape).requires_grad_(), torch.arange(batch)
    times = torch.full((batch,), step)
    out = guided(x, times, y=y)
    out.sum().backward()
    assert out.shape == x.shape and x.grad.isfinite().all()
    cond, uncond = Network()(x, times, y=y), Network()(x, times, y=torch.full((batch,), NULL))
    mixed = uncond + scale * (cond - uncond)
    dims = tuple(range(1, x.ndim))
    mixed = rescale * mixed * cond.std(dims, keepdim=True) / mixed.std(dims, keepdim=True) + (1 - rescale) * mixed
    inside = low <= schedule.noise_levels[step] <= high
    assert relative_error(out, mixed if inside else cond) < 1e-9


# What it refuses


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=math.nan), "scale=nan"),
        (dict(scale=math.inf), "scale=inf"),
        (dict(scale=True), "scale=True"),
        (dict(scale="3"), "scale='3'"),
        (dict(null=None), "null is None"),
        (dict(null={}), "null"),
        (dict(null={"y": None}), "null for y is None"),
        (dict(interval=(2.0, 1.0)), "interval=(2.0, 1.0)"),
        (dict(interval=(-1.0, 1.0)), "interval=(-1.0, 1.0)"),
        (dict(interval=(0.0, "1")), "interval=(0.0, '1')"),
        (dict(interval=(0.0, math.nan)), "interval=(0.0, nan)"),
        (dict(interval=(0.0, 1.0, 2.0)), "interval=(0.0, 1.0, 2.0)"),
        (dict(interval=0.5), "interval=0.5"),
        (dict(interval=(0.0, 1.0), schedule=None), "schedule"),
        (dict(rescale=1.5), "rescale=1.5"),
        (dict(rescale=-0.1), "rescale=-0.1"),
        (dict(rescale=math.nan), "rescale=nan"),
        (dict(model=None), "model=None"),
    ],
)
def test_refused_at_construction(options, message):
    arguments = dict(model=Network(), scale=2, null=NULL, schedule=Schedule.cosine()) | options
    with pytest.raises(ValueError) as error:
        Guided(arguments.pop("model"), arguments.pop("scale"), **arguments)
    assert message in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(
    ("null", "told", "message"),
    [
        (NULL, dict(y=LABELS, size=torch.ones(4)), "['size', 'y']"),
        (NULL, dict(), "[]"),
        ({"label": NULL}, dict(y=LABELS), "['label']"),
        (NULL, dict(y=torch.arange(3)), "y must be one for all, or one for each of the 4"),
        ({"y": NULL}, dict(y=["one"] * 4), "y must be numbers"),
        (1.5, dict(y=LABELS), "whole number"),
        (torch.zeros(2, dtype=torch.int64), dict(y=LABELS), "does not fit"),
        ({"context": torch.zeros(7, 6)}, dict(context=torch.zeros(4, 5, 6)), "(7, 6)"),
    ],
)
def test_refused_in_a_call(scale, null, told, message):
    """Also where there is no guidance: a misspelt name must not wait for the day the scale changes."""
    with pytest.raises(ValueError) as error:
        Guided(Network(), scale, null=null)(X, TIMES, **told)
    assert message in str(error.value)


def test_an_answer_without_spread():
    """As an untrained network gives it: zeros have no standard deviation to be brought back to."""
    guided = Guided(lambda x, times, y: torch.zeros_like(x), 3, null=NULL, rescale=0.5)
    assert not guided(X, TIMES, y=LABELS).any()


@pytest.mark.bad_input
def test_refused_times_and_flat_rescale():
    with pytest.raises(ValueError, match="times must be one for all"):
        ask(3, X, torch.zeros(3), LABELS)
    with pytest.raises(ValueError, match="rescale"):
        ask(3, X[:, 0, 0, :1], TIMES, LABELS, rescale=0.5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.arange(3), 1.5, 0), "probability=1.5"),
        ((torch.arange(3), -0.1, 0), "probability=-0.1"),
        ((torch.arange(3), math.nan, 0), "probability=nan"),
        ((torch.arange(3), True, 0), "probability=True"),
        ((torch.tensor(3), 0.1, 0), "batch"),
        ((torch.arange(3), 0.1, 0.5), "whole number"),
        ((torch.arange(3), 0.1, None), "None"),
        ((torch.arange(3), 0.1, torch.zeros(2, dtype=torch.int64)), "does not fit"),
    ],
)
def test_drop_labels_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        drop_labels(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [dict(scale=1), dict(scale=0), dict(scale=3), dict(scale=3, interval=(0.0, 0.5)), dict(scale=3, interval=(1e8, 1e9)), dict(scale=3, rescale=0.5)], ids=str)
def test_one_for_all_with_every_scale(options):
    """A condition given once is everybody's, whether or not guidance acts; also as a list or a number."""
    guided = Guided(Network(), null={"context": random(1, 6), "y": NULL}, schedule=Schedule.cosine(), **options)
    one = random(1, 6, seed=1)
    for_each = guided(X, TIMES, context=one.expand(4, 6), y=torch.full((4,), 3))
    assert torch.equal(guided(X, TIMES, context=one, y=3), for_each) and torch.equal(guided(X, TIMES, context=one, y=[3] * 4), for_each)
