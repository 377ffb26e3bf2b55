"""What fastseq.generate refuses: options before the first step, and what a step returns."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.generation.request import Request
from tests.generate_oracle import BOS, EOS, PAD, Toy

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beams": ({"num_beams": 0}, fastseq.InputError, "num_beams=0; it is at least 1"),
    "sampling as text": ({"do_sample": "no"}, TypeError, "do_sample must be True or False, got 'no'"),
    "huge penalty": ({"length_penalty": 1e4}, fastseq.InputError, "length_penalty=10000.0 is too far from 0 for 6"),
    "what fp32 lacks": ({"length_penalty": -40}, fastseq.InputError, "length_penalty=-40 is too far from 0 for 6"),
    "stopping as a number": ({"early_stopping": 1, "num_beams": 2}, fastseq.InputError, "early_stopping=1; expected"),
    "ragged prefix": ({"decoder_input_ids": [[3, 4], [3], [3]]}, fastseq.InputError, "must have rows of one length"),
    "empty prefix": ({"decoder_input_ids": [[], [], []]}, fastseq.InputError, "must have rows of one length"),
    "bos here and there": (
        {"decoder_input_ids": [[0, 3], [3, 3], [3, 3]]}, fastseq.InputError, "begins with bos_id=0 in 1 of 3 rows",
    ),
    "reorder": ({"reorder": 3}, TypeError, "reorder must be a function, got int"),
    "one processor": ({"logits_processor": 3}, TypeError, "logits_processor must be callable"),
    "no end": ({"streamer": type("Put", (), {"put": print})()}, TypeError, "must be callable or have put and end"),
    "beams as a float": ({"num_beams": 2.0}, TypeError, "num_beams must be an int, got float"),
    "no tokens": ({"max_new_tokens": 0}, fastseq.InputError, "max_new_tokens=0; it is at least 1"),
    "empty batch": ({"batch_size": 0}, fastseq.InputError, "batch_size=0; it is at least 1"),
    "least above most": ({"min_new_tokens": 9}, fastseq.InputError, "min_new_tokens=9 is more than max_new_tokens=6"),
    "more than beams": (
        {"num_return_sequences": 3, "num_beams": 2}, fastseq.InputError, "num_return_sequences=3 is more than",
    ),
    "many greedy": ({"num_return_sequences": 2}, fastseq.InputError, "pass do_sample=True"),
    "temperature": ({"temperature": 0.0, "do_sample": True}, fastseq.InputError, "temperature=0.0; it is above 0"),
    "infinite": ({"temperature": math.inf, "do_sample": True}, fastseq.InputError, "temperature=inf; it is finite"),
    "idle temperature": ({"temperature": 0.5}, fastseq.InputError, "temperature=0.5 without do_sample=True"),
    "idle top_k": ({"top_k": 5}, fastseq.InputError, "top_k=5 without do_sample=True"),
    "top_p": ({"top_p": 0.0, "do_sample": True}, fastseq.InputError, "top_p=0.0; it is a probability"),
    "sampling beams": ({"do_sample": True, "num_beams": 2}, fastseq.InputError, "do_sample=True with num_beams=2"),
    "sampling coverage": ({"do_sample": True, "coverage_penalty": 0.1}, fastseq.InputError, "penalty=0.1 with"),
    "negative coverage": ({"coverage_penalty": -0.1}, fastseq.InputError, "coverage_penalty=-0.1; it is at least 0"),
    "norm": ({"length_norm": "sum"}, fastseq.InputError, "length_norm='sum'"),
    "stopping": ({"early_stopping": "always", "num_beams": 2}, fastseq.InputError, "early_stopping='always'"),
    "stopping greedy": ({"early_stopping": True}, fastseq.InputError, "early_stopping=True with num_beams=1"),
    "eos": ({"eos_id": 5}, fastseq.InputError, "eos_id=5, but step gives logits of 5 tokens: 0 to 4"),
    "negative id": ({"pad_id": -1}, fastseq.InputError, "pad_id=-1; it is at least 0"),
    "prefix rows": ({"decoder_input_ids": [[3]]}, fastseq.InputError, r"has shape \(1, 1\); expected \[B=3, P\]"),
    "prefix dtype": ({"decoder_input_ids": torch.ones(3, 1)}, TypeError, "decoder_input_ids must hold integers"),
    "prefix ids": ({"decoder_input_ids": [[9]] * 3}, fastseq.InputError, "decoder_input_ids holds 9, but step gives"),
    "negative prefix": ({"decoder_input_ids": [[-1]] * 3}, fastseq.InputError, "decoder_input_ids holds -1"),
    "streamed beams": ({"streamer": print, "num_beams": 2}, fastseq.InputError, "streamer with num_beams=2"),
    "streamer": ({"streamer": 3}, TypeError, "streamer must be callable or have put and end, got int"),
    "processor": ({"logits_processor": [3]}, TypeError, "logits_processor must be callable"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    options, kind, message = WRONG[name]
    toy, steps = Toy(), []

    def step(tokens: Tensor, state: Any) -> Any:
        steps.append(tokens)
        return toy.step(tokens, state)

    given = {"batch_size": 3, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 6} | options
    with pytest.raises(kind, match=message):
        fastseq.generate(step, toy.state(), **given)
    assert len(steps) == ("step gives" in message)  # how many tokens there are, the first step says


BAD_STEPS: dict[str, tuple[Callable[[Tensor, Any], Any], type[Exception], str]] = {
    "logits alone": (lambda t, s: torch.zeros(3, 5), TypeError, r"step must return \(logits, state\) or"),
    "three-dimensional": (
        lambda t, s: (torch.zeros(3, 1, 5), s),
        fastseq.InputError,
        r"step returned logits of shape \(3, 1, 5\)",
    ),
    "fewer rows": (lambda t, s: (torch.zeros(2, 5), s), fastseq.InputError, r"expected a tensor \[N=3, V\]"),
    "NaN": (lambda t, s: (torch.full((3, 5), math.nan), s), fastseq.InputError, "returned NaN for a row that had not"),
    "no weights": (
        lambda t, s: (torch.zeros(3, 5), s),
        fastseq.InputError,
        "return_weights and coverage_penalty need a step",
    ),
    "weights' shape": (
        lambda t, s: (torch.zeros(3, 5), s, torch.zeros(3)),
        fastseq.InputError,
        r"step returned weights of shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_wrong_steps(name: str) -> None:
    step, kind, message = BAD_STEPS[name]
    options = {"batch_size": 3, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 2}
    with pytest.raises(kind, match=message):
        fastseq.generate(step, None, return_weights="weights" in name, **options)  # type: ignore[arg-type]


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else, since an error in the middle of it would spoil the user's recording."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(fastseq.InputError, match=r"within the capture of a CUDA graph.* capture Decoder\.step"):
        Request.of(device=torch.device("cuda"))
    assert Request.of(device=torch.device("cpu"), batch_size=1, bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=3)


def test_wrong_state() -> None:
    options: dict[str, Any] = {"batch_size": 3, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 2}
    with pytest.raises(
        fastseq.InputError, match=r"state holds a tensor of shape \(1, 3, 4\); expected batch_size=3 rows"
    ):
        fastseq.generate(lambda t, s: (torch.zeros(3, 5), s), torch.zeros(1, 3, 4), **options)
    with pytest.raises(TypeError, match="step must be a function"):
        fastseq.generate(3, None, **options)  # type: ignore[arg-type]


def test_states_whose_rows_cannot_be_picked() -> None:
    options: dict[str, Any] = {
        "batch_size": 3,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": PAD,
        "max_new_tokens": 4,
        "num_beams": 2,
    }
    with pytest.raises(TypeError, match="state holds a Toy, whose rows cannot be picked; pass reorder="):
        fastseq.generate(lambda t, s: (torch.zeros(6, 5), s), {"model": Toy()}, **options)
    with pytest.raises(fastseq.InputError, match=r"step returned a state of shape \(1, 6, 4\); expected N=6 rows"):
        fastseq.generate(lambda t, s: (torch.zeros(6, 5), torch.zeros(1, 6, 4)), None, **options)
    with pytest.raises(fastseq.InputError, match=r"logits_processor returned \(6, 4\); expected scores \(6, 5\)"):
        fastseq.generate(
            lambda t, s: (torch.zeros(6, 5), s), None, logits_processor=lambda ids, scores: scores[:, :4], **options
        )
