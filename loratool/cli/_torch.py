"""torch in a process that bakes and ends: imported without what only compiling and exporting need."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_UNNEEDED = "torch._meta_registrations"
"""What operators make of tensors without data, told in Python: it brings all decompositions with it, 0.4 of the 1.35
seconds that the whole import takes. The operators themselves are in torch's library. It is imported last.

Not all of torch does without: torch 2.13 makes no `Generator`. So it is left out for commands of which tests prove, as
processes, that they give the same bytes.
"""

_ours = False


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


def own_process() -> None:
    """Says that this process is the command line's: nothing else in it may want to compile."""
    global _ours
    _ours = True


def spare() -> None:
    """From now on `import torch` takes a third less, in a process of ours that has not imported it yet."""
    if _ours and "torch" not in sys.modules:
        sys.meta_path.insert(0, _Spare())
