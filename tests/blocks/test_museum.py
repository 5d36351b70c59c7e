"""The museum: every bug is in the real code while it is wanted and gone afterwards, each is told from the others, and the named test of each notices it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_course.attention import attention_weights
from unet_course.diffusion import Schedule
from unet_course.museum import BUGS, CHECKS, PATIENTS, Bug, examine, exhibit, inject, patient
from unet_course.sampling import ddpm
from unet_course.vae import DiagonalGaussian

ROOT = Path(__file__).parents[2]
EVERYTHING = {bug.name: bug for bug in [*BUGS.values(), *(case.bug for case in PATIENTS)]}
CATCHERS = {  # what catches the patients' bugs; the exhibits name their tests themselves
    "too-many-steps": "tests/blocks/test_sampling.py::test_steps_equal_diffusers",
    "hasty-average": "tests/blocks/test_training.py::test_ema_is_its_formula",
    "narrow-latents": "tests/blocks/test_vae.py::TestDistribution::test_sample",
    "gate-and-value": "tests/blocks/test_transformer.py::test_the_gate_is_the_second_half",
    "clean-noise": "tests/blocks/test_diffusion.py::test_one_jump_is_many_steps",
    "noise-on-top": "tests/blocks/test_sampling.py::test_ddim_with_all_noise_is_ddpm",
} | {bug.name: bug.test for bug in BUGS.values()}


# Does the named test notice?


RUNNER = """
import json, os, sys
import pytest
from unet_course.museum import BUGS, PATIENTS, inject

bugs = {bug.name: bug for bug in [*BUGS.values(), *(case.bug for case in PATIENTS)]}


class Notes:
    "Of each test how many cases passed and failed, and with what."

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        note = self.found.setdefault(report.nodeid.partition("[")[0], {"passed": 0, "failed": 0, "errors": []})
        if report.when == "call":
            note["passed"] += report.passed
            note["failed"] += report.failed
            if report.failed:
                note["errors"].append(report.longrepr.reprcrash.message.splitlines()[0])
        elif report.failed:
            note["errors"].append("outside of the test: " + str(report.longrepr)[-300:])


def run(*tests):
    notes = Notes()
    pytest.main(["-q", "-p", "no:cacheprovider", *dict.fromkeys(tests)], plugins=[notes])
    return {test: notes.found.get(test, {"passed": 0, "failed": 0, "errors": ["it did not run"]}) for test in tests}


os.chdir(sys.argv[1])
catchers = json.loads(sys.argv[2])
before, found = run(*catchers.values()), {}
for name, test in catchers.items():
    with inject(bugs[name]):
        found[name] = {"before": before[test], "ill": run(test)[test]}
    print(name, found[name], file=sys.stderr, flush=True)
after = run(*catchers.values())
for name, test in catchers.items():
    found[name]["after"] = after[test]
with open(sys.argv[3], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Each named test without its bug, with it, and without it again: in a process of its own, for the code is changed there."""
    path = tmp_path_factory.mktemp("museum") / "found.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", RUNNER, str(ROOT), json.dumps(CATCHERS), str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CATCHERS)
def test_named_test_notices(name, outcomes):
    """It passes, fails with the bug put in, by what it asserts or because the package refuses to go on, and passes again."""
    before, ill, after = (outcomes[name][key] for key in ("before", "ill", "after"))
    assert before == after and before["passed"] >= 1 and not before["failed"] and not before["errors"], (before, after)
    assert ill["failed"] >= 1, ill
    assert all(error.startswith(("assert", "AssertionError", "ValueError: alphas_cumprod")) for error in ill["errors"]), ill


def test_every_bug_has_a_catcher():
    assert set(CATCHERS) == set(EVERYTHING) and all(CATCHERS.values())
    for node in CATCHERS.values():
        file, *_, function = node.split("::")
        assert f"def {function}(" in (ROOT / file).read_text(), node


# Put in and taken out


@pytest.mark.parametrize("name", EVERYTHING)
def test_in_and_out(name):
    """The same function object has other code inside, and its own again outside; after an exception, too."""
    bug = EVERYTHING[name]
    function = bug.function
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    with inject(bug) as given:
        assert given is bug and bug.function is function and function.__code__ is not before[0]
        assert function.__code__.co_argcount == before[0].co_argcount and function.__code__.co_varnames[: before[0].co_argcount] == before[0].co_varnames[: before[0].co_argcount]
    assert (function.__code__, function.__defaults__, function.__kwdefaults__) == before
    with pytest.raises(KeyError, match="mine"), inject(bug):
        raise KeyError("mine")
    assert (function.__code__, function.__defaults__, function.__kwdefaults__) == before


def test_reaches_those_who_imported_before():
    """A name bound long ago, a default argument, a property, a generator: all are changed in place."""
    q = torch.randn(1, 1, 4, 8)
    with inject("softmax-over-queries"):
        assert not torch.allclose(attention_weights(q, q).sum(-1), torch.ones(()))
    assert torch.allclose(attention_weights(q, q).sum(-1), torch.ones(()))
    with inject("short-schedule"):
        assert len(Schedule.linear()) == 200 and len(Schedule.linear(1000)) == 1000
    assert len(Schedule.linear()) == 1000
    normal = DiagonalGaussian(torch.full((1, 2, 3), -2.0))
    with inject(EVERYTHING["narrow-latents"]):
        assert torch.equal(normal.std, normal.var)
    assert not torch.equal(normal.std, normal.var)
    with inject("noise-by-variance"):
        walk = ddpm(lambda x, t: (x, x), torch.zeros(1, 1, 8, 8), Schedule.cosine(), [600, 500])
    ill = next(walk).x  # a generator keeps the code with which it was made
    healthy = next(ddpm(lambda x, t: (x, x), torch.zeros(1, 1, 8, 8), Schedule.cosine(), [600, 500])).x
    assert ill.std() < 0.9 * healthy.std()


def test_several_at_once():
    """In any order; but two in one function would have to be one."""
    with inject(1), inject("mask-upside-down"), inject(6):
        assert set(examine()) == {"sine-first", "mask-upside-down", "short-schedule"}
    assert examine() == []
    with inject(1) as bug:
        assert "cos" in str(bug) and "caught by" in str(bug)
        with pytest.raises(ValueError, match="has a bug already, <bug sine-first>"), inject(1):
            pass
        assert examine() == ["sine-first"]
    assert examine() == []


@pytest.mark.parametrize("name", BUGS)
def test_checks_tell_them_apart(name):
    """With a bug its own check raises an alarm, and no other."""
    with inject(name):
        assert examine() == [name]


def test_examining_seeds_no_gpu(monkeypatch):
    """Random numbers go on as if nothing had happened, on all devices."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    state = torch.get_rng_state()
    examine()
    assert torch.equal(torch.get_rng_state(), state)


def test_checks_are_silent_on_a_healthy_program():
    """Whatever the state of the global generator, which stays as it is."""
    assert list(CHECKS) == list(BUGS)
    for seed in range(5):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        assert examine() == [] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("case", PATIENTS, ids=lambda case: case.bug.name)
def test_patients(case):
    """The place is among the suspects, all of which exist, and the check-up does not find them."""
    assert case.bug.place in case.suspects and len(set(case.suspects)) == 3
    for place in case.suspects:
        assert Bug("", place, "", "").function
    with inject(case.bug):
        assert examine() == []


def test_patients_by_seed():
    assert patient(3) is patient(3) and {patient(seed).bug.name for seed in range(100)} == {case.bug.name for case in PATIENTS}
    assert len({patient(seed).bug.name for seed in (1, 5, 7)}) == 3


# Labels


def test_patients_keep_their_secret():
    """Looking at a patient does not tell what it has."""
    for case in PATIENTS:
        assert case.complaint in repr(case) and case.bug.name not in repr(case) and case.bug.becomes not in repr(case)


def test_label_of_several_lines():
    """What stays is not shown as changed."""
    bug = Bug("own", "guidance.drop_labels", "if labels.ndim == 0:", "if (\n            labels.ndim == 1\n    ):")
    assert str(bug).splitlines() == ["own: unet_course.guidance.drop_labels", "- if labels.ndim == 0:", "+ if (", "+ labels.ndim == 1", "+ ):"]
    assert str(Bug("own", "guidance.drop_labels", "labels.ndim", "labels.ndim")) == "own: unet_course.guidance.drop_labels"


def test_label():
    text = str(exhibit("no-residual"))
    assert text.splitlines() == [
        "no-residual: unet_course.attention.AttentionBlock.forward",
        "- return x + self.gather(x)",
        "+ return self.gather(x)",
        "caught by tests/blocks/test_attention.py::test_zero_initialised_block_is_the_identity",
    ]
    for number, name in enumerate(BUGS, 1):
        assert exhibit(number) is exhibit(name) is exhibit(BUGS[name]) is BUGS[name]
        lines = str(exhibit(name)).splitlines()
        assert len(lines) == 4 and [line[0] for line in lines[1:3]] == ["-", "+"]
    assert "caught" not in str(PATIENTS[0].bug)


# Wrong arguments


@pytest.mark.parametrize("which", [0, 13, -1, True, "softmax", "", None, 1.0])
@pytest.mark.bad_input
def test_unknown_exhibits(which):
    with pytest.raises(ValueError, match="is not in the museum; there are the numbers 1 to 12"), inject(which):
        pass


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
@pytest.mark.bad_input
def test_unknown_patients(seed):
    with pytest.raises(ValueError, match="seed="):
        patient(seed)


@pytest.mark.parametrize(
    ("place", "was", "becomes", "told"),
    [
        ("nowhere.function", "a", "b", "place='nowhere.function' is not defined in the package"),
        ("sampling", "a", "b", "place='sampling' is a module"),
        ("", "a", "b", "place=''"),
        ("sampling.nothing", "a", "b", "is not defined in the package"),
        ("sampling.ddpm.inside", "a", "b", "is not defined in the package"),
        ("unet.UNetModel.eval", "a", "b", "with the class that defines the method"),
        ("attention.AttentionBlock", "a", "b", "is a type, not a function"),
        ("attention.BACKENDS", "a", "b", "is a tuple, not a function"),
        ("sampling.ddpm", "not there", "b", "was='not there' stands 0 times"),
        ("sampling.ddpm", "x", "y", "it must be there once"),
        ("sampling.ddpm", "spread**0.5", "spread**", "without a meaning"),
        ("attention.LinearAttentionBlock.forward", "x + super()", "super()", "super()"),
    ],
)
def test_bugs_that_cannot_be_put_in(place, was, becomes, told):
    with pytest.raises(ValueError, match=".*") as caught, inject(Bug("own", place, was, becomes)):
        pass
    assert told in str(caught.value)
    assert examine() == []


LINES = ["return x0 if s is None else x", "spread", "x0, _ = predict(x, t)", "number", "raise", "", "yield", "(", "x = x0 if s is None else mean"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["sampling.ddpm", "sampling.ddim", "attention.attention", "museum.inject", "data.digits"]), st.sampled_from(LINES) | st.text(max_size=8), st.sampled_from(LINES) | st.text(max_size=8))
def test_any_bug(place, was, becomes):
    """It can be put in and comes out again, or ValueError says why not."""
    bug = Bug("any", place, was, becomes)
    before = bug.function.__code__
    try:
        with inject(bug):
            assert bug.function.__code__ is not before
    except ValueError as error:
        assert place in str(error) or "becomes" in str(error)
    assert bug.function.__code__ is before
