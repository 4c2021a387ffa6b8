"""The GPU code of the scripts, on a GPU that is only pretended (pretend_gpu.py): it needs none, and replaces none."""

import contextlib
import json
import os
import signal

import pytest
import torch
from pretend_gpu import GPU, Graph, captured, pretended_gpu
from test_speed import LEARNERS, bench, step_of

import iql
import pspo
import steer_poe

STEPS = 9  # three to warm up, one recorded, five replayed
REAL = pytest.param("real", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def steps_on_the_gpu(name, wrap):
    """What the steps of a learner return, and its state at the end; rates, data and models change in between."""
    learner = LEARNERS[name]()
    data = {key: value[:512].to(GPU) for key, value in learner.data.items()}
    torch.manual_seed(0)
    if name.startswith("iql"):
        learner, pool = iql.IQL(learner.args, data, 100), None
    else:
        box, domain = learner.active.box, "liquidation" if name.endswith("liquidation") else "hopper"
        learner = pspo.PSPO(learner.args, data, domain)
        dims = data["observations"].shape[1], data["actions"].shape[1]
        pool = pspo.Dynamics(4, *dims, 16, learner.args.dynamics_layers)
        pool.box.copy_(box)
        pool = pool.to(GPU)
        learner.redraw(pool)
    step, rows = step_of(learner, wrap), []
    for i in range(STEPS):
        for optimizer in vars(learner).values():
            if type(optimizer).__name__ == "Adam":
                optimizer.rates[0].fill_(1e-3 / (1 + i))
        if pool is None:  # as online
            learner.add(torch.full((11,), 9.0), torch.zeros(3), 9.0, torch.full((11,), 9.0), False)
        elif i in (1, 6):
            learner.redraw(pool)
        if i == 7:  # a checkpoint does not disturb the random numbers, and restores them
            random = iql.rng_state()
            torch.rand(5, device=GPU)
            iql.set_rng_state(random)
        rows.append(step())
    if pool is not None:
        ends = [row[learner.METRICS.index("rollout/terminals")].item() for row in rows]
        assert any(0 < end < 1 for end in ends) and learner.policy_iteration > 2
    state = [*rows, *learner.state_dict().values()]
    assert all(x.device == GPU for x in state)
    return [x.cpu() for x in state]


@pytest.mark.parametrize("gpu", ["pretended", REAL])
@pytest.mark.parametrize("name", LEARNERS)
def test_captured_equals_eager(name, gpu):
    with pretended_gpu() if gpu == "pretended" else contextlib.nullcontext():
        eager, replayed = (steps_on_the_gpu(name, wrap) for wrap in (lambda step: step, iql.Captured))
    assert not torch.equal(eager[STEPS - 2], eager[STEPS - 1])
    for x, y in zip(eager, replayed, strict=True):
        assert torch.equal(x, y) if gpu == "pretended" else torch.allclose(x, y, rtol=1e-3, atol=1e-4)


def test_a_replayed_step_sees_no_python():
    """What the pretended graph is for: state in Python, or in a tensor that is replaced, stays as it was recorded."""
    x, kept = torch.zeros(2), {"count": 0, "replaced": torch.zeros(2)}

    def step():
        kept["count"] += 1
        kept["replaced"] = kept["replaced"] + 1
        return torch.cat([x.add_(1), kept["replaced"], torch.tensor([kept["count"] * 1.0])])

    graph = Graph()
    with captured(graph):
        result = step()
    assert x.tolist() == [0, 0]  # recording computes nothing
    for i in (1, 2, 3):
        graph.replay()
        assert result.tolist() == [i, i, 1, 1, 1]
    with pytest.raises(AssertionError, match="may not wait"), captured(Graph()):
        x.sum().item()


def test_tensors_of_two_devices_do_not_meet():
    with pretended_gpu():
        x, y = torch.zeros(3, device="cuda"), torch.zeros(3)
        assert x.device == GPU and (x + 1)[1:].device == GPU and y.device.type == x.cpu().device.type == "cpu"
        assert (x + torch.tensor(1.0)).device == GPU and x.to("cpu") is not x and y.to(x).device == GPU
        assert torch.nn.Linear(3, 3).to(GPU).weight.device == GPU
        for mix in (lambda: x + y, lambda: torch.stack([x[0], y[0]]), lambda: x.add_(y), lambda: x.where(x > 0, y)):
            with pytest.raises(AssertionError, match="same device"):
                mix()
        with pytest.raises(AssertionError, match="numpy"):
            x.numpy()


PSPO = dict(
    dataset_episodes=200, eval_episodes=20, final_episodes=50, eval_every=10, pool_size=4, active_models=3,
    redraw_every=8, dynamics_hidden=16, dynamics_layers=2, dynamics_epochs=1, dynamics_batch=256, evidence_rows=16,
    dynamics_bfloat16=True, iterations=30, batch_size=32, hidden=16, model_samples=2, action_samples=4, bc_updates=20,
)  # fmt: skip
IQL = dict(
    dataset_episodes=200, eval_episodes=20, final_episodes=50, eval_every=20, iterations=20, online_steps=20, hidden=8,
    batch_size=16, bfloat16=True,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script, settings", [(pspo, PSPO), (iql, IQL)], ids=["pspo", "iql"])
def test_a_run_and_its_resumption(script, settings, tmp_path, monkeypatch):
    """From the data to the result, as on the CPU to the last bit; stopped within every phase and resumed as well."""
    whole = script.run(script.Args(cuda=False, num_threads=1, runs_dir=str(tmp_path / "cpu"), **settings))
    add, count = script.Guard.add, iter(range(1000))

    def stopping(guard, step, row):
        add(guard, step, row)
        if next(count) in (3, 10, 13, 23, 34):
            os.kill(os.getpid(), signal.SIGTERM)

    with pretended_gpu():
        monkeypatch.setattr(script.Guard, "add", stopping)
        with contextlib.suppress(SystemExit):
            script.run(script.Args(num_threads=1, runs_dir=str(tmp_path / "gpu"), **settings))
        (folder,) = (tmp_path / "gpu").iterdir()
        stops = 1
        while not (folder / "result.json").exists():
            with contextlib.suppress(SystemExit):
                script.run(script.Args(resume=str(folder)))
            stops += 1
    assert stops > 3
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    one, two = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
    assert one["return"] == two["return"]


@pytest.mark.filterwarnings("ignore")
def test_steering(tmp_path):
    small = dict(dataset_episodes=200, updates=60, hidden=16, batch_size=64, episodes=12)
    cpu = steer_poe.run(steer_poe.Args(cuda=False, runs_dir=str(tmp_path / "cpu"), **small))
    with pretended_gpu():
        gpu = steer_poe.run(steer_poe.Args(runs_dir=str(tmp_path / "gpu"), **small))
    assert (gpu / "cells.csv").read_bytes() == (cpu / "cells.csv").read_bytes()


def test_the_benchmark_has_rows_of_a_gpu(tmp_path, monkeypatch):
    speed, threads = bench(), torch.get_num_threads()
    monkeypatch.setattr(speed, "keep_memory", lambda: None)  # for a process of its own
    with pretended_gpu():
        speed.main(speed.Args(small=True, rounds=3, threads=(threads,), evaluation=False, output=tmp_path / "speed"))
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    works = [
        [row["work"] for row in rows if row["where"] == where]
        for where in (f"CPU, {threads} threads", "a pretended GPU")
    ]
    assert works[0] == works[1] and len(works[1]) == 5
    assert "not measured" not in (tmp_path / "speed.md").read_text()
