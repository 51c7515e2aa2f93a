"""Every test, also of a part of them, starts from what `modules` sets."""

import modules  # noqa: F401
