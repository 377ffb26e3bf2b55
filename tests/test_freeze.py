"""Frozen modules give the unfrozen ones' results, to the bit where both pack, and never those of changed weights."""

import copy
import io
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import _native
from fastseq.backends import fused
from fastseq.modules.cells import gru_cell_call
from fastseq.modules.rnn import lstm_call
from fastseq.ops.packed import PACKED_PRODUCTS, PackedLayer
from tests.isa import VARIANTS, choose
from tests.oracle import Case, Problem, Results, budget, compare, nan_in_empty
from tests.twins import flatten
from tests.weight_changes import CHANGES, in_place, swapped, transposed

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops.rnn import rnn_layer
from fastseq.ops.step import StepShape, rnn_step

I, H = 19, 37  # noqa: E741  (the project's letter)
KINDS = {"LSTM": fastseq.LSTM, "GRU": fastseq.GRU, "RNN": fastseq.RNN}
CELLS = {"LSTMCell": fastseq.LSTMCell, "GRUCell": fastseq.GRUCell}


def packs_of(model: nn.Module) -> list[PackedLayer]:
    return [layer for m in model.modules() for layer in m.__dict__.get("_fastseq_frozen") or ()]


def same_bits(got: Any, expected: Any) -> None:
    for g, e in zip(flatten(got), flatten(expected), strict=True):
        assert torch.equal(g, e)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each direction that is packed."""
    made: list[str] = []
    pack = fastseq.ops.packed._pack

    def counted(cell: str, *weights: Tensor) -> Tensor:
        made.append(cell)
        return pack(cell, *weights)

    monkeypatch.setattr(fastseq.ops.packed, "_pack", counted)
    return made


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_same_bits_as_unfrozen(kind: str, dtype: torch.dtype, threads: int, isa: str) -> None:
    """Every number of rows and form of input, by one set of packed weights."""
    choose(isa)
    torch.set_num_threads(threads)
    for layers, both, bias in ((1, False, True), (2, True, False), (2, True, True)):
        free = KINDS[kind](I, H, layers, bias=bias, bidirectional=both, dtype=dtype)
        fixed = fastseq.freeze(copy.deepcopy(free))
        for rows in (1, 3, 8, 32):
            x = torch.randn(7, rows, I, dtype=dtype)
            lengths = torch.randint(0, 8, (rows,))
            packed = pack_padded_sequence(x, lengths.clamp(1), enforce_sorted=False)
            with nan_in_empty():
                for input, options in ((x, {}), (x, {"lengths": lengths}), (packed, {})):
                    same_bits(fixed(input, **options), free(input, **options))
        kept = packs_of(fixed)
        assert len(kept) == layers
        assert all(layer.nbytes > 0 for layer in kept)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_same_bits_with_resets(kind: str, steps: int, threads: int, packings: list[str]) -> None:
    """They choose the state that is multiplied, not the weights."""
    torch.set_num_threads(threads)
    for layers, dirs in ((1, 1), (1, 2), (2, 2)):
        free = KINDS[kind](I, H, layers, bidirectional=dirs == 2)
        fixed = fastseq.freeze(copy.deepcopy(free))
        for rows in (1, 3, 8, 32):
            x, resets = torch.randn(steps, rows, I), torch.rand(steps, rows) < 0.3
            resets[0, 0] = True
            state = torch.randn(layers * dirs, rows, H)
            hx = (state, state + 1) if kind == "LSTM" else state
            for lengths in (None, torch.randint(0, steps + 1, (rows,))):
                got, plain = (fixed(x, hx, lengths=lengths, resets=r) for r in (resets, None))
                same_bits(got, free(x, hx, lengths=lengths, resets=resets))
                same_bits(plain, free(x, hx, lengths=lengths))
                assert lengths is not None or not torch.equal(got[0], plain[0])
    assert len(packings) == 1 + 2 + 4


@pytest.mark.parametrize("on", ["triton", "cuda"])
@torch.no_grad()
def test_backends_for_gpus_are_given_nothing(on: str, packings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels stand in for theirs, which read the weights as they stand."""
    for ops in (fastseq.ops.rnn, fastseq.ops.step):
        monkeypatch.setattr(ops, "gpu_kernels", lambda on, module, kernels=ops._NATIVE: kernels)
    layer, cell = fastseq.freeze(fastseq.LSTM(I, H, 2)), fastseq.freeze(fastseq.GRUCell(300, 300))
    x, resets, row = torch.randn(5, 2, I), torch.rand(5, 2) < 0.3, torch.randn(8, 300)
    for name in (on, "cpu"):
        assert packings == []
        call = lstm_call(layer, x, None)
        call.resets = resets
        fused.rnn(call, name)
        fused.rnn_cell(gru_cell_call(cell, row, None), name)
    assert packings == ["lstm", "lstm", "gru"]


IN_PLACE = [  # where an unfrozen call reads weights as they stand, and a frozen one packed ones
    Case(cell, dtype, *shape, bidirectional=shape[0] > 1, bias=bias, hx=bias, threads=threads, resets=resets)
    for cell, dtype, (shape, threads), (bias, resets) in itertools.product(
        ("lstm", "gru"),
        (torch.float32, torch.bfloat16),
        [
            ((5, 1, 200, 201), 1),
            ((5, 1, 201, 256), 2),
            ((5, 3, 201, 20), 1),
            ((1, 1, 257, 260), 1),
            ((1, 16, 65, 66), 2),
        ],
        [(True, False), (False, False), (True, True)],
    )
]


def forward(layer: Any, problem: Problem, dtype: torch.dtype | None = None) -> Results:
    return problem.call(layer, {n: t.to(dtype or t.dtype) for n, t in problem.tensors.items()})


def frozen_layer(*args: Any, step: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """rnn_layer, or rnn_step of its one step, by weights packed for it."""
    cell, x, h0, c0, weights, *_, bidirectional = args
    kept = PackedLayer(1 + bidirectional)
    weights = [nn.Parameter(w, requires_grad=False) for w in weights]
    if step:
        (_, rows, _), hidden = x.shape, weights[1].shape[1]
        shape = StepShape(cell, rows, x.stride(1), (1, rows, hidden), (1, rows, hidden))
        out, h, *c = rnn_step(shape, x, h0, c0, weights, frozen=kept)
        results = out, h, c[0] if c else None
    else:
        results = rnn_layer(cell, x, h0, c0, weights, *args[5:], frozen=kept)
    assert kept.nbytes > 0
    return results


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("case", IN_PLACE, ids=str)
@torch.no_grad()
def test_packed_is_right_where_unfrozen_reads_in_place(case: Case, isa: str) -> None:
    choose(isa)
    problem = Problem.draw(case)
    truth, allowed = budget(problem, forward)
    torch.set_num_threads(case.threads)
    for step in (False, True)[: 1 + (case.T == 1 and not case.resets)]:  # rnn_step knows no resets
        with nan_in_empty():
            compare(forward(partial(frozen_layer, step=step), problem), truth, allowed)


@pytest.mark.parametrize("kind", CELLS)
@torch.no_grad()
def test_small_steps_stay_as_they_are(kind: str, packings: list[str]) -> None:
    """A step of few numbers is faster on the weights as they stand, and has the bits of the unfrozen one."""
    for hidden in (8, 200):
        free = CELLS[kind](I, hidden)
        fixed, x = fastseq.freeze(copy.deepcopy(free)), torch.randn(4, I)
        expected = free(x)
        for got, e in zip(flatten(fixed(x)), flatten(expected), strict=True):
            torch.testing.assert_close(got, e)
        assert len(packings) == (4 * hidden * (I + hidden) >= PACKED_PRODUCTS)


@torch.no_grad()
def test_weights_are_packed_once(packings: list[str]) -> None:
    fixed = fastseq.freeze(fastseq.LSTM(I, H, 2, bidirectional=True))
    assert packings == []
    for threads, rows, steps in ((1, 3, 5), (2, 8, 9), (1, 1, 1)):
        torch.set_num_threads(threads)
        fixed(torch.randn(steps, rows, I))
    assert packings == ["lstm"] * 4


@pytest.mark.parametrize(
    ("kind", "change"),
    [pair for pair in itertools.product(KINDS | CELLS, CHANGES) if pair[0] in CELLS or pair[1] != "swapped"],
)
def test_changed_weights_are_packed_again(kind: str, change: str, packings: list[str]) -> None:
    """At the next call, and once."""
    fixed: Any = fastseq.freeze((KINDS | CELLS)[kind](120, 130))
    state = torch.randn(4, 130)
    given: tuple[Any, ...] = (torch.randn(9, 4, 120),)
    if kind in CELLS:
        given = torch.randn(4, 120), (state, state) if kind == "LSTMCell" else state
    with torch.no_grad():
        before = fixed(*given)
        assert len(packings) == 1
        CHANGES[change](fixed)
        now, again = fixed(*given), fixed(*given)
        assert len(packings) == 2
        fresh = fastseq.freeze(copy.deepcopy(fixed))(*given)
    same_bits(now, fresh)
    same_bits(again, fresh)
    assert not torch.equal(flatten(now)[0], flatten(before)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_of_layers_are_never_swapped(kind: str, packings: list[str]) -> None:
    """torch.nn holds them by weak references, which torch refuses to swap: nothing changes, nothing is packed again."""
    fixed, x = fastseq.freeze(KINDS[kind](I, H)), torch.randn(5, 2, I)
    before = fixed(x)
    with pytest.raises(RuntimeError, match="weakref"):
        swapped(fixed)
    same_bits(fixed(x), before)
    assert len(packings) == 1


@torch.no_grad()
def test_a_transposed_weight_is_another() -> None:
    fixed = fastseq.freeze(fastseq.LSTM(4 * H, H))
    x = torch.randn(3, 2, 4 * H)
    before = fixed(x)
    transposed(fixed)
    same_bits(fixed(x), copy.deepcopy(fixed)(x))
    assert not torch.equal(fixed(x)[0], before[0])


@torch.no_grad()
def test_another_instruction_set_packs_again() -> None:
    fixed, x = fastseq.freeze(fastseq.LSTM(I, H)), torch.randn(5, 3, I)
    free = copy.deepcopy(fixed)
    for isa in (*_native.C.isa_available(), *_native.C.isa_available()):
        choose(isa)
        same_bits(fixed(x), free(x))


@torch.no_grad()
def test_freezing_again_sees_what_nothing_counts() -> None:
    """Writes through .data in place, which the docstring names."""
    fixed, x = fastseq.freeze(fastseq.GRU(I, H)), torch.randn(5, 2, I)
    before = fixed(x)
    fixed.weight_hh_l0.data.mul_(2)
    same_bits(fixed(x), before)
    same_bits(fastseq.freeze(fixed)(x), copy.deepcopy(fixed)(x))


def test_an_optimizer_of_others_changes_nothing(packings: list[str]) -> None:
    teacher, student, x = fastseq.freeze(fastseq.GRU(I, H)), nn.Linear(2, 2), torch.randn(5, 2, I)
    for _ in range(3):
        with torch.no_grad():
            teacher(x)
        CHANGES["optimizer_writing_data"](student)
    assert packings == ["gru"]


def test_training_is_as_before() -> None:
    """Gradients are those of the unfrozen module, and between steps inference sees the new weights."""
    free = fastseq.LSTM(I, H, 2, dropout=0.5)
    fixed, x = fastseq.freeze(copy.deepcopy(free)), torch.randn(5, 3, I)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, fused=True) for m in (free, fixed)]
    for _ in range(3):
        for module, optimizer in zip((free, fixed), optimizers, strict=True):
            torch.manual_seed(1)
            module.zero_grad()
            module(x)[0].square().sum().backward()
            with torch.no_grad():
                module(x)
            optimizer.step()
        for a, b in zip(free.parameters(), fixed.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        with torch.no_grad():
            same_bits(fixed.eval()(x), free.eval()(x))
        free.train(), fixed.train()


@torch.no_grad()
def test_other_weights_for_a_call(packings: list[str]) -> None:
    """functional_call and parametrizations make tensors for each call: neither kept nor mistaken for others."""
    free = fastseq.GRU(I, H)
    fixed, x = fastseq.freeze(copy.deepcopy(free)), torch.randn(5, 2, I)
    doubled = {n: p * 2 for n, p in free.named_parameters()}
    expected = torch.func.functional_call(free, doubled, (x,))
    for _ in range(2):
        same_bits(fixed(x), free(x))
        same_bits(torch.func.functional_call(fixed, doubled, (x,)), expected)
    normed = fastseq.freeze(parametrizations.weight_norm(copy.deepcopy(free), "weight_hh_l0"))
    count = len(packings)
    same_bits(normed(x), fastseq.unfreeze(normed)(x))
    assert len(packings) == count


@torch.no_grad()
def test_transforms_and_autocast_are_as_before() -> None:
    free = fastseq.LSTM(I, H)
    fixed, x = fastseq.freeze(copy.deepcopy(free)), torch.randn(4, 5, 2, I)
    fixed(x[0])
    out = [torch.vmap(lambda x, m=m: m(x)[0])(x) for m in (fixed, free)]
    same_bits(*out)
    for m in (fixed, free):
        _, tangent = torch.func.jvp(lambda x, m=m: m(x)[0], (x[0],), (x[1],))
        out.append(tangent)
    same_bits(*out[2:])
    with torch.autocast("cpu", torch.bfloat16):
        same_bits(fixed(x[0]), free(x[0]))
    with fastseq.use_backend("torch"):
        same_bits(fixed(x[0]), free(x[0]))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_as_before() -> None:
    fixed, x = fastseq.freeze(fastseq.LSTM(I, H)), torch.randn(5, 2, I)
    expected = copy.deepcopy(fixed)(x)
    compiled = torch.compile(fixed, backend="aot_eager", fullgraph=True)
    same_bits(compiled(x), expected)
    in_place(fixed)
    same_bits(compiled(x), fixed(x))


@torch.no_grad()
def test_weights_made_in_inference_mode_are_never_kept(packings: list[str]) -> None:
    with torch.inference_mode():
        fixed, x = fastseq.freeze(fastseq.GRU(I, H)), torch.randn(5, 2, I)
        before = fixed(x)
        fixed.weight_hh_l0.mul_(2)
        assert not torch.equal(fixed(x)[0], before[0])
        assert "inference mode" in str(fastseq.explain(fixed, x))
    assert packings == []


def test_copies_and_files_are_unfrozen() -> None:
    model = nn.Sequential(fastseq.GRU(I, H, bidirectional=True))
    x, plain_bytes = torch.randn(5, 2, I), len(pickle.dumps(model))
    names = list(model.state_dict())
    fastseq.freeze(model)
    with torch.no_grad():
        expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert packs_of(other) == []
        with torch.no_grad():
            same_bits(other(x), expected)
    assert packs_of(model)[0].nbytes > 4 * 2 * 3 * H * (I + H)
    assert len(pickle.dumps(model)) < plain_bytes + 200
    assert list(model.state_dict()) == names
    assert len(list(model.buffers())) == 0


@torch.no_grad()
def test_unfreezing_gives_the_memory_back() -> None:
    model = fastseq.freeze(nn.ModuleDict({"a": fastseq.LSTM(I, H), "b": fastseq.LSTMCell(I, H)}))
    model["a"](torch.randn(3, 2, I))
    assert sum(layer.nbytes for layer in packs_of(model)) > 0
    assert fastseq.unfreeze(model) is model
    assert packs_of(model) == []
    fastseq.unfreeze(model)


def test_accelerated_and_patched_modules() -> None:
    stock, x = nn.LSTM(I, H), torch.randn(5, 2, I)
    with pytest.raises(fastseq.InputError, match=r"no fastseq LSTM.*within LSTM; .*accelerate\(model\)"):
        fastseq.freeze(stock)
    with torch.no_grad(), fastseq.patch():
        expected = stock(x)
        fastseq.freeze(stock)
        same_bits(stock(x), expected)
        assert packs_of(stock)[0].nbytes > 0
        fastseq.unfreeze(stock)
        assert packs_of(stock) == []
    fastseq.accelerate(stock)
    fastseq.freeze(stock)
    assert len(packs_of(stock)) == 1
    fastseq.accelerate(stock, undo=True)
    assert packs_of(stock) == []


@torch.no_grad()
def test_parts_of_sequence_models() -> None:
    encoder = fastseq.Encoder(I, H, 3, bidirectional=1, residual=True)
    x, lengths = torch.randn(4, 6, I), [6, 0, 3, 6]
    expected = encoder(x, lengths)
    assert fastseq.freeze(encoder) is encoder
    same_bits(encoder(x, lengths).out, expected.out)
    assert [layer.nbytes > 0 for layer in packs_of(encoder)] == [True] * 3
    before = fastseq.freeze(fastseq.Encoder(I, H, cell="gru_reset_before"))
    before(x, lengths)
    assert [layer.nbytes for layer in packs_of(before)] == [0]  # no kernel of the kind has packed weights


def test_what_is_no_model_is_refused() -> None:
    for function in (fastseq.freeze, fastseq.unfreeze):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
            function([fastseq.LSTM(I, H)])
    with pytest.raises(fastseq.InputError, match="within Linear"):
        fastseq.freeze(nn.Linear(2, 2))


def test_explain_says_what_is_used() -> None:
    fixed, x = fastseq.freeze(fastseq.LSTM(I, H)), torch.randn(5, 2, I)

    def said(module: nn.Module = fixed, x: Tensor = x) -> str:
        return str(fastseq.explain(module, x)[0].reason)

    assert "without its frozen weights: gradients are recorded; use torch.no_grad()" in said()
    with torch.no_grad():
        assert said().endswith("; with frozen weights, packing them first")
        assert packs_of(fixed)[0].nbytes == 0  # explaining packs nothing
        fixed(x)
        assert said().endswith("; with frozen weights")
        in_place(fixed)
        assert said().endswith("packing them first")
        with torch.autocast("cpu", torch.bfloat16):
            assert "without its frozen weights: autocast casts" in said()
        cell = fastseq.freeze(fastseq.LSTMCell(I, H))
        assert "one step of so few numbers" in said(cell, x[0])
        assert "with frozen weights" in said(fastseq.freeze(fastseq.GRUCell(300, 300)), torch.randn(8, 300))
        normed = fastseq.freeze(parametrizations.weight_norm(fastseq.GRU(I, H), "weight_hh_l0"))
        assert "is no parameter" in said(normed)
        assert "frozen" not in said(fastseq.LSTM(I, H))
        with fastseq.use_backend("torch"):
            assert "frozen" not in str(fastseq.explain(fixed, x))


@torch.no_grad()
def test_threads_share_a_module_whose_weights_change() -> None:
    """Every call gives the results of the weights before or after a change, none of a mixture."""
    fixed, x = fastseq.freeze(fastseq.GRU(I, H)), torch.randn(5, 2, I)
    versions = [{n: p * scale for n, p in fixed.state_dict().items()} for scale in (1, 2, 3)]
    expected = []
    for version in versions:
        fixed.load_state_dict(version)
        expected.append(copy.deepcopy(fixed)(x)[0])

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return fixed(x)[0]

    with ThreadPoolExecutor(4) as pool:
        for version, out in zip(versions, expected, strict=True):
            fixed.load_state_dict(version)
            for got in pool.map(call, range(40)):
                assert torch.equal(got, out)
