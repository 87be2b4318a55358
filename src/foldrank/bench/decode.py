"""Greedy decoding with a cache, after a prompt that is read before the clock starts, by folded models."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from foldrank.bench.inference_model import bytes_read, load_inference_model, prompt
from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import COMPILED, Settings, parse
from foldrank.core.inventory import count_parameters


class Decoding:
    """A model, its cache, and the next token."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, settings: Settings, *, compiled: bool = False) -> None:
        self.model, self.ids = model, ids
        self.count = settings.new_tokens
        self.compiled = compiled
        # A cache of fixed size at fixed addresses is what CUDA graphs need, and costs a little without them.
        self.called: Any = torch.compile(model, mode="reduce-overhead") if compiled else model
        self.cache: Any = None
        self.token = ids[:, :1]

    def prefill(self) -> None:
        """Fills the cache with the prompt."""
        if not self.compiled:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.ids.shape[1] + self.count)
        else:
            self.cache.reset()
        self._next(self.model, self.ids)

    def decode(self) -> Tensor:
        """The tokens that follow: (batch, new_tokens)."""
        tokens = []
        for _ in range(self.count):
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            self._next(self.called, self.token)
            tokens.append(self.token)
        return torch.cat(tokens, dim=1)

    def _next(self, model: Any, ids: Tensor) -> None:
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def run(settings: Settings) -> Findings:
    """Lets every method's model decode interleaved.

    Raises:
        ValueError: where the numerics gate fails.
    """
    ids, decodings, gates = prompt(settings), {}, []
    for method in settings.method_names:
        model, passed = load_inference_model(settings, method)
        gates += passed
        decodings[method] = Decoding(model, ids, settings, compiled=COMPILED in parse(method).variants)
    timers = {method: timed(one.decode, settings.device, one.prefill) for method, one in decodings.items()}
    figures = interleaved_timing(timers, settings.rounds, profile=settings.profile)
    for method, one in decodings.items():
        figures[method] |= {
            "parameters": count_parameters(one.model),
            "bytes_read": bytes_read(one.model),
            "tokens_per_second": ids.shape[0] * settings.new_tokens / figures[method]["seconds"],
        }
    case = f"{settings.new_tokens} tokens after {ids.shape[0]} x {ids.shape[1]}"
    return Findings(cases={case: figures}, gates=tuple(gates))
