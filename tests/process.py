"""The memory of this process, for tests that measure a process of their own."""
import re
from pathlib import Path

def memory_of(key="VmHWM"):
    """MiB of this process, at its largest or now (VmRSS). subtle: ru_maxrss would begin with the parent's memory."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
