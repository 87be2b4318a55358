"""`python -m foldrank.runtime FOLDER --prompt TEXT`: an exported model continues a text."""

import argparse
import itertools
import os
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
        if told := model.note_on(arguments.prompt, arguments.max_new_tokens):
            print(f"note: {told}", file=sys.stderr)  # noqa: T201
        pieces = model.stream(
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed,
            stop=arguments.stop,
        )
        first = next(pieces, "")  # before anything is printed, since what is wrong shows here
        for piece in itertools.chain([arguments.prompt, first], pieces, ["\n"]):
            print(piece, end="", flush=True)  # noqa: T201
    except BrokenPipeError:  # whoever read has enough, `head` for one
        code = 141
    except (ValueError, OSError) as error:
        print(f"foldrank.runtime: {error}", file=sys.stderr)  # noqa: T201
        code = 2
    except KeyboardInterrupt:
        code = 130
    else:
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
    return code


if __name__ == "__main__":
    sys.exit(main())
