"""Write networks as ONNX, with Q/DQ where they are quantized."""
