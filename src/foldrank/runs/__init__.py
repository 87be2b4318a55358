"""What a run's folder shows, of a pre-training or a fine-tuning, finished or not, without PyTorch and without a lock.

log.jsonl -> `log`; the folder -> `run` (settings, log, metrics, whether it goes on) -> `page` (with `charts`), `watch`
"""
