"One loop on any machine: micro-batches, processes, precision, layout, compiling, optimisers, signals, full disks."
import json
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm

from soflow_edu.config import load_config, make_config
from soflow_edu.core import InputError
from soflow_edu.distributions import law_of
from soflow_edu.training import advance, assemble, begin, generator_of, gradient, load_run, resume_run, save_checkpoint, shares, train

UNET = {"name": "unet", "size": 8, "channels": 2, "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.3, "augment": 6}
SMALL = {"steps": 4, "batch": 16, "network": UNET, "objective": {"name": "soflow", "lam": 0.5}, "seed": 4}


class Pictures:
    "Noise in the shape of small pictures, with augmentation labels."
    def sample(self, n, generator):
        return torch.randn(n, 2, 8, 8, generator=generator), None, {"augment": torch.randn(n, 6, generator=generator)}


def started(config):
    "A run whose weights are all random, so that every gradient differs from zero."
    model, objective = assemble(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run = begin(model, objective, config)
    return run, objective


def flat(model): return torch.cat([p.grad.flatten() for p in model.parameters()])
def apart(a, b): return ((a - b).norm() / b.norm()).item()


def program(*words, folder, **options):
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300, **options)


def test_micro_batches_give_the_mean_of_their_gradients():
    run, objective = started(make_config(SMALL | {"accumulate": 4}))
    advance(run, objective, Pictures())
    total = 0
    for micro in range(4):
        alone, _ = started(make_config(SMALL | {"accumulate": 1}))
        gradient(alone, objective, Pictures(), micro, 4)
        total = total + flat(alone.model) / 4
    assert apart(flat(run.model), total) < 1e-6


def test_micro_batches_draw_numbers_of_their_own():
    a, b = (torch.rand(4, generator=generator_of(0, 7, micro=micro)) for micro in range(2))
    assert not torch.equal(a, b)


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_scale import Pictures, SMALL, advance, flat, make_config, started
from soflow_edu.training import join_processes, leave_processes
torch.set_num_threads(1)
rank = join_processes("cpu")
run, objective = started(make_config(SMALL | {{"accumulate": int(sys.argv[1])}}))
numbers = advance(run, objective, Pictures())
torch.save((rank, flat(run.model), numbers["loss"], torch.cat([w.flatten() for w in run.ema.values()])), sys.argv[2] + str(rank))
leave_processes()
"""


def test_two_processes_give_the_gradients_of_one_that_accumulates(tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    found = {}
    for count, each in ((1, 4), (2, 2)):
        done = program("torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "job.py", str(each), f"out{count}.", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found[count] = [torch.load(tmp_path / f"out{count}.{rank}", weights_only=True) for rank in range(count)]
    one, (first, second) = found[1][0], found[2]
    assert [first[0], second[0]] == [0, 1]
    assert torch.equal(first[1], second[1]) and torch.equal(first[3], second[3])          # both ranks hold the same gradient and average
    assert apart(first[1], one[1]) < 1e-6 and abs(first[2] - one[2]) < 1e-6 * abs(one[2])


def test_accelerate_starts_the_same_loop(tmp_path):
    words = ["train", "plane", "steps=6", "batch=32", "threads=1"]
    many = program("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "soflow_edu", *words, "--out", "many", folder=tmp_path)
    assert many.returncode == 0, many.stderr
    assert warm.run("soflow", *words, "accumulate=2", "--out", "one", cwd=tmp_path).returncode == 0
    a, b = (load_run(tmp_path / name) for name in ("many", "one"))
    assert apart(*(torch.cat([w.flatten() for w in run.ema.values()]) for run in (a, b))) < 1e-3     # AdamW enlarges the rounding of gradients near zero
    assert [row["step"] for row in a.log] == [6] and abs(a.log[0]["loss"] - b.log[0]["loss"]) < 1e-5
    assert not list(tmp_path.glob("many-*"))                                              # only one process made the folder


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(InputError, match="multiple"): make_config({"steps": 1, "batch": 10, "accumulate": 4})
    assert shares(make_config({"steps": 1, "batch": 12, "accumulate": 3})) == (range(3), 4)


def test_bfloat16_computes_inside_and_answers_in_float32():
    gradients = {}
    for precision in ("float32", "bfloat16"):
        run, objective = started(make_config(SMALL | {"precision": precision, "network": UNET | {"dropout": 0.0}}))
        seen = set()
        run.model.net.enc["8x8_conv"].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
        advance(run, objective, Pictures())
        gradients[precision] = flat(run.model)
        assert seen == {getattr(torch, precision)}
        x, t = torch.randn(2, 2, 8, 8), torch.ones(2)
        assert run.model.F(x, t, 0 * t).dtype == torch.float32 and all(w.dtype == torch.float32 for w in run.ema.values())
    assert 1e-5 < apart(gradients["bfloat16"], gradients["float32"]) < 0.1


def test_channels_last_changes_the_layout_and_not_the_numbers():
    runs = {}
    for layout in (False, True):
        run, objective = started(make_config(SMALL | {"channels_last": layout, "network": UNET | {"dropout": 0.0}}))     # masks are drawn in the order of memory
        advance(run, objective, Pictures())
        runs[layout] = run
    assert runs[True].model.net.enc["8x8_conv"].weight.is_contiguous(memory_format=torch.channels_last)
    assert apart(flat(runs[True].model), flat(runs[False].model)) < 1e-4


def test_a_compiled_network_trains_saves_and_resumes(tmp_path):
    config = make_config({"steps": 4, "batch": 16, "network": {"name": "mlp", "width": 16, "depth": 2}, "objective": "soflow", "checkpoint_every": 2})
    law, ends = law_of("eight_gaussians"), {}
    for compiled in (False, True):
        chosen = replace(config, compile=compiled)
        model, objective = assemble(chosen)
        assert (model.net._compiled_call_impl is not None) == compiled
        for step in train(model, objective, law, chosen, out=tmp_path / str(compiled)):
            if step.number == 2: middle = tmp_path / f"{compiled}-middle"; (tmp_path / str(compiled)).rename(middle)
        ends[compiled] = step.run.ema
        run = resume_run(middle)
        assert run.step == 2 and (run.model.net._compiled_call_impl is not None) == compiled
        for step in train(run.model, objective, law, run.config, resume=run): pass
        assert all(torch.equal(step.ema[name], ends[compiled][name]) for name in step.ema)
    assert all(torch.allclose(ends[True][name], ends[False][name], atol=1e-4) for name in ends[True])


def test_radam_resumes_to_the_bit(tmp_path):
    config = make_config({"steps": 12, "batch": 16, "objective": "flow_matching", "optimiser": "radam", "weight_decay": 0.1, "checkpoint_every": 7})
    law = law_of("eight_gaussians")
    model, objective = assemble(config)
    for step in train(model, objective, law, config, out=tmp_path / "a"):
        if step.number == 7: (tmp_path / "a").rename(tmp_path / "b")
    run = resume_run(tmp_path / "b")
    assert type(run.optimiser).__name__ == "RAdam" and run.optimiser.param_groups[0]["weight_decay"] == 0.1 and run.step == 7
    for again in train(run.model, objective, law, run.config, resume=run): pass
    assert all(torch.equal(step.ema[name], again.ema[name]) for name in step.ema)


def test_a_budget_in_minutes_counts_the_wall():
    config = make_config({"minutes": 0.04, "batch": 64, "objective": "flow_matching"})
    assert config.seconds is None
    model, objective = assemble(config)
    begin(model, objective, config)         # what a process loads for its first run is not counted
    start = time.perf_counter()
    for step in train(model, objective, law_of("eight_gaussians"), config): pass
    assert 1.2 < time.perf_counter() - start < 4.8 and step.number > 20


def test_rows_of_the_log_go_to_a_tracker():
    rows, config = [], make_config({"steps": 10, "batch": 16, "log_every": 4})
    model, objective = assemble(config)
    for step in train(model, objective, law_of("eight_gaussians"), config, track=rows.append): pass
    assert [row["step"] for row in rows] == [4, 8, 10] and rows == step.run.log and rows[0] is not step.run.log[0]


def test_a_network_with_classes_needs_labels():
    config = make_config(SMALL | {"network": UNET | {"classes": 3}})
    model, objective = assemble(config)
    with pytest.raises(InputError, match="no labels"): next(train(model, objective, Pictures(), config))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_itself_and_goes_on(tmp_path, number):
    words = ["train", "plane", "steps=300", "batch=32", "--out", "run"]
    job = subprocess.Popen([sys.executable, "-m", "soflow_edu", *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    shown = ""
    while not re.search(r"[1-9]\d*/300", shown) and (letter := job.stderr.read(1)): shown += letter      # until the bar has counted a step
    job.send_signal(number)
    message = job.communicate(timeout=60)[1]
    assert job.returncode == 128 + number and f"Stopped by {number.name}" in " ".join(message.split()) and "Traceback" not in message
    step = resume_run(tmp_path / "run").step
    assert 1 <= step < 300
    for folder in ("run", "whole"): assert warm.run("soflow", *words[:-1], folder, "--resume", cwd=tmp_path).returncode == 0
    a, b = (load_run(tmp_path / name) for name in ("run", "whole"))
    assert a.step == b.step == 300 and all(torch.equal(a.ema[name], b.ema[name]) for name in a.ema)


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    words, out = ["train", "plane", "steps=3", "batch=32"], ["--out", "run"]
    assert warm.run("soflow", *words, *out, cwd=tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    done = warm.run("soflow", *words, "learning_rate=1e-4", *out, "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "learning_rate is 0.007 there and 0.0001 here" in " ".join(done.stderr.split())
    done = warm.run("soflow", *words, "precision=bfloat16", *out, "--resume", cwd=tmp_path)           # it would be ignored, so it is refused
    assert done.returncode == 2 and "precision is 'float32' there" in " ".join(done.stderr.split())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    config = make_config({"steps": 6, "batch": 16, "network": {"name": "mlp", "width": 200, "depth": 6}, "objective": "flow_matching", "checkpoint_every": 2})
    script = "import sys; from pathlib import Path; from test_scale import *; full_disk(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert "after step 4" in said and "last good checkpoint there is of step 2" in said and "resume" in said
    run = resume_run(tmp_path / "run")
    assert run.step == 2 and not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    model, objective = assemble(config)
    for step in train(run.model, objective, law_of("eight_gaussians"), run.config, resume=run): pass
    assert step.number == 6


def full_disk(folder):
    "Trains until, after the first checkpoint, files may not grow beyond 100 kB any more."
    config = make_config({"steps": 6, "batch": 16, "network": {"name": "mlp", "width": 200, "depth": 6}, "objective": "flow_matching", "checkpoint_every": 2})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model, objective = assemble(config)
    try:
        for step in train(model, objective, law_of("eight_gaussians"), config, out=folder / "run"):
            if step.number == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    except InputError as error: said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "said.json").write_text(json.dumps(said))


def test_a_full_disk_before_the_first_checkpoint_says_so(tmp_path, monkeypatch):
    config = make_config({"steps": 1, "batch": 16})
    run, _ = begin(*assemble(config), config), None
    monkeypatch.setattr("soflow_edu.training.save_run", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left.*no checkpoint there yet"): save_checkpoint(tmp_path, run)


def test_every_rung_can_be_read():
    from soflow_edu.ladder import rungs
    found = rungs()
    assert set(list(found)[:2]) == {"plane", "digits"} and list(found)[-1] == "cifar10-published" and all(rung.minutes > 0 and rung.hardware for rung in found.values())
    assert all(e.low < e.high and e.source in ("measured", "published", "estimated") for rung in found.values() for e in rung.expected)
    assert found["plane"].config == load_config("plane")


def test_options_that_a_map_of_the_plane_has_no_use_for_are_refused(tmp_path):
    from soflow_edu.ladder import evaluate_run, train_run
    run = train_run(make_config({"steps": 2, "batch": 8}), tmp_path / "run")
    for option in ({"steps": 4}, {"against": "digits"}, {"features": "digits"}, {"sampler": "jump"}):
        with pytest.raises(InputError, match="Leave out"): evaluate_run(run, **option)
