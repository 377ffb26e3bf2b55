"""Commands of a stage: each with a log of its own, a limit, and a line in the stage's record."""

import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

__all__ = ["Deadline", "Record", "Step"]


@dataclass
class Deadline:
    """When a stage's time is over."""

    seconds: float

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True)
class Step:
    """A command that ran. rc is None where it was ended at its limit."""

    name: str
    command: str
    rc: int | None
    seconds: float
    tail: str  # the last lines that it wrote

    @property
    def ok(self) -> bool:
        return self.rc == 0


@dataclass
class Record:
    """What a stage did: OUT/<stage>.json, written again after each step, and its logs, OUT/<stage>.tar.gz."""

    stage: str
    out: Path
    logs: Path
    status: str = "running"  # "ok" | "failed" | "no GPU"
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        kept = {n: v for n, v in asdict(self).items() if n not in ("out", "logs")}
        (self.out / f"{self.stage}.json").write_text(json.dumps(kept, indent=1) + "\n")

    def archive(self) -> None:
        with tarfile.open(self.out / f"{self.stage}.tar.gz", "w:gz") as tar:
            tar.add(self.logs, arcname=self.stage)

    def run(
        self, name: str, command: Sequence[str], limit: float, cwd: Path, env: Mapping[str, str] | None = None,
        shown: bool = False,
    ) -> Step:  # fmt: skip
        """Run it for at most `limit` seconds, its output in <logs>/<name>.log, and on the terminal where `shown`."""
        begin, log = time.monotonic(), self.logs / f"{name}.log"
        with log.open("ab") as file:
            try:
                rc = _wait(command, limit, cwd, env, file, shown)
            except OSError as error:
                rc = 127
                file.write(f"{error}\n".encode())
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        step = Step(name, " ".join(command), rc, time.monotonic() - begin, tail)
        self.steps.append(step)
        self.save()
        print(
            f"{step.seconds:6.1f} s  {name}: {'ok' if step.ok else 'limit' if rc is None else f'rc={rc}'}", flush=True
        )
        return step


def _wait(
    command: Sequence[str], limit: float, cwd: Path, env: Mapping[str, str] | None, log: BinaryIO, shown: bool
) -> int | None:  # fmt: skip
    """The exit status; None where the limit ended it, with all that it had started."""
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_copy, args=(process.stdout, log, shown), daemon=True)
    reader.start()
    try:
        rc: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        rc = None
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(5)  # a grandchild may hold the pipe for longer
    return rc


def _copy(output: IO[bytes], log: BinaryIO, shown: bool) -> None:
    for line in output:
        if not log.closed:
            log.write(line)
            log.flush()
        if shown:
            print(line.decode(errors="replace"), end="", flush=True)
