"""fastseq's decoder computes what toolkits and papers do: their weights, converted, give their results and gradients.

In float64 the two differ by rounding alone; in fp32 fastseq may err as `oracle.allow` says, with the toolkit's own
error in fp32 as the measure.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import Mismatch, Results, Terms, allow, compare
from tests.toolkit_oracle import KITS, SIZES, Problem, check_exactly, run
from tests.toolkit_weights import Converted

kits = pytest.mark.parametrize("name", KITS)


@kits
@pytest.mark.parametrize("sizes", SIZES)
def test_equal_in_float64(name: str, sizes: str) -> None:
    kit = KITS[name]
    for seed, mask in enumerate(kit.masks):
        problem = Problem.draw(kit, SIZES[sizes], mask, dropout=seed > 0, seed=seed)
        check_exactly(problem.fastseq, problem)


@kits
@pytest.mark.parametrize("sizes", ["several", "odd"])
def test_within_budget_in_fp32(name: str, sizes: str) -> None:
    """Four problems tell the toolkit's own error: that of a few numbers alone may be luck."""
    kit = KITS[name]
    problems = [Problem.draw(kit, SIZES[sizes], kit.masks[-1], dropout=True, seed=seed) for seed in range(4)]
    pairs = [(run(p.toolkit, p, torch.float32), run(p.toolkit, p, torch.float64)) for p in problems]
    problem, truth, n = problems[0], pairs[0][1], problems[0].sizes
    terms = Terms(n.I + n.H + n.D + n.R + n.A + n.S, 4 * n.H + n.H + n.D + n.A + n.S, n.B * n.T)
    allowed = {key: allow({key: truth[key]}, pairs, torch.float32, terms)[key] for key in truth}
    compare(run(problem.fastseq, problem, torch.float32), truth, allowed)


def swapped(decoder: Converted) -> Converted:
    """The readout's first two parts in the other order."""
    first, second, *rest = decoder.spec.readout
    return decoder._replace(spec=replace(decoder.spec, readout=(second, first, *rest)))


def wrong_z(decoder: Converted) -> Converted:
    """z, rows of the second third, where 1 - z belongs."""
    hidden = decoder.layers[0][1].shape[1]
    sign = torch.ones(3 * hidden, dtype=decoder.layers[0][1].dtype)
    sign[hidden : 2 * hidden] = -1
    w_ih, w_hh, b_ih, b_hh = decoder.layers[0]
    return decoder._replace(layers=((sign[:, None] * w_ih, sign[:, None] * w_hh, sign * b_ih, sign * b_hh),))


def other_gates(decoder: Converted) -> Converted:
    """TensorFlow's order of gates, i, j, f, o, for torch's."""
    hidden = decoder.layers[0][1].shape[1]
    order = torch.arange(4 * hidden).view(4, hidden)[[0, 2, 1, 3]].flatten()
    return decoder._replace(layers=tuple(tuple(t[order] for t in layer) for layer in decoder.layers))


def no_forget_bias(decoder: Converted) -> Converted:
    """Without the 1 that BasicLSTMCell adds."""
    hidden = decoder.layers[0][1].shape[1]
    one = torch.zeros(4 * hidden, dtype=decoder.layers[0][1].dtype)
    one[hidden : 2 * hidden] = 1
    return decoder._replace(layers=tuple((ih, hh, b_ih - one, b_hh) for ih, hh, b_ih, b_hh in decoder.layers))


def bias_outside(decoder: Converted) -> Converted:
    """The second cell's candidate bias outside the reset gate's bracket."""
    ih, hh, b_ih, b_hh = decoder.transition
    return decoder._replace(transition=(ih, hh, b_hh, b_ih))


def reset_elsewhere(decoder: Converted) -> Converted:
    """The reset gate on the other side of the recurrent product."""
    cell = {"gru": "gru_reset_before", "gru_reset_before": "gru"}[decoder.spec.cell]
    return decoder._replace(spec=replace(decoder.spec, cell=cell))


def of_spec(**changes: Any) -> Callable[[Converted], Converted]:
    return lambda decoder: decoder._replace(spec=replace(decoder.spec, **changes))


FAULTS = {
    "opennmt, s before c": ("opennmt-dot", swapped),
    "joeynmt, c before s": ("joeynmt-bahdanau", swapped),
    "tf, c before s": ("tf-luong", swapped),
    "bentrevett, c before s": ("bentrevett", swapped),
    "bahdanau, z for 1 - z": ("bahdanau", wrong_z),
    "cho, 1 - z for z": ("cho", wrong_z),
    "nematus, 1 - z for z": ("nematus", wrong_z),
    "tf, order of gates": ("tf-scaled-luong", other_gates),
    "tf, forget bias": ("gnmt-normed-bahdanau", no_forget_bias),
    "nematus, where a bias stands": ("nematus", bias_outside),
    "bahdanau, reset after": ("bahdanau", reset_elsewhere),
    "bahdanau, new state read": ("bahdanau", of_spec(readout=("state", "input", "context"))),
    "opennmt, tanh": ("opennmt-mlp", of_spec(combine="tanh")),
    "gnmt, no residual": ("gnmt-normed-bahdanau", of_spec(residual=None)),
    "joeynmt, one layer starts from 0": (
        "joeynmt-bahdanau",
        lambda d: d._replace(start=lambda memory: (*d.start(memory)[:-1], tuple(0 * s for s in d.start(memory)[-1]))),
    ),
    "tf, key not scaled": ("tf-scaled-luong", lambda d: d._replace(score=d.score._replace(scale=None))),
    "nematus, key without bias": ("nematus", lambda d: d._replace(score=d.score._replace(query_bias=None))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_conversion_is_noticed(fault: str) -> None:
    """Outputs and gradients each give it away."""
    name, plant = FAULTS[fault]
    problem = Problem.draw(KITS[name], SIZES["several"])
    check_exactly(problem.fastseq, problem)
    wrong = run(lambda t: problem.fastseq(t, plant), problem, torch.float64)
    truth = run(problem.toolkit, problem, torch.float64)
    for key in ("out", "d_y"):
        with pytest.raises(Mismatch, match="errs by"):
            compare({key: wrong[key]}, {key: truth[key]}, {key: 1e-6})


@pytest.mark.parametrize("name", [name for name, kit in KITS.items() if "output" in kit.dropouts and "std" not in name])
def test_feeding_before_dropout_is_noticed(name: str) -> None:
    """The same factors on the output, but not on what is fed back."""
    problem = Problem.draw(KITS[name], SIZES["several"], dropout=True)
    factors = problem.masks.output

    def late(t: dict[str, Tensor]) -> Results:
        problem.masks = problem.masks._replace(output=None)
        results = problem.fastseq(t)
        problem.masks = problem.masks._replace(output=factors)
        return results | {"out": results["out"] * factors}

    if problem.converted(problem.tensors).spec.feed is None:
        check_exactly(late, problem)  # nothing is fed, and the two are one
        return
    with pytest.raises(Mismatch, match="out errs by"):
        check_exactly(late, problem)
