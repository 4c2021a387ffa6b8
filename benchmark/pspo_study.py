"""The studies behind docs/pspo.md: readings of the belief, ablations, models that lie.

    python benchmark/pspo_study.py liquidation               # python pspo.py, seeds 1-5
    python benchmark/pspo_study.py belief                    # five beliefs on four data sets, seeds 1-3
    python benchmark/pspo_study.py ablations                 # what the recipe is made of, each left out, seeds 1-3
    python benchmark/pspo_study.py poisoned                  # 3 of 10 models lie about the price, seeds 1-3

A study can be stopped and called again: a run with a result.json is not run again, one with a checkpoint goes on. Runs
of the same data, seed and sizes share their pool.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import numpy as np
import scipy.stats
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import liquidation_env
import pspo
from pspo import PSPO, bellman_target, posterior, sample_models

# --- Readings of Eqs. (3) and (4): pspo.py's is A, one belief over the pool, fed by observed transitions ---


class Uniform(PSPO):
    """The paper's ablation "Average Utilization": P is the prior."""

    def log_belief(self) -> torch.Tensor:
        return torch.full((len(self.members),), -float(np.log(len(self.members))), device=self.device)

    def update_belief(self, obs, action, observed_target) -> None:
        """Nothing is learnt."""


class Local(Uniform):
    """Reading B: a belief of its own for every (s, a), Δ = |y_τ − Q(s, a)|, without data."""

    def ask(self, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each model says of the rollouts' next step: r, s', terminal and y_τ, each (N, B, ...)."""
        mean, std, log_odds = self.active(self.rollout_obs, action)  # (N, B, 1+obs)
        reward, next_obs, terminal = self.active.next(mean, std, log_odds, torch.randn_like(mean[0]))
        next_value = self.value(next_obs, len(mean))
        target = bellman_target(reward / self.reward_scale, terminal, next_value, self.args.gamma)
        return reward, next_obs, terminal, target

    def draw(self, log_belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A model for every row from its own log P (B, N): indices (B,), (B,); what the log says of P is kept."""
        self.seen = [-(log_belief.exp() * log_belief).sum(-1).mean(), log_belief.exp().amax(-1).mean()]
        return sample_models(log_belief, log_belief.shape[:1]), torch.arange(len(log_belief), device=self.device)

    def rollout(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step in a model τ ~ P(· | s, a), drawn for every row."""
        *step, target = self.ask(action)
        q = self.target_critic(self.rollout_obs, action, self.behaviour(self.rollout_obs)).amin(0)
        delta = (target - q).abs()  # (N, B)
        drawn, rows = self.draw(posterior(delta.T, self.args.likelihood_coef))
        return tuple(x[drawn, rows] for x in step)

    def evaluate_policy(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logged entropy and largest weight are means over the rows' own beliefs."""
        obs, metrics = super().evaluate_policy()
        return obs, [*metrics[:-2], *self.seen]


class Rollout(Local):
    """Reading C: a belief for every rollout, uniform at its start, P ← P exp(−λ Δ_τ) along it, Δ_τ = |y_τ − y seen|."""

    def __init__(self, args: pspo.Args, data: dict[str, torch.Tensor], pool: pspo.Dynamics):
        super().__init__(args, data, pool)
        self.register_buffer("log_rollout", torch.zeros(args.batch_size // 2, args.active_models, device=self.device))

    def rollout(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step in a model drawn from each rollout's own belief, which then sees what came of it."""
        *step, target = self.ask(action)
        prior = torch.where(self.rollout_age[:, None] == 0, 0.0, self.log_rollout).log_softmax(-1)  # (B, N)
        drawn, rows = self.draw(prior)
        delta = (target - target[drawn, rows]).abs()  # (N, B)
        self.log_rollout.copy_((prior - self.args.likelihood_coef * delta.T).log_softmax(-1))
        return tuple(x[drawn, rows] for x in step)


class OneModel(PSPO):
    """One model for all rollouts of a step."""

    GROUP = 10**6


class RawCritic(pspo.Critic):
    """Critics that see the action itself, not its distance from μ's mean in μ's standard deviations."""

    def forward(self, obs: torch.Tensor, action: torch.Tensor, mu: tuple) -> torch.Tensor:
        nought = torch.zeros_like(action)
        return super().forward(obs, action, (nought, nought))


class RawAction(PSPO):
    """PSPO with such critics."""

    def __init__(self, args: pspo.Args, data: dict[str, torch.Tensor], pool: pspo.Dynamics):
        with mock.patch.object(pspo, "Critic", RawCritic):
            super().__init__(args, data, pool)


VARIANTS = {"A": PSPO, "one model": OneModel, "raw": RawAction, "uniform": Uniform, "B": Local, "C": Rollout}
BELIEFS = {name: (name, []) for name in ("uniform", "A", "B", "C")}
BELIEFS["uniform, every row"] = "B", ["--likelihood-coef", "0"]  # the control of B and C: drawn for every row as theirs
QUICK = ["--quick", "--no-cuda"]
STUDIES = {  # study: (seeds, variant: (class, flags))
    "liquidation": (range(1, 6), {"liquidation": ("A", [])}),
    "belief": (
        range(1, 4),
        {
            f"{data}, {name}{rows}": (variant + rows, ["--env-id", f"hopper-{data}-v2", *QUICK, *flags])
            for data, rows in (("medium", ""), ("random", ""), ("medium-replay", ""), ("medium", ":20000"))
            for name, (variant, flags) in BELIEFS.items()
        },
    ),
    "ablations": (
        range(1, 4),
        {
            name: (variant, ["--env-id", "hopper-medium-v2", *QUICK, *flags])
            for name, (variant, flags) in {
                "the recipe": ("A", []),
                "no layer norm": ("A", ["--no-layer-norm"]),
                "one model a step": ("one model", []),
                "critics on (s, a)": ("raw", []),
                "α 0.1": ("A", ["--alpha", "0.1"]),
                "α 1": ("A", ["--alpha", "1"]),
                "γ 0.99": ("A", ["--gamma", "0.99"]),
                "rollouts of 100": ("A", ["--rollout-horizon", "100"]),
                "policy rate 2e-4": ("A", ["--actor-lr", "2e-4"]),
                "ten models, 6 epochs": ("A", "--pool-size 10 --active-models 10 --dynamics-epochs 6".split()),
                "μ by 10,000 updates": ("A", ["--behaviour-updates", "10000"]),
                "no average": ("A", ["--average-rate", "1.0"]),
                "no regularisation": ("A", ["--alpha", "0"]),
            }.items()
        },
    ),
}


@dataclass
class Args:
    study: Annotated[Literal["liquidation", "belief", "ablations", "poisoned"], tyro.conf.Positional]
    seeds: tuple[int, ...] = ()  # other seeds than the study's own
    only: tuple[str, ...] = ()  # only these variants, by the names in the table
    jobs: int = 2  # processes at a time, one thread each
    runs_dir: Path = ROOT / "runs" / "study"  # where the runs lie


def run(variant: str, pools: Path, flags: list[str]) -> None:
    """pspo.py with a variant of its learner; the pool is taken from `pools` if a run of the same data trained it.

    variant: one of VARIANTS; "A:20000": on the data's first 20,000 rows, where the bootstraps differ.
    """
    train = pspo.train_dynamics

    def cached(args: pspo.Args, data: dict[str, torch.Tensor], rule) -> pspo.Dynamics:
        sizes = args.pool_size, args.dynamics_hidden, args.dynamics_layers, args.dynamics_epochs, len(data["rewards"])
        path = pools / f"{args.env_id}_{args.seed}_{'_'.join(map(str, sizes))}.pt".replace("/", "_")
        if path.exists():
            saved, pool = torch.load(path, weights_only=True), pspo.empty_pool(args, data, rule)
            pool.load_state_dict(saved["pool"])
            torch.set_rng_state(saved["rng"])
            return pool.requires_grad_(False)
        pool = train(args, data, rule)
        pspo.save(dict(pool=pool.state_dict(), rng=torch.get_rng_state()), path)
        return pool

    def cut(args: pspo.Args) -> tuple:
        arrays, source, spec = load(args)
        return {key: column[: int(rows)] for key, column in arrays.items()}, f"{source}, its first {rows} rows", spec

    def plot(path: Path, args: pspo.Args, data: pspo.Dataset, learner: PSPO, *rest) -> None:
        draw(path, args, data, learner, *rest)
        number = dict(figure3=scipy.stats.spearmanr(*learner.target_and_uncertainty()).statistic)
        result = path.with_name("result.json")
        result.write_text(json.dumps(json.loads(result.read_text()) | number, indent=2) + "\n")

    draw, load, (reading, _, rows) = pspo.plot, pspo.load_arrays, variant.partition(":")
    pspo.load_arrays, pspo.plot = cut if rows else load, plot
    pspo.train_dynamics, pspo.PSPO, sys.argv = cached, VARIANTS[reading], ["pspo.py", *flags]
    pspo.main()


def finished(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*/result.json"))), None)


def launch(job: tuple[str, list[str], Path]) -> None:
    """One run in a process of its own, unless it has been made; an interrupted one goes on."""
    variant, flags, folder = job
    if finished(folder):
        return
    begun = sorted(folder.glob("*/checkpoint.pt"))
    flags = ["--resume", str(begun[-1].parent)] if begun else [*flags, "--runs-dir", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "run", variant, str(folder.parent), *flags]
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    print(f"{folder.name}: {'done' if done.returncode == 0 else 'FAILED, see ' + str(folder / 'log.txt')}", flush=True)


def interval(x: list[float]) -> str:
    """Mean ± half-width of Student's 95% interval over seeds."""
    if len(x) < 2:
        return f"{x[0]:.2f}"
    return f"{np.mean(x):.2f} ± {scipy.stats.sem(x) * scipy.stats.t.ppf(0.975, len(x) - 1):.2f}"


def table(results: dict[str, list[Path]]) -> str:
    """One row for each variant: its last policies' scores, and what the run looked like from inside."""
    head = "variant | seeds | score, or % of the optimum | each seed | sampled actions | last third, worst"
    head += " | its predicted; real return | largest weight | entropy | Figure 3: Spearman | minutes"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for name, paths in results.items():
        of_seeds = [json.loads(path.read_text()) for path in paths]
        logs = [np.genfromtxt(path.with_name("metrics.csv"), delimiter=",", names=True) for path in paths]
        key = "share_of_optimum" if "share_of_optimum" in of_seeds[0] else "score"
        values = [result[key] * (100 if key == "share_of_optimum" else 1) for result in of_seeds]
        late = [log[-max(1, len(log) // 3) :] for log in logs]
        cells = [name, ", ".join(str(result["args"]["seed"]) for result in of_seeds), interval(values)]
        cells += [", ".join(f"{x:.2f}" for x in values), interval([result["sampled"]["score"] for result in of_seeds])]
        cells += [f"{min(log['evalscore'].min() for log in late):.1f}"]
        returns = [np.mean([log[f"eval{x}return"].mean() for log in late]) for x in ("predicted_", "")]
        cells += [f"{returns[0]:,.0f}; {returns[1]:,.0f}"]
        cells += [f"{np.mean([log[f'posterior{x}'][-1] for log in logs]):.2f}" for x in ("largest", "entropy")]
        cells += [interval([result["figure3"] for result in of_seeds])]
        cells += [f"{np.mean([result['minutes'] for result in of_seeds]):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def poisoned(seed: int, variant: str, iterations: int = 10_000) -> dict[str, float]:
    """Liquidation where 3 of 10 models add 0.2 to the price at every step; the others and the data are honest."""
    args = replace(pspo.Args(), **pspo.SETTINGS["liquidation"], seed=seed)
    args = replace(args, pool_size=10, iterations=iterations)
    data = pspo.make_dataset(liquidation_env.behaviour_dataset(args.dataset_episodes, seed), f"generated, seed {seed}")
    columns = {key: torch.as_tensor(column) for key, column in data.columns.items()}
    torch.manual_seed(seed)
    pool = pspo.train_dynamics(args, columns, pspo.TERMINAL["liquidation"])
    pool.net.biases[-1][:3, :, 3] += 0.2 / pool.output_std[3]  # outputs: reward, Δt, Δm, Δp
    learner, env = VARIANTS[variant](args, columns, pool), pspo.make_env(args)
    learner.clone_behaviour()
    learner.redraw()
    for iteration in range(1, iterations + 1):
        for optimizer, rate in zip(learner.optimizers, (args.actor_lr, args.critic_lr), strict=True):
            optimizer.param_groups[0]["lr"].fill_(rate * pspo.cosine(iteration, iterations))
        learner.iterate()
    first, returns = pspo.evaluate(learner.average.act, env, 10_000, seed + 20_000)
    mass = learner.log_belief().exp()[learner.members < 3].sum().item()
    value = learner.start_value(torch.as_tensor(first))
    return dict(mass=mass, value=value, true=float(returns.mean()), error=value / float(returns.mean()) - 1)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    args = tyro.cli(Args, description=__doc__)
    if args.study == "poisoned":
        print("| belief | seed | mass on the 3 liars | critic at s₀ | true value | error |\n" + "|---" * 6 + "|")
        for variant in args.only or ("A", "uniform"):
            for seed in args.seeds or (1, 2, 3):
                row = poisoned(seed, variant)
                numbers = f"{row['mass']:.3f} | {row['value']:.1f} | {row['true']:.1f} | {100 * row['error']:+.1f}%"
                print(f"| {variant} | {seed} | {numbers} |", flush=True)
        return
    seeds, variants = STUDIES[args.study]
    folders = {
        name: [args.runs_dir / args.study / f"{name}__{seed}".replace(" ", "_") for seed in args.seeds or seeds]
        for name in args.only or variants
    }
    jobs = [  # a variant's seeds first: its pools are there for the next variant
        (variants[name][0], [*variants[name][1], "--seed", str(seed)], folders[name][i])
        for name in folders
        for i, seed in enumerate(args.seeds or seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as workers:
        list(workers.map(launch, jobs))
    results = {name: [path for folder in paths if (path := finished(folder))] for name, paths in folders.items()}
    print(table({name: paths for name, paths in results.items() if paths}))


if __name__ == "__main__":
    main()
