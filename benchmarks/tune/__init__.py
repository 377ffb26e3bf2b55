"""`python -m benchmarks tune`: tile sizes and `auto`'s crossovers, measured on this machine and written as data.

    kernels/configs.json      the tiles of each kernel on this GPU's architecture, before the rows that were guessed
    fastseq/crossovers.json   where another backend than the usual one is faster, on this GPU or with --device cpu here

Nothing is tuned at a user's first call, and nothing is changed where there is no such device. How well `auto` then
chooses elsewhere: `python -m benchmarks run --set heldout`.
"""

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastseq import _gpus, _native, crossover
from fastseq._cpus import cpu_name

from . import configs, crossovers
from .timer import Timer

__all__ = ["main", "write_configs", "write_crossovers"]

NO_GPU = 3
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Parse and do. Exit status 3: there is no GPU, and the files are as they were."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    parser.add_argument("--only", choices=["configs", "crossovers"], help="one of the two files")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda; a CPU has no tile sizes"
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        help="on a CPU; default: 1, and all",
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of measuring for each file, at most")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, and write nothing")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        if options.only == "configs" or _native.C is None:
            parser.error(
                "a CPU has no tile sizes" if _native.C is not None else f"nothing to compare: {_native.reason}"
            )
        _write_crossovers(
            crossovers.Machine("cpu", cpu_name(), _on_cpu(), tuple(dict.fromkeys(options.threads))), options
        )
        return 0
    reason = _gpus.no_gpu()
    if reason is not None:
        print(f"tune: there is no GPU: {reason}\nNothing was measured, and no file was changed. A CPU: --device cpu")
        return NO_GPU
    where = described()
    if options.only != "crossovers":
        _write_configs(Timer(), where, options)
    if options.only != "configs":
        gpu = _gpus.gpu_name(torch.cuda.current_device())
        _write_crossovers(crossovers.Machine("cuda", gpu, where), options)
    return 0


def _write_crossovers(machine: crossovers.Machine, options: argparse.Namespace) -> None:
    rules = crossovers.measure(Timer(), machine, options.minutes * 60)
    said = [rule.because for rule in rules]
    _put(crossover.FILE, lambda file: write_crossovers(file, machine, rules), said, options.dry_run)


def _write_configs(timer: Timer, where: str, options: argparse.Namespace) -> None:
    from fastseq.kernels import configs as table  # which imports Triton
    from fastseq.kernels import devices

    file = Path(table.__file__).parent / "configs.json"
    rows, device = json.loads(file.read_text()), devices.of(torch.cuda.current_device())
    with configs.replaced() as put:
        found = configs.measure(rows, device, timer, put, where, options.minutes * 60)
    _put(
        file,
        lambda file: write_configs(file, found),
        [r["because"] for r in found if where in r["because"]],
        options.dry_run,
    )


def _put(file: Path, write: Callable[[Path], None], said: Sequence[str], dry: bool) -> None:
    print("\n".join(said) or "nothing was found faster")
    if dry:
        print(f"dry run: {file} is as it was")
    else:
        write(file)
        print(f"written: {file}")


def described() -> str:
    """The GPU and what drove it, for a row's measurement."""
    return (
        f"{_gpus.gpu_name(torch.cuda.current_device())}, torch {torch.__version__}, Triton {_gpus.triton_version()}, "
        + str(datetime.datetime.now(datetime.timezone.utc).date())
    )


def _on_cpu() -> str:
    return f"{cpu_name()}, torch {torch.__version__}, {datetime.datetime.now(datetime.timezone.utc).date()}"


def write_configs(file: Path, rows: Rows) -> None:
    """All rows of kernels/configs.json, one a line."""
    _write(file, rows)


def write_crossovers(file: Path, machine: crossovers.Machine, rules: Sequence[crossover.Rule]) -> None:
    """Rules of what was measured now; those of other machines, and for other numbers of threads, stay."""
    spans = [crossover.ANY if n == 0 else (n, n + 1) for n in machine.threads]
    kept = [r for r in crossover.measured(file) if r.machine != machine.name or r.threads not in spans]
    _write(file, [crossover.to_row(rule) for rule in (*kept, *rules)])


def _write(file: Path, rows: Rows) -> None:
    """At once: a reader sees the old file or the new one."""
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    beside = file.with_suffix(".new")
    beside.write_text(f"[\n{text}\n]\n" if rows else "[]\n")
    beside.replace(file)
