"""`python -m cosy_engine`."""

from cosy_engine.cli import app

app(prog_name="python -m cosy_engine")
