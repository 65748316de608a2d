"""The quantized network: operators, quantizers, layers, ranges, checkpoints."""
