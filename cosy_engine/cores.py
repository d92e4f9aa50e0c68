"""How many cores the operations of a thread use."""

from __future__ import annotations

import threading

import torch

_changing = threading.Lock()


def half_of_the_cores() -> int:
    """Threads for each of two workers that work at the same time: half of what torch would use here, at least one."""
    return max(1, torch.get_num_threads() // 2)


def use_cores(count: int | None) -> None:
    """Let torch's operations of the calling thread use so many threads; None leaves it as it is.

    torch also notes the number for threads that have not used it yet. Those get back what they would have had.
    """
    if count is None:
        return
    with _changing:
        usual = torch.get_num_threads()
        torch.set_num_threads(count)
        elsewhere = threading.Thread(target=torch.set_num_threads, args=(usual,))
        elsewhere.start()
        elsewhere.join()
