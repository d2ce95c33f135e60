"Two widgets in a real JupyterLab and in Notebook 7, driven by mouse, keyboard and touch in headless Chromium, and the page of chapter play inside both."
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
from pathlib import Path

import pytest

from soflow_edu.cifar10 import load_weights
from soflow_edu.core import InputError
from soflow_edu.distributions import law_of
from soflow_edu.play import runtime_folder, write_page

BROWSER = Path(__file__).parent / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
READY = CHROMIUM and shutil.which("node") and (BROWSER / "node_modules/playwright-core/package.json").exists()
try:
    runtime_folder()
except InputError:
    READY = False
CELLS = ["from soflow_edu.widgets import drag_noise, training_film\nnoise = drag_noise()\nnoise", "film = training_film()\nfilm", "print(noise.values, film.values)",
         "from IPython.display import IFrame\nIFrame('play.html', width='100%', height=760)"]

pytestmark = pytest.mark.skipif(not READY, reason="needs node, chromium and playwright-core: make browser")


def notebook() -> str:
    cells = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": source, "outputs": [], "execution_count": None} for i, source in enumerate(CELLS)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture(params=["lab", "notebook"])
def jupyter(request, tmp_path):
    "A server of its own on 127.0.0.1, with its settings in a temporary folder: the application and the address of a notebook."
    (tmp_path / "widgets.ipynb").write_text(notebook())
    write_page(tmp_path / "play.html", load_weights("plane-labelled"), law_of("eight_gaussians"))
    quiet = tmp_path / "JUPYTERLAB_SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings"     # no question about news over the page
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, place = secrets.token_hex(16), {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", {"lab": "jupyterlab", "notebook": "notebook"}[request.param], "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=os.environ | place | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield request.param, f"http://127.0.0.1:{port}/{'lab/tree' if request.param == 'lab' else 'notebooks'}/widgets.ipynb?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def test_widgets_and_the_page_to_play_with_answer(jupyter):
    application, url = jupyter
    settings = {"url": url, "chromium": CHROMIUM, "lab": application == "lab", "shots": os.environ.get("SOFLOW_SHOTS", "")}
    done = subprocess.run(["node", str(BROWSER / "drive.mjs"), json.dumps(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    start, dragged, keyed, back, touched = (seen[name] for name in ("start", "dragged", "keyed", "back", "touched"))

    assert dragged["picture"] != start["picture"] and dragged["values"][0] > 0 > dragged["values"][1], "the pointer went right of the middle and below it"
    assert f"Noise ({dragged['values'][0]:.2f}, {dragged['values'][1]:.2f})" in dragged["words"]
    assert keyed["picture"] != dragged["picture"] and keyed["values"][0] == pytest.approx(dragged["values"][0] + 0.15)
    assert back == dragged, "what the keyboard reaches differs from what the mouse reached"
    assert seen["activeAfter"] == seen["activeBefore"], "the arrow keys of a slider moved to another cell"
    assert seen["tabbed"] == "noise, second coordinate"
    assert touched["values"][0] < 0 < touched["values"][1], "the finger touched left of the middle and above it"
    assert f"'x': {touched['values'][0]}, 'y': {touched['values'][1]}" in seen["printed"], "the kernel holds other values than the page"

    assert seen["End"]["words"].startswith("After 6,000 of 6,000") and seen["Home"]["words"].startswith("After 0 of")
    assert seen["End"]["picture"] != seen["Home"]["picture"] and "'frame': 0" in seen["printed"]
    assert "learned map, one evaluation: (1.5" in seen["inside"], "the page of chapter play does not run inside the notebook"
    if application == "lab":
        assert seen["darkChanged"] and min(int(part) for part in seen["darkInk"].strip("rgba()").split(",")[:3]) > 180, "the ink does not follow the dark theme"
