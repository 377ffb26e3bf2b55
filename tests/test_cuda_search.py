"""A greedy search in one launch of the CUDA kernels, emulated, against the search that steps from Python in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fastseq
from fastseq import InputError, Seq2Seq
from fastseq.cuda import decoder as host
from fastseq.cuda import devices, native
from fastseq.cuda.decoder_plan import DecoderPlan
from fastseq.ops import chunked_search
from tests import cuda_decoder_layouts as layouts
from tests.cuda_decoder_layouts import drawn, fixed
from tests.emulated import emulated
from tests.seq2seq_models import BOS, EOS, PAD, PRESETS, B, in_float64, log_likelihood, model, same

__all__ = ["emulated"]

ALL = torch.arange(B)[:, None]
DESIGNS = ("block", "cluster", "grid")
NAMES = [f"{name}{''.join(f'-{k}={v}' for k, v in options.items())}" for name, options in PRESETS]
every_design = pytest.mark.parametrize("design", DESIGNS)


@pytest.fixture(autouse=True)
def launches(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the decoder's kernels were started for: "search", or steps of a loop, "forward"."""
    started, ran = host._run, []

    def run(made: Any, chosen: DecoderPlan, *rest: Any) -> None:
        ran.append(chosen.way)
        started(made, chosen, *rest)

    monkeypatch.setattr(host, "_run", run)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")  # of layers above a loop, before a search
    return ran


def arguments(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tensors of each launch from here on."""
    started, told = host._run, []

    def run(made: Any, chosen: Any, x: Any, save: bool, named: Any, *rest: Any) -> None:
        told.append(named)
        started(made, chosen, x, save, named, *rest)

    monkeypatch.setattr(host, "_run", run)
    return told


def on_cuda(of: Seq2Seq, src: torch.Tensor = ALL, **options: Any) -> fastseq.GenerateOutput:
    of.decoder.backend = "cuda"
    try:
        return of.generate(src, **options)
    finally:
        of.decoder.backend = "auto"


def check(of: Seq2Seq, src: torch.Tensor = ALL, **options: Any) -> fastseq.GenerateOutput:
    """The tokens, scores and weights of float64."""
    weights = of.decoder.attention is not None
    found = on_cuda(of, src, return_weights=weights, **options)
    same(found, in_float64(of, src, return_weights=weights, **options))
    return found


@every_design
@pytest.mark.parametrize("number", range(len(PRESETS)), ids=lambda n: NAMES[n])
def test_every_decoder(
    design: str, number: int, launches: list[str], emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers, attention and readout within the loop; each in another layout and schedule, by one launch."""
    emulated.seed_schedule(number)
    name, options = PRESETS[number]
    with drawn(monkeypatch, design, number):
        check(model(name, seed=number, **options), max_new_tokens=6)
    assert launches == ["search"]


@pytest.mark.parametrize("V", [4, 15, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("name", ["bahdanau", "bentrevett", "sutskever"])
def test_vocabularies(name: str, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and parts of one, and blocks that have no token."""
    for seed, design in enumerate(DESIGNS):
        with drawn(monkeypatch, design, 7 * V + seed):
            check(model(name, V=V, seed=V), max_new_tokens=5)


OPTIONS: list[dict[str, Any]] = [
    {"min_new_tokens": 5},
    {"decoder_input_ids": [[5, 6], [7, 8], [8, 3], [4, 4]]},
    {"decoder_input_ids": [[BOS, 5], [BOS, 8], [BOS, 3], [BOS, 4]], "min_new_tokens": 2},
    {"length_penalty": 0.0},
    {"length_penalty": 0.6, "length_norm": "wu"},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["luong", "gnmt"])
def test_options(name: str, options: dict[str, Any], launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, design in enumerate(DESIGNS):
        launches.clear()
        with drawn(monkeypatch, design, seed):
            check(model(name, V=9, seed=seed, sharpness=1.5, num_layers=2), **{"max_new_tokens": 8} | options)
        assert launches == ["forward"] * ("decoder_input_ids" in options) + ["search"]


@every_design
def test_rows_that_end_at_different_steps(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, each as long as its own longest; what stands behind a row's end is padding."""
    of, rows = model("luong", V=20, rows=37, seed=3), torch.arange(37)[:, None]
    with torch.no_grad():
        of.output.bias[EOS] += 1
    told = arguments(monkeypatch)
    with drawn(monkeypatch, design, 5):
        found = check(of, rows, max_new_tokens=12)
    assert len(found.lengths.unique()) > 4
    behind = torch.arange(12) >= found.lengths
    assert told[0]["ids"][behind].eq(PAD).all()
    assert not told[0]["weights"][behind].any()


@every_design
def test_eos_at_once(design: str, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group leaves with its last row, and the others do not wait for it."""
    of = model("luong", V=9)
    with torch.no_grad():
        of.output.bias[EOS] = 50
    started, ids = host._run, []

    def run(made: Any, chosen: Any, x: Any, save: bool, named: Any, *rest: Any) -> None:
        ids.append(named["ids"].fill_(-7))
        started(made, chosen, x, save, named, *rest)

    monkeypatch.setattr(host, "_run", run)
    with fixed(monkeypatch, design, 1 if design == "block" else 2):
        found = check(of, max_new_tokens=40)
    assert found.lengths.eq(1).all()
    assert found.sequences.eq(EOS).all()
    assert ids[0][:, 1:].eq(-7).all()  # no second step was made


@pytest.mark.parametrize(("design", "blocks", "pieces"), [("block", 1, 1), ("cluster", 3, 2), ("grid", 3, 2)])
def test_schedules(design: str, blocks: int, pieces: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever thread goes first, the same bits."""
    of, found = model("luong", V=70, rows=9), []
    with fixed(monkeypatch, design, blocks, pieces):
        for seed in range(7):
            emulated.seed_schedule(seed)
            found.append(on_cuda(of, torch.arange(9)[:, None], max_new_tokens=5, return_weights=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@every_design
def test_nan_is_refused(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row that has not ended; the others do not see it."""
    of = model("luong", V=40, seed=1)
    with torch.no_grad():
        of.encoder.out[2, 0] = torch.nan
        of.encoder.mask[2, 0] = True
    told = arguments(monkeypatch)
    with drawn(monkeypatch, design, 2), pytest.raises(InputError, match="NaN for a row"):
        on_cuda(of, max_new_tokens=5)
    with drawn(monkeypatch, design, 2):
        found = check(of, ALL[[0, 1, 3]], max_new_tokens=5)
    others = told[0]["ids"][[0, 1, 3], : found.sequences.shape[2]]
    assert others.equal(found.sequences[:, 0])


@every_design
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["luong", "gnmt"])
def test_nan_in_one_logit(
    name: str, wrong: float, design: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any token: whichever block has it, and beside finite ones that are larger; of +inf the scores would be NaN.

    In one launch, and of gnmt, which has a residual, step by step.
    """
    for token in (0, 17, 38):
        of = model(name, V=39, **({"num_layers": 3} if name == "gnmt" else {}))
        with torch.no_grad():
            of.output.bias[token] = wrong
        with drawn(monkeypatch, design, token), pytest.raises(InputError, match="NaN for a row"):
            on_cuda(of, max_new_tokens=3)
        with pytest.raises(InputError, match="NaN for a row"):
            in_float64(of, ALL, max_new_tokens=3)
    assert set(launches) == {"search" if name == "luong" else "forward"}


@every_design
def test_nan_behind_a_rows_end(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has ended reads padding; what comes of that nobody looks at."""
    of, rows = model("luong", V=20, rows=37, seed=3), torch.arange(37)[:, None]
    with torch.no_grad():
        of.output.bias[EOS] += 1
        of.output.bias[PAD] = -torch.inf  # nobody chooses it
        of.embedding.weight[PAD] = torch.nan
    with drawn(monkeypatch, design, 4):
        found = check(of, rows, max_new_tokens=12)
    assert len(found.lengths.unique()) > 4


@every_design
def test_where_nothing_may_come_next(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits -inf: a row ends without eos."""
    of = model(V=40)
    with drawn(monkeypatch, design, 6):
        with torch.no_grad():
            of.output.bias.fill_(-torch.inf)
        check(of, max_new_tokens=4)
        with torch.no_grad():
            of.output.bias[EOS] = 0  # eos alone, and it may not come
        check(of, max_new_tokens=4, min_new_tokens=2)
        check(of, max_new_tokens=4)
        with torch.no_grad():
            of.output.bias[35] = 0
        check(of, max_new_tokens=4, min_new_tokens=2)


@every_design
def test_the_first_of_equals(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(V=60)
    with torch.no_grad():
        of.output.weight.zero_()
        of.output.bias.zero_()
        of.output.bias[[13, 22, 59]] = 1
    with drawn(monkeypatch, design, 8):
        found = on_cuda(of, max_new_tokens=2)
    assert found.sequences.eq(13).all()


@every_design
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["luong", "bahdanau", "cho", "conditional_gru"])
def test_16_bits(
    name: str, dtype: torch.dtype, design: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are those of float64 on the same tokens, within twice what PyTorch's own 16-bit steps are off."""
    of = model(name, V=37, sharpness=1.0).to(dtype)
    with drawn(monkeypatch, design, 9):
        found = on_cuda(of, max_new_tokens=6)
    assert launches == ["search"]
    total, _ = log_likelihood(of, ALL, found)
    with fastseq.use_backend("reference"), torch.no_grad():
        fed = torch.cat((torch.full((B, 1), BOS), found.sequences[:, 0, :-1]), 1)
        plain = of(ALL, fed).logits.float().log_softmax(-1).gather(2, found.sequences[:, 0, :, None])[:, :, 0]
        logits = model(name, V=37, sharpness=1.0).to(dtype).double()(ALL, fed).logits
    there, u = torch.arange(plain.shape[1]) < found.lengths, torch.finfo(dtype).eps / 2
    off = (torch.where(there, plain, 0).sum(1, keepdim=True) - total).abs().max() / found.lengths.min()
    budget = float(2 * off + u * total.abs().max())
    assert float((found.scores.double() - total / found.lengths).abs().max()) <= budget
    chosen = logits.gather(2, found.sequences[:, 0, :, None])[:, :, 0]
    assert float(torch.where(there, logits.amax(-1) - chosen, 0).max()) <= 4 * u * float(logits.abs().max())


@every_design
def test_tf32(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch allows it to products."""
    of, scores = model("luong", V=40, sharpness=1.0), []
    for allowed in (False, True):
        monkeypatch.setattr(host, "tf32_flag", lambda operator, allowed=allowed: allowed)
        monkeypatch.setattr(layouts, "tf32_flag", host.tf32_flag)
        with drawn(monkeypatch, design, 5) as ran:
            scores.append(on_cuda(of, max_new_tokens=4).scores)
        assert {p.kind for p in ran} == {"tensor32" if allowed else "full32"}
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=2**-11 * 16 * float(scores[0].abs().max()))
    assert not torch.equal(*scores)


@every_design
def test_where_weights_lie(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shared memory or not, the same bits."""
    of, found = model("luong", V=70, memory_size=12), []
    for stays in (True, False):
        with fixed(monkeypatch, design, 1 if design == "block" else 3, stays=stays):
            found.append(on_cuda(of, max_new_tokens=5, return_weights=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("name", "V", "design"),
    [("luong", 700, "block"), ("luong", 3000, "cluster"), ("luong", 30000, "grid"), ("bentrevett", 3000, "cluster")],
)
def test_large_vocabularies_as_planned(name: str, V: int, design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H200, up to 66 blocks."""
    started, ran = host._run, []
    monkeypatch.setattr(host, "_run", lambda *args: (ran.append(args[1]), started(*args)))
    check(model(name, V=V), max_new_tokens=3)
    assert [(p.way, p.shape.design) for p in ran] == [("search", design)]


def test_a_table_that_is_too_large_is_not_made(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """[V, V], 3.4 GiB: the search goes step by step, as `explain` says."""
    of = model("bentrevett", V=30000)
    monkeypatch.setattr(host, "_tables", lambda *_: pytest.fail("a table was made"))
    check(of, max_new_tokens=2)
    assert "search" not in launches
    assert "greedy search step by step: what a step makes of its input would be a table of 30000 tokens" in told(of)


def test_as_planned(launches: list[str]) -> None:
    """For an H200, without any other choice; an embedding with rows to spare; strided parameters; an empty source."""
    of = model(V=9)
    with torch.no_grad():
        of.encoder.mask[1] = False
        of.output.weight = nn.Parameter(of.output.weight.T.contiguous().T)
    spare = nn.Embedding(16, 6)
    other = Seq2Seq(of.encoder, of.decoder, 9, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=spare).eval()
    other.output = of.output
    check(other, max_new_tokens=9)
    assert launches == ["search"]


@pytest.mark.parametrize("lost", ["b_out", "beside", "mask", "projected", "read_input", "out_input"])
def test_a_planted_fault_is_found(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that the kernel is not given."""
    name = {"beside": "cho", "read_input": "bahdanau", "out_input": "bentrevett"}.get(lost, "luong")
    of, started = model(name, V=20, seed=1), host._run

    def without(made: Any, chosen: Any, x: Any, save: bool, named: Any, *rest: Any) -> None:
        assert named.get(lost) is not None
        started(made, chosen, x, save, named | {lost: None}, *rest)

    monkeypatch.setattr(host, "_run", without)
    with fixed(monkeypatch, "cluster", 2), pytest.raises(AssertionError):
        check(of, max_new_tokens=5)


@pytest.mark.parametrize(("name", "options"), [("luong", {}), ("bahdanau", {"readout": ("state", "context", "state")})])
def test_a_group_that_waits_in_vain(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks leave, and the search itself says so, in one launch or at its last step; the next one runs."""
    of = model(name, **options)
    monkeypatch.setattr(native, "patience", lambda: 1000)
    late = lambda chosen, x: torch.full((chosen.shape.groups,), -1000, dtype=torch.int32)  # noqa: E731
    with fixed(monkeypatch, "grid", 2):
        with monkeypatch.context() as patch:
            patch.setattr(host, "_counters", late)
            with pytest.raises(RuntimeError, match="gave up"):
                on_cuda(of, max_new_tokens=1)
        monkeypatch.setattr(native, "patience", lambda: int(20e9))
        check(of, max_new_tokens=3)


@pytest.mark.parametrize(("name", "beams"), [("gnmt", 1), ("gnmt", 3), ("luong", 3)])
@pytest.mark.parametrize("strided", [False, True])
def test_weights_are_packed_once(
    strided: bool, name: str, beams: int, emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a search step by step, of whatever it need not copy at each step; the next search packs what they are then."""
    packs: list[bool] = []
    of, started = model(name, num_layers=3), native.launch
    if strided:
        of.decoder.weight_hh_l0 = nn.Parameter(of.decoder.weight_hh_l0.T.contiguous().T)

    def launch(function: str, x: Any, *args: Any) -> None:
        packs.extend(args[7:8] if function == "decoder_run" else ())
        started(function, x, *args)

    monkeypatch.setattr(native, "launch", launch)
    for _ in range(2):
        packs.clear()
        check(of, max_new_tokens=4, num_beams=beams)
        assert packs == [True] * 4 if strided else [True, False, False, False]
        with torch.no_grad():
            of.decoder.get_parameter("weight_hh_l0").mul_(0.5)


def told(of: Seq2Seq) -> str:
    of.decoder.backend = "cuda"
    return str(fastseq.explain(of, ALL, ALL))


def test_what_cannot_stay(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """goes step by step, for the reason that `explain` gives; the tokens are the same."""
    whole = told(model(V=9))
    assert "greedy search in one launch, search: one block" in whole
    assert "vocabulary (16 units a block)" in whole
    monkeypatch.setattr(chunked_search, "CHUNK", 3)
    others: list[tuple[Seq2Seq, str]] = [
        (model("gnmt", num_layers=3), "residual=2 lies within the loop"),
        (model("sutskever", num_layers=9), "num_layers=9: at most 8 layers loop"),
    ]
    for of, reason in others:
        assert f"greedy search step by step: {reason}" in told(of)
        check(of, max_new_tokens=4)
    small = replace(devices.EMULATED, shared=64 * 1024, units=4, clusters=())
    monkeypatch.setattr(devices, "EMULATED", small)
    of = model(V=20000)
    assert "greedy search step by step: the output's weights of 20000 tokens x 12 features in full32 do not" in told(of)
    check(of, max_new_tokens=2)
    assert "search" not in launches


def max_norm(of: Seq2Seq) -> None:
    of.embedding.max_norm = 1.0


def own_step(of: Seq2Seq) -> None:
    of.decoder.step = of.decoder.step  # type: ignore[method-assign]


def hooked(of: Seq2Seq) -> None:
    of.output.register_forward_hook(lambda *_: None)


def another_dtype(of: Seq2Seq) -> None:
    of.output.double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (max_norm, "the embedding is no plain torch.nn.Embedding"),
        (own_step, "the decoder has a step of its own"),
        (hooked, "the output is no plain torch.nn.Linear"),
        (another_dtype, "embedding and output have several dtypes or devices"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_of_the_users_own(change: Any, reason: str, launches: list[str]) -> None:
    """`explain` and `why_stepwise` know what keeps `generate` from the launch, and give the same reason."""
    of = model(V=9)
    change(of)
    assert f"greedy search step by step: {reason}" in told(of)
    assert of.why_stepwise(ALL) == reason
    if change is another_dtype:  # which the step itself refuses
        with pytest.raises(RuntimeError, match="dtype"):
            on_cuda(of, max_new_tokens=2)
    else:
        assert of.vocabulary is None
        check(of, max_new_tokens=2)
    assert "search" not in launches


def test_explain_under_autocast() -> None:
    of = model(V=9)
    with torch.autocast("cpu", torch.bfloat16):
        assert "greedy search step by step: autocast" in told(of)
        assert of.why_stepwise(ALL) == "autocast"
