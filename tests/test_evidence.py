"""benchmark/evidence_study.py and local_evidence.py: the parts that can be wrong without anyone seeing it."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import liquidation_env
import pspo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import evidence_study
import local_evidence

torch.set_num_threads(1)
SMALL = dict(pool_size=4, active_models=4, dynamics_hidden=16, dynamics_epochs=2, hidden=8, batch_size=32, cuda=False)


@pytest.fixture(scope="module")
def trained():
    """(data, pool) of a small liquidation problem; the pool's last model predicts rewards that are far off."""
    torch.manual_seed(0)
    arrays = liquidation_env.behaviour_dataset(800, 0)
    dataset = pspo.make_dataset(arrays, "liquidation", "generated")
    data = {key: torch.as_tensor(getattr(dataset, key)) for key in pspo.DATA_KEYS}
    args, _ = pspo.resolve(pspo.Args(**SMALL))
    pool, _ = pspo.train_dynamics(args, data, functools.partial(tqdm, disable=True))
    with torch.no_grad():
        pool.net.biases[-1][3, 0, 0] += 2
    return data, pool


def make(kind, trained, **settings):
    torch.manual_seed(0)
    args, domain = pspo.resolve(pspo.Args(**SMALL | settings))
    learner = kind(args, trained[0], domain)
    learner.redraw(trained[1])
    return learner


def test_local_belief_is_equation_4_on_the_nearest_rows(trained, monkeypatch):
    """P(τ | s, a) from a loop over places: mean surprise of the nearest remembered rows, in units of its spread."""
    monkeypatch.setattr(local_evidence, "MEMORY", 300)
    monkeypatch.setattr(local_evidence, "NEIGHBOURS", 5)
    learner = make(local_evidence.LocalPSPO, trained, evidence="likelihood")
    obs, action = trained[0]["observations"][:7], trained[0]["actions"][:7].flip(0)
    learner.place = learner.standardised(obs, action)
    belief = learner.log_belief().exp()
    assert belief.shape == (7, 4) and (learner.memory.shape[0] <= 300)
    for i, place in enumerate(learner.place):
        rows = (learner.memory - place).square().sum(1).argsort()[:5]
        delta = learner.surprise[:, rows].mean(1)
        expected = (-delta / delta.std()).softmax(0)
        torch.testing.assert_close(belief[i], expected, rtol=1e-4, atol=1e-5)
    assert (belief[:, learner.members == 3] < 0.15).all()  # uniform: 0.25


def test_local_evidence_draws_from_the_belief_of_each_place(trained):
    """model_targets uses (B, N) beliefs, and leaves the learner with its one belief (N,) afterwards; a learner that is
    loaded from a checkpoint looks the same rows up."""
    learner = make(local_evidence.LocalPSPO, trained, evidence="likelihood")
    obs, action = trained[0]["observations"][:50], trained[0]["actions"][:50]
    drawn = []
    original = pspo.sample_models

    def spy(log_belief, shape):
        drawn.append(log_belief.shape)
        return original(log_belief, shape)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pspo, "sample_models", spy)
        learner.model_targets(obs, action)
    assert drawn[0] == (50, 4) and learner.log_belief().shape == (4,)
    again = make(local_evidence.LocalPSPO, trained, evidence="likelihood", seed=1)
    again.load_state_dict(learner.state_dict())
    for one in (learner, again):
        one.place = one.standardised(obs, action)
    again.args.seed = learner.args.seed
    assert torch.equal(learner.log_belief(), again.log_belief())


def test_worth_of_a_belief():
    """By hand: two models, two transitions; and the hindsight weights are the minimiser on the simplex."""
    error = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    density = torch.tensor([[0.5, 0.25], [0.25, 0.5]]).log()
    even = torch.tensor([0.5, 0.5]).log()
    assert list(evidence_study.worth(error, density, even).values()) == pytest.approx([1, 0, np.log(2)], abs=1e-7)
    found = evidence_study.worth(error, density, torch.tensor([0.25, 0.75]).log())  # mean targets −0.5 and 0.5
    gain = (np.log(0.3125) + np.log(0.4375)) / 2 - np.log(0.375)
    assert list(found.values()) == pytest.approx([0.25 / 0.5, gain, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))])
    local = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log()  # for each transition the weights that make no error
    assert evidence_study.worth(error, density, local)["target error"] == pytest.approx(0, abs=1e-12)
    weights = evidence_study.hindsight(error).exp()  # least of (2p − 1)² + 4p²: p = 1/4
    assert weights.tolist() == pytest.approx([0.25, 0.75], abs=1e-6)


def test_held_out_rows_are_found_again(trained, tmp_path):
    """The run's pool reports the same errors on them; another seed's rows are refused."""
    data, _ = trained
    torch.manual_seed(7)
    args, domain = pspo.resolve(pspo.Args(**SMALL, seed=7))
    pool, report = pspo.train_dynamics(args, data, functools.partial(tqdm, disable=True))
    content = {"kind": "dynamics", "pool": pool.state_dict(), "report": report}
    torch.save(content, tmp_path / "dynamics.pt")
    learner = pspo.PSPO(args, data, domain)
    rows = evidence_study.held_out_rows(learner, tmp_path)
    assert len(rows.unique()) == len(rows) == len(data["rewards"]) // 10 + 1
    args.seed = 8
    with pytest.raises(pspo.UserError, match="trained in another run"):
        evidence_study.held_out_rows(learner, tmp_path)


@pytest.mark.parametrize("flags", [["--evidence", "data"], ["--posterior=uniform"], ["--resume", "runs/x"]])
def test_local_evidence_refuses_what_it_would_misread(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["local_evidence.py", *flags])
    with pytest.raises(SystemExit, match=flags[0].split("=")[0]):
        local_evidence.main()


def test_a_run_of_local_evidence_is_not_continued_as_another(monkeypatch, tmp_path, capsys):
    """pspo.py --resume and the run folder's copy of the script refuse it; --evidence-rows is no --evidence."""
    tiny = "--dataset-episodes 100 --pool-size 2 --active-models 2 --dynamics-epochs 1 --bc-updates 5 --iterations 4"
    tiny += " --eval-every 2 --eval-episodes 5 --final-episodes 5 --hidden 8 --dynamics-hidden 8 --evidence-rows 8"
    monkeypatch.setattr(local_evidence, "MEMORY", 200)
    monkeypatch.setattr(pspo, "PSPO", pspo.PSPO)
    monkeypatch.setattr(pspo, "SCRIPT", pspo.SCRIPT)
    monkeypatch.setattr(sys, "argv", ["local_evidence.py", *tiny.split(), "--runs-dir", str(tmp_path)])
    local_evidence.main()
    (run,) = tmp_path.iterdir()
    assert "local_evidence" in run.name
    copy = subprocess.run([sys.executable, run / "pspo.py", "--resume", run], capture_output=True, text=True)
    assert copy.returncode == 1 and "cannot be resumed" in copy.stderr
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, root / "pspo.py", "--resume", run], capture_output=True, text=True)
    assert done.returncode == 2 and "error:" in done.stderr


def test_judged_errors_are_those_of_a_known_model(trained):
    """At γ = 0 the error of a target is the error of the predicted reward, in reward ranges; densities are normal."""
    learner = make(pspo.PSPO, trained, gamma=0.99)
    learner.args.gamma = 0.0
    data = {key: value[:100] for key, value in trained[0].items()}
    error, density = evidence_study.judged(learner, data)
    with torch.no_grad():
        mean, std = learner.active(data["observations"], data["actions"])
    expected = (mean[..., 0] - data["rewards"]) / learner.reward_scale
    torch.testing.assert_close(error, expected)
    seen = torch.cat([data["rewards"][:, None], data["next_observations"]], -1)
    log_prob = -0.5 * ((seen - mean) / std).square() - std.log() - 0.918938533
    torch.testing.assert_close(density, log_prob.sum(-1), rtol=1e-4, atol=1e-3)


def test_evidence_of_a_lying_model(trained):
    """On data as good as the real transitions, every kind of evidence ranks the lying model last."""
    learner = make(pspo.PSPO, trained, gamma=0.99)
    rows = torch.randint(len(trained[0]["rewards"]), (600,), generator=torch.Generator().manual_seed(0))
    data = {key: value[rows] for key, value in trained[0].items()}
    real = {key: value[:80] for key, value in trained[0].items()}
    on_data, on_real = evidence_study.judged(learner, data), evidence_study.judged(learner, real)
    found = evidence_study.beliefs(on_data, on_real, evidence_study.nearest(learner, data, real, 10))
    for name, (_, log_p) in found.items():
        belief = log_p.exp()
        assert torch.allclose(belief.sum(-1), torch.ones_like(belief.sum(-1)))
        if name != "uniform":
            assert belief[..., learner.members == 3].mean() < 0.15, name  # uniform: 0.25
    assert torch.equal(found["uniform"][1].exp(), torch.full((4,), 0.25, dtype=torch.float64))
