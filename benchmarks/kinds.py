"""The kinds of calls that the suite times. A new kind is one entry of KINDS."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from . import attention_programs, decoder_programs, generate_programs, option_programs, programs
from .cases import Case, LayerCase
from .decoder_cases import AttentionCase, CorpusCase, DecoderCase
from .decoder_problem import AttentionProblem, DecoderProblem
from .generate_cases import GenerateCase
from .generate_problem import GenerateProblem
from .option_cases import OptionCase
from .option_programs import OptionProblem
from .plain_data import read
from .problem import LayerProblem, Problem
from .programs import Program

__all__ = ["KINDS", "Kind", "case_from_dict", "case_to_dict", "draw", "exact_program", "fastseq_program"]


class Kind(NamedTuple):
    """What there is for all cases of one kind. The callables take that kind's cases and problems."""

    case: Any  # the dataclass
    draw: Callable[[Any], Problem]
    exact: Callable[[Any], Program]  # the truth, of a problem in float64
    fastseq: Callable[[Any, str], Program]  # our form, with backend= as named


_DECODER = DecoderProblem.draw, decoder_programs.loop_program, decoder_programs.fastseq_program
KINDS = {
    "layers": Kind(LayerCase, LayerProblem.draw, programs.torch_program, programs.fastseq_program),
    "options": Kind(OptionCase, OptionProblem.draw, option_programs.exact_program, option_programs.fastseq_program),
    "decoder": Kind(DecoderCase, *_DECODER),
    "corpus": Kind(CorpusCase, *_DECODER),
    "attention": Kind(
        AttentionCase, AttentionProblem.draw, attention_programs.plain_program, attention_programs.fastseq_program
    ),
    "generate": Kind(
        GenerateCase, GenerateProblem.draw, generate_programs.loop_program, generate_programs.fastseq_program
    ),
}  # fmt: skip


def draw(case: Case) -> Problem:
    """Its tensors."""
    return KINDS[case.kind].draw(case)


def exact_program(problem: Problem) -> Program:
    """What is the truth in float64: of decoders and searches, the loop."""
    return KINDS[problem.case.kind].exact(problem)


def fastseq_program(backend: str) -> Callable[[Problem], Program]:
    """Our form of a problem, with `backend=` forced, or "auto"."""
    return lambda problem: KINDS[problem.case.kind].fastseq(problem, backend)


def case_to_dict(case: Case) -> dict[str, Any]:
    """For JSON."""
    return {"kind": case.kind} | asdict(case)  # type: ignore[call-overload]  # every concrete one is a dataclass


def case_from_dict(values: dict[str, Any]) -> Case:
    """The inverse; a case without a kind is of layers, the first there were. Unknown kinds and fields raise."""
    kind, given = values.get("kind", "layers"), {name: v for name, v in values.items() if name != "kind"}
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of a case; this version knows {', '.join(KINDS)}")
    case: Case = read(KINDS[kind].case, given, "its fields")
    try:
        _ = case.tokens, case.flops, case.forward_traffic
    except (KeyError, ZeroDivisionError) as error:
        raise ValueError(f"no call: {given} ({type(error).__name__}: {error})") from error
    return case
