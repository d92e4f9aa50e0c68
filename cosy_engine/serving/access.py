"""Who may reach the page, and how: accounts, TLS, the address behind a proxy, how much may be sent."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cosy_engine.errors import InvalidRequestError


@dataclass(frozen=True)
class Tls:
    """A certificate with its chain and its key, PEM files; `password` when the key is encrypted."""

    certfile: Path
    keyfile: Path
    password: str | None = None


@dataclass(frozen=True)
class Access:
    """How a page is served.

    Attributes:
        accounts: names and passwords; with none, everyone who reaches the address may use the page.
        root_path: the address behind a proxy, such as `/voices` or `https://example.org/voices`; "" without one.
        max_upload_mb: the largest recording that is taken.
        private: folders that no address of the page may ever lead to.
    """

    accounts: tuple[tuple[str, str], ...] = ()
    root_path: str = ""
    tls: Tls | None = None
    max_upload_mb: int = 30
    private: tuple[Path, ...] = ()


def read_accounts(pairs: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Accounts from `name:password`; a password may hold colons.

    Raises:
        InvalidRequestError: a pair lacks its name or password, or a name comes twice. No password is repeated.
    """
    accounts: dict[str, str] = {}
    for number, pair in enumerate(pairs, start=1):
        name, _, password = pair.partition(":")
        if not name or not password:
            raise InvalidRequestError(f"Account {number} is not of the form name:password.", param="auth")
        if name in accounts:
            raise InvalidRequestError(f"The account {name!r} is given twice.", param="auth")
        accounts[name] = password
    return tuple(accounts.items())


def read_root_path(path: str) -> str:
    """The address behind a proxy as the page uses it: no slash at its end.

    Raises:
        InvalidRequestError: it is neither a path from the root nor a whole address.
    """
    path = path.rstrip("/")
    if path and not path.startswith(("/", "http://", "https://")):
        raise InvalidRequestError(
            f"The root path {path!r} begins neither with / nor with https://: give /voices for "
            "https://example.org/voices.",
            param="root_path",
        )
    return path


def read_tls(certfile: Path | None, keyfile: Path | None, password: str | None = None) -> Tls | None:
    """The certificate to serve with; None when none is given.

    Raises:
        InvalidRequestError: a file is missing or cannot be used.
    """
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        raise InvalidRequestError("TLS needs both a certificate and its key.", param="ssl_certfile")
    try:
        # A password is always offered: OpenSSL would ask for one at the terminal and wait.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile, lambda: password or "")
    except OSError as error:  # ssl.SSLError is one
        raise InvalidRequestError(
            f"The certificate {certfile} and the key {keyfile} cannot be used together: "
            f"{error.strerror or error}. Is it the right key, in PEM form, and its password the right one?",
            param="ssl_certfile",
        ) from error
    return Tls(certfile, keyfile, password)
