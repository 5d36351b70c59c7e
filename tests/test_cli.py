"""The command line: what it says, what it writes, and that nothing typed at it ends in a traceback."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from unet_course import cli, data, training
from unet_course.training import load_checkpoint, save_checkpoint

TRAIN = "train digits --folder run --steps 6"


def call(line: str | list[str]):
    """Type a command."""
    return CliRunner().invoke(cli.app, shlex.split(line) if isinstance(line, str) else line, prog_name="unet-course")


def succeed(line: str) -> str:
    """Type a command that has to work; what it prints."""
    result = call(line)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refuse(line: str | list[str], code: int = 1) -> str:
    """Type a command that cannot be done: one line says why."""
    result = call(line)
    assert result.exit_code == code and result.stdout == "", result.output
    usage, error, message = result.stderr.partition("Error: ")
    assert error and len(message) < 500 and message.endswith("\n")
    assert code == 2 or usage == "" and message.count("\n") == 1  # a command that is not understood gets its usage, too
    return message


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An empty folder, a small model, the middle of a few digits, a checkpoint every two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "seconds_per_step", lambda: 600.0)
    for name, value in dict(model_channels=32, channel_mult=(1,), attention_resolutions=()).items():
        monkeypatch.setitem(training.DIGITS_UNET, name, value)
    trainer, few = training.Trainer, {}
    for split in ("train", "test"):
        images, labels = data.digits(split)
        few[split] = images[:128, :, 8:20, 8:20], labels[:128]
    for module in (training, cli):
        monkeypatch.setattr(module, "digits", few.get)
    monkeypatch.setattr(training, "Trainer", lambda *args, **options: trainer(*args, **options | {"every": 2}))
    return tmp_path


def same(a: str, b: str) -> bool:
    """Whether two checkpoints are the same to the last bit."""
    (ours, state), (theirs, expected) = map(load_checkpoint, (a, b))
    return state == expected and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


OPTIONS = {
    "": ("train", "sample", "info", "--version", "unet-course sample digits"),
    "train": ("--folder", "--steps", "--seed", "--out", "--quiet", "runs/digits", "8000", "Ctrl-C", "how long"),
    "sample": ("--labels", "--count", "--steps", "--sampler", "--seed", "--scale", "--weights", "--out", "--quiet", "ddim", "dpm", "heun", "ddpm", "samples.png"),
    "info": ("FILE", "installed"),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help(command):
    """Every option is explained, within 80 columns, in letters that every terminal has."""
    text = succeed(f"{command} --help")
    assert all(word in text for word in OPTIONS[command])
    assert text.isascii() and max(map(len, text.splitlines())) <= 80


def test_version_and_no_command():
    from unet_course import __version__

    assert succeed("--version") == f"unet-course {__version__}\n"
    assert "Commands" in call("").output


def test_train_ship_sample_info(tiny):
    """The whole way: train, put the weights into a small file, draw with it, ask what it is."""
    said = succeed(f"{TRAIN} --out small.safetensors")
    assert "for 6 steps." in said and "Checkpoints: run." in said and f"This will take about 60 min here ({cli.where()})." in said
    assert re.findall(r"^step (\d+): loss \d\.\d+, on test digits \d\.\d+$", said, re.M) == ["2", "4", "6"]
    assert "Done: 6 steps" in said and said.endswith("unet-course sample digits --weights small.safetensors\n")
    assert Path("small.safetensors").stat().st_size < Path("run/last.safetensors").stat().st_size / 5

    succeed("sample digits --weights small.safetensors --steps 2 --out a.png")
    succeed("sample digits --weights run --steps 2 --out b.png")
    succeed("sample digits --weights run/last.safetensors --steps 2 --out c.png")
    a, b, c = (torch.tensor(list(Image.open(f"{name}.png").tobytes())) for name in "abc")
    assert b.equal(c) and (a - b).abs().float().mean() < 1  # 16 bits against 32

    parameters = sum(p.numel() for p in training.digits_unet().parameters())
    small, whole = succeed("info small.safetensors"), succeed("info run")
    assert all(f"{parameters:,}" in text and re.search(r"^steps +6$", text, re.M) and "seed 0" in text for text in (small, whole))
    assert "weights alone" in small and "float16" in small and "can go on" in whole and "float32" in whole


def test_interrupted_training_goes_on_to_the_same_bits(tiny, monkeypatch):
    """Ctrl-C in the fourth step; then what the message says is typed."""
    calls, loss = count(1), training.digits_loss

    def interrupted(*args):
        if next(calls) == 6:  # two of them are the validation's
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    with monkeypatch.context() as patch:
        patch.setattr(training, "digits_loss", interrupted)
        result = call(f"{TRAIN} --seed 3 --out 'a b.safetensors'")
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and "Stopped; 2 of 6 steps are kept." in result.stderr
    typed = result.stderr.splitlines()[-1].strip()
    assert typed == "unet-course train digits --folder run --steps 6 --seed 3 --out 'a b.safetensors'"
    assert "of which 2 are done" in succeed(typed.removeprefix("unet-course "))
    succeed("train digits --folder unbroken --steps 6 --seed 3 --out b.safetensors --quiet")
    assert all(same(f"run/{name}.safetensors", f"unbroken/{name}.safetensors") for name in ("last", "best"))
    assert same("a b.safetensors", "b.safetensors")


def test_interrupted_before_the_first_checkpoint(tiny, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "seconds_per_step", stop)
    result = call(TRAIN)
    assert result.exit_code == 130 and "0 of 6 steps are kept" in result.stderr


def test_finished_training_is_not_trained_again(tiny, monkeypatch):
    assert succeed(f"{TRAIN} --quiet") == ""
    monkeypatch.setattr(cli, "train_digits", None)
    assert "Done: 6 steps" in succeed(f"{TRAIN} --out w.safetensors") and Path("w.safetensors").exists()


def test_another_training_in_the_folder(tiny):
    """Another length, another seed, another model, no training at all: each is named, and nothing is changed."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    before = Path("run/last.safetensors").read_bytes()
    assert "begun with --steps 6" in refuse("train digits --folder run --steps 7")
    assert "begun with --seed 0" in refuse(f"{TRAIN} --seed 1")
    assert "would replace a checkpoint" in refuse(f"{TRAIN} --out run/last.safetensors")
    assert Path("run/last.safetensors").read_bytes() == before

    tensors, state = load_checkpoint("run/last.safetensors")
    save_checkpoint("other/last.safetensors", tensors, state | {"config": {"model": "shapes"}})
    assert "another model ('shapes')" in refuse("train digits --folder other --steps 6")
    save_checkpoint("small/last.safetensors", *load_checkpoint("w.safetensors"))
    assert "no checkpoint of a training" in refuse("train digits --folder small --steps 6")
    wrong = {name: t[..., :1] if name == "model.model.out.2.weight" else t for name, t in tensors.items()}
    save_checkpoint("wrong/last.safetensors", wrong, state | {"step": 4})
    assert "holds another model: model.out.2.weight" in refuse("train digits --folder wrong --steps 6 --quiet")


def test_changed_settings_are_a_note_of_one_line(tiny):
    succeed(f"{TRAIN} --quiet")
    tensors, state = load_checkpoint("run/last.safetensors")
    save_checkpoint("run/last.safetensors", tensors, state | {"step": 4, "settings": state["settings"] | {"warmup": 17}})
    result = call(f"{TRAIN} --quiet")
    assert result.exit_code == 0 and re.fullmatch(r"Note: the training goes on with other settings .*'warmup': 200.*\n", result.stderr)


def test_bad_folders_and_files(tiny, monkeypatch):
    """Everything on the disk that can be wrong."""
    Path("file").write_text("text")
    Path("empty").mkdir()
    Path("cut").mkdir()
    Path("cut/last.safetensors").write_bytes(b"\x10\x00\x00")
    Path("pickle.safetensors").write_bytes(b"\x80\x04evil")
    assert "file: this is a file, not a folder" in refuse("train digits --folder file")
    assert "Not a directory" in refuse("train digits --folder file/run")
    assert "not a whole safetensors file" in refuse("train digits --folder cut")
    assert "must end in .safetensors" in refuse("train digits --out weights.txt")
    assert "must end in .png" in refuse("sample digits --out picture.jpg")
    assert "names a file" in refuse(["sample", "digits", "--out", str(Path("x.png").mkdir() or "x.png")])
    for line in ("info {}", "sample digits --weights {}"):
        assert "No such file" in refuse(line.format("missing.safetensors"))
        assert "neither a file nor the folder of a training" in refuse(line.format("empty"))
        assert "a pickle" in refuse(line.format("pickle.safetensors"))
        assert "cut off" in refuse(line.format("file")) and "cut off" in refuse(line.format("cut"))
        assert not never_a_traceback([*line.format("").split(), "a\0b"])
    monkeypatch.setattr(Path, "touch", lambda self: open("/missing/for/sure"))
    assert "run: no file can be written there" in refuse(TRAIN)
    assert "no file can be written there" in refuse("sample digits")
    assert not Path("samples.png").exists()


def test_sample_refuses_other_models(tiny):
    """A file of another model is refused by name and shape."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    training.DIGITS_UNET["model_channels"] = 64
    assert "holds another model" in refuse("sample digits --weights w.safetensors")
    training.DIGITS_UNET["model_channels"] = 32
    tensors, state = load_checkpoint("w.safetensors")
    save_checkpoint("nan.safetensors", {name: t * torch.nan for name, t in tensors.items()}, state)
    assert "not finite" in refuse("sample digits --weights nan.safetensors --steps 2")
    assert not never_a_traceback("sample digits --weights w.safetensors --scale nan".split())
    save_checkpoint("none.safetensors", {"x": torch.zeros(1)}, {})
    assert "holds another model" in refuse("sample digits --weights none.safetensors")
    assert "other tensors" in succeed("info none.safetensors")
    save_checkpoint("odd.safetensors", {"x": torch.zeros(1)}, {"step": {"a": [1]}, "settings": 3, "config": {"model": "\x1b[31m\nred"}})
    assert "\x1b" not in (text := succeed("info odd.safetensors")) and "?[31m red" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "MODEL"),
        ("train cats", "cats"),
        ("train digits --steps 0", "--steps"),
        ("train digits --steps many", "--steps"),
        ("train digits --seed -1", "--seed"),
        ("train digits --seed 4294967296", "--seed"),
        ("train digits --speed 9", "--speed"),
        ("sample digits --labels 12x", "--labels"),
        ("sample digits --labels ''", "--labels"),
        ("sample digits --labels \N{ARABIC-INDIC DIGIT THREE}", "--labels"),
        ("sample digits --count 0", "--count"),
        ("sample digits --steps 1001", "--steps"),
        ("sample digits --sampler euler", "euler"),
        ("sample digits --scale -1", "--scale"),
        ("sample digits --scale much", "--scale"),
        ("sample digits more", "more"),
        ("paint", "paint"),
    ],
)
def test_not_understood(tiny, line, message):
    """Exit code 2, and the last line names what is wrong."""
    assert message in refuse(line, code=2)
    assert list(tiny.iterdir()) == []


def test_sample_draws_what_was_asked_for(tiny, monkeypatch):
    """Labels, number, and seed; the sheet holds the pictures, pixel by pixel."""
    asked = []

    def remember(model, labels, *options, **more):
        asked.append((labels.tolist(), *options))
        return torch.linspace(-1, 1, len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    monkeypatch.setattr(cli, "pretrained", lambda name: training.digits_unet())
    monkeypatch.setattr(cli, "draw", remember)
    said = succeed("sample digits --labels 2026 --count 13 --seed 5 --steps 7 --sampler heun --scale 2.5")
    assert asked == [([2, 0, 2, 6] * 3 + [2], "heun", 7, 5, 2.5)] and said.startswith("samples.png: 13 digits, heun with 7 steps, scale 2.5, ")
    sheet = torch.tensor(list(Image.open("samples.png").tobytes())).view(2, 30, 2, 10, 30, 2)
    assert (sheet == sheet[:, :, :1, :, :, :1]).all()  # every pixel is doubled
    cells = sheet[:, :, 0, :, :, 0].transpose(1, 2)  # row, column, height, width
    assert cells[..., 1:29, 1:29].flatten(2).amax(-1).flatten()[:13].sub(torch.linspace(0, 255, 13)).abs().max() <= 0.6
    assert cells[..., 0, :].max() == cells[..., :, 29].max() == cells[1, 3:].max() == 0


def test_samplers_and_seeds(tiny):
    """Each sampler has its own way, each seed its own digits; the same order gives the same file, however it is cut up."""
    succeed(f"{TRAIN} --quiet")
    model, labels = cli.read_model("digits", Path("run")), torch.arange(4)
    drawn = {name: cli.draw(model, labels, name, 3) for name in cli.SAMPLERS}
    assert len({x.sum().item() for x in drawn.values()}) == len(cli.SAMPLERS)
    assert all(cli.draw(model, labels, name, 3).equal(x) for name, x in drawn.items())
    assert not cli.draw(model, labels, "ddim", 3, seed=1).allclose(drawn["ddim"])
    assert not cli.draw(model, labels, "ddim", 3, scale=2.0).allclose(drawn["ddim"])
    assert not cli.draw(model, labels, "ddim", 3, scale=0.0).allclose(cli.draw(model, labels, "ddim", 3, scale=0.1))
    assert cli.draw(model, labels, "ddim", 3, scale=0.0).equal(cli.draw(model, labels.flip(0), "ddim", 3, scale=0.0))  # labels don't count
    assert cli.draw(model, labels, "ddim", 3, piece=3).allclose(drawn["ddim"], atol=1e-4)


def test_shipped_model_draws_digits(tmp_path, monkeypatch):
    """With the shipped weights: strokes on a black ground. And --quiet says nothing."""
    monkeypatch.chdir(tmp_path)
    assert succeed("sample digits --steps 8 --labels 17 --quiet") == ""
    pixels = torch.tensor(list(Image.open("samples.png").tobytes())).float()
    assert 0.02 < (pixels > 128).float().mean() < 0.4 and (pixels < 64).float().mean() > 0.5


def test_info_sees_damage(monkeypatch):
    text = succeed("info")
    assert all(name in text for name in ("unet-course", "torch", "Python", "computes on", *data.checksums()))
    assert text.count("checksum right") == len(data.checksums()) and "parameters" in text
    monkeypatch.setitem(data.checksums(), "digits.npz", "0" * 64)
    result = call("info")
    assert result.exit_code == 1 and re.search(r"^digits.npz +DAMAGED", result.stdout, re.M)


def test_time_of_a_step_is_measured(tiny, monkeypatch):
    """By a training that leaves nothing behind, neither files nor random numbers."""
    monkeypatch.undo()
    monkeypatch.setitem(training.DIGITS_UNET, "model_channels", 32)
    state = torch.get_rng_state()
    assert 0 < cli.seconds_per_step() < 60 and torch.get_rng_state().equal(state) and not list(tiny.iterdir())


def test_duration():
    assert [cli.duration(s) for s in (0.2, 59.6, 100, 3000, 8000)] == ["0 s", "60 s", "2 min", "50 min", "2 h 13 min"]


@pytest.fixture
def idle(tiny, monkeypatch):
    """Commands that do everything but the work: thousands of them can be typed."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    network = training.digits_unet()
    monkeypatch.setattr(cli, "train_digits", lambda *args, **options: save_checkpoint(args[0] / "last.safetensors", *begun(args[1], args[2])))
    monkeypatch.setattr(cli, "seconds_per_step", lambda: 0.1)
    monkeypatch.setattr(cli, "pretrained", lambda name: network)
    monkeypatch.setattr(cli, "draw", lambda model, labels, *args, **options: torch.zeros(len(labels), 1, 28, 28))
    tensors, state = load_checkpoint("run/last.safetensors")

    def begun(steps, seed):
        return tensors, state | {"step": steps, "settings": state["settings"] | {"decay": steps, "seed": seed}}


LABELS = st.text("0123456789", min_size=1, max_size=12)
FILES = st.sampled_from(["run", "w.safetensors", "run/last.safetensors", "run/best.safetensors", "run/../run", "missing"])
NEW = st.text("abc -_.äß'\"$;\\", min_size=1, max_size=8).map(lambda s: f"new/x{s}")
VALID = {
    "train": {
        "--folder": NEW, "--steps": st.integers(1, 10**7), "--seed": st.integers(0, 2**32 - 1),
        "--out": NEW.map(lambda s: f"{s}.safetensors"), "--quiet": None,
    },
    "sample": {
        "--labels": LABELS, "--count": st.integers(1, 60), "--steps": st.integers(1, 1000), "--sampler": st.sampled_from(list(cli.SAMPLERS)),
        "--seed": st.integers(0, 2**32 - 1), "--scale": st.floats(0, 20), "--weights": FILES, "--out": NEW.map(lambda s: f"{s}.png"), "--quiet": None,
    },
}  # fmt: skip


@st.composite
def sensible(draw) -> list[str]:
    """A command as someone might mean it; one in eight has something else as one of its words."""
    name = draw(st.sampled_from(["train", "train", "sample", "sample", "info"]))
    words = [name, *(["digits"] if name != "info" else [draw(FILES)])]
    for option in draw(st.lists(st.sampled_from(sorted(VALID[name])), unique=True, max_size=5)) if name != "info" else []:
        value = VALID[name][option]
        words += [option] if value is None else [option, str(draw(value))]
    if draw(st.integers(0, 7)) == 0:
        words[draw(st.integers(0, len(words) - 1))] = draw(st.text(st.characters(exclude_characters="/"), max_size=10))
    return words


WORDS = st.sampled_from(["train", "sample", "info", "digits", "--help", "--", "-", "-o", "=", "--steps=", "--steps=1e3", "--count=-1", "1.5", "nan", "inf",
                         "--weights", "--folder", "--out", "--out=.png", "..png", "run", "w.safetensors", "\0", "\udcff", "\x1b[2J", "9" * 400, "x" * 300])  # fmt: skip
WILD = st.lists(WORDS | st.text(st.characters(exclude_characters="/"), max_size=12), max_size=7)


def never_a_traceback(words: list[str]) -> bool:
    """Type it: a result or an error of one line, an exit code that says which. Whether it worked."""
    result = call(words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exc_info)
    assert result.exit_code in (0, 1, 2), words
    assert "Traceback" not in result.output
    if result.exit_code == 1 and result.stderr:
        assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1, words
    return result.exit_code == 0


def fuzz(examples: int) -> None:
    """Sensible and wild commands, as many of each."""
    options = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    worked = []

    def type_it(words: list[str]) -> None:
        for folder in ("new", "runs"):  # of earlier examples
            shutil.rmtree(folder, ignore_errors=True)
        worked.append(never_a_traceback(words))

    options(given(sensible())(type_it))()
    assert sum(worked) >= 0.6 * len(worked) and len(worked) >= examples / 2
    options(given(WILD)(type_it))()


def test_fuzz(idle):
    fuzz(60)


@pytest.mark.slow
def test_fuzz_long(idle):
    fuzz(2000)


def test_as_a_program(tmp_path):
    """The installed command, and the module run by name."""
    script = Path(sys.executable).with_name("unet-course")
    for words in ([script, "--version"], [sys.executable, "-m", "unet_course.cli", "--help"]):
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and "unet-course" in done.stdout
