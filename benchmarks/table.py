"""One table: the course against diffusers, transformers and denoising-diffusion-pytorch, with the same weights or number of parameters.

    python benchmarks/table.py                                  # everything; nothing else should run. Ctrl-C stops, the same command goes on
    python benchmarks/table.py --quick                          # two minutes: the small rows, printed only
    python benchmarks/table.py --rows decode-512 --again        # measure a row anew
    python benchmarks/table.py --rows                           # measure nothing; write the table from the file

Each row is measured twice: as everybody calls it (eager), and in each side's fastest setting, found by trying channels-last and `torch.compile`, and for ours packed weights. All run in
one process in turns; times are medians, ± is half the distance of their quartiles, ratios are medians over neighbouring runs with their quartiles. Peak
memory is that of a process of its own for each, in its fastest setting but not compiled. Rows are kept in table.jsonl, with every single time.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import alternate, machine, own_peak, peak_memory, summary
from rows import HIDDEN, IMPORTS, LUCIDRAINS, ROWS, Side, job, warm_imports

from unet_course.figures import typeset
from unet_course.speed import best_time, machine_peaks, measure_work, pack, unpack
from unet_course.workbench import best_device, count_parameters, relative_error

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS = {  # name: memory format, compiled
    "eager": (torch.contiguous_format, False),
    "channels last": (torch.channels_last, False),
    "compiled": (torch.contiguous_format, True),
    "compiled, channels last": (torch.channels_last, True),
    "packed": (torch.contiguous_format, False),
}
PACKED = "packed"  # by `unet_course.speed.pack`, as `make_fast` does it: for drawing, on a processor; the peers have nothing of the kind
MARGIN = 0.03  # who is not faster by this share is not faster
START, END = "<!-- table: begin -->", "<!-- table: end -->"


# Measuring


def versions() -> dict[str, str]:
    """Of those who are compared."""
    found = {}
    for name in ("torch", "diffusers", "transformers", "denoising-diffusion-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cast(side: Side, dtype: str) -> Side:
    """On the device, in a precision; where layers cannot be cast the weights stay as they are."""
    device = best_device()
    side.network.to(device, torch.float32 if side.autocast else DTYPES[dtype])
    side.inputs = tuple(x.to(device, DTYPES[dtype]) if x.is_floating_point() else x.to(device) for x in side.inputs)
    return side


def put_on(side: Side, setting: str) -> None:
    """Order channels, compile or stop compiling."""
    memory, compiled = SETTINGS[setting]
    unpack(side.network)
    side.hot._compiled_call_impl = None
    side.network.to(memory_format=memory)
    side.inputs = tuple(x.contiguous(memory_format=memory) if x.ndim == 4 else x for x in side.inputs)
    if compiled:
        side.hot.compile()
    if setting == PACKED and not pack(side.network):
        raise ValueError("nothing to pack")


def built(name: str, dtype: str) -> dict[str, Side]:
    """All sides of a row, with the same weights where that is possible."""
    row = (ROWS | HIDDEN)[name]
    ours = row.build("ours", None)
    sides = {"ours": ours} | {who: row.build(who, ours.network) for who in row.sides() if who != "ours"}
    return {who: cast(side, dtype) for who, side in sides.items()}


def answer(run: object) -> torch.Tensor:
    """What a call gives."""
    return run().detach().float()


def describe(name: str, sides: dict[str, Side]) -> dict[str, dict]:
    """Of each side: parameters, multiply-adds, and how far its answer is from ours where weights are the same."""
    row, found = (ROWS | HIDDEN)[name], {}
    answers = {who: answer(job(side, False)) for who, side in sides.items() if who in ("ours", *row.same)}  # before a step changes the weights
    for who, side in sides.items():
        found[who] = dict(parameters=count_parameters(side.network), multiply_adds=measure_work(job(side, row.train)).multiply_adds)
        if who in answers and who != "ours":
            found[who]["difference"] = relative_error(answers[who], answers["ours"])
    return found


def peak_rates(dtype: str) -> dict[str, float]:
    """Multiply-adds per second of this machine's matrix multiplication, at best: asked for with `@`, and in the faster of two ways."""
    sizes, device, kind = (4096, 8192) if torch.cuda.is_available() else (1024, 2048), best_device(), DTYPES[dtype]
    pairs = [torch.randn(2, n, n, device=device).to(kind) for n in sizes]
    product = max(n**3 / best_time(lambda: pair[0] @ pair[1]) for n, pair in zip(sizes, pairs))
    return dict(product=product, peak=max(product, machine_peaks([kind], device, sizes).multiply_adds[kind]))


def try_settings(sides: dict[str, Side], train: bool, names: Iterable[str], rounds: int) -> dict[str, dict]:
    """For each setting the median time of each side; a text where it does not work."""
    tried = {who: {} for who in sides}
    for name in names:
        jobs = {}
        for who, side in sides.items():
            if name == PACKED and (who != "ours" or train):
                continue
            try:
                torch._dynamo.reset() if not jobs else None
                put_on(side, name)
                jobs[who] = job(side, train)
                jobs[who]()
            except Exception as error:  # no compiler, no kernel: then it is not a setting here
                jobs.pop(who, None)
                tried[who][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        for who, seconds in alternate(jobs, rounds, warmup=1).items() if jobs else ():
            tried[who][name] = statistics.median(seconds)
    return tried


def fastest(tried: dict[str, object]) -> str:
    """The fastest setting, or the first where none is faster by more than a trifle."""
    times = {name: seconds for name, seconds in tried.items() if isinstance(seconds, float)}
    plain, best = next(iter(times)), min(times, key=times.get)
    return best if times[best] < (1 - MARGIN) * times[plain] else plain


def measure(name: str, dtype: str, rounds: int, settings: list[str]) -> dict:
    """One row."""
    row = (ROWS | HIDDEN)[name]
    record = dict(row=name, dtype=dtype, machine=machine(), date=date.today().isoformat(), versions=versions(), rounds=rounds, settings=settings)
    torch._dynamo.reset()
    sides = built(name, dtype)
    found, rates = describe(name, sides), peak_rates(dtype)
    for who, seconds in alternate({who: job(side, row.train) for who, side in sides.items()}, rounds).items():
        found[who] |= dict(setting="eager", eager=seconds, best=seconds)
    if len(settings) > 1:  # the first is eager
        tried = try_settings(sides, row.train, settings, max(3, rounds // 3))
        chosen = {who: fastest(tried[who]) for who in sides}
        torch._dynamo.reset()
        for who, side in sides.items():
            put_on(side, chosen[who])
        seconds = alternate({who: job(side, row.train) for who, side in sides.items()}, rounds)
        for who in sides:
            found[who] |= dict(setting=chosen[who], best=seconds[who], tried=tried[who])
    record |= {name: max(rate, rates[name]) for name, rate in peak_rates(dtype).items()}
    del sides
    gc.collect()
    for who in found:
        layout = found[who]["setting"].replace("compiled, ", "").replace("compiled", "eager")
        words = ("--threads", str(torch.get_num_threads()))
        found[who]["mib"] = peak_memory(__file__, "--memory", name, who, dtype, layout, *words)
        found[who]["mib_eager"] = found[who]["mib"] if layout == "eager" else peak_memory(__file__, "--memory", name, who, dtype, "eager", *words)
    return record | {"sides": found}


def memory_of(name: str, who: str, dtype: str, setting: str) -> float:
    """Peak memory of a few runs in this process, weights included, less what it held before."""
    row = (ROWS | HIDDEN)[name]
    warm_imports()
    torch.nn.functional.conv2d(torch.ones(1, 8, 8, 8), torch.ones(8, 8, 3, 3))  # wakes the libraries
    before = own_peak()
    wide = who == LUCIDRAINS or name.startswith("picture")  # computes under autocast; reads its weights from a file
    torch.set_default_dtype(torch.float32 if wide else DTYPES[dtype])  # or the weights in float32 would be the peak
    side = row.build(who, None)
    torch.set_default_dtype(torch.float32)
    cast(side, dtype)
    put_on(side, setting)
    run = job(side, row.train)
    for _ in range(3):
        run()
    return own_peak() - before


ASK = """
import resource, sys
def peak():
    if sys.platform == "linux":
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(peak())
"""


def measure_imports(rounds: int) -> dict:
    """How long a fresh Python needs for an import, and how much memory it then has held."""
    record = dict(row="import", dtype="", machine=machine(), date=date.today().isoformat(), versions=versions(), rounds=rounds)
    statements = {"pass": "sys"} | IMPORTS
    runs = {}
    for statement, module in statements.items():
        if find_spec(module):
            command = [sys.executable, "-c", f"import warnings; warnings.filterwarnings('ignore'); {statement}"]
            runs[statement] = lambda command=command: subprocess.run(command, check=True, capture_output=True)
    for statement in list(runs):  # denoising-diffusion-pytorch imports torchvision, which may be missing
        try:
            runs[statement]()
        except subprocess.CalledProcessError:
            del runs[statement]
    sides = {who: dict(best=seconds) for who, seconds in alternate(runs, rounds, warmup=1).items()}
    for statement in sides:
        done = subprocess.run([sys.executable, "-c", f"{statement}\n{ASK}"], check=True, capture_output=True, text=True)
        sides[statement]["mib"] = float(done.stdout.splitlines()[-1])
    return record | {"sides": sides}


# Keeping rows


def read_rows(path: Path) -> list[dict]:
    """All records of a file; a line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path}: left out a damaged line", file=sys.stderr)
    return records


def key(record: dict) -> tuple[str, ...]:
    """What makes a row another one."""
    return record["row"], record["dtype"], record["machine"]


def latest(records: list[dict]) -> dict[tuple[str, ...], dict]:
    """Of each row the last record."""
    return {key(record): record for record in records}


def is_there(records: dict[tuple[str, ...], dict], name: str, dtype: str) -> bool:
    """Whether a row was measured on this machine, with all who are installed now."""
    record = records.get((name, dtype, machine()))
    wanted = () if name == "import" else (ROWS | HIDDEN)[name].sides()
    return record is not None and set(wanted) <= record["sides"].keys()


def append(path: Path, record: dict) -> None:
    """Keep a row."""
    text = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(("\n" if text and not text.endswith("\n") else "") + json.dumps(record) + "\n")


# Showing rows


def duration(seconds: list[float]) -> str:
    """Median and half the distance of the quartiles."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    unit, scale = ("s", 1) if median >= 1 else ("ms", 1000)
    value = median * scale
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit} ± {50 * (high - low) / median:.0f} %"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median over neighbouring runs, with quartiles."""
    found = summary(ours, theirs)
    return f"**{found['ratio']:.2f}** ({found['low']:.2f}–{found['high']:.2f})"


def share(record: dict, who: str) -> str:
    """Of the peak of matrix multiplication, in the best setting, and of that of `@`."""
    side = record["sides"][who]
    rate = 100 * side["multiply_adds"] / statistics.median(side["best"])
    return f"{rate / record['peak']:.0f} % ({rate / record['product']:.0f} %)"


def line(record: dict, peer: str) -> list[str]:
    """One of ours against one of theirs."""
    ours, theirs = record["sides"]["ours"], record["sides"][peer]
    if "difference" in theirs:
        difference = typeset(f"{theirs['difference']:.0e}")
    else:
        difference = f"other weights, {theirs['parameters'] / ours['parameters']:.2f} of ours in number"
    best = [f"{duration(side['best'])}, {side['setting']}" for side in (ours, theirs)]
    return [
        (ROWS | HIDDEN)[record["row"]].what, record["dtype"], peer, duration(ours["eager"]), duration(theirs["eager"]), ratio(ours["eager"], theirs["eager"]),
        *best, ratio(ours["best"], theirs["best"]), f"{share(record, 'ours')}, {share(record, peer)}",
        *(f"{ours[key]:.0f}, {theirs[key]:.0f}: **{ours[key] / theirs[key]:.2f}**" for key in ("mib_eager", "mib")), difference,
    ]  # fmt: skip


HEAD = ["what", "dtype", "against", "ours, eager", "theirs, eager", "ours / theirs, eager",
        "ours, best setting", "theirs, best setting", "ours / theirs, best settings",
        "of the peak (of `@`): ours, theirs", "peak MiB, eager: ours, theirs, ratio", "peak MiB, best settings", "difference of answers"]  # fmt: skip
IMPORT_HEAD = ["statement", "time", "/ `import torch`", "peak MiB"]


def grid(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return ["", *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)), ""]


def import_lines(record: dict) -> list[list[str]]:
    """A line for each statement."""
    torch_alone, lines = record["sides"]["import torch"]["best"], []
    for who, side in record["sides"].items():
        name = f"`{who}`" if who != "pass" else "Python alone"
        lines.append([name, duration(side["best"]), ratio(side["best"], torch_alone), f"{side['mib']:.0f}"])
    return lines


def markdown(records: Iterable[dict]) -> str:
    """The table of each machine."""
    text, records = [], list(records)
    order = {name: place for place, name in enumerate((ROWS | HIDDEN))}
    for where in dict.fromkeys(record["machine"] for record in records):
        here = [record for record in records if record["machine"] == where]
        rows = sorted((r for r in here if r["row"] in order), key=lambda r: (order[r["row"]], list(DTYPES).index(r["dtype"])))
        dates, found = sorted({r["date"] for r in here}), {name: number for r in here for name, number in r["versions"].items()}
        peaks = {dtype: [max((r[way] for r in rows if r["dtype"] == dtype), default=0) for way in ("peak", "product")] for dtype in DTYPES}
        about = [where, " to ".join(dict.fromkeys((dates[0], dates[-1]))), *(f"{name} {number}" for name, number in found.items() if name != "torch")]
        about += [f"matrix multiplication in {dtype} at best {fast / 1e9:.0f} G multiply-adds per second, with `@` {at / 1e9:.0f}" for dtype, (fast, at) in peaks.items() if fast]
        text.append("; ".join(about) + ".")
        if rows:
            text += grid(HEAD, [line(record, peer) for record in rows for peer in record["sides"] if peer != "ours"])
        for record in (r for r in here if r["row"] == "import"):
            text += grid(IMPORT_HEAD, import_lines(record))
    return "\n".join(text)


def write_between(path: Path, table: str) -> None:
    """Put the table between the marks of a Markdown file."""
    text = path.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{path} must have the lines {START} and {END} once each, in this order")
    before, after = text.split(START)[0], text.split(END)[1]
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(f"{before}{START}\n{table.rstrip()}\n{END}{after}")
    beside.replace(path)


# The command


def parse(words: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*ROWS, "import"])
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, *HIDDEN, "import"], metavar="ROW", help=f"which ones (default: all): {names}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, help="timed runs of each side (default: 9, with --quick 5)")
    parser.add_argument("--threads", type=int, help="of torch (default: what OMP_NUM_THREADS says)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time")
    parser.add_argument("--eager", action="store_true", help="no search for each side's best setting")
    parser.add_argument("--quick", action="store_true", help="the small rows, no torch.compile; printed, neither kept nor written")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file, too")
    parser.add_argument("--file", type=Path, default=HERE / "table.jsonl", help="where rows are kept (default: table.jsonl beside this script)")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="where the table is written (default: README.md beside this script)")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # one measurement in a process of its own
    options = parser.parse_args(words)
    for name in ("rounds", "threads"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1")
    options.rounds = options.rounds or (5 if options.quick else 9)
    if options.rows is None:
        options.rows = [name for name, row in ROWS.items() if row.quick or not options.quick] + ["import"]
    return options


def tasks(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Rows and precisions; bfloat16 of a quick run only where it is a plain call."""
    pairs = [(name, dtype) for name in options.rows for dtype in (options.dtypes if name != "import" else [""])]
    return [(name, dtype) for name, dtype in pairs if not (options.quick and dtype == "bfloat16" and (ROWS | HIDDEN)[name].train)]


def main(words: list[str] | None = None) -> int:
    """Measure what is not there yet, and show all."""
    options = parse(words)
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(memory_of(*options.memory)))
        return 0
    settings = [name for name, (_, compiled) in SETTINGS.items() if not (compiled and (options.quick or options.no_compile))][: 1 if options.eager else None]
    records = {} if options.quick else latest(read_rows(options.file))
    if not find_spec("denoising_diffusion_pytorch"):
        print("Without denoising-diffusion-pytorch; to have it: pip install --no-deps -r benchmarks/requirements.txt", file=sys.stderr)
    try:
        for name, dtype in tasks(options):
            if is_there(records, name, dtype) and not options.again:
                continue
            print(f"{name} {dtype} …", file=sys.stderr, flush=True)
            record = measure_imports(options.rounds) if name == "import" else measure(name, dtype, options.rounds, settings)
            records[key(record)] = record
            if not options.quick:
                append(options.file, record)
    except KeyboardInterrupt:
        print(f"\nStopped; {len(records)} rows are {'shown' if options.quick else f'in {options.file}, and the same command goes on'}.", file=sys.stderr)
        print(markdown(records.values()))
        return 130
    table = markdown(records.values())
    print(table)
    if not options.quick and table:
        write_between(options.readme, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
