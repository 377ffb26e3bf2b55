"""PyTorch Geometric's AttentiveFP: GRU cells over the atoms of molecules, at the sizes of its own example."""

import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn.models import AttentiveFP

from .program import Convert, Learned, Program

MOLECULES, BATCH, EPOCHS = 400, 100, 2


def build(convert: Convert) -> tuple[AttentiveFP, DataLoader]:
    """The model, and random trees of 10 to 30 atoms."""
    draw = torch.Generator().manual_seed(0)
    model = AttentiveFP(
        in_channels=39, hidden_channels=200, out_channels=1, edge_dim=10, num_layers=2, num_timesteps=2, dropout=0.2
    )
    convert(model)
    return model, DataLoader([_molecule(draw) for _ in range(MOLECULES)], batch_size=BATCH, shuffle=True)


def _molecule(draw: torch.Generator) -> Data:
    atoms = int(torch.randint(10, 31, (), generator=draw))
    parents = torch.tensor([int(torch.randint(0, i, (), generator=draw)) for i in range(1, atoms)])
    down = torch.stack([parents, torch.arange(1, atoms)])
    edges = torch.cat([down, down.flip(0)], 1)
    x = torch.rand(atoms, 39, generator=draw)
    return Data(x=x, edge_index=edges, edge_attr=torch.rand(edges.shape[1], 10, generator=draw), y=x[:, :1].mean(0))


def run(built: tuple[AttentiveFP, DataLoader]) -> Learned:
    model, batches = built
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=10**-5)
    losses = []
    for _ in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
            loss = torch.nn.functional.mse_loss(out[:, 0], batch.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return Learned(losses, [p.detach() for p in model.parameters()])


PROGRAM = Program(
    "torch_geometric",
    f"AttentiveFP: GRU cells, H=200, {BATCH} molecules of 10 to 30 atoms; {EPOCHS * MOLECULES // BATCH} updates",
    "accelerate",
    build,
    run,
)
