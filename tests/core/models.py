"""What the core tests share: a small model with a language model's names, one training step, an error measure."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldrank.core.residual import DuplicatedLatentResidual


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * torch.sigmoid(self.k_proj(x)))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(x)


class TinyLM(nn.Module):
    """Two blocks of five linear layers each, and a head: 11 linear layers."""

    def __init__(self, vocabulary: int = 13, width: int = 8, hidden: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


TOKENS = torch.arange(24).reshape(3, 8) % 13


def train(model: nn.Module, *inputs: Tensor, steps: int = 1) -> None:
    """Some optimizer steps, after which no parameter is at its start and nothing is symmetric."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()


def residual_of(layer: nn.Module) -> DuplicatedLatentResidual:
    residual = layer.residual
    assert isinstance(residual, DuplicatedLatentResidual)
    return residual


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Relative root-mean-square error of `actual`, in float64."""
    error = actual.detach().double() - expected.detach().double()
    return float(error.norm() / expected.detach().double().norm())


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The identity of each module by name, and a copy of the state."""
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return modules, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, int], dict[str, Tensor]]) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    # As bytes, so that NaN equals itself.
    assert all(torch.equal(state[key].view(torch.uint8), before[1][key].view(torch.uint8)) for key in state)
