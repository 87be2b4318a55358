"""Pre-training: a recipe, the model it describes, one run from text to a folded checkpoint, and its evaluation.

recipe.py (settings) -> model.py (the architecture, factorized) -> pretrain.py (the run) -> evaluate.py (loss, drift)
"""
