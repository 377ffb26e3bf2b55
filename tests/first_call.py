"""What a first call costs a process in which nothing is compiled yet, but for the GPU's own part: that is a stub.

Run by tests/test_triton_first_call.py in a process of its own, with the name of a case. Prints a line of JSON: CPU
seconds of the process and its children (ptxas, the C compiler) from the import of Triton on; names of the kernels that
were compiled, and how many came from Triton's cache on the disk.
"""

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

B, T, S, I = 8, 12, 20, 64  # noqa: E741  (the project's letters)


def rnn(name: str, H: int, **options: Any) -> Callable[[], list[Tensor]]:
    module = getattr(fastseq, name)(I, H, backend="triton", **options)
    shape = (B, I) if name.endswith("Cell") else (T, B, I)
    return lambda: leaves(module(torch.randn(shape)))


def attention() -> Callable[[], list[Tensor]]:
    module = fastseq.Attention(512, 512, 512, backend="triton")
    return lambda: leaves(module(torch.randn(B, T, 512), module.prepare(fastseq.Memory(torch.randn(B, S, 512)))))


def decoder(preset: str, **options: Any) -> Callable[[], list[Tensor]]:
    module = getattr(fastseq.Decoder, preset)(I, 512, memory_size=512, bridge="zero", backend="triton", **options)
    return lambda: [module(torch.randn(B, T, I), fastseq.Memory(torch.randn(B, S, 512))).output]


def search() -> Callable[[], list[Tensor]]:
    """One token: with a second one a CUDA graph would begin."""
    encoder = fastseq.Encoder(I, 256, bidirectional=True, embedding=nn.Embedding(99, I))
    for layer in encoder.layers:
        layer.backend = "triton"
    of = fastseq.Decoder.luong(I, 512, memory_size=512, bridge="zero", backend="triton")
    model = fastseq.Seq2Seq(encoder, of, 99, bos_id=1, eos_id=2, pad_id=0, embedding=nn.Embedding(99, I)).eval()

    def generate() -> list[Tensor]:
        model.generate(torch.full((B, S), 7), max_new_tokens=1)
        return []

    return generate


def leaves(results: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, Tensor)]


CASES: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
    "LSTM, H=128": lambda: rnn("LSTM", 128),
    "LSTM, H=512": lambda: rnn("LSTM", 512),
    "GRU, H=512": lambda: rnn("GRU", 512),
    "LSTM, H=512, layer_norm": lambda: rnn("LSTM", 512, layer_norm=True),
    "LSTMCell, H=512": lambda: rnn("LSTMCell", 512),
    "Attention": attention,
    "Decoder.luong": lambda: decoder("luong"),
    "Decoder.luong, 2 layers": lambda: decoder("luong", num_layers=2),
    "Decoder.bahdanau": lambda: decoder("bahdanau"),
    "Seq2Seq.generate": search,
}


def seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(name: str) -> None:
    call, begin = CASES[name](), seconds()
    import triton

    from tests.pretended import Gpu
    from tests.stub_driver import install

    install()
    compiled: list[str] = []
    cached: list[str] = []

    def listener(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        (cached if cache_hit else compiled).append(metadata["name"])

    triton.knobs.compilation.listener = listener
    with Gpu(real="cpu"):
        results = call()
        if results:
            torch.autograd.backward(results, [torch.ones_like(t) for t in results])
    print(json.dumps({"seconds": round(seconds() - begin, 1), "compiled": compiled, "cached": len(cached)}))


if __name__ == "__main__":
    main(sys.argv[1])
