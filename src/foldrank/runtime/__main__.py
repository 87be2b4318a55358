"""`python -m foldrank.runtime FOLDER --prompt TEXT`: an exported model continues a text."""

import argparse
import sys

from foldrank.runtime.model import Model
from foldrank.runtime.sampling import Sampling


def main() -> int:
    """Returns 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m foldrank.runtime", description="Let an exported model write.")
    parser.add_argument("folder", help="that foldrank export wrote, as onnx or openvino")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    try:
        sampling = Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
        model = Model(arguments.folder, threads=arguments.threads)
        pieces = model.stream(
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed,
            stop=arguments.stop,
        )
        print(arguments.prompt, end="", flush=True)  # noqa: T201
        for piece in pieces:
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201
    except ValueError as error:
        print(f"foldrank.runtime: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
