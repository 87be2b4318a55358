"""An exported model: one graph with a key-value cache, its tokenizer, and generation of text."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from foldrank.runtime.engines import ENGINES, Engine
from foldrank.runtime.sampling import Sampling, next_tokens

SETTINGS, TOKENIZER = "runtime.json", "tokenizer.json"

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a character of which bytes are missing."""


class Model:
    """A model in a folder that `foldrank export` wrote, as ONNX or for OpenVINO.

    Args:
        folder: with `model.onnx` or `model.xml`, `tokenizer.json` and `runtime.json`.
        threads: of the processor, from 1 to as many as it has; None: as many as the engine takes.

    Raises:
        ValueError: where the folder holds no such model, it is damaged, or its engine is not installed, and for threads
            that are not there.

    Example:
        >>> Model("nowhere")
        Traceback (most recent call last):
        ...
        ValueError: nowhere is no exported model: it has no runtime.json (foldrank export --format onnx)
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        most = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= most:
            raise ValueError(f"threads must lie between 1 and {most}, the processors here, got {threads}")
        folder = Path(folder)
        self.settings = _settings(folder)
        package, engine = ENGINES[self.settings["format"]]
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            self.engine: Engine = engine(folder / engine.graph, threads)
        except ImportError as error:
            raise ValueError(f"running {folder} needs the package {package}: pip install {package}") from error
        except Exception as error:
            raise ValueError(f"{folder} holds a damaged model: {' '.join(str(error).split())}") from error
        self.ends: frozenset[int] = frozenset(self.settings["end_tokens"])
        self.max_positions: int | None = self.settings["max_positions"]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens added.

        Raises:
            ValueError: for half a character (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} holds half a character (a lone surrogate)") from error
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, ids: NDArray) -> NDArray:
        """The logits of every position, in float32.

        Shape:
            ids (batch, time), result (batch, time, vocabulary).
        """
        batch, time = ids.shape
        mask = np.ones((batch, time), np.int64)
        return self._run(ids, mask, self._empty_cache(batch), np.arange(time))[0]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Each prompt's continuation, all in one batch.

        Args:
            prompts: texts, each of at least one token.
            max_new_tokens: at least 1 and at most so many, and no more than the positions that the model has learned.
            sampling: how tokens are chosen.
            seed: of the draws, 0 or more.
            stop: texts that end a continuation, which is without them.

        Raises:
            ValueError: for a number out of range, no prompt, one without tokens, an empty text to stop at, and logits
                that are not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_stop(stop)
        new: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for tokens in self.tokens(prompts, max_new_tokens, sampling or Sampling(), seed):
            for row in sorted(open_rows):
                if tokens[row] in self.ends:
                    open_rows.discard(row)
                    continue
                new[row].append(tokens[row])
                if stop and _cut(self._decode(new[row]), stop) is not None:
                    open_rows.discard(row)
            if not open_rows:
                break
        texts = [self._decode(tokens) for tokens in new]
        cuts = [_cut(text, stop) for text in texts]
        return [text if cut is None else text[:cut] for text, cut in zip(texts, cuts, strict=True)]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The continuation of a prompt, piece by piece as it comes. Arguments and errors as of `generate`."""
        _check_stop(stop)
        new: list[int] = []
        shown = 0
        held = max((len(text) - 1 for text in stop), default=0)
        for (token,) in self.tokens([prompt], max_new_tokens, sampling or Sampling(), seed):
            if token in self.ends:
                break
            new.append(token)
            text = self._decode(new)
            if (cut := _cut(text, stop)) is not None:
                yield text[shown:cut]
                return
            # What may be the start of a text to stop at, or a part of a character, waits.
            ready = len(text.rstrip(UNFINISHED)) - held
            if ready > shown:
                yield text[shown:ready]
                shown = ready
        if rest := self._decode(new)[shown:]:
            yield rest

    def tokens(self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[list[int]]:
        """The next token of each prompt, one step after the other; end tokens end nothing. Errors as of `generate`."""
        if max_new_tokens < 1 or seed < 0:
            raise ValueError(f"max_new_tokens must be at least 1 and seed 0, got {max_new_tokens} and {seed}")
        if not prompts:
            raise ValueError("there is no prompt to continue")
        encoded = [self.encode(prompt) for prompt in prompts]
        if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
            raise ValueError(f"the prompt {empty[0]!r} has no tokens that this tokenizer knows")
        longest = max(map(len, encoded))
        if self.max_positions is not None:
            if longest >= self.max_positions:
                raise ValueError(f"the prompt has {longest} tokens, and the model has learned {self.max_positions}")
            max_new_tokens = min(max_new_tokens, self.max_positions - longest)
        # Padding before the prompts, so that all of them end at the same position.
        ids = np.array([[0] * (longest - len(each)) + each for each in encoded], np.int64)
        mask = np.array([[0] * (longest - len(each)) + [1] * len(each) for each in encoded], np.int64)
        cache, random = self._empty_cache(len(prompts)), np.random.default_rng(seed)
        for _ in range(max_new_tokens):
            logits, cache = self._run(ids, mask, cache, np.array([ids.shape[1] - 1]))
            last = logits[:, -1]
            if not np.isfinite(last).all():
                raise ValueError("the model's outputs are not finite: its weights hold NaN or infinity")
            tokens = next_tokens(last, sampling, random)
            yield [int(token) for token in tokens]
            ids = tokens.astype(np.int64)[:, None]
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)

    def note_on(self, prompt: str, max_new_tokens: int) -> str | None:
        """What to know where prompt and continuation are longer than the texts that the model was trained on."""
        trained, positions = self.settings.get("trained_length"), len(self.encode(prompt)) + max_new_tokens
        if trained is None or positions <= trained:
            return None
        return f"{positions:,} positions are more than the {trained:,} that this model was made for"

    def _run(self, ids: NDArray, mask: NDArray, cache: Sequence[Any], kept: NDArray) -> tuple[NDArray, list[Any]]:
        """Logits of the positions `kept`, and the cache that grew."""
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": mask,
            "position_ids": np.ascontiguousarray(positions, np.int64),
            "logits_to_keep": kept.astype(np.int64),
        }
        return self.engine.run(feeds, cache)

    def _empty_cache(self, batch: int) -> list[Any]:
        return self.engine.empty_cache(batch, self.settings["key_value_heads"], self.settings["head_size"])

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def _settings(folder: Path) -> dict[str, Any]:
    _refuse_missing(folder, SETTINGS, TOKENIZER)
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        graph = ENGINES[settings["format"]][1].graph
        heads, size, most = (settings[name] for name in ("key_value_heads", "head_size", "max_positions"))
        whole = [heads, size, *settings["end_tokens"], *([] if most is None else [most])]
        if not all(isinstance(value, int) and value >= 0 for value in whole):
            raise TypeError("numbers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SETTINGS} is damaged: {error}") from error
    _refuse_missing(folder, graph)
    return settings


def _refuse_missing(folder: Path, *names: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is no exported model: it has no {missing[0]} (foldrank export --format onnx)")


def _check_stop(stop: Sequence[str]) -> None:
    if "" in stop:
        raise ValueError("a text to stop at is empty, and every text begins with that")


def _cut(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the texts to stop at begins."""
    return min((at for each in stop if (at := text.find(each)) >= 0), default=None)
