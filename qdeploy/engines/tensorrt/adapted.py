"""Graphs in the form that TensorRT for RTX makes the fastest engine of: the same function in fewer bytes moved."""

from __future__ import annotations

from pathlib import Path

from qdeploy.engines.tensorrt.flavour import Flavour


def adapted(flavour: Flavour, onnx_path: Path, scratch: Path, precision: str) -> Path:
    """A file with the graph in the form that the library fuses best; the file itself if it has that form.

    Args:
        flavour: the library.
        onnx_path: the graph as it was exported, in float32.
        scratch: a folder for the new file.
        precision: what floats will be computed in; in ``bf16``, `ClampedNorms` would cost a step of its quantizer.
    """
    if not flavour.rewrites:
        return onnx_path
    import onnx_ir as ir

    from qdeploy.export.lower import adapt
    from qdeploy.export.passes.clamped_norms import ClampedNorms
    from qdeploy.export.passes.folded_scores import FoldedScores
    from qdeploy.export.passes.scalar_weight_scales import ScalarWeightScales
    from qdeploy.export.passes.several_blocks import SeveralBlocks

    clamped = () if precision == "bf16" else (ClampedNorms,)
    model = ir.load(onnx_path)
    if not adapt(model, (FoldedScores, *clamped, ScalarWeightScales, SeveralBlocks)):
        return onnx_path
    path = scratch / "adapted.onnx"
    ir.save(model, path, external_data=f"{path.name}_data")
    return path
