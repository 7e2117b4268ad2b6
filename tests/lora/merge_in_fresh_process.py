"""Merges an adapter's files and prints by how much memory grew at most.

Run as ``python merge_in_fresh_process.py ADAPTER OUT``, where torch cannot be imported.
"""

import re
import sys
import threading
from pathlib import Path

sys.modules["torch"] = None  # As if it were not installed.

from vlmlora.merging import merge_checkpoint  # noqa: E402


def anonymous_bytes() -> int:
    """Memory of this process that is not the pages of a file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


start = peak = anonymous_bytes()
done = threading.Event()


def watch() -> None:
    """Sample until the merge is done."""
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous_bytes())


thread = threading.Thread(target=watch)
thread.start()
merge_checkpoint(sys.argv[1], sys.argv[2], dtype="float32")
done.set()
thread.join()
print(peak - start)
