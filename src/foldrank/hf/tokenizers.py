"""The door for tokenizers of others: what their files say is checked before a library builds anything of it.

Libraries take an id of a billion for a size, and end in an abort.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foldrank.hf.foreign import foreign
from foldrank.hub import is_reachable
from foldrank.structured import read_json_table

MAX_ID = 1 << 24
"""Above any id: the largest vocabularies that are known have a quarter of a million entries."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_VOCAB_BYTES = 1 << 27


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer by name or folder. No code that lies beside it is run, and nothing is asked.

    Raises:
        ValueError: where it cannot be loaded, naming the file that is wrong where one is.
    """
    if Path(name).is_dir():
        _check_files(Path(name))
    elif Path(name).exists():
        raise ValueError(f"the tokenizer {str(name)!r} is a file: name the folder that holds it")
    elif not _may_be_on_hub(str(name)):
        raise ValueError(
            f"the tokenizer {str(name)!r}: there is no such folder, and no model on the hub has such a name"
        )
    with foreign(f"the tokenizer {str(name)!r} cannot be loaded"):
        tokenizer = _loaded(name)
        largest_id(tokenizer)
    return tokenizer


def _may_be_on_hub(name: str) -> bool:
    """Whether it is the name of a repository, and not a path to where nothing is."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _loaded(name: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as first:
        try:
            # A checkpoint's config may name code of its own, which our tokenizers do not need.
            return PreTrainedTokenizerFast.from_pretrained(name)
        except Exception:
            if isinstance(first, OSError) and not Path(name).is_dir() and not is_reachable():
                raise ValueError("there is no such folder, and the hub cannot be reached") from first
            raise first from None


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of its tokens, special ones included; there may be holes below it.

    Raises:
        ValueError: for ids that are no such numbers.
    """
    ids = tokenizer.get_vocab().values()
    if not ids or not all(isinstance(token, int) and 0 <= token < MAX_ID for token in ids):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has ids that are not between 0 and {MAX_ID}")
    return max(ids)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document.

    Raises:
        ValueError: for a tokenizer without one.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to join documents with")
    return tokenizer.eos_token_id


def embedding_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Entries that an embedding needs for any text: one more than the largest id of a token that is not special, and
    of those special ones that we use. Others may lie beyond it: t5-base has 32,000 tokens and 100 of these.
    """
    ids = {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return 1 + max(*ids, *(token for token in used if isinstance(token, int)))


def _check_files(folder: Path) -> None:
    """Refuses a tokenizer whose files hold what no tokenizer has.

    Raises:
        ValueError: naming the file and the field.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            _check_settings(folder / name, read_json_table(folder / name, MAX_VOCAB_BYTES))
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).exists():
            _check_ids(folder / name, read_json_table(folder / name, MAX_VOCAB_BYTES))
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    values = read_json_table(file, MAX_VOCAB_BYTES)
    model, added = values.get("model"), values.get("added_tokens", [])
    _expect(isinstance(model, dict), file, "model", model)
    assert isinstance(model, dict)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        _check_ids(file, vocabulary)
    else:  # Unigram: tokens with their scores, an id each by its place
        is_list = isinstance(vocabulary, list) and 0 < len(vocabulary) <= MAX_ID
        _expect(is_list and all(isinstance(entry, list) for entry in vocabulary or ()), file, "model.vocab", vocabulary)
    _expect(isinstance(added, list), file, "added_tokens", added)
    for token in added:
        _expect(isinstance(token, dict) and _is_id(token.get("id")), file, "added_tokens", token)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    for name in SPECIAL:
        _expect(isinstance(settings.get(name), str | dict | None), file, name, settings.get(name))
    length = settings.get("model_max_length")
    _expect(length is None or (isinstance(length, int | float) and length > 0), file, "model_max_length", length)
    kind = settings.get("tokenizer_class")
    _expect(isinstance(kind, str | None), file, "tokenizer_class", kind)
    added = settings.get("added_tokens_decoder") or {}
    _expect(isinstance(added, dict), file, "added_tokens_decoder", added)
    for number in added:
        _expect(str(number).isdecimal() and _is_id(int(str(number)[:20])), file, "added_tokens_decoder", number)


def _check_ids(file: Path, vocabulary: dict[str, Any]) -> None:
    for token, number in vocabulary.items():
        _expect(_is_id(number), file, f"the id of {token!r}", number)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{file} is no file of a tokenizer: two tokens have one id")


def _is_id(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < MAX_ID


def _expect(holds: bool, file: Path, field: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{file} is no file of a tokenizer: {field} is {repr(value)[:80]}")
