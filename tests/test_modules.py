"""The modules give torch.nn's results, gradients, draws and dtypes, for every option and kind of input."""

import copy
import io
import pickle
from abc import ABC, abstractmethod
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastseq
from tests.conftest import HAS_HALF_LSTM, NO_HALF_LSTM
from tests.twins import BACKENDS, H, I, check_call, compare, draw, flatten, outcome, twins

OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "bias": False},
]
PROJECTED = [{"proj_size": 3}, {"proj_size": 3, "bias": False, "num_layers": 2, "bidirectional": True}]
CASES = [("LSTM", o) for o in OPTIONS + PROJECTED] + [(kind, o) for kind in ("GRU", "RNN") for o in OPTIONS]
CASES += [("RNN", {"nonlinearity": "relu", **o}) for o in OPTIONS[:2]]
LAYERS, CELLS = ["LSTM", "GRU", "RNN"], ["LSTMCell", "GRUCell", "RNNCell"]


def can(backend: str, options: dict[str, object]) -> bool:
    return backend != "cpu" or "proj_size" not in options


@pytest.mark.parametrize(
    ("backend", "kind", "options"), [(b, *case) for b, case in product(BACKENDS, CASES) if can(b, case[1])], ids=str
)
@pytest.mark.parametrize("rows", ["padded", "unbatched", "sorted", "unsorted"])
def test_equals_torch(kind: str, options: dict[str, object], rows: str, backend: str) -> None:
    stock, fast = twins(kind, backend=backend, **options)
    for hx in (False, True):
        check_call(stock, fast, *draw(stock, rows, hx))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_equal_torch(kind: str, backend: str) -> None:
    for bias, hx, lead in product((True, False), (False, True), ((4,), (1,), ())):
        stock, fast = twins(kind, backend=backend, bias=bias)
        x, h, c = (torch.randn(*lead, n).double() for n in (I, H, H))
        check_call(stock, fast, x, None if not hx else (h, c) if kind == "LSTMCell" else h)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(kind: str, batch_first: bool, backend: str) -> None:
    """Padded rows with lengths against torch's packing of the same rows; what stands behind a length is NaN."""
    stock, fast = twins(kind, backend=backend, batch_first=batch_first, bidirectional=True, num_layers=2)
    packed, hx = draw(stock, "unsorted", True)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first, padding_value=torch.nan)
    behind = (torch.arange(6)[:, None] >= lengths).mT if batch_first else torch.arange(6)[:, None] >= lengths
    truth, low = (outcome(Packing(stock, lengths), padded, hx, dtype) for dtype in (torch.float64, torch.float32))
    for form in (lengths, lengths.int(), lengths.tolist()):
        got = outcome(fast, padded, hx, torch.float32, lengths=form)
        compare(got, [low], [truth])
        assert not got["out0"][behind].any()
        assert not got["d_in0"][behind].any()


class Packing(nn.Module):
    """torch.nn on padded rows of several lengths."""

    def __init__(self, stock: nn.Module, lengths: Tensor) -> None:
        super().__init__()
        self.stock, self.lengths = stock, lengths
        self.named_parameters = stock.named_parameters  # type: ignore[method-assign]

    def forward(self, x: Tensor, hx: object) -> object:
        packed = nn.utils.rnn.pack_padded_sequence(x, self.lengths, self.stock.batch_first, enforce_sorted=False)
        out, state = self.stock(packed, hx)
        return nn.utils.rnn.pad_packed_sequence(out, self.stock.batch_first)[0], state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_length_zero(kind: str, backend: str) -> None:
    """Such a row gives zeros and its initial state, its gradients are 0, and the others do not notice it."""
    _, fast = twins(kind, backend=backend, bidirectional=True)
    x, hx = draw(fast, "padded", True)
    x[:, 1] = torch.nan
    got = outcome(fast, x, hx, torch.float32, lengths=[3, 0, 6, 0])
    others = outcome(fast, x[:, ::2], _rows(hx, slice(None, None, 2)), torch.float32, lengths=[3, 6])
    assert not got["out0"][:, 1::2].any()
    assert not got["d_in0"][:, 1::2].any()
    for k, state in enumerate(flatten(hx)):
        assert torch.equal(got[f"out{k + 1}"][:, 1::2], state[:, 1::2].float())
    torch.testing.assert_close(got["out0"][:, ::2], others["out0"])
    assert all(t.isfinite().all() for name, t in got.items() if "weight" in name or "bias" in name)


def _rows(hx: object, rows: slice) -> object:
    return hx[:, rows] if isinstance(hx, Tensor) else tuple(s[:, rows] for s in hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_nan_stays_in_its_row(kind: str, backend: str) -> None:
    _, fast = twins(kind, backend=backend)
    x = torch.randn(4, 3, I)[0] if kind in CELLS else torch.randn(4, 3, I)
    x[..., 1, :] = torch.nan
    x.requires_grad_()
    outputs = flatten(fast(x))
    assert all(o[..., 1, :].isnan().all() and o[..., ::2, :].isfinite().all() for o in outputs)
    (d_x,) = torch.autograd.grad(outputs[0][..., ::2, :].sum(), x)
    assert d_x[..., ::2, :].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_strides(kind: str, backend: str) -> None:
    """Transposed, stepped and expanded inputs and states."""
    stock, fast = twins(kind, backend=backend)
    h = torch.randn(1, 1, H).double().expand(1, 4, H)
    hx = (h, h * 0.5) if kind == "LSTM" else h
    for x in (
        torch.randn(I, 4, 6).double().permute(2, 1, 0),
        torch.randn(6, 4, 2 * I).double()[..., ::2],
        torch.randn(1, 4, I).double().expand(6, 4, I),
        torch.randn(6, 1, I).double().expand(6, 4, I),
        torch.randn(12, 4, I).double()[::2],
    ):
        for module in (stock, fast):
            module.float()
        with torch.no_grad():
            got, low = (_named(m(x.float(), _float(hx))) for m in (fast, stock))
            compare(got, [low], [_named(stock.double()(x, hx))])


def _named(outputs: object) -> dict[str, Tensor]:
    return {f"out{k}": t for k, t in enumerate(flatten(outputs))}


def _float(hx: object) -> object:
    return hx.float() if isinstance(hx, Tensor) else tuple(s.float() for s in hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_no_rows(kind: str, backend: str) -> None:
    stock, fast = twins(kind, backend=backend)
    x = torch.zeros(0, I) if kind in CELLS else torch.zeros(3, 0, I)
    shapes = [tuple(o.shape) for o in flatten(fast(x))]
    assert shapes == ([(0, H)] * len(shapes) if kind in CELLS else [tuple(o.shape) for o in flatten(stock(x))])
    flatten(fast(x))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in fast.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "batch_first"), [*product(LAYERS, [False, True])])
@pytest.mark.parametrize("rows", ["padded", "sorted"])
def test_dropout_draws_are_torchs(kind: str, batch_first: bool, rows: str, backend: str) -> None:
    for p in (0.3, 1.0):
        stock, fast = twins(kind, backend=backend, num_layers=3, dropout=p, batch_first=batch_first, bidirectional=True)
        x, hx = draw(stock, rows, True)
        check_call(stock, fast, x, hx)
        states = []
        for module in (stock, fast):
            outcome(module, x, hx, torch.float32)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        check_call(stock.eval(), fast.eval(), x, hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_with_lengths_is_the_same_on_every_backend(kind: str, backend: str) -> None:
    _, oracle = twins(kind, backend="reference", num_layers=2, dropout=0.5)
    _, fast = twins(kind, backend=backend, num_layers=2, dropout=0.5)
    x, hx = draw(fast, "padded", True)
    truth, low = (outcome(oracle, x, hx, dtype, lengths=[1, 6, 0, 3]) for dtype in (torch.float64, torch.float32))
    compare(outcome(fast, x, hx, torch.float32, lengths=[1, 6, 0, 3]), [low], [truth])


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "rows"), [*product(LAYERS, ("padded", "sorted")), *product(CELLS, ("padded",))])
def test_autocast_dtypes_are_torchs(kind: str, rows: str, autocast: torch.dtype) -> None:
    """The table of output dtypes, taken anew from torch.nn; `auto` and every backend that can answer by it."""
    if kind == "LSTM" and not HAS_HALF_LSTM:
        pytest.skip(NO_HALF_LSTM)
    for dtype, state in product((torch.float32, autocast), (None, torch.float32, autocast)):
        stock, _ = twins(kind)
        x, hx = _autocast_arguments(stock, kind, rows, dtype, state)
        with torch.autocast("cpu", autocast):
            try:
                expected = [t.dtype for t in flatten(stock(x, hx))]
            except RuntimeError as error:  # this machine's oneDNN has no fp16 LSTM
                assert "could not create a primitive" in str(error)  # noqa: PT017
                continue
            for backend in ("auto", *BACKENDS):
                if backend == "cpu" and autocast == torch.float16:
                    continue
                _, fast = twins(kind, backend=backend)
                assert [t.dtype for t in flatten(fast(x, hx))] == expected, backend


def _autocast_arguments(
    module: nn.Module, kind: str, rows: str, dtype: torch.dtype, state: torch.dtype | None
) -> tuple[object, object]:
    if kind in CELLS:
        x, h = torch.randn(4, I), torch.randn(4, H)
        hx: object = (h, h) if kind == "LSTMCell" else h
    else:
        x, hx = draw(module, rows, True)
    x = x.to(dtype)
    if state is None:
        return x, None
    return x, hx.to(state) if isinstance(hx, Tensor) else tuple(s.to(state) for s in hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_values(kind: str, backend: str) -> None:
    """Under bf16 autocast: outputs and every gradient within twice stock's own error, which computes in bf16 too."""
    stock, fast = twins(kind, backend=backend, bidirectional=True)
    x, hx = draw(stock, "padded", True)
    truth = outcome(stock, x, hx, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        low, got = outcome(stock, x, hx, torch.float32), outcome(fast, x, hx, torch.float32)
    assert all(t.dtype == low[name].dtype for name, t in got.items())
    rounded = {name: t.bfloat16() for name, t in low.items()}  # whatever dtype bf16 arithmetic is handed back in
    compare({name: t.bfloat16() for name, t in got.items()}, [rounded], [truth])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_fp32_state_beside_bf16(kind: str, backend: str) -> None:
    _, fast = twins(kind, backend=backend)
    x, hx = draw(fast, "padded", True)
    out, *states = flatten(fast.bfloat16()(x.bfloat16(), _float(hx)))
    assert out.dtype == torch.bfloat16
    assert all(s.dtype == torch.float32 for s in states)


@pytest.mark.parametrize(("kind", "options"), [*CASES, ("LSTMCell", {}), ("GRUCell", {"bias": False})], ids=str)
def test_same_parameters_and_state_dict(kind: str, options: dict[str, object]) -> None:
    stock, fast = twins(kind, **options)
    assert isinstance(fast, getattr(nn, kind))
    for (name, p), (fast_name, q) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        assert name == fast_name
        assert torch.equal(p, q)
    torch.manual_seed(8)
    stock.reset_parameters()
    torch.manual_seed(8)
    fast.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(stock.parameters(), fast.parameters(), strict=True))
    other = twins(kind, seed=5, **options)
    assert other[0].load_state_dict(fast.state_dict()) == other[1].load_state_dict(stock.state_dict())
    assert repr(fast).replace(", backend='cpu'", "") == repr(stock)
    assert "backend='torch'" in repr(getattr(fastseq, kind)(I, H, backend="torch"))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_copies_and_pickles(kind: str) -> None:
    _, fast = twins(kind, backend="reference")
    x = torch.randn(3, 2, I)[0] if kind in CELLS else torch.randn(3, 2, I)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(fast)
        assert twin.backend == "reference"
        assert all(torch.equal(a, b) for a, b in zip(flatten(twin(x)), flatten(fast(x)), strict=True))
        with torch.no_grad():
            next(twin.parameters()).zero_()  # the copy's own, and read anew at every call
        assert not torch.equal(flatten(twin(x))[0], flatten(fast(x))[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_weights_are_read_at_every_call(kind: str, backend: str) -> None:
    """Replaced, rewritten through .data, parametrized and functionally called parameters all count at once."""
    stock, fast = twins(kind, backend=backend)
    x = torch.randn(3, 2, I)[0] if kind in CELLS else torch.randn(3, 2, I)
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    changes = [
        lambda m: setattr(m, name, nn.Parameter(torch.full_like(getattr(m, name), 0.1))),
        lambda m: getattr(m, name).data.mul_(-2.0),
        lambda m: setattr(getattr(m, name), "data", torch.full_like(getattr(m, name), 0.2)),
        lambda m: parametrizations.weight_norm(m, name),
        lambda m: parametrize.remove_parametrizations(m, name),
    ]
    for change in changes:
        for module in (stock, fast):
            change(module)
        for a, b in zip(flatten(stock(x)), flatten(fast(x)), strict=True):
            torch.testing.assert_close(b, a)
    given = {n: torch.zeros_like(p) for n, p in fast.named_parameters()}
    assert not flatten(torch.func.functional_call(fast, given, x))[0].any()
    if kind in LAYERS:
        fast.flatten_parameters()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_per_sample_gradients(kind: str, backend: str) -> None:
    """vmap(grad) over the rows of a batch adds up to the gradient of the whole."""
    _, fast = twins(kind, backend=backend)
    x = torch.randn(3, 4, I)[0] if kind in CELLS else torch.randn(3, 4, I)
    parameters = {n: p.detach() for n, p in fast.named_parameters()}

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return flatten(torch.func.functional_call(fast, given, row.unsqueeze(-2)))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, -2))(parameters, x)
    flatten(fast(x))[0].square().sum().backward()
    for name, p in fast.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)


class Base(ABC):
    @abstractmethod
    def describe(self) -> str: ...


class Mixin(nn.Module):
    def __init__(self, *args: object, tag: str, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class Mine(Mixin, Base, fastseq.LSTM):
    def describe(self) -> str:
        return f"{self.tag}: {self.input_size} to {self.hidden_size}"


def test_cooperative_inheritance() -> None:
    mine = Mine(I, hidden_size=H, num_layers=2, tag="mine", backend="reference")
    assert mine.describe() == "mine: 5 to 6"
    assert mine.backend == "reference"
    assert pickle.loads(pickle.dumps(mine)).tag == "mine"
    assert mine(torch.zeros(3, 2, I))[0].shape == (3, 2, H)


def test_hooks_run() -> None:
    fast, seen = fastseq.GRU(I, H), []
    fast.register_forward_pre_hook(lambda module, args: seen.append("before"))
    fast.register_forward_hook(lambda module, args, output: seen.append("after"))
    fast(torch.zeros(3, 2, I))
    assert seen == ["before", "after"]


class Holder(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.rnn(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*product(LAYERS + CELLS, ["auto"]), ("LSTM", "reference"), ("LSTMCell", "torch"), ("GRU", "torch")],
)
def test_compiles_without_a_break(kind: str, backend: str) -> None:
    """As the root, within another module, with dynamic shapes, states and lengths; gradients too."""
    torch._dynamo.reset()
    _, fast = twins(kind, backend=backend)
    for module in (fast, Holder(fast)):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for steps, rows, lengths in ((3, 2, None), (2, 4, None), (4, 3, torch.tensor([4, 0, 1]))):
            if lengths is not None and backend == "torch":
                continue
            x = torch.randn(rows, I) if kind in CELLS else torch.randn(steps, rows, I)
            kwargs = {} if lengths is None or kind in CELLS else {"lengths": lengths}
            for a, b in zip(flatten(compiled(x, **kwargs)), flatten(module(x, **kwargs)), strict=True):
                torch.testing.assert_close(a, b)
        flatten(compiled(x))[0].sum().backward()
        assert all(p.grad is not None for p in fast.parameters())
    torch._dynamo.reset()


def test_compile_leaves_torchs_modules_alone() -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(Holder(nn.LSTM(I, H)), fullgraph=True, backend="eager")(torch.zeros(3, 2, I))
    with fastseq.patch():
        torch.compile(Holder(nn.LSTM(I, H)), fullgraph=True, backend="eager")(torch.zeros(3, 2, I))
    torch._dynamo.reset()
