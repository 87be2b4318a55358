"""A training step of the whole model: forward, backward, AdamW."""

from foldrank.bench.interleaved import WARM_UP, interleaved_timing, timed
from foldrank.bench.record import Findings
from foldrank.bench.settings import Settings
from foldrank.bench.subjects import TrainedModel, gates, start_gates
from foldrank.core.inventory import count_parameters
from foldrank.train.accounting import training_flops


def run(settings: Settings) -> Findings:
    """Steps every method's model in turns.

    Raises:
        ValueError: where the numerics gate fails.
    """
    passed = gates(settings)
    subjects = {method: TrainedModel(settings, method) for method in settings.subjects}
    for subject in subjects.values():
        for _ in range(WARM_UP):
            subject.step()
    passed += start_gates(settings, subjects)
    turns = {method: timed(subject.step, settings.device) for method, subject in subjects.items()}
    figures = interleaved_timing(turns, settings.rounds, profile=settings.profile)
    for method, subject in subjects.items():
        flops = training_flops(subject.recipe, vocab_size=settings.vocabulary_size())
        speed = subject.tokens / figures[method]["seconds"]
        figures[method] |= {
            "parameters": count_parameters(subject.model),
            "tokens_per_second": speed,
            "flops_per_token": flops.total,
            # What is computed again is no use of the peak (PaLM, appendix B, arXiv 2204.02311).
            "mfu": None
            if settings.peak_flops is None
            else (flops.total - flops.recomputed) * speed / settings.peak_flops,
        }
    return Findings(cases={"step": figures}, gates=tuple(passed))
