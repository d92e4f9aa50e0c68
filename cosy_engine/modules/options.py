"""Configuration values that this project knows only one form of."""

from __future__ import annotations

from cosy_engine.errors import ModelDirectoryError


def require(**options: tuple[object, object]) -> None:
    """Refuse a configuration that would be computed differently from what its author meant.

    Args:
        options: `name=(given value, the one supported value)`.

    Raises:
        ModelDirectoryError: a given value is not the supported one.
    """
    for name, (given, supported) in options.items():
        if given != supported:
            raise ModelDirectoryError(
                f"The model configuration says {name}={given!r}; only {supported!r} is supported. "
                "Use a CosyVoice2 or CosyVoice3 model directory.",
                param=name,
            )
