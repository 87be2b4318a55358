"""Llama with low-rank linear layers, known to the Auto classes."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from foldrank.hf.base import LowRankConfigMixin, LowRankModelMixin, register


class LowRankLlamaConfig(LowRankConfigMixin, LlamaConfig):
    """A Llama config with `low_rank`: a `LowRankConfig` or its fields as plain values; None is dense."""

    model_type = "lowrank_llama"


class LowRankLlamaModel(LowRankModelMixin, LlamaModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The Llama decoder with low-rank linear layers."""

    config_class = LowRankLlamaConfig


class LowRankLlamaForCausalLM(LowRankModelMixin, LlamaForCausalLM):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The Llama language model with low-rank linear layers."""

    config_class = LowRankLlamaConfig


register(LowRankLlamaConfig, LowRankLlamaModel, LowRankLlamaForCausalLM)
