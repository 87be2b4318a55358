"""The loss is a sum over predicted tokens divided by their number, however it is computed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from foldrank.data.tokenizer import train_tokenizer
from foldrank.train.evaluate import IGNORED, continue_text, evaluate_loss, first, fold_error, logits_of

VOCABULARY = 31


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """In float64, in training mode, with a dropout that would show if evaluation did not switch it off."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # so that losses differ from log(vocabulary)
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config).double().train()


def sequences(count: int, length: int = 9, *, masked: bool = False) -> Any:
    """Some sequences; masked: with labels that do not count, a whole sequence of them included."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for index in range(count):
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        if masked:
            labels[torch.rand(length, generator=generator) < index / count] = IGNORED
            if index == 2:
                labels[:] = IGNORED
        items.append({"input_ids": ids, "labels": labels})
    return items


@torch.no_grad()
def by_hand(model: PreTrainedModel, items: list[dict[str, Tensor]]) -> tuple[float, int]:
    """One token after the other, straight from the definition."""
    model.eval()
    total, tokens = 0.0, 0
    for item in items:
        logits = model(input_ids=item["input_ids"][None]).logits[0]
        for position in range(1, len(item["input_ids"])):
            label = int(item["labels"][position])
            if label != IGNORED:
                total -= float(F.log_softmax(logits[position - 1], dim=-1)[label])
                tokens += 1
    model.train()
    return total / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_it_equals_the_definition_for_any_batch_size(model: PreTrainedModel, masked: bool, batch_size: int) -> None:
    items = sequences(7, masked=masked)
    loss, tokens = by_hand(model, items)
    result = evaluate_loss(model, items, batch_size=batch_size)
    assert result.tokens == tokens
    assert tokens == 7 * 8 or masked
    assert result.loss == pytest.approx(loss, rel=1e-12, abs=0)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-12, abs=0)


def test_it_is_not_the_mean_of_batch_means(model: PreTrainedModel) -> None:
    items = sequences(7, masked=True)
    apart: list[Any] = [[item] for item in items if (item["labels"][1:] != IGNORED).any()]
    means = [evaluate_loss(model, one).loss for one in apart]
    assert evaluate_loss(model, items).loss != pytest.approx(sum(means) / len(means), rel=1e-3)


def test_it_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate_loss(model, sequences(3))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert evaluate_loss(model, sequences(3)) == result
    model.eval()
    assert evaluate_loss(model, sequences(3)) == result
    assert not model.training
    model.train()


def test_an_error_inside_leaves_the_mode_as_it_was(model: PreTrainedModel) -> None:
    out_of_range: Any = [{"input_ids": torch.tensor([VOCABULARY, 0]), "labels": torch.tensor([0, 0])}]
    with pytest.raises(IndexError):
        evaluate_loss(model, out_of_range)
    assert model.training


@pytest.mark.parametrize("length", [1, 6])
def test_nothing_to_predict_is_an_error(model: PreTrainedModel, length: int) -> None:
    items = sequences(2, length)
    for item in items:
        item["labels"] = torch.full_like(item["labels"], IGNORED)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate_loss(model, items)


def test_drift_is_the_largest_change_and_the_share_of_equal_choices() -> None:
    before = [torch.tensor([[[1.0, 2.0, 0.0], [5.0, 4.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 9.0], [1.0, 0.0, 0.0]]])]
    after = [before[0] + torch.tensor([0.25, 0.0, 0.0]), before[1] + torch.tensor([0.0, 1.5, 0.0])]
    found = fold_error(before, after)
    assert found.max_abs_error == 1.5
    assert found.argmax_agreement == 0.75
    same = fold_error(before, before)
    assert (same.max_abs_error, same.argmax_agreement) == (0.0, 1.0)


def test_drift_is_not_silent_about_values_that_are_not_finite() -> None:
    logits = [torch.zeros(1, 2, 3)]
    assert not fold_error(logits, [torch.full((1, 2, 3), math.nan)]).max_abs_error <= 1e-3


def test_logits_come_in_batches(model: PreTrainedModel) -> None:
    items = sequences(5)
    found = list(logits_of(model, items, batch_size=2))
    assert [tuple(part.shape) for part in found] == [(2, 9, VOCABULARY), (2, 9, VOCABULARY), (1, 9, VOCABULARY)]
    with torch.no_grad():
        expected = model.eval()(input_ids=items[4]["input_ids"][None]).logits
    model.train()
    torch.testing.assert_close(found[2], expected.float())


@pytest.mark.parametrize(("count", "length"), [(None, 5), (0, 0), (3, 3), (9, 5)])
def test_first(count: int | None, length: int) -> None:
    items = sequences(5)
    chosen: Any = first(items, count)
    assert len(chosen) == length
    assert all(torch.equal(chosen[index]["input_ids"], items[index]["input_ids"]) for index in range(length))


@pytest.fixture(scope="module")
def speaker() -> tuple[PreTrainedModel, Any]:
    tokenizer = train_tokenizer(["some text"], 262)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_a_continuation_begins_with_the_prompt_and_follows_from_the_seed(speaker: tuple[PreTrainedModel, Any]) -> None:
    drawn = [continue_text(*speaker, "text ", seed=seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert all(text.startswith("text ") for text in drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_temperature_zero_is_greedy(speaker: tuple[PreTrainedModel, Any]) -> None:
    one, other = (continue_text(*speaker, "text ", seed=seed, max_new_tokens=12, temperature=0) for seed in (1, 2))
    assert one == other


def test_a_static_cache_changes_no_token(speaker: tuple[PreTrainedModel, Any]) -> None:
    texts = [
        continue_text(*speaker, "bar", seed=3, max_new_tokens=20, temperature=0.0, static_cache=static)
        for static in (False, True)
    ]
    assert texts[0] == texts[1]


def test_few_positions_are_kept_where_all_would_be_too_many(model: PreTrainedModel) -> None:
    items = sequences(5)
    some = list(logits_of(model, items, batch_size=2, most=5 * 4 * VOCABULARY))
    assert [part.shape[1] for part in some] == [4, 4, 4]
    everything = list(logits_of(model, items, batch_size=2))
    for part, every in zip(some, everything, strict=True):
        torch.testing.assert_close(part, every[:, :4])
    assert next(iter(logits_of(model, items, most=1))).shape[1] == 1
