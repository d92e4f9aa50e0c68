"""Recordings to features, and samples to files."""
