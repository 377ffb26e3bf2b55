"""What two processes compute, for test_parallel: every case under DDP and FSDP2, beside torch.nn in one process.

Run by torchrun; each process writes {"ddp|LSTM-cpu": "" or what was wrong, ...} to argv[1]/<rank>.json.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastseq
from tests.modes.cases import CASES, Case, Holder, assert_same, loss_of

ROWS, STEPS, RATE = 2, 2, 0.5  # rows of a process, steps of training


def part(x: Tensor) -> Tensor:
    """This process's rows."""
    rank = dist.get_rank()
    return x[..., rank * ROWS : (rank + 1) * ROWS, :]


def losses(module: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """The mean over parts of a batch, as two processes see it together."""
    halves = [x[..., k * ROWS : (k + 1) * ROWS, :] for k in range(x.shape[-2] // ROWS)]
    return torch.stack([loss_of(module(half)) for half in halves]).mean()


def trained(module: nn.Module, loss: Callable[[nn.Module, int], Tensor]) -> nn.Module:
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(module, step).backward()
        optimizer.step()
    return module


def pair(case: Case) -> tuple[nn.Module, list[Tensor]]:
    """fastseq's module in a model, and the parameters that torch.nn's reach in one process."""
    stock, fast = case.twins(num_layers=2, bidirectional=True)
    alone = trained(Holder(stock), lambda m, k: losses(m, case.input(rows=2 * ROWS, seed=k)))
    return Holder(fast), [p.detach() for p in alone.parameters()]


def of_my_rows(case: Case) -> Callable[[nn.Module, int], Tensor]:
    return lambda m, k: loss_of(m(part(case.input(rows=2 * ROWS, seed=k))))


def ddp(case: Case) -> None:
    model, expected = pair(case)
    trained(DistributedDataParallel(model), of_my_rows(case))
    assert_same([p.detach() for p in model.parameters()], expected)


def fsdp(case: Case) -> None:
    """The layer and the model are sharded; while it runs, a layer's parameters are whole."""
    model, expected = pair(case)
    kind, mesh = type(model.rnn), init_device_mesh("cpu", (2,))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.rnn, kind)
    trained(model, of_my_rows(case))
    assert_same([p.full_tensor().detach() for p in model.parameters()], expected)


def seq2seq_ddp(backend: str) -> None:
    """A whole model, whose loss takes tokens."""
    model, (src, tgt) = seq2seq(backend), tokens()
    alone = seq2seq(backend)
    optimizer = torch.optim.SGD(alone.parameters(), RATE)
    torch.stack([alone.loss(s, t) for s, t in zip(src.split(ROWS), tgt.split(ROWS), strict=True)]).mean().backward()
    optimizer.step()
    wrapped = DistributedDataParallel(Loss(model))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    rows = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    wrapped(src[rows], tgt[rows]).backward()
    optimizer.step()
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()])


def seq2seq_fsdp(backend: str) -> None:
    """Sharded as one unit."""
    model, (src, tgt) = Loss(seq2seq(backend)), tokens()
    alone = seq2seq(backend)
    torch.stack([alone.loss(s, t) for s, t in zip(src.split(ROWS), tgt.split(ROWS), strict=True)]).mean().backward()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    rows = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    model(src[rows], tgt[rows]).backward()
    assert_same([p.grad.full_tensor() for p in model.parameters()], [p.grad for p in alone.parameters()])


class Loss(nn.Module):
    def __init__(self, model: fastseq.Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.model.loss(src, tgt)


def seq2seq(backend: str) -> fastseq.Seq2Seq:
    torch.manual_seed(3)
    encoder = fastseq.Encoder(8, 8, embedding=nn.Embedding(11, 8, padding_idx=0), backend=backend)
    decoder = fastseq.Decoder.luong(8, 8, memory_size=8, backend=backend)
    return fastseq.Seq2Seq(encoder, decoder, 11, bos_id=1, eos_id=2, pad_id=0)


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    src, tgt = torch.randint(3, 11, (2 * ROWS, 6), generator=g), torch.randint(3, 11, (2 * ROWS, 5), generator=g)
    tgt[:, 0] = 1
    return src, tgt


def stock_fsdp(_: str) -> None:
    """accelerate leaves what is sharded already, and says so."""
    model = Holder(nn.LSTM(5, 6))
    fully_shard(model.rnn, mesh=init_device_mesh("cpu", (2,)))
    (change,) = fastseq.accelerate(model)
    assert change == ("rnn", "skipped", "FSDPLSTM is sharded; accelerate before fully_shard"), change


def wrong(task: Callable[..., None], case: object) -> str:
    """What goes wrong, for the file in which the test finds it."""
    try:
        task(case)
    except Exception:
        return traceback.format_exc()
    return ""


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tasks = {f"{task.__name__}|{case}": (task, case) for task in (ddp, fsdp) for case in CASES}
    for task in (seq2seq_ddp, seq2seq_fsdp):
        tasks |= {f"{task.__name__}|{b}": (task, b) for b in ("cpu", "reference", "auto")}
    tasks["stock_fsdp"] = (stock_fsdp, "")
    found = {name: wrong(task, case) for name, (task, case) in tasks.items()}
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
