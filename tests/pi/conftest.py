"""Runs the tests that are coroutines."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from harness import PATIENCE


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test in an event loop of its own, or in that of the fixture `runner`, for PATIENCE at most."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = pyfuncitem.funcargs
    test = pyfuncitem.obj(**{name: given[name] for name in inspect.signature(pyfuncitem.obj).parameters})
    (given["runner"].run if "runner" in given else asyncio.run)(asyncio.wait_for(test, PATIENCE))
    return True
