"""Peak memory of a training step is at most torch.nn's, native scratch included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _native

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

# A process of its own, so that no memory freed by other tests is taken anew; a child for each step, so that none finds
# what another left. VmHWM is the largest resident size since clear_refs: it sees every allocator.
STEP = """
import json, os, torch, fastseq

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024

def peak(package, cell, two, threads):
    torch.set_num_threads(threads)
    T, B, H = 40, 64, 192
    module = getattr(package, cell)(H, H, bidirectional=two, **({"backend": "cpu"} if package is fastseq else {}))
    module(torch.randn(2, 2, H))[0].sum().backward()
    x = torch.randn(T, B, H, requires_grad=True)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident("VmRSS")
    out, _ = module(x)
    out.backward(out.detach())
    return resident("VmHWM") - before

def in_child(*args):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(peak(*args)).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 100))

calls = [(cell, *rest) for cell in ("LSTM", "GRU") for rest in ((False, 1), (True, 2))]
print(json.dumps([(call, in_child(fastseq, *call), in_child(torch.nn, *call[:2], 1)) for call in calls]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_peak_memory_of_a_training_step() -> None:
    """LSTM and GRU: one direction by one thread, two directions by two; torch.nn, which needs no more then, by one."""
    done = subprocess.run(
        [sys.executable, "-c", STEP], cwd=Path(__file__).parents[1], check=True, text=True, stdout=subprocess.PIPE
    )
    for _, ours, theirs in json.loads(done.stdout):
        assert 0 < ours <= theirs, done.stdout
