"The page of chapter play: what it answers in a browser, beside what Python answers, and how it is written."
import json
import os
import subprocess

import pytest
import torch
from test_browser import BROWSER, CHROMIUM, READY

from soflow_edu import play
from soflow_edu.cifar10 import load_weights
from soflow_edu.core import InputError
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.odes import ExactFlow, integrate
from soflow_edu.paths import LinearPath
from soflow_edu.play import page, runtime_folder, to_onnx, write_page

QUESTIONS = 40


@pytest.fixture(scope="module")
def model():
    return load_weights("plane-labelled")


def questions():
    g = torch.Generator().manual_seed(0)
    for k in range(QUESTIONS):
        t = 1.0 if k % 2 else 0.3 + 0.7 * torch.rand(1, generator=g).item()
        s = 0.0 if k % 4 == 1 else t * torch.rand(1, generator=g).item()
        yield {"x": torch.randn(2, generator=g).tolist(), "t": t, "s": s, "n": 1 + k % 8, "y": None if k % 3 == 0 else k % 8, "w": 2.0 if k % 5 == 0 else 1.0}


def answers(model, flow_of, x, t, s, n, y, w):
    "What Python says to a question: the learned map, the exact end, Euler's end."
    x, none, label = torch.tensor([x]), torch.tensor([8]), torch.tensor([8 if y is None else y])
    mixed = (lambda f: f(label)) if y is None or w == 1 else (lambda f: w * f(label) + (1 - w) * f(none))
    field = type("Field", (), {"velocity": lambda self, x, t, y=None: mixed(lambda label: model.velocity(x, t, label))})()
    exact = flow_of(w).solution(x, t, s, None if y is None else label)
    return mixed(lambda label: model(x, t, s, label))[0], exact[0], integrate(field, x, t, s, method="euler", steps=n).x[0]


@pytest.mark.skipif(not READY, reason="needs node, chromium and playwright-core: make browser")
def test_page_answers_as_python_does_to_mouse_keyboard_and_touch(model, tmp_path):
    law, asked = law_of("eight_gaussians"), list(questions())
    path = write_page(tmp_path / "play.html", model, law)
    settings = {"url": path.as_uri(), "chromium": CHROMIUM, "questions": asked, "shots": os.environ.get("SOFLOW_SHOTS", "")}
    done = subprocess.run(["node", str(BROWSER / "play.mjs"), json.dumps(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert not seen["requests"] and not seen["errors"] and not any(seen["overflow"].values())

    flows = {w: ExactFlow(law, LinearPath(), w) for w in (1.0, 2.0)}
    gaps = []
    with torch.no_grad():
        for question, found in zip(asked, seen["answers"], strict=True):
            learned, exact, euler = answers(model, flows.get, **question)
            assert (torch.tensor(found["map"]) - learned).abs().max() < 1e-4, question
            assert (torch.tensor(found["euler"]) - euler).abs().max() < 1e-4, question
            gaps.append((torch.tensor(found["exact"]) - exact).norm().item())
    assert sorted(gaps)[QUESTIONS // 2] < 1e-4 and sorted(gaps)[-3] < 1e-2      # where trajectories part, a last digit may decide

    assert min(seen["medians"]) <= 8, f"milliseconds of work in a frame: {seen['medians']}"
    place = lambda a, b: [3.2 * (2 * a - 1), 3.2 * (1 - 2 * b)]
    close = lambda x, y: x == pytest.approx(y, abs=0.03)
    dragged, keyed, slid, guided, own, touched = (seen[name] for name in ("dragged", "keyed", "slid", "guided", "own", "touched"))
    assert close(dragged["state"]["x"], place(0.4, 0.36)) and "learned map, one evaluation" in dragged["words"]
    assert keyed["state"]["x"] == pytest.approx([dragged["state"]["x"][0] + 0.1, dragged["state"]["x"][1] - 0.25])
    assert slid["state"]["t"] == pytest.approx(0.7) and slid["state"]["x"] == keyed["state"]["x"]
    assert guided["state"]["y"] == 2 and guided["state"]["w"] == 2.5 and "two learned maps, mixed" in guided["words"]
    assert len(own["state"]["own"]) == 4 and own["ends"].get("map") is None and own["state"]["y"] is None
    points = torch.tensor([point["mean"] for point in own["state"]["own"]])
    assert close(points[0].tolist(), place(0.3, 0.3)) and points[3].tolist() == pytest.approx(own["state"]["x"])
    truth = ExactFlow(FiniteSet(points), LinearPath()).solution(torch.tensor([own["state"]["x"]]), 1.0, 0.0)[0]
    assert own["ends"]["exact"][-1] == pytest.approx(truth.tolist(), abs=2e-3)
    assert seen["cleared"]["ends"] is None and seen["back"]["state"]["own"] is None and seen["back"]["ends"]["map"]
    assert close(touched["state"]["x"], place(0.25, 0.25)) and seen["ground"] == "rgb(22, 24, 28)"


@pytest.fixture
def stand_in(tmp_path):
    "A folder with files named as those of the runtime."
    for name in play.RUNTIME:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_page_is_whole_and_fetches_nothing(model, stand_in):
    text = page(model, law_of("eight_gaussians"), runtime=stand_in)
    assert "%%" not in text and "http" not in text.replace("http-equiv", "") and text.count("<script") == 3
    content = json.loads(text.partition('id="content">')[2].partition("</script>")[0])
    assert content["classes"] == 8 and len(content["law"]) == 8 and content["map"] != content["velocity"]
    assert text == page(model, law_of("eight_gaussians"), runtime=stand_in), "the same page twice differs"


def test_an_interrupted_write_leaves_the_old_page(model, stand_in, monkeypatch):
    path = stand_in / "play.html"
    path.write_text("old")
    monkeypatch.setattr(play, "to_onnx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(path, model, law_of("eight_gaussians"), runtime=stand_in)
    assert path.read_text() == "old"


def test_graph_without_classes_and_of_other_paths():
    from soflow_edu.core import build
    from soflow_edu.solution import SolutionModel

    plain = SolutionModel(build("network", {"name": "mlp", "width": 16}), "trigonometric", "trigonometric")
    torch.nn.init.normal_(plain.net.outlet.weight)
    import onnxruntime

    session = onnxruntime.InferenceSession(to_onnx(plain, "map"), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["x", "t", "s"]
    x, t = torch.randn(5, 2), torch.linspace(0.2, 1, 5)
    found = session.run(["out"], {"x": x.numpy(), "t": t.numpy(), "s": (t / 3).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), plain(x, t, t / 3).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="linear path"):
        page(plain, law_of("eight_gaussians"))


REFUSED = [(lambda m: to_onnx(m, "maps"), "map"), (lambda m: page(m, law_of("eight_gaussians"), runtime="."), "npm install"),
           (lambda m: page(m, GaussianMixture(torch.eye(2), torch.ones(2), labels=torch.tensor([0, 9]))), "labels \\[9\\]"), (lambda m: runtime_folder("nowhere"), "npm install"),
           (lambda m: play.components(law_of("digits")), "plane")]


@pytest.mark.parametrize("action, hint", REFUSED)
def test_bad_input_says_what_to_do(model, action, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=hint):
        action(model)
