"""The table of `make bench`: it compares equals, goes on where it stopped, and writes only between its marks. No test looks at a time."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("measure", "rows", "table", "training", "unet")


@pytest.fixture(scope="module")
def table():
    """The script as a module; its neighbours have common names, so they are forgotten afterwards."""
    pytest.importorskip("diffusers")
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import table

        yield table
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules |= {name: module for name, module in before.items() if module is not None}


@pytest.fixture
def alone(table, monkeypatch):
    """Without the processes for peak memory, which take seconds each, and with a peak that need not be measured."""
    monkeypatch.setattr(table, "peak_memory", lambda *words: 100.0)
    monkeypatch.setattr(table, "peak_rates", lambda dtype: dict(product=5e8, peak=1e9))
    return table


@pytest.fixture
def files(tmp_path, table):
    """Where a run keeps rows and writes its table."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    return ["--file", str(tmp_path / "rows.jsonl"), "--readme", str(readme)]


@pytest.mark.parametrize("name", ["tiny", "tiny-train", "tiny-decode", "tiny-text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_weights_same_answers_same_work(alone, name, dtype):
    """Each library computes the same function, with as many multiply-adds."""
    row = alone.HIDDEN[name]
    sides = alone.built(name, dtype)
    assert set(sides) == set(row.sides()) >= {"ours"}
    found = alone.describe(name, sides)
    for who in set(row.same) & set(found):
        assert found[who]["difference"] < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
        assert found[who]["parameters"] == found["ours"]["parameters"] and found[who]["multiply_adds"] == found["ours"]["multiply_adds"] > 0
    for who, side in sides.items():
        assert {p.dtype for p in side.network.parameters()} == {torch.float32 if side.autocast else alone.DTYPES[dtype]}


def test_the_walk_is_the_same(alone):
    """The course's model and the loop of diffusers' parts draw the same picture, with the same work."""
    sides = alone.built("picture", "float32")
    found = alone.describe("picture", sides)
    assert found["diffusers"]["difference"] < 1e-3
    assert found["diffusers"]["multiply_adds"] == pytest.approx(found["ours"]["multiply_adds"], rel=0.02)


def test_full_size_fits(table):
    """Every row of the real table has a partner for each tensor; shapes only."""
    from rows import SD1, CLIPTextModel, DiffusersUNet, UNetModel, give_weights, their_text

    with torch.device("meta"):
        ours, theirs = UNetModel(**SD1["unet"]), DiffusersUNet(SD1["unet"])
        give_weights(ours, theirs.unet, "unet", SD1["unet"])
        give_weights(CLIPTextModel(**SD1["text"]), their_text(SD1["text"], None), "text", SD1["text"])


def test_settings(alone):
    """Channels-last and back; every setting is tried on every side, and what does not work is said."""
    sides = alone.built("tiny", "float32")
    for name, (memory, compiled) in alone.SETTINGS.items():
        if not compiled:
            alone.put_on(sides["ours"], name)
            assert all(p.is_contiguous(memory_format=memory) for p in sides["ours"].network.parameters() if p.ndim == 4)
    tried = alone.try_settings(sides, False, ["eager", "channels last"], 1)
    assert all(set(settings) == {"eager", "channels last"} for settings in tried.values())
    for train in (False, True):  # packed: ours, and for drawing
        tried = alone.try_settings(sides, train, ["eager", "packed"], 1)
        assert {who for who, times in tried.items() if "packed" in times} == (set() if train else {"ours"})
    for setting, packed in (("packed", True), ("eager", False)):
        alone.put_on(sides["ours"], setting)
        assert any("forward" in m.__dict__ for m in sides["ours"].network.modules()) == packed
    assert alone.fastest({"eager": 1.0, "channels last": 0.99}) == "eager" != alone.fastest({"eager": 1.0, "compiled": 0.5, "x": "Error: no"})


def test_broken_setting_is_left_out(alone, monkeypatch):
    def broken(side, setting):
        raise RuntimeError("no compiler")

    sides = alone.built("tiny-text", "float32")
    monkeypatch.setattr(alone, "put_on", broken)
    assert all(settings == {"compiled": "RuntimeError: no compiler"} for settings in alone.try_settings(sides, False, ["compiled"], 1).values())


def test_rows_are_kept_and_not_measured_again(alone, files, monkeypatch, capsys):
    """Interrupted and called again, it goes on; the table has every row."""
    words = ["--rows", "tiny-text", "tiny-decode", "--dtypes", "float32", "--rounds", "2", "--eager", *files]
    measured, measure = [], alone.measure

    def once(name, *rest):
        if name == "tiny-decode" and "tiny-decode" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return measure(name, *rest)

    monkeypatch.setattr(alone, "measure", once)
    assert alone.main(words) == 130 and measured == ["tiny-text", "tiny-decode"] and "goes on" in capsys.readouterr().err
    assert alone.main(words) == 0 and measured == ["tiny-text", "tiny-decode", "tiny-decode"]
    assert alone.main(words) == 0 and len(measured) == 3
    assert alone.main([*words, "--again"]) == 0 and len(measured) == 5
    path, readme = Path(files[1]), Path(files[3])
    assert len(path.read_text().splitlines()) == 4
    text = readme.read_text()
    assert text.startswith(f"before\n{alone.START}\n") and text.endswith(f"\n{alone.END}\nafter\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("| a tiny")]
    assert len(lines) == 2 and all(line.count("|") == len(alone.HEAD) + 1 for line in lines) and "100, 100" in lines[0]
    path.write_text(path.read_text() + '{"row": "tiny-')  # cut off by a crash
    assert alone.main(words) == 0 and "damaged" in capsys.readouterr().err
    assert alone.main(["--rows", *files]) == 0 and readme.read_text() == text


def test_record(alone):
    """A row holds all that the table says, and says where it is from."""
    record = json.loads(json.dumps(alone.measure("tiny-text", "float32", 3, ["eager", "channels last"])))
    assert {"row", "dtype", "machine", "date", "versions", "rounds", "settings", "peak", "product", "sides"} == set(record)
    for side in record["sides"].values():
        assert len(side["eager"]) == len(side["best"]) == 3 and set(side["tried"]) == {"eager", "channels last"} and side["setting"] in side["tried"]
    cells = alone.line(record, "transformers")
    assert len(cells) == len(alone.HEAD) and cells[2] == "transformers" and all(cells)


def test_imports(alone):
    """Fresh interpreters; ours alone does not import torch."""
    record = alone.measure_imports(1)
    assert {"pass", "import torch", "import unet_course", "from unet_course import UNetModel", "import diffusers"} <= set(record["sides"])
    assert record["sides"]["import unet_course"]["mib"] < record["sides"]["import torch"]["mib"]
    assert "| Python alone |" in alone.markdown([record])


def test_marks(alone, tmp_path):
    """Without its marks, or with two, a file is left alone."""
    for text in ("", alone.START, f"{alone.END}{alone.START}", 2 * f"{alone.START}{alone.END}"):
        (tmp_path / "x.md").write_text(text)
        with pytest.raises(ValueError, match="must have the lines"):
            alone.write_between(tmp_path / "x.md", "table")
        assert (tmp_path / "x.md").read_text() == text
    for path in (BENCHMARKS / "README.md",):
        assert path.read_text().count(alone.START) == path.read_text().count(alone.END) == 1


@pytest.mark.parametrize("words", [["--rows", "cats"], ["--rounds", "0"], ["--dtypes", "float16"], ["--threads", "-1"]])
def test_wrong_words(alone, words, capsys):
    with pytest.raises(SystemExit) as stop:
        alone.main(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_quick_is_small(table):
    """The rows of --quick are those without Stable Diffusion's sizes."""
    names = {name for name, dtype in table.tasks(table.parse(["--quick"]))}
    assert names == {"unet-5m", "train-5m", "picture", "import"} < {*table.ROWS, "import"}


@pytest.mark.slow
def test_memory_of_a_process(table):
    """Measured in a process of its own; more than the weights."""
    mib = table.peak_memory(str(BENCHMARKS / "table.py"), "--memory", "tiny", "ours", "float32", "eager")
    assert 1 < mib < 1000
