"""A small case of every kernel, for compute-sanitizer: `compute-sanitizer python -m tests.gpu.sanitized`."""

import torch

import fastseq
from tests.gpu.place import BACKEND, DEVICE
from tests.seq2seq_models import model

GRID = 600  # hidden units of a layer whose CUDA kernels are a grid of blocks on an H200, both ways


def main() -> None:
    """Forward and backward of a layer of every kind of kernel, a cell, an attention, a decoder and a search."""
    x = torch.randn(3, 5, 7, device=DEVICE)
    lengths = torch.tensor([3, 0, 1, 2, 3]).to(DEVICE)
    for hidden in (9, 150):
        for kind in (fastseq.LSTM, fastseq.GRU):
            for layer_norm in (False, True) if BACKEND != "cuda" else (False,):  # which has no such kernels
                module = kind(7, hidden, bidirectional=True, layer_norm=layer_norm, backend=BACKEND).to(DEVICE)
                module(x, lengths=lengths)[0].sum().backward()
    for noisy in (
        fastseq.LSTM(7, 9, zoneout=0.1, recurrent_dropout=0.2, recurrent_dropout_on="update", backend=BACKEND),
        fastseq.GRU(7, 150, zoneout=0.1, recurrent_dropout=0.2, backend=BACKEND),
    ):
        noisy.to(DEVICE)(x, lengths=lengths)[0].sum().backward()
    fastseq.LSTM(7, GRID, backend=BACKEND).to(DEVICE)(x[:2])[0].sum().backward()
    fastseq.LSTMCell(7, 9, backend=BACKEND).to(DEVICE)(x[0])[0].sum().backward()
    memory = fastseq.Memory(torch.randn(5, 6, 11, device=DEVICE), torch.rand(5, 6, device=DEVICE) < 0.7)
    y = torch.randn(5, 3, 7, device=DEVICE)
    if BACKEND != "cuda":  # which leaves attention of all steps at once to Triton
        attention = fastseq.Attention(7, 11, 13, backend=BACKEND).to(DEVICE)
        attention(y, attention.prepare(memory))[0].sum().backward()
    for preset in (fastseq.Decoder.bahdanau, fastseq.Decoder.luong):
        decoder = preset(7, 9, memory_size=11, bridge="zero", backend=BACKEND).to(DEVICE)
        decoder(y, memory).output.sum().backward()
    if BACKEND == "cuda":  # which has a kernel of its own for a search
        of = model("luong", V=40).to(DEVICE)
        of.decoder.backend = BACKEND
        of.generate(torch.arange(4, device=DEVICE)[:, None], max_new_tokens=3)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
