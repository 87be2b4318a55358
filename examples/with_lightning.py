"""A LightningModule: convert, train, fold, check the fold. Needs `pip install foldrank[examples]`.

python examples/with_lightning.py
"""

import lightning  # pyright: ignore[reportMissingImports]
import torch
from bare_loop import GPT, LOW_RANK, fold_and_check, loss_of, sequences
from torch import Tensor
from torch.utils.data import DataLoader

from foldrank import factorize_


class LanguageModel(lightning.LightningModule):
    """The GPT of the bare loop."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT()
        print(factorize_(self.gpt, LOW_RANK))  # <-- convert
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        loss = loss_of(self.gpt, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int = 40) -> tuple[float, float, float]:
    """First loss, last loss, largest change of a logit by the fold."""
    lightning.seed_everything(0)
    model = LanguageModel()
    data = sequences()
    trainer = lightning.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True))  # pyright: ignore[reportArgumentType]
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    return model.losses[0], model.losses[-1], fold_and_check(model.gpt, data[:8].to(model.device))  # <-- fold


if __name__ == "__main__":
    main()
