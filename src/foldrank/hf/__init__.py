"""Low-rank models as ordinary `PreTrainedModel`s; importing this package registers them with the Auto classes."""

from foldrank.hf import crnet  # noqa: F401 - enters its backbone
from foldrank.hf.families import (
    LowRankGPT2Config,
    LowRankGPT2ForCausalLM,
    LowRankGPT2Model,
    LowRankLlamaConfig,
    LowRankLlamaForCausalLM,
    LowRankLlamaModel,
    LowRankMistralConfig,
    LowRankMistralForCausalLM,
    LowRankMistralModel,
    LowRankQwen3Config,
    LowRankQwen3ForCausalLM,
    LowRankQwen3Model,
    convert_,
    low_rank_classes,
)

__all__ = [
    "LowRankGPT2Config",
    "LowRankGPT2ForCausalLM",
    "LowRankGPT2Model",
    "LowRankLlamaConfig",
    "LowRankLlamaForCausalLM",
    "LowRankLlamaModel",
    "LowRankMistralConfig",
    "LowRankMistralForCausalLM",
    "LowRankMistralModel",
    "LowRankQwen3Config",
    "LowRankQwen3ForCausalLM",
    "LowRankQwen3Model",
    "convert_",
    "low_rank_classes",
]
