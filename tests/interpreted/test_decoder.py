"""A decoder's loop on Triton against the plain loops in float64, forward and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastseq.kernels import decoder as host
from fastseq.kernels import devices, launch

from tests.decoder_oracle import PRESETS, Case, Mismatch, Problem, check, check_second, fast, preset, run
from tests.test_decoder import EVEN, decode, decoder_call

CELLS = ("lstm", "gru", "gru_reset_before")
SCORES = ("additive", "dot")
# Every preset, cells and scores in turn; and of one order each, every cell.
GRID = [
    preset(name, cell, score=SCORES[(i + j) % 2])
    for i, name in enumerate(PRESETS)
    for j, cell in enumerate(CELLS)
    if (name in ("luong", "bahdanau") or j == i % 3) and (name, cell) != ("cho", "gru_reset_before")
]
SHAPES: dict[str, dict[str, Any]] = {
    "no source": {"S": 0},
    "one row, one step": {"N": 1, "B": 1, "T": 1},
    "five beams": {"N": 5, "B": 1, "T": 2, "mask": "prefix"},
    "more rows than a tile": {"N": 18, "B": 9, "T": 2, "S": 3},
    "more of all than a tile": {"N": 2, "B": 2, "T": 2, "S": 17, "A": 33, "D": 17, "H": 35, "R": 31, "I": 1},
    "smallest": {"N": 1, "B": 1, "T": 1, "S": 1, "A": 1, "D": 1, "I": 1, "H": 1, "R": 1, "mask": "none"},
    "no mask, weights, dropout": {"mask": "none", "weights": False, "dropout": False},
    "two layers": {"num_layers": 2, "T": 3},
}
triton = fast("triton")


@pytest.mark.parametrize("case", GRID, ids=str)
def test_presets(case: Case) -> None:
    """In fp32 with everything that a call may have."""
    check(triton, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "cell"), [("luong", "lstm"), ("bentrevett", "gru"), ("conditional_gru", "gru_reset_before")]
)
def test_16_bits(name: str, cell: str, dtype: torch.dtype) -> None:
    """Presets without maxout, where of two nearly equal pre-activations rounding chooses one, and a whole gradient."""
    check(triton, preset(name, cell, dtype=dtype, state=torch.float32 if cell == "gru" else None, **EVEN))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize(("name", "cell", "score"), [("luong", "lstm", "additive"), ("bahdanau", "gru", "dot")])
def test_shapes(options: str, name: str, cell: str, score: str) -> None:
    check(triton, preset(name, cell, score=score, **SHAPES[options]))


@pytest.mark.parametrize("score", ["bare", "projected"])
def test_other_queries(score: str) -> None:
    """An additive score of the state itself, and a dot score with a W_q."""
    check(triton, preset("luong", "gru", score=score, T=3))
    check(triton, preset("bahdanau", "lstm", score=score, T=3))


@pytest.mark.parametrize("name", ["luong", "gnmt", "bahdanau"])
def test_one_launch_a_phase(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose grids cannot wait: three programs share each phase's tiles; the same bits as in one launch."""
    problem = Problem.draw(preset(name, "gru_reset_before" if name == "bahdanau" else "lstm", N=18, B=9, T=2, S=3))
    whole = run(triton, problem)
    monkeypatch.setattr(devices, "INTERPRETER", replace(devices.INTERPRETER, units=3))
    assert not devices.INTERPRETER.cooperative
    for key, t in run(triton, problem).items():
        assert torch.equal(t, whole[key]), key


def test_second_derivatives() -> None:
    check_second(triton, preset("luong", "gru", T=2, dropout=False))


def test_steps_are_the_whole() -> None:
    """T calls of one step each, the state handed on, give what one call of T steps gives."""
    call = decoder_call(preset("joeynmt", dropout=False))
    whole, state, outputs = decode(call, "triton"), call.state, []
    for t in range(call.y.shape[1]):
        output, state, _ = decode(replace(call, y=call.y[:, t : t + 1], state=state), "triton")
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)


def test_nan_stays_in_its_row() -> None:
    problem = Problem.draw(preset("luong", N=6, B=6, mask="none", dropout=False))
    clean = run(triton, problem)
    for bad in ("y", "h0.0", "memory", "keys"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[bad][2] = torch.nan
        got = run(triton, replace(problem, tensors=tensors))
        others = torch.arange(6) != 2
        assert got["out"][2].isnan().any()
        for key in ("out", "weights", "h_n.0", "d_y", "d_h0.0", "d_memory", "d_keys"):
            assert torch.equal(got[key][others], clean[key][others]), (bad, key)


def test_backward_changes_nothing() -> None:
    """What was saved stays as it was: a second backward gives the same bits."""
    problem = Problem.draw(preset("luong"))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    outputs = triton(problem, leaves)
    grads = [problem.grads[n].clone() for n in outputs]
    first, again = (
        torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_and_alignment() -> None:
    """Transposed, sliced, expanded and misaligned tensors."""
    call = decoder_call(preset("luong", dropout=False))
    want = decode(call, "triton")
    shifted = torch.empty(call.y.numel() + 1)[1:].view(call.y.shape)
    assert shifted.copy_(call.y).data_ptr() % 16
    transposed = call.y.transpose(0, 1).contiguous().transpose(0, 1)
    for y in (shifted, transposed):
        torch.testing.assert_close(decode(replace(call, y=y), "triton").output, want.output, rtol=0, atol=0)
    torch.testing.assert_close(
        decode(replace(call, y=call.y[:, :1].expand_as(call.y)), "triton").output,
        decode(replace(call, y=call.y[:, :1].expand_as(call.y).contiguous()), "triton").output, rtol=0, atol=0,
    )  # fmt: skip


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that nobody reads, a carry that backward forgets, an output that is a little off."""
    case = preset("luong", "gru")
    with monkeypatch.context() as patch:
        patch.setattr(host, "as_bytes", lambda mask: None)
        with pytest.raises(Mismatch):
            check(triton, case)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", _without(launch.run, "decoder_backward"))
        patch.setattr(host, "run", launch.run)
        with pytest.raises(Mismatch):
            check(triton, case)


def _without(run: Any, kernel: str) -> Any:
    """`run`, but the last step of `kernel` is left out."""

    def cut(x: torch.Tensor, started: launch.Launch) -> None:
        if started.kernel.__name__ == kernel:
            *rest, t0, t1, p0, p1 = started.args
            started = started._replace(args=(*rest, t0, t1 - 1, p0, p1))
        run(x, started)

    return cut
