"""Pre-training: a recipe, the model it describes, one run from text to a folded checkpoint, and its evaluation.

recipes (settings) -> device_memory.py (what a recipe leaves open) -> model.py (the architecture, factorized) ->
start.py (its weights) -> compilation.py -> pretrain.py (the run) -> evaluate.py (loss, drift) -> metrics.py
"""
