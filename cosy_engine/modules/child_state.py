"""The way down a nested state."""

from __future__ import annotations

from cosy_engine.modules.streaming import State


def child_state(state: State | None, *path: str) -> State | None:
    """The part of `state` that belongs to the child module at `path`; None (nothing to remember) stays None."""
    for name in path:
        if state is None:
            return None
        state = state[name]
    return state
