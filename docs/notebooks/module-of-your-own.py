# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DLR in a module of your own
#
# `factorize_` replaces linear layers of any PyTorch module; `fold_` takes the residual away again. Here a small network
# learns to add numbers modulo 31, dense, low-rank, and low-rank with the residual.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch import nn

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_

STEPS = int(os.environ.get("STEPS", "600"))
MODULUS = 31


class Adder(nn.Module):
    """Two numbers in, logits of their sum out."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(MODULUS, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, MODULUS)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.embed(numbers).flatten(1)))


# %% [markdown]
# Only the layers of `mlp` are converted. The report says what was converted and what was not.


# %%
def build(residual: ResidualConfig | None, rank: int | None = 16) -> Adder:
    torch.manual_seed(0)
    model = Adder()
    if rank is not None:
        report = factorize_(model, LowRankConfig(rank=rank, targets=["mlp.*"], residual=residual))
        print(report.summary())
    return model


models = {
    "dense": build(None, rank=None),
    "low rank": build(None),
    "low rank with DLR": build(ResidualConfig(alpha=1.0)),
}

# %% [markdown]
# The loop is yours; nothing in it knows about low rank.

# %%
pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))


def train(model: nn.Module) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        batch = pairs[torch.randint(len(pairs), (256,), generator=generator)]
        loss = nn.functional.cross_entropy(model(batch), batch.sum(1) % MODULUS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


curves = {name: train(model) for name, model in models.items()}
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, losses in curves.items():
    axes.plot(losses, lw=0.9, label=f"{name}, {sum(p.numel() for p in models[name].parameters()):,} parameters")
axes.set(xlabel="steps", ylabel="loss, nats", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# One seed of a toy says nothing about which is better: [studies](../studies.md) ask that with seeds and intervals. The fold
# changes no output but by roundings, and leaves plain layers:

# %%
model = models["low rank with DLR"].eval()
before = model(pairs)
print(fold_(model))
print(f"largest change of a logit: {(model(pairs) - before).abs().max().item():.1e}")
print(model.mlp)
