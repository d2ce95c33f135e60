"What crosses chapters: the map reaches the truth from samples alone, and the same verbs carry pictures."
import json
import time
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from soflow_edu import training
from soflow_edu.comparing import compare
from soflow_edu.config import load_config, make_config, replacing
from soflow_edu.core import InputError, build, register
from soflow_edu.soflow import Rows, output_ahead
from soflow_edu.distributions import FiniteSet, GaussianMixture, law_of
from soflow_edu.flow_matching import Batch
from soflow_edu.odes import ExactFlow, OdeFlow, integrate
from soflow_edu.paths import LinearPath, TrigPath
from soflow_edu.sampling import sample
from soflow_edu.solution import SolutionModel, rms, semigroup_defect
from soflow_edu.training import assemble, begin, load_run, read_tensors, resume_run, save_run, train, trained

class SamplesOnly:
    "Hides everything of a law but its samples."

    def __init__(self, law):
        self.sample = law.sample


def run_to_end(config, data, **options):
    model, objective = assemble(config)
    for step in train(model, objective, data, config, **options):
        pass
    return step


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_step_map_reaches_the_truth_from_samples_only(seed):
    "With a tenth of the samples of the demo, whose own limit is 0.05."
    law = law_of("eight_gaussians")
    step = run_to_end(replace(load_config("plane"), steps=1000, batch=384, seconds=None, seed=seed), SamplesOnly(law))
    report = compare(trained(step.run), ExactFlow(law, LinearPath()), metrics=("one_step", "transport"))
    assert report.values["relative_rmse"] < 0.1
    assert report.values["w2_one_step"] < 2 * report.values["w2_floor"]


@pytest.mark.parametrize("name", ["two_gaussians", "grid_gaussians", "two_moons", "word"])
def test_same_recipe_on_other_data(name):
    law = law_of(name)
    step = run_to_end(replace(load_config("plane"), data=name, steps=500, batch=384, seconds=None, warmup=50), SamplesOnly(law))
    x1 = torch.randn(128, 2, generator=torch.Generator().manual_seed(5))
    report = compare(trained(step.run), ExactFlow(law, LinearPath()), x1, metrics=("one_step",))
    untrained = rms(x1 - report.comparison.truth) / rms(report.comparison.truth)
    assert report.values["relative_rmse"] < 0.6 * untrained


SHORT = {"name": "soflow", "schedule": {"name": "exponential", "r_init": 1.0, "r_end": 0.05}}


@pytest.mark.parametrize("path, coefficients, objective", [(path, coefficients, objective) for path in ("linear", "trigonometric") for coefficients in ("euler", "trigonometric") for objective in (SHORT, "semigroup")] + [("linear", "data", SHORT)], ids=str)
def test_every_pair_of_path_and_coefficients_trains(path, coefficients, objective):
    config = replace(load_config("plane"), path=path, coefficients=coefficients, objective=objective, steps=600, seconds=None, batch=256, learning_rate=4e-3)
    law = law_of("eight_gaussians")
    step = run_to_end(config, SamplesOnly(law))
    assert compare(trained(step.run), ExactFlow(law, build("path", path)), metrics=("one_step",)).values["relative_rmse"] < 0.4


@register("network", "picture")
class PictureNetwork(nn.Module):
    "A small network for pictures with labels, of which the library knows nothing."

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 4):
        super().__init__()
        self.options, self.classes = {"channels": channels, "width": width, "classes": classes}, classes
        self.inlet, self.outlet = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.times, self.labels = nn.Linear(2, width), nn.Embedding(classes + 1, width)

    def spec(self):
        return {"name": "picture"} | self.options

    def forward(self, x, t, d, y=None):
        y = torch.full_like(t, self.options["classes"], dtype=torch.long) if y is None else y
        h = self.inlet(x) + (self.times(torch.stack([t, d], 1)) + self.labels(y))[:, :, None, None]
        return self.outlet(torch.nn.functional.silu(h))


@pytest.mark.parametrize("objective", ["flow_matching", "soflow", "semigroup"])
def test_extra_inputs_reach_every_call_of_the_network(objective):
    "A network that fails without its extra input, of the right rows, trains with each target."
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 2)

        def forward(self, x, t, d, y=None, *, angle):
            assert angle.shape == t.shape and torch.equal(angle.round(), angle)
            return self.net(torch.cat([x, t[:, None], d[:, None], angle[:, None]], 1))

    model, g = SolutionModel(Extra()), torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(20, 2, generator=g), extras={"angle": torch.arange(20.0)})
    for target in ("conditional", "own"):
        made = build("objective", objective) if objective == "flow_matching" else build("objective", objective, target=target, lam=0.4)
        loss = made.loss(model, batch, made.draw(batch, 0.5, g), 0.5)
        loss.value.backward()
        assert loss.value.isfinite() and model.net.net.weight.grad.abs().sum() > 0


GUIDED = {"name": "soflow", "lam": 0.5, "target": {"name": "guided", "w": 2.0, "m": 0.5}}


@pytest.mark.parametrize("objective", ["flow_matching", "soflow", "semigroup", "meanflow", "shortcut", "staged", "consistency", {"name": "semigroup", "target": "batch", "jumps": 2}, GUIDED], ids=lambda o: o if isinstance(o, str) else f"{o['name']}-{len(o)}")
def test_pictures_pass_through_all_verbs_unchanged(tmp_path, objective):
    pictures = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = FiniteSet(pictures, torch.arange(40) % 4)
    config = make_config({"steps": 200, "batch": 32, "network": "picture", "objective": objective, "learning_rate": 1e-2})
    step = run_to_end(config, data, out=tmp_path / "run")
    assert objective == "consistency" or step.run.log[-1]["velocity_mse"] < 0.98 * step.run.log[0]["velocity_mse"]
    run = load_run(tmp_path / "run")
    x1, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(run.model(x1, 1.0, 0.0, y), trained(step.run)(x1, 1.0, 0.0, y))
    for sampler in ("renoise", "jump"):
        assert sample(run.model, x1, 2, sampler, y, torch.Generator().manual_seed(0)).shape == x1.shape
    for flow in (ExactFlow(data, LinearPath()), OdeFlow(run.model)):
        report = compare(run.model, flow, x1, y)
        assert 0 < report.values["relative_rmse"] < 10 and report.results["evaluations"]
        assert len(report.figure().axes) >= 3


@register("network", "dropout")
class DropoutNetwork(nn.Module):
    "A network that uses torch's global random numbers."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def spec(self):
        return {"name": "dropout"}

    def forward(self, x, t, d, y=None):
        return self.net(torch.cat([x, t[:, None], d[:, None]], 1))


@pytest.mark.parametrize("network", ["dropout", {"name": "mlp", "width": 16, "classes": 5}], ids=["dropout", "labels"])
def test_resume_is_exact_to_the_bit(tmp_path, network):
    config = make_config({"steps": 40, "batch": 32, "checkpoint_every": 15, "objective": "soflow" if network == "dropout" else GUIDED, "network": network, "device": "cpu"})
    law = law_of("pinwheel", 200)
    whole = run_to_end(config, law, out=tmp_path / "whole")
    model, objective = assemble(config)
    for step in train(model, objective, law, config, out=tmp_path / "cut"):
        if step.number == 33:
            break
    torch.manual_seed(99)
    run = resume_run(tmp_path / "cut")
    assert run.step == 30
    for again in train(run.model, objective, law, run.config, resume=run, out=tmp_path / "cut"):
        pass
    for name, value in whole.run.model.state_dict().items():
        assert torch.equal(value, again.run.model.state_dict()[name]) and torch.equal(whole.ema[name], again.ema[name])
    for name in ("model.safetensors", "checkpoint.safetensors"):
        a, b = (read_tensors(tmp_path / folder / name)[0] for folder in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    strip = lambda log: [{key: value for key, value in row.items() if key != "seconds"} for row in log]
    assert strip(whole.run.log) == strip(again.run.log)


def test_a_run_is_resumed_only_as_itself(tmp_path):
    config = make_config({"steps": 4, "batch": 8, "network": {"name": "mlp", "width": 16}, "objective": "flow_matching", "checkpoint_every": 2})
    model, objective = assemble(config)
    law = law_of("two_gaussians")
    for step in train(model, objective, law, config, out=tmp_path / "run"):
        if step.number == 2:
            break
    run = resume_run(tmp_path / "run")
    for arguments, hint in (((model, objective), "its own model"), ((run.model, build("objective", "soflow")), "same one")):
        with pytest.raises(InputError, match=hint):
            next(train(*arguments, law, config, resume=run))
    (tmp_path / "run/checkpoint.safetensors").unlink()
    load_run(tmp_path / "run")
    with pytest.raises(InputError, match="not trained further"):
        resume_run(tmp_path / "run")


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@dataclass
class Slowing:
    "Data that take CPU seconds to draw, after the first calls, as on a machine that becomes slower."

    law: object
    delay: float
    calls: int = 0

    def sample(self, n, generator):
        self.calls += 1
        burn(self.delay * (self.calls > 60))
        return self.law.sample(n, generator)


@pytest.mark.parametrize("delay", [0.0, 0.005])
def test_a_budget_is_used_up_and_the_schedules_come_to_their_end(delay):
    config = make_config({"seconds": 2.0, "batch": 64, "network": "dropout", "objective": "flow_matching", "device": "cpu", "decay": "linear"})
    begin(*assemble(config), config)        # what a process loads for its first run is not counted
    before = time.process_time()
    step = run_to_end(config, Slowing(law_of("two_gaussians"), delay))
    assert 1.7 < time.process_time() - before < 2.3
    assert step.number == step.steps and step.run.optimiser.param_groups[0]["lr"] < 0.1 * config.learning_rate


def test_the_clock_starts_when_the_run_stands(monkeypatch):
    def slow(*given):
        burn(1)
        return begin(*given)
    monkeypatch.setattr(training, "begin", slow)
    step = run_to_end(make_config({"steps": 3, "batch": 16, "objective": "flow_matching", "device": "cpu"}), law_of("two_gaussians"))
    assert 0 < step.seconds < 0.8


def damage(folder, how):
    model = folder / "model.safetensors"
    if how == "missing":
        model.unlink()
    elif how == "cut":
        model.write_bytes(model.read_bytes()[:500])
    elif how == "foreign":
        save_file({"weight": torch.zeros(3)}, model)
    elif how == "text":
        model.write_text("weights")
    else:
        tensors, about = read_tensors(model)
        if how == "misspelt key":
            about["config"] += "lerning_rate: 1.0\n"
        elif how == "other network":
            about["model"]["network"]["width"] = 8
        elif how == "missing tensor":
            del tensors["net.inlet.bias"]
        save_file(tensors, model, {"about": json.dumps(about)})


@pytest.mark.parametrize("how", ["missing", "cut", "foreign", "text", "misspelt key", "other network", "missing tensor"])
def test_damaged_runs_are_refused_in_words(tmp_path, how):
    config = make_config({"steps": 2, "batch": 8, "network": {"name": "mlp", "width": 16}, "objective": "flow_matching"})
    run_to_end(config, law_of("two_gaussians"), out=tmp_path / "run")
    load_run(tmp_path / "run")
    damage(tmp_path / "run", how)
    with pytest.raises(InputError) as error:
        load_run(tmp_path / "run")
    assert len(str(error.value)) > 40


def test_hidden_labels_are_the_null_label_in_every_call():
    "The network never sees the label of a row that was drawn as hidden, nor the null label elsewhere but for the velocity of all data."
    class Spy(nn.Module):
        classes, seen = 3, []

        def forward(self, x, t, d, y=None):
            self.seen.append(y.clone())
            return x

    net, g = Spy(), torch.Generator().manual_seed(0)
    batch, objective = Batch(torch.randn(400, 2, generator=g), torch.arange(400) % 3), build("objective", GUIDED)
    draws = objective.draw(batch, 0.5, g)
    objective.loss(SolutionModel(net), batch, draws, 0.5)
    assert 20 < draws.dropped.sum() < 70
    n, expected = draws.regressed, batch.y.masked_fill(draws.dropped, 3)
    unlabelled = lambda count: torch.full((count,), 3)
    calls = [torch.cat([unlabelled(400 - n), expected[n:]]), expected[n:], expected, unlabelled(n)]      # guided step, look ahead, the call with gradient, guided regression
    assert len(net.seen) == len(calls) and all(torch.equal(y, known) for y, known in zip(net.seen, calls))


@pytest.mark.parametrize("broken", ["checkpoint.safetensors", "model.safetensors", "run.json", "log.csv"])
def test_a_run_that_dies_while_saving_can_be_resumed(tmp_path, monkeypatch, broken):
    "The write of one file fails, as on a full disk; the folder still holds a checkpoint to go on from, and nothing half written."
    config = make_config({"steps": 20, "batch": 8, "network": {"name": "mlp", "width": 16}, "objective": "flow_matching", "checkpoint_every": 10})
    model, objective = assemble(config)
    law = law_of("two_gaussians")
    whole = replacing

    def full(path):
        if path.name == broken and resume_run(tmp_path / "run").step == (10 if broken == "checkpoint.safetensors" else 20):
            raise OSError(28, "No space left on device")
        return whole(path)

    steps = train(model, objective, law, config, out=tmp_path / "run")
    for _ in range(10):
        next(steps)
    monkeypatch.setattr("soflow_edu.training.replacing", full)
    with pytest.raises(InputError, match="No space left"):
        for _ in steps:
            pass
    assert resume_run(tmp_path / "run").step == (10 if broken == "checkpoint.safetensors" else 20)
    load_run(tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    config = make_config({"steps": 2, "batch": 8, "network": {"name": "mlp", "width": 16}, "objective": "flow_matching"})
    step = run_to_end(config, law_of("two_gaussians"), out=tmp_path / "run")
    step.ema["net.inlet.bias"][0] = torch.nan
    with pytest.raises(InputError, match="nothing was saved"):
        save_run(tmp_path / "run", step.run)
    assert load_run(tmp_path / "run").ema["net.inlet.bias"].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu(tmp_path):
    law = law_of("eight_gaussians")
    config = replace(load_config("plane"), steps=2000, seconds=None, device="cuda")
    step = run_to_end(config, SamplesOnly(law), out=tmp_path / "run")
    model = load_run(tmp_path / "run").model
    report = compare(model, ExactFlow(law, LinearPath()))
    assert next(model.parameters()).is_cuda and report.values["relative_rmse"] < 0.15 and report.figure()
    assert compare(model, OdeFlow(model), torch.randn(64, 2), metrics="one_step").values["relative_rmse"] < 0.2
    again = run_to_end(config, SamplesOnly(law))
    assert all(torch.allclose(step.ema[name], again.ema[name], rtol=1e-2, atol=1e-3) for name in step.ema)


def test_the_loss_keeps_its_digits_for_short_jumps():
    "In float32 the loss of jumps of 0.002, of which x_l takes a tenth, is closer to that of float64 than a difference of two maps could be."
    torch.manual_seed(0)
    net, g = build("network", "mlp"), torch.Generator().manual_seed(0)
    nn.init.normal_(net.outlet.weight)
    t = torch.full((512,), 0.5)
    x0, draws = torch.randn(512, 2, generator=g), (torch.randn(512, 2, generator=g), t, t - 0.002, t - 0.0002)
    objective = build("objective", "soflow", lam=0.0)

    def rows(kind):
        model = SolutionModel(net.to(kind))
        x1, *times = (part.to(kind) for part in draws)
        xt, v = model.path.interpolate(x0.to(kind), x1, times[0])
        rows = Rows(xt, v, *times)
        return objective.solution_loss(model, rows, model.F(xt, *times[:2]), v, output_ahead(model, rows, v)).weighted.double()

    exact = rows(torch.float64)
    error = ((rows(torch.float32) - exact).norm() / exact.norm()).item()
    assert error < 1.5e-5


def test_the_network_is_given_t_and_t_minus_s():
    class Probe(nn.Module):
        def forward(self, x, t, d, y=None):
            self.seen = t, d
            return x

    probe = Probe()
    SolutionModel(probe)(torch.zeros(2, 2), torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.4]))
    torch.testing.assert_close(torch.stack(probe.seen), torch.tensor([[0.9, 0.5], [0.7, 0.1]]))


def test_renoising_keeps_the_law_of_the_exact_map():
    "For one Gaussian every number of steps gives its mean and its spread, on both paths."
    law = GaussianMixture(torch.tensor([[2.0, -1.0]]), torch.tensor([0.3]))
    for path in (LinearPath(), TrigPath()):
        x0 = sample(ExactFlow(law, path), torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)), 3, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(x0.mean(0), law.means[0], atol=0.02, rtol=0)
        torch.testing.assert_close(x0.std(0), law.stds[0], atol=0.01, rtol=0)


def test_exact_map_keeps_the_semigroup_in_many_dimensions():
    g = torch.Generator().manual_seed(0)
    data = FiniteSet(torch.randn(20, 2, 4, 4, generator=g))
    for path in (LinearPath(), TrigPath()):
        flow = ExactFlow(data, path)
        x1 = torch.randn(5, 2, 4, 4, generator=g).double()
        t, l, s = (torch.full((5,), value).double() for value in (1.0, 0.4, 0.1))
        assert semigroup_defect(flow.solution, x1, t, l, s) < 1e-4


BAD = [
    (lambda: make_config({"lerning_rate": 1}), "learning_rate"),
    (lambda: build("path", "linaer"), "linear"),
    (lambda: build("coefficients", "eular"), "euler"),
    (lambda: build("schedule", "cosin"), "cosine"),
    (lambda: build("objective", {"name": "soflow", "lamda": 1}), "lam"),
    (lambda: build("objective", {"name": "soflow", "schedule": "exponental"}), "exponential"),
    (lambda: law_of("eight_gausians"), "eight_gaussians"),
    (lambda: load_config("plain"), "plane"),
    (lambda: sample(SolutionModel(build("network", "mlp")), torch.zeros(2, 2), 1, "jmup"), "jump"),
    (lambda: SolutionModel(build("network", "mlp"))(torch.zeros(2, 2), 0.1, 0.5), "s <= t"),
    (lambda: SolutionModel(build("network", "mlp"))(torch.zeros(2, 2), 1.5, 0.5), "<= 1"),
    (lambda: SolutionModel(build("network", "mlp"))(torch.zeros(2, 2), torch.ones(3), 0.5), "2 samples"),
    (lambda: SolutionModel(build("network", "mlp"))(torch.zeros(2, 3), 1.0, 0.5), "(2, 3)"),
    (lambda: FiniteSet(torch.empty(0, 2)), "empty"),
    (lambda: FiniteSet(torch.full((3, 2), torch.nan)), "NaN"),
    (lambda: build("target", "exact"), "flow"),
    (lambda: build("objective", {"name": "semigroup", "velocity_weight": [1.0]}), "two positive numbers"),
    (lambda: build("objective", {"name": "staged", "until": 1.0}), "must lie between 0 and 1"),
    (lambda: build("objective", {"name": "staged", "then": "soflw"}), "soflow"),
    (lambda: build("times", {"name": "corner", "t1": 0.9, "s0": 0.9}), "sum of at most 1"),
    (lambda: compare(SolutionModel(build("network", "mlp")), ExactFlow(law_of("two_moons", 50), LinearPath()), metrics=("one_stp",)), "one_step"),
    (lambda: build("network", "mlp")(torch.zeros(2, 2), torch.ones(2), torch.ones(2), torch.zeros(2).long()), "classes"),
    (lambda: integrate(SolutionModel(build("network", "mlp")), torch.zeros(2, 2), 1.0, 0.0, method="rk45"), "rk4"),
    (lambda: ExactFlow(law_of("two_moons", 50), LinearPath()).solution(torch.zeros(2, 2), 0.0, 1.0), "cannot go back"),
    (lambda: LinearPath().interpolate(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3)), "(4, 2)"),
]


@pytest.mark.parametrize("action, hint", BAD)
def test_bad_input_is_refused_with_the_way_out(action, hint):
    with pytest.raises(InputError) as error:
        action()
    assert hint in str(error.value)
