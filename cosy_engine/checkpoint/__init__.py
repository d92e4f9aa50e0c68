"""Find or download a model directory, read its configuration as data, load its weights safely."""
