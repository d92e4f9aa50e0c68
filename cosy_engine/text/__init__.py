"""Text to tokens: normalise, split, encode."""
