"""The native extension, loaded once. `C` is the module, or None with the `reason`."""

import importlib
import os
from types import ModuleType

C: ModuleType | None
reason: str | None

try:
    C = importlib.import_module("fastseq._C")

    reason = None
except ImportError as error:
    C = None
    reason = f"the native extension is not built ({error}); reinstall with a C++17 compiler and FASTSEQ_NATIVE=1"

if C is not None:
    C.choose_isa(os.environ.get("FASTSEQ_ISA", ""))
