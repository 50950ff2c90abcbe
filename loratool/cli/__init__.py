"""The command line."""

import atexit
import gc

# A command lives for seconds, and what it builds (imports, tables, headers of thousands of tensors) lives as long:
# looking through it for garbage, again and again and once more at the end, would be a quarter of `loratool info`.
gc.set_threshold(100_000)
atexit.register(gc.freeze)
