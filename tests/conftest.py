"""Settings of every test run."""

from __future__ import annotations

import os

# Tests run side by side (`pytest -n`): threads of torch's own on top of that only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
