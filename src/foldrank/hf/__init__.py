"""Low-rank models as ordinary `PreTrainedModel`s; importing this package registers them with the Auto classes."""

from foldrank.hf.llama import LowRankLlamaConfig, LowRankLlamaForCausalLM, LowRankLlamaModel

__all__ = ["LowRankLlamaConfig", "LowRankLlamaForCausalLM", "LowRankLlamaModel"]
