"""The page: `python webui.py --help`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def main(
    model_dir: Annotated[
        str | None,
        typer.Option(
            envvar="COSY_MODEL_DIR",
            help="Model directory, or a ModelScope or Hugging Face id such as iic/CosyVoice2-0.5B.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="GRADIO_SERVER_NAME", help="0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="GRADIO_SERVER_PORT")] = 7860,
    auth: Annotated[
        list[str] | None,
        typer.Option(
            envvar="COSY_AUTH",
            metavar="NAME:PASSWORD",
            help="An account; with one, the page asks for a login. May be repeated. "
            "In the environment, separate accounts by spaces.",
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(envvar="GRADIO_ROOT_PATH", help="Where a proxy shows the page, such as /voices.")
    ] = "",
    ssl_certfile: Annotated[
        Path | None, typer.Option(envvar="COSY_SSL_CERTFILE", help="Serve https with this certificate (PEM).")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(envvar="COSY_SSL_KEYFILE", help="The certificate's key (PEM).")
    ] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(envvar="COSY_SSL_KEYFILE_PASSWORD", help="When the key is encrypted.")
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(min=0, envvar="COSY_MAX_QUEUE", help="Requests that may wait; more are told when to retry."),
    ] = None,
    load_trt: Annotated[bool, typer.Option("--load-trt", help="Run the flow on TensorRT (NVIDIA GPU).")] = False,
    load_vllm: Annotated[bool, typer.Option("--load-vllm", help="Run the speech LM on vLLM.")] = False,
    vllm_args: Annotated[
        str, typer.Option(metavar="JSON", help="Arguments of vLLM's engine, by name; also COSY_VLLM_ARGS.")
    ] = "",
    concurrency: Annotated[
        int | None, typer.Option(min=1, envvar="COSY_CONCURRENCY", help="Requests worked on at the same time.")
    ] = None,
    voices_dir: Annotated[Path | None, typer.Option(envvar="COSY_VOICES_DIR", help="Where saved voices live.")] = None,
    shared_voices: Annotated[
        bool,
        typer.Option(
            "--shared-voices",
            envvar="COSY_SHARED_VOICES",
            help="Voices saved on the page are there for every visitor.",
        ),
    ] = False,
    max_upload_mb: Annotated[
        int | None, typer.Option(min=1, envvar="COSY_MAX_UPLOAD_MB", help="Largest recording that is taken.")
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", envvar="COSY_METRICS", help="Serve /metrics for Prometheus, without a login.")
    ] = False,
) -> None:
    """Serve a page that speaks with CosyVoice2 and CosyVoice3 models."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Docker and systemd send

    from pydantic import ValidationError

    from cosy_engine.config import Settings, vllm_options
    from cosy_engine.errors import CosyError
    from cosy_engine.serving.access import Access, read_accounts, read_root_path, read_tls

    chosen = {
        "max_queue": max_queue,
        "concurrency": concurrency,
        "flow_backend": "tensorrt" if load_trt else None,
        "voices_dir": voices_dir,
        "shared_voices": shared_voices or None,
        "max_upload_mb": max_upload_mb,
    }
    try:
        chosen |= vllm_options(load_vllm, vllm_args)
        settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
        access = Access(
            accounts=read_accounts(auth or []),
            root_path=read_root_path(root_path),
            tls=read_tls(ssl_certfile, ssl_keyfile, ssl_keyfile_password),
            max_upload_mb=settings.max_upload_mb,
            private=(settings.voices_dir,),
        )
    except ValidationError as error:
        wrong = "; ".join(
            f"COSY_{'_'.join(map(str, entry['loc'])).upper()}: {entry['msg']}" for entry in error.errors()
        )
        raise typer.Exit(_fail(f"The environment has a wrong value: {wrong}")) from error
    except CosyError as error:
        raise typer.Exit(_fail(error.message)) from error

    uploads = tempfile.TemporaryDirectory(prefix="cosy-page-")  # only this user may look into it
    with uploads, contextlib.suppress(KeyboardInterrupt):
        os.environ.setdefault("GRADIO_TEMP_DIR", uploads.name)

        from cosy_engine.serving.health import health_routes
        from cosy_engine.ui.app import build, launch
        from cosy_engine.ui.zerogpu import load_engine

        try:
            engine = load_engine(model_dir, settings)
        except CosyError as error:
            raise typer.Exit(_fail(error.message)) from error
        try:
            page = build(engine, shared_voices=settings.shared_voices)
            launch(page, host, port, access=access, routes=health_routes(engine, metrics=metrics))
        except OSError as error:
            raise typer.Exit(_fail(f"The page cannot be served on {host}:{port}: {error}")) from error
        finally:
            engine.close()


def _fail(sentence: str) -> int:
    typer.secho(sentence, fg="red", err=True)
    return 1


if __name__ == "__main__":
    typer.run(main)
