"""Formats of layers chosen within a budget of bytes, from the harm that each does alone."""

import qdeploy


def main() -> None:
    data = qdeploy.collect("digits", "set", samples=4, steps=4, keep=2)
    harm = qdeploy.sensitivity("digits", "harm", calibration=data, rows=4, probes=1, cheap=True)
    checkpoint = qdeploy.calibrate(
        "digits",
        "mixed",
        recipe="w8a8-minmax",
        calibration=data,
        effort="fast",
        budget="size=1.6MB",
        sensitivity=harm,
    )
    print(checkpoint.facts.precision, f"{checkpoint.size() / 1e6:.2f} MB on disk")


if __name__ == "__main__":
    main()
