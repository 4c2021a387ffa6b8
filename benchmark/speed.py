"""How fast the scripts' training steps are: beside the matrix products they need, and beside other implementations.

    python benchmark/speed.py                                   # this machine: 1 and 2 CPU threads, and a GPU if any
    python benchmark/speed.py --compile --bfloat16              # the compiled steps, too, and in bfloat16
    python benchmark/speed.py --peers DIR --jax-python PYTHON   # and CORL, OfflineRL-Kit, PMDB, unifloral, JAX-CORL
    python benchmark/speed.py --growth                          # the dynamics update over members, batch and width
    python benchmark/speed.py --profile                         # what a step's time goes to, operation by operation

DIR holds checkouts, each under its own name. Their update code runs as it is, on random rows; the modules that it only
imports (gym, d4rl, wandb, pyrallis) have stand-ins. All works of a run take turns, one step each, so a machine that
slows down slows all of them: ratios hold. So that they share nothing else, the C library is told to keep freed memory:
otherwise a small work fetches again, page by page, what the library gives back after a large one. The floor of a work
is the same products, at the same shapes, one after another into memory that is there already, with nothing in between.
The table goes to <output>.md, the numbers, with the machine and the command, to <output>.json.
"""

import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts are not installed
from speed_peers import peer_steps  # noqa: E402  (beside this file)

import iql  # noqa: E402
import pspo  # noqa: E402

OBS, ACT, ROWS = 11, 3, 100_000  # hopper's dimensions
NETS = dict(critic=(2, OBS + ACT, 1), value=(1, OBS, 1), gaussian=(1, OBS, ACT), actor=(1, OBS, 2 * ACT))
Product = tuple[int, int, int, int]  # size, m, k, n: a stack of (m, k) @ (k, n)


@dataclass
class Args:
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads to measure with"""
    rounds: int = 50
    """timed steps of every work"""
    only: str = ""
    """measure only works whose name contains this"""
    compile: bool = False
    """also measure the steps compiled by torch.compile (half a minute of compiling each)"""
    bfloat16: bool = False
    """also measure the steps with iql.py's --bfloat16, pspo.py's --dynamics-bfloat16; their floor is that of float32"""
    growth: bool = False
    """measure how the dynamics update grows with members, batch and width instead"""
    profile: bool = False
    """say also which operations take the time of every step that is not compiled"""
    evaluation: bool = True
    """measure 100 evaluation episodes of hopper"""
    peers: Path | None = None
    """a folder with checkouts of CORL, OfflineRL-Kit, PMDB, unifloral, JAX-CORL; what is missing is skipped"""
    jax_python: str | None = None
    """a Python with jax, flax, optax, distrax and pydantic, for unifloral and JAX-CORL"""
    small: bool = False
    """tiny networks, to test this program"""
    output: Path = Path("speed")
    """where to write, without suffix"""


@dataclass
class Work:
    """One thing to measure: a step and the matrix products that it cannot do without."""

    name: str
    step: Callable[[], object]
    products: list[Product] = field(default_factory=list)

    @property
    def flop(self) -> int:
        return sum(2 * size * m * k * n for size, m, k, n in self.products)


def mlp(size: int, rows: int, widths: list[int], backward: str = "") -> list[Product]:
    """Products of a stack of MLPs on `rows` rows: forward, and "weights" or "inputs" (of all layers) backward."""
    forward = [(size, rows, k, n) for k, n in itertools.pairwise(widths)]
    weights = [(size, k, rows, n) for k, n in itertools.pairwise(widths)]
    inputs = [(size, rows, n, k) for k, n in itertools.pairwise(widths)]
    return forward + {"": [], "weights": weights + inputs[1:], "inputs": inputs}[backward]


def net(name: str, rows: int, hidden: int, backward: str = "") -> list[Product]:
    size, width, out = NETS[name]
    return mlp(size, rows, [width, hidden, hidden, out], backward)


def iql_products(args: iql.Args) -> list[Product]:
    """Eqs. (5) to (7): V is asked before and after its step, at s and s' then."""
    b, h = args.batch_size, args.hidden
    value = net("value", b, h, "weights") + net("value", 2 * b, h)
    return value + net("critic", b, h) + net("critic", b, h, "weights") + net("gaussian", b, h, "weights")


def dynamics_products(members: int, batch: int, width: int, layers: int) -> list[Product]:
    return mlp(members, batch, [OBS + ACT, *[width] * layers, 2 * (1 + OBS)], "weights")


def pspo_products(args: pspo.Args) -> list[Product]:
    """Eqs. (3) to (9), in the order of PSPO.iterate; the default posterior and projection."""
    b, h, rows, samples = args.batch_size, args.hidden, args.batch_size // 2, args.action_samples
    few = args.evidence_rows
    model = [OBS + ACT, *[args.dynamics_hidden] * args.dynamics_layers, 2 * (1 + OBS)]
    products = [p for n in (rows, few) for p in mlp(args.active_models, n, model)]
    for n in (rows, args.active_models * few, args.model_samples * rows):  # V at these
        products += net("actor", n, h) + net("actor", n, h) + net("critic", samples * n, h)
    products += net("actor", rows, h) + net("critic", b, h, "weights")
    products += net("actor", b, h, "weights") + net("critic", samples // 2 * b, h, "inputs") + 2 * net("actor", b, h)
    return products


def random_rows(obs_dim: int, act_dim: int, device: torch.device) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    data = dict(
        observations=torch.randn(ROWS, obs_dim, generator=g),
        actions=torch.rand(ROWS, act_dim, generator=g) * 1.9 - 0.95,
        rewards=torch.rand(ROWS, generator=g),
        next_observations=torch.randn(ROWS, obs_dim, generator=g),
        terminals=torch.rand(ROWS, generator=g) < 0.01,
    )
    return {key: value.to(device) for key, value in data.items()}


def pspo_work(name: str, device: torch.device, compiled: bool, **changes) -> Work:
    args, domain = pspo.resolve(pspo.Args(**changes))
    dims = (3, 1) if domain == "liquidation" else (OBS, ACT)
    pool = pspo.Dynamics(args.pool_size, *dims, args.dynamics_hidden, args.dynamics_layers).to(device)
    pool.box.copy_(torch.tensor([[-10.0], [10.0]]).expand(2, dims[0]))
    learner = pspo.PSPO(args, random_rows(*dims, device), domain)
    learner.behaviour.requires_grad_(False)
    learner.redraw(pool)
    products = [] if domain == "liquidation" else pspo_products(args)
    return Work(name, pspo.fast(learner.iterate, device, "on" if compiled else "off", 0), products)


def dynamics_work(
    members: int, batch: int, width: int, layers: int, device: torch.device, compiled: bool, bfloat16: bool = False
) -> Work:
    """train_dynamics' inner step, written once more: it is a closure there."""
    pool, data = pspo.Dynamics(members, OBS, ACT, width, layers).to(device), random_rows(OBS, ACT, device)
    inputs = torch.cat([data["observations"], data["actions"]], -1)
    outputs = torch.cat([data["rewards"][:, None], data["next_observations"]], -1)
    optimizer = pspo.Adam((pool.parameters(), 1e-4), weight_decay=7.5e-5)
    bootstrap = torch.randint(ROWS, (members, ROWS), device=device, dtype=torch.int32)

    def learn() -> torch.Tensor:
        columns = torch.randint(ROWS, (members, batch), device=device)
        rows = bootstrap.gather(1, columns).long()
        losses = pspo.beta_nll(*pool.standardised(inputs[rows], bfloat16), outputs[rows]).mean((1, 2))
        optimizer.minimise(losses.sum())
        return losses.detach()

    products = dynamics_products(members, batch, width, layers)
    name = f"dynamics, {members} × {layers} × {width}, batch {batch}"
    return Work(name, pspo.fast(learn, device, "on" if compiled else "off", 0), products)


def our_works(args: Args, device: torch.device) -> list[Work]:
    works = []
    small = dict(hidden=8, batch_size=32) if args.small else {}
    for bfloat16, compiled in itertools.product({False, args.bfloat16}, {False, args.compile}):
        end = (", compiled" if compiled else "") + (", bfloat16" if bfloat16 else "")
        iql_args, _ = iql.resolve(iql.Args(env_id="hopper-medium-v2", bfloat16=bfloat16, **small))
        learner = iql.IQL(iql_args, random_rows(OBS, ACT, device))
        update = iql.fast(learner.update, device, "on" if compiled else "off", 0)
        # the loop's variables are bound now, or every work would run the last one's
        works.append(Work(f"IQL{end}", lambda i=learner, u=update: (i.draw(), u()), iql_products(iql_args)))
        for members, width, layers in ((2, 8, 2),) if args.small else ((10, 200, 3), (100, 256, 4)):
            work = dynamics_work(members, 256, width, layers, device, compiled, bfloat16)
            work.name += end
            works.append(work)
        if bfloat16:  # not of policy iteration
            continue
        # The shapes of one update, whatever an option's default is at the moment: named in full
        models = dict(pool_size=10, active_models=10, **small)
        hopper = dict(env_id="hopper-medium-v2", **models)
        published = dict(dynamics_hidden=256, dynamics_layers=4, model_samples=10, action_samples=20)
        if args.small:
            published = dict(dynamics_hidden=8, dynamics_layers=2)
        works += [
            pspo_work(f"PSPO, hopper --quick{end}", device, compiled, quick=True, **hopper),
            pspo_work(f"PSPO, hopper, paper's setting{end}", device, compiled, **hopper | published),
            pspo_work(f"PSPO, liquidation{end}", device, compiled, **models),
        ]
    return works


def floor(products: list[Product], device: torch.device) -> Callable[[], object]:
    """The products alone, on a GPU captured like the steps."""
    new = {shape: torch.randn(shape, device=device) for p in products for shape in ((p[0], p[1], p[2]), p[:1] + p[2:])}
    out = {(p[0], p[1], p[3]): torch.empty(p[0], p[1], p[3], device=device) for p in products}

    def step() -> torch.Tensor:
        for size, m, k, n in products:
            a, b, c = new[size, m, k], new[size, k, n], out[size, m, n]
            if n == 1:  # one output: the transposed product, which libraries do far faster
                torch.bmm(b.mT, a.mT, out=c.view(size, 1, m))
            else:
                torch.bmm(a, b, out=c)
        return c[:1, 0]  # iql.Captured copies what a step returns

    return iql.Captured(step) if device.type == "cuda" else step


def milliseconds(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Every step in turn, `rounds` times, after five rounds that do not count; on a GPU each waits for its end."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 5):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if i >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, 10% and 90% quantile."""
    low, _, _, _, middle, _, _, _, high = statistics.quantiles(times, n=10, method="inclusive")
    return middle, low, high


def measure(works: list[Work], args: Args, device: torch.device) -> list[dict]:
    works = [work for work in works if args.only in work.name]
    steps = {work.name: work.step for work in works}
    steps |= {f"floor of {work.name}": floor(work.products, device) for work in works if work.products}
    side = 64 if args.small else 2048
    big = Work("", None, [(1, side, side, side)])
    steps["matrix product"] = floor(big.products, device)
    times = {name: spread(t) for name, t in milliseconds(steps, args.rounds, device).items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = big.flop / times["matrix product"][0] / 1e6
    print(f"\n{where}: matrix products of {side}³ at {peak:.0f} GFLOP/s", flush=True)
    rows = []
    for work in works:
        middle, low, high = times[work.name]
        row = {"where": where, "work": work.name, "ms": middle, "ms_10%": low, "ms_90%": high, "peak_gflops": peak}
        if work.products:
            least = times[f"floor of {work.name}"][0]
            row |= {"mflop": work.flop / 1e6, "floor_ms": least, "ratio": middle / least}
            row["share_of_peak"] = work.flop / middle / 1e6 / peak
        rows.append(row)
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


class Stopwatch(TorchDispatchMode):
    """Adds up the time that each operation takes, in ms, most of what Python and the dispatcher take left out.

    torch.profiler would do, but with it the products of an IQL update took 1.4 times as long.
    """

    def __init__(self):
        super().__init__()
        self.times: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        self.times[name] = self.times.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        return result


def profiles(works: list[Work], args: Args) -> list[dict]:
    """ms of every operation in a step, the largest first. On the CPU: on a GPU they only start when they return."""
    where, rows = f"CPU, {torch.get_num_threads()} threads", []
    for work in works:
        if args.only not in work.name or ", compiled" in work.name:
            continue
        for _ in range(5):
            work.step()
        with Stopwatch() as watch:
            for _ in range(args.rounds):
                work.step()
        times = sorted(watch.times.items(), key=lambda item: -item[1])
        rows.append({"where": where, "work": work.name, "ms": {name: ms / args.rounds for name, ms in times}})
        largest = [f"{name} {ms:.2f}" for name, ms in list(rows[-1]["ms"].items())[:8]]
        print(f"{where}, {work.name}: ms of {', '.join(largest)}", flush=True)
    return rows


def growth_works(args: Args, device: torch.device) -> list[Work]:
    members, batch, width = (2, 16, 8) if args.small else (10, 256, 256)
    grid = [(m, batch, width) for m in (1, 2, 5, 10, 20, 50, 100, 200)]
    grid += [(members, b, width) for b in (32, 64, 128, 512, 1024)]
    grid += [(members, batch, w) for w in (64, 128, 512)]
    return [dynamics_work(m, b, w, 4, device, False) for m, b, w in (grid[:2] if args.small else grid)]


def evaluation(args: Args) -> list[dict]:
    """100 episodes of hopper, of 300 steps each: pspo.evaluate against one environment after the other."""
    import gymnasium as gym

    def make_env() -> gym.Env:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gym.make("Hopper-v4", terminate_when_unhealthy=False, max_episode_steps=length)

    episodes, length, actor = 4 if args.small else 100, 20 if args.small else 300, pspo.Actor(OBS, ACT, 256)

    def one_by_one() -> int:
        env, steps = make_env(), 0
        for i in range(episodes):
            obs, done = env.reset(seed=i)[0], False
            while not done:
                obs, _, terminated, truncated, _ = env.step(np.clip(actor.act(obs[None])[0], -1, 1))
                done, steps = terminated or truncated, steps + 1
        env.close()
        return steps

    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"evaluate": [], "one environment": []}
    for _ in range(2 if args.small else 5):
        for name, play in (
            ("evaluate", lambda: pspo.evaluate(actor.act, make_env, episodes, 0, 0.99)),
            ("one environment", one_by_one),
        ):
            start = time.perf_counter()
            steps = play()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, t in times.items():
        middle, low, high = spread(t)
        row = {"where": f"CPU, {os.cpu_count()} cores", "work": f"{episodes} hopper episodes, {name}", "ms": middle}
        rows.append(row | {"ms_10%": low, "ms_90%": high})
    rows[0]["speedup"] = rows[1]["ms"] / rows[0]["ms"]
    print(f"\n{episodes} episodes, {steps:,} steps: {rows[0]['speedup']:.2f} times as fast as one environment")
    return rows


def jax_rows(args: Args) -> list[dict]:
    """unifloral and JAX-CORL in a process of their own, once per number of threads, and on a GPU if JAX finds it."""
    if not args.peers or not args.jax_python:
        print("no --peers and --jax-python: JAX implementations not measured")
        return []
    command = [args.jax_python, str(Path(__file__).with_name("speed_jax.py")), str(args.peers), str(args.rounds)]
    places = []
    for threads in args.threads:
        cores = sorted(os.sched_getaffinity(0))[:threads]  # XLA takes every core that it may run on
        places.append((f"CPU, {threads} threads", "cpu", ["taskset", "-c", ",".join(map(str, cores))]))
    if torch.cuda.is_available():
        places.append((torch.cuda.get_device_name(), "cuda", []))
    rows = []
    for where, platform_name, prefix in places:
        environment = os.environ | {"JAX_PLATFORMS": platform_name}
        run = subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True)
        if run.returncode:
            print(f"JAX, {where}: not measured: {(run.stderr.strip() or 'no message').splitlines()[-1]}")
            continue
        for name, times in json.loads(run.stdout.splitlines()[-1]).items():
            middle, low, high = spread(times)
            rows.append({"where": where, "work": name, "ms": middle, "ms_10%": low, "ms_90%": high})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| where | work | ms (10–90%) | MFLOP | floor, ms | × floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["where"], row["work"], f"{row['ms']:.2f} ({row['ms_10%']:.2f}–{row['ms_90%']:.2f})"]
        if "ratio" in row:
            cells += [f"{row['mflop']:,.0f}", f"{row['floor_ms']:.2f}", f"{row['ratio']:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if not torch.cuda.is_available():
        lines.append("| GPU | all | not measured: none here | | | |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []  # Linux only
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def keep_memory() -> None:
    """glibc: do not map large blocks one by one, and give nothing back."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for what, value in dict(M_MMAP_MAX=(-4, 0), M_TRIM_THRESHOLD=(-1, 2**31 - 1)).values():
            libc.mallopt(what, value)


def main(args: Args) -> None:
    rows, parts = [], []
    keep_memory()
    make = growth_works if args.growth else our_works

    def works_on(device: torch.device) -> list[Work]:
        works = make(args, device)
        if args.peers and not args.growth:
            peers = peer_steps(args.peers.resolve(), random_rows(OBS, ACT, device))
            works += [Work(name, step) for name, step in peers.items()]
        return works

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    works = works_on(cpu)
    for threads in args.threads:
        torch.set_num_threads(threads)
        rows += measure(works, args, cpu)
        parts += profiles(works, args) if args.profile else []
    if torch.cuda.is_available():
        torch._dynamo.reset()  # the compiler keeps eight versions of a function, and these are measured
        rows += measure(works_on(gpu), args, gpu)
    else:
        print("no GPU: its rows are not measured")
    if not args.growth:
        rows += jax_rows(args) + (evaluation(args) if args.evaluation else [])
    machine = {"cpu": processor(), "platform": platform.platform(), "torch": torch.__version__}
    content = {"command": " ".join(sys.argv), "machine": machine, "rows": rows, "profiles": parts}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
