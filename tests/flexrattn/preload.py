"""What the server of tests/flexrattn/runs.py imports once for all runs."""

import flexrattn.config_registry
import flexrattn.launch  # noqa: F401
