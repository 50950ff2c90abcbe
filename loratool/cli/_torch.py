"""torch in a process that computes and ends: imported without what only compiling and exporting need."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_UNNEEDED = "torch._meta_registrations"
"""What operators make of tensors without data, told in Python: it brings all decompositions with it, 0.4 of the 1.35
seconds that the whole import takes. The operators themselves are in torch's library. It is imported last."""


class _Spare:
    """Leaves that module empty; and nothing is collected while torch makes what stays."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answers for that module alone. Collecting goes on when it, or the next of our own, is imported."""
        if name == "torch":
            gc.disable()
        elif (name == _UNNEEDED or name.startswith("loratool.")) and not gc.isenabled():
            gc.freeze()  # what torch has made is not looked through again
            gc.enable()
        return ModuleSpec(name, self) if name == _UNNEEDED else None  # type: ignore[arg-type]  # all that is needed

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """A usual one."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is put into it."""


def spare() -> None:
    """From now on `import torch` takes a third less. Only for a process of ours: others may want to compile."""
    sys.meta_path.insert(0, _Spare())
