"""The trainers and adapters of other libraries on our checkpoints, by their own calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from foldrank import fold_
from foldrank.core.inventory import low_rank_layers
from tests.small_runs import Run

from .examples import chats, prompts

pytestmark = [pytest.mark.apart, pytest.mark.filterwarnings("ignore")]  # theirs, of which each has a few

ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def folded(finished_run: Run) -> str:
    return str(finished_run.out / "folded")


def learned(model: Any, folder: str) -> list[str]:
    """The parameters that are no longer as in the checkpoint."""
    before = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    return [name for name, value in model.named_parameters() if not torch.equal(value.detach(), before[name])]


PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no", "text": row["prompt"] + row["completion"]}
    for row in prompts(16)
]


@pytest.mark.parametrize("given", ["path", "model"])
def test_preferences_are_learned(folded: str, given: str, tmp_path: Path) -> None:
    model: Any = folded if given == "path" else AutoModelForCausalLM.from_pretrained(folded)
    arguments = DPOConfig(output_dir=str(tmp_path), max_length=64, **ARGUMENTS)
    data, tokenizer = Dataset.from_list(PAIRS).remove_columns("text"), AutoTokenizer.from_pretrained(folded)
    trainer: Any = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert low_rank_layers(trainer.model)
    assert len(learned(trainer.model, folded)) > len(low_rank_layers(trainer.model))


def test_rewards_are_learned(folded: str, tmp_path: Path) -> None:
    arguments = GRPOConfig(output_dir=str(tmp_path), num_generations=4, max_completion_length=6, **ARGUMENTS)
    data, tokenizer = Dataset.from_list(PAIRS).select_columns("prompt"), AutoTokenizer.from_pretrained(folded)

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(letter == "e" for letter in text)) for text in completions]

    reward: Any = letters
    trainer: Any = GRPOTrainer(folded, reward, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert low_rank_layers(trainer.model)


@pytest.mark.parametrize(
    "rows", [PAIRS, "stream", chats(16), prompts(16)], ids=["text", "stream", "messages", "prompts"]
)
def test_texts_and_chats_are_learned(finished_run: Run, rows: Any, tmp_path: Path) -> None:
    folded = str(finished_run.out / "folded")
    data = Dataset.from_list(PAIRS if rows == "stream" else rows)
    data = data.select_columns("text") if "text" in data.column_names else data
    tokenizer = AutoTokenizer.from_pretrained(folded)
    if "messages" in data.column_names:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role }}: {% generation %}{{ message.content }}{% endgeneration %}"
            "{% endfor %}"
        )
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_length=64, assistant_only_loss="messages" in data.column_names, **ARGUMENTS
    )
    source: Any = data.to_iterable_dataset() if rows == "stream" else data
    trainer: Any = SFTTrainer(folded, args=arguments, train_dataset=source, processing_class=tokenizer)
    trainer.train()
    assert len(learned(trainer.model, folded)) > len(low_rank_layers(trainer.model))


def test_what_was_tuned_unfolded_folds(finished_run: Run, tmp_path: Path) -> None:
    unfolded = str(finished_run.out / "unfolded")
    arguments = SFTConfig(output_dir=str(tmp_path), max_length=64, **ARGUMENTS)
    data = Dataset.from_list(PAIRS).select_columns("text")
    trainer = SFTTrainer(
        unfolded, args=arguments, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(unfolded)
    )
    trainer.train()
    model: Any = trainer.model
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model.eval()(input_ids=tokens).logits
        assert fold_(model).errors
        torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", ["down", "up"]], ids=str)
def test_adapters_are_trained_saved_and_merged(folded: str, dora: bool, targets: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folded)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"))
    tokens = torch.arange(24).reshape(2, 12)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(value.any() for name, value in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folded), str(tmp_path))
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        assert torch.equal(again.eval()(input_ids=tokens).logits, expected)
        merged = again.merge_and_unload()
        assert len(low_rank_layers(merged)) == len(low_rank_layers(base))
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)


def test_projections_are_no_target_for_adapters(folded: str) -> None:
    with pytest.raises(ValueError, match="LowRankLinear"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folded), LoraConfig(target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("optimizer", ["adafactor", "schedule_free_adamw", "sgd"])
def test_optimizers_of_transformers_train_the_unfolded_model(finished_run: Run, optimizer: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished_run.out / "unfolded")
    rows = [{"input_ids": torch.arange(12) + row, "labels": torch.arange(12) + row} for row in range(8)]
    Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), optim=optimizer, **ARGUMENTS),
        train_dataset=rows,  # pyright: ignore[reportArgumentType] - a list of rows is enough
    ).train()
    assert fold_(model).errors
    model.save_pretrained(tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
