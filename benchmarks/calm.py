"""Whether the machine is all ours just now.

On a virtual machine a neighbour on the other hyperthread of the core halves the rate of ordinary code, for tenths of
seconds to minutes, but hardly that of multiplications: a fixed Python loop took 14 to 21 us or else 26 to 33 while
the register tile kept 233 GFLOP/s, and contenders slowed by 1.3 to 1.75, each by another factor. So the loop is the
witness.

Another program on this machine takes a core for milliseconds, in which the loop is seldom run; but then our threads
wait for a core, and Linux counts how long. With two threads on two cores, one of which was taken, contenders took from
2 to 1000 times as long, and our threads waited for half of the time and more; otherwise for 0.0 to 1.5 % of it. They
wait for each other as well, those of one library that spin and those of the next: so what counts is waiting while other
programs ran, by the CPU time of all less ours.
"""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from fastseq._cpus import model

__all__ = ["MEMORY", "Watch"]

MEMORY = Path(__file__).parents[1] / ".benchmarks" / "calm.json"  # or a run within a disturbance would not know
DAY_S = 86_400  # after a day without a run the machine may be another one
MACHINE = f"{model()}, Python {platform.python_version()}"
LOOP = 1000  # about 20 us
SLOWER = 1.6  # than the best seen on this CPU: disturbed
WAITED = 0.05  # of the time since the last question, all our threads together: disturbed, if others ran
OTHERS = 0.05  # of a CPU
WINDOW_NS = 150_000_000  # over which others are watched: Linux counts them in steps of 10 ms
TASKS, STAT = Path("/proc/self/task"), Path("/proc/stat")


class Watch:
    """Remembers the best time of the loop on each CPU; in `memory` from run to run."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._best = _remembered(memory)
        self._asked = self._waited = 0  # when, ns, and how long our threads had waited then
        self._since, self._busy, self._others = (
            0,
            0,
            0.0,
        )  # the window's beginning, others' time then, their share before

    def save(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(exist_ok=True)
            beside = self._memory.with_suffix(".new")
            beside.write_text(json.dumps({"machine": MACHINE, "best": self._best}))
            beside.replace(self._memory)

    def calm(self, threads: int) -> bool:
        """Of the CPU we are on; of all CPUs that we may use where each of our threads needs one. And of the time since
        the last question: whether other programs left our threads their CPUs.
        """
        now = time.perf_counter_ns()
        waited = (_waited_ns() - self._waited) / max(1, now - self._asked)
        if now - self._since >= WINDOW_NS:
            busy = _others_ns()
            self._others = (busy - self._busy) / (now - self._since)
            self._since, self._busy = now, busy
        fast = self._is_fast(threads)  # asking from another CPU than ours, we may wait for our own threads
        self._asked, self._waited = time.perf_counter_ns(), _waited_ns()
        return fast and not (waited > WAITED and self._others > OTHERS)

    def _is_fast(self, threads: int) -> bool:
        if not self._cpus or threads < len(self._cpus):
            return self._loop(0)
        try:
            paces = [self._on(cpu) for cpu in self._cpus]  # all of them: each learns its best
            return all(paces)
        finally:
            os.sched_setaffinity(0, self._cpus)

    def _on(self, cpu: int) -> bool:
        os.sched_setaffinity(0, {cpu})
        return self._loop(cpu)

    def _loop(self, cpu: int) -> bool:
        took = min(_loop_ns() for _ in range(3))
        best = self._best[cpu] = min(took, self._best.get(cpu, took))
        return took <= SLOWER * best


def _waited_ns() -> int:
    """How long the threads of this process could have run but had no CPU; 0 where Linux does not tell."""
    waited = 0
    for task in TASKS.glob("*/schedstat"):
        with suppress(OSError):  # it has just ended
            waited += int(task.read_text().split()[1])
    return waited


def _others_ns() -> int:
    """CPU time of all programs but this one; 0 where Linux does not tell."""
    if not STAT.exists():
        return 0
    user, nice, system, _, _, irq, softirq = map(int, STAT.read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) * 1_000_000_000 // os.sysconf("SC_CLK_TCK") - time.process_time_ns()


def _remembered(memory: Path | None) -> dict[int, int]:
    """The best times of the loop, if they are of this machine and Python, and of today."""
    if memory is None or not memory.exists() or time.time() - memory.stat().st_mtime > DAY_S:
        return {}
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # cut, or of another version
        found = json.loads(memory.read_text())
        if found["machine"] == MACHINE:
            return {int(cpu): int(ns) for cpu, ns in found["best"].items()}
    return {}


def _loop_ns() -> int:
    begin, x = time.perf_counter_ns(), 0
    for i in range(LOOP):
        x += i
    return time.perf_counter_ns() - begin
