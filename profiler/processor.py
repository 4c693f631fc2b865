"""What the processor is called."""

import platform
import re
from pathlib import Path


def processor_name() -> str:
    """As the system names it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        told = ""
    model = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
