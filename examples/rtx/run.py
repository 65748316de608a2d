"""An engine of TensorRT for RTX, built for RTX 40 cards on a machine without one."""

import qdeploy


def main() -> None:
    data = qdeploy.collect("digits", "set", samples=4, steps=4, keep=2)
    checkpoint = qdeploy.calibrate(
        "digits", "w8a8", recipe="w8a8-minmax", target="tensorrt", calibration=data, effort="fast"
    )
    bundle = qdeploy.export(checkpoint, "onnx")
    qdeploy.build_engine(bundle, "engine", backend="tensorrt-rtx", gpu="sm89")
    print("copy engine/ to the machine with the card, and run: qdeploy benchmark engine")


if __name__ == "__main__":
    main()
