"""Checkpoints on disk: what one is, loading one, folding one file by file. Safetensors and JSON only, no code runs."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from foldrank.atomic import new_folder, refuse_existing
from foldrank.core.fold import check_whole, fold_plan, folded_key, unfolded_keys
from foldrank.core.linear import PARAMETRIZATIONS
from foldrank.hf.base import check_loaded, check_saved
from foldrank.hf.checksums import CHECKSUMS, verify_checksums, write_checksums
from foldrank.hf.foreign import foreign, one_line_of
from foldrank.hf.remote_code import refer_to_modeling
from foldrank.hf.rewrite import rewrite
from foldrank.hf.tokenizers import load_tokenizer
from foldrank.structured import parse_json, read_json_table, read_text

INDEX = "model.safetensors.index.json"

GENERATION = "generation_config.json"

MAX_CONFIG_BYTES = 1 << 24

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 1 << 17),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff"), 1 << 19),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 1 << 10),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim"), 1 << 12),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1 << 24),
    "vocab_size": 1 << 22,
}
"""The largest that a config may say, of the names that its families give them; a library would take any for true."""

OTHER_HEADS = re.compile(r"\w+For(SequenceClassification|TokenClassification|QuestionAnswering)\b")
"""Of architectures that are no language models, though their model types have one."""

MAY_BE_NULL = ("n_inner", "head_dim", "num_key_value_heads")

COPIED = (
    GENERATION,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "README.md",
    "LICENSE*",
)
"""Files beside the weights that a folded checkpoint has too. Not what belongs to a training: optimizer, scheduler,
random states, pickles, manifests; nor weights in other formats, which are not folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """What a checkpoint is, read from its config and the headers of its files."""

    path: str
    model_type: str
    state: str
    """dense, unfolded or folded."""
    params: int
    """Elements of its parameters."""
    bytes: int
    """Size of its weight files."""
    dtypes: dict[str, int]
    """Tensors of parameters per dtype."""
    low_rank: dict[str, Any] | None
    """Its `LowRankConfig`, ranks by layer."""
    shape: dict[str, int]
    """Vocabulary, width, layers and heads."""


def inspect(folder: Path) -> CheckpointInfo:
    """Reads what `folder` holds without loading weights.

    Raises:
        ValueError: where it is no checkpoint, its files are damaged, it is quantized, or config and weights disagree
            about the fold.
    """
    config = read_config(folder)
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        how = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ValueError(
            f"{folder} is quantized ({how}): what it holds is no parameter by parameter; give the original"
        )
    low_rank = getattr(config, "low_rank", None)
    dtypes: dict[str, int] = {}
    params = 0
    names: set[str] = set()
    with _weights(folder) as files:
        for file in files.values():
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                names.add(name)
                part = file.get_slice(name)
                # Whole numbers are state: specs, and indices of a random expansion or a sparse part.
                if part.get_dtype().startswith(("F", "BF")):
                    dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + 1
                    params += math.prod(part.get_shape())
    unfolded = {key.split(".")[-2] for key in unfolded_keys(names)}
    for kind in PARAMETRIZATIONS:
        if (kind in unfolded) != (low_rank is not None and low_rank[kind] is not None):
            weights, settings = ("a", "none") if kind in unfolded else ("no", "one")
            raise ValueError(
                f"{folder}: the weights hold {weights} {kind} and config.json has {settings}: restore the config.json "
                "that was saved with these weights"
            )
    state = "dense" if low_rank is None else "unfolded" if unfolded else "folded"
    return CheckpointInfo(
        path=str(folder),
        model_type=config.model_type,
        state=state,
        params=params,
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
        dtypes=dtypes,
        low_rank=low_rank,
        shape={
            name: getattr(config, name)
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
            if hasattr(config, name)
        },
    )


def load(
    folder: Path, *, accept_changes: bool = False, tell: Callable[[str], None] = lambda _: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer. Uses foldrank's own classes; code in the checkpoint does not run.

    Args:
        folder: the checkpoint.
        accept_changes: let files pass that are not as they were saved.
        tell: told where nothing could be verified, or what was accepted.

    Raises:
        ValueError: where `folder` is no checkpoint, is damaged, or is not as it was saved.
    """
    check(folder)
    with foreign(f"{folder} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
        model, info = loaded
        check_loaded(model, info)  # low-rank models do so themselves; a dense one would get random weights
    with foreign(f"{folder}: its tokenizer is missing or damaged"):
        tokenizer = load_tokenizer(folder)
    # Last, since what does not fit together has a better message than that something changed.
    if told := verify_checksums(folder, accept=accept_changes):
        tell(told)
    return model.eval(), tokenizer


def check(folder: Path) -> None:
    """Raises where `folder` is no checkpoint of a language model, or is not whole, before anything slow begins.

    Raises:
        ValueError: saying what is missing or damaged, and where a checkpoint is near by.
    """
    config = read_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{folder} holds a {config.model_type}, which is no language model that generates text")
    if head := OTHER_HEADS.search(str(config.architectures)):  # of a file that may hold anything there
        raise ValueError(f"{folder} holds a {head[0]}, and a language model is needed: give what it was made from")
    if (folder / GENERATION).exists():
        read_json_table(folder / GENERATION, MAX_CONFIG_BYTES)
    with _weights(folder):
        pass


def fold_checkpoint(
    folder: Path, out: Path, *, accept_changes: bool = False, tell: Callable[[str], None] = lambda _: None
) -> int:
    """Folds a checkpoint into the new folder `out`, with one tensor in memory at a time.

    Args:
        folder: the unfolded checkpoint.
        out: the new folder.
        accept_changes: let files pass that are not as they were saved.
        tell: told where nothing could be verified, or what was accepted.

    Returns:
        The number of layers folded.

    Raises:
        ValueError: where `folder` is no unfolded checkpoint, is damaged, or holds weights that are not finite.
        FileExistsError: where `out` exists.
    """
    info = inspect(folder)
    if info.state != "unfolded":
        raise ValueError(f"{folder} is {info.state}: there is no residual to fold")
    refuse_existing(out, option="--out")
    config = read_config(folder)
    try:
        with new_folder(out) as work:
            num_layers = _fold_weights(folder, work)
            # After what is wrong with the weights themselves, and before anything has its name.
            if told := verify_checksums(folder, accept=accept_changes):
                tell(told)
            for file in folder.iterdir():
                if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED):
                    shutil.copy2(file, work / file.name)
            config.low_rank = {**config.low_rank, **dict.fromkeys(PARAMETRIZATIONS)}
            refer_to_modeling(config)
            config.save_pretrained(work)
            if (folder / CHECKSUMS).is_file():  # what nobody vouched for has none
                write_checksums(work)
    except SafetensorError as error:
        raise ValueError(f"{folder} has a damaged file: {one_line_of(error)}") from error
    return num_layers


def _fold_weights(folder: Path, work: Path) -> int:
    """Writes the folded weights, file by file, and their index; returns the number of layers folded."""
    with _weights(folder) as files:
        names = {file: list(weights.keys()) for file, weights in files.items()}
        owners = {name: files[file] for file, names_in_file in names.items() for name in names_in_file}
        dropped = unfolded_keys(owners)
        # Copies, because a tensor keeps the whole file mapped that it was read from.
        plan = fold_plan({name: owners[name].get_tensor(name).clone() for name in dropped})
    check_whole(plan, owners)
    names_by_file = {
        file: {name: folded_key(name) if name in plan else name for name in names_in_file if name not in dropped}
        for file, names_in_file in names.items()
    }
    total = sum(
        rewrite(folder / file, work / file, names=renamed, changes=plan) for file, renamed in names_by_file.items()
    )
    if (folder / INDEX).exists():
        weight_map = {name: file for file, renamed in names_by_file.items() for name in renamed.values()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(plan)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: where there is none, or one that the index names is missing.
    """
    if (folder / INDEX).exists():
        try:
            names = sorted(set(read_json_table(folder / INDEX)["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is not the name of a file beside it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged: {one_line_of(error)}") from error
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not a whole checkpoint: {missing[0]} is missing{_instead(folder)}")
    return [folder / name for name in names]


def _instead(folder: Path) -> str:
    """What is there in place of the weights, and what to do with it."""
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles:
        return f"; {pickles[0]} is a pickle, which foldrank does not open: load and save it with transformers first"
    if any("-of-" in name for name in others):
        return f"; there is {others[0]}, but no {INDEX} that says which tensor is where: fetch that too"
    return f"; there is {others[0]}: give it that name, if these are the weights meant" if others else ""


def read_config(folder: Path) -> PreTrainedConfig:
    """The architecture of a checkpoint, checked before anything is built of it.

    Raises:
        ValueError: naming the file and the field that cannot be.
    """
    file = folder / "config.json"
    if not folder.exists():
        raise ValueError(f"{folder} is no checkpoint: there is no such folder")
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json" + _nearby(folder))
    with foreign(f"{file} is not one that foldrank can read"):
        values = parse_json(read_text(file, MAX_CONFIG_BYTES))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not settings by name")
    for name, most in SIZES.items():
        size = values.get(name, 1)
        if size is None and name in MAY_BE_NULL:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= most:
            raise ValueError(f"{file} is damaged: {name} must be a whole number from 1 to {most:,}, got {size!r}")
    for name in ("dtype", "torch_dtype"):
        if not isinstance(getattr(torch, str(values.get(name) or "float32"), None), torch.dtype):
            raise ValueError(f"{file} is damaged: {name} is {values[name]!r}, which is no dtype of PyTorch")
    if str(values.get("model_type")) not in CONFIG_MAPPING:
        raise ValueError(
            f"{file}: transformers {transformers.__version__} has no model_type {values.get('model_type')!r}"
        )
    with foreign(f"{file} is not one that foldrank can read"):
        check_saved(values.get("low_rank"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.validate()  # or it would be found when the config is saved
        return config


@contextmanager
def _weights(folder: Path) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        yield {file.name: stack.enter_context(_opened(file)) for file in weight_files(folder)}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged: {one_line_of(error)}") from error


def _nearby(folder: Path) -> str:
    folders = sorted(str(path.parent) for path in folder.glob("*/config.json")) if folder.is_dir() else []
    return f"; did you mean {' or '.join(folders)}?" if folders else ""
