"""What counts of an example, and what a chat becomes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from foldrank.data.sequences import IGNORED
from foldrank.finetune.language import collate, form_of, set_chat_template_, tokenize
from foldrank.finetune.rows import Row
from foldrank.finetune.settings import FinetuneSettings
from foldrank.hf.tokenizers import load_tokenizer
from tests.small_runs import Run

from .examples import chats, prompts

SETTINGS = FinetuneSettings(data="x")


def rows_of(fields: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(each, number, "x.jsonl") for number, each in enumerate(fields, 1)]


def test_the_loss_is_of_the_answer_and_of_its_end(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    done = tokenize(rows_of(prompts(3)), tokenizer, SETTINGS, 64)
    for example, row in zip(done.examples, prompts(3), strict=True):
        answer = [token for token in example["labels"] if token != IGNORED]
        assert tokenizer.decode(example["input_ids"]) == row["prompt"] + row["completion"] + tokenizer.eos_token
        assert tokenizer.decode(answer) == row["completion"] + tokenizer.eos_token
    whole = tokenize(rows_of(prompts(3)), tokenizer, FinetuneSettings(data="x", train_on_prompt=True), 64)
    assert all(example["labels"] == example["input_ids"] for example in whole.examples)
    text = tokenize(rows_of([{"text": "bar"}]), tokenizer, SETTINGS, 64)
    assert text.examples[0]["labels"] == text.examples[0]["input_ids"]


def test_a_chat_gets_a_template_with_the_tokens_of_roles(finished_run: Run, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    assert set_chat_template_(tokenizer)
    assert not set_chat_template_(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (example,) = tokenize(rows_of(chats(1)), tokenizer, SETTINGS, 64).examples
    text = "<|system|>min<|end_of_turn|><|user|>0 star<|end_of_turn|><|assistant|>bar nun.<|endoftext|>"
    assert tokenizer.decode(example["input_ids"]) == text
    assert tokenizer.decode([token for token in example["labels"] if token != IGNORED]) == "bar nun.<|endoftext|>"
    asked = tokenizer.apply_chat_template(chats(1)[0]["messages"][:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(str(asked))


def test_a_tokenizer_without_tokens_of_roles_gets_a_template_in_text(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    tokenizer.get_vocab = dict  # as of a tokenizer that has none of them
    set_chat_template_(tokenizer)
    text = tokenizer.apply_chat_template(chats(1)[0]["messages"], tokenize=False)
    assert text == "### System\nmin\n### User\n0 star\n### Assistant\nbar nun.<|endoftext|>"


def test_what_is_too_long_is_cut_and_left_out_where_nothing_of_the_answer_remains(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    rows = rows_of([*prompts(2), {"prompt": "star " * 40, "completion": " bar"}])
    done = tokenize(rows, tokenizer, SETTINGS, 32)
    assert (len(done.examples), done.cut, done.left_out) == (2, 1, 1)
    with pytest.raises(ValueError, match="within 32 tokens no example has an answer"):
        tokenize(rows[2:], tokenizer, SETTINGS, 32)


def test_a_batch_is_padded_behind() -> None:
    batch = collate(9, [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert torch.equal(batch["labels"], torch.tensor([[-100, 2, 3], [4, -100, -100]]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a message has a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message is of the assistant"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": "a<|user|>b"}]}, "spells '<.user.>', a special token here"),
        ({"prompt": "x", "completion": 1}, "example 1 of x.jsonl .* 'completion' must be text, got 1"),
        ({"prompt": "\ud800", "completion": "x"}, "half a character"),
        ({"prompt": "x", "answer": "y"}, "a language task wants 'messages'"),
    ],
)
def test_what_is_no_example_is_refused(finished_run: Run, row: dict[str, object], message: str) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    set_chat_template_(tokenizer)
    with pytest.raises(ValueError, match=message):
        tokenize(rows_of([row]), tokenizer, SETTINGS, 32)


def test_the_first_row_of_another_form_is_named_by_its_number(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    rows = rows_of([*prompts(2), *chats(1)])
    with pytest.raises(ValueError, match=r"example 3 of x\.jsonl is not .*: 'prompt' must be text, got None"):
        tokenize(rows, tokenizer, SETTINGS, 32)


def test_what_spells_a_special_token_is_text_as_in_pre_training(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.out / "folded")
    rows = rows_of([{"prompt": "a<|endoftext|>", "completion": "<|user|><|endoftext|>"}])
    (example,) = tokenize(rows, tokenizer, SETTINGS, 128).examples
    special = [token for token in example["input_ids"] if token in tokenizer.all_special_ids]
    assert special == [tokenizer.eos_token_id]
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in example["input_ids"]
    assert tokenizer.decode(example["input_ids"]) == "a<|endoftext|><|user|><|endoftext|><|endoftext|>"


def test_the_form_is_that_of_the_first_fields() -> None:
    assert form_of(rows_of([{"prompt": "a", "completion": "b", "text": "c"}])[0]) == "prompt and completion"
