"""Reading a prompt into the cache, up to the logits of its last token, by folded models."""

from typing import Any

import torch

from foldrank.bench.inference_model import load_inference_model, prompt
from foldrank.bench.interleaved import interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import COMPILED, Settings, parse
from foldrank.core.inventory import count_parameters


@torch.no_grad()
def run(settings: Settings) -> Findings:
    """Lets every method's model read interleaved.

    Raises:
        ValueError: where the numerics gate fails.
    """
    ids, timers, models, gates = prompt(settings), {}, {}, []
    for method in settings.method_names:
        model, passed = load_inference_model(settings, method)
        gates += passed
        called: Any = torch.compile(model) if COMPILED in parse(method).variants else model
        models[method] = model

        def read(called: Any = called) -> None:
            called(input_ids=ids, use_cache=True, logits_to_keep=1)

        timers[method] = timed(read, settings.device)
    figures = interleaved_timing(timers, settings.rounds, profile=settings.profile)
    for method, model in models.items():
        figures[method] |= {
            "parameters": count_parameters(model),
            "tokens_per_second": ids.numel() / figures[method]["seconds"],
        }
    return Findings(cases={f"{ids.shape[0]} x {ids.shape[1]} tokens": figures}, gates=tuple(gates))
