"""Calibrate with a method of our own, by its name."""

import qdeploy


def main() -> None:
    data = qdeploy.collect("digits", "set", samples=4, steps=4, keep=2)
    for factor in (1.0, 1.2):
        checkpoint = qdeploy.calibrate(
            "digits",
            f"wide-{factor}",
            method="wide-ranges",
            weights="int8",
            activations="int8",
            effort="fast",
            calibration=data,
            options={"margin": {"factor": factor}},
        )
        print(factor, checkpoint.sha256[:12])


if __name__ == "__main__":
    main()
