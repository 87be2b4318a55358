"""A training step of the whole model: forward, backward, AdamW."""

import torch

from foldrank.bench.interleaved import WARM_UP, interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.trained_model import TrainedModel, gates, start_gates
from foldrank.core.inventory import count_parameters
from foldrank.train.accounting import training_flops
from foldrank.train.utilization import peak_flops_of


def run(settings: Settings) -> Findings:
    """Steps every method's model interleaved.

    Raises:
        ValueError: where the numerics gate fails.
    """
    passed = gates(settings)
    models = {method: TrainedModel(settings, method) for method in settings.method_names}
    for trained in models.values():
        for _ in range(WARM_UP):
            trained.step()
    passed += start_gates(settings, models)
    timers = {method: timed(trained.step, settings.device) for method, trained in models.items()}
    figures = interleaved_timing(timers, settings.rounds, profile=settings.profile)
    peak = settings.peak_flops
    if peak is None and settings.device == "cuda":
        peak = peak_flops_of(torch.cuda.get_device_name(), settings.sizes().train.dtype)
    for method, trained in models.items():
        flops = training_flops(trained.recipe, vocab_size=settings.vocabulary_size())
        speed = trained.tokens / figures[method]["seconds"]
        figures[method] |= {
            "parameters": count_parameters(trained.model),
            "tokens_per_second": speed,
            "flops_per_token": flops.total,
            # What is computed again is no use of the peak (PaLM, appendix B, arXiv 2204.02311).
            "mfu": None if peak is None else (flops.total - flops.recomputed) * speed / peak,
        }
    return Findings(cases={"step": figures}, gates=tuple(passed))
