"""Each broken model gets its own verdict and each healthy one a clean one.

The limits were chosen on seeds 0 to 2; ten models with other seeds, other data and
other sizes are named blind."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock  # comes with torch

from helpers import PictureNetwork
from soflow_edu.config import make_config
from soflow_edu.core import InputError, build, names, refusal
from soflow_edu.diagnosis import (
    BREAKS,
    IN_THE_WEIGHTS,
    LONGER,
    PATTERNS,
    RECIPES,
    WARD,
    BackwardReadOut,
    Changed,
    Findings,
    JumpRows,
    Mirrored,
    MirrorView,
    Pattern,
    Posterior,
    Probe,
    Reason,
    UniformNoise,
    View,
    WithoutStop,
    coverage,
    diagnose,
    draw_diagnosis,
    facts_of,
    holds,
    last_weights,
    miswired,
    moved_and_scaled,
    noise_end,
    patient,
    reach,
    record_of,
    report_run,
    rewired,
    shape_of,
    spanless,
    suspicions,
    timeless,
    train_recipe,
    truth_of,
    unmoved,
    uses_schedule,
    wrapped,
)
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.odes import ExactFlow, OdeFlow
from soflow_edu.paths import LinearPath, TrigPath, expand
from soflow_edu.solution import SolutionModel, TrigCoefficients
from soflow_edu.training import (
    assemble,
    finish,
    save_run,
    train,
    trained,
)

# By seed; the chapter examines them all on eight_gaussians with seed 0.
DATA = {0: "eight_gaussians", 1: "grid_gaussians", 2: "pinwheel"}
HEALTHY = [name for name in RECIPES if name.startswith("healthy")]
BROKEN = [name for name in RECIPES if name not in HEALTHY] + list(BREAKS)
QUICK = {"healthy", "r_is_one", "shuffled_labels", "spanless", *BREAKS}
LAWS = ("law_0.75", "law_0.5", "law_0.25", "law_0")


def over_seeds(patients, seeds=(1, 0, 2)):
    "Each patient with each seed; quick are some of them with seed 1."
    cases = []
    for name in patients:
        for seed in seeds:
            slow = seed != 1 or name not in QUICK
            marks = [pytest.mark.slow] if slow else []
            cases.append(pytest.param(name, seed, marks=marks, id=f"{name}-{seed}"))
    return pytest.mark.parametrize("name, seed", cases)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_classes(distance, *stds):
    "A mixture of two Gaussians, each a class."
    means = torch.tensor([[-distance, 0.0], [distance, 0.0]])
    return GaussianMixture(means, torch.tensor(stds))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, request):
    """A fresh copy of the run of a name and seed.

    Each is trained once, by whichever of pytest's workers needs it first."""
    own = tmp_path_factory.getbasetemp()
    one_of_many = hasattr(request.config, "workerinput")
    folder = own.parent if one_of_many else own  # of all workers together

    def get(name, seed):
        if name in BREAKS:
            return BREAKS[name](get("healthy", seed))
        path = folder / f"{name}-{seed}.pt"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.set_num_threads(1)
                torch.save(patient(name, DATA[seed], seed), path)
        return torch.load(path, weights_only=False)

    return get


# ------------------------------------------------------------------------ verdicts
def diagnosis_of(run):
    "With the exact flow of a mixture; on the pinwheel, as with data, from samples."
    law = law_of(run.config.data)
    if isinstance(law, GaussianMixture):
        return diagnose(run, ExactFlow(law, run.model.path, rtol=1e-6))
    return diagnose(run, data=law)


@over_seeds(BROKEN)
def test_each_bug_gets_its_own_verdict(run_of, name, seed):
    found = diagnosis_of(run_of(name, seed))
    assert found.name == name, str(found)
    assert not found.sound and found.pattern.verdict in found.verdict
    assert "Seen" in found.verdict and "Cause" in found.verdict


# What only the record of a run tells has another name in the model alone.
OF_THE_MODEL = dict.fromkeys(("stale_average", "frozen", "no_velocity_rows"), "still")


@over_seeds(BROKEN)
def test_a_model_alone_with_samples_of_the_data(run_of, name, seed):
    found = diagnose(trained(run_of(name, seed)), data=law_of(DATA[seed]))
    assert found.name == OF_THE_MODEL.get(name, name), str(found)


@over_seeds(HEALTHY)
def test_healthy_models_get_a_clean_one(run_of, name, seed):
    found = diagnosis_of(run_of(name, seed))
    assert found.sound, str(found)
    assert not found.others


def test_the_verdicts_are_distinct():
    named = {pattern.name: pattern for pattern in PATTERNS}
    assert len(named) == len(PATTERNS) and set(BROKEN) <= set(named)
    assert len({named[name].verdict for name in BROKEN}) == len(BROKEN) >= 22


WITH_NOTHING = {  # what may be said of a bug that only truth, data or a record tell
    "mode_seeking": {"wrong_velocity", "unfinished"},
    "mirrored": {"wrong_velocity"},
    "labels_dropped": {"wrong_velocity", "still"},
    "narrow_times": {"wrong_velocity", "narrow_times"},
    "uniform_noise": {"wrong_velocity"},
    "stale_average": {"still"},
    "frozen": {"still"},
    "no_velocity_rows": {"still"},
    "shuffled_labels": {"sound", "corner", "unfinished"},  # right for other data
    "other_units": {"sound", "corner", "unfinished"},
}


@over_seeds([*HEALTHY, *BROKEN], seeds=[1])
def test_with_neither_truth_nor_data(run_of, name, seed):
    """Map and velocity are held against each other.

    What is wrong with the velocity itself is seen at t = 1 only, and the verdict says
    so. No verdict claims what only truth or data can confirm."""
    found = diagnose(trained(run_of(name, seed)))
    expected = "sound" if name in HEALTHY else name
    assert found.name in WITH_NOTHING.get(name, {expected}), str(found)
    assert "t = 1 only" in found.verdict and "inverse" not in found.measures
    assert "undo_mirrored" not in found.measures
    assert found.against == "the model's own velocity"


# ------------------------------------------------------------------------ blind
def random_labels(x0, y, generator):
    "Labels that nobody looked up."
    return x0, torch.randint(0, 9, y.shape, generator=generator)


def soflow(**settings):
    schedule = {"name": "exponential", "r_init": 1.0, "r_end": 0.1}
    return {"name": "soflow", "schedule": schedule, **settings}


STANDARDISED = partial(
    moved_and_scaled, factor=0.65, centre=torch.zeros(2), to=torch.tensor([0.5, -0.3])
)
LOW = {"velocity": (-2.2, 0.4), "t": (-2.2, 0.4), "s": (-3.5, 0.4)}
SMALL = {"network": {"name": "mlp", "width": 64, "depth": 5}}
# What happened, the seed, the data, and a recipe that no limit was chosen on.
TEN = [
    (
        "shuffled_labels",
        *(3, "grid_gaussians"),
        {"labels": True, "spoilt": {"law": partial(Changed, change=random_labels)}},
    ),
    (
        "labels_dropped",
        *(4, "two_moons"),
        {"labels": True, "objective": soflow(target={"name": "batch", "drop": 1.0})},
    ),
    (
        "narrow_times",
        *(5, "checkerboard"),
        {"objective": soflow(times={"name": "logit_normal", **LOW})},
    ),
    (
        "timeless",
        *(3, "two_moons"),
        {"objective": soflow(), "spoilt": {"model": partial(miswired, wrong=timeless)}},
    ),
    (
        "spanless",
        *(4, "checkerboard"),
        {
            "objective": "meanflow",
            "spoilt": {"model": partial(miswired, wrong=spanless)},
        },
    ),
    (
        "other_units",
        *(5, "swiss_roll"),
        {"spoilt": {"law": partial(Changed, change=STANDARDISED)}} | SMALL,
    ),
    ("frozen", 3, "swiss_roll", {"learning_rate": 0.0}),
    (
        "no_velocity_rows",
        4,
        "grid_gaussians",
        {"batch": 2, "objective": soflow(lam=0.4)},
    ),
    (
        "r_is_one",
        *(5, "two_moons"),
        {"objective": soflow(schedule={"name": "constant", "r_end": 1.0})} | SMALL,
    ),
    ("velocity_only", 3, "checkerboard", {"objective": "flow_matching"} | SMALL),
]
# Drawn up after a limit for labels_dropped had changed because of the first ten.
WELL = LONGER | SMALL
BRIEFLY = {"name": "exponential", "r_init": 1.0, "r_end": 0.1}
EARLIER = {"velocity": (-2.6, 0.6), "t": (-2.6, 0.6), "s": (-3.5, 0.6)}
TEN_MORE = [
    ("labels_dropped", 6, "circles", {"labels": True} | TEN[1][3]),
    (
        "uniform_noise",
        *(7, "checkerboard"),
        {"spoilt": {"objective": UniformNoise(schedule=BRIEFLY, lam=0.6)}} | SMALL,
    ),
    (
        "mirrored",
        *(8, "checkerboard"),
        {"spoilt": {"objective": Mirrored(schedule=BRIEFLY, lam=0.6)}} | SMALL,
    ),
    (
        "no_stop_gradient",
        *(6, "two_moons"),
        {"spoilt": {"objective": WithoutStop(schedule=BRIEFLY, lam=0.6)}} | SMALL,
    ),
    ("mode_seeking", 7, "grid_gaussians", {"objective": soflow(p=1.0)} | SMALL),
    (
        "narrow_times",
        *(6, "spirals"),
        {"objective": soflow(times={"name": "logit_normal", **EARLIER})} | SMALL,
    ),
    ("velocity_for_point", 8, "circles", WELL),
    ("sign_of_v", 8, "circles", WELL),
    ("stale_average", 8, "circles", WELL),
    ("swapped", 8, "circles", WELL),
]


def named_blind(cases):
    "What `diagnose` says to each model, without a hint of what was done to it."
    found = []
    for name, seed, data, recipe in cases:
        run = train_recipe(WARD | {"seed": seed, "data": data} | recipe)
        if name in BREAKS:
            run = BREAKS[name](run)
        found.append(diagnose(run).name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cases", [TEN, TEN_MORE], ids=["ten", "ten more"])
def test_ten_models_named_blind(cases):
    assert named_blind(cases) == [name for name, *_ in cases]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_rate_a_hundred_times_too_high_the_training_says_so(seed):
    recipe = WARD | {"learning_rate": 0.5, "data": DATA[seed], "seed": seed}
    said = refusal(train_recipe, recipe)
    assert "diverged" in said and "Lower learning_rate" in said


def t_is_s(t, d):
    return t - d, d


def test_a_further_wiring(run_of):
    assert diagnose(rewired(run_of("healthy", 1), t_is_s)).name == "t_is_s"


class Negative(torch.nn.Module):
    "A network whose output has the wrong sign."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, d, y=None):
        return -self.net(x, t, d, y)


class Backward(TrigCoefficients):
    "b has the wrong sign."

    def b(self, t, s):
        return -super().b(t, s)


def test_the_sign_of_the_network_and_of_other_coefficients(run_of):
    law = law_of(DATA[1])
    net = trained(run_of("healthy", 1)).net
    flow = ExactFlow(law, LinearPath(), rtol=1e-6)
    assert diagnose(SolutionModel(Negative(net)), flow).name == "sign_of_F"
    net = trained(run_of("healthy_trig", 1)).net
    flow = ExactFlow(law, TrigPath(), rtol=1e-6)
    backward = SolutionModel(net, "trigonometric", Backward())
    assert diagnose(backward, flow).name == "sign_of_b"


class PrecedingLabel(torch.nn.Module):
    "A network for labels from one, which gets labels from zero."

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.classes = net.classes

    def forward(self, x, t, d, y=None):
        return self.net(x, t, d, None if y is None else (y - 1) % self.classes)


class Muted(PrecedingLabel):
    "A network that never gets its label."

    def forward(self, x, t, d, y=None):
        return self.net(x, t, d)


@pytest.mark.slow
def test_labels_off_by_one_and_labels_that_never_arrive(run_of):
    net = trained(run_of("healthy_labels", 1)).net
    flow = ExactFlow(law_of(DATA[1]), LinearPath(), rtol=1e-6)
    assert diagnose(SolutionModel(PrecedingLabel(net)), flow).name == "labels_shifted"
    assert diagnose(SolutionModel(Muted(net)), flow).name == "label_unheard"


# ------------------------------------------------------------------------ exact maps
CLASSES = GaussianMixture(
    torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.4, 0.6])
)
LABELS = torch.arange(64) % 2
EXACT = {
    "linear": (ExactFlow(CLASSES, LinearPath(), rtol=1e-6), None),
    "trigonometric": (ExactFlow(CLASSES, TrigPath(), rtol=1e-6), None),
    "guided": (ExactFlow(CLASSES, LinearPath(), w=2.0, rtol=1e-6), LABELS),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_maps_are_sound(name):
    flow, labels = EXACT[name]
    found = diagnose(flow, flow, x1=randn(64, 2), y=labels, count=32)
    m = found.measures
    assert found.sound and m["velocity"] < 1e-5, str(found)
    assert m["corner"] < 1e-4 and m["inverse"] < 1e-3
    assert noise_end(View(flow), found.probe) < 1e-4
    assert all(0.5 < m[law] < 1.6 for law in LAWS)  # W2 over that of fresh sets


def test_the_exact_map_of_a_finite_set_is_sound():
    flow = ExactFlow(law_of("two_moons", 100), LinearPath(), rtol=1e-5)
    again = ExactFlow(law_of("two_moons", 100), LinearPath(), rtol=1e-5)
    assert diagnose(flow, again, count=32).sound


def test_a_bare_map():
    "It has neither velocity nor network."
    flow, _ = EXACT["guided"]
    found = diagnose(flow.solution, data=CLASSES, count=32)
    assert found.measures["velocity"] < 0.2


@pytest.mark.parametrize("path", [LinearPath(), TrigPath()])
def test_the_velocity_from_labelled_data(path):
    """The mean is that of the finite set that the pool is, and the squares are those
    of the conditional velocities."""
    data = FiniteSet(randn(300, 3), torch.arange(300) % 4)
    model = SimpleNamespace(path=path)
    noise = randn(64, 3, seed=1)
    probe = Probe(noise, model=model, source=data, labelled=True, count=16)
    estimate = Posterior(probe)
    pool, kinds = data.sample(2000, probe.generator(7))
    mean = FiniteSet(pool, kinds).velocity(probe.xv, probe.tv, path, probe.y)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    close(estimate.mean(estimate.logits), mean)

    t = probe.tv[:, None, None]
    x = probe.xv[:, None]
    z = randn(64, 3, seed=2)
    noise = (x - path.alpha(t) * pool) / path.beta(t)
    each = path.dalpha(t) * pool + path.dbeta(t) * noise
    squares = (each - z[:, None]).pow(2).mean(2)
    close(estimate.squares(z).float(), squares, atol=1e-3, rtol=1e-3)


def test_two_jumps_where_one_fails():
    """A map that is exact over at most half the time and stands still beyond.

    The samples in one step are the noise, those in two are right."""
    flow = ExactFlow(law_of("two_gaussians"), LinearPath(), rtol=1e-6)

    def half_a_map(x, t, s, y=None):
        too_long = expand(torch.as_tensor(t - s), x) > 0.5
        return torch.where(too_long, x, flow.solution(x, t, s))

    m = diagnose(half_a_map, flow, count=32).measures
    assert m["two_jumps"] < 1e-4 and m["way"] == 0
    assert m["corner"] == pytest.approx(1) and m["short"] < 1e-4


def test_guided_truth_is_told_from_an_unguided_map():
    classes = two_classes(1.0, 0.6, 0.6)
    y = torch.arange(128) % 2
    plain = ExactFlow(classes, LinearPath(), rtol=1e-6)
    guided = ExactFlow(classes, LinearPath(), w=4.0, rtol=1e-6)
    found = diagnose(plain, guided, x1=randn(128, 2), y=y, count=32)
    assert found.measures["velocity"] > 0.3 and found.measures["corner"] > 0.3


# ------------------------------------------------------------------------ pictures
PICTURES = FiniteSet(randn(40, 3, 8, 8), torch.arange(40) % 4)
PICTURES.name = "pictures of a test"  # as its configuration says
NOISE = {"x1": randn(32, 3, 8, 8, seed=1), "y": torch.arange(32) % 4}


@pytest.fixture(scope="module", params=[0, 60], ids=["untrained", "trained"])
def picture_run(request, tmp_path_factory):
    "The folder of a run on pictures, the run, and its number of real steps."
    settings = {
        "steps": request.param or 1,
        "batch": 32,
        "network": "picture",
        "objective": "soflow",
        "learning_rate": 1e-2 if request.param else 0.0,
        "data": "pictures of a test",
    }
    config = make_config(settings)
    model, objective = assemble(config)
    assert isinstance(model.net, PictureNetwork)
    folder = tmp_path_factory.mktemp("pictures") / "run"
    run = finish(train(model, objective, PICTURES, config, out=folder)).run
    return folder, run, request.param


# What is given, and whether the probe has labels then.
GIVEN = {
    "flow": ({}, True),
    "flow and noise": (NOISE, True),
    "teacher": (NOISE, True),
    "data": ({"data": PICTURES}, True),
    "points": ({"data": PICTURES.points}, False),
    "labelled points": ({"data": PICTURES.points, "y": PICTURES.labels}, True),
    "labelled noise": (NOISE, True),
    "noise": ({"x1": NOISE["x1"]}, False),
}


@pytest.mark.parametrize("given", GIVEN)
def test_pictures_with_labels(picture_run, given):
    """From the folder of a run, with the exact flow, with data, with nothing but noise.

    A network without training is still or wrong, never sound."""
    folder, run, steps = picture_run
    options, labelled = GIVEN[given]
    if "flow" in given:
        options = options | {"flow": ExactFlow(PICTURES, LinearPath(), rtol=1e-4)}
    if given == "teacher":
        options = options | {"flow": OdeFlow(trained(run))}
    found = diagnose(folder, **options, count=16)
    assert found.name in {pattern.name for pattern in PATTERNS}
    assert {"velocity", "corner", "semigroup", "coverage"} <= found.measures.keys()
    assert all(value == value for value in found.measures.values())
    if not steps and given != "teacher":
        assert found.name in {"still", "wrong_velocity", "frozen"}, str(found)
    assert (found.probe.y is not None) == labelled
    if given == "noise":
        assert len(found.figure().axes) == 3


# ------------------------------------------------------------------------ runs
def test_the_folder_of_a_run(tmp_path, capsys, run_of):
    "It finds the truth of its toy by itself, quotes its settings, and sees averages."
    folder = save_run(tmp_path / "run", run_of("r_is_one", 1))
    found = report_run(folder)
    assert found.name == "r_is_one" and found.against == "the truth"
    assert "r stayed at 1" in found.verdict
    assert str(found).strip() == capsys.readouterr().out.strip()
    assert "schedule.name = constant, schedule.r_end = 1.0" in found.verdict
    stale = save_run(tmp_path / "stale", run_of("stale_average", 1))
    assert diagnose(stale).name == "stale_average"
    (stale / "checkpoint.safetensors").unlink()
    assert diagnose(stale).name == "still"


def test_a_report_fits_a_page(run_of):
    "Every line of it; and no word of the verdict is lost."
    found = diagnose(run_of("r_is_one", 1), count=16)
    assert max(len(line) for line in str(found).splitlines()) <= 100
    assert wrapped(found.verdict).split() == found.verdict.split()
    assert str(found).endswith(wrapped(found.verdict))


def test_a_model_that_is_not_finite(run_of):
    run = run_of("healthy", 1)
    run.ema["net.outlet.bias"][0] = torch.nan
    found = diagnose(run)
    assert found.name == "not_finite" and "NaN" in found.verdict and str(found)
    assert "nothing to draw" in refusal(draw_diagnosis, found)


def test_a_run_that_was_too_short():
    run = patient("r_is_one", steps=10)
    assert diagnose(run).name in {"still", "wrong_velocity"}


def test_no_cause_that_the_objective_does_not_have(run_of):
    """The same model, with a record of the semigroup form, whose loss has no r, and of
    SoFlow without adaptive weights."""
    run = run_of("r_is_one", 1)
    semigroup = replace(run, objective={**run.objective, "name": "semigroup"})
    found = diagnose(semigroup, count=16)
    assert found.name == "straight_steps"
    assert "r stayed" not in found.verdict and "schedule" not in found.verdict
    unfinished = next(p for p in PATTERNS if p.name == "unfinished")
    facts = {"uses_r": 0.0, "coverage": 0.004}
    causes = [reason.cause for reason in unfinished.reasons if reason.fits(facts)]
    assert len(causes) == 2 and "t near 1 together with s near 0" in causes[-1]
    seeking = next(p for p in IN_THE_WEIGHTS if p.name == "mode_seeking")
    measures = {"velocity": 1.2, "moved_by_round": 0.0}
    assert seeking.fits(measures) and seeking.fits(measures | {"p": 1.0})
    assert not seeking.fits(measures | {"p": 0.0})


def test_which_losses_have_an_r():
    assert uses_schedule({"name": "soflow"}) and uses_schedule({"name": "alpha_flow"})
    for name in names("objective"):
        has_r = uses_schedule({"name": name})
        assert has_r == (name in {"soflow", "alpha_flow", "staged"}), name


def test_facts_of_a_run(run_of):
    run = run_of("healthy", 1)
    facts = facts_of(run)
    assert facts["velocity_rows"] == int(0.8 * 512) and facts["unmoved"] == 0
    assert facts["uses_r"] == 0 and facts["learns_map"] == 1 and facts["p"] == 0
    narrow = run.objective | {"times": {"name": "logit_normal", "velocity": (-3, 0.5)}}
    assert reach(replace(run, objective=narrow)) == 0 < reach(run)
    ice = replace(run, model=assemble(run.config)[0])
    assert len(unmoved(ice)) == len(list(run.model.parameters()))
    assert not unmoved(replace(run, config=replace(run.config, seed=99)))
    gone = replace(run.config, start_from="nowhere")
    assert unmoved(replace(ice, config=gone)) == [] and facts_of(None) == {}


def test_the_first_weights_leave_the_random_numbers_alone(run_of):
    run = run_of("healthy", 1)
    before = torch.get_rng_state()
    unmoved(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_coverage_is_the_share_of_training_pairs_near_the_corner(run_of):
    run = run_of("healthy", 1)

    def share(name):
        objective = run.objective | {"times": {"name": name}}
        return coverage(replace(run, objective=objective))

    assert share("uniform") == pytest.approx(0.02, abs=0.003)  # 2 x 0.1 x 0.1
    assert share("published") < 0.005 and coverage(run) > 0.3
    assert diagnose(run, count=16).measures["coverage"] == coverage(run)
    assert coverage(None) != coverage(None)  # NaN


def test_a_schedule_is_quoted_where_it_plays_a_part(run_of):
    semigroup = run_of("healthy", 1)
    assert "schedule" in semigroup.objective
    assert not [key for key in record_of(semigroup) if "schedule" in key]
    soflow = record_of(run_of("r_is_one", 1))
    assert soflow["objective.schedule.r_end"] == 1.0
    assert record_of(None) == {}


def test_dropout_rests_and_the_mode_is_restored(run_of):
    model = run_of("healthy", 1).model.train()
    diagnose(model, count=16)
    assert model.training


def test_the_same_seed_gives_the_same_findings(run_of):
    model = trained(run_of("healthy", 1))
    findings = []
    for seed in (0, 0, 1):
        found = diagnose(model, data=law_of(DATA[1]), seed=seed)
        findings.append(found.measures)
    first, again, other = findings
    assert first == again != other


# ------------------------------------------------------------------------ parts
CONDITIONS = {
    "a > b": True,
    "a > 1.9 b": True,
    "a > 2.1 b": False,
    "b < 0.6": True,
    "b <= b": True,
    "a < c": False,
    "c > 0": False,
    "a > -1": True,
    "c? > 0": True,
    "a? > 2": False,
    "a? < 2": True,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition):
    assert holds(condition, {"a": 1.0, "b": 0.5}) == CONDITIONS[condition]


def test_what_was_not_measured_fulfils_no_condition():
    assert not holds("bend < -0.2", {}) and holds("coverage? < 0.1", {})


def test_rows_and_noise_of_jumps():
    jumps = JumpRows(randn(64, 2), None, 16, 0)
    assert jumps.rows("short", "long").tolist() == [*range(16), *range(32, 48)]
    assert torch.equal(jumps.noise(2), jumps.noise(2))
    assert not torch.equal(jumps.noise(2), jumps.noise(3))


def test_findings_quote_the_settings_of_their_pattern():
    seeking = next(p for p in IN_THE_WEIGHTS if p.name == "mode_seeking")
    measures = {"velocity": 1.2, "moved_by_round": 0.0}
    found = Findings(measures, seeking, {"objective.p": 1.0, "seed": 0})
    assert found.name == "mode_seeking" and not found.sound
    assert found.settings == {"objective.p": 1.0}
    assert [pattern.name for pattern in found.others] == ["wrong_velocity"]


def test_the_last_weights_and_the_truth_of_a_run():
    run = patient("r_is_one", steps=10)
    assert last_weights(run) is run.model
    assert last_weights(replace(run, ema=run.model.state_dict())) is None
    law = truth_of(run)["flow"].distribution
    assert isinstance(law, GaussianMixture) and law.means.shape == (8, 2)
    assert isinstance(truth_of(run, "pinwheel")["data"], FiniteSet)


def test_the_shape_of_a_sample_follows_from_the_network():
    picture = SimpleNamespace(options={"channels": 3, "size": 8})
    assert shape_of(SimpleNamespace(net=picture)) == (3, 8, 8)
    assert shape_of(SolutionModel(build("network", "mlp", width=8))) == (2,)


def test_a_pattern_without_conditions_fits_always():
    assert Pattern("always", (), "").fits({})


def test_a_verdict_has_each_cause_that_fits_with_its_remedy():
    reasons = (
        Reason("One.", "Mend one."),
        Reason("Two.", "Mend two.", ("uses_r? > 0",)),
    )
    pattern = Pattern("two", ("corner > 0.5",), "Seen.", reasons, ("objective.times",))
    assert pattern.seen({"corner": 0.9, "long": 3.0}) == {"corner": 0.9}
    record = {"objective.times.name": "uniform", "objective.p": 0.0}
    found = Findings({"corner": 0.9}, pattern, record)
    assert found.settings == {"objective.times.name": "uniform"}
    assert [reason.fits({"uses_r": 0.0}) for reason in reasons] == [True, False]


@pytest.fixture
def random_model():
    "A map with weights that nobody trained, but that are not zero."
    torch.manual_seed(0)
    net = build("network", "mlp", width=16)
    torch.nn.init.normal_(net.outlet.weight)
    return SolutionModel(net)


@pytest.mark.parametrize("name", [name for name in BREAKS if name != "stale_average"])
def test_views_undo_what_was_done(random_model, name):
    "Exactly, for any weights."
    model = random_model
    x = torch.randn(64, 2)
    t = torch.rand(64) * 0.5 + 0.5
    s = torch.rand(64) * 0.5
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    run = replace(patient("r_is_one", steps=1), model=deepcopy(model), ema=ema)
    broken = trained(BREAKS[name](run))
    view = suspicions(broken)[name]
    torch.testing.assert_close(view.solution(x, t, s), model(x, t, s))
    torch.testing.assert_close(view.velocity(x, t), model.velocity(x, t))
    changed = broken(x, t, s) - model(x, t, s)
    if isinstance(broken.coefficients, BackwardReadOut):
        changed = broken.velocity(x, t) - model.velocity(x, t)
    assert changed.abs().mean() > 1e-2


def test_a_mirrored_view_reads_the_velocity_backwards(random_model):
    x = torch.randn(64, 2)
    t = torch.rand(64)
    backwards = MirrorView(random_model).velocity(x, t)
    torch.testing.assert_close(backwards, -random_model.velocity(x, 1 - t))


# ------------------------------------------------------------------------ bad input
def bare_map(x, t, s, y=None):
    return x


law = law_of("two_gaussians")
flow = ExactFlow(law, LinearPath(), rtol=1e-5)
plain = SolutionModel(build("network", {"name": "mlp", "width": 8}))
noise = torch.randn(8, 2)
BAD = [
    (partial(diagnose, "runs/nowhere"), "missing"),
    (partial(diagnose, 3.0), "cannot be diagnosed"),
    (partial(diagnose, plain, law), "ExactFlow(law, path)"),
    (partial(diagnose, plain, flow, data=law), "Both"),
    (partial(diagnose, plain, flow, count=4), "at least 16"),
    (partial(diagnose, plain, flow, x1=torch.randn(8, 3)), "shape of the data"),
    (partial(diagnose, plain, data=torch.randn(50, 3)), "(B, 2)"),
    (partial(diagnose, plain, data="eight_gaussians"), "sample(n, generator)"),
    (partial(diagnose, plain, flow, x1=noise, y=torch.zeros(5).long()), "5 labels for"),
    (
        partial(diagnose, plain, data=law, x1=noise, y=torch.zeros(8).long()),
        "Leave the labels out",
    ),
    (partial(diagnose, bare_map), "Give noise"),
    (partial(patient, "swaped"), "swapped"),
]


@pytest.mark.parametrize("action, hint", BAD)
def test_bad_input_is_refused_with_the_way_out(action, hint):
    with pytest.raises(InputError) as error:
        action()
    assert hint in str(error.value)
