"Each broken model gets its own verdict and each healthy one a clean one, with seeds, and on one data set, that the limits were not chosen on."
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock     # comes with torch
from helpers import PictureNetwork

from soflow_edu.config import make_config
from soflow_edu.core import InputError, build
from soflow_edu.diagnosis import BREAKS, PATTERNS, RECIPES, MirrorView, Pattern, Posterior, Probe, View, coverage, diagnose, holds, noise_end, patient, report_run, rewired, suspicions
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.paths import LinearPath, TrigPath, expand
from soflow_edu.solution import SolutionModel, TrigCoefficients
from soflow_edu.training import assemble, resume_run, save_run, train, trained

DATA = {1: "grid_gaussians", 2: "pinwheel"}   # by seed; the chapter examines them all on eight_gaussians with seed 0
HEALTHY = [name for name in RECIPES if name.startswith("healthy")]
BROKEN = [name for name in RECIPES if name not in HEALTHY] + list(BREAKS)


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, worker_id):
    "A fresh copy of the run of a name and seed. Each is trained once, by whichever of pytest's workers needs it first."
    own = tmp_path_factory.getbasetemp()
    folder = own if worker_id == "master" else own.parent     # of all workers of this session

    def get(name, seed):
        if name in BREAKS:
            return BREAKS[name](get("healthy", seed))
        path = folder / f"{name}-{seed}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.set_num_threads(1)
                save_run(path, patient(name, DATA[seed], seed))
        return resume_run(path)

    return get


def diagnosis_of(run, seed):
    "With the exact flow of a mixture; on the pinwheel, as with real data, from samples only."
    law = law_of(run.config.data)
    return diagnose(run, **({"flow": ExactFlow(law, run.model.path, rtol=1e-6)} if isinstance(law, GaussianMixture) else {"data": law}))


@pytest.mark.parametrize("seed", DATA)
@pytest.mark.parametrize("name", BROKEN)
def test_each_bug_gets_its_own_verdict(run_of, name, seed):
    found = diagnosis_of(run_of(name, seed), seed)
    assert found.name == name, str(found)
    assert not found.sound and found.pattern.cause in found.verdict


@pytest.mark.parametrize("seed", DATA)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_get_a_clean_one(run_of, name, seed):
    found = diagnosis_of(run_of(name, seed), seed)
    assert found.sound, str(found)
    assert not found.others


def test_the_verdicts_are_distinct():
    named = {pattern.name: pattern for pattern in PATTERNS}
    assert len(named) == len(PATTERNS) and set(BROKEN) <= set(named)
    assert len({named[name].verdict for name in BROKEN}) == len(BROKEN) >= 10


BLIND = {"mode_seeking": {"wrong_velocity", "unfinished", "mirrored"}, "mirrored": {"mirrored", "wrong_velocity"}, "stale_average": {"stale_average", "still"}}


@pytest.mark.parametrize("name", [*HEALTHY, *BROKEN])
def test_with_neither_truth_nor_data(run_of, name):
    "Map and velocity are held against each other; what is wrong with the velocity itself is seen at t = 1 only, and the verdict says so."
    found = diagnose(trained(run_of(name, 1)))
    assert found.name in BLIND.get(name, {"sound" if name in HEALTHY else name}), str(found)
    assert "t = 1 only" in found.verdict and found.against == "the model's own velocity" and "inverse" not in found.measures


@pytest.mark.parametrize("name, wrong", [("t_is_s", lambda t, d: (t - d, d))])
def test_further_wirings(run_of, name, wrong):
    assert diagnose(rewired(run_of("healthy", 1), wrong)).name == name


def test_the_sign_of_the_network_and_of_other_coefficients(run_of):
    class Negative(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t, d, y=None):
            return -self.net(x, t, d, y)

    class Backward(TrigCoefficients):
        def b(self, t, s):
            return -super().b(t, s)

    flow = lambda path: ExactFlow(law_of(DATA[1]), path, rtol=1e-6)
    assert diagnose(SolutionModel(Negative(trained(run_of("healthy", 1)).net)), flow(LinearPath())).name == "sign_of_F"
    net = trained(run_of("healthy_trig", 1)).net
    assert diagnose(SolutionModel(net, "trigonometric", Backward()), flow(TrigPath())).name == "sign_of_b"


def test_exact_maps_are_sound():
    "On both paths, guided and not, with labels, of a finite set; and a teacher that equals its pupil."
    classes, y = GaussianMixture(torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.4, 0.6])), torch.arange(64) % 2
    x1 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for flow, labels in ((ExactFlow(classes, LinearPath(), rtol=1e-6), None), (ExactFlow(classes, TrigPath(), rtol=1e-6), None), (ExactFlow(classes, LinearPath(), w=2.0, rtol=1e-6), y)):
        found = diagnose(flow, flow, x1=x1, y=labels, count=32)
        assert found.sound and found.measures["velocity"] < 1e-5 and found.measures["corner"] < 1e-4 and found.measures["inverse"] < 1e-3, str(found)
        assert noise_end(View(flow), found.probe) < 1e-4
        assert all(0.5 < found.measures[f"law_{s}"] < 1.6 for s in ("0.75", "0.5", "0.25", "0")), "W2 over its floor"
    assert diagnose(ExactFlow(law_of("two_moons", 100), LinearPath(), rtol=1e-5), ExactFlow(law_of("two_moons", 100), LinearPath(), rtol=1e-5), count=32).sound
    bare = lambda x, t, s, y=None: flow.solution(x, t, s, y)          # no velocity, no network
    assert diagnose(bare, data=classes, count=32).measures["velocity"] < 0.2


@pytest.mark.parametrize("path", [LinearPath(), TrigPath()])
def test_the_velocity_from_labelled_data(path):
    "The mean is that of the finite set that the pool is, and the squares are those of the conditional velocities."
    data = FiniteSet(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 4)
    probe = Probe(SimpleNamespace(path=path), None, data, torch.randn(64, 3, generator=torch.Generator().manual_seed(1)), None, 16, 0, labelled=True)
    estimate, (pool, kinds) = Posterior(probe), data.sample(2000, probe.generator(7))
    torch.testing.assert_close(estimate.mean(estimate.logits), FiniteSet(pool, kinds).velocity(probe.xv, probe.tv, path, probe.y), atol=1e-4, rtol=1e-4)
    t, x, z = probe.tv[:, None, None], probe.xv[:, None], torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    each = path.dalpha(t) * pool + path.dbeta(t) * (x - path.alpha(t) * pool) / path.beta(t)
    torch.testing.assert_close(estimate.squares(z).float(), (each - z[:, None]).pow(2).mean(2), atol=1e-3, rtol=1e-3)


def test_two_jumps_where_one_fails():
    "A map that is exact over at most half the time and stands still beyond: the samples in one step are the noise, those in two are right."
    flow = ExactFlow(law_of("two_gaussians"), LinearPath(), rtol=1e-6)
    m = diagnose(lambda x, t, s, y=None: torch.where(expand(torch.as_tensor(t - s), x) > 0.5, x, flow.solution(x, t, s)), flow, count=32).measures
    assert m["two_jumps"] < 1e-4 and m["way"] == 0 and m["corner"] == pytest.approx(1) and m["short"] < 1e-4


def test_guided_truth_is_told_from_an_unguided_map():
    classes, y = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.6, 0.6])), torch.arange(128) % 2
    plain, guided = (ExactFlow(classes, LinearPath(), w=w, rtol=1e-6) for w in (1.0, 4.0))
    found = diagnose(plain, guided, x1=torch.randn(128, 2, generator=torch.Generator().manual_seed(0)), y=y, count=32)
    assert found.measures["velocity"] > 0.3 and found.measures["corner"] > 0.3


@pytest.mark.parametrize("rounds", [0, 60])
def test_pictures_with_labels(tmp_path, rounds):
    "Of any shape: with the exact flow, with data, with nothing but noise; from the folder of a run; a network without training is still or wrong, never sound."
    data = FiniteSet(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4)
    config = make_config({"steps": rounds or 1, "batch": 32, "network": "picture", "objective": "soflow", "learning_rate": 1e-2 if rounds else 0.0, "data": "pictures of a test"})
    model, objective = assemble(config)
    for step in train(model, objective, data, config, out=tmp_path / "run"):
        pass
    x1, y = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 4
    exact, teacher = ExactFlow(data, LinearPath(), rtol=1e-4), OdeFlow(trained(step.run))
    for given in ({"flow": exact}, {"flow": exact, "x1": x1, "y": y}, {"flow": teacher, "x1": x1, "y": y}, {"data": data}, {"data": data.points}, {"data": data.points, "y": data.labels}, {"x1": x1, "y": y}, {"x1": x1}):
        found = diagnose(tmp_path / "run", **given, count=16)
        assert found.name in {pattern.name for pattern in PATTERNS} and {"velocity", "corner", "semigroup", "coverage"} <= found.measures.keys()
        assert all(value == value for value in found.measures.values())
        assert rounds or given.get("flow") is teacher or found.name in {"still", "wrong_velocity"}, str(found)
        assert (found.probe.y is None) == (given.keys() in ({"data"}, {"x1"}) and given.get("data") is not data)
    assert len(found.figure().axes) == 3
    assert isinstance(model.net, PictureNetwork)


def test_the_folder_of_a_run(tmp_path, capsys, run_of):
    "It finds the truth of its toy by itself, quotes its settings, and sees a stale average."
    folder = save_run(tmp_path / "run", run_of("r_is_one", 1))
    found = report_run(folder)
    assert found.name == "r_is_one" and found.against == "the truth" and str(found).strip() == capsys.readouterr().out.strip()
    assert "schedule.name = constant, schedule.r_end = 1.0" in found.verdict
    stale = save_run(tmp_path / "stale", run_of("stale_average", 1))
    assert diagnose(stale).name == "stale_average"
    (stale / "checkpoint.safetensors").unlink()
    assert diagnose(stale).name == "still"


def test_a_model_that_is_not_finite(run_of):
    run = run_of("healthy", 1)
    run.ema["net.outlet.bias"][0] = torch.nan
    found = diagnose(run)
    assert found.name == "not_finite" and "NaN" in found.verdict and str(found)


def test_a_run_that_was_too_short():
    run = patient("r_is_one", steps=10)
    assert diagnose(run).name in {"still", "wrong_velocity"}


def test_coverage_is_the_share_of_training_pairs_near_the_corner(run_of):
    run = run_of("healthy", 1)
    share = lambda times: coverage(replace(run, objective=run.objective | {"times": times}))
    assert share({"name": "uniform"}) == pytest.approx(0.02, abs=0.003)     # 2 x 0.1 x 0.1
    assert share({"name": "published"}) < 0.005 and coverage(run) > 0.3
    assert diagnose(run, count=16).measures["coverage"] == coverage(run) and coverage(None) != coverage(None)


def test_dropout_rests_and_the_mode_is_restored(run_of):
    model = run_of("healthy", 1).model.train()
    diagnose(model, count=16)
    assert model.training


def test_the_same_seed_gives_the_same_findings(run_of):
    model = trained(run_of("healthy", 1))
    first, again, other = (diagnose(model, data=law_of(DATA[1]), seed=seed).measures for seed in (0, 0, 1))
    assert first == again != other


def test_conditions():
    m = {"a": 1.0, "b": 0.5}
    for condition, truth in {"a > b": True, "a > 1.9 b": True, "a > 2.1 b": False, "b < 0.6": True, "b <= b": True, "a < c": False, "c > 0": False, "a > -1": True, "c? > 0": True, "a? > 2": False, "a? < 2": True}.items():
        assert holds(condition, m) == truth
    assert Pattern("always", (), "", "", "").fits({})


def test_views_undo_what_was_done():
    "Exactly, for any weights; and a mirrored view of a mirrored flow is the flow."
    torch.manual_seed(0)
    net = build("network", "mlp", width=16)
    torch.nn.init.normal_(net.outlet.weight)
    model, x, t, s = SolutionModel(net), torch.randn(64, 2), torch.rand(64) * 0.5 + 0.5, torch.rand(64) * 0.5
    for name, breaking in BREAKS.items():
        if name == "stale_average":
            continue
        run = replace(patient("r_is_one", steps=1), model=deepcopy(model), ema={key: value.clone() for key, value in model.state_dict().items()})
        broken = trained(breaking(run))
        view = suspicions(broken)[name]
        torch.testing.assert_close(view.solution(x, t, s), model(x, t, s))
        torch.testing.assert_close(view.velocity(x, t), model.velocity(x, t))
        assert (broken(x, t, s) - model(x, t, s)).abs().mean() > 1e-2
    torch.testing.assert_close(MirrorView(model).velocity(x, t), -model.velocity(x, 1 - t))


flow = ExactFlow(law_of("two_gaussians"), LinearPath(), rtol=1e-5)
plain = SolutionModel(build("network", {"name": "mlp", "width": 8}))
BAD = [
    (lambda: diagnose("runs/nowhere"), "missing"),
    (lambda: diagnose(3.0), "cannot be diagnosed"),
    (lambda: diagnose(plain, law_of("two_gaussians")), "ExactFlow(law, path)"),
    (lambda: diagnose(plain, flow, data=law_of("two_gaussians")), "Both"),
    (lambda: diagnose(plain, flow, count=4), "at least 16"),
    (lambda: diagnose(plain, flow, x1=torch.randn(8, 3)), "shape of the data"),
    (lambda: diagnose(plain, data=torch.randn(50, 3)), "(B, 2)"),
    (lambda: diagnose(plain, data="eight_gaussians"), "sample(n, generator)"),
    (lambda: diagnose(plain, flow, x1=torch.randn(8, 2), y=torch.zeros(5).long()), "5 labels for 8"),
    (lambda: diagnose(plain, data=law_of("two_gaussians"), x1=torch.randn(8, 2), y=torch.zeros(8).long()), "Leave the labels out"),
    (lambda: diagnose(lambda x, t, s, y=None: x), "Give noise"),
    (lambda: patient("swaped"), "swapped"),
]


@pytest.mark.parametrize("action, hint", BAD)
def test_bad_input_is_refused_with_the_way_out(action, hint):
    with pytest.raises(InputError) as error:
        action()
    assert hint in str(error.value)
