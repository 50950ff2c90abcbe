"""loratool: inspect, convert, merge, resize and bake LoRA files."""

__version__ = "0.1.0"
