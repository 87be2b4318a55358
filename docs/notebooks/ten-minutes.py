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
# # Ten minutes to a model
#
# A small language model of low-rank layers, pre-trained on the source code of the Python standard library, which every
# machine has: from a recipe to text that the folded model writes. It needs no network.

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
recipe = load_recipe("tiny-cola-dlr-muon", {"train.steps": steps, "train.eval_every": max(1, steps // 6)})
recipe.train.optimizer, recipe.low_rank.rank, recipe.low_rank.activation

# %% [markdown]
# `pretrain` prepares the text once, trains, folds the residual into the weights, verifies that nothing but roundings
# changed, and saves what is deployed.

# %%
run = Path(tempfile.mkdtemp()) / "run"
metrics = pretrain(recipe, run, name="tiny-cola-dlr-muon", quiet=True)
print(f"{metrics.params:,} parameters, {metrics.params / metrics.params_dense:.0%} of the dense model's")
print(f"{metrics.tokens:,} tokens in {metrics.seconds:.0f} s, {metrics.tokens_per_second:,.0f} tokens/s")

# %% [markdown]
# The losses, from the run's log:

# %%
from foldrank.runs.log import read_log

log = read_log(run / "log.jsonl")
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.plot([point.step for point in log.points], [point.loss for point in log.points], lw=0.8, label="training")
axes.plot([each.step for each in log.evaluations], [each.loss for each in log.evaluations], "o--", label="validation")
axes.set(xlabel="steps", ylabel="loss, nats per token")
axes.legend()
plt.show()

# %% [markdown]
# The fold: the same model before and after.

# %%
print(f"validation loss before {metrics.val_loss:.6f}, after {metrics.val_loss_folded:.6f}")
print(f"largest change of a logit {metrics.fold_max_abs_logit_drift:.1e}, {metrics.folded_layers} layers")

# %% [markdown]
# The folded checkpoint is an ordinary one of transformers, with its one file of modelling code:

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(run / "folded", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(run / "folded", trust_remote_code=False)
prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
written = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(written[0]))

# %% [markdown]
# On the command line all of this is `foldrank pretrain tiny-cola-dlr-muon`, which also writes
# [a page of the run](../runs.md).
