"""Benchmarks of language models through lm-eval: `shipped` makes two that need no network, `harness` runs any."""
