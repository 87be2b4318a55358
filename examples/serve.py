"""An OpenAI-compatible server for a checkpoint: `transformers serve`, told of the classes that it does not look for.

pip install 'transformers[serving]'
python examples/serve.py runs/demo/folded --port 8000
"""

import argparse

import transformers
from transformers.cli.serve import Serve

import foldrank.hf


def main() -> None:  # noqa: D103
    parser = argparse.ArgumentParser(description="Serve a checkpoint over HTTP.")
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    for name in foldrank.hf.__all__:
        setattr(transformers, name, getattr(foldrank.hf, name))
    Serve(arguments.checkpoint, port=arguments.port, device=arguments.device)


if __name__ == "__main__":
    main()
