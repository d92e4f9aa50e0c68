"""Training of the embedded model; README.md has the order of the stages."""
