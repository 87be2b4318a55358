"""Classification: a label for a text or a pair of texts, by a new head on the last token of a language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from foldrank.data.tokenizer import Encoder, pad_token
from foldrank.finetune.rows import Row
from foldrank.finetune.texts import encode_fields, padded
from foldrank.hf.foreign import foreign

FIELDS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
"""Fields of a text or a pair, ours and those of GLUE's tasks; the first that the first example has are those of all."""


@dataclass(frozen=True, slots=True)
class Classified:
    """Texts as token ids, each with the number of its label, and how many were cut."""

    examples: tuple[dict[str, Any], ...]
    cut: int


@dataclass(frozen=True, slots=True)
class Labels:
    """Names of the labels in the order of their numbers, and the number of each as it stands in the rows."""

    names: tuple[str, ...]
    numbers: Mapping[str | int, int]


def labels_of(training: Sequence[Row], held_out: Sequence[Row], known: tuple[str, ...] | None) -> Labels:
    """The labels of rows; of numbers with the names `known`, where all are within them.

    Raises:
        ValueError: for an example without a label, fewer than two labels, and a held-out one that nothing trains.
    """
    for row in (*training, *held_out):
        if isinstance(row.get("label"), float) or not isinstance(row.get("label"), str | int):
            raise ValueError(f"{row.where} has the label {row.get('label')!r}, where text or a whole number is needed")
    labels = {row["label"] for row in training}
    if len({type(label) for label in labels}) > 1:
        raise ValueError(
            f"some labels are text and some are numbers: {', '.join(map(repr, sorted(labels, key=str)[:6]))}"
        )
    if new := sorted({row["label"] for row in held_out} - labels, key=str):
        raise ValueError(f"the label {new[0]!r} is held out, and no training example has it")
    if len(labels) < 2:
        raise ValueError(f"all training examples have the label {next(iter(labels))!r}: there is nothing to tell apart")
    if known is not None and labels <= set(range(len(known))):
        return Labels(known, {number: number for number in range(len(known))})
    ordered = sorted(labels)
    return Labels(tuple(map(str, ordered)), {label: number for number, label in enumerate(ordered)})


def classify_rows(rows: Sequence[Row], labels: Labels, tokenizer: PreTrainedTokenizerBase, length: int) -> Classified:
    """Texts as token ids; a pair is joined by the end token, which also ends them.

    Args:
        rows: with the fields of one of `FIELDS`, and `label`.
        labels: of all rows.
        tokenizer: of the model.
        length: tokens; what is longer is cut before its end token, of a pair the longer text first.

    Raises:
        ValueError: naming the first row without the fields.
    """
    fields = next((each for each in FIELDS if all(name in rows[0] for name in each)), None)
    if fields is None:
        known = "; ".join(" and ".join(each) for each in FIELDS)
        raise ValueError(
            f"examples have the fields {', '.join(map(repr, rows[0]))}: a classification wants one of {known}"
        )
    encoder = Encoder(tokenizer)
    examples, cut = [], 0
    for row in rows:
        with foreign(f"{row.where} cannot be read"):
            parts = encode_fields(row, fields, encoder)
        before = sum(map(len, parts))
        while sum(len(part) + 1 for part in parts) > length:
            max(parts, key=len).pop()
        cut += sum(map(len, parts)) < before
        ids = [token for part in parts for token in (*part, encoder.end)]
        examples.append({"input_ids": ids, "labels": labels.numbers[row["label"]]})
    return Classified(tuple(examples), cut)


def load_classifier(
    checkpoint: Path, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """The model of a checkpoint with a new head, in training mode.

    Raises:
        ValueError: for an architecture that transformers does not classify with.
    """
    torch.manual_seed(seed)
    with foreign(f"{checkpoint} cannot be made a classifier"):
        return AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            pad_token_id=pad_token(tokenizer),
            trust_remote_code=False,
            use_safetensors=True,
        )


def collate(pad: int, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch, padding behind."""
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded(([1] * len(each) for each in ids), 0),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


@torch.no_grad()
def scores(model: PreTrainedModel, classified: Classified, pad: int, *, batch_size: int) -> dict[str, float]:
    """Loss, accuracy, F1 (of label 1 where there are two, else the mean over labels) and Matthews correlation.

    `chance` is the accuracy of always saying the commonest label.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    model.eval()
    losses, predicted, truth = [], [], []
    # By length, so that little is padded.
    examples = sorted(classified.examples, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(examples), batch_size):
        batch = collate(pad, examples[start : start + batch_size])
        labels = batch.pop("labels")
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.float().cpu()
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        predicted += logits.argmax(-1).tolist()
        truth += labels.tolist()
    zero: Any = 0.0  # of a label that is never said; the stubs want text
    average = "binary" if model.config.num_labels == 2 else "macro"
    return {
        "loss": sum(losses) / len(losses),
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, average=average, zero_division=zero)),
        "matthews_correlation": float(matthews_corrcoef(truth, predicted)),
        "chance": max(truth.count(label) for label in set(truth)) / len(truth),
    }
