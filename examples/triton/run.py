"""A model folder for Triton: a whole pipeline behind its Python backend."""

import qdeploy


def main() -> None:
    data = qdeploy.collect("digits", "set", samples=4, steps=4, keep=2)
    checkpoint = qdeploy.calibrate("digits", "w8a8", recipe="w8a8-minmax", calibration=data, effort="fast")
    engine = qdeploy.build_engine(qdeploy.export(checkpoint, "onnx"), "engine", threads=1)
    print(qdeploy.package(engine, "models", server="triton", name="digits").as_text())


if __name__ == "__main__":
    main()
