"""What makes the scripts fast must not change their numbers: Adam, compiling, what a CUDA graph needs, evaluation."""

import copy
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from d4rl_layout import toy_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import iql
import pspo

ROOT = Path(__file__).resolve().parents[1]
HOST_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def iql_learner(**changes):
    args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", hidden=16, batch_size=32, **changes))
    torch.manual_seed(0)
    return iql.IQL(args, toy_data(512, 11, 3), room=100)


def pspo_learner(env_id="hopper-medium-v2", **changes):
    small = dict(
        pool_size=4, active_models=3, dynamics_hidden=16, hidden=16, batch_size=32, model_samples=2, action_samples=4,
        trust_region=1.0, trust_region_every=2,
    )  # fmt: skip
    args, domain = pspo.resolve(pspo.Args(env_id=env_id, **small | changes))
    dims = (3, 1) if domain == "liquidation" else (11, 3)
    torch.manual_seed(0)
    pool = pspo.Dynamics(args.pool_size, *dims, args.dynamics_hidden, args.dynamics_layers)
    pool.box.copy_(torch.tensor([[-10.0], [10.0]]).expand(2, dims[0]))
    if domain == "hopper":  # so that some rollouts end and others go on
        pool.box[:, :2] = torch.tensor([[0.6, -0.1], [1.2, 0.1]])
    learner = pspo.PSPO(args, toy_data(512, *dims), domain)
    learner.behaviour.requires_grad_(False)
    learner.redraw(pool)
    return learner


# Every path that --posterior, --evidence, --projection and --bfloat16 choose
LEARNERS = {
    "iql": lambda: iql_learner(),
    "iql, dropout": lambda: iql_learner(dropout=0.1),
    "iql, bfloat16": lambda: iql_learner(bfloat16=True),
    "pspo": lambda: pspo_learner(),
    "pspo, liquidation": lambda: pspo_learner("liquidation"),
    "pspo, uniform": lambda: pspo_learner(posterior="uniform", evidence_scale="mean"),
    "pspo, pessimistic": lambda: pspo_learner(posterior="pessimistic"),
    "pspo, likelihood": lambda: pspo_learner(evidence="likelihood"),
    "pspo, critic": lambda: pspo_learner(evidence="critic"),
    "pspo, no regularisation": lambda: pspo_learner(regularization=False),
}


def step_of(learner, wrap=lambda step: step):
    """What a script does once per update, its training step wrapped."""
    if isinstance(learner, pspo.PSPO):
        return wrap(learner.iterate)
    update = wrap(learner.update)

    def step():
        learner.draw()
        return update()

    return step


@pytest.mark.parametrize("script", [pspo, iql])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_pytorchs(script, weight_decay):
    """Two groups, changing rates, a state that goes through a checkpoint half-way: to the last bit."""
    torch.manual_seed(0)
    ours = [torch.randn(2, 5, 3, requires_grad=True), torch.randn(3, requires_grad=True)]
    theirs = copy.deepcopy(ours)
    adam = script.Adam((ours[:1], 0.1), (ours[1:], 0.01), weight_decay=weight_decay)
    groups = [{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:], "lr": 0.01}]
    reference = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    for step in range(20):
        target = torch.randn(3)
        adam.rates[0].fill_(0.1 / (1 + step))
        reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        adam.minimise((ours[0].sin().sum((0, 1)) * ours[1] - target).square().sum())
        reference.zero_grad()
        (theirs[0].sin().sum((0, 1)) * theirs[1] - target).square().sum().backward()
        reference.step()
        if step == 9:
            state = copy.deepcopy(adam.state_dict())
            adam = script.Adam((ours[:1], 1.0), (ours[1:], 0.01), weight_decay=weight_decay)
            adam.load_state_dict(state)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=0)


def test_gradients_reach_no_other_parameters():
    """The policy's gradient goes through the critic and leaves nothing there."""
    learner = pspo_learner()
    before = [p.clone() for p in learner.critic.parameters()]
    loss = -learner.critic(learner.data["observations"], learner.actor(learner.data["observations"])[0].tanh()).mean()
    learner.actor_optimizer.minimise(loss)
    assert all(p.grad is None for p in learner.parameters())
    assert all(torch.equal(p, b) for p, b in zip(learner.critic.parameters(), before, strict=True))


class NoHostWaits(TorchDispatchMode):
    """Raises where a GPU would have to be waited for: a value or a data-dependent size is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in HOST_WAITS, f"{name} waits for the device"
        masks = [x for x in (args[1] if name.startswith("aten::index") else ()) if isinstance(x, torch.Tensor)]
        assert all(x.dtype != torch.bool for x in masks), f"{name} with a mask waits for the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_never_waits_for_the_device(name):
    step = step_of(LEARNERS[name]())
    with NoHostWaits():
        for _ in range(2):
            step()


def test_the_watch_for_waits_sees_them():
    x = torch.arange(3.0)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: bool(x.sum() > 0), lambda: (x > 1).nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostWaits():
            wait()


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_keeps_its_state_in_place(name):
    """A CUDA graph replays addresses: all that a step changes must stay where it is, and Python must change nothing."""
    learner = LEARNERS[name]()

    def tensors():
        optimizers = [x for x in vars(learner).values() if type(x).__name__ == "Adam"]
        assert len(optimizers) == 2
        state = [*learner.parameters(), *learner.buffers(), *learner.data.values()]
        for optimizer in optimizers:
            state += [optimizer.count, *optimizer.rates, *optimizer.means, *optimizer.squares]
        return [x.data_ptr() for x in state]

    def scalars():
        return {key: value for key, value in vars(learner).items() if isinstance(value, (int, float, list, bool))}

    step, addresses, plain = step_of(learner), tensors(), copy.deepcopy(scalars())
    first, second = step(), step()
    assert tensors() == addresses and scalars() == plain
    assert first.data_ptr() != second.data_ptr() and not first.requires_grad


@pytest.mark.parametrize("script", [pspo, iql])
def test_bfloat16_is_between_hidden_layers_only(script):
    """Against the rounding written out; a network with one hidden layer has nothing to round."""
    torch.manual_seed(0)
    x, one, two = torch.randn(7, 5), script.MLP(2, [5, 64, 3]), script.MLP(2, [5, 64, 64, 3])
    with torch.no_grad():
        assert torch.equal(one(x, bfloat16=True), one(x)) and not torch.equal(two(x, bfloat16=True), two(x))
        hidden = (x @ two.weights[0] + two.biases[0]).relu()
        factors = [t.bfloat16().double() for t in (hidden, two.weights[1])]
        hidden = ((factors[0] @ factors[1]).bfloat16() + two.biases[1]).relu()
        rounding = 2 * 2**-8 * hidden.abs() @ two.weights[2].abs()  # the sum may round to a neighbour
        assert ((two(x, bfloat16=True) - hidden @ two.weights[2] - two.biases[2]).abs() <= rounding + 1e-5).all()
        assert (two(x, bfloat16=True) - two(x)).norm() < 0.01 * two(x).norm()
    losses = [two(x, bfloat16=bfloat16).square().sum() for bfloat16 in (False, True)]
    gradients = [torch.autograd.grad(loss, list(two.parameters())) for loss in losses]
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("script", [pspo, iql])
@pytest.mark.parametrize("flag, capable", [(True, False), (True, True), (False, False)])
def test_bfloat16_is_for_training_only(script, flag, capable, tmp_path, monkeypatch, capsys):
    """IQL: all networks; PSPO: its models. Acting and diagnostics are exact; a line names a CPU that would be slow."""
    calls, small = [], dict(iterations=2, eval_every=2, eval_episodes=2, final_episodes=2, dataset_episodes=100)
    product = script.bfloat16_product
    monkeypatch.setattr(script, "bfloat16_product", lambda x, weight: calls.append(len(weight)) or product(x, weight))
    monkeypatch.setattr(script, "plot", lambda *_, **__: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": capable})
    if script is pspo:
        small |= dict(dynamics_bfloat16=flag, pool_size=10, dynamics_epochs=1, dynamics_batch=500, bc_updates=2)
        expected = [10] * (1711 // 500)  # one inner product an update; 1,902 rows, a tenth of them held out
    else:
        small |= dict(bfloat16=flag)
        expected = [2, 1, 1, 1, 2] * 2  # Q̄, V, V, π, Q
    script.run(script.Args(cuda=False, num_threads=1, runs_dir=str(tmp_path), **small))
    assert calls == (expected if flag else [])
    assert ("no instructions for bfloat16 on this cpu" in capsys.readouterr().out) == (flag and not capable)


@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("name", ["iql", pytest.param("pspo", marks=pytest.mark.slow)])
def test_compiled_equals_eager(name):
    """The same random stream, the same numbers; fullgraph: compiled in one piece, or it raises."""
    eager, compiled = LEARNERS[name](), LEARNERS[name]()
    script = iql if name == "iql" else pspo
    steps = step_of(eager), step_of(compiled, lambda step: script.fast(step, torch.device("cpu"), "on", 0))
    rows = []
    for learner, step in zip((eager, compiled), steps, strict=True):
        torch.manual_seed(1)
        for _ in range(12):
            if name == "iql":  # as online: the data grow, and a compiled step must see it
                learner.add(torch.full((11,), 9.0), torch.zeros(3), 9.0, torch.full((11,), 9.0), False)
            rows.append(step())
    assert torch.allclose(torch.stack(rows[:12]), torch.stack(rows[12:]), rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=1e-3, atol=1e-4)


def test_without_a_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(iql.UserError, match="no-such-compiler"):
        iql.fast(lambda: torch.zeros(1), torch.device("cpu"), "on", 0)


def test_long_runs_are_compiled_where_they_can_be(monkeypatch):
    """--compile on and off do as they say; with auto, 50,000 updates on a CPU with a compiler decide."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
    compiler = {True: sys.executable, False: "no-such-compiler"}

    def is_compiled(flag, updates, present=True):
        monkeypatch.setenv("CXX", compiler[present])
        compiled.clear()
        assert iql.fast(lambda: 5, torch.device("cpu"), flag, updates)() == 5
        return bool(compiled)

    assert is_compiled("auto", 50_000) and not is_compiled("auto", 49_999)
    assert is_compiled("on", 1) and not is_compiled("off", 1_000_000)
    assert not is_compiled("auto", 1_000_000, present=False)


FAILING = """
import sys, torch
sys.path.insert(0, {root!r})
import iql
x = torch.zeros(3)
def step():
    x.add_(torch.rand(3))
    return x.clone()
torch.manual_seed(0)
fast = iql.fast(step, torch.device("cpu"), "auto", 50_000)
print([fast().tolist() for _ in range(3)])
"""


@pytest.mark.skipif(not shutil.which("false"), reason="needs the program false")
def test_a_compiler_that_fails_stops_nothing():
    """One line says so, and the numbers are those of the step itself, from the first one on."""
    code = FAILING.format(root=str(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CXX": "false"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    _, note, numbers = run.stdout.splitlines()
    assert note.startswith("going on without compiling (--compile off does not try): ")
    torch.manual_seed(0)
    expected = torch.rand(3, 3).cumsum(0)
    assert torch.equal(torch.tensor(json.loads(numbers)), expected)


@pytest.mark.parametrize("cores", [1, 2, 3, 100])
def test_evaluation_is_the_same_on_any_number_of_cores(cores, monkeypatch):
    """Against one environment at a time, episodes of different lengths, more of them than environments."""
    make_env = functools.partial(gym.make, "liquidation_env:Liquidation-v0")
    torch.manual_seed(0)
    actor = pspo.Actor(3, 1, 8)
    monkeypatch.setattr(pspo.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    played = pspo.evaluate(actor.act, make_env, 60, 3, 0.9)
    env = make_env()
    for i in range(60):
        obs, done, total, discounted, step = env.reset(seed=3 + i)[0], False, 0.0, 0.0, 0
        assert np.array_equal(played["start"][i], obs)
        while not done:
            obs, reward, terminated, truncated, _ = env.step(actor.act(obs[None])[0].clip(-1, 1))
            total, discounted, step = total + reward, discounted + 0.9**step * reward, step + 1
            done = terminated or truncated
        assert played["returns"][i] == pytest.approx(total, rel=1e-4, abs=1e-3)
        assert played["discounted"][i] == pytest.approx(discounted, rel=1e-4, abs=1e-3)


# --- benchmark/speed.py ---
def bench():
    sys.path.insert(0, str(ROOT / "benchmark"))
    try:
        return importlib.import_module("speed")
    finally:
        sys.path.remove(str(ROOT / "benchmark"))


@pytest.mark.parametrize("name", ["IQL", "dynamics, 2", "PSPO, hopper --quick", "PSPO, hopper, paper"])
def test_the_floor_counts_the_products_of_the_step(name):
    """The products written down from the equations are those that PyTorch counts in a step: no more, no fewer."""
    speed = bench()
    torch.manual_seed(0)
    works = speed.our_works(speed.Args(small=True), torch.device("cpu"))
    (work,) = [work for work in works if work.name.startswith(name)]
    with FlopCounterMode(display=False) as counter:
        work.step()
    assert counter.get_total_flops() == work.flop


def test_benchmark_runs(tmp_path):
    command = [sys.executable, "benchmark/speed.py", "--small", "--rounds", "3", "--threads", "1", "--only", "IQL"]
    command += ["--profile", "--bfloat16", "--peers", str(tmp_path), "--output", str(tmp_path / "out" / "speed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CORL: no checkout" in done.stdout and "JAX implementations not measured" in done.stdout
    content = json.loads((tmp_path / "out" / "speed.json").read_text())
    works = {row["work"]: row for row in content["rows"]}
    assert works["IQL"]["ratio"] > 0 and works["IQL"]["ms_10%"] <= works["IQL"]["ms"] <= works["IQL"]["ms_90%"]
    assert works["4 hopper episodes, evaluate"]["speedup"] > 0
    assert works["IQL, bfloat16"]["mflop"] == works["IQL"]["mflop"]
    part, _ = content["profiles"]
    assert (
        part["work"] == "IQL" and part["ms"]["bmm"] > 0 and next(iter(part["ms"].values())) == max(part["ms"].values())
    )
    table = (tmp_path / "out" / "speed.md").read_text()
    assert table.count("\n|") == len(content["rows"]) + 1 + (not torch.cuda.is_available())
    assert ("not measured" in table) == (not torch.cuda.is_available())


def test_growth_runs(tmp_path):
    speed = bench()
    threads = torch.get_num_threads()
    speed.main(speed.Args(small=True, rounds=3, threads=(1,), growth=True, output=tmp_path / "growth"))
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [row["work"].split(",")[1].split()[0] for row in rows] == ["1", "2"]
