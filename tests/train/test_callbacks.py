"""A gradient norm far above the recent ones is said and logged."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from foldrank.train.callbacks import GradientSpikes


def test_a_spike_is_said_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spikes = GradientSpikes()
    arguments, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    norms = [1.0 + step % 3 for step in range(GradientSpikes.RECENT)] + [15.0, 25.0, 2.0]
    marked = []
    for step, norm in enumerate(norms):
        state.global_step = step
        logs = {"grad_norm": norm}
        spikes.on_log(arguments, state, control, logs=logs)
        if "grad_norm_spike" in logs:
            marked.append((step, logs["grad_norm_spike"]))
    assert marked == [(GradientSpikes.RECENT + 1, 12.5)]
    assert capsys.readouterr().err == f"step {GradientSpikes.RECENT + 1}: gradient norm 25, usually 2\n"
    spikes.on_log(arguments, state, control, logs={"eval_loss": 1.0})
