"""Calls on an H200 that is not there: all of their way through Triton to the driver, which is a stub.

Run by tests/test_triton_launched.py in a process of its own. Prints a line of JSON for each launch: a
`stub_driver.Launched`.
"""

import json
from dataclasses import asdict

import torch

import fastseq
from tests.decoder_oracle import AttentionCase, Problem, fast, preset, run
from tests.pretended import Gpu
from tests.stub_driver import Launched, install


def told(launch: Launched) -> None:
    print(json.dumps(asdict(launch)), flush=True)


def main() -> None:
    """Training steps of every operator, each at two shapes. What they compute here is nothing."""
    for rows, steps in ((6, 4), (18, 7)):
        for layer in (
            fastseq.LSTM(32, 48, bidirectional=True, backend="triton"),
            fastseq.GRU(32, 300, backend="triton"),
            fastseq.LSTM(32, 48, zoneout=(0.1, 0.2), recurrent_dropout=0.3, backend="triton"),
            fastseq.LSTM(32, 300, zoneout=(0.1, 0.2), backend="triton").eval(),
            fastseq.GRU(32, 48, recurrent_dropout=0.3, recurrent_dropout_on="update", backend="triton"),
            fastseq.GRU(32, 48, layer_norm=True, backend="triton"),
            fastseq.LSTM(32, 300, layer_norm=True, bidirectional=True, backend="triton"),
        ):
            out, _ = layer(torch.randn(steps, rows, 32), lengths=torch.randint(1, steps, (rows,)))
            out.sum().backward()
        out, _, states = fastseq.LSTM(32, 48, backend="triton").forward_states(torch.randn(steps, rows, 32))
        (out.sum() + states.sum()).backward()
        cell = fastseq.LSTMCell(32, 48, backend="triton")
        cell(torch.randn(rows, 32, requires_grad=True))[0].sum().backward()
        sizes = {"N": rows, "B": rows // 2, "T": steps}
        run(fast("triton"), Problem.draw(AttentionCase("additive", **sizes)))
        run(fast("triton"), Problem.draw(AttentionCase("dot", **sizes)))
        for name, kind in (("luong", "lstm"), ("bahdanau", "gru_reset_before"), ("gnmt", "gru")):
            run(fast("triton"), Problem.draw(preset(name, kind, **sizes)))


if __name__ == "__main__":
    install().told = told
    with Gpu(real="cpu"):
        main()
