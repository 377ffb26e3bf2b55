"""`python -m fastseq`: what this machine has, what is absent and why, and what is lost thereby."""

import argparse
import os
import platform
from collections.abc import Iterator

import torch

import fastseq
from fastseq import _cpus, _gpus, _native, crossover, dispatch
from fastseq._triton import interprets

LOST = {
    "cpu": "LSTM and GRU on the CPU run on stock PyTorch: no speed-up, no fused variable length, no fused cells",
    "triton": "on a GPU decoders run as a Python loop over steps, and rows with lengths are packed on the host",
    "cuda": "on an NVIDIA GPU recurrences run on cuDNN or Triton, and decoders on Triton",
    "torch": "float64, projections and large LSTMs run on slower backends",
    "reference": "no double backward, no torch.func transforms",
}


def report() -> str:
    """The whole text, without a trailing newline."""
    rows = [*_machine(), ("", ""), *_backends(), ("", ""), *_choice()]
    return "\n".join(f"{name:<11}  {text}".rstrip() for name, text in rows)


def _machine() -> Iterator[tuple[str, str]]:
    yield "fastseq", f"{fastseq.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield "CPU", f"{_cpus.model()} ({platform.machine()}, {os.cpu_count()} logical)"
    if _native.C is not None:
        features: dict[str, bool] = _native.C.cpu_features()
        yield "features", " ".join(name if has else f"no-{name}" for name, has in features.items()) or "none known"
        yield "ISA", f"{_native.C.isa()}, of {', '.join(_native.C.isa_available())}; FASTSEQ_ISA chooses"
    else:
        yield "features", f"{torch.backends.cpu.get_cpu_capability()}, says torch"
        yield "ISA", "none, there is no native module"
    yield "threads", f"{torch.get_num_threads()}; torch.set_num_threads and OMP_NUM_THREADS choose"
    yield from _gpus_here()


def _gpus_here() -> Iterator[tuple[str, str]]:
    reason = _gpus.no_gpu()
    if reason is not None:
        yield "GPU", f"none: {reason}"
        return
    for index in range(torch.cuda.device_count()):
        yield f"GPU {index}", _gpus.told(index)
    yield "", _gpus.software()


def _backends() -> Iterator[tuple[str, str]]:
    yield "backend", "state"
    for name, reason in fastseq.backends().items():
        how = " (interpreted on CPU tensors, very slowly: TRITON_INTERPRET is set)" * (
            name == "triton" and interprets()
        )
        yield f"  {name}", f"available{how}" if reason is None else f"absent: {reason}"
        if reason is not None and name in LOST:
            yield "", f"lost: {LOST[name]}"


def _choice() -> Iterator[tuple[str, str]]:
    yield "auto", "takes the first that can run the call:"
    for rule in crossover.RULES:
        if rule.machine is None or rule.machine in _names():
            yield f"  {rule.backend}", f"{'on a GPU, ' if rule.device == 'cuda' else ''}{rule.because}"
    yield "  else", ", ".join(name for name in crossover.DEFAULT if dispatch.load(name).unavailable() is None)
    if not any(rule.machine in _names() for rule in crossover.RULES):
        yield "", "No crossover was measured on this machine: these are the built-in rules."
    yield (
        "",
        "From a source tree, `python -m benchmarks run` times every backend here, and on a GPU `python -m benchmarks",
    )
    yield "", "tune` writes what it measures where `auto` reads it; backend= and fastseq.use_backend choose one."


def _names() -> set[str]:
    """Of the CPU and the GPUs here."""
    return {_cpus.cpu_name(), *(_gpus.gpu_name(index) for index in range(torch.cuda.device_count()))}


if __name__ == "__main__":
    argparse.ArgumentParser("python -m fastseq", description=(__doc__ or "").partition(": ")[2]).parse_args()
    print(report())
