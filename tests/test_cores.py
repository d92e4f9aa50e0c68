"""Threads of torch's operations, by the thread that calls them; in a process of its own, for torch keeps them."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
import torch
from cosy_engine.cores import half_of_the_cores, use_cores

torch.set_num_threads(6)
seen = [half_of_the_cores()]

def worker(count):
    use_cores(count)
    torch.ones(10**6).sum()
    seen.append(torch.get_num_threads())

for count in (3, None, 1):
    thread = threading.Thread(target=worker, args=(count,))
    thread.start()
    thread.join()
print(*seen, torch.get_num_threads())
"""


def test_each_thread_has_its_own_number() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["3", "3", "6", "1", "6"]
