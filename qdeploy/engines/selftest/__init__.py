"""The verb ``selftest``: tiny graphs through a backend, compared with ONNX Runtime, in one report to send."""
