"""The page of chapter play: what it answers in a browser, beside what Python answers,
and how it is written."""

import json
import os
import subprocess
from functools import partial

import pytest
import torch

from soflow_edu import play
from soflow_edu.cifar10 import load_weights
from soflow_edu.core import InputError, build
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.odes import ExactFlow, integrate
from soflow_edu.paths import LinearPath
from soflow_edu.play import page, runtime_folder, to_onnx, write_page
from soflow_edu.solution import SolutionModel
from test_browser import BROWSER, CHROMIUM, READY

QUESTIONS = 40


@pytest.fixture(scope="module")
def model():
    return load_weights("plane-labelled")


# ------------------------------------------------------------------- in a browser
def questions():
    g = torch.Generator().manual_seed(0)
    for k in range(QUESTIONS):
        t = 1.0 if k % 2 else 0.3 + 0.7 * torch.rand(1, generator=g).item()
        s = 0.0 if k % 4 == 1 else t * torch.rand(1, generator=g).item()
        yield {
            "x": torch.randn(2, generator=g).tolist(),
            "t": t,
            "s": s,
            "n": 1 + k % 8,
            "y": None if k % 3 == 0 else k % 8,
            "w": 2.0 if k % 5 == 0 else 1.0,
        }


class Field:
    "A velocity of x and t as something that `integrate` follows."

    def __init__(self, velocity):
        self.of = velocity

    def velocity(self, x, t, y=None):
        return self.of(x, t)


def answers(model, flow_of, x, t, s, n, y, w):
    "What Python says to a question: the learned map, the exact end, Euler's end."
    x = torch.tensor([x])
    none = torch.tensor([8])
    label = torch.tensor([8 if y is None else y])

    def mixed(f, *given):
        if y is None or w == 1:
            return f(*given, label)
        return w * f(*given, label) + (1 - w) * f(*given, none)

    learned = mixed(model, x, t, s)
    exact = flow_of(w).solution(x, t, s, None if y is None else label)
    field = Field(partial(mixed, model.velocity))
    euler = integrate(field, x, t, s, method="euler", steps=n).x
    return learned[0], exact[0], euler[0]


def in_browser(path, asked):
    "What a browser saw when a page was asked, dragged, keyed and touched."
    settings = {
        "url": path.as_uri(),
        "chromium": CHROMIUM,
        "questions": asked,
        "shots": os.environ.get("SOFLOW_SHOTS", ""),
    }
    command = ["node", str(BROWSER / "play.mjs"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_answers(model, law, asked, found):
    "The page's answers are Python's."
    flows = {w: ExactFlow(law, LinearPath(), w) for w in (1.0, 2.0)}
    gaps = []
    for question, answer in zip(asked, found, strict=True):
        with torch.no_grad():
            learned, exact, euler = answers(model, flows.get, **question)
        by_page = {name: torch.tensor(end) for name, end in answer.items()}
        assert (by_page["map"] - learned).abs().max() < 1e-4, question
        assert (by_page["euler"] - euler).abs().max() < 1e-4, question
        gaps.append((by_page["exact"] - exact).norm().item())
    gaps.sort()
    assert gaps[QUESTIONS // 2] < 1e-4
    assert gaps[-3] < 1e-2  # where trajectories part, a last digit may decide


def place(a, b):
    "The point of the plane at shares of the width and the height."
    return [3.2 * (2 * a - 1), 3.2 * (1 - 2 * b)]


def close(x, y):
    return x == pytest.approx(y, abs=0.03)


def check_moves(seen):
    "Mouse, keyboard, sliders and touch move what they are to move."
    dragged = seen["dragged"]
    assert close(dragged["state"]["x"], place(0.4, 0.36))
    assert "learned map, one evaluation" in dragged["words"]

    keyed = seen["keyed"]["state"]
    x, y = dragged["state"]["x"]
    assert keyed["x"] == pytest.approx([x + 0.1, y - 0.25])

    slid = seen["slid"]["state"]
    assert slid["t"] == pytest.approx(0.7) and slid["x"] == keyed["x"]

    guided = seen["guided"]
    assert guided["state"]["y"] == 2 and guided["state"]["w"] == 2.5
    assert "two learned maps, mixed" in guided["words"]

    assert close(seen["touched"]["state"]["x"], place(0.25, 0.25))
    assert seen["ground"] == "rgb(22, 24, 28)"


def check_own_points(seen):
    "Points of the reader's own are a finite set, which has no learned map."
    own = seen["own"]
    state = own["state"]
    assert len(state["own"]) == 4 and state["y"] is None
    assert own["ends"].get("map") is None
    points = torch.tensor([point["mean"] for point in state["own"]])
    assert close(points[0].tolist(), place(0.3, 0.3))
    assert points[3].tolist() == pytest.approx(state["x"])
    flow = ExactFlow(FiniteSet(points), LinearPath())
    truth = flow.solution(torch.tensor([state["x"]]), 1.0, 0.0)[0]
    assert own["ends"]["exact"][-1] == pytest.approx(truth.tolist(), abs=2e-3)
    assert seen["cleared"]["ends"] is None
    assert seen["back"]["state"]["own"] is None and seen["back"]["ends"]["map"]


@pytest.mark.skipif(
    not READY, reason="needs node, chromium and playwright-core: make browser"
)
@pytest.mark.slow
def test_page_answers_as_python_does_to_mouse_keyboard_and_touch(model, tmp_path):
    law = law_of("eight_gaussians")
    asked = list(questions())
    seen = in_browser(write_page(tmp_path / "play.html", model, law), asked)
    assert not seen["requests"] and not seen["errors"]
    assert not any(seen["overflow"].values())
    check_answers(model, law, asked, seen["answers"])
    medians = seen["medians"]
    assert min(medians) <= 8, f"milliseconds of work in a frame: {medians}"
    check_moves(seen)
    check_own_points(seen)


# ------------------------------------------------------------------- without one
@pytest.fixture
def stand_in(tmp_path):
    "A folder with files named as those of the runtime."
    for name in play.RUNTIME:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.slow
def test_page_is_whole_and_fetches_nothing(model, stand_in):
    text = page(model, law_of("eight_gaussians"), runtime=stand_in)
    assert "%%" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<script") == 3
    _, _, rest = text.partition('id="content">')
    content = json.loads(rest.partition("</script>")[0])
    assert content["classes"] == 8 and len(content["law"]) == 8
    assert content["map"] != content["velocity"]
    again = page(model, law_of("eight_gaussians"), runtime=stand_in)
    assert text == again, "the same page twice differs"


def test_an_interrupted_write_leaves_the_old_page(model, stand_in, monkeypatch):
    path = stand_in / "play.html"
    path.write_text("old")
    monkeypatch.setattr(play, "to_onnx", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(path, model, law_of("eight_gaussians"), runtime=stand_in)
    assert path.read_text() == "old"


def test_graph_without_classes_and_of_other_paths():
    import onnxruntime

    network = build("network", {"name": "mlp", "width": 16})
    plain = SolutionModel(network, "trigonometric", "trigonometric")
    torch.nn.init.normal_(plain.net.outlet.weight)
    graph = to_onnx(plain, "map")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["x", "t", "s"]
    x = torch.randn(5, 2)
    t = torch.linspace(0.2, 1, 5)
    inputs = {"x": x.numpy(), "t": t.numpy(), "s": (t / 3).numpy()}
    found = torch.from_numpy(session.run(["out"], inputs)[0])
    truth = plain(x, t, t / 3).detach()
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="linear path"):
        page(plain, law_of("eight_gaussians"))


def strange_law():
    "Two Gaussians, one with a label that the network does not know."
    labels = torch.tensor([0, 9])
    return GaussianMixture(torch.eye(2), torch.ones(2), labels=labels)


def page_without_runtime(model):
    return page(model, law_of("eight_gaussians"), runtime=".")


REFUSED = [
    (lambda model: to_onnx(model, "maps"), "map"),
    (page_without_runtime, "npm install"),
    (lambda model: page(model, strange_law()), "labels \\[9\\]"),
    (lambda model: runtime_folder("nowhere"), "npm install"),
    (lambda model: play.components(law_of("digits")), "plane"),
]


@pytest.mark.parametrize("action, hint", REFUSED)
def test_bad_input_says_what_to_do(model, action, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=hint):
        action(model)
