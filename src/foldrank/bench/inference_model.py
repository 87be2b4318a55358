"""A method's model as it is deployed: folded, in eval mode, in the dtype of the benchmark; and the gates before it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldrank.bench.record import Gate
from foldrank.bench.settings import COLUMNWISE, Settings, parse
from foldrank.core.fold import fold_
from foldrank.surgery.memory_format import to_column_major_
from foldrank.train.model import build_model

BOUND = 1e-4
"""How far logits may be apart before and after a change that is none, relative to their norm, in float32."""


def prompt(settings: Settings) -> Tensor:
    """The tokens that every model reads: (batch_size, sequence_length)."""
    train = settings.sizes().train
    shape = train.batch_size, train.sequence_length
    draw = torch.Generator().manual_seed(0)
    return torch.randint(settings.vocabulary_size(), shape, generator=draw).to(settings.device)


@torch.no_grad()
def load_inference_model(settings: Settings, method: str) -> tuple[PreTrainedModel, list[Gate]]:
    """The folded model, and the gates that it passed: logits as before the fold, where there was one to make, and as
    before its weights were laid out otherwise.

    Raises:
        ValueError: where the gate fails.
    """
    model = build_model(settings.recipe_of(method), settings.vocabulary_size(), device=settings.device).eval()
    ids = prompt(settings)
    before = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    gates = []

    def compare(what: str) -> None:
        after = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        difference = float((after - before).norm() / before.norm())
        gates.append(
            Gate(what=f"logits of {method} before and after {what}", difference=difference, bound=BOUND).check()
        )

    if fold_(model).errors:
        compare("the fold")
    if COLUMNWISE in parse(method).variants:
        to_column_major_(model)
        compare("its weights lay column by column")
    if settings.bfloat16:
        buffers = dict(model.named_buffers())
        model.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
        for name, buffer in buffers.items():  # the frequencies of the positions stay in float32
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer)
    return model, gates


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that one pass reads, whatever the number of tokens: all but the table of embeddings, of which it
    reads a row per token, unless the head is the same.
    """
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    looked_up = 0 if head.weight is table.weight else table.weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - looked_up
