"""Voices derived from those of other layouts: what most trainers' spellings of a new model follow from."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.core.architecture import Architecture, Voice

MAIN = ("transformer", "unet", "prior", "model")
"""The components that are the model itself, not its text encoders."""


def main_component(architecture: Architecture) -> str | None:
    """The component that is the model itself; None where there is none by a known name, or no table."""
    if architecture.open:
        return None
    return next((name for name in MAIN if name in architecture.components), None)


def written(architecture: Architecture, layout: str) -> Mapping[str, Voice]:
    """The voices that the architecture's own table writes for a layout."""
    return architecture.writes.get(layout, {})


def distinct(*voices: Voice | None) -> tuple[Voice, ...]:
    """The voices that there are, each once."""
    return tuple(dict.fromkeys(voice for voice in voices if voice is not None))


def renamed(voice: Voice | None, prefix: str) -> Voice | None:
    """The same naming behind another prefix."""
    return None if voice is None else Voice(prefix, voice.naming)
