"""LoRA on the factors of a low-rank model, through PEFT, merged into them at the end."""

import warnings
from typing import Any

from transformers import PreTrainedModel

from foldrank.core.inventory import inventory, low_rank_layers
from foldrank.extras import needed


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that adapters go on: both factors of each low-rank layer; of a dense model, the linear
    layers of its blocks.
    """
    layers = low_rank_layers(model)
    if layers:
        return [f"{name}.{factor}" for name in layers for factor in ("down", "up")]
    head = model.get_output_embeddings()
    return [name for name, layer in inventory(model).linear_specs.items() if layer.module is not head]


def with_lora(model: PreTrainedModel, rank: int, *, classifies: bool) -> Any:
    """The model with new adapters of a rank, alone trained, beside the head of a classifier.

    Raises:
        ValueError: where PEFT is not installed.
    """
    peft = needed("peft", "lora_rank", extra="finetune")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=lora_targets(model),
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own use of transformers
        return peft.get_peft_model(model, config)


def merged(model: Any) -> PreTrainedModel:
    """The plain model, adapters added into the weights that they adapt."""
    return model.merge_and_unload()
