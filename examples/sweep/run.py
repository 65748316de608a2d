"""Methods and seeds next to each other, each calibration by a worker of its own on Ray."""

import qdeploy

RECIPES = ("w8a8-minmax", "w8a8-smoothquant")


def main() -> None:
    data = qdeploy.collect("digits", "set", samples=4, steps=4, keep=2)
    result = qdeploy.sweep(
        "digits",
        "sweep",
        recipes=RECIPES,
        seeds=(0, 1),
        calibration=data,
        samples=2,
        steps=4,
        keep=2,
        on="ray",  # or ray://HOST:10001 for a cluster
        workers=2,
    )  # the same call after an interruption continues
    print(result.table())


if __name__ == "__main__":
    main()
