"""fastseq.save and load: what comes back, what is refused, and that a file is whole or not there."""

import copy
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastseq
from fastseq import Attention, Bridge, Decoder, Encoder, InputError, LocalP, Seq2Seq, config, saving
from tests.decoder_loops import LOOPS
from tests.test_decoder_modules import inputs
from tests.test_decoder_presets import build, close

safetensors_torch = pytest.importorskip("safetensors.torch")

CELLS = ("lstm", "gru", "gru_reset_before")
ROOT = Path(__file__).parents[1]
SRC = torch.tensor([[3, 4, 5], [6, 7, 0]])
TGT = torch.tensor([[1, 5, 6, 7], [1, 4, 2, 0]])


def tiny(cell: str = "lstm", **options: Any) -> Seq2Seq:
    """A model of a few kB with every kind of part."""
    encoder = Encoder(3, 4, cell=cell, bidirectional=True, embedding=nn.Embedding(8, 3, padding_idx=0))
    attention = partial(Attention, query_bias=True, normalize=True)
    decoder = Decoder.bahdanau(3, 4, cell=cell, memory_size=8, attention=attention, combine_size=3)
    return Seq2Seq(encoder, decoder, 8, bos_id=1, eos_id=2, pad_id=0, **options)


def again(module: nn.Module, path: Path) -> Any:
    """The module, saved and loaded; it is the same in all that can be asked of it."""
    fastseq.save(module, path / "model")
    found = fastseq.load(path / "model")
    assert repr(found) == repr(module)
    assert found.config() == module.config()
    assert not found.training
    ours, theirs = module.state_dict(), found.state_dict()
    assert list(ours) == list(theirs)
    for name, t in ours.items():
        assert theirs[name].dtype == t.dtype
        assert torch.equal(theirs[name], t)
    return found


def save_tiny(folder: Path) -> Path:
    """A model with a tie and an extra, in a file."""
    model = tiny(tie="target")
    model.extra = {"words": ["a", "b"], "n": 3}
    model.save(folder / "model")
    return folder / "model"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


# ---- what comes back


PAIRS = [(name, cell) for name in LOOPS for cell in CELLS if name != "cho" or cell == "gru"]


@pytest.mark.parametrize(("name", "cell"), PAIRS)
def test_every_preset(name: str, cell: str, tmp_path: Path) -> None:
    decoder = build(name, cell=cell).eval()
    y, memory = inputs(decoder)
    found = again(decoder, tmp_path)
    close(found(y, memory, need_weights=True), decoder(y, memory, need_weights=True), 0)


def draw(pick: random.Random) -> Seq2Seq:
    """A model of random options, whatever goes together."""
    cell, layers, units, size = pick.choice(CELLS), pick.randint(1, 3), pick.randint(2, 5), pick.randint(2, 5)
    tie = pick.choice((None, "target", "all"))
    encoder = Encoder(
        size, units, layers, cell=cell, bidirectional=pick.randint(0, layers), dropout=pick.random(),
        residual=pick.random() < 0.5, embedding=nn.Embedding(9, size, pick.choice((None, 0, 4)), norm_type=1.0),
        backend=pick.choice(("auto", "reference")),
        zoneout=pick.choice((0.0, 0.25) + ((0.5, 0.125),) * (cell == "lstm")),
        recurrent_dropout=pick.choice((0.0, 0.25)), learn_state=pick.random() < 0.5,
        recurrent_dropout_on=pick.choice(("state", "state" if cell.startswith("rnn") else "update")),
        layer_norm=cell in ("lstm", "gru") and pick.random() < 0.5,
    )  # fmt: skip
    attention = pick.choice((
        partial(Attention, attn_size=3, query_bias=True, normalize=True),
        partial(Attention, score="general", scale=pick.choice((None, 0.5, 2, "learned")), window=LocalP(2)),
        partial(Attention, score="concat", backend="reference"), "general", None,
    ))  # fmt: skip
    bridge = pick.choice((
        Bridge("zero"), "zero", Bridge("mean", act="tanh", cell="same"),
        Bridge("top", "shared", bias=False, cell="zero", size=encoder.output_size),
        Bridge("last", "joint", "relu", layers=(-1,), size=encoder.output_size),
    ))  # fmt: skip
    feed, readout = pick.choice((None, "output")), pick.choice((["state"], ("context", "state")))
    if attention is not None and readout == ["state"]:
        feed = "context"  # or nothing would read it
    decoder = Decoder(
        size, units, layers, cell=cell, memory_size=encoder.output_size, attention=attention, attend="after",
        feed=feed, readout=readout, bridge=bridge,
        combine=pick.choice(("tanh", "linear", "maxout")), combine_size=size, combine_bias=pick.random() < 0.5,
        residual=layers - 1 or None, dropout=0.25 * (layers > 1), input_dropout=pick.random(), output_dropout=0.5,
        backend=pick.choice(("auto", "reference")),
    )  # fmt: skip
    return Seq2Seq(encoder, decoder, 9, bos_id=1, eos_id=2, pad_id=0, output_bias=pick.random() < 0.5, tie=tie)


@pytest.mark.parametrize("seed", range(25))
def test_any_options(seed: int, tmp_path: Path) -> None:
    model = draw(random.Random(seed)).eval()
    found = again(model, tmp_path)
    with torch.no_grad():
        close(found(SRC, TGT, [3, 2], need_weights=True), model(SRC, TGT, [3, 2], need_weights=True), 0)
        ours, theirs = (m.generate(SRC, [3, 2], num_beams=2, max_new_tokens=4) for m in (model, found))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in found.named_parameters()]  # tied ones count once
    for m in (model, found):
        torch.manual_seed(0)
        m.train()
        m.loss(SRC, TGT, [3, 2]).backward()
    for p, q in zip(model.parameters(), found.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_parts_alone(tmp_path: Path) -> None:
    encoder = Encoder(3, 4, 2, bidirectional=1, residual=True).eval()
    x = torch.randn(2, 5, 3)
    close(again(encoder, tmp_path)(x, [5, 2]), encoder(x, [5, 2]), 0)
    attention = Attention(4, 4, score="dot", scale=0.5, window=LocalP(3)).eval()
    assert again(attention, tmp_path).window == LocalP(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny().to(dtype)
    model.encoder.to(torch.float64)  # each parameter has its own
    found = again(model, tmp_path)
    assert found.decoder.weight_hh_l0.dtype == dtype
    with torch.device("cpu"):
        assert Seq2Seq.load(tmp_path / "model", device="cpu").decoder.weight_hh_l0.dtype == dtype


@pytest.mark.parametrize("tie", ["target", "all"])
def test_ties(tie: str, tmp_path: Path) -> None:
    found = again(tiny(tie=tie), tmp_path)
    assert found.output.weight is found.embedding.weight
    assert (found.encoder.embedding.weight is found.embedding.weight) == (tie == "all")
    stored = safetensors_torch.load_file(tmp_path / "model")
    assert len(stored) == len(list(found.parameters()))


def test_ties_of_the_users_own(tmp_path: Path) -> None:
    model = tiny()
    model.output.weight = model.encoder.embedding.weight
    found = again(model, tmp_path)
    assert found.output.weight is found.encoder.embedding.weight
    assert found.embedding.weight is not found.output.weight
    model = tiny(tie="target")
    model.output.weight = nn.Parameter(torch.randn(8, 3))
    found = again(model, tmp_path)
    assert found.output.weight is not found.embedding.weight


def test_parameters_of_any_layout(tmp_path: Path) -> None:
    """Transposed, strided and within one buffer, as cuDNN's flat weights are."""
    model = tiny()
    model.decoder.weight_hh_l0 = nn.Parameter(torch.randn(4, 16).T)
    model.output.weight = nn.Parameter(torch.randn(16, 6)[::2, ::2])
    flat = torch.randn(2, 16)
    model.decoder.bias_ih_l0, model.decoder.bias_hh_l0 = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    model.decoder.bias_ih_l0.requires_grad_(False)
    found = again(model, tmp_path)
    assert all(p.is_contiguous() and p.requires_grad and p.data_ptr() % 64 == 0 for p in found.parameters())


EXTRA = {
    "words": ["<pad>", "$x_1$", "é", "日本", "\ud800", '"', "\\", "\0"],
    "": {"nested": [{"a": [None, True, 1, 1.0, -0.0, 1e300, float("inf"), 2**70]}]},
    "empty": [{}, []],
}


def test_extra(tmp_path: Path) -> None:
    model = tiny()
    model.extra = copy.deepcopy(EXTRA)
    found = again(model, tmp_path)
    assert json.dumps(found.extra) == json.dumps(EXTRA)  # types, signs and order of the keys as well
    assert again(tiny(), tmp_path).extra == {}
    encoder = Encoder(2, 3)
    encoder.extra = {"words": ["a"]}
    assert again(encoder, tmp_path).extra == {"words": ["a"]}


NOISE: dict[str, Any] = {"recurrent_dropout": 0.1, "learn_state": True}
LAYERS: dict[str, nn.Module] = {
    "LSTM": fastseq.LSTM(3, 4),
    "LSTM, projected": fastseq.LSTM(3, 4, 2, proj_size=2, dropout=0.5, bidirectional=True, learn_state=True),
    "LSTM, options": fastseq.LSTM(3, 4, zoneout=(0.1, 0.2), recurrent_dropout_on="update", layer_norm=True, **NOISE),
    "GRU": fastseq.GRU(3, 4, 2, batch_first=True, bias=False, backend="reference"),
    "GRU, options": fastseq.GRU(3, 4, zoneout=0.1, layer_norm=True, dtype=torch.float64, **NOISE),
    "RNN": fastseq.RNN(3, 4, nonlinearity="relu"),
    "RNN by position": fastseq.RNN(3, 4, 2, "relu", False, True, 0.5, True, zoneout=0.3, **NOISE),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_alone(name: str, tmp_path: Path) -> None:
    layer: Any = LAYERS[name]
    found = again(layer.eval(), tmp_path)
    assert type(found) is type(layer)
    assert (found.zoneout, found.backend, found.batch_first) == (layer.zoneout, layer.backend, layer.batch_first)
    x = torch.randn(2, 5, 3, dtype=next(layer.parameters()).dtype)
    assert torch.equal(found(x)[0], layer(x)[0])
    assert torch.equal(found.train()(x)[0].isfinite().all(), torch.tensor(True))


def test_sizes_of_numpy(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    attention = Attention(np.int64(3), np.int32(4), score="general", scale=np.float64(0.5))
    fastseq.save(attention, tmp_path / "model")
    assert fastseq.load(tmp_path / "model").config() == attention.config()


def test_load_draws_nothing_and_unpickles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    model = tiny()
    for target in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle.dumps", "pickle.Pickler", "torch.load"):
        monkeypatch.setattr(target, fail)
    before = torch.get_rng_state()
    model.save(tmp_path / "model")
    assert isinstance(Seq2Seq.load(tmp_path / "model"), Seq2Seq)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_warning_is_repeated(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="between layers"):
        decoder = Decoder.luong(3, 4, memory_size=5, dropout=0.5)
    again(decoder, tmp_path)
    assert not recwarn.list


def test_load_of_a_class_wants_that_class(tmp_path: Path) -> None:
    Encoder(2, 3)
    fastseq.save(Encoder(2, 3), tmp_path / "model")
    with pytest.raises(InputError, match=r"model holds one Encoder, not a Seq2Seq; use fastseq\.load"):
        Seq2Seq.load(tmp_path / "model")


# ---- what save refuses


class Own(nn.Embedding):
    """A user's."""


def changed(change: Callable[[Seq2Seq], Any], model: Seq2Seq | None = None) -> Seq2Seq:
    model = tiny() if model is None else model
    change(model)
    return model


def of(encoder: nn.Module | None = None, **options: Any) -> Seq2Seq:
    decoder = Decoder.luong(3, 4, memory_size=4, **options)
    return Seq2Seq(encoder or Encoder(3, 4), decoder, 8, bos_id=1, eos_id=2, pad_id=0)


def loop() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNSAVED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "encoder": (lambda: of(nn.Identity()), TypeError, r"Seq2Seq\.encoder is of class Identity, .*torch\.save\("),
    "embedding": (
        lambda: of(Encoder(3, 4, embedding=Own(8, 3))), TypeError, r"Encoder\.embedding is of class Own, which",
    ),
    "bridge": (lambda: of(bridge=lambda m: m.state), TypeError, r"Decoder\.bridge is of class function"),
    "subclass": (lambda: type("Mine", (Decoder,), {})(3, 4, memory_size=4), TypeError, r"the module is of class Mine"),
    "module": (lambda: nn.Conv1d(2, 2, 2), TypeError, r"the module is of class Conv1d, which plain data"),
    "no module": (lambda: Bridge(), TypeError, r"takes a Seq2Seq, .*or RNN, got Bridge"),
    "parametrized": (
        lambda: changed(lambda m: parametrizations.weight_norm(m.decoder, "weight_hh_l0")),
        TypeError, r"Seq2Seq\.decoder is of class ParametrizedDecoder",
    ),
    "parametrized inside": (
        lambda: changed(lambda m: parametrizations.weight_norm(m.decoder.readout)),
        TypeError, r"decoder\.readout is ParametrizedLinear of torch, .* would make Linear",
    ),
    "old weight_norm": (
        lambda: changed(lambda m: nn.utils.weight_norm(m.output)), InputError, r"tensor output\.weight is missing",
    ),
    "exchanged layer": (
        lambda: changed(lambda m: setattr(m.encoder.layers, "0", nn.LSTM(3, 4))), TypeError,
        r"encoder\.layers\.0 is LSTM of torch, its config would make LSTM of fastseq",
    ),
    "added module": (
        lambda: changed(lambda m: m.add_module("head", nn.Linear(2, 2))), TypeError, r"head is Linear of .* nothing",
    ),
    "added parameter": (
        lambda: changed(lambda m: m.register_parameter("w", nn.Parameter(torch.ones(2)))),
        InputError, r"tensor w is unexpected",
    ),
    "added buffer": (
        lambda: changed(lambda m: m.register_buffer("steps", torch.ones(2))), InputError, r"tensor steps is unexpected",
    ),
    "other shape": (
        lambda: changed(lambda m: setattr(m.output, "weight", nn.Parameter(torch.ones(9, 3)))),
        InputError, r"tensor output\.weight has shape \(9, 3\); expected \(8, 3\)",
    ),
    "meta": (lambda: tiny().to("meta"), InputError, r"is on the meta device and has no values"),
    "dtype": (
        lambda: changed(lambda m: setattr(m.output, "weight", nn.Parameter(torch.eye(3, dtype=torch.complex64)))),
        InputError, r"output\.weight is torch\.complex64; parameters are torch\.float64",
    ),
    "sparse": (
        lambda: changed(lambda m: setattr(m.output, "weight", nn.Parameter(torch.eye(3).to_sparse()))),
        TypeError, r"output\.weight is a Tensor, not a dense",
    ),
    "extra": (lambda: changed(lambda m: setattr(m, "extra", [])), TypeError, r"extra must be a dict, got list"),
    "tuple": (
        lambda: changed(lambda m: m.extra.update(v=[("a",)])), TypeError, r"extra\['v'\]\[0\] is a tuple; .*convert it",
    ),
    "tensor": (lambda: changed(lambda m: m.extra.update(v=torch.ones(1))), TypeError, r"extra\['v'\] is a Tensor"),
    "key": (lambda: changed(lambda m: m.extra.update(v={3: 1})), TypeError, r"extra\['v'\] has the key 3, an int;"),
    "loop": (lambda: changed(lambda m: m.extra.update(v=loop())), InputError, r"extra contains itself, or is nested"),
    "large": (
        lambda: changed(lambda m: m.extra.update(v=["a" * 2**20] * 48)), InputError, r"take \d+ bytes, at most 5000000",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", UNSAVED)
def test_save_refuses(name: str, tmp_path: Path) -> None:
    make, error, message = UNSAVED[name]
    with pytest.raises(error, match=message):
        fastseq.save(make(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---- what it needs, and what it promises


def test_without_safetensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: model.save(saved), lambda: fastseq.load(saved)):
        with pytest.raises(ImportError, match=r"safetensors, 0\.8 or newer \(.*\): pip install fastseq-rnn\[save\]"):
            call()
    old = type(sys)("safetensors")
    old.__version__ = "0.7.0"
    monkeypatch.setitem(sys.modules, "safetensors", old)
    with pytest.raises(ImportError, match=r"0\.8 or newer \(this is 0\.7\.0\)"):
        fastseq.load(saved)


def test_without_numpy(tmp_path: Path) -> None:
    code = """
    model = fastseq.Encoder(2, 3)
    fastseq.save(model, path)
    print(fastseq.load(path), end="")
    """
    start = "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore')\nimport fastseq\n"
    done = subprocess.run(
        [sys.executable, "-c", start + "path = sys.argv[1]\n" + textwrap.dedent(code), str(tmp_path / "model")],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout == repr(Encoder(2, 3)), done.stderr


def test_other_programs_read_it(saved: Path) -> None:
    model = Seq2Seq.load(saved)
    stored: dict[str, Tensor] = safetensors_torch.load_file(saved)
    assert set(stored) == {n for n, _ in model.named_parameters()}
    other = tiny()
    other.load_state_dict(stored | {"output.weight": stored["embedding.weight"]})
    assert torch.equal(other(SRC, TGT).logits, model(SRC, TGT).logits)


LAYER = "input_size hidden_size num_layers bias batch_first dropout bidirectional zoneout recurrent_dropout"
LAYER += " recurrent_dropout_on learn_state layer_norm backend"
FIELDS = {  # of version 2: another option anywhere makes version 3, and `load` has to read all three
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "Linear": "in_features out_features bias",
    "LocalP": "D",
    "Attention": "query_size memory_size attn_size score query_bias normalize scale window backend",
    "Bridge": "source map act bias cell layers size",
    "Encoder": "input_size hidden_size num_layers cell bidirectional dropout residual zoneout recurrent_dropout"
    " recurrent_dropout_on layer_norm learn_state embedding backend",
    "Decoder": "input_size hidden_size num_layers cell memory_size attention attend query query_layer context_to"
    " context_side feed readout combine combine_size combine_bias residual bridge dropout input_dropout readout_dropout"
    " output_dropout summary_size backend",
    "LSTM": LAYER + " proj_size",
    "GRU": LAYER,
    "RNN": LAYER + " nonlinearity",
    "Seq2Seq": "encoder decoder vocab_size bos_id eos_id pad_id embedding output output_bias tie",
}


def test_the_fields_of_version_2() -> None:
    assert {kind: " ".join(config.arguments(cls)) for kind, cls in config.KINDS.items()} == FIELDS
    assert saving.VERSION == "2"
