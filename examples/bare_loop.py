"""A bare PyTorch loop in the style of nanoGPT, with a small GPT of its own: convert, train, fold, check the fold.

    python examples/bare_loop.py

The lines that matter are marked with <--. The other examples take the model and the text from here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank import LowRankConfig, ResidualConfig, factorize_, fold_

TEXT = "".join(f"{a} plus {b} is {a + b}.\n" for a in range(40) for b in range(40))
VOCABULARY = sorted(set(TEXT))
CONTEXT = 32
LOW_RANK = LowRankConfig(rank=0.25, activation="silu", residual=ResidualConfig(alpha=1.0))


class Block(nn.Module):
    """Causal self-attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.movedim((-3, -2), (0, -3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(-2, -3).flatten(-2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens (batch, time) to logits (batch, time, vocabulary); the head is tied to the embedding."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(len(VOCABULARY), width)
        self.wpe = nn.Embedding(CONTEXT, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, len(VOCABULARY), bias=False)
        self.lm_head.weight = self.wte.weight
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[-1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def sequences() -> Tensor:
    """The text as tokens, in rows of one context and the token after it: (rows, CONTEXT + 1)."""
    tokens = torch.tensor([VOCABULARY.index(character) for character in TEXT])
    return tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, -2), batch[:, 1:].flatten())


@torch.no_grad()
def fold_and_check(model: nn.Module, batch: Tensor) -> float:
    """Folds `model`; the largest change of a logit, which is rounding."""
    model.eval()
    before = model(batch[:, :-1])
    print(fold_(model).summary())  # <-- fold: what is left is the plain low-rank model
    change = float((model(batch[:, :-1]) - before).abs().max())
    assert change < 1e-4, f"the fold changed a logit by {change}"
    print(f"largest change of a logit: {change:.1e}")
    return change


def main(steps: int = 60) -> tuple[float, float, float]:
    """First loss, last loss, largest change of a logit by the fold."""
    torch.manual_seed(0)
    model = GPT()
    print(factorize_(model, LOW_RANK))  # <-- convert, before the optimizer is made
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]  # a trainable alpha is among these
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=3e-3)
    data = sequences()
    losses = []
    for _ in range(steps):
        loss = loss_of(model, data[torch.randint(len(data), (16,))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1], fold_and_check(model, data[:8])


if __name__ == "__main__":
    main()
