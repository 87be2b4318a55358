"""Runs in a process that cannot import foldrank (test_remote_code.py): what a folded checkpoint does anywhere.

Arguments: this file, the folder with the checkpoints. Writes `facts.json` there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


@torch.no_grad()
def facts(folder: Path, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokens = expected["tokens"]
    prompt = tokens[:1, :4]
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    saved_again = folder / "again"
    model.save_pretrained(saved_again)
    again = AutoModelForCausalLM.from_pretrained(saved_again, trust_remote_code=True)
    named = (model.named_modules(), model.named_parameters(), model.named_buffers())
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "residuals": [name for names in named for name, _ in names if "residual" in name],
        "logits equal": torch.equal(model(input_ids=tokens).logits, expected["logits"]),
        "hidden equal": torch.equal(base(input_ids=tokens).last_hidden_state, expected["hidden"]),
        "cached": model.generate(prompt, use_cache=True, **how).tolist(),
        "uncached": model.generate(prompt, use_cache=False, **how).tolist(),
        "saved again": sorted(path.name for path in saved_again.iterdir()),
        "again equal": torch.equal(again(input_ids=tokens).logits, expected["logits"]),
    }


def refusal(folder: Path, **how: Any) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(folder, **how)
    except ValueError as error:
        return " ".join(str(error).split())
    return "none"


def main(root: Path) -> dict[str, Any]:
    try:
        import foldrank  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("foldrank is not hidden here")
    found: dict[str, Any] = {
        folder.name: facts(folder, load_file(folder.with_suffix(".expected")))
        for folder in sorted(root.glob("folded-*"))
        if folder.is_dir()
    }
    found["without trust"] = refusal(root / "folded-untied-float32", trust_remote_code=False)
    found["without a word on trust"] = refusal(root / "folded-untied-float32")
    found["unfolded"] = refusal(root / "unfolded", trust_remote_code=True)
    found["config"] = type(AutoConfig.from_pretrained(root / "folded-untied-float32", trust_remote_code=True)).__name__
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[2])
    (root / "facts.json").write_text(json.dumps(main(root)))
