"""Two widgets in a real JupyterLab and in Notebook 7, driven by mouse, keyboard and
touch in headless Chromium, and the page of chapter play inside both."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import ROOT
from soflow_edu.cifar10 import load_weights
from soflow_edu.core import InputError
from soflow_edu.distributions import law_of
from soflow_edu.play import runtime_folder, write_page

BROWSER = ROOT / "tests" / "browser"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, CHROMIUMS)), None)


def ready() -> bool:
    "Whether node, Chromium, its driver and the runtime of chapter play are here."
    try:
        runtime_folder()
    except InputError:
        return False
    driver = BROWSER / "node_modules/playwright-core/package.json"
    return bool(CHROMIUM and shutil.which("node") and driver.exists())


READY = ready()
NEEDS = "needs node, chromium and playwright-core: make browser"
pytestmark = [pytest.mark.skipif(not READY, reason=NEEDS), pytest.mark.slow]


def driven(script: str, **settings) -> dict:
    "What a script of tests/browser saw, which node runs with these settings."
    done = subprocess.run(
        ["node", BROWSER / script, json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# ------------------------------------------------------------ a server with a notebook
CELLS = [
    "from soflow_edu.widgets import drag_noise, training_film\n"
    "noise = drag_noise()\n"
    "noise",
    "film = training_film()\nfilm",
    "print(noise.values, film.values)",
    "from IPython.display import IFrame\nIFrame('play.html', width='100%', height=760)",
    # One call that does not let go: a recent kernel answers widgets beside a cell that
    # sleeps, in a thread of their own.
    "print(sum(range(500_000_000)))",
]
NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
PLACES = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR",
)
MODULES = {"lab": "jupyterlab", "notebook": "notebook"}
ADDRESSES = {"lab": "lab/tree", "notebook": "notebooks"}


def code_cell(number: int, source: str) -> dict:
    return {
        "cell_type": "code",
        "id": f"cell-{number}",
        "metadata": {},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


def notebook() -> str:
    cells = [code_cell(number, source) for number, source in enumerate(CELLS)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole)


def fill(folder: Path):
    "Writes the notebook, the page of chapter play, and settings that ask nothing."
    (folder / "widgets.ipynb").write_text(notebook())
    law = law_of("eight_gaussians")
    write_page(folder / "play.html", load_weights("plane-labelled"), law)
    news = folder / "JUPYTERLAB_SETTINGS_DIR" / NEWS
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Server:
    "A Jupyter server on 127.0.0.1."

    application: str
    folder: Path
    port: int
    token: str

    @property
    def cwd(self) -> Path:
        return self.folder

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        "The address of the notebook."
        place = ADDRESSES[self.application]
        return f"{self.root}/{place}/widgets.ipynb?token={self.token}"

    @property
    def options(self) -> list[str]:
        "Of any server here: a port of ours, and no browser."
        return [
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
        ]

    @property
    def command(self) -> list[str]:
        program = [sys.executable, "-m", MODULES[self.application]]
        return [*program, *self.options, f"--ServerApp.root_dir={self.folder}"]

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.root}/api", timeout=5)
        except OSError:
            return False
        return True


@contextmanager
def running(server: Server) -> Iterator[subprocess.Popen]:
    "The process of a server, which writes below its folder only; ended afterwards."
    places = {name: str(server.folder / name) for name in PLACES}
    with open(server.log, "w") as log:
        process = subprocess.Popen(
            server.command,
            cwd=server.cwd,
            env=os.environ | places | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(server: Server, process: subprocess.Popen):
    "Waits two minutes at most."
    for _ in range(240):
        assert process.poll() is None, server.log.read_text()[-3000:]
        if server.answers():
            return
        time.sleep(0.5)


@pytest.fixture(params=["lab", "notebook"])
def jupyter(request, tmp_path) -> Iterator[Server]:
    "A server of its own, with its settings in a temporary folder."
    fill(tmp_path)
    server = Server(request.param, tmp_path, free_port(), secrets.token_hex(16))
    with running(server) as process:
        wait_for(server, process)
        yield server


# ------------------------------------------------------------------------- the test
def check_noise(seen: dict):
    "The widget that lets one drag the noise answers mouse, keyboard and touch."
    start = seen["start"]
    dragged = seen["dragged"]
    keyed = seen["keyed"]
    touched = seen["touched"]
    across, up = dragged["values"][:2]
    assert dragged["picture"] != start["picture"]
    assert across > 0 > up, "the pointer went right of the middle and below it"
    assert f"Noise ({across:.2f}, {up:.2f})" in dragged["words"]

    assert keyed["picture"] != dragged["picture"]
    assert keyed["values"][0] == pytest.approx(across + 0.15)
    differs = "what the keyboard reaches differs from what the mouse reached"
    assert seen["back"] == dragged, differs
    moved = "the arrow keys of a slider moved to another cell"
    assert seen["activeAfter"] == seen["activeBefore"], moved
    assert seen["tabbed"] == "noise, second coordinate"

    across, up = touched["values"][:2]
    assert across < 0 < up, "the finger touched left of the middle and above it"
    values = f"'x': {across}, 'y': {up}"
    assert values in seen["printed"], "the kernel holds other values than the page"


def check_film(seen: dict):
    "The widget that shows a training goes to its end and back."
    assert seen["End"]["words"].startswith("After 6,000 of 6,000")
    assert seen["Home"]["words"].startswith("After 0 of")
    assert seen["End"]["picture"] != seen["Home"]["picture"]
    assert "'frame': 0" in seen["printed"]


def check_busy(seen: dict):
    "While the kernel counts, the widget says so; afterwards it has followed."
    waiting = seen["busy"]
    assert seen["quiet"] == "" and waiting["said"].startswith("The kernel is busy")
    assert waiting["words"] == waiting["before"], "the kernel was not busy"
    assert seen["awake"].startswith("After 6,000 of 6,000")


def test_widgets_and_the_page_to_play_with_answer(jupyter):
    lab = jupyter.application == "lab"
    seen = driven(
        "drive.mjs",
        url=jupyter.url,
        chromium=CHROMIUM,
        lab=lab,
        shots=os.environ.get("SOFLOW_SHOTS", ""),
    )
    check_noise(seen)
    check_film(seen)
    check_busy(seen)
    runs = "learned map, one evaluation: (1.5" in seen["inside"]
    assert runs, "the page of chapter play does not run inside the notebook"
    if lab:
        ink = seen["darkInk"].strip("rgba()").split(",")[:3]
        assert seen["darkChanged"]
        darkest = min(int(part) for part in ink)
        assert darkest > 180, "the ink does not follow the dark theme"
