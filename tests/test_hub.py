"""Whether the hub is there is asked once, and nobody waits for one that is not."""

import http.server
import logging
import threading
import time
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from moe_lightning import hub
from moe_lightning.data.sources import open_sources


def offline() -> tuple[bool, bool]:
    return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with hub.hub_within_reach() as reached:
            assert (reached, *offline()) == (True, False, False)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    # Nobody answers there now.
    with hub.hub_within_reach() as reached:
        assert (reached, *offline()) == (False, True, True)
    assert offline() == (False, False)
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("asked without need"))
    with hub.hub_within_reach(needed=False) as reached:
        assert (reached, *offline()) == (True, False, False)


def test_a_source_on_a_hub_that_is_not_there_is_missing_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    server.server_close()
    nobody = f"http://127.0.0.1:{server.server_port}"
    for place, name, value in (
        (constants, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (constants, "ENDPOINT", nobody),
        (datasets.config, "HF_ENDPOINT", nobody),
    ):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s for another try"))
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    told = r"^--data.sources hub:some/data:en: the hub data set 'some/data' is not in the cache, and the Hugging Face "
    with pytest.raises(FileNotFoundError, match=told + r"hub cannot be reached.*python-stdlib$"):
        open_sources("hub:some/data:en")
    assert not caplog.records
    assert offline() == (False, False)
