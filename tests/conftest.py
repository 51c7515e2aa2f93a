"""Every test, also of a part of them, starts from what `modules` sets."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _modules() -> None:
    # Not at the top: pytest looks at Lightning's loggers only once it has begun.
    import modules  # noqa: F401
