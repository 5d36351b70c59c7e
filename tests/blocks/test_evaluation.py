"""Judging samples: equal to torchmetrics and to closed forms, right by brute force, clear about what is refused; and the shipped classifier."""

import math
from collections import Counter

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from unet_course import evaluation
from unet_course.data import checksums, digits, read_asset
from unet_course.evaluation import (
    DigitClassifier,
    Score,
    digit_classifier,
    frechet_distance,
    judge,
    kernel_distance,
    nearest,
    precision_recall,
    reading_loss,
    train_classifier,
    unseen_digits,
)
from unet_course.workbench import relative_error


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def crowds(a=300, b=200, width=8, seed=0):
    """Two sets of features with different means, scales and correlations."""
    mix = random(width, width, seed=seed + 1)
    return random(a, width, seed=seed + 2) @ mix, random(b, width, seed=seed + 3) @ (0.5 * mix + torch.eye(width)) + 0.3


def normal(number, mean, cov):
    """Points whose mean and covariance are exactly these."""
    x = random(number, len(mean))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(cov).T + mean


class Given(nn.Module):
    """What torchmetrics takes for a feature extractor: gives back what it is given."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


# Fréchet distance


@pytest.mark.parametrize(("a", "b", "width"), [(300, 200, 8), (2000, 500, 64), (40, 40, 1), (100, 90, 64)])
def test_frechet_equals_torchmetrics(a, b, width):
    x, y = crowds(a, b, width)
    reference = FrechetInceptionDistance(feature=Given(width), reset_real_features=False).set_dtype(torch.float64)
    for part in x.split(64):
        reference.update(part, real=True)
    for part in y.split(64):
        reference.update(part, real=False)
    assert math.isclose(frechet_distance(x, y), reference.compute().item(), rel_tol=1e-6)
    assert math.isclose(frechet_distance(x.float(), y.float()), reference.compute().item(), rel_tol=1e-4)


def test_frechet_of_the_classifier_equals_torchmetrics():
    """The number of the book, in its own features."""
    model, ((real, _), (others, _)) = digit_classifier(), unseen_digits()
    a, b = model.features(real), model.features(others[:500])
    reference = FrechetInceptionDistance(feature=Given(64)).set_dtype(torch.float64)
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert math.isclose(frechet_distance(a, b), reference.compute().item(), rel_tol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 20])
def test_frechet_equals_scipy(width):
    x, y = crowds(100, 150, width)
    cov_x, cov_y = (z.T.cov().reshape(width, width) for z in (x, y))
    root = torch.as_tensor(scipy.linalg.sqrtm((cov_x @ cov_y).numpy())).real
    expected = (x.mean(0) - y.mean(0)).square().sum() + (cov_x + cov_y - 2 * root).trace()
    assert math.isclose(frechet_distance(x, y), expected.item(), rel_tol=1e-7)


def test_frechet_in_one_dimension():
    """(difference of means)² + (difference of standard deviations)²."""
    x, y = random(500, 1) * 3 + 1, random(200, 1, seed=1) * 0.5 - 2
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert math.isclose(frechet_distance(x, y), expected.item(), rel_tol=1e-10)


def test_frechet_of_exact_normals():
    """Covariances that commute, and a case in the plane that can be done by hand."""
    mean = torch.zeros(2, dtype=torch.float64)
    line, other = torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64), torch.tensor([[1, -0.9], [-0.9, 1]], dtype=torch.float64)
    # both have the eigenvectors (1, 1) and (1, −1), with the eigenvalues 1.9 and 0.1 exchanged
    assert math.isclose(frechet_distance(normal(50, mean, line), normal(70, mean, other)), 2 * (1.9**0.5 - 0.1**0.5) ** 2, rel_tol=1e-9)
    a, b = torch.diag(torch.tensor([4.0, 9.0]).double()), torch.diag(torch.tensor([1.0, 25.0]).double())
    assert math.isclose(frechet_distance(normal(50, mean, a), normal(50, mean + 2, b)), 8 + 1 + 4, rel_tol=1e-9)


@pytest.mark.parametrize("shape", [(2, 2, 5), (3, 100, 64), (10, 12, 64), (100, 2, 3)])
def test_frechet_with_fewer_pictures_than_features(shape):
    """Singular covariances: the same as by the roots of the eigenvalues of a symmetric product."""
    a, b, width = shape
    x, y = random(a, width), random(b, width, seed=1) + 0.5
    cov_x, cov_y = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    common = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * common
    assert math.isclose(frechet_distance(x, y), expected.item(), rel_tol=1e-5)


def test_frechet_is_a_squared_distance():
    x, y = crowds()
    z = random(100, 8, seed=9) - 1
    assert math.isclose(frechet_distance(x, y), frechet_distance(y, x), rel_tol=1e-9)
    assert frechet_distance(x, x[torch.randperm(len(x))]) < 1e-9
    assert frechet_distance(x, x.repeat(2, 1)) < 0.1 * frechet_distance(x, y)  # n − 1 notices copies, but hardly
    d = [frechet_distance(*pair) ** 0.5 for pair in ((x, y), (y, z), (x, z))]
    assert all(d[i] <= d[j] + d[k] + 1e-9 for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))
    assert math.isclose(frechet_distance(3 * x, 3 * y), 9 * frechet_distance(x, y), rel_tol=1e-9)
    turn = torch.linalg.qr(random(8, 8, seed=5)).Q
    assert math.isclose(frechet_distance(x @ turn + 7, y @ turn + 7), frechet_distance(x, y), rel_tol=1e-7)


def test_frechet_of_constant_features():
    """No spread at all on one side, or on both."""
    x, point = random(50, 4), torch.full((10, 4), 2.0, dtype=torch.float64)
    assert math.isclose(frechet_distance(x, point), ((x.mean(0) - 2).square().sum() + x.var(0).sum()).item(), rel_tol=1e-9)
    assert math.isclose(frechet_distance(point, point + 1), 4.0, rel_tol=1e-12) and frechet_distance(point, point) == 0


# Kernel distance


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
@pytest.mark.parametrize(("number", "width"), [(100, 8), (1200, 64), (30, 1)])
def test_kernel_equals_torchmetrics(number, width):
    x, y = crowds(number, number, width)
    reference = KernelInceptionDistance(feature=Given(width), subsets=2, subset_size=number).set_dtype(torch.float64)
    reference.update(x, real=True)
    reference.update(y, real=False)
    mean, std = reference.compute()
    assert math.isclose(kernel_distance(x, y), mean.item(), rel_tol=1e-5) and std < 1e-5 * mean  # subsets of all pictures do not differ


def test_kernel_by_brute_force():
    """Unequal sizes, pair by pair."""
    x, y = crowds(7, 5, 3)
    kernel = lambda p, q: (p @ q / 3 + 1).item() ** 3
    within = [sum(kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)]
    between = sum(kernel(p, q) for p in x for q in y) / 35
    assert math.isclose(kernel_distance(x, y), sum(within) - 2 * between, rel_tol=1e-9)
    assert math.isclose(kernel_distance(x, y), kernel_distance(y, x), rel_tol=1e-9)


@pytest.mark.parametrize("number", [5, 20, 200])
def test_kernel_is_unbiased(number):
    """On equal distributions its mean is 0 with few pictures and with many; the Fréchet distance's is not."""
    values = [kernel_distance(random(number, 4, seed=2 * s), random(number, 4, seed=2 * s + 1)) for s in range(300)]
    mean, std = torch.tensor(values).mean(), torch.tensor(values).std()
    assert mean.abs() < 4 * std / 300**0.5 and min(values) < 0
    assert min(frechet_distance(random(number, 4, seed=2 * s), random(number, 4, seed=2 * s + 1)) for s in range(20)) > 0


# Precision and recall, nearest neighbours


def by_brute_force(real, fake, k):
    """Share of fakes that lie within some real picture's distance to its k-th nearest other one."""
    inside = 0
    for sample in fake:
        for i, centre in enumerate(real):
            others = sorted((centre - other).norm().item() for j, other in enumerate(real) if j != i)
            if (sample - centre).norm().item() <= others[k - 1]:
                inside += 1
                break
    return inside / len(fake)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_precision_recall_by_brute_force(k):
    real, fake = random(30, 3), 0.7 * random(20, 3, seed=1) + 0.5
    assert precision_recall(real, fake, k) == (by_brute_force(real, fake, k), by_brute_force(fake, real, k))


def test_precision_recall_of_known_crowds():
    real = random(500, 4)
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    few = real[:5].repeat(40, 1) + 1e-3 * random(200, 4, seed=1)  # good, and always the same
    precision, recall = precision_recall(real, few)
    assert precision > 0.95 and recall < 0.1
    wide = 4 * random(500, 4, seed=2)  # everything, and much else
    precision, recall = precision_recall(real, wide)
    assert precision < 0.3 and recall > 0.5
    assert precision_recall(real, wide, 10) != precision_recall(real, wide, 1)


def test_precision_recall_of_more_than_a_piece():
    """2,100 pictures are taken in pieces of 1,000."""
    real, fake = random(2100, 2), random(1100, 2, seed=1) + 0.5
    apart = torch.cdist(fake, real)
    reach = torch.cdist(real, real, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, 3]
    assert math.isclose(precision_recall(real, fake)[0], (apart <= reach).any(1).double().mean().item(), abs_tol=1e-3)


def test_nearest():
    references, samples = random(1500, 2, 3, 3, dtype=torch.float32), random(1100, 2, 3, 3, seed=1, dtype=torch.float32)
    samples[:10] = references[90:100]
    distances, indices = nearest(samples, references)
    assert distances[:10].tolist() == [0.0] * 10 and indices[:10].tolist() == list(range(90, 100))  # exactly
    apart = (samples[:, None] - references[None, :300]).flatten(2).norm(dim=2)
    few, which = nearest(samples, references[:300])
    assert torch.allclose(few, apart.amin(1), rtol=1e-4) and (which == apart.argmin(1)).double().mean() > 0.99
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    none = nearest(samples[:0], references)
    assert none[0].shape == none[1].shape == (0,)


@pytest.mark.parametrize("types", [(torch.float16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_nearest_brings_its_inputs_together(types):
    """Types may differ, and gradients may hang on them; the search is made in float32."""
    samples, references = random(6, 2, 3, dtype=types[0]).requires_grad_(), random(9, 2, 3, seed=1, dtype=types[1])
    distances, indices = nearest(samples, references)
    apart = (samples[:, None].detach().float() - references[None].float()).flatten(2).norm(dim=2)
    assert distances.dtype == torch.float32 and not distances.requires_grad
    assert torch.allclose(distances, apart.amin(1), rtol=1e-4) and torch.equal(indices, apart.argmin(1))


def test_judge_takes_a_list():
    (images, labels), _ = unseen_digits()
    assert judge(images[:20], labels[:20].tolist()) == judge(images[:20], labels[:20])
    with pytest.raises(ValueError, match="labels must hold one digit for each of the 20"):
        judge(images[:20], [3] * 10)


# What is refused


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet_distance(x, x[:, :3]), "a and b must be described by equally many features; got 4 and 3"),
        (lambda x: frechet_distance(x[:1], x), "a must hold at least two rows"),
        (lambda x: frechet_distance(x, x[0]), "b must hold at least two rows"),
        (lambda x: frechet_distance(x, x * math.nan), "b holds numbers that are infinite or none"),
        (lambda x: frechet_distance(x[:, :0], x[:, :0]), "a must hold at least two rows"),
        (lambda x: frechet_distance(x.long(), x), "a must hold floating-point features"),
        (lambda x: kernel_distance(x / 0, x), "a holds numbers that are infinite"),
        (lambda x: kernel_distance(x, x[None]), "b must hold at least two rows"),
        (lambda x: precision_recall(x, x[:, 1:]), "real and fake must be described by equally many"),
        (lambda x: precision_recall(x, x[:3], 3), "k=3 must be a whole number from 1 to 2"),
        (lambda x: precision_recall(x, x, 0), "k=0 must be"),
        (lambda x: precision_recall(x, x, 2.0), "k=2.0 must be"),
        (lambda x: precision_recall(x, x, True), "k=True must be"),
        (lambda x: nearest(x, x[:, :2]), r"samples and references must be of one shape; got \(4,\) and \(2,\)"),
        (lambda x: nearest(x, x[:0]), "references is empty"),
        (lambda x: nearest(x, x.long()), "samples and references must hold floating-point numbers"),
        (lambda x: judge(x), r"x must hold digits"),
        (lambda x: judge(torch.zeros(3, 1, 28, 28)), "samples must be 4 to 2,000"),
        (lambda x: judge(torch.zeros(2001, 1, 28, 28)), "samples must be 4 to 2,000"),
        (lambda x: judge(torch.zeros(5, 1, 28, 28), torch.arange(4)), "labels must hold one digit for each of the 5 samples"),
        (lambda x: DigitClassifier()(torch.zeros(2, 3, 28, 28)), r"got \(2, 3, 28, 28\)"),
        (lambda x: DigitClassifier().features(torch.zeros(28, 28)), r"got \(28, 28\)"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random(10, 4))


TALLY = Counter()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    a=st.integers(0, 12), b=st.integers(0, 12), width=st.integers(1, 6), other=st.sampled_from([0, 0, 0, 0, 0, 1]), k=st.integers(0, 4),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)  # fmt: skip
def draws(a, b, width, other, k, scale):
    """Any two sets of features give finite numbers in their ranges, or an error that names the argument."""
    x, y = scale * random(a, width), scale * random(b, width + other, seed=1) + 1
    for call, names in ((frechet_distance, "ab"), (kernel_distance, "ab"), (lambda x, y: precision_recall(x, y, k), ("real", "fake", "k="))):
        try:
            result = call(x, y)
        except ValueError as error:
            assert str(error).startswith(tuple(names))
            assert min(a, b) < 2 or other or (names != "ab" and not 1 <= k < min(a, b))
            TALLY["refused"] += 1
            continue
        TALLY["valid"] += 1
        assert min(a, b) >= 2 and not other
        for number in result if isinstance(result, tuple) else (result,):
            assert isinstance(number, float) and math.isfinite(number)
        assert call is not frechet_distance or result >= 0
        assert not isinstance(result, tuple) or all(0 <= share <= 1 for share in result)


@pytest.mark.bad_input
def test_any_features():
    TALLY.clear()
    draws()
    assert TALLY["valid"] > 30 and TALLY["refused"] > 10, TALLY


# The classifier


def test_features_are_what_the_answer_is_made_of():
    model = DigitClassifier().eval()
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    assert model.features(x).shape == (3, 64) and model(x).shape == (3, 10) and model.features(x).dtype == torch.float32
    assert torch.equal(model(x), model.head(model.features(x)))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shipped_classifier_reads():
    """The figure of the book: at least 97 % of the test digits."""
    model = digit_classifier()
    images, labels = digits("test")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model(images).argmax(1) == labels).double().mean() >= 0.97
    (reference, first), (others, second) = unseen_digits()
    for x, y in ((reference, first), (others, second)):
        assert (model(x).argmax(1) == y).double().mean() >= 0.96
    with torch.no_grad():
        digit_classifier().body[0].weight.zero_()
    assert digit_classifier().body[0].weight.abs().sum() > 0  # callers cannot spoil each other's copy


def test_unseen_digits_are_unseen():
    pictures, labels = digits("train")
    (reference, first), (others, second) = unseen_digits()
    assert len(reference) == len(others) == 2000
    assert torch.equal(torch.cat([reference, others]), pictures[5000:]) and torch.equal(torch.cat([first, second]), labels[5000:])


def test_classifier_asset():
    assert "digit_classifier.safetensors" in checksums() and len(read_asset("digit_classifier.safetensors")) < 600_000


def test_reading_loss_shifts():
    """By up to two pixels in each direction, never more, black comes in; the same seed, the same shifts."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 10, requires_grad=True)

    x = torch.full((200, 1, 28, 28), -1.0)
    x[:, 0, 10, 10] = 1.0
    for seed in (0, 0, 1):
        loss = reading_loss(Spy(), (x, torch.zeros(200, dtype=torch.long)), torch.Generator().manual_seed(seed))
        assert math.isclose(loss.item(), math.log(10), rel_tol=1e-5)
    places = {tuple(i) for i in (seen[0][:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(10 + i, 10 + j) for i in range(-2, 3) for j in range(-2, 3)}
    assert (seen[0].flatten(1) == 1).sum(1).eq(1).all()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.slow
def test_train_classifier(tmp_path, monkeypatch):
    """A short training reads most digits already, and only the first 5,000 are shown to it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = train_classifier(tmp_path, steps=200, progress=False)
    images, labels = digits("test")
    assert (trainer.ema_model(images).argmax(1) == labels).double().mean() > 0.85
    assert trainer.batches.number == 5000 and (tmp_path / "last.safetensors").exists()
    again = train_classifier(tmp_path, steps=200, progress=False)  # is there already
    assert again.step == 200 and all(torch.equal(p, q) for p, q in zip(again.ema_model.parameters(), trainer.ema_model.parameters()))
    assert train_classifier(tmp_path / "other", steps=1, seed=1, progress=False).history["loss"] != trainer.history["loss"][:1]


# All together


def test_judge_of_real_digits():
    """The figures are those of the parts; the floor is a mean over splits, near which one pair of real crowds lies."""
    (reference, _), (others, labels) = unseen_digits()
    score = judge(others, labels)
    model = digit_classifier()
    a, b = model.features(others), model.features(reference)
    assert score.number == 2000 and score.accuracy >= 0.96
    assert math.isclose(score.frechet, frechet_distance(a, b), rel_tol=1e-9)
    assert abs(score.frechet - score.floor) < 3 * score.floor_spread
    assert math.isclose(score.kernel, kernel_distance(a, b), rel_tol=1e-6, abs_tol=1e-9)
    assert (score.precision, score.recall) == precision_recall(b, a)
    assert min(score.precision, score.recall) > 0.6
    assert judge(others[:1500]).accuracy is None


@pytest.mark.parametrize("number", [4, 200, 2000])
def test_floor_is_a_mean_over_splits(number):
    """With other splits it is the same within its error; it is the same for all samples, and falls with their number."""
    (reference, _), (others, _) = unseen_digits()
    score = judge(others[:number])
    again = judge(0.5 * others[-number:])
    assert (again.floor, again.floor_spread) == (score.floor, score.floor_spread)
    pool, dice = digit_classifier().features(torch.cat([reference, others])), torch.Generator().manual_seed(123)
    values = []
    for _ in range(20):
        left, right = pool[torch.randperm(4000, generator=dice)].split(2000)
        values.append(frechet_distance(left, right[:number]))
    values = torch.tensor(values)
    assert abs(values.mean() - score.floor) < 4 * values.std() * (1 / 20 + 1 / 10) ** 0.5
    assert 0.4 < score.floor_spread / values.std() < 2.5
    if number < 2000:
        assert score.floor > judge(others).floor


def test_judge_sees_what_is_wrong():
    (_, _), (others, labels) = unseen_digits()
    others, labels = others[:400], labels[:400]
    good = judge(others, labels)
    noisy = judge(others + 0.5 * random(*others.shape, dtype=torch.float32), labels)
    assert noisy.frechet > 2 * good.frechet and noisy.precision < good.precision and noisy.kernel > good.kernel
    wrong = judge(others, (labels + 1) % 10)
    assert wrong.accuracy < 0.1 and wrong.frechet == good.frechet
    some = torch.cat([others[labels == k] for k in (0, 1)]).repeat(4, 1, 1, 1)[:400]
    assert judge(some).recall < 0.6 * good.recall and judge(some).frechet > 2 * good.frechet
    assert judge(others.half(), labels).accuracy == pytest.approx(good.accuracy, abs=0.01)


def test_score_in_a_line():
    score = Score(number=10, accuracy=0.5, frechet=3.0, floor=1.0, floor_spread=0.2, kernel=0.1, precision=0.25, recall=0.75)
    assert str(score) == ("10 samples: read as asked 0.500, Fréchet distance 3.000 (as many real digits: 1.000 ± 0.200), kernel distance 0.1000, "
                          "precision 0.250, recall 0.750")  # fmt: skip
    assert "read" not in str(Score(10, None, 3.0, 1.0, 0.2, 0.1, 0.25, 0.75))


def test_relative_error_of_float32():
    """Features in float32 are compared in float64: order and pieces do not matter."""
    x, y = (z.float() for z in crowds(1500, 1200, 16))
    mixed = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    pairs = [(f(x, y), f(mixed, y)) for f in (frechet_distance, kernel_distance)]
    assert all(relative_error(torch.tensor(a), torch.tensor(b)) < 1e-6 for a, b in pairs)
    assert evaluation.precision_recall(x, y) == evaluation.precision_recall(mixed, y)
