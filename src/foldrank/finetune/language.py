"""Language tasks: chats, prompts with answers, or text, as token ids whose labels are the answers; trained by TRL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foldrank.data.sequences import IGNORED
from foldrank.data.tokenizer import ROLES, Encoder
from foldrank.finetune.rows import Row
from foldrank.finetune.settings import FinetuneSettings
from foldrank.finetune.texts import check_text, encode_fields, padded
from foldrank.hf.foreign import foreign

FORMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
"""From the form of an example to its fields; the first form whose fields the first example has is that of all."""

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
ASSISTANT{% generation %}{{- message['content'] + eos_token -}}{% endgeneration %}
{%- elif message['role'] == 'system' -%}
{{- 'SYSTEM' + message['content'] + 'END' -}}
{%- else -%}
{{- 'USER' + message['content'] + 'END' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT{%- endif -%}
"""
"""For tokenizers without a chat template. An answer ends with the token that ends a text, at which everything stops."""

TEXT_ROLES = ("### System\\n", "### User\\n", "### Assistant\\n", "\\n")
"""In place of the tokens of roles, for tokenizers without them."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Examples as token ids with labels of the same length."""

    examples: tuple[dict[str, list[int]], ...]
    cut: int
    """Examples that were longer."""
    left_out: int
    """Examples of which nothing counts."""

    @property
    def tokens(self) -> int:
        """Labels that count."""
        return sum(label != IGNORED for example in self.examples for label in example["labels"][1:])


def collate(pad: int, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """A batch, padding behind, where causal attention needs no mask."""
    fills = {"input_ids": pad, "labels": IGNORED}
    return {name: padded((example[name] for example in examples), fill) for name, fill in fills.items()}


def set_chat_template_(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives a tokenizer without a chat template one; returns whether it did."""
    if tokenizer.chat_template is not None:
        return False
    known = set(tokenizer.get_vocab())
    system, user, assistant, end = ROLES if known.issuperset(ROLES) else TEXT_ROLES
    template = TEMPLATE.replace("SYSTEM", system).replace("USER", user).replace("END", end)
    tokenizer.chat_template = template.replace("ASSISTANT", "{{- '" + assistant + "' -}}")
    return True


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings, length: int
) -> Tokenized:
    """Examples as token ids; what no answer is has no label, unless the settings count it too.

    Args:
        rows: of one form of `FORMS`.
        tokenizer: with a chat template where the rows are chats.
        settings: whether prompts count.
        length: tokens after which an example is cut.

    Raises:
        ValueError: naming the first row that is not of the form of the first one, and where no label is left.
    """
    form, encoder = form_of(rows[0]), Encoder(tokenizer)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    examples, cut, left_out = [], 0, 0
    for row in rows:
        with foreign(f"{row.where} is not of the form {form!r}"):
            if form == "messages":
                _check_messages(row.get("messages"), special)
                ids, counts = _encoded_chat(row["messages"], tokenizer)
            else:
                ids, counts = _encoded(row, FORMS[form], encoder)
        cut += len(ids) > length
        labels = [
            token if settings.train_on_prompt or count else IGNORED for token, count in zip(ids, counts, strict=True)
        ]
        example = {"input_ids": ids[:length], "labels": labels[:length]}
        if any(label != IGNORED for label in example["labels"][1:]):
            examples.append(example)
        else:
            left_out += 1
    if not examples:
        raise ValueError(
            f"within {length} tokens no example has an answer: give a larger sequence_length, or shorter prompts"
        )
    return Tokenized(tuple(examples), cut, left_out)


def form_of(row: Row) -> str:
    """The form of an example.

    Raises:
        ValueError: for fields that are of none.
    """
    for form, names in FORMS.items():
        if all(name in row for name in names):
            return form
    raise ValueError(
        f"examples have the fields {', '.join(map(repr, row))}: a language task wants 'messages', or 'prompt' and "
        "'completion', or 'text'"
    )


def _encoded_chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(count) for count in encoded["assistant_masks"]]


def _encoded(row: Row, fields: Sequence[str], encoder: Encoder) -> tuple[list[int], list[bool]]:
    *prompt, answer = encode_fields(row, fields, encoder)
    before = [token for part in prompt for token in part]
    return [*before, *answer, encoder.end], [False] * len(before) + [True] * (len(answer) + 1)


def _check_messages(messages: Any, special: Sequence[str]) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of messages, each with role and content")
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("content"), str) or fields.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"a message has a role (system, user, assistant) and a content, got {message!r:.80}")
        check_text(fields["content"])
        # A template is filled before it is tokenized, so that nothing tells such a token from one of the template's.
        if spelled := next((token for token in special if token in fields["content"]), None):
            raise ValueError(f"a message spells {spelled!r}, a special token here: take it out")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is of the assistant: there is nothing to learn")
