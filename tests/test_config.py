from __future__ import annotations

import pytest
import torch

from cosy_engine.config import HopSettings, Settings, choose_device
from cosy_engine.errors import BackendUnavailableError, InvalidRequestError


def test_the_environment_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSY_CONCURRENCY", "7")
    monkeypatch.setenv("COSY_TOKEN_HOP_LEN", "50")
    monkeypatch.setenv("COSY_TOKEN_HOP_LEN_FIRST", "")
    settings = Settings(max_queue=3)
    assert (settings.concurrency, settings.max_queue) == (7, 3)
    assert settings.hops == HopSettings(token_hop_len=50)
    assert Settings(concurrency=2).concurrency == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COSY_CONCURRENCY", "0"),
        ("COSY_MAX_QUEUE", "many"),
        ("COSY_LM_BACKEND", "abacus"),
        ("COSY_TOKEN_HOP_LEN", "0"),
        ("COSY_HOPS", "{"),
    ],
)
def test_a_setting_that_does_not_fit_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequestError) as refused:
        Settings()
    assert "\n" not in refused.value.message and name.removeprefix("COSY_").lower() in refused.value.message.lower()


@pytest.mark.parametrize("name", ["", "gpu", "meta", "cpu:1", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(BackendUnavailableError) as refused:
        choose_device(name)
    assert refused.value.param == "device"


def test_devices_that_are_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
