"""The local server that stands for the Hub."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests.support.hub_server import Hub, serve

TOKEN = "hf_AnnasOwnTokenForWriting1234"
READER = "hf_AnnasOwnTokenForReading5678"
REPO = "anna/paper-boats"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that knows anna; the client finds it and her token in the environment."""
    state = Hub(users={TOKEN: "anna", READER: "anna"}, readers={READER})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits between attempts
    with serve(state) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield state
        close_session()
