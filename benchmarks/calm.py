"""Whether the machine is all ours just now.

On a virtual machine a neighbour on the other hyperthread of the core halves the rate of ordinary code, for tenths of
seconds to minutes, but hardly that of multiplications: a fixed Python loop took 14 to 21 us or else 26 to 33 while
the register tile kept 233 GFLOP/s, and contenders slowed by 1.3 to 1.75, each by another factor. So the loop is the
witness.

Another program on this machine takes a core for milliseconds, in which the loop is seldom run; but then our threads
wait for a core, and Linux counts how long. With two threads on two cores, one of which was taken, contenders took from
2 to 1000 times as long, and our threads waited for half of the time and more; otherwise for 0.0 to 1.5 % of it.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["MEMORY", "Watch"]

MEMORY = Path(__file__).parents[1] / ".benchmarks" / "calm.json"  # or a run within a disturbance would not know
DAY_S = 86_400  # after that the machine may be another one
LOOP = 1000  # about 20 us
SLOWER = 1.6  # than the best seen on this CPU: disturbed
WAITED = 0.05  # of the time since the last question, all our threads together: disturbed
TASKS = Path("/proc/self/task")


class Watch:
    """Remembers the best time of the loop on each CPU; in `memory` from run to run."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._best: dict[int, int] = {}
        self._asked = self._waited = 0  # when, ns, and how long our threads had waited then
        if memory is not None and memory.exists() and time.time() - memory.stat().st_mtime < DAY_S:
            self._best = {int(cpu): ns for cpu, ns in json.loads(memory.read_text()).items()}

    def save(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(exist_ok=True)
            self._memory.write_text(json.dumps(self._best))

    def calm(self, threads: int) -> bool:
        """Of the CPU we are on; of all CPUs that we may use where each of our threads needs one. And of the time since
        the last question: whether our threads had their CPUs.
        """
        waited = (_waited_ns() - self._waited) / max(1, time.perf_counter_ns() - self._asked)
        fast = self._is_fast(threads)  # asking from another CPU than ours, we may wait for our own threads
        self._asked, self._waited = time.perf_counter_ns(), _waited_ns()
        return fast and waited <= WAITED

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


def _loop_ns() -> int:
    begin, x = time.perf_counter_ns(), 0
    for i in range(LOOP):
        x += i
    return time.perf_counter_ns() - begin
