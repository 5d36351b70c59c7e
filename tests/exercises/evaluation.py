"""Wrong answers to the exercises on judging samples, and what they must be told."""

import torch

from unet_course.evaluation import frechet_distance, precision_recall
from unet_course.exercises.evaluation import check_coverage, check_diagnosis, check_distance, check_distances, check_extrapolated


def distance(root, means=lambda m: m.square().sum(), times=2, unbiased=True, end=lambda d: d):
    """The distance of the exercise with another root, or another part changed."""

    def answer(a, b):
        cov_a, cov_b = (x.T.cov(correction=int(unbiased)) for x in (a, b))
        return end(means(a.mean(0) - b.mean(0)) + cov_a.trace() + cov_b.trace() - times * root(cov_a, cov_b))

    return answer


def right_root(a, b):
    return torch.linalg.eigvals(a @ b).sqrt().real.sum()


def root(covariance):
    """The symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.sqrt()) @ vectors.T


def reach_among_samples(real, fake, k):
    """Coverage by neighbourhoods that reach to the k-th nearest sample."""
    distances = torch.cdist(real, fake)
    return (distances <= distances.sort(1).values[:, k - 1 : k]).any(1).double().mean()


def coverage(own=1, axis=1, some=torch.any, share=lambda inside: inside.double().mean()):
    """Coverage with something changed."""

    def answer(real, fake, k):
        reach = torch.cdist(real, real).sort(1).values[:, k - 1 + own]
        return share(some(torch.cdist(real, fake) <= reach[:, None], axis))

    return answer


def line(x, pick=0):
    """A fitted line's height at 0, or its slope."""

    def answer(numbers, distances):
        a = torch.stack([torch.ones_like(numbers), x(numbers)], 1)
        return torch.linalg.lstsq(a, distances[:, None]).solution[pick, 0]

    return answer


def two_points(i, j):
    """The height at 0 of the line through two of the points."""

    def answer(numbers, distances):
        x = 1 / numbers
        return distances[i] - (distances[j] - distances[i]) / (x[j] - x[i]) * x[i]

    return answer


WRONG = [
    (check_distances, (0.5, 64, 0), "one feature's part"),
    (check_distances, (32, 64, 0), "are squares"),
    (check_distances, (4, 64, 0), "*squared* distance"),
    (check_distances, (8, 64, 0), "not 8."),
    (check_distances, (16, 1, 0), "There are 64 of them"),
    (check_distances, (16, 192, 0), "difference of the variances"),
    (check_distances, (16, 576, 0), "4 is the variance"),
    (check_distances, (16, 128, 0), "added up the factor 2"),
    (check_distances, (16, 100, 0), "not 100."),
    (check_distances, (16, 64, 2), "in which order"),
    (check_distance, (distance(lambda a, b: (a * b).sqrt().trace()),), "how features go together"),
    (check_distance, (distance(lambda a, b: (a @ b).sqrt().trace()),), "root of each entry"),
    (check_distance, (distance(lambda a, b: torch.linalg.eigvals(a @ b).real.sum()),), "eigenvalues themselves"),
    (check_distance, (distance(right_root, times=1),), "counts twice"),
    (check_distance, (distance(right_root, times=6),), "from every entry"),
    (check_distance, (distance(right_root, means=lambda m: 0),), "means is missing"),
    (check_distance, (distance(right_root, means=lambda m: m.norm()),), "counts squared"),
    (check_distance, (distance(lambda a, b: torch.linalg.eigvalsh(a @ b).clamp(min=0).sqrt().sum()),), "symmetric matrices"),
    (check_distance, (distance(lambda a, b: torch.linalg.svdvals(a @ b).sqrt().sum()),), "singular values"),
    (check_distance, (distance(lambda a, b: (root(a) @ root(b)).trace()),), "root of each covariance"),
    (check_distance, (distance(right_root, end=lambda d: d.sqrt()),), "root of the distance"),
    (check_distance, (distance(right_root, unbiased=False),), "one less"),
    (check_distance, (distance(lambda a, b: torch.linalg.eigvals(a @ b).sqrt().sum()),), "complex"),
    (check_distance, (distance(right_root, end=lambda d: d * torch.nan),), "nan"),
    (check_distance, (distance(right_root, end=lambda d: d + 1),), "the means contribute"),
    (check_distance, (lambda a, b: (a.T.cov() @ b.T.cov()).sqrt(),), "is one number"),
    (check_distance, (lambda a, b: torch.linalg.sqrtm(a.T.cov() @ b.T.cov()).trace(),), "no matrix root"),
    (check_distance, (lambda a, b: frechet_distance(a, a),), "On two test crowds"),
    (check_distance, (lambda a, b: None,), "nothing back"),
    (check_coverage, (lambda real, fake, k: precision_recall(real, fake, k)[0],), "that is precision"),
    (check_coverage, (lambda real, fake, k: precision_recall(real, fake, k)[1],), "that is recall"),
    (check_coverage, (coverage(axis=0),), "that is precision"),
    (check_coverage, (coverage(own=0),), "own nearest neighbour"),
    (check_coverage, (coverage(some=torch.all),), "one is enough"),
    (check_coverage, (coverage(some=lambda inside, axis: inside),), "share of pairs"),
    (check_coverage, (coverage(share=lambda inside: inside.sum()),), "a number of pictures"),
    (check_coverage, (lambda real, fake, k: coverage(share=lambda inside: inside.sum())(real, fake, k) / len(fake),), "divide by the number of samples"),
    (check_coverage, (coverage(share=lambda inside: inside),), "one number"),
    (check_coverage, (coverage(own=4),), "your coverage of the test points"),
    (check_coverage, (lambda real, fake, k: coverage()(real, fake, 3),), "whatever `k` is"),
    (check_coverage, (reach_among_samples,), "among the samples"),
    (check_coverage, (lambda real, fake, k: None,), "nothing back"),
    (check_extrapolated, (line(lambda n: n),), "line over N"),
    (check_extrapolated, (line(lambda n: 1 / n, 1),), "the slope"),
    (check_extrapolated, (lambda n, d: d[-1],), "last distance"),
    (check_extrapolated, (lambda n, d: d.mean(),), "mean of the distances"),
    (check_extrapolated, (line(lambda n: n**-0.5),), "1/√N"),
    (check_extrapolated, (two_points(0, -1),), "two of the points, 1 and 4"),
    (check_extrapolated, (two_points(-2, -1),), "two of the points, 3 and 4"),
    (check_extrapolated, (lambda n, d: d.min() / 2,), "the best line has"),
    (check_extrapolated, (lambda n, d: d,), "one number is asked for"),
    (check_extrapolated, (lambda n, d: None,), "nothing back"),
    (check_diagnosis, ("fine", "copied", "blurred", "good"), "none of the four words"),
    (check_diagnosis, ("good", "copied", "blurred", "good"), "fits one model"),
    (check_diagnosis, ("good", "copied", "blurred", "collapsed"), "next to nothing"),
    (check_diagnosis, ("blurred", "copied", "collapsed", "good"), "a is a model whose samples lie among"),
    (check_diagnosis, ("collapsed", "good", "blurred", "copied"), "no distance at all"),
    (check_diagnosis, ("collapsed", "copied", "good", "blurred"), "c is a model with the largest Fréchet distance"),
]
