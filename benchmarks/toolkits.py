"""JoeyNMT as it is beside JoeyNMT after `fastseq.accelerate`, and its checkpoint as `Seq2Seq`, on the CPU.

    python -m benchmarks.toolkits [--threads 1,2] [--rounds 15] [--rows train*gru] [--json FILE]
    python -m benchmarks.toolkits --write-docs FILE   # the table of docs/interop.md, of such a file

A training step is what its trainer does: forward, loss, backward, clipping and Adam; E = H = 256, B = 32, S = T = 25.
Both models start from the same values and seeds, and take their steps in turn. Before anything is timed, the losses of
three steps are compared: accelerate's may err from float64 twice as much as stock's, and by one rounding. A search is
greedy; its tokens are the same. One thread is timed by the CPU time of the process, which neighbours on the machine
disturb less than they do the clock; several by the clock.
"""

import argparse
import copy
import fnmatch
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

from .joey import BOS, EOS, PAD, joey_model, joeynmt
from .machine import describe
from .stats import quantile

__all__ = ["CASES", "PAGE", "Row", "main", "measure", "with_table"]

PAGE = Path(__file__).parents[1] / "docs" / "interop.md"
MARKERS = "<!-- toolkits:begin -->\n", "<!-- toolkits:end -->"
HEADER = "| row | threads | stock, ms | fastseq, ms | ratio | 20 % to 80 % |\n|---|---|---|---|---|---|"
SIZE, B, S, T = 256, 32, 25, 25
EPS = torch.finfo(torch.float32).eps
Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    mode: str  # "train" | "search", accelerated | "generate", converted
    cell: str
    vocabulary: int
    dropout: float = 0.0
    attention: str = "bahdanau"

    def __str__(self) -> str:
        dropped = f" dropout {self.dropout}" if self.dropout else ""
        return f"{self.mode} {self.cell} {self.attention} V={self.vocabulary}{dropped}"


CASES = [
    *(Case("train", cell, V, p) for V in (8000, 4000, 2000) for cell in ("lstm", "gru") for p in (0.0, 0.2)),
    *(Case("train", cell, 4000, 0.0, "luong") for cell in ("lstm", "gru")),
    *(Case(mode, cell, 4000) for mode in ("search", "generate") for cell in ("lstm", "gru")),
]


@dataclass(frozen=True)
class Row:
    """Milliseconds a step, medians (one thread: of CPU time), and stock / accelerated over the rounds."""

    case: str
    threads: int
    stock: float
    fast: float
    ratio: float
    low: float  # 20 %
    high: float  # 80 %
    rounds: int
    error: float  # largest relative error of a loss against float64; 0 of a search, whose tokens are the same


def build(case: Case) -> nn.Module:
    """One layer each, by JoeyNMT's own builder."""
    part = {"rnn_type": case.cell, "hidden_size": SIZE, "dropout": case.dropout}
    torch.manual_seed(0)
    decoder = part | {"hidden_dropout": case.dropout, "attention": case.attention}
    model = joey_model((case.vocabulary,) * 2, embedding=SIZE, encoder=part, decoder=decoder)
    model.encoder.emb_dropout.p = model.decoder.emb_dropout.p = case.dropout
    model.loss_function = ("crossentropy", 0.0)
    with torch.no_grad():
        model.decoder.output_layer.weight[[PAD, BOS, EOS]] = 0  # never the likeliest: every search takes T steps
    return model


def draw(vocabulary: int) -> dict[str, Tensor]:
    """A batch as JoeyNMT's, the longest source first."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(S // 2, S + 1, (B,), generator=g).sort(descending=True).values
    lengths[0] = S
    mask = torch.arange(S) < lengths[:, None]
    src = torch.randint(4, vocabulary, (B, S), generator=g).masked_fill(~mask, PAD)
    trg = torch.randint(4, vocabulary, (B, T + 1), generator=g)
    trg[:, 0] = BOS
    return {"src": src, "src_mask": mask[:, None], "src_length": lengths, "trg_input": trg[:, :-1], "trg": trg[:, 1:],
            "trg_mask": torch.ones(B, 1, T, dtype=torch.bool)}  # fmt: skip


def train_step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """What TrainManager does of a batch; the loss."""
    options = {"optimizer": "adam", "learning_rate": 1e-3}
    optimizer = joeynmt("builders").build_optimizer(options, model.parameters())
    clip = joeynmt("builders").build_gradient_clipper({"clip_grad_norm": 1.0, "clip_grad_val": None})
    model.train()

    def step() -> float:
        loss = model(return_type="loss", **batch)[0] / B
        loss.backward()
        clip(parameters=model.parameters())
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def search(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """JoeyNMT's own greedy search [B, T]."""
    model.eval()

    def step() -> Tensor:
        with torch.no_grad():
            given = {name: batch[name] for name in ("src", "src_mask", "src_length")}
            memory, last, _, _ = model(return_type="encode", **given)
            found: Tensor = joeynmt("search").greedy(batch["src_mask"], T, model, memory, last)[0]
            return found

    return step


def generate(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The same by `fastseq.interop.from_joeynmt`."""
    ours = fastseq.interop.from_joeynmt(model.state_dict())
    return lambda: ours.generate(batch["src"], batch["src_length"], max_new_tokens=T).sequences[:, 0]


def losses(step: Step) -> Tensor:
    torch.manual_seed(2)
    return torch.tensor([step() for _ in range(3)], dtype=torch.float64)


def check(case: Case, stock: nn.Module, batch: dict[str, Tensor]) -> float:
    """The largest relative error of accelerate's losses against float64; AssertionError where it is too large."""
    models = [copy.deepcopy(stock) for _ in range(3)]
    fastseq.accelerate(models[2])
    truth, theirs, ours = (losses(train_step(m, batch)) for m in (models[0].double(), *models[1:]))
    allowed = 2 * (theirs - truth).abs().max() + EPS * truth.abs().max()
    error = (ours - truth).abs().max()
    assert error <= allowed, f"{case}: losses {ours.tolist()}, in float64 {truth.tolist()}, stock {theirs.tolist()}"
    return float(error / truth.abs().max())


def measure(case: Case, threads: int, rounds: int) -> Row:
    """In turns, the order turned round each time."""
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    stock, batch = build(case), draw(case.vocabulary)
    error = check(case, stock, batch) if case.mode == "train" else 0.0
    fast = copy.deepcopy(stock)
    if case.mode != "generate":
        fastseq.accelerate(fast)
    theirs, ours = {"train": (train_step, train_step), "search": (search, search), "generate": (search, generate)}[
        case.mode
    ]
    steps: dict[str, Any] = {"stock": theirs(stock, batch), "fast": ours(fast, batch)}
    first = [step() for step in steps.values()]
    assert case.mode == "train" or torch.equal(*first), f"{case}: other tokens"
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            begin = clock()
            steps[name]()
            times[name].append((clock() - begin) * 1e3)
        order.reverse()
    ratios = [a / b for a, b in zip(times["stock"], times["fast"], strict=True)]
    middle = [quantile(times[name], 0.5) for name in steps]
    return Row(
        str(case), threads, *middle, *(quantile(ratios, q) for q in (0.5, 0.2, 0.8)), rounds, error
    )  # fmt: skip


def told(row: Row) -> str:
    """A line of the table."""
    spread = f"{row.low:.2f} to {row.high:.2f}"
    return f"| {row.case} | {row.threads} | {row.stock:.0f} | {row.fast:.0f} | {row.ratio:.2f} | {spread} |"


def with_table(page: str, report: dict[str, Any]) -> str:
    """The page with the report's table between its markers."""
    begin, end = MARKERS
    before, rest = page.split(begin)
    environment, rows = report["environment"], [told(Row(**row)) for row in report["rows"]]
    where = f"{environment['cpu']}, {environment['isa']}, torch {environment['torch']}, load {environment['load']};"
    when = (
        f"{environment['date'][:10]}. CPU time of one thread; medians of {report['rows'][0]['rounds']} pairs in turns."
    )
    return "".join([before, begin, "\n".join([f"{where} {when}", "", HEADER, *rows, ""]), end, rest.split(end)[1]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toolkits", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1", help="numbers of threads, as in 1,2")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each, in turns")
    parser.add_argument("--rows", default="*", help="part of a row's name, with * and ?")
    parser.add_argument("--json", type=Path, help="also written here")
    parser.add_argument("--write-docs", type=Path, help="measure nothing: the table of docs/interop.md, of such a file")
    given = parser.parse_args(arguments)
    if given.write_docs is not None:
        PAGE.write_text(with_table(PAGE.read_text(), json.loads(given.write_docs.read_text())))
        return
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")  # clip_grad_norm_'s own
    logging.disable(logging.INFO)  # JoeyNMT tells every model and optimizer
    print(HEADER)
    rows = []
    for threads in (int(n) for n in given.threads.split(",")):
        for case in CASES:
            if fnmatch.fnmatch(str(case), f"*{given.rows}*"):
                rows.append(row := measure(case, threads, given.rounds))
                print(told(row), flush=True)
    if given.json is not None:
        report = {"environment": describe(), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
