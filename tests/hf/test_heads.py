"""Other heads on a low-rank model: classification of sequences and tokens, answers to questions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from foldrank import LowRankConfig, ResidualConfig, fold_
from foldrank.core.inventory import low_rank_layers
from foldrank.hf import LowRankLlamaForCausalLM, convert_, low_rank_classes
from foldrank.hf.checkpoint import check, load
from foldrank.hf.remote_code import FAMILIES, HEADS

from .heads_without_foldrank import output_of
from .models import COLA_DLR, SHAPE, TOKENS, config, trained

SMALL = {**SHAPE, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "llama": (COLA_DLR, SMALL),
    "crnet": (LowRankConfig(rank=3, backbone="crnet", dense_first=1, residual=ResidualConfig()), SMALL),
    "mistral": (COLA_DLR, {**SMALL, "num_key_value_heads": 1}),
    "qwen3": (COLA_DLR, {**SMALL, "num_key_value_heads": 1, "head_dim": 6}),
    "gpt2": (
        COLA_DLR,
        {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0},
    ),
}
CASES = [(name, head) for name in ("llama", "crnet") for head in HEADS]
CASES += [("mistral", "ForTokenClassification"), ("qwen3", "ForSequenceClassification")]
CASES += [("gpt2", "ForQuestionAnswering")]
LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1])},
    "ForTokenClassification": {"labels": TOKENS % 2},
    "ForQuestionAnswering": {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 5, 4])},
}


def language_model(name: str) -> Any:
    low_rank, fields = MODELS[name]
    family = "llama" if name == "crnet" else name
    config_class = next(each for each in FAMILIES if each.model_type == f"lowrank_{family}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**fields, low_rank=low_rank))  # pyright: ignore[reportCallIssue]


def fine_tuned(folder: Path, head: str) -> Any:
    model = HEADS[head].from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, **LABELS[head]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded language model of each family, and each with each head, two steps of training further."""
    root = tmp_path_factory.mktemp("heads")
    for name in MODELS:
        model = language_model(name)
        fold_(model)
        model.save_pretrained(root / name)
        for head in [head for each, head in CASES if each == name]:
            classifier = fine_tuned(root / name, head)
            classifier.save_pretrained(root / f"{name}-{head}")
            expected = {"tokens": TOKENS, "output": output_of(classifier, TOKENS)}
            torch.save(expected, root / f"{name}-{head}" / "expected.pt")
    return root


@pytest.fixture(scope="module")
def elsewhere(root: Path) -> dict[str, Any]:
    program = [sys.executable, str(Path(__file__).with_name("heads_without_foldrank.py")), str(root)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "facts.json").read_text())


@pytest.mark.parametrize(("name", "head"), CASES)
def test_a_folded_model_with_a_head_loads_without_foldrank(
    root: Path, elsewhere: dict[str, Any], name: str, head: str
) -> None:
    facts = elsewhere[f"{name}-{head}"]
    assert facts["class"].startswith("LowRank")
    assert facts["class"].endswith(head)
    assert facts["equal"] == [True, True]
    assert facts["low_rank_layers"] == len(low_rank_layers(language_model(name)))
    assert all(key.startswith(("score.", "qa_outputs.")) for key in facts["missing"])
    assert facts["missing"]
    again = HEADS[head].from_pretrained(root / f"{name}-{head}")
    expected = torch.load(root / f"{name}-{head}" / "expected.pt", weights_only=True)
    assert torch.equal(output_of(again, TOKENS), expected["output"])


@pytest.mark.parametrize("head", LABELS)
def test_an_unfolded_model_trains_with_a_head_and_folds(tmp_path: Path, head: str) -> None:
    trained(pad_token_id=0).save_pretrained(tmp_path / "unfolded")
    model = fine_tuned(tmp_path / "unfolded", head)
    assert all(layer.weight_parametrizations for layer in low_rank_layers(model).values())
    model.save_pretrained(tmp_path / "tuned")
    again = HEADS[head].from_pretrained(tmp_path / "tuned")
    before = output_of(again, TOKENS)
    torch.testing.assert_close(before, output_of(model, TOKENS), rtol=0, atol=0)
    fold_(again)
    torch.testing.assert_close(output_of(again, TOKENS), before, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "language")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language")
    classifier.save_pretrained(
        tmp_path / "broken",
        state_dict={name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("score")},
    )
    with pytest.raises(ValueError, match=r"1 tensors are missing, e\.g\. score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"e\.g\. lm_head\.weight"):
        LowRankLlamaForCausalLM.from_pretrained(tmp_path / "broken")


def test_where_a_language_model_is_needed_a_classifier_is_refused_by_name(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "language")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "language").save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="holds a LowRankLlamaForSequenceClassification, and a language model is"):
        load(tmp_path / "classifier")
    settings = json.loads((tmp_path / "language" / "config.json").read_text())
    (tmp_path / "language" / "config.json").write_text(json.dumps({**settings, "architectures": 5}))
    check(tmp_path / "language")


def test_a_dense_classifier_becomes_low_rank_except_its_head() -> None:
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    report = convert_(model, COLA_DLR)
    assert report is not None
    assert type(model).__name__ == "LowRankLlamaForSequenceClassification"
    assert list(report.skipped) == ["score"]


def test_classes_are_made_of_language_models_alone() -> None:
    with pytest.raises(
        ValueError, match=r"LlamaForSequenceClassification is no language model .*; give LlamaForCausalLM"
    ):
        low_rank_classes(LlamaForSequenceClassification, __name__)
    assert AutoModelForCausalLM.from_config(config()).config.low_rank is not None
    with pytest.raises(
        ValueError, match=r"GPT2DoubleHeadsModel has no low-rank class; those with one are .* and their classifiers$"
    ):
        convert_(transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)), COLA_DLR)
