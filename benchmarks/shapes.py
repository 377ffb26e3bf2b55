"""Shapes that others chose, by name: what real programs call, DeepBench's RNNs, FlashRNN's published grid.

DeepBench: Baidu Research, code/kernels/rnn_problems.h, read at its commit 608d7a3. Its input has the hidden size; its
"vanilla" cell is cuDNN's with ReLU (code/nvidia/cudnn_helper.h). It leaves out the input's product (CUDNN_SKIP_INPUT in
code/nvidia/rnn_bench.cu), which a layer's call here includes, so times are not to be compared with its own.

FlashRNN: Pöppel, Beck and Hochreiter 2025, arXiv:2412.07752; the grid is that of their program
flashrnn/speed_experiments/kernel_speed_benchmark.py, read at commit 5af7e79: bf16, over head dimension, batch and
steps. Of its heads there is one here, whose dimension is the hidden size, as of torch.nn in that program.
"""

from itertools import product

from .cases import LayerCase

__all__ = ["calls", "deepbench", "flashrnn"]

Sizes = tuple[int, ...]
Group = tuple[str, Sizes, Sizes, Sizes]  # op, H, B, T

TRAINING: tuple[Group, ...] = (
    ("rnn_relu", (1760, 2048, 2560), (16, 32, 64, 128), (50,)),
    ("lstm", (512, 1024, 2048, 4096), (16, 32, 64, 128), (25,)),
    ("lstm", (1536,), (8, 16, 32), (50,)),
    ("lstm", (256,), (16, 32, 64), (150,)),
    ("gru", (2816,), (32,), (750, 375, 187)),
    ("gru", (2048, 1536, 2560), (32,), (1500, 750, 375, 187)),
    ("gru", (512,), (32,), (1,)),
    ("gru", (1024,), (32, 64), (1500,)),
)
INFERENCE: tuple[Group, ...] = (  # on servers, then on devices
    ("lstm", (512, 1024, 2048), (1, 2, 4), (25,)),
    ("lstm", (1536,), (1, 2, 4), (50,)),
    ("lstm", (256,), (1, 2, 4), (150,)),
    ("gru", (2816, 2048, 1536, 2560), (1, 2, 4), (1500, 750, 375, 187)),
    ("gru", (512,), (1, 2, 4), (1,)),
    ("gru", (1024,), (1, 2, 4), (1500,)),
    ("rnn_relu", (32,), (1,), (672,)),
    ("rnn_relu", (64,), (1,), (96,)),
)
HEAD_DIMENSIONS, BATCHES, STEPS = (16, 32, 64, 128, 256, 768), (2, 8, 16, 32, 64, 128, 256), (256, 512, 1024, 2048)
SWEPT = (64, 768)  # of the head dimensions, those whose batches and steps vary
USUAL_B, USUAL_T = 16, 1024


def deepbench() -> list[LayerCase]:
    """Its training set, then its inference sets; 52 and 71 calls."""
    return [
        LayerCase(op, mode, t, b, h, h)
        for mode, groups in (("train", TRAINING), ("forward", INFERENCE))
        for op, hidden, batches, steps in groups
        for h, t, b in product(hidden, steps, batches)
    ]


def flashrnn() -> list[LayerCase]:
    """Its grid of an LSTM, forward and training; 24 shapes."""
    shapes = [(h, USUAL_B, USUAL_T) for h in HEAD_DIMENSIONS]
    shapes += [(h, b, USUAL_T) for h, b in product(SWEPT, BATCHES)]
    shapes += [(h, USUAL_B, t) for h, t in product(SWEPT, STEPS)]
    cases = product(dict.fromkeys(shapes), ("forward", "train"))
    return [LayerCase("lstm", mode, t, b, h, h, dtype="bfloat16") for (h, b, t), mode in cases]


def calls() -> list[LayerCase]:
    """The calls that programs with recurrent layers were seen to make."""
    cases = []
    for cell, mode in product(("lstm", "gru"), ("forward", "train")):
        for op in (cell, f"{cell}_cell"):
            cases += [
                LayerCase(op, mode, 1, 1, 4, 256, hx=True),  # reinforcement learning
                LayerCase(op, mode, 1, 8, 4, 256, hx=True),
                LayerCase(op, mode, 1, 16, 80, 64, hx=True),  # a translation decoder, step by step
            ]
        cases += [
            LayerCase(cell, mode, 20, 16, 80, 64, bidirectional=True, rows="packed"),  # its encoder
            LayerCase(cell, mode, 16, 64, 100, 400, rows="packed", hx=True),  # a tagger: characters of words
            LayerCase(cell, mode, 64, 16, 300, 200, bidirectional=True, rows="packed", hx=True),  # words of sentences
            LayerCase(cell, mode, 64, 1, 1, 64, layers=2),  # forecasting
            LayerCase(cell, mode, 64, 128, 1, 64, layers=2),
        ]
    return cases
