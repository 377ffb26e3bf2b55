"""Where nvcc is: on PATH, or else that of the extra dev-cuda."""

import shutil
import sysconfig
from pathlib import Path

__all__ = ["NO_NVCC", "NVCC", "OF_WHEELS"]

OF_WHEELS = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(OF_WHEELS))
NO_NVCC = "nvcc is not here: pip install 'fastseq-rnn[dev-cuda]'"
