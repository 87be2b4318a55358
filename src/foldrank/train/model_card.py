"""The README.md of a folded checkpoint: what it is, what its run measured, and how it loads."""

from foldrank.recipes.schema import Recipe
from foldrank.structured import to_yaml
from foldrank.train.metrics import RunMetrics


def model_card(recipe: Recipe, metrics: RunMetrics) -> str:
    """The card in Markdown, with the fields that the Hugging Face hub reads; the licence is the user's to name.

    Args:
        recipe: of the run.
        metrics: of the run.
    """
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "tags": ["foldrank", "low-rank" if recipe.low_rank is not None else "dense"],
    }
    low_rank = recipe.low_rank
    backbone = "dense" if low_rank is None else low_rank.backbone
    residual = low_rank is not None and low_rank.residual is not None
    data = recipe.data.source if recipe.data.sources is None else ", ".join(s.label for s in recipe.data.sources)
    rows = {
        "recipe": f"{metrics.recipe}, seed {metrics.seed}",
        "backbone": f"{backbone}{', trained with the duplicated latent residual, folded' if residual else ''}",
        "parameters": f"{metrics.params:,} (dense: {metrics.params_dense:,})",
        "data": data,
        "sha256 of the text": metrics.text_sha256 or "unknown",
        "training tokens": f"{metrics.tokens:,}",
        "training FLOPs": f"{metrics.flops:.3g}",
        "sequence length": f"{recipe.train.sequence_length:,}",
        "validation loss": f"{metrics.val_loss_folded:.6f} nats per token, over {metrics.val_tokens:,} tokens",
        "validation perplexity": ""
        if metrics.val_perplexity_folded is None
        else f"{metrics.val_perplexity_folded:.4f}",
        "largest change of a logit by the fold": f"{metrics.fold_max_abs_logit_drift:.2e}",
    }
    table = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows.items() if value)
    trust = ", trust_remote_code=True" if low_rank is not None else ""
    return f"""---
{to_yaml(fields)}---

A language model pre-trained with foldrank (duplicated latent residual: arXiv 2606.28932). Before you publish it, name
its licence, its data and what it is for.

| | |
|---|---|
{table}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
    tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
"""
