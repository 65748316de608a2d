"""The timestep of a U-Net's IR: int64 of one entry in the file, as OpenVINO's pipelines give it; float32 in qdeploy.

OpenVINO GenAI and optimum-intel call a U-Net with whole timesteps. Schedulers such as Euler's have fractional ones,
so an engine that qdeploy opens has the conversion taken out again.
"""

from __future__ import annotations

from typing import Any

from qdeploy.system.telemetry import import_silently

TIMESTEP = "timestep"


def take_whole_timesteps(model: Any) -> None:
    """Let the input ``timestep`` be int64 ``[1]`` (its size dynamic) in place of a float32 scalar, in place.

    A model whose timestep is something else stays as it is.
    """
    import numpy as np

    openvino = import_silently("openvino")
    opset13 = openvino.opset13

    old = _parameter(model)
    if old is None or old.get_element_type() != openvino.Type.f32 or old.get_partial_shape().rank != 0:
        return
    whole = opset13.parameter(openvino.PartialShape([-1]), dtype=np.int64, name=TIMESTEP)
    whole.output(0).get_tensor().set_names({TIMESTEP})
    number = opset13.convert(whole, "f32", name=f"{TIMESTEP}/float")
    scalar = opset13.reshape(
        number, opset13.constant(np.zeros(0, np.int64)), special_zero=False, name=f"{TIMESTEP}/scalar"
    )
    _replace(model, old, scalar, whole)


def take_fractional_timesteps(model: Any) -> None:
    """Undo `take_whole_timesteps`; a model that it did not change stays as it is."""
    import numpy as np

    openvino = import_silently("openvino")
    opset13 = openvino.opset13

    old = _parameter(model)
    if old is None or old.get_element_type() != openvino.Type.i64:
        return
    scalar = next(
        (op for op in model.get_ordered_ops() if op.get_friendly_name() == f"{TIMESTEP}/scalar"), None
    )
    if scalar is None:
        return
    new = opset13.parameter(openvino.PartialShape([]), dtype=np.float32, name=TIMESTEP)
    new.output(0).get_tensor().set_names({TIMESTEP})
    for reader in list(scalar.output(0).get_target_inputs()):
        reader.replace_source_output(new.output(0))
    model.remove_parameter(old)
    model.add_parameters([new])
    model.validate_nodes_and_infer_types()


def _parameter(model: Any) -> Any:
    return next((op for op in model.get_parameters() if TIMESTEP in op.output(0).get_names()), None)


def _replace(model: Any, old: Any, source: Any, new: Any) -> None:
    """Let what read one parameter read ``source``, which comes from another one at the same place."""
    for reader in list(old.output(0).get_target_inputs()):
        reader.replace_source_output(source.output(0))
    model.remove_parameter(old)
    model.add_parameters([new])
    model.validate_nodes_and_infer_types()
