"""Every error a caller can meet: what happened, what to do about it, which parameter, which status."""


class CosyError(Exception):
    """Base of all errors meant for the caller.

    Args:
        message: a plain sentence that says what is wrong and what to do.
        param: name of the parameter at fault, if there is one.
        code: short name of what is wrong, for callers that say it in words of their own; and
        values: what those words need to know.
    """

    http_status = 500
    grpc_status = "INTERNAL"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, **values: object) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.values = values


class InvalidRequestError(CosyError):
    """The request itself is wrong: text, mode, speed, seed, a missing prompt."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidAudioError(InvalidRequestError):
    """A recording cannot be decoded or used as a prompt."""


class VoiceNotFoundError(CosyError):
    """No saved voice has this id."""

    http_status = 404
    grpc_status = "NOT_FOUND"


class VoiceExistsError(CosyError):
    """A saved voice already has this id."""

    http_status = 409
    grpc_status = "ALREADY_EXISTS"


class VoiceMismatchError(CosyError):
    """The voice was made with another model."""

    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class QueueFullError(CosyError):
    """Too many requests are waiting; `retry_after` is in seconds."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, code="queue_full", seconds=retry_after)
        self.retry_after = retry_after


class ModelDirectoryError(CosyError):
    """A model directory is missing, incomplete or does not fit its configuration."""

    grpc_status = "FAILED_PRECONDITION"


class UnsafeModelError(ModelDirectoryError):
    """A model directory asks for code to be run; it is refused."""


class BackendUnavailableError(CosyError):
    """A backend that was asked for by name cannot run on this machine."""

    http_status = 501
    grpc_status = "UNIMPLEMENTED"


class BackendFailedError(CosyError):
    """A backend broke down while it worked on a request; it recovers by itself."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    code = "backend_failed"


class EngineStoppedError(CosyError):
    """The engine is shutting down."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    code = "engine_stopped"
