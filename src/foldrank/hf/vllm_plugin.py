"""vLLM's plugin, an entry point: where foldrank is installed, vLLM needs no flag to trust a checkpoint's code."""

from foldrank.hf.remote_code import FAMILIES

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
"""vLLM's own wrapper around a model of transformers, by which it serves classes that it does not know."""


def register() -> None:
    """Gives vLLM the low-rank language models, to be called in each of its processes, any number of times."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports] - it calls us

    for family in FAMILIES.values():
        if family.causal.is_backend_compatible():
            ModelRegistry.register_model(f"LowRank{family.name}ForCausalLM", BACKEND)
