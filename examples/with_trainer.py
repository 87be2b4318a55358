"""Transformers' `Trainer` on a Llama: convert, train, fold, check the fold.

python examples/with_trainer.py
"""

import tempfile

import torch
from bare_loop import CONTEXT, LOW_RANK, VOCABULARY, fold_and_check, sequences
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from foldrank import factorize_


class Logits(nn.Module):
    """The model's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def main(steps: int = 40) -> tuple[float, float, float]:
    """First loss, last loss, largest change of a logit by the fold."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
    print(factorize_(model, LOW_RANK))  # <-- convert
    data = sequences()[:, :CONTEXT]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                logging_steps=10,
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=torch.accelerator.is_available(),
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in data],  # pyright: ignore[reportArgumentType]
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1], fold_and_check(Logits(model), data[:8].to(model.device))  # <-- fold


if __name__ == "__main__":
    main()
