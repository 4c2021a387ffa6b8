"""How fast the training steps are: beside the matrix products they need, and beside other implementations.

    python benchmark/speed.py --threads 1 2                          # this machine
    python benchmark/speed.py --corl CORL --unifloral UNIFLORAL      # beside checkouts of them; unifloral needs JAX
    python benchmark/speed.py --gpu                                  # recorded steps: the eager ones' results, and time

Shapes are hopper's, data random. Every implementation is a process of its own, on the given number of threads; they
take turns, so a machine that slows down slows all of them. The floor of a step is its matrix products alone, at their
shapes, one after another into memory that is there already: what cannot be left out. Numbers are medians, in ms.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))
import iql
import pspo

OBS, ACT, ROWS = 11, 3, 100_000
KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # else small steps pay for large ones' memory
SMALL = dict(pool_size=2, active_models=2, dynamics_hidden=8, dynamics_layers=2, dynamics_batch=16, hidden=8)  # --dry


@dataclass
class Args:
    """Measure the training steps."""

    threads: tuple[int, ...] = (1,)  # numbers of CPU threads
    rounds: int = 15  # turns of every implementation
    only: str = ""  # measure only steps whose name contains this
    corl: str = ""  # checkout of CORL
    unifloral: str = ""  # checkout of unifloral; PYTHONPATH must have jax, flax, optax and distrax
    gpu: bool = False  # the steps on a GPU
    dry: bool = False  # tiny sizes, and --gpu on the CPU: does it run?
    worker: str = ""  # internal: the implementation to serve


# --- Our steps ---


def random_rows(device: str = "cpu") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    obs, action = torch.randn(ROWS + 1, OBS, generator=g), 1.9 * torch.rand(ROWS, ACT, generator=g) - 0.95
    columns = obs[:-1], action, torch.rand(ROWS, generator=g), obs[1:], torch.rand(ROWS, generator=g) < 0.01
    return {key: x.to(device) for key, x in zip(KEYS, columns, strict=True)}


def pspo_args(quick: bool, dry: bool) -> pspo.Args:
    settings = pspo.SETTINGS["hopper"] | (pspo.QUICK if quick else {}) | (SMALL if dry else {})
    return replace(pspo.Args(env_id="hopper-medium-v2"), **settings)


def pspo_learner(args: pspo.Args, device: str = "cpu") -> pspo.PSPO:
    data = random_rows(device)
    pool = pspo.empty_pool(args, data, pspo.TERMINAL["hopper"])
    pool.box.copy_(torch.tensor([[-10.0], [10.0]]).expand(2, OBS))
    learner = pspo.PSPO(args, data, pool)
    learner.redraw()
    return learner


def pool_step(args: pspo.Args, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """The step that train_dynamics hands to `fast`, which stops it here."""
    data = random_rows(device)
    data["known"] = torch.ones_like(data["terminals"])
    with mock.patch.object(pspo, "fast", side_effect=InterruptedError) as fast, contextlib.suppress(InterruptedError):
        pspo.train_dynamics(args, data, pspo.TERMINAL["hopper"])
    return fast.call_args.args[0]


def our_steps(dry: bool, device: str = "cpu") -> dict[str, Callable[[], Callable]]:
    """Name of a step → how to make it."""
    args, quick, paper = iql.Args(hidden=8 if dry else 256), pspo_args(True, dry), pspo_args(False, dry)
    return {
        "IQL update": lambda: iql.IQL(args, random_rows(device)).update,
        "PSPO iteration, quick": lambda: pspo_learner(quick, device).iterate,
        "PSPO iteration, paper's sizes": lambda: pspo_learner(paper, device).iterate,
        "pool update, 5 × 3 × 200": lambda: pool_step(quick, device),
        "pool update, 100 × 4 × 256": lambda: pool_step(paper, device),
    }


def products(step: Callable) -> list[tuple[int, int, int, int]]:
    """(stack, m, k, n) of every matrix product in a step."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found = [event.input_shapes for event in profile.events() if event.name in ("aten::bmm", "aten::baddbmm")]
    pairs = ([shape for shape in shapes if shape][-2:] for shapes in found)  # of baddbmm without what is added
    return [(*a, b[2]) for a, b in pairs]


# --- Implementations, each called in a process of its own: name of the step, and of the column → step ---


def ours(args: Args) -> dict[tuple[str, str], Callable]:
    pairs, device = itertools.product(our_steps(args.dry).items(), ("eager", "compiled")), torch.device("cpu")
    return {(name, how): pspo.fast(make(), device, how == "compiled") for (name, make), how in pairs}


def floor(args: Args) -> dict[tuple[str, str], Callable]:
    def replay(shapes: list[tuple[int, int, int, int]]) -> Callable[[], None]:
        new = {shape: torch.randn(shape) for p in shapes for shape in (p[:3], (p[0], *p[2:]))}
        out = {(p[0], p[1], p[3]): torch.empty(p[0], p[1], p[3]) for p in shapes}

        def step() -> None:
            for size, m, k, n in shapes:
                a, b, c = new[size, m, k], new[size, k, n], out[size, m, n]
                if n == 1:  # the transposed product, which libraries do far faster
                    torch.bmm(b.mT, a.mT, out=c.view(size, 1, m))
                else:
                    torch.bmm(a, b, out=c)

        return step

    return {(name, "floor"): replay(products(make())) for name, make in our_steps(args.dry).items()}


def corl(args: Args) -> dict[tuple[str, str], Callable]:
    sys.modules |= {name: mock.MagicMock() for name in ("d4rl", "gym", "pyrallis", "wandb")}  # only imported
    from algorithms.offline import iql as theirs

    nets = theirs.GaussianPolicy(OBS, ACT, 1.0), theirs.TwinQ(OBS, ACT), theirs.ValueFunction(OBS)
    pairs = [x for net in nets for x in (net, torch.optim.Adam(net.parameters(), lr=3e-4))]
    trainer, buffer = theirs.ImplicitQLearning(1.0, *pairs), theirs.ReplayBuffer(OBS, ACT, ROWS)
    buffer.load_d4rl_dataset({key: x.numpy() for key, x in random_rows().items()})
    return {("IQL update", "CORL"): lambda: trainer.train(buffer.sample(256))}


def unifloral(args: Args) -> dict[tuple[str, str], Callable]:
    sys.modules |= {name: mock.MagicMock() for name in ("d4rl", "gym", "wandb")}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads[0]])  # JAX takes the cores that it finds
    import jax
    from algorithms import iql as theirs

    os.environ.pop("XLA_FLAGS", None)  # it sets an option that only GPUs know
    settings, key, zero = theirs.Args(), jax.random.PRNGKey(0), jax.numpy.zeros
    obs, action, reward, next_obs, done = (jax.numpy.array(x.numpy()) for x in random_rows().values())
    data = theirs.Transition(obs=obs, action=action, reward=reward, next_obs=next_obs, done=done * 1.0)
    stats = obs.mean(0), obs.std(0)
    actor, q = theirs.TanhGaussianActor(ACT, *stats), theirs.DualQNetwork(*stats)
    value = theirs.StateValueFunction(*stats)
    nets = dict(actor=(actor, [zero(OBS)]), dual_q=(q, [zero(OBS), zero(ACT)]), value=(value, [zero(OBS)]))
    nets["dual_q_target"] = nets["dual_q"]
    state = theirs.AgentTrainState(**{name: theirs.create_train_state(settings, key, *n) for name, n in nets.items()})
    update, carry = theirs.make_train_step(settings, actor.apply, q.apply, value.apply, data), (key, state)
    scan = jax.jit(lambda carry: jax.lax.scan(update, carry, None, UPDATES["unifloral"])[0])

    def step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(scan(carry))

    return {("IQL update", "unifloral"): step}


UPDATES = {"unifloral": 20}  # in one call, as it trains
SIDES = dict(floor=floor, ours=ours, corl=corl, unifloral=unifloral)


def window(step: Callable, wait: Callable = lambda: None) -> float:
    """ms of a step, mean over half a second, as in a long loop: a few steps alone find cold caches."""
    wait()
    begin, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begin < 0.5:
        step()
        wait()
        count += 1
    return 1e3 * (time.perf_counter() - begin) / count


def serve(args: Args) -> None:
    """In a process of its own: the steps, timed once for every line that comes in."""
    torch.set_num_threads(args.threads[0])
    with contextlib.redirect_stdout(sys.stderr):
        steps = {names: step for names, step in SIDES[args.worker](args).items() if args.only in names[0]}
        for step, _ in itertools.product(steps.values(), range(4)):  # the first compile
            step()
    print("ready", flush=True)
    for _ in sys.stdin:
        times = [[*names, window(step) / UPDATES.get(names[1], 1)] for names, step in steps.items()]
        print(json.dumps(times), flush=True)


def interleaved(args: Args, threads: int, step: str) -> dict[str, float]:
    """Column → median ms. Only this step in a process: the compiler keeps eight versions of what steps share."""
    checkouts = dict(corl=args.corl, unifloral=args.unifloral)
    sides = {"floor": "", "ours": ""} | {side: path for side, path in checkouts.items() if path}
    flags = [f"--threads={threads}", f"--only={step}", *["--dry"] * args.dry]
    workers, times = [], {}
    for side, checkout in sides.items():
        path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
        environment = os.environ | KEEP | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, __file__, *flags, f"--worker={side}"]
        worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        if worker.stdout.readline():
            workers.append(worker)
        else:
            print(f"{side}: not measured, it ended with the message above", file=sys.stderr)
    for _, worker in itertools.product(range(args.rounds), workers):
        print("go", file=worker.stdin, flush=True)
        for _, column, ms in json.loads(worker.stdout.readline()):
            times.setdefault(column, []).append(ms)
    for worker in workers:
        worker.communicate()
    return {column: statistics.median(x) for column, x in times.items()}


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def on_cpu(args: Args) -> None:
    before, names = os.getloadavg()[0], [name for name in our_steps(args.dry) if args.only in name]
    found = {pair: interleaved(args, *pair) for pair in itertools.product(args.threads, names)}
    columns = list(dict.fromkeys(column for ms in found.values() for column in ms))
    rows = [["step", "threads", *columns, "best / floor"]]
    for (threads, step), ms in found.items():
        cells = [f"{ms[column]:.2f}" if column in ms else "" for column in columns]
        best = f"{min(ms['eager'], ms['compiled']) / ms['floor']:.2f}" if "eager" in ms else ""
        rows.append([step, str(threads), *cells, best])
    print(markdown(rows))
    where = f"{os.cpu_count()} cores, load {before:.1f} to {os.getloadavg()[0]:.1f}, PyTorch {torch.__version__}"
    print(f"\nms, medians of {args.rounds} interleaved rounds; {where}")


def on_gpu(args: Args) -> None:
    """Recorded steps: are their results those of the eager ones? And their times."""
    if not (torch.cuda.is_available() or args.dry):
        sys.exit("no GPU here (--dry runs it with tiny sizes on the CPU)")
    device, wait = torch.device("cpu" if args.dry else "cuda"), (lambda: None) if args.dry else torch.cuda.synchronize
    makes, steps = our_steps(args.dry, device.type), 10 if args.dry else 200
    for name in ("IQL update", "PSPO iteration, quick", "PSPO iteration, paper's sizes"):
        ends = []
        for recorded in (False, True):
            torch.manual_seed(1)
            step = makes[name]()
            fast = pspo.fast(step, device, False) if recorded else step
            for _ in range(steps):
                fast()
            ends.append({key: x.double() for key, x in step.__self__.state_dict().items()})
        apart = max(((x - ends[1][key]).abs() / (1 + x.abs())).max().item() for key, x in ends[0].items())
        verdict = "equal" if apart < 1e-4 else "DIFFERENT"
        print(f"{name}: {steps} steps, recorded and eager: {verdict}, at most {apart:.1e} apart", flush=True)
    best, rows = {}, [["step, ms", "eager", "recorded", "compiled and recorded"]]
    for name, make in makes.items():
        torch.compiler.reset()  # it keeps eight versions of what the steps share
        variants = make(), pspo.fast(make(), device, False), pspo.fast(make(), device, True)
        for step, _ in itertools.product(variants, range(5)):  # the first compile and record
            step()
        times = [statistics.median(window(step, wait=wait) for _ in range(args.rounds)) for step in variants]
        best[name] = min(times)
        rows.append([name, *(f"{ms:.3f}" for ms in times)])
    where = "CPU, a dry run" if args.dry else torch.cuda.get_device_name()
    print(f"\n{where}, PyTorch {torch.__version__}\n\n{markdown(rows)}\n")
    update, _, iteration, _, pool = best
    print(f"PSPO at the paper's sizes: {best[iteration]:.2f} ms an iteration; the paper: 112 (RTX 3090 Ti)")
    print(f"IQL: {1e3 / best[update]:,.0f} updates a second, a million in {best[update] / 0.06:.1f} minutes")
    print(f"100 models: {1e3 / best[pool]:,.0f} updates a second")


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if args.worker:
        serve(args)
    else:
        (on_gpu if args.gpu else on_cpu)(args)


if __name__ == "__main__":
    main()
