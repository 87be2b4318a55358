"""Folded checkpoints in forms for other runtimes. `runtime` runs what `onnx` and `openvino` write."""
