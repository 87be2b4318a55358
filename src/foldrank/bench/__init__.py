"""Benchmarks: what methods cost beside one another, in time and memory, on this machine.

    Settings (`settings.py`): a benchmark, a recipe's sizes, methods, a device
      -> models that passed the numerics gate (`trained_model.py`, `inference_model.py`): the same function by
         every way, or no figure at all
      -> interleaved rounds in one process (`interleaved.py`), as ratios to the first method, round by round
      -> a record (`record.py`): one JSON file, the only thing that tables are made of
      -> the tables of benchmarks/README.md (`report.py`)

Each benchmark is a module with a function `run(settings)`, which gives `Findings`.
"""

BENCHMARKS = {
    "layer": "forward and backward pass of one layer, for each shape of the recipe",
    "start": "from a recipe to a model with initial weights on its device, and the memory it takes",
    "step": "training step of the whole model: forward, backward, AdamW",
    "memory": "bytes of weights, gradients, optimizer state and activations, and the peak of a step",
    "prefill": "reading a prompt, folded models",
    "decode": "greedy tokens after a prompt, with a cache, folded models",
    "fold": "folding a checkpoint file by file, over copying its files; and the memory it takes",
    "trainer": "a step of Trainer, over one of a bare loop on the same model and batches",
    "loader": "the data loader's share of a training step",
}
"""What each one measures."""

TRAINING = ("layer", "step", "memory", "trainer", "loader")
"""Those of training, which on a CPU keep freed memory as `pretrain` does; the others run as glibc is set up."""
