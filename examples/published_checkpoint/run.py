"""A quantized network as its authors published it: ``python run.py FILE METHOD MODEL``."""

import sys

import qdeploy


def main(file: str, method: str, model: str) -> None:
    checkpoint = qdeploy.import_checkpoint(file, model, "imported", method=method)
    bundle = qdeploy.export(checkpoint, "onnx")
    engine = qdeploy.build_engine(bundle, "engine", threads=1, allow_inaccurate=True)
    print(checkpoint.facts.precision, engine.measured.parity)


if __name__ == "__main__":
    main(*sys.argv[1:])
