"""Fine-tuning from end to end: what it learns, what it saves, how it goes on, and what it refuses."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from foldrank import LowRankConfig, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.finetune.adapters import lora_targets, merged, with_lora
from foldrank.finetune.finetune import finetune
from foldrank.finetune.settings import FinetuneSettings
from foldrank.hf.checkpoint import inspect, load
from foldrank.hf.checksums import verify_checksums
from foldrank.hf.dense import to_dense
from foldrank.train.callbacks import StopOnSignal
from foldrank.train.pretrain import InterruptedRunError
from foldrank.train.run_folder import save
from tests.called import Foldrank
from tests.hf.models import trained
from tests.small_runs import Run

from .examples import chats, labelled, prompts, write


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FinetuneSettings:
    file = write(tmp_path_factory.mktemp("data") / "a.jsonl", prompts())
    return FinetuneSettings(
        data=str(file), epochs=4, batch_size=8, learning_rate=0.01, held_out_fraction=0.25, save_every=6, log_every=1
    )


def losses_of(folder: Path) -> list[tuple[int, float]]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_folded_checkpoint_learns_answers_and_stays_folded(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path
) -> None:
    folded = finished_run.out / "folded"
    metrics = finetune(folded, settings, tmp_path / "out", quiet=True)
    assert metrics.after["loss"] < 0.8 * metrics.before["loss"]
    assert (metrics.state, metrics.params_trained) == ("folded", metrics.params)
    assert metrics.to_dict() == json.loads((tmp_path / "out" / "metrics.json").read_text()) | {"labels": None}
    info, before = inspect(tmp_path / "out" / "model"), inspect(folded)
    assert (info.state, info.low_rank) == ("folded", before.low_rank)
    assert verify_checksums(tmp_path / "out" / "model") is None
    model, _ = load(tmp_path / "out" / "model")
    original, _ = load(folded)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(original.config, name)
    assert "forward" not in vars(model)
    with pytest.raises(FileExistsError, match="holds a finished fine-tuning"):
        finetune(folded, settings, tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match="is finished: nothing is left to do"):
        finetune(folded, settings, tmp_path / "out", resume=True, quiet=True)


@pytest.mark.parametrize("task", ["language", "classification"])
def test_a_fine_tuning_that_was_interrupted_goes_on_to_the_same_weights(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path, task: Any
) -> None:
    if task == "classification":
        settings = replace(settings, task=task, data=str(write(tmp_path / "b.jsonl", labelled())))
    folded = finished_run.out / "folded"
    whole = finetune(folded, settings, tmp_path / "whole", quiet=True)

    step_end = StopOnSignal.on_step_end

    def stop(self: StopOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received = signal.SIGTERM if state.global_step == 7 else None
        step_end(self, args, state, control, **kwargs)

    with patch.object(StopOnSignal, "on_step_end", stop), pytest.raises(InterruptedRunError, match="after step 7"):
        finetune(folded, settings, tmp_path / "cut", quiet=True)
    with pytest.raises(FileExistsError, match="a fine-tuning that did not finish"):
        finetune(folded, settings, tmp_path / "cut", quiet=True)
    with pytest.raises(ValueError, match=r"was started otherwise: learning_rate was 0\.01 and is 0\.02"):
        finetune(folded, replace(settings, learning_rate=0.02), tmp_path / "cut", resume=True, quiet=True)
    with pytest.raises(ValueError, match="was started otherwise: checkpoint_sha256"):
        finetune(finished_run.out / "unfolded", settings, tmp_path / "cut", resume=True, quiet=True)
    again = finetune(folded, settings, tmp_path / "cut", resume=True, quiet=True)
    assert again.after == whole.after
    assert again.before == whole.before
    left, right = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_folded_and_unfolded_train_alike_step_by_step(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path
) -> None:
    """What the paper says of transfer, to the letter: with and without the residual the same function is tuned. They
    are other parameters, whose steps by AdamW are equal: B + c R moves as B does.
    """
    settings = replace(settings, epochs=1)
    for kind in ("folded", "unfolded"):
        finetune(finished_run.out / kind, settings, tmp_path / kind, quiet=True)
    assert inspect(tmp_path / "unfolded" / "model").state == "unfolded"
    losses = [[loss for _, loss in losses_of(tmp_path / kind)] for kind in ("folded", "unfolded")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert len(losses[0]) >= 4
    tuned, _ = load(tmp_path / "unfolded" / "model")
    fold_(tuned)
    for name, parameter in tuned.state_dict().items():
        torch.testing.assert_close(parameter, tensors(tmp_path / "folded")[name], rtol=1e-3, atol=2e-4)


def test_chats_bring_a_template_that_the_checkpoint_keeps(
    finished_run: Run, tmp_path: Path, foldrank: Foldrank
) -> None:
    file = write(tmp_path / "chats.jsonl", chats())
    done = foldrank(
        *("finetune", finished_run.out / "folded", "--data", file, "--out", tmp_path / "out", "--epochs", 2),
        *("--learning-rate", 0.01, "--batch-size", 8, "--json"),
    )
    assert done.json["after"]["loss"] < done.json["before"]["loss"]
    assert "no chat template" in done.json["notes"][0]
    _, tokenizer = load(tmp_path / "out" / "model")
    assert "generation" in str(tokenizer.chat_template)
    shown = foldrank("finetune", finished_run.out / "folded", "--data", file, "--out", tmp_path / "out")
    assert shown.code == 2
    assert shown.stderr.count("\n") == 1
    none = foldrank("finetune", "x", "--data", "null", "--held-out", "null", "--out", "y", "--print_config", "--json")
    assert (none.json["config"]["data"], none.json["config"]["held_out"]) == ("null", None)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_classifier_learns_its_labels(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path, optimizer: Any
) -> None:
    file = write(tmp_path / "labels.jsonl", labelled())
    settings = replace(settings, task="classification", data=str(file), optimizer=optimizer, epochs=6)
    metrics = finetune(finished_run.out / "folded", settings, tmp_path / "out", quiet=True)
    assert metrics.after["accuracy"] > 0.9 > metrics.after["chance"]
    assert metrics.after["matthews_correlation"] > 0.8
    assert metrics.labels == ("bar", "kelt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.id2label == {0: "bar", 1: "kelt"}
    assert low_rank_layers(model)


def test_the_logged_loss_of_a_classifier_is_the_mean_whatever_the_micro_batches(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path
) -> None:
    file = write(tmp_path / "labels.jsonl", labelled())
    settings = replace(settings, task="classification", data=str(file), epochs=1)
    first = []
    for size in (8, 2):
        finetune(
            finished_run.out / "folded", replace(settings, micro_batch_size=size), tmp_path / str(size), quiet=True
        )
        first.append(losses_of(tmp_path / str(size))[0][1])
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert first[0] < 1.5  # of two labels: near ln 2


@pytest.mark.parametrize("kind", ["folded", "unfolded"])
@pytest.mark.parametrize("task", ["language", "classification"])
def test_adapters_on_the_factors_are_trained_and_merged(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path, task: Any, kind: str
) -> None:
    if task == "classification":
        settings = replace(settings, task=task, data=str(write(tmp_path / "b.jsonl", labelled())))
    settings = replace(settings, lora_rank=2, learning_rate=0.05)
    metrics = finetune(finished_run.out / kind, settings, tmp_path / "out", quiet=True)
    assert metrics.after["loss"] < metrics.before["loss"]
    assert metrics.params_trained < metrics.params / 2
    before, after = load_file(finished_run.out / kind / "model.safetensors"), tensors(tmp_path / "out")
    heads = {"score.weight"} if task == "classification" else {"lm_head.weight"}
    assert after.keys() ^ before.keys() <= heads | {"lm_head.weight"}
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    factors = {name for name in before if ".down." in name or ".up.weight" in name}
    assert moved == factors


def test_adapters_are_merged_exactly(finished_run: Run) -> None:
    model, _ = load(finished_run.out / "unfolded")
    assert len(lora_targets(model)) == 2 * len(low_rank_layers(model))
    adapted = with_lora(model, 2, classifies=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(20)[None]
    expected = adapted(input_ids=ids).logits
    plain = merged(adapted)
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    fold_(plain)
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_checkpoint_stays_dense(finished_run: Run, settings: FinetuneSettings, tmp_path: Path) -> None:

    _, tokenizer = load(finished_run.out / "folded")
    dense = to_dense(trained(LowRankConfig(rank=3), vocab_size=320))
    save(dense, tokenizer, tmp_path / "dense")
    metrics = finetune(tmp_path / "dense", replace(settings, lora_rank=2), tmp_path / "out", quiet=True)
    assert metrics.state == "dense"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")).__name__ == "LlamaForCausalLM"


def test_a_loss_that_is_not_finite_ends_it_in_one_line(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path, foldrank: Foldrank
) -> None:
    done = foldrank(
        *("finetune", finished_run.out / "folded", "--data", settings.data, "--out", tmp_path / "out"),
        *("--learning-rate", 100, "--max-grad-norm", 1e6, "--log-every", 1, "--warmup-ratio", 0, "--epochs", 30),
        *("--optimizer", "adamw", "--weight-decay", 90),
    )
    assert done.code == 2
    assert "the loss of step" in done.stderr or "holds NaN" in done.stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}] * 30, "no held-out examples: none of its 30 falls|have the label 'x'"),
        (
            [{"text": f"a{number}", "label": number / 2} for number in range(30)],
            "example 2 of .* has the label 0.5, where text",
        ),
        ([{"words": f"a{number}", "label": number % 2} for number in range(30)], "examples have the fields 'words'"),
        ([{"text": number, "label": number % 2} for number in range(30)], "'text' must be text, got 0"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    finished_run: Run, settings: FinetuneSettings, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    settings = replace(settings, task="classification", data=str(write(tmp_path / "x.jsonl", rows)))
    with pytest.raises(ValueError, match=message):
        finetune(finished_run.out / "folded", settings, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
