"""The host loop by itself; attacks run in it in `tests/attacks/matching/test_loop.py`."""

import numpy as np
import pytest

from invjax import driver


@pytest.mark.parametrize(("stepwise", "expected"), [(True, 7), (False, 5)])
def test_an_interruption_leaves_a_state_with_its_own_steps(stepwise, expected):
    calls = []

    def advance(state, count):
        calls.append(count)
        if sum(calls) > 7:
            raise KeyboardInterrupt
        return state + count

    def summary(state):
        return None, np.zeros((), bool)

    state, steps, interruption = driver.advance_in_chunks(
        advance, summary, 0, 0, 20, lambda *_: None, chunk=5, stepwise=stepwise
    )
    assert isinstance(interruption, KeyboardInterrupt)
    assert state == steps == expected
