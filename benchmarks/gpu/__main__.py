"""`python -m benchmarks.gpu build | test | bench | all OUT`, `show FILE`: what `make gpu` calls.

Exit status: 0 done; 1 something failed, and OUT/<stage>.json says what; 3 there is no GPU and the stage was called by
itself. `all` runs every stage whatever became of the one before, and without a GPU ends with 0: nothing was claimed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .commands import Deadline, Record

__all__ = ["STAGES", "main", "no_gpu"]

STAGES = {"build": 240.0, "test": 420.0, "bench": 420.0}  # seconds
FAILED, NO_GPU = 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all", "show"])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results; of `show` a bench.jsonl")
    parser.add_argument(
        "--rehearse", action="store_true", help="small cases on the CPU, to see that a stage goes through"
    )
    options = parser.parse_args(arguments)
    if options.stage == "show":
        return _show(options.out)
    out, alone = options.out.resolve(), options.stage != "all"
    done = {name: run(name, out, options.rehearse) for name in (STAGES if not alone else (options.stage,))}
    for name, record in done.items():
        print(f"gpu-{name}: {record.status}{': ' if record.reason else ''}{record.reason}")
    if any(record.status == "failed" for record in done.values()):
        return FAILED
    return NO_GPU if alone and any(record.status == "no GPU" for record in done.values()) else 0


def run(name: str, out: Path, rehearse: bool) -> Record:
    """One stage, whatever happens within it: its JSON and its archive are there at the end."""
    with tempfile.TemporaryDirectory(prefix=f"fastseq-gpu-{name}-") as logs:
        record, reason = Record(name, out, Path(logs)), None if rehearse else no_gpu()
        if reason is not None:
            record.status, record.reason = "no GPU", reason
            (record.logs / "no-gpu.log").write_text(f"{reason}\n")
        else:
            print(f"== gpu-{name}, at most {STAGES[name]:.0f} s", flush=True)
            try:
                _stage(name, record, rehearse)
            except Exception as error:  # the next stage is wanted too
                record.status, record.reason = "failed", f"{type(error).__name__}: {error}"
            record.status = "ok" if record.status == "running" else record.status
        record.save()
        record.archive()
    return record


def _stage(name: str, record: Record, rehearse: bool) -> None:
    from . import bench, build, test  # which import PyTorch

    deadline = Deadline(STAGES[name])
    if name == "build":
        build.build(record, deadline, skip_install=rehearse)
    elif name == "test":
        test.test(record, deadline, rehearse)
    else:
        bench.bench(record, deadline, rehearse)


def no_gpu() -> str | None:
    """Why nothing can be measured here; None: there is a GPU."""
    try:
        from fastseq import _gpus
    except ImportError as error:
        return f"{sys.executable} cannot import PyTorch ({error}); make PYTHON=... names another Python"
    reason = _gpus.no_gpu()
    return None if reason is None else f"there is no GPU: {reason}"


def _show(file: Path) -> int:
    from ..results import row_from_dict
    from ..tables import print_table
    from .bench import read
    from .tables import rows_table, sets_table

    if not file.is_file():
        print(
            f"error: there is no file {file}; `make gpu-bench OUT=dir` writes dir/bench.jsonl on a machine with a GPU",
            file=sys.stderr,
        )
        return 2
    _, lines = read(file)
    rows = [row_from_dict(line["row"]) for line in lines if "row" in line]
    print_table(rows_table(rows))
    print_table(sets_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
