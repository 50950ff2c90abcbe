"""The command line."""

import gc

# A command lives for seconds, and what it builds (imports, tables, headers of thousands of tensors) lives as long:
# looking through it for garbage again and again would be a quarter of `loratool info`.
gc.set_threshold(100_000)
