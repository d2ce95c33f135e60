"""`make lab` and `make teach` as they start: a learner sees no news and nothing of
nbgrader, an instructor all of it."""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import ROOT
from test_browser import (
    CHROMIUM,
    NEEDS,
    READY,
    Server,
    driven,
    free_port,
    running,
    wait_for,
)

NEWS = "@jupyterlab/apputils-extension:announcements"
NBGRADER = "@jupyter/nbgrader"


def recipe(target: str) -> str:
    "The line with which make starts JupyterLab, with the programs of this environment."
    programs = Path(sys.executable).parent
    words = ["make", "-n", "--no-print-directory", f"BIN={programs}", target]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip().splitlines()[-1]


@dataclass
class Started(Server):
    "JupyterLab as make starts it, but on a port of ours and without a browser."

    @property
    def cwd(self) -> Path:
        return ROOT

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", f"{recipe(self.application)} {shlex.join(self.options)}"]

    def get(self, place: str) -> str:
        "A page of this server; an HTTPError if there is none."
        address = f"{self.root}/{place}?token={self.token}"
        with urllib.request.urlopen(address, timeout=30) as page:
            return page.read().decode()

    def has(self, place: str) -> bool:
        try:
            self.get(place)
        except urllib.error.HTTPError as error:
            assert error.code == 404, place
            return False
        return True


@pytest.fixture(params=["lab", "teach"])
def started(request, tmp_path) -> Iterator[Started]:
    server = Started(request.param, tmp_path, free_port(), secrets.token_hex(16))
    with running(server) as process:
        wait_for(server, process)
        yield server


def page_config(server: Started) -> dict:
    "What the server tells JupyterLab in its page."
    script = r'<script id="jupyter-config-data"[^>]*>(.+?)</script>'
    return json.loads(re.findall(script, server.get("lab"), flags=re.S)[0])


def test_a_learner_has_no_news_and_no_nbgrader_and_an_instructor_has(started):
    learner = started.application == "lab"
    config = page_config(started)
    known = [extension["name"] for extension in config["federated_extensions"]]
    assert NBGRADER in known, "nbgrader is not installed, so nothing is tested"
    disabled = set(config["disabledExtensions"])
    for extension in (NBGRADER, NEWS):
        assert (extension in disabled) == learner, extension
    assert "anywidget" not in disabled
    assert started.has("formgrader") != learner
    place = "lab/api/settings/@jupyterlab/apputils-extension:notification"
    settings = json.loads(started.get(place))["schema"]["properties"]
    assert (settings["fetchNews"]["default"] == "false") == learner
    assert settings["checkForUpdates"]["default"] != learner


@pytest.mark.slow
@pytest.mark.skipif(not READY, reason=NEEDS)
def test_what_a_learner_sees(started):
    learner = started.application == "lab"
    url = f"{started.root}/lab/tree/0_start/00_start.ipynb?token={started.token}"
    shots = os.environ.get("SOFLOW_SHOTS", "")
    shot = f"{shots}/{started.application}.png" if shots else ""
    seen = driven("lab.mjs", url=url, chromium=CHROMIUM, shot=shot)
    assert {"File", "Run", "Kernel"} <= set(seen["menus"])
    assert ("Nbgrader" in seen["menus"]) != learner
    assert ("Validate" in seen["toolbar"]) != learner
    assert not (learner and seen["notifications"])
