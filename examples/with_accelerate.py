"""Accelerate around a loop of one's own: convert, train, fold, check the fold.

python examples/with_accelerate.py        or        accelerate launch examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from bare_loop import GPT, LOW_RANK, fold_and_check, loss_of, sequences
from torch.utils.data import DataLoader

from foldrank import factorize_


def main(steps: int = 40) -> tuple[float, float, float]:
    """First loss, last loss, largest change of a logit by the fold."""
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = GPT()
    accelerator.print(factorize_(model, LOW_RANK))  # <-- convert, before prepare
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = sequences()
    loader = DataLoader(data, batch_size=16, shuffle=True)  # pyright: ignore[reportArgumentType]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(steps), loader, strict=False):
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model = accelerator.unwrap_model(model)  # with several processes each folds its own copy
    return losses[0], losses[-1], fold_and_check(model, data[:8].to(accelerator.device))  # <-- fold


if __name__ == "__main__":
    main()
