"""What the random draws of constructor arguments have in common."""

from collections import Counter

from torch import Tensor, nn


def assert_reaches_everything(model: nn.Module, x: Tensor, out: Tensor) -> None:
    """A backward pass gives finite gradients to the input, and one to every parameter."""
    out.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in model.parameters())


def mostly_valid(tally: Counter) -> Counter:
    """The tally, if at least 60 % of the draws were valid."""
    assert tally["valid"] >= 0.6 * tally.total(), tally
    return tally
