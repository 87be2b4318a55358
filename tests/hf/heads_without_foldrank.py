"""Runs in a process that cannot import foldrank (test_heads.py): what a checkpoint with another head gives anywhere.

Argument: the folder with the checkpoints. Writes `facts.json` there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

LOW_RANK_LAYERS = ("LowRankLinear", "CrossLayerLinear")


def facts(folder: Path) -> dict[str, Any]:
    auto = getattr(transformers, "AutoModel" + folder.name.split("-")[1])
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    again = auto.from_pretrained(resave(model, folder / "again"), trust_remote_code=True)
    first = [output_of(each, expected["tokens"]) for each in (model, again)]
    # From the language model beside it: a new head on the same weights.
    fresh, info = auto.from_pretrained(
        folder.parent / folder.name.split("-")[0], trust_remote_code=True, output_loading_info=True
    )
    return {
        "class": type(model).__name__,
        "equal": [torch.equal(output, expected["output"]) for output in first],
        "missing": sorted(info["missing_keys"]),
        "low_rank_layers": sum(type(part).__name__ in LOW_RANK_LAYERS for part in fresh.modules()),
    }


def resave(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def output_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model.eval()(input_ids=tokens)
    return output.logits if "logits" in output else output.start_logits


if __name__ == "__main__":
    sys.modules["foldrank"] = None  # pyright: ignore[reportArgumentType] - importing it is now an ImportError
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    (root / "facts.json").write_text(
        json.dumps({path.parent.name: facts(path.parent) for path in root.glob("*/expected.pt")})
    )
