"""The command line: what it says, what it writes, and that nothing typed at it ends in a traceback."""

import json
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
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from unet_course import cli, clip, data, latent_diffusion, training, vae
from unet_course.training import load_checkpoint, save_checkpoint
from unet_course.workbench import randomize

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


@pytest.fixture(autouse=True)
def any_precision():
    """Accelerate allows one precision in a process, and the recipes differ."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """An empty folder, a small model, the middle of a few digits, a checkpoint every two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "seconds_per_step", lambda name: 600.0)
    for name, value in dict(model_channels=32, channel_mult=(1,), attention_resolutions=()).items():
        monkeypatch.setitem(training.DIGITS_UNET, name, value)
    trainer, few = training.Trainer, {}
    for split in ("train", "test"):
        images, labels = data.digits(split)
        few[split] = images[:128, :, 8:20, 8:20], labels[:128]
    monkeypatch.setattr(training, "digits", few.get)
    for module in (training, vae, clip, latent_diffusion):
        monkeypatch.setattr(module, "Trainer", lambda *args, **options: trainer(*args, **options | {"every": 2}))
    return tmp_path


@pytest.fixture
def smaller(tiny, monkeypatch):
    """The models of Part IV, so small that some of their steps take a second."""
    monkeypatch.setitem(vae.EMOJI_VAE, "ch", 32)
    pictures = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(vae, "_pictures", lambda split: (pictures[:, :, :16, :16], pictures[:, :, :8, :8]))
    monkeypatch.setattr(vae, "emoji", lambda split: (pictures[:, :, :16, :16], []))
    monkeypatch.setitem(clip.EMOJI_CLIP, "image", dict(channels=(32,)))
    tokens = clip.small_tokenizer()(["fox, noto"] * 128, clip.EMOJI_CLIP["text"]["length"])
    monkeypatch.setattr(clip, "clip_data", lambda split: (pictures.repeat(4, 1, 1, 1)[:, :, :8, :8], tokens[:, None]))
    train = latent_diffusion.train_text_to_image
    small = dict(model_channels=32, channel_mult=[1], attention_resolutions=[1])
    for name in cli.PROMPTED:
        monkeypatch.setitem(latent_diffusion.RECIPES[name], "unet", latent_diffusion.RECIPES[name]["unet"] | small)
        monkeypatch.setitem(latent_diffusion.RECIPES[name], "vae", "pixels")
    monkeypatch.setattr(latent_diffusion, "train_text_to_image", lambda name, folder, **options: train(name, folder, number=64, **options))
    monkeypatch.setattr(latent_diffusion, "pretrained_clip", clip.emoji_clip)
    monkeypatch.setattr(latent_diffusion, "LOOKS", {name: prompts[:2] for name, prompts in latent_diffusion.LOOKS.items()})
    return tiny


def same(a: str, b: str) -> bool:
    """Whether two checkpoints are the same to the last bit."""
    (ours, state), (theirs, expected) = map(load_checkpoint, (a, b))
    return state == expected and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


OPTIONS = {
    "": ("train", "sample", "info", "bench", "--version", "unet-course sample digits"),
    "train": ("--folder", "--steps", "--seed", "--out", "--quiet", "runs/", "Ctrl-C", "how long", "last.safetensors", "best.safetensors", *cli.TRAININGS),
    "sample": ("--labels", "--count", "--steps", "--sampler", "--seed", "--guidance", "--negative", "--weights", "--out", "--quiet",
               "digits|shapes|emoji", "PROMPT", "samples.png", "replaced", *cli.SAMPLERS),
    "info": ("FILE", "installed"),
    "bench": ("--model", "--dtype", "--threads", "--rounds", "--json", "Ctrl-C", "how fast", "of the fastest matrix", *cli.DTYPES, *cli.BENCHED),
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help(command):
    """Every option is explained, within 80 columns, in letters that every terminal has."""
    text = succeed(f"{command} --help")
    assert text == succeed(f"{command} -h") and "<int" not in text
    assert all(word in text for word in OPTIONS[command])
    assert text.isascii() and max(map(len, text.splitlines())) <= 80


def test_version_and_no_command():
    from unet_course import __version__

    assert succeed("--version") == f"unet-course {__version__}\n"
    assert "Commands" in call("").output


def test_train_ship_sample_info(tiny):
    """The whole way: train, put the weights into a small file, draw with it, ask what it is."""
    said = succeed(f"{TRAIN} --out small.safetensors")
    assert "for 6 steps." in said and "Checkpoints: run." in said and f"Timing a few steps ...\nThis will take about 60 min here ({cli.where()})." in said
    assert re.findall(r"^step (\d+): loss \d\.\d+, on data held out \d\.\d+$", said, re.M) == ["2", "4", "6"]
    assert "Done: 6 steps" in said and said.endswith("unet-course sample digits --weights small.safetensors\n")
    assert Path("small.safetensors").stat().st_size < Path("run/last.safetensors").stat().st_size / 5

    succeed("sample digits --weights small.safetensors --steps 2 --out a.png")
    succeed("sample digits --weights run --steps 2 --out b.png")
    succeed("sample digits --weights run/last.safetensors --steps 2 --out c.png")
    a, b, c = (torch.tensor(list(Image.open(f"{name}.png").tobytes())) for name in "abc")
    assert b.equal(c) and (a - b).abs().float().mean() < 1  # 16 bits against 32

    parameters = sum(p.numel() for p in training.digits_unet().parameters())
    small, whole = succeed("info small.safetensors"), succeed("info run")
    assert all(f"{parameters:,}" in text and re.search(r"^steps +6 of 6$", text, re.M) and "seed 0" in text for text in (small, whole))
    assert "no such option" in refuse("sample digits --scale 2", 2).lower()
    assert "weights alone" in small and "float16" in small and "a training that is finished" in whole and "float32" in whole


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
    monkeypatch.setattr(training, "train_digits", None)
    assert "Done: 6 steps" in succeed(f"{TRAIN} --out w.safetensors") and Path("w.safetensors").exists()


def test_another_training_in_the_folder(tiny):
    """Another length, another seed, another model, no training at all: each is named, and nothing is changed."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    before = Path("run/last.safetensors").read_bytes()
    assert "begun with --steps 6" in refuse("train digits --folder run --steps 7")
    assert "begun with --seed 0" in refuse(f"{TRAIN} --seed 1")
    assert "would replace a checkpoint" in refuse(f"{TRAIN} --out run/last.safetensors")
    assert Path("run/last.safetensors").read_bytes() == before
    assert "another model ('digits')" in refuse("train vae --folder run --steps 6")

    tensors, state = load_checkpoint("run/last.safetensors")
    save_checkpoint("other/last.safetensors", tensors, state | {"config": {"model": "shapes"}})
    assert "another model ('shapes')" in refuse("train digits --folder other --steps 6")
    save_checkpoint("small/last.safetensors", *load_checkpoint("w.safetensors"))
    assert "no checkpoint of a training" in refuse("train digits --folder small --steps 6")
    wrong = {name: t[..., :1] if name == "model.model.out.2.weight" else t for name, t in tensors.items()}
    save_checkpoint("wrong/last.safetensors", wrong, state | {"step": 4})
    assert "holds another model: model.out.2.weight" in refuse("train digits --folder wrong --steps 6 --quiet")


def test_out_never_replaces_what_it_should_not(tiny):
    """A checkpoint of whatever training, by content or by name; a file that is not ours. Weights from an earlier time may go."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    shutil.copytree("run", "other")
    Path("other/last.safetensors").rename("other/kept.safetensors")
    shutil.copy(Path(training.__file__).parent / "assets/digits.npz", "theirs.safetensors")
    save_checkpoint("looks.safetensors", {"looks.2": torch.zeros(1)}, {})
    save_checkpoint("drawn.safetensors", {"looks.2": torch.zeros(1)}, {})
    before = {path: path.read_bytes() for path in Path().rglob("*.safetensors")}
    for name in ("run/best", "other/best", "other/kept", "other/last", "new/last", "LAST", "looks", "drawn", "theirs"):
        for folder in ("run", "another/one"):
            said = refuse(f"train digits --folder {folder} --steps 6 --out {name}.safetensors")
            assert "would replace a checkpoint" in said or "is something else than weights" in said
    assert before == {path: path.read_bytes() for path in Path().rglob("*.safetensors")}
    assert not Path("another").exists() and not Path("new").exists()  # refused commands leave nothing
    Path("empty.safetensors").touch()
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    succeed(f"{TRAIN} --quiet --out empty.safetensors")
    assert same("w.safetensors", "empty.safetensors")


def test_refused_commands_leave_nothing(tiny):
    for line in ("train digits --folder a/b --out c/d.txt", "sample digits --weights missing --out e/f.png", "train vae --folder g/h --out last.safetensors"):
        refuse(line)
    assert not list(tiny.iterdir())


def test_full_disk(tiny, monkeypatch):
    """Too little room is said before; if it runs out, which folder it was, and no half file stays behind."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
        assert "run: the checkpoints need up to 90 MB, and 10 MB are free" in refuse(TRAIN)
    save = training.save_checkpoint

    def full(path, *args):
        Path(f"{path}.part").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_checkpoint", full)
    result = call(f"{TRAIN} --quiet")
    assert result.exit_code == 1 and result.stderr == "Error: run: No space left on device\n" and not list(tiny.rglob("*.part"))
    monkeypatch.setattr(training, "save_checkpoint", save)
    succeed(f"{TRAIN} --quiet")
    monkeypatch.setattr(Image.Image, "save", lambda *args: full("x.png"))
    assert "x.png: No space left on device" in refuse("sample digits --weights run --steps 1 --out x.png")


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
    assert re.search(r"not a whole safetensors file.*choose another --folder$", refuse("train digits --folder cut").strip())
    shutil.copy("cut/last.safetensors", "cut/best.safetensors")
    assert all("Beside it lies cut/best.safetensors" in refuse(line) for line in ("train digits --folder cut", "info cut", "sample digits --weights cut"))
    assert "nothing was changed" not in refuse("info cut")
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
    monkeypatch.setattr(cli, "_shipped", lambda name: training.digits_unet())
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
    assert not never_a_traceback("sample digits --weights w.safetensors --guidance nan".split())
    save_checkpoint("none.safetensors", {"x": torch.zeros(1)}, {})
    assert "holds another model" in refuse("sample digits --weights none.safetensors")
    assert "other tensors" in succeed("info none.safetensors")
    save_checkpoint("odd.safetensors", {"x": torch.zeros(1)}, {"step": {"a": [1]}, "settings": 3, "config": {"model": "\x1b[31m\nred"}})
    assert "\x1b" not in (text := succeed("info odd.safetensors")) and "?[31m red" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "digits|vae|clip|shapes|emoji"),
        ("train cats", "cats"),
        ("train digits --steps 0", "--steps"),
        ("train digits --steps many", "'many' must be a whole number from 1 to"),
        ("train digits --steps 8,000", "'8,000'"),
        ("train digits --steps 8_0", "'8_0'"),
        ("train vae --steps \N{ARABIC-INDIC DIGIT THREE}", "--steps"),
        ("train digits --seed -1", "--seed"),
        ("train digits --seed 4294967296", "--seed"),
        ("train digits --speed 9", "--speed"),
        ("sample digits --labels 12x", "--labels"),
        ("sample digits --labels ''", "--labels"),
        ("sample digits --labels \N{ARABIC-INDIC DIGIT THREE}", "--labels"),
        ("sample digits --count 0", "--count"),
        ("sample digits --steps 1001", "--steps"),
        ("sample digits --sampler euler", "'euler' is not one of ddim, dpm_solver, heun, ddpm."),
        ("sample digits --guidance -1", "--guidance"),
        ("sample digits --guidance much", "--guidance"),
        ("sample digits --guidance nan", "'nan' must be a number from 0 to 20"),
        ("sample digits --negative blue", "--negative is for models with prompts"),
        ("sample shapes", "shapes needs at least one prompt"),
        ("sample emoji fox --labels 1", "--labels is for digits"),
        ("sample vae fox", "'vae' is not one of digits, shapes, emoji."),
        ("sample digits more", "more"),
        ("bench digits", "digits"),
        ("bench --model cats", "'cats' is not one of digits, vae, clip, shapes, emoji, unet5m."),
        ("bench --dtype float16", "'float16' is not one of float32, bfloat16."),
        ("bench --threads 0", "'0' must be a whole number from 1 to 1024"),
        ("bench --rounds none", "'none' must be a whole number from 1 to 1000"),
        ("bench --speed", "--speed"),
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

    def remember(model, labels, *options):
        asked.append((labels, *options[:-1]))
        return torch.linspace(-1, 1, len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    monkeypatch.setattr(training, "pretrained", lambda name: training.digits_unet())
    monkeypatch.setattr(cli, "draw", remember)
    said = succeed("sample digits --labels 2026 --count 13 --seed 5 --steps 7 --sampler heun --guidance 2.5")
    assert asked == [([2, 0, 2, 6] * 3 + [2], "heun", 7, 5, 2.5)] and said.startswith("samples.png: 13 digits, heun with 7 steps, guidance 2.5, ")
    sheet = torch.tensor(list(Image.open("samples.png").tobytes())).view(2, 30, 2, 10, 30, 2)
    assert (sheet == sheet[:, :, :1, :, :, :1]).all()  # every pixel is doubled
    cells = sheet[:, :, 0, :, :, 0].transpose(1, 2)  # row, column, height, width
    assert cells[..., 1:29, 1:29].flatten(2).amax(-1).flatten()[:13].sub(torch.linspace(0, 255, 13)).abs().max() <= 0.6
    assert cells[..., 0, :].max() == cells[..., :, 29].max() == cells[1, 3:].max() == 0


def test_samplers_and_seeds(tiny):
    """Each sampler has its own way, each seed its own digits; the same order gives the same file, however it is cut up."""
    succeed(f"{TRAIN} --quiet")
    model, labels = cli.read_model("digits", Path("run")), [0, 1, 2, 3]
    drawn = {name: cli.draw(model, labels, name, 3) for name in cli.SAMPLERS}
    assert len({x.sum().item() for x in drawn.values()}) == len(cli.SAMPLERS)
    assert all(cli.draw(model, labels, name, 3).equal(x) for name, x in drawn.items())
    assert not cli.draw(model, labels, "ddim", 3, seed=1).allclose(drawn["ddim"])
    assert not cli.draw(model, labels, "ddim", 3, guidance=2.0).allclose(drawn["ddim"])
    assert not cli.draw(model, labels, "ddim", 3, guidance=0.0).allclose(cli.draw(model, labels, "ddim", 3, guidance=0.1))
    assert cli.draw(model, labels, "ddim", 3, guidance=0.0).equal(cli.draw(model, labels[::-1], "ddim", 3, guidance=0.0))  # labels don't count
    assert cli.draw(model, labels, "ddim", 3, piece=3).allclose(drawn["ddim"], atol=1e-4)


def test_shipped_model_draws_digits(tmp_path, monkeypatch):
    """With the shipped weights: strokes on a black ground. And --quiet says nothing."""
    monkeypatch.chdir(tmp_path)
    assert succeed("sample digits --steps 8 --labels 17 --quiet") == ""
    pixels = torch.tensor(list(Image.open("samples.png").tobytes())).float()
    assert 0.02 < (pixels > 128).float().mean() < 0.4 and (pixels < 64).float().mean() > 0.5


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="labels is empty"):
        cli.draw(torch.nn.Identity(), [])
    with pytest.raises(ValueError, match="prompts is empty"):
        cli.draw_prompts(torch.nn.Identity(), [])


def test_sheet_of_pictures_elsewhere(tmp_path):
    """Pictures on a GPU are fetched; here something stands in for them."""

    class Elsewhere(list):
        detach = lambda self: self  # noqa: E731
        cpu = lambda self: torch.stack(list(self))  # noqa: E731

    cli.save_sheet(Elsewhere(torch.zeros(3, 1, 4, 4)), tmp_path / "a.png", columns=3)
    assert Image.open(tmp_path / "a.png").size == (36, 12)


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
    assert 0 < cli.seconds_per_step("digits") < 60 and torch.get_rng_state().equal(state) and not list(tiny.iterdir())


def test_duration():
    assert [cli.duration(s) for s in (0.2, 59.6, 100, 3000, 8000)] == ["0.2 s", "60 s", "2 min", "50 min", "2 h 13 min"]


@pytest.fixture
def idle(tiny, monkeypatch):
    """Commands that do everything but the work: thousands of them can be typed."""
    succeed(f"{TRAIN} --quiet --out w.safetensors")
    network = training.digits_unet()
    tensors, state = load_checkpoint("run/last.safetensors")

    def trainer(recipe):
        def train(folder, *, steps, seed, **options):
            now = {"step": steps, "settings": state["settings"] | {"decay": steps, "seed": seed}, "config": {"model": recipe.model}}
            save_checkpoint(folder / "last.safetensors", tensors, state | now)

        return train

    def picture(model, prompts, *options):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return torch.zeros(len(prompts), 3, 32, 32)

    monkeypatch.setattr(cli.Recipe, "trainer", trainer)
    monkeypatch.setattr(cli.Recipe, "steps", lambda recipe: 50)
    monkeypatch.setattr(cli, "seconds_per_step", lambda name: 0.1)
    monkeypatch.setattr(cli, "ship_weights", lambda name, folder, out: training.ship(folder / "last.safetensors", out))
    monkeypatch.setattr(cli, "_shipped", lambda name: network)
    monkeypatch.setattr(cli, "draw", lambda model, labels, *options: torch.zeros(len(labels), 1, 28, 28))
    monkeypatch.setattr(cli, "draw_prompts", picture)
    monkeypatch.setattr(cli, "bench_tasks", lambda name, dtypes: [[sleepy(kind)] for kind in dtypes])
    monkeypatch.setattr(cli, "peak_rate", lambda dtype: 1e9)


def sleepy(dtype: str = "float32", number: int = 4) -> cli.Task:
    """A task that takes no time: the product of two small matrices, 1,000 multiply-adds."""
    a = torch.ones(10, 10, dtype=getattr(torch, dtype))
    return cli.Task("forward", dtype, number, lambda: a @ a, weights=1_000_000)


PROMPTS = st.text(st.characters(exclude_categories=["C"]), max_size=12).map(lambda s: f"a {s}")
LABELS = st.text("0123456789", min_size=1, max_size=12)
FILES = st.sampled_from(["run", "w.safetensors", "run/last.safetensors", "run/best.safetensors", "run/../run", "missing"])
NEW = st.text("abc -_.äß'\"$;\\", min_size=1, max_size=8).map(lambda s: f"new/x{s}")
VALID = {
    "train": {
        "--folder": NEW, "--steps": st.integers(1, 10**7), "--seed": st.integers(0, 2**32 - 1),
        "--out": NEW.map(lambda s: f"{s}.safetensors"), "--quiet": None,
    },
    "sample": {
        "--count": st.integers(1, 60), "--steps": st.integers(1, 1000), "--sampler": st.sampled_from(list(cli.SAMPLERS)),
        "--seed": st.integers(0, 2**32 - 1), "--guidance": st.floats(0, 20), "--out": NEW.map(lambda s: f"{s}.png"), "--quiet": None,
    },
    "bench": {
        "--model": st.sampled_from(cli.BENCHED), "--dtype": st.sampled_from(cli.DTYPES), "--threads": st.integers(1, 2), "--rounds": st.integers(1, 9), "--json": None,
    },
}  # fmt: skip


@st.composite
def sensible(draw) -> list[str]:
    """A command as someone might mean it; one in eight has something else as one of its words."""
    name = draw(st.sampled_from(["train", "train", "sample", "sample", "info", "bench"]))
    first = {"train": st.sampled_from(list(cli.TRAININGS)), "sample": st.sampled_from(["digits", *cli.PROMPTED]), "info": FILES}
    model = draw(first[name]) if name in first else None
    words, valid = [name] if model is None else [name, model], VALID.get(name, {})
    if name == "sample":
        words += [] if model == "digits" else draw(st.lists(PROMPTS, min_size=1, max_size=3))
        valid = valid | ({"--labels": LABELS, "--weights": FILES} if model == "digits" else {"--negative": PROMPTS})
    for option in draw(st.lists(st.sampled_from(sorted(valid)), unique=True, max_size=5)) if valid else []:
        value = valid[option]
        words += [option] if value is None else [option, str(draw(value))]
    if draw(st.integers(0, 7)) == 0:
        words[draw(st.integers(0, len(words) - 1))] = draw(st.text(st.characters(exclude_characters="/"), max_size=10))
    return words


WORDS = st.sampled_from(["train", "sample", "info", "bench", "--model=vae", "--json", "--rounds=2", "digits", "vae", "shapes", "emoji", "--negative", "--help", "-h", "--", "-", "-o", "=", "--steps=", "--steps=1e3", "--count=-1", "1.5", "nan", "inf",
                         "--weights", "--folder", "--out", "--out=.png", "--out=last.safetensors", "..png", "run", "w.safetensors", "\0", "\udcff", "\x1b[2J", "9" * 400, "x" * 300])  # fmt: skip
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


def test_is_quick_to_import():
    """Help and refusals need no torch: what a command does not use it does not import. (The package's own `__init__` is left out here.)"""
    code = f"""
import sys, types
package = types.ModuleType("unet_course")
package.__path__, package.__version__ = [{str(Path(cli.__file__).parent)!r}], "0"
sys.modules["unet_course"] = package
from typer.testing import CliRunner
from unet_course.cli import app
for line in ("--version", "-h", "train -h", "sample -h", "bench -h", "sample shapes", "sample digits --steps 0", "bench --rounds 0"):
    assert CliRunner().invoke(app, line.split()).exit_code in (0, 2)
print(*[name for name in ("torch", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_interrupted_elsewhere(tiny, monkeypatch):
    """Ctrl-C outside a training, while something is imported, say: one line."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_model", stop)
    result = call("sample digits")
    assert (result.exit_code, result.stderr.strip()) == (130, "Stopped.")
    monkeypatch.setattr(cli, "describe_package", stop)
    assert call("info").exit_code == 130


def test_missing_package(tiny, monkeypatch):
    """What is not installed is named."""

    def absent(*args):
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(cli, "read_model", absent)
    assert "pip install tokenizers" in refuse("sample emoji fox")


def test_terminals_obey_no_file_name(tiny, monkeypatch):
    """Escapes in names are shown as question marks; a command to type spells them out."""
    monkeypatch.setattr(cli, "_shipped", lambda name: training.digits_unet())
    monkeypatch.setattr(cli, "draw", lambda model, labels, *options: torch.zeros(len(labels), 1, 28, 28))
    result = call(["sample", "digits", "--out", "a\x1b[31m  red.png"])
    assert result.stdout.startswith("a?[31m  red.png: 10 digits") and Path("a\x1b[31m  red.png").exists()
    typed = cli.command("a", "it's", ("--out", "x\x1b\n'\\\udcff"))
    assert typed.isprintable() and shutil.which("bash")
    done = subprocess.run(["bash", "-c", f"printf '<%s>' {typed}"], capture_output=True)
    assert done.stdout == b"<a><it's><--out><x\x1b\n'\\\xff>"


def test_one_thing_is_no_plural():
    assert [cli.plural(n, "digit") for n in (0, 1, 2000)] == ["0 digits", "1 digit", "2,000 digits"]
    assert [cli.size(n) for n in (263, 13_000, 2_326_390)] == ["0.3 kB", "13.0 kB", "2.3 MB"]


# The models of Part IV


@pytest.mark.parametrize("name", [name for name in cli.TRAININGS if name != "digits"])
def test_train_ship_info_of_part_four(smaller, name):
    """Train, stop, go on, write the weights, look at them; what does not fit is refused."""
    recipe, train = cli.TRAININGS[name], f"train {name} --steps 4 --folder run"
    said = succeed(f"{train} --out small.safetensors")
    assert f"Training the {name} model for 4 steps." in said and re.findall(r"^step (\d+): loss ", said, re.M) == ["2", "4"]
    assert ("pictures are made and encoded" in said) == (name in cli.PROMPTED) and ("data held out" in said) == (name not in cli.PROMPTED)
    assert "small.safetensors" in said.splitlines()[-1]
    state = load_checkpoint("small.safetensors")[1]
    assert state["config"]["model"] == recipe.model and ("scale_factor" in state) == (name == "vae") and ("quality" in state) == (name in cli.PROMPTED)
    assert "Done: 4 steps" in succeed(f"{train}")
    assert "begun with --steps 4" in refuse(f"train {name} --steps 5 --folder run")
    assert "begun with --seed 0" in refuse(f"{train} --seed 1")
    assert f"another model ('{recipe.model}')" in refuse("train digits --steps 4 --folder run")
    if name in cli.PROMPTED:
        assert "would replace a checkpoint" in refuse(f"{train} --out run/data.safetensors")
        assert "encoded pictures" in succeed("info run/data.safetensors") and "on its way" in succeed("info run/looks.safetensors")
    assert "holds another model" in refuse("sample digits --weights run")
    whole, alone = succeed("info run"), succeed("info small.safetensors")
    assert "that is finished" in whole and "weights alone" in alone and all(re.search(rf"^model +{recipe.model}$", text, re.M) for text in (whole, alone))


def test_interrupted_shapes_go_on_to_the_same_bits(smaller, monkeypatch):
    """As for digits: Ctrl-C in the fourth step, then what the message says is typed."""
    calls, loss = count(1), latent_diffusion.text_to_image_loss

    def interrupted(*args, **options):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(latent_diffusion, "text_to_image_loss", interrupted)
        result = call("train shapes --folder run --steps 6")
    assert result.exit_code == 130 and "Stopped; 2 of 6 steps are kept." in result.stderr
    succeed(result.stderr.splitlines()[-1].strip().removeprefix("unet-course ") + " --quiet")
    succeed("train shapes --folder unbroken --steps 6 --quiet")
    assert same("run/last.safetensors", "unbroken/last.safetensors")


def test_weights_without_drawings(smaller):
    """A training that ended before the first drawing gives its weights all the same."""
    succeed("train shapes --steps 1 --folder run --out w.safetensors --quiet")
    assert not Path("run/looks.safetensors").exists() and load_checkpoint("w.safetensors")[1]["step"] == 1


def test_sample_prompts(smaller, monkeypatch):
    """Prompts, number, seeds, guidance and negative prompt; in colour, on white."""
    succeed("train shapes --steps 2 --folder run --quiet --out w.safetensors")
    line = "sample shapes 'a large red circle' 'a small blue ring' --weights run --steps 4"
    said = succeed(f"{line} --count 5 --seed 3 --out a.png")
    assert said.startswith("a.png: 5 pictures, dpm_solver with 4 steps, guidance 3, ")
    sheet = torch.tensor(list(Image.open("a.png").tobytes())).view(3, 34, 4, 2, 34, 4, 3)
    assert (sheet == sheet[:, :, :1, :, :, :1]).all() and (sheet[:, 0] == 255).all() and (sheet[2, :, :, 1] == 255).all()
    model = cli.read_model("shapes", Path("run"))
    prompts = ["a large red circle", "a small blue ring"] * 2
    randomize(model.unet)  # so little trained, it would hardly listen
    assert cli.draw_prompts(model, prompts, steps=2, seed=3, piece=3).allclose(model(prompts, steps=2, seed=3), atol=1e-5)
    read, drawn = cli.read_model, [Path("a.png").read_bytes()]
    monkeypatch.setattr(cli, "read_model", lambda *args: model)
    for more in ("", "--seed 4", "--guidance 1", "--negative circle", "--sampler ddim", "--steps 3", "--sampler ddpm", "--sampler heun"):
        succeed(f"{line} {more} --out b.png")
        drawn.append(Path("b.png").read_bytes())
    assert len(set(drawn)) == len(drawn)
    monkeypatch.setattr(cli, "read_model", read)
    for weights in ("run", "w.safetensors"):  # the weights in half precision are taken, too
        succeed(f"{line.replace('run', weights)} --out {weights[0]}.png")
    whole, half = (torch.tensor(list(Image.open(f"{name}.png").tobytes())).float() for name in "rw")
    assert (whole - half).abs().mean() < 2
    assert "holds another model ('t2i_shapes', not 't2i_emoji')" in refuse(f"{line.replace('shapes', 'emoji')}")
    monkeypatch.setattr(latent_diffusion.FoldedPixels, "decode", lambda self, z: z * torch.nan)
    assert "not finite" in refuse(line)


def test_a_file_that_does_not_say_how_its_model_is_built(tiny):
    for config in ({"model": "t2i_emoji"}, {"model": "t2i_emoji", **dict.fromkeys(("unet", "text", "tokenizer", "vae", "schedule", "prediction", "scale_factor"), {})}):
        save_checkpoint("odd.safetensors", {"ema.x": torch.zeros(1)}, {"config": config})
        assert "say how its model is built" in refuse("sample emoji fox --weights odd.safetensors")


@pytest.mark.parametrize("name", cli.PROMPTED)
def test_shipped_prompted_models(tmp_path, monkeypatch, name):
    """They draw what they are told; a version of the package without them says what to do."""
    monkeypatch.chdir(tmp_path)
    file = cli.TRAININGS[name].shipped
    if file in data.checksums():
        assert succeed(f"sample {name} 'a large red circle at the center' --steps 4 --quiet") == ""
        pixels = torch.tensor(list(Image.open("samples.png").tobytes())).float()
        assert pixels.std() > 20
    monkeypatch.delitem(data.checksums(), file, raising=False)
    said = refuse(f"sample {name} fox --out new/x.png")
    assert f"'unet-course train {name}'" in said and f"--weights runs/t2i_{name}" in said and not Path("new").exists()
    assert re.search(rf"^{file} +not in this version; 'unet-course train {name}' makes it$", succeed("info"), re.M)


# bench. No test here looks at a time: they are the machine's.


def test_bench_table(idle):
    """One line for each model and type, and what everything was measured against."""
    said = succeed("bench --model digits --model clip --dtype float32 --dtype bfloat16 --rounds 4")
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["digits", "digits", "clip", "clip"] and max(map(len, lines[start : start + 5])) <= 80
    assert [line.count("float32") for line in lines[start + 1 : start + 5]] == [1, 0, 1, 0]
    assert lines[-2:] == [f"Peak, a matrix multiplication in {dtype}: 1.0 billion multiply-adds per second." for dtype in ("float32", "bfloat16")]
    assert "1 MB" in lines[start + 1] and f"torch: {torch.__version__}" in said and cli.where() in said and said.isascii()


def test_bench_json(idle):
    """The same for a program: every model by default, every time, and what follows from it."""
    found = json.loads(succeed("bench --json --rounds 3"))
    assert set(found) == {"machine", "rounds", "peak_multiply_adds_per_second", "rows"} and found["rounds"] == 3
    assert [row["model"] for row in found["rows"]] == list(cli.BENCHED) and found["peak_multiply_adds_per_second"] == {"float32": 1e9}
    for row in found["rows"]:
        assert len(row["seconds"]) == 3 and row["median"] == sorted(row["seconds"])[1] > 0 and row["per_second"] == row["number"] / row["median"]
        assert row["multiply_adds"] == 1000 and row["share_of_peak"] == 1000 / row["median"] / 1e9 and 1 < row["megabytes"] < 1.01


def test_bench_one_round_and_names_twice(idle):
    """Nothing can be said about a spread; a model named twice is measured once."""
    rows = [line for line in succeed("bench --model vae --model vae --rounds 1").splitlines() if line.startswith("vae ")]
    assert len(rows) == 1 and " - " in rows[0]


def test_bench_threads_are_given_back(idle, monkeypatch):
    """Those that were asked for compute, and afterwards those from before; after an error, too."""
    before, used = torch.get_num_threads(), []

    def tasks(name, dtypes):
        used.append(torch.get_num_threads())
        if name == "clip":
            raise ValueError("no")
        return [[sleepy()]]

    monkeypatch.setattr(cli, "bench_tasks", tasks)
    said = succeed(f"bench --model digits --threads {before + 1}")
    assert used == [before + 1] and torch.get_num_threads() == before and f"{before + 1} threads" in said
    assert call(f"bench --model clip --threads {before + 1}").exit_code == 1 and torch.get_num_threads() == before


def test_bench_interrupted(idle, monkeypatch):
    """Ctrl-C: exit code 130, one line; the rows until then stay."""

    def tasks(name, dtypes):
        if name == "clip":
            raise KeyboardInterrupt
        return [[sleepy()]]

    monkeypatch.setattr(cli, "bench_tasks", tasks)
    result = call("bench --model digits --model clip")
    assert (result.exit_code, result.stderr.strip()) == (130, "Stopped.") and "\ndigits " in result.stdout


@pytest.mark.parametrize("name", cli.BENCHED)
def test_bench_tasks(name, monkeypatch):
    """What is timed is what the table says: so many at once, in this type, with this network's weights; the training is the recipe's."""
    if name in cli.PROMPTED and cli.TRAININGS[name].shipped not in data.checksums():
        pytest.skip("not in this version of the package")
    before = torch.get_rng_state()
    forward, (step,) = cli.bench_tasks(name, ["bfloat16"])
    assert torch.get_rng_state().equal(before)
    assert [task.dtype for task in forward] == ["bfloat16"] * len(forward) and all(task.number >= 1 for task in forward)
    answer = forward[0].run()
    answer = getattr(answer, "mean", answer) if name == "vae" else answer
    assert answer.shape[0] == forward[0].number and answer.dtype == torch.bfloat16 and not answer.requires_grad
    assert step.what == "training step" and step.dtype == ("bfloat16" if name in ("vae", "clip", "emoji") else "float32")
    if name != "unet5m":
        model, _, made, settings = cli.made_up(name)
        assert step.number == settings["batch_size"] == len(made[0]) and step.weights == sum(t.numel() * 4 for t in model.state_dict().values() if t.is_floating_point())
    whole = [task.number for task in forward if task.what[0].isdigit()]
    assert whole == ([1, 8] if name in ("digits", *cli.PROMPTED) else [])


def test_bench_measures(tiny, monkeypatch):
    """With nothing replaced but the network: more work is counted for a training step than for a call, and in a whole digit 25 calls."""
    monkeypatch.setattr(cli, "_shipped", lambda name: training.digits_unet().eval().requires_grad_(False))
    found = json.loads(succeed("bench --model digits --rounds 1 --json"))
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["forward", "1 whole digit", "8 whole digits", "training step"]
    work = {what: row["multiply_adds"] / row["number"] for what, row in rows.items()}
    assert 2.5 < work["training step"] / work["forward"] < 3.5 and 24 < work["1 whole digit"] / work["forward"] < 26
    assert rows["training step"]["megabytes"] > rows["forward"]["megabytes"] > 0 and all(row["share_of_peak"] > 0 for row in rows.values())
    assert found["peak_multiply_adds_per_second"]["float32"] > 0


class Asked(Exception):
    """A trainer was asked for."""


@pytest.mark.parametrize("name", cli.TRAININGS)
def test_rehearsals_are_like_the_recipes(name, monkeypatch, tmp_path):
    """The throwaway training has the model and the batches of the real one, and its default length is that of the recipe."""
    home, recipe, seen = {"digits": training, "vae": vae, "clip": clip}.get(name, latent_diffusion), cli.TRAININGS[name], []
    trainer = cli.rehearsal(name)
    if name == "vae":
        monkeypatch.setattr(vae, "_pictures", lambda split: ())
    if name == "clip":
        monkeypatch.setattr(clip, "clip_data", lambda split: ())
    monkeypatch.setattr(latent_diffusion, "training_data", lambda *args: (torch.zeros(1, 8, 2, 2), None))

    def remember(*args, **options):
        seen.append((args, options))
        raise Asked

    monkeypatch.setattr(home, "Trainer", remember)
    monkeypatch.setattr(latent_diffusion, "pretrained_clip", clip.emoji_clip)
    monkeypatch.setitem(latent_diffusion.VAES, "emoji", vae.emoji_vae)
    with pytest.raises(Asked):
        recipe.trainer()(tmp_path)
    (model, *_), options = seen[0]
    assert options["batch_size"] == trainer.settings["batch_size"] and options.get("mixed_precision", "no") == trainer.settings["precision"]
    assert options["decay"] == recipe.steps() and options["config"]["model"] == recipe.model
    shapes = [{key: t.shape for key, t in m.state_dict().items()} for m in (model, trainer.model)]
    assert shapes[0] == shapes[1]
    most = 16 * sum(p.numel() for p in model.parameters()) * (2 if name in cli.PROMPTED else 3)
    assert recipe.megabytes * 1e6 > most  # weights, their average, two moments; last, best, and the one that is being written
    before = torch.get_rng_state()
    trainer.fit(1, progress=False)
    assert torch.get_rng_state().equal(before) and not list(tmp_path.iterdir())
