"""Before any torchtitan module that a test imports by itself: see flexrattn/platform.py."""

import flexrattn  # noqa: F401
