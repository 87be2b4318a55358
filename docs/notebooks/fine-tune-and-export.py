# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune and export
#
# From a folded checkpoint to one that answers, and on to ONNX for devices without PyTorch. A small model is pre-trained
# first, so that all of it runs here; with a checkpoint of yours, begin below.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from transformers.utils import logging

from foldrank.recipes import load_recipe
from foldrank.train.pretrain import pretrain

logging.disable_progress_bar()

steps = int(os.environ.get("STEPS", "300"))
folder = Path(tempfile.mkdtemp())
pretrain(load_recipe("tiny-cola-muon", {"train.steps": steps}), folder / "run", quiet=True)
checkpoint = folder / "run" / "folded"

# %% [markdown]
# ## Fine-tune
#
# Functions of the standard library as prompts, the first lines of their docstrings as answers; held-out examples are
# measured before and after ([fine-tuning](../fine-tuning.md)).

# %%
from foldrank.finetune.finetune import finetune
from foldrank.finetune.settings import FinetuneSettings

settings = FinetuneSettings(data="stdlib-summaries", epochs=1.0, max_examples=4 * steps, learning_rate=0.002)
tuned = finetune(checkpoint, settings, folder / "tuned", quiet=True)
print(f"{tuned.training_examples} examples, {tuned.steps} steps, {tuned.seconds:.0f} s")
print(f"held-out loss before {tuned.before['loss']:.4f}, after {tuned.after['loss']:.4f}")

# %%
from foldrank.runs.log import read_log

log = read_log(folder / "tuned" / "log.jsonl")
figure, axes = plt.subplots(figsize=(6, 3.2))
axes.plot([point.step for point in log.points], [point.loss for point in log.points])
axes.set(xlabel="steps", ylabel="training loss, nats per token")
plt.show()

# %% [markdown]
# ## Export
#
# To ONNX, with weights of 8 bits. On the command line: `foldrank export CHECKPOINT --format onnx --precision int8 --out DIR`.

# %%
import subprocess
import sys

exported = folder / "int8"
command = ["export", str(folder / "tuned" / "model"), "--format", "onnx", "--precision", "int8", "--out", str(exported)]
subprocess.run([sys.executable, "-m", "foldrank", *command], check=True, capture_output=True)
print(f"{sum(file.stat().st_size for file in exported.glob('*.onnx*')) / 2**20:.1f} MiB")

# %% [markdown]
# The runtime needs onnxruntime, tokenizers and numpy, and no PyTorch ([small devices](../small-devices.md)):

# %%
from foldrank.runtime import Model

print(Model(exported).generate(["def read(path):"], max_new_tokens=24)[0])
