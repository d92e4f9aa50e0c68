from __future__ import annotations

import re
import ssl
from pathlib import Path

import httpx
import pytest

from cosy_engine.errors import InvalidRequestError
from cosy_engine.serving.access import Access, Tls, read_accounts, read_root_path, read_tls
from tests.recordings import encoded, hum
from tests.serving.conftest import Serve


def test_accounts_keep_colons_in_passwords() -> None:
    assert read_accounts(["ann:se:cret", "bob:x"]) == (("ann", "se:cret"), ("bob", "x"))


@pytest.mark.parametrize("pairs", [["hunter2"], [":hunter2"], ["ann:"], ["ann:hunter2", "ann:hunter2"]])
def test_a_wrong_account_is_refused_without_repeating_its_password(pairs: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_accounts(pairs)
    assert "hunter2" not in refused.value.message


def test_root_paths() -> None:
    assert read_root_path("/voices/") == "/voices"
    assert read_root_path("https://example.org/voices/") == "https://example.org/voices"
    assert read_root_path("/") == read_root_path("") == ""
    with pytest.raises(InvalidRequestError, match="/voices"):
        read_root_path("voices")


def test_a_login_guards_everything_that_visitors_make(serve: Serve) -> None:
    with serve(Access(accounts=(("ann", "pa:ss"), ("bob", "word")))) as address:
        with httpx.Client(base_url=address) as ann:
            assert ann.post("/login", data={"username": "ann", "password": "pa:ss"}).status_code == 200
            sent = ann.post("/gradio_api/upload", files={"files": ("me.wav", encoded(hum(1)))})
            mine = f"/gradio_api/file={sent.json()[0]}"
            assert ann.get(mine).status_code == 200
            assert ann.get("/config").status_code == 200

        with httpx.Client(base_url=address) as stranger:
            for wrong in ({"username": "ann", "password": "word"}, {"username": "eve", "password": "pa:ss"}):
                assert stranger.post("/login", data=wrong).status_code == 400
            for path in (mine, "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x"):
                assert stranger.get(path).status_code == 401, path
            assert stranger.post("/gradio_api/upload", files={"files": ("a.wav", b"x")}).status_code == 401
            joined = stranger.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "x"})
            assert joined.status_code == 401
            assert "me.wav" not in stranger.get("/").text
            assert stranger.get("/healthz").status_code == 200


def test_tls_with_an_encrypted_key(serve: Serve, certificate: tuple[Path, Path]) -> None:
    certfile, keyfile = certificate
    with serve(Access(tls=read_tls(certfile, keyfile, "sesame"))) as address:
        assert address.startswith("https://")
        trusting = ssl.create_default_context(cafile=certfile)
        assert httpx.get(f"{address}/healthz", verify=trusting).json()["status"] == "ok"
        assert "CosyVoice" in httpx.get(address, verify=trusting).text
        with pytest.raises(httpx.TransportError):
            httpx.get(address.replace("https", "http"))


def test_tls_files_that_do_not_work_are_told_before_anything_is_loaded(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    certfile, keyfile = certificate
    assert read_tls(None, None) is None
    assert read_tls(certfile, keyfile, "sesame") == Tls(certfile, keyfile, "sesame")
    with pytest.raises(InvalidRequestError, match="both"):
        read_tls(certfile, None)
    for pair in ((certfile, keyfile, "wrong"), (certfile, keyfile, None), (certfile, tmp_path / "no.pem", None)):
        with pytest.raises(InvalidRequestError, match="key.pem|no.pem"):
            read_tls(*pair)


@pytest.mark.parametrize("root_path", ["/voices", "https://example.org/voices"])
def test_the_page_knows_its_address_behind_a_proxy(serve: Serve, root_path: str) -> None:
    """The proxy may strip the prefix, as docs/deploy.md has it, or leave it."""
    forwarded = {"X-Forwarded-Host": "example.org", "X-Forwarded-Proto": "https"}
    with serve(Access(root_path=root_path)) as address:
        with httpx.Client(base_url=address, headers=forwarded) as client:
            page = client.get("/")
            assert re.search(r'"root":\s*"([^"]+)"', page.text).group(1) == "https://example.org/voices"
            assert client.get("/config").json()["root"] == "https://example.org/voices"
            assert client.get("/healthz").status_code == 200
            if root_path.startswith("/"):
                assert client.get("/voices/healthz").status_code == 200
                assert client.get("/voices/config").json()["root"] == "https://example.org/voices"
