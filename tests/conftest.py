"""Runs tests that are coroutines, and makes Ctrl-C possible."""

from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from harness import PATIENCE

SLOW_SECONDS = 900.0  # a slow test, by one of these marks, that takes longer hangs
SLOW = {"slow", "engines", "scale"}

# A shell that starts the tests in the background has them ignore SIGINT, which every child would
# inherit, and a bash that ignores it at its start cannot trap it. A handler of our own is not
# inherited: children have the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives an attribute another value for the time of a test."""
    return monkeypatch.setattr


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of a test, for a fixture that has work of its own on it."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, up to a deadline."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    fixtures: dict[str, Any] = pyfuncitem.funcargs
    parameters = inspect.signature(pyfuncitem.obj).parameters
    scenario = pyfuncitem.obj(**{name: fixtures[name] for name in parameters})
    marks = {mark.name for mark in pyfuncitem.iter_markers()}
    seconds = SLOW_SECONDS if marks & SLOW else PATIENCE
    run = fixtures["runner"].run if "runner" in fixtures else asyncio.run
    run(asyncio.wait_for(scenario, seconds))
    return True
