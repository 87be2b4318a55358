"""Text to token ids on disk: sources, tokenizer, preparation, and the blocks that training and evaluation read.

corpus.py (documents) -> tokenizer.py -> prepare.py (memory-mapped shards and a manifest) -> blocks.py (sequences)
"""
