"""The host loop by itself; attacks run in it in `tests/attacks/matching/test_loop.py`."""

import functools
import os
import signal
import time

import jax
import numpy as np
import pytest

from invjax import driver


def ended(state):
    """Nothing is done before the last step."""
    return None, np.zeros((), bool)


@pytest.mark.parametrize(("stepwise", "expected"), [(True, 7), (False, 5)])
def test_an_interruption_leaves_a_state_with_its_own_steps(stepwise, expected):
    calls = []

    def advance(state, count):
        calls.append(count)
        if sum(calls) > 7:
            raise KeyboardInterrupt
        return state + count

    state, steps, interruption = driver.advance_in_chunks(
        advance, ended, 0, 0, 20, lambda *_: None, chunk=5, stepwise=stepwise
    )
    assert isinstance(interruption, KeyboardInterrupt)
    assert state == steps == expected


@pytest.fixture
def hearing():
    """Python's own handler of Ctrl-C, which a background shell takes away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@functools.partial(jax.jit, donate_argnums=0)
def add(state, count):
    return state + count


@pytest.mark.parametrize(("stepwise", "expected"), [(True, 6), (False, 10)])
def test_ctrl_c_in_a_call_that_took_the_state_over_loses_nothing(hearing, stepwise, expected):
    def advance(state, count):
        new = add(state, count)
        if int(new) >= 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return new

    state, steps, interruption = driver.advance_in_chunks(
        advance, ended, jax.numpy.zeros(()), 0, 20, lambda *_: None, chunk=5, stepwise=stepwise
    )
    assert isinstance(interruption, KeyboardInterrupt)
    assert float(state) == steps == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_it_at_once(hearing):
    def advance(state, count):
        new = add(state, count)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return new

    # Neither the old state nor the new is there.
    with pytest.raises(KeyboardInterrupt):
        driver.advance_in_chunks(advance, ended, jax.numpy.zeros(()), 0, 20, lambda *_: None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
