"""Every test, also of a part of them, starts from what is set here."""

import os

import pytest
from launch import free_port

# Before anything reads them, here and in processes that tests start. Threads cost more than they bring on small models,
# and nothing may wait for a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let the processes of each test meet at a port of their own: what an earlier one left may still listen at its."""
    os.environ["MASTER_PORT"] = str(free_port())


@pytest.fixture(scope="session", autouse=True)
def _modules() -> None:
    # Not at the top: pytest looks at Lightning's loggers only once it has begun.
    import modules  # noqa: F401
