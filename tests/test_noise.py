"""Zoneout, dropout within the recurrence, every cell state, a learned first state: kernels, reference and modules."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import InputError, _native
from fastseq.backends import reference
from fastseq.ops.rnn import rnn_layer
from tests.oracle import (
    CELLS,
    Case,
    Problem,
    cell_kinds,
    check_backward_changes_nothing,
    check_layer,
    check_second,
)

NOISE = ("zoneout", "mean", "state", "update", "both", "")
ROWS = ("full", "lengths", "packed")
LAYERS = [reference.layer] if _native.C is None else [reference.layer, rnn_layer]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=["reference", "cpu"][: len(LAYERS)])
BACKENDS = ["reference"] if _native.C is None else ["reference", "cpu"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def cases() -> list[Case]:
    """Cells, dtypes, kinds of noise and of rows crossed; the other options take turns."""
    turns, found = itertools.cycle(itertools.product((True, False), repeat=4)), []
    for (cell, dtype), noise, rows in itertools.product(cell_kinds((torch.float32, torch.bfloat16)), NOISE, ROWS):
        two, hx, batch_first, more = next(turns)
        states = cell == "lstm" and (more or not noise)
        if (noise or states) and not (noise == "update" and cell.startswith("rnn")):
            resets, batch_first = more and rows != "packed", batch_first and rows != "packed"
            shape = (6, 5, 7, 20) if more else (3, 9, 4, 33)
            threads = 1 + len(found) % 2
            found.append(
                Case(cell, dtype, *shape, two, rows, hx, True, batch_first, None, threads, resets, noise, states)
            )
        next(turns)
        next(turns)  # 3 and 16 share no factor: all meet all
    return found


@every_layer
@pytest.mark.parametrize("case", cases(), ids=str)
def test_layer(layer: Any, case: Case) -> None:
    """Outputs and every gradient against the oracle."""
    check_layer(layer, Problem.draw(case))


SMALL = [
    Case(cell, T=3, B=3, I=2, H=9, rows=rows, bidirectional=True, noise=noise, states=True, resets=rows == "lengths")
    for cell, noise, rows in itertools.product(CELLS, ("both", "mean"), ("lengths", "packed"))
]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@every_layer
@small_case
def test_second_derivatives(layer: Any, case: Case) -> None:
    check_second(layer, Problem.draw(case))


@every_layer
@small_case
def test_backward_changes_nothing(layer: Any, case: Case) -> None:
    check_backward_changes_nothing(layer, Problem.draw(case))


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("used", [("out",), ("c_n",), ("c_out",), ("c_out", "h_n")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_some_outputs(used: tuple[str, ...], dtype: torch.dtype) -> None:
    """The others' are undefined, which stands for 0; a state in fp32 beside bf16."""
    problem = Problem.draw(Case("lstm", dtype, rows="lengths", noise="both", states=True, state=torch.float32))
    check_layer(rnn_layer, replace(problem, grads={name: problem.grads[name] for name in used}))


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 3, 5, 16), (4, 0, 3, 5), (70, 1, 5, 130), (2, 40, 58, 260)], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_corner_shapes(shape: tuple[int, int, int, int], cell: str) -> None:
    """One step too, which without noise has another kernel. One unit of rnn_tanh is drawn too near to 1."""
    H = 2 if cell == "rnn_tanh" and shape[3] == 1 else shape[3]
    check_layer(rnn_layer, Problem.draw(Case(cell, torch.float32, *shape[:3], H, True, noise="both", states=True)))


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("case", [c for c in cases() if c.noise == "both" and c.dtype == torch.float32], ids=str)
def test_masks_do_not_depend_on_threads(case: Case) -> None:
    """A row's sums may, for they are of tiles; but not what of them is dropped or kept."""
    for threads in (1, 2):
        check_layer(rnn_layer, Problem.draw(replace(case, threads=threads)))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"zoneout": (0.1, 0.5)}),
    ("LSTM", {"zoneout": 0.3, "recurrent_dropout": 0.4}),
    ("LSTM", {"recurrent_dropout": 0.4, "recurrent_dropout_on": "update", "learn_state": True}),
    ("LSTM", {"proj_size": 3, "zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("GRU", {"zoneout": 0.3, "learn_state": True}),
    ("GRU", {"recurrent_dropout": 0.4, "recurrent_dropout_on": "update"}),
    ("RNN", {"zoneout": 0.3, "recurrent_dropout": 0.4, "nonlinearity": "relu"}),
]
every_module = pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)


def build(kind: str, options: dict[str, Any], backend: str = "auto", **more: Any) -> Any:
    torch.manual_seed(0)
    module = getattr(fastseq, kind)(5, 8, 2, bidirectional=True, backend=backend, **options, **more)
    if module.learn_state:
        with torch.no_grad():
            for name in ("initial_h", "initial_c"):
                if hasattr(module, name):
                    getattr(module, name).normal_()
    return module


def answers(module: Any, x: Any, seed: int = 5, **given: Any) -> list[Tensor]:
    """Outputs, states and the parameters' gradients."""
    torch.manual_seed(seed)
    out, state = module(x, **given)
    data = out.data if isinstance(out, nn.utils.rnn.PackedSequence) else out
    states = state if isinstance(state, tuple) else (state,)
    loss = data.sin().sum() + sum(s.cos().sum() for s in states)
    return [data, *states, *torch.autograd.grad(loss, list(module.parameters()))]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of fp32 in another order


@every_module
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", ["padded", "lengths", "packed", "unbatched"])
def test_modules_draw_the_same_on_every_backend(kind: str, options: dict[str, Any], training: bool, rows: str) -> None:
    """`auto` runs what `reference` runs, mask for mask; the fused kernels, but for a projection."""
    x: Any = torch.randn(7, 5) if rows == "unbatched" else torch.randn(7, 3, 5)
    given = {"lengths": [7, 0, 4]} if rows == "lengths" else {}
    if rows == "packed":
        x = pack_padded_sequence(x, [2, 7, 4], enforce_sorted=False)
    results = [answers(build(kind, options, name).train(training), x, **given) for name in ("auto", "reference")]
    close(*results)
    if rows == "padded":
        fused = _native.C is not None and "proj_size" not in options
        idle = not training and "zoneout" not in options
        chosen = fastseq.explain(build(kind, options).train(training), x).chosen
        assert chosen == ("cpu" if fused else "torch" if idle else "reference")


@every_module
def test_evaluation_without_zoneout_is_torchs(kind: str, options: dict[str, Any]) -> None:
    """Nothing is left of dropout, and a state learned as 0 is none."""
    options = {name: value for name, value in options.items() if name != "zoneout"}
    torch.manual_seed(0)
    module = getattr(fastseq, kind)(5, 8, **options).eval()
    ours = {name: options[name] for name in ("proj_size", "nonlinearity") if name in options}
    stock = getattr(nn, kind)(5, 8, **ours)
    stock.load_state_dict({name: module.state_dict()[name] for name in stock.state_dict()})
    x = torch.randn(7, 3, 5)
    torch.testing.assert_close(module(x), stock(x), rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_shares_of_units_that_are_held_or_dropped(backend: str, p: float) -> None:
    """What the options promise, seen from outside: how often a state does not change, and means that dropout keeps."""
    torch.manual_seed(2)
    zoned = fastseq.LSTM(3, 64, zoneout=(p, 0.0), backend=backend)
    out, _ = zoned(torch.randn(40, 50, 3))
    held = (out[1:] == out[:-1]).float().mean().item()
    assert abs(held - p) < 5 * (p * (1 - p) / out[1:].numel()) ** 0.5  # five standard deviations
    dropped = fastseq.GRU(3, 64, recurrent_dropout=p, recurrent_dropout_on="update", backend=backend)
    first, _ = dropped(torch.randn(1, 2000, 3))  # from 0, a dropped candidate leaves 0
    none = (first == 0).float().mean().item()
    assert abs(none - p) < 5 * (p * (1 - p) / first.numel()) ** 0.5
    gal = fastseq.RNN(3, 64, recurrent_dropout=p, backend=backend)
    with torch.no_grad():
        gal.weight_ih_l0.zero_()
        gal.weight_hh_l0.copy_(torch.eye(64) * 0.01)  # tanh is linear there: the mask of a row is seen in every step
        out, _ = gal(torch.zeros(3, 200, 3), torch.ones(1, 200, 64))
        biases = gal.bias_ih_l0 + gal.bias_hh_l0
    masks = ((out[0].atanh() - biases) / 0.01).round(decimals=2)
    assert set(masks.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).round(decimals=2).item()}
    weight, kept = gal.weight_hh_l0.diagonal().double(), torch.where(masks > 0, 1 / (1 - p), 0.0).double()
    again = (weight * kept * out[0].double() + biases.double()).tanh()
    roundings = 8 * torch.finfo(torch.float32).eps  # of a few operations on numbers below 1
    torch.testing.assert_close(out[1].double(), again, rtol=0, atol=roundings)


@every_backend
def test_streaming_in_evaluation(backend: str) -> None:
    """Chunks with the state handed on give the whole sequence's results, zoneout's shares included."""
    for kind, options in OPTIONS:
        runs = "auto" if "proj_size" in options else backend
        module = getattr(fastseq, kind)(5, 8, 2, **options, backend=runs).eval()
        x = torch.randn(11, 3, 5)
        whole, last = module(x)
        parts, state = [], None
        for chunk in x.split([1, 4, 1, 5]):
            out, state = module(chunk, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("batch_first", [True, False])
def test_forward_states(backend: str, batch_first: bool) -> None:
    """c after every step is what a call that ends there returns; packed, unbatched and ragged rows too."""
    torch.manual_seed(1)
    module = fastseq.LSTM(5, 8, 2, batch_first=batch_first, bidirectional=True, backend=backend)
    x = torch.randn(3, 6, 5) if batch_first else torch.randn(6, 3, 5)
    out, (h, c), cells = module.forward_states(x)
    torch.testing.assert_close((out, (h, c)), module(x))
    steps = cells if not batch_first else cells.transpose(0, 1)
    for t in range(6):
        cut = x[:, : t + 1] if batch_first else x[: t + 1]
        one = fastseq.LSTM(5, 8, batch_first=batch_first, backend=backend)
        one.load_state_dict({n: p for n, p in module.state_dict().items() if n.endswith("l0")})
        torch.testing.assert_close(one.forward_states(x)[2].select(int(batch_first), t), one(cut)[1][1][0])
    torch.testing.assert_close(steps[-1, :, :8], c[-2])  # the last layer's
    torch.testing.assert_close(steps[0, :, 8:], c[-1])
    ragged = module.forward_states(x, lengths=[2, 6, 4])
    packed = module.forward_states(pack_padded_sequence(x, [2, 6, 4], batch_first, enforce_sorted=False))
    torch.testing.assert_close(ragged[2], pad_packed_sequence(packed[2], batch_first)[0])
    row = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(module.forward_states(row)[2], cells[0] if batch_first else cells[:, 0])


@every_backend
def test_learned_first_state(backend: str) -> None:
    """It stands where hx is None, for every row, and learns; hx goes before it; state_dict has it."""
    for kind in ("LSTM", "GRU", "RNN"):
        module = build(kind, {"learn_state": True}, backend)
        names = ["initial_h", "initial_c"] if kind == "LSTM" else ["initial_h"]
        given = [module.get_parameter(name).detach()[:, None].expand(-1, 3, -1) for name in names]
        hx: Any = tuple(given) if kind == "LSTM" else given[0]
        x = torch.randn(7, 3, 5)
        torch.testing.assert_close(module(x), module(x, hx))
        assert all(module.get_parameter(name).grad is None for name in names)
        module(x)[0].sum().backward()
        assert all(module.get_parameter(name).grad.abs().min() > 0 for name in names)
        assert set(names) <= set(module.state_dict())
        module.reset_parameters()
        assert all(module.get_parameter(name).eq(0).all() for name in names)


def test_resets_beside_a_learned_state_are_refused() -> None:
    with pytest.raises(InputError, match="resets with learn_state=True"):
        fastseq.GRU(5, 8, learn_state=True)(torch.randn(7, 3, 5), resets=torch.zeros(7, 3, dtype=torch.bool))


def test_a_long_sequence() -> None:
    """More steps than cuDNN's 65,535, with masks for each."""
    torch.manual_seed(3)
    module = fastseq.GRU(1, 3, zoneout=0.2, backend="auto")
    x = torch.randn(70_000, 1, 1)
    torch.manual_seed(4)
    out, h = module(x)
    out.sum().backward()
    torch.testing.assert_close(out[-1], h[0])
    assert module.weight_hh_l0.grad.isfinite().all()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LSTM", {"zoneout": 1.0}, r"zoneout=1\.0; it is a probability"),
    ("LSTM", {"zoneout": (0.1, -0.1)}, r"zoneout=-0\.1"),
    ("LSTM", {"zoneout": (0.1, 0.1, 0.1)}, r"pass a probability, or \(of h, of c\)"),
    ("GRU", {"zoneout": (0.1, 0.1)}, r"zoneout=\(0\.1, 0\.1\) of GRU; pass a probability"),
    ("GRU", {"recurrent_dropout": -0.5}, r"recurrent_dropout=-0\.5"),
    ("GRU", {"recurrent_dropout": 0.5, "recurrent_dropout_on": "input"}, "use 'state' .* or 'update'"),
    ("RNN", {"recurrent_dropout": 0.5, "recurrent_dropout_on": "update"}, "writes its whole state; use 'state'"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=str)
def test_refused_when_built(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(fastseq, kind)(5, 8, **options)


def test_named_backends_refuse_what_they_lack() -> None:
    x = torch.randn(7, 3, 5)
    with pytest.raises(InputError, match="neither zoneout nor dropout within the recurrence"):
        fastseq.LSTM(5, 8, zoneout=0.1, backend="torch")(x)
    with pytest.raises(InputError, match="no cell state but the last"):
        fastseq.LSTM(5, 8, backend="torch").forward_states(x)


@every_module
def test_repr_and_changes(kind: str, options: dict[str, Any]) -> None:
    """repr tells the options, and an option that is changed holds from the next call on."""
    module = build(kind, options)
    for name, value in options.items():
        assert name == "nonlinearity" or f"{name}={value!r}" in repr(module)  # which torch.nn.RNN does not tell
    module.zoneout = module.recurrent_dropout = 0.0
    x = torch.randn(7, 3, 5)
    assert torch.equal(module(x)[0], module(x)[0])
    assert repr(getattr(fastseq, kind)(5, 8)) == repr(getattr(nn, kind)(5, 8))


def native_flags(count: int, bound: int, seed: int = 0) -> Tensor:
    flags = torch.empty(count, dtype=torch.bool)
    _native.C.random_flags(seed, count, bound, flags.data_ptr(), torch.get_num_threads())
    return flags


def xoshiro(seed: int, lane: int, draws: int) -> list[int]:
    """xoshiro128++ 1.0 of Blackman and Vigna 2021, begun as csrc/cpu/random_flags.h tells."""
    M32, M64 = (1 << 32) - 1, (1 << 64) - 1
    state, words = (seed + lane * 0xD1342543DE82EF95) & M64, []
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & M64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & M64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
        z ^= z >> 31
        words += [z & M32, z >> 32]

    def rotated(x: int, bits: int) -> int:
        return (x << bits | x >> (32 - bits)) & M32

    (a, b, c, d), numbers = words, []
    for _ in range(draws):
        numbers.append((rotated((a + d) & M32, 7) + a) & M32)
        c, d = c ^ a, d ^ b
        b, a = b ^ c, a ^ d
        c, d = c ^ (words[1] << 9 & M32), rotated(d, 11)
        words = [a, b, c, d]
    return numbers


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("isa", [] if _native.C is None else _native.C.isa_available())
def test_native_flags(isa: str) -> None:
    """By the recipe of the header, on every ISA and by any number of threads; as often true as asked for."""
    count, bound, seed = 70_001, 20_000, (1 << 61) + 3
    try:
        _native.C.choose_isa(isa)
        torch.set_num_threads(2)
        flags = native_flags(count, bound, seed)
        torch.set_num_threads(1)
        assert torch.equal(flags, native_flags(count, bound, seed))
    finally:
        _native.C.choose_isa("")
    for block, lane in ((0, 0), (0, 15), (9, 3)):
        numbers = xoshiro(seed, block * 16 + lane, 128)
        halves = [half < bound for x in numbers for half in (x & 0xFFFF, x >> 16)]
        assert flags[block * 4096 + lane : (block + 1) * 4096 : 16].tolist() == halves
    p = bound / 65536
    assert abs(flags.float().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5  # five standard deviations


def test_draws_follow_torchs_generator() -> None:
    """A seed repeats them, within torch.compile and torch.func too, where torch draws them; another one does not."""
    module, x = fastseq.GRU(5, 8, zoneout=0.5), torch.randn(7, 3, 5)

    def drawn(seed: int, call: Any) -> Tensor:
        torch.manual_seed(seed)
        return call(x)[0].detach()

    transformed = torch.func.vmap(module, in_dims=1, out_dims=(1, 1), randomness="different")
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager"), transformed):
        assert torch.equal(drawn(1, call), drawn(1, call))
        assert not torch.equal(drawn(1, call), drawn(2, call))


def test_a_trace_draws_anew() -> None:
    """torch.jit.trace records what draws a mask, not the memory that it lay in."""
    module, x = fastseq.LSTM(4, 64, zoneout=0.5).train(), torch.randn(5, 3, 4)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(traced(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@every_backend
def test_numbers_of_any_kind_are_probabilities(backend: str) -> None:
    """An int in the pair too, in evaluation and in double backward; two zeros are no option."""
    for pair in ((0.5, 0), (0, 0.5)):
        module = fastseq.LSTM(5, 8, zoneout=pair, backend=backend).eval()
        same = fastseq.LSTM(5, 8, zoneout=tuple(map(float, pair)), backend="reference").eval()
        same.load_state_dict(module.state_dict())
        x = torch.randn(4, 3, 5, requires_grad=True)
        found = []
        for layer in (module, same):
            (d,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(d.square().sum(), x)[0])
        close(found[:1], found[1:])
    none = fastseq.LSTM(5, 8, zoneout=(0.0, 0.0), backend="torch")
    assert none(torch.randn(4, 3, 5))[0].shape == (4, 3, 8)
    assert "zoneout" not in repr(none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_defaults_do_not_reach_the_masks(dtype: torch.dtype) -> None:
    """A default device or dtype that is not the module's."""
    module, x = (
        fastseq.GRU(5, 8, zoneout=0.3, recurrent_dropout=0.2, recurrent_dropout_on="update"),
        torch.randn(4, 3, 5),
    )
    module, x = module.to(dtype), x.to(dtype)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), fastseq.use_backend("reference"):
            out, _ = module(x)
        with torch.device("meta"):
            assert module(x)[0].device.type == "cpu"
    finally:
        torch.set_default_dtype(default)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_wrong_kinds_of_options_are_named() -> None:
    for options, message in (
        ({"zoneout": None}, "zoneout=None is a NoneType; it is a probability"),
        ({"zoneout": torch.tensor(0.1)}, "is a Tensor; it is a probability"),
        ({"recurrent_dropout": (0.1, 0.2)}, r"recurrent_dropout=\(0\.1, 0\.2\) is a tuple"),
        ({"layer_norm": 1e-5}, "layer_norm=1e-05; use True or False"),
        ({"learn_state": 1}, "learn_state=1; use True or False"),
    ):
        with pytest.raises(InputError, match=message):
            fastseq.LSTM(5, 8, **options)
