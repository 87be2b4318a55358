"""The commands, one module each: `add_arguments(parser)`, `run(arguments)` to plain JSON values, `show(result)`."""
