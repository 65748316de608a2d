"""Learning stops when a window gains too little, and the best of what was judged is kept."""

from __future__ import annotations

from qdeploy.calibrate.early_stop import EarlyStop


def run(errors: list[float], share: float, start: int = 0) -> EarlyStop[int]:
    """Steps until it stops, judged every 2 of them."""
    judged = iter(enumerate(errors))

    def judge() -> tuple[float, int]:
        number, error = next(judged)
        return error, number

    stop = EarlyStop(judge, share, window=2, start=start)
    for step in range(2 * len(errors)):
        if stop(step):
            break
    return stop


def test_it_goes_on_while_every_window_gains_enough() -> None:
    stop = run([8, 4, 2, 1], share=0.1)
    assert (stop.steps, stop.error, stop.best) == (8, 1, 3)


def test_two_windows_without_enough_gain_end_it() -> None:
    stop = run([8, 4, 3.9, 3.8, 1], share=0.1)
    assert (stop.steps, stop.best) == (8, 3)


def test_one_window_without_gain_is_forgiven() -> None:
    stop = run([8, 9, 4, 5, 2], share=0.1)
    assert (stop.steps, stop.error, stop.best) == (10, 2, 4)


def test_the_best_is_kept_when_it_gets_worse() -> None:
    stop = run([8, 4, 5, 6, 1], share=0)
    assert (stop.error, stop.best) == (4, 1)


def test_it_does_not_stop_before_its_start() -> None:
    assert run([8, 8, 8, 8, 8], share=0.1, start=6).steps == 8
