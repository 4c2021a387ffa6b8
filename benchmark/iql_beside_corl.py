"""IQL beside CORL's IQL: the same data, environment, number of updates and seeds, each with its own code and settings.

    git clone https://github.com/tinkoff-ai/CORL
    python benchmark/iql_beside_corl.py --corl CORL --env-id hopper-medium-v2 --updates 100000 --seeds 1 2 3

CORL's `algorithms/offline/iql.py` runs as it is, with its own configuration file. It imports gym, d4rl, wandb and
pyrallis, which need an old Python; stand-ins take their places: Gymnasium's environment under gym's old interface, the
data set under `qlearning_dataset`'s rules (facts that D4RL documents), a logger that keeps the learning curve.
Ours runs with the official code's settings, and once more with --normalize-observations, as CORL's files have it.
What has a result is not run again; a run of ours that was stopped goes on, if iql.py is still the version that began
it. Curves go to docs/results/iql_beside_corl_<env-id>.csv, the table to .md, the figure to
docs/figures/iql_beside_corl.png (one panel for each data set that has a CSV).
"""

import csv
import dataclasses
import importlib.util
import json
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runner import Job, UserError, execute, interval, keep_data_folders, read_csv, require  # noqa: E402

import iql  # noqa: E402  (the scripts are not installed; they lie in the repository's root)

EVAL_EVERY, EVAL_EPISODES, FINAL_EPISODES = 5000, 10, 100
OURS = {"ours": {}, "ours, normalised observations": {"normalize_observations": True}}  # beside the domain's settings
WHO = {"CORL": "tab:orange", "ours": "tab:blue", "ours, normalised observations": "tab:green"}  # and its colour


@dataclass
class Args:
    corl: Path
    """a checkout of CORL"""
    env_id: str = "hopper-medium-v2"
    """a D4RL name; its file is looked for as iql.py does"""
    updates: int = 100_000
    """updates of each run; both cosine schedules end there"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs"""
    jobs: int = 2
    """processes at a time, one thread each"""
    runs_dir: Path = Path("runs/iql_beside_corl")
    """where the runs lie; relative to the repository's root"""
    docs_dir: Path = Path("docs")
    """where results/ and figures/ go; relative to the repository's root"""
    only: str = ""
    """internal: run CORL with this one seed in this process"""


class OldEnv:
    """A Gymnasium environment under the interface of gym 0.21, with D4RL's normalised score."""

    def __init__(self, env_id: str, domain: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.env = gymnasium.make(env_id)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.domain, self.next_seed = domain, None
        self.observe = self.reward = lambda x: x

    def seed(self, seed: int) -> None:
        self.next_seed = seed

    def reset(self) -> np.ndarray:
        obs, _ = self.env.reset(seed=self.next_seed)
        self.next_seed = None
        return self.observe(obs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.observe(obs), self.reward(reward), terminated or truncated, info

    def get_normalized_score(self, total: float) -> float:
        return iql.normalised_score(total, self.domain) / 100


def transform(attribute: str):
    """gym.wrappers.TransformObservation or TransformReward of an OldEnv, in place."""

    def wrap(env: OldEnv, function) -> OldEnv:
        setattr(env, attribute, function)
        return env

    return wrap


def qlearning_rows(dataset: iql.Dataset) -> dict[str, np.ndarray]:
    """D4RL's `qlearning_dataset`: row i with the next row's observation, timed-out rows and the last one dropped."""
    keep = ~dataset.timeouts[:-1]
    rows = {key: getattr(dataset, key)[:-1][keep].copy() for key in ("observations", "actions", "rewards", "terminals")}
    return rows | {"next_observations": dataset.observations[1:][keep].copy()}


def load_corl(checkout: Path, env_id: str, dataset: iql.Dataset, curve: list[tuple[int, float]]):
    """CORL's module with stand-ins for what it imports; its log of scores goes to `curve`."""
    domain = env_id.split("-")[0]
    env = OldEnv(iql.EVAL_ENVS[domain]["id"], domain)

    def log(values: dict, step: int) -> None:
        if "d4rl_normalized_score" in values:
            curve.append((step, values["d4rl_normalized_score"]))
            print(f"update {step}: score {curve[-1][1]:.1f}", flush=True)

    wrappers = types.SimpleNamespace(TransformObservation=transform("observe"), TransformReward=transform("reward"))
    stand_ins = {
        "gym": dict(Env=OldEnv, make=lambda name: env, wrappers=wrappers),
        "d4rl": dict(qlearning_dataset=lambda env: qlearning_rows(dataset)),
        "pyrallis": dict(wrap=lambda: lambda function: function),
        "wandb": dict(init=lambda **kwargs: None, log=log, run=types.SimpleNamespace(save=lambda: None)),
    }
    for name, attributes in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    spec = importlib.util.spec_from_file_location("corl_iql", checkout / "algorithms/offline/iql.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["corl_iql"] = module
    spec.loader.exec_module(module)
    return module, env


def corl_config(module, checkout: Path, env_id: str) -> dict:
    """The configuration that CORL ships for this data set; flat `key: value` lines."""
    task, level = env_id.removesuffix("-v2").split("-", 1)
    text = (checkout / f"configs/offline/iql/{task}/{level.replace('-', '_')}_v2.yaml").read_text()
    pairs = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    words = {"true": True, "false": False, "null": None, "''": ""}
    types_ = {field.name: type(field.default) for field in dataclasses.fields(module.TrainConfig)}
    return {
        key: words[value] if value in words else types_[key](float(value) if types_[key] is not str else value)
        for key, value in pairs.items()
    }


def run_corl(args: Args, seed: int, result: Path) -> None:
    """CORL's own `train`, then a final evaluation with its own `eval_actor`."""
    torch.set_num_threads(1)
    dataset = iql.load_dataset(args.env_id, None, ())
    curve: list[tuple[int, float]] = []
    module, env = load_corl(args.corl, args.env_id, dataset, curve)
    trainers = []

    class Recorded(module.ImplicitQLearning):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            trainers.append(self)

    module.ImplicitQLearning = Recorded
    config = corl_config(module, args.corl, args.env_id)
    config |= dict(device="cpu", seed=seed, max_timesteps=args.updates, buffer_size=1_000_000)
    config |= dict(eval_freq=EVAL_EVERY, n_episodes=EVAL_EPISODES)
    started = time.process_time()
    module.train(module.TrainConfig(**config))
    seconds = time.process_time() - started
    returns = module.eval_actor(env, trainers[0].actor, "cpu", FINAL_EPISODES, seed + 20_000)
    scores = [100 * env.get_normalized_score(x) for x in returns]
    content = {"curve": curve, "final": float(np.mean(scores)), "cpu_seconds": seconds, "config": config}
    content |= {"data_sha256": dataset.sha256, "source": dataset.source}
    with iql.replacing(result) as part:  # what is there is whole
        part.write_text(json.dumps(content, indent=2) + "\n")


def our_job(args: Args, who: str, seed: int, folder: Path) -> Job:
    """`python iql.py` as a user types it."""
    settings = dict(env_id=args.env_id, iterations=args.updates, eval_every=EVAL_EVERY, eval_episodes=EVAL_EPISODES)
    settings |= dict(final_episodes=FINAL_EPISODES, cuda=False, seed=seed)
    return Job("iql", settings | OURS[who], folder)


def run_ours(job: Job) -> dict:
    """Its learning curve and final score; what was stopped goes on."""
    log = job.folder / "log.txt"
    if job.state() != "done" and execute(job.command(), str(ROOT), str(log)):
        raise UserError(f"iql.py failed: {log} says why")
    result = job.result()
    rows = read_csv(job.finished() / "metrics.csv")
    curve = [(int(float(row["iteration"])), float(row["eval/score"])) for row in rows]
    return {"curve": curve, "final": result["score"], "data_sha256": result["dataset"]["sha256"]}


def run_one(args: Args, who: str, seed: int) -> dict:
    """One run of either implementation, unless it has been run."""
    name = f"{who.replace(', ', '_').replace(' ', '_')}_{seed}"
    folder = ROOT / args.runs_dir / f"{args.env_id}_{args.updates}" / name
    folder.mkdir(parents=True, exist_ok=True)
    if who in OURS:
        result = run_ours(our_job(args, who, seed, folder))
    else:
        path = folder / "result.json"
        if not path.exists():
            command = [sys.executable, __file__, "--corl", str(args.corl.resolve()), "--env-id", args.env_id]
            command += ["--updates", str(args.updates), "--only", f"{seed} {path}"]
            if execute(command, str(ROOT), str(folder / "log.txt")):
                raise UserError(f"CORL's run failed: {folder / 'log.txt'} says why")
        result = json.loads(path.read_text())
    print(f"{time.strftime('%H:%M:%S')} {args.env_id}, {who}, seed {seed}: {result['final']:.1f}", flush=True)
    return result


def figure(results: Path, path: Path) -> None:
    """Learning curves: mean over seeds (thick) and every seed, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = sorted(results.glob("iql_beside_corl_*.csv"))
    fig, axes = plt.subplots(1, len(files), figsize=(6 * len(files), 4.4), squeeze=False, layout="constrained")
    for ax, file in zip(axes[0], files, strict=True):
        rows = read_csv(file)
        for who, colour in WHO.items():
            curves: dict[str, list] = {}
            for row in rows:
                if row["who"] == who and row["update"] != "final":
                    curves.setdefault(row["seed"], []).append((int(row["update"]), float(row["score"])))
            for curve in curves.values():
                ax.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, lw=1)
            if not curves:
                continue
            stack = np.array(list(curves.values()))  # (seeds, evaluations, 2)
            ax.plot(stack[0, :, 0], stack[:, :, 1].mean(0), color=colour, lw=2, label=f"{who}, {len(curves)} seeds")
        name = iql.figure_name(file.stem.removeprefix("iql_beside_corl_"), rows[0]["data"])
        ax.set(title=name, xlabel="updates", ylabel="score")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WHO))
    fig.savefig(path, dpi=110)


def compare(args: Args) -> None:
    """Run what has not been run, and write table, curves and figure. Raises UserError."""
    keep_data_folders()
    plan = [(who, seed) for seed in args.seeds for who in WHO]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(plan, pool.map(lambda cell: run_one(args, *cell), plan), strict=True))
    same = len({result["data_sha256"] for result in found.values()}) == 1
    require(
        same, f"the runs in {args.runs_dir} saw different data: choose another --runs-dir, or delete the older ones"
    )
    results, figures = (ROOT / args.docs_dir / name for name in ("results", "figures"))
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    stem = results / f"iql_beside_corl_{args.env_id}"
    dataset = iql.load_dataset(args.env_id, None, ())
    data = "not D4RL's file" if "not D4RL's" in dataset.source else "D4RL's file"
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("who", "seed", "update", "score", "data"))
        for (who, seed), result in found.items():
            writer.writerows((who, seed, update, f"{score:.2f}", data) for update, score in result["curve"])
            writer.writerow((who, seed, "final", f"{result['final']:.2f}", data))
    head = "final score (100 episodes), mean ± 95% interval over seeds | every seed | mean of the last 5 evaluations"
    about = f"--env-id {args.env_id} --updates {args.updates} --seeds {' '.join(map(str, args.seeds))}"
    lines = [
        f"`python benchmark/iql_beside_corl.py --corl CORL {about}`; data: {dataset.source}; CPU, one thread a run."
    ]
    lines += ["", f"| | {head} |", "|---|---|---|---|"]
    for who in WHO:
        finals = np.array([found[who, seed]["final"] for seed in args.seeds])
        late = np.array([np.mean([score for _, score in found[who, seed]["curve"][-5:]]) for seed in args.seeds])
        cells = [f"{x.mean():.1f} ± {interval(x):.1f}" for x in (finals, late)]
        lines.append(f"| {who} | {cells[0]} | {', '.join(f'{x:.1f}' for x in finals)} | {cells[1]} |")
    behaviour = iql.episode_returns(dataset).mean()
    lines.append(f"| behaviour | {iql.normalised_score(behaviour, args.env_id.split('-')[0]):.1f} | | |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    figure(results, figures / "iql_beside_corl.png")
    print("\n".join(lines))


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.only:
        seed, path = args.only.split(" ", 1)
        return run_corl(args, int(seed), Path(path))
    there = (args.corl / "algorithms/offline/iql.py").exists()
    require(there, f"{args.corl} is no checkout of CORL: it has no algorithms/offline/iql.py")
    compare(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
