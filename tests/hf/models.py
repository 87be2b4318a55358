"""What these tests share: a small low-rank Llama with trained weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from foldrank import LowRankConfig, ResidualConfig
from foldrank.hf import LowRankLlamaConfig
from foldrank.hf.base import LowRankConfigMixin

TOKENS = torch.arange(30).reshape(3, 10) * 7 % 61
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COLA_DLR = LowRankConfig(rank=3, activation="silu", residual=ResidualConfig(alpha=0.9))
"""The rank divides neither width: the last latents repeat fewer times than the others."""


def config(low_rank: LowRankConfig | None = COLA_DLR, **others: Any) -> LowRankConfigMixin:
    return LowRankLlamaConfig(**{**SHAPE, **others}, low_rank=low_rank)  # pyright: ignore[reportArgumentType]


def trained(
    low_rank: LowRankConfig | None = COLA_DLR, dtype: torch.dtype = torch.float32, seed: int = 0, **others: Any
) -> PreTrainedModel:
    """A model in eval mode after two optimizer steps, so that nothing is at its start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(low_rank, **others), dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def hidden(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).last_hidden_state
