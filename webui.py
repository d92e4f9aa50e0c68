"""The page: `python webui.py --help`."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer


def main(
    model_dir: Annotated[
        str | None,
        typer.Option(help="Model directory, or a ModelScope or Hugging Face id such as iic/CosyVoice2-0.5B."),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="GRADIO_SERVER_NAME", help="0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GRADIO_SERVER_PORT")] = 7860,
) -> None:
    """Serve a page that speaks with CosyVoice2 and CosyVoice3 models."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    from cosy_engine.engine import Engine
    from cosy_engine.errors import CosyError
    from cosy_engine.ui.app import build, launch

    try:
        engine = Engine.load(model_dir)
    except CosyError as error:
        raise typer.Exit(_fail(error.message)) from error
    try:
        launch(build(engine), host, port)
    except OSError as error:
        raise typer.Exit(_fail(f"The page cannot be served on {host}:{port}: {error}")) from error
    finally:
        engine.close()


def _fail(sentence: str) -> int:
    typer.secho(sentence, fg="red", err=True)
    return 1


if __name__ == "__main__":
    typer.run(main)
