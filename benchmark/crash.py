"""Kill it, corrupt it, feed it rubbish: what is left afterwards, counted. The table is docs/reliability.md's.

    python benchmark/crash.py                           # 50 kills at each place, 1,000 hostile inputs
    python benchmark/crash.py --kills 2 --hostile 30    # a minute of it

Kills: a tiny run gets SIGKILL at a random moment, is resumed (and perhaps killed again) until it ends, and must then
be the uninterrupted run: metrics.csv to the byte, the same actor, the same result.json, TensorBoard's rows once each.
Hostile inputs: drawn by hypothesis; the only outcomes allowed are success and one line on stderr with exit code 2.
Every case runs in a process forked from this one, which has imported everything and computed nothing.
"""

import contextlib
import csv
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "D4RL_MIRRORS": "http://127.0.0.1:9", "no_proxy": "*"}

import gymnasium as gym
import h5py
import hypothesis
import matplotlib.pyplot  # noqa: F401  (imported here so that no forked process has to)
import minari
import numpy as np
import torch
import tyro
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import iql  # noqa: E402  (the scripts are not installed; they lie in the repository's root)
import liquidation_env  # noqa: E402
import pspo  # noqa: E402

TINY = {
    "pspo": dict(
        cuda=False, num_threads=1, dataset_episodes=100, eval_episodes=20, final_episodes=30, eval_every=10,
        pool_size=3, active_models=2, redraw_every=15, dynamics_hidden=8, dynamics_layers=1, dynamics_epochs=2,
        dynamics_batch=64, dynamics_lr=3e-3, iterations=30, batch_size=32, hidden=8, model_samples=2,
        action_samples=4, actor_lr=1e-3, critic_lr=1e-3, target_kl=0.5, trust_region_every=7, bc_updates=20,
    ),
    "iql": dict(
        cuda=False, num_threads=1, dataset_episodes=100, eval_episodes=20, final_episodes=30, eval_every=20,
        iterations=80, batch_size=32, hidden=8, normalize_observations=True,
    ),
}  # fmt: skip
TINY["iql, fine-tuning"] = TINY["iql"] | dict(iterations=40, online_steps=60)
MODULES = {"pspo": pspo, "iql": iql, "iql, fine-tuning": iql}
STAGES = ("writing", "before fsync", "before rename", "after rename")


@dataclass
class Args:
    kills: int = 50
    """kills at each place"""
    hostile: int = 1000
    """hostile inputs in all"""
    seed: int = 1
    """of the moments and of the inputs"""
    only: str = ""
    """rows of the table whose name contains this"""
    out: Path | None = None
    """where the table goes, as NAME.md and NAME.csv (default: it is only printed)"""


# --- A case in a process of its own ---


def flags(settings: dict) -> list[str]:
    """Settings as the words of a command line."""
    words = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return words


def call(script: str, words: list[str], prepare=lambda: None, kill_after: float | None = None):
    """(exit code, stderr) of `python SCRIPT words…`, figure and optimum left out; −9: killed; −14, −24: it hung."""
    with tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            signal.alarm(900)  # waits for nothing; the other limit is of its own processor time
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            code = 99
            try:
                out = open(os.devnull, "w")
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = out, open(2, "w", closefd=False)
                module = MODULES.get(script) or sys.modules[script]
                module.plot, module.compare_with_optimum = (lambda *_: None), (lambda *_: {})
                sys.argv = [f"{module.__name__}.py", *words]
                prepare()
                with warnings.catch_warnings(action="ignore"):
                    module.main()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), err.read()


# --- Kills ---


def left_behind(run_dir: Path) -> dict:
    """What must be the same after a kill: all that a run leaves, less times and paths."""
    result = json.loads((run_dir / "result.json").read_text())
    del result["seconds"], result["args"]["runs_dir"], result["args"]["checkpoint_minutes"]
    actor = torch.load(run_dir / "actor.pt", weights_only=True)
    layers = [layer[key].tolist() for layer in actor["layers"] for key in ("weight", "bias")]
    with open(run_dir / "metrics.csv") as file:
        steps = [int(row["iteration"]) for row in csv.DictReader(file)]
    events = EventAccumulator(str(run_dir)).Reload()
    for key in events.Tags()["scalars"]:
        logged = [event.step for event in events.Scalars(key)]
        assert logged == steps, f"TensorBoard has {logged}, metrics.csv {steps}"
    names = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("events"))
    return {"metrics": (run_dir / "metrics.csv").read_text(), "result": result, "layers": layers, "names": names}


def kill_at_call(owner, name: str, number: int):
    """A preparation: SIGKILL when OWNER.name has been called so often."""

    def prepare():
        original, count = getattr(owner, name), itertools.count(1)

        def counted(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return prepare


def kill_in_save(module, number: int, stage: str, share: float):
    """A preparation: SIGKILL in the so-manieth save_atomically, at the given stage of it."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(content, file):
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int(share * whole.tell())])
        file.flush()
        die()

    save = torch.save

    def prepare():
        original, count = module.save_atomically, itertools.count(1)

        def watched(content, path):
            last = next(count) == number
            if last and stage == "writing":
                torch.save = half
            elif last and stage == "before fsync":
                os.fsync = die
            elif last and stage == "before rename":
                os.replace = die
            original(content, path)
            if last:
                die()

        module.save_atomically = watched

    return prepare


def kills(script: str, place: str, number: int, random: random.Random, folder: Path) -> Counter:
    """`number` kills; what came of them, by name. Raises AssertionError where a run is not the uninterrupted one."""
    module, settings = MODULES[script], TINY[script]
    started = time.monotonic()
    code, err = call(script, flags(settings | dict(runs_dir=folder / "reference")))
    assert code == 0, err
    duration = time.monotonic() - started
    (reference,) = (folder / "reference").iterdir()
    expected, outcomes = left_behind(reference), Counter()
    updates = 2 * (len(liquidation_env.behaviour_dataset(100, 1)["rewards"]) * 9 // 10 // 64)
    while outcomes["killed"] < number:
        minutes = random.choice((0.0, 0.0, 0.0005, 5.0))
        runs_dir = folder / f"case{outcomes['killed']}-{outcomes['finished first']}"
        words, deaths = flags(settings | dict(runs_dir=runs_dir, checkpoint_minutes=minutes)), 0
        while True:
            prepare, kill_after = (lambda: None), None
            if deaths < 3 and (not deaths or random.random() < 0.4):  # a resumed run may be killed again
                if place == "training":
                    kill_after = random.uniform(0, duration)
                elif place == "dynamics":
                    prepare = kill_at_call(module, "beta_nll", random.randint(1, updates))
                else:
                    saves = random.randint(1, 80 if minutes == 0 else 6)
                    prepare = kill_in_save(module, saves, random.choice(STAGES), random.random())
            code, err = call(script, words, prepare, kill_after)
            if code == -signal.SIGKILL:
                deaths += 1
                outcomes["killed"] += 1
                found = list(runs_dir.glob("*")) if runs_dir.exists() else []
                if found and (found[0] / "checkpoint.pt").exists():
                    module.load_checkpoint(found[0])  # whole, always
                    words = [f"--resume={found[0]}"]
                    outcomes["went on from a checkpoint"] += 1
                else:  # killed before the first one: nothing was done yet
                    assert not words[0].startswith("--resume"), "a checkpoint was lost"
                    shutil.rmtree(runs_dir, ignore_errors=True)
                    outcomes["killed before the first checkpoint"] += 1
                continue
            assert code == 0, err
            break
        outcomes["finished first"] += not deaths
        outcomes["runs"] += bool(deaths)
        (run_dir,) = runs_dir.iterdir()
        assert left_behind(run_dir) == expected, f"{script}, {place}: {run_dir} is not the uninterrupted run"
        shutil.rmtree(runs_dir)
    return outcomes


class SlowServer(http.server.BaseHTTPRequestHandler):
    """The file in pieces, slowly; honours ranges. A class attribute has the content."""

    content = b""

    def do_GET(self):
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers["Range"] else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        with contextlib.suppress(OSError):
            for i in range(start, len(self.content), 1 << 16):
                self.wfile.write(self.content[i : min(i + (1 << 16), len(self.content))])
                time.sleep(0.004)

    def log_message(self, *_):
        pass


def download_kills(script: str, number: int, random: random.Random, folder: Path) -> Counter:
    """Kills during a download; afterwards the file is whole, and until then there is none under its name."""
    module = MODULES[script]
    rows = columns(20_000)
    write_hdf5(folder / "original.hdf5", rows)
    content = (folder / "original.hdf5").read_bytes()
    module.D4RL_FILES = {"hopper-medium-v2": ("x/hopper.hdf5", len(content), hashlib.sha256(content).hexdigest())}
    SlowServer.content = content
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    pid = os.fork()  # no thread here: the cases fork from this process
    if not pid:
        server.serve_forever()
    server.socket.close()
    os.environ["D4RL_MIRRORS"] = f"http://127.0.0.1:{server.server_port}"
    words = flags(dict(env_id="hopper-medium-v2", eval_env_id="NoSuchEnvironment-v0"))  # refused after the download
    outcomes = Counter()
    try:
        while outcomes["killed"] < number:
            os.environ["D4RL_DATASET_DIR"] = str(folder / "download")
            path, deaths = folder / "download" / "hopper.hdf5", 0
            while True:
                code, err = call(script, words, kill_after=random.uniform(0, 0.5) if deaths < 3 else None)
                if code == -signal.SIGKILL:
                    deaths += 1
                    outcomes["killed"] += 1
                    assert not path.exists() or path.read_bytes() == content, "a partial file under the final name"
                    continue
                assert code == 2 and "NoSuchEnvironment" in err, err
                break
            assert path.read_bytes() == content and not path.with_name("hopper.hdf5.part").exists()
            outcomes["runs"] += 1
            shutil.rmtree(folder / "download")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.environ["D4RL_MIRRORS"] = "http://127.0.0.1:9"
    return outcomes


# --- Hostile inputs ---


class Slide(gym.Env):
    """Hopper's spaces, 20 steps, no physics: an evaluation costs nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gym.spaces.Box(-1, 1, (3,))

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.eye(11)[0] * 1.25, {}

    def step(self, action):
        self.steps += 1
        return np.eye(11)[0] * 1.25, float(action[0]), False, self.steps == 20, {}


def columns(rows: int) -> dict[str, np.ndarray]:
    """D4RL's columns, episodes of 40 rows."""
    rng = np.random.default_rng(0)
    observations = (np.eye(11)[0] * 1.25 + 0.02 * rng.standard_normal((rows + 1, 11))).astype(np.float32)
    ends = np.arange(rows) % 40 == 39
    return dict(
        observations=observations[:-1], actions=rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        rewards=rng.standard_normal(rows).astype(np.float32), next_observations=observations[1:].copy(),
        terminals=ends & (np.arange(rows) // 40 % 2 == 0), timeouts=ends & (np.arange(rows) // 40 % 2 == 1),
    )  # fmt: skip


def write_hdf5(path: Path, arrays: dict) -> None:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


KEYS = tuple(columns(1))
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-40, 1e30, -1e30, 3e38, 1e300, np.nan, np.inf, -np.inf])
DTYPES = ["f2", ">f4", "f8", "i1", "u1", "i8", "?", "c8", "S5", "V3", h5py.string_dtype()]
RUBBISH = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.just((1, 2)), st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 9)),
    st.builds(torch.zeros, st.integers(0, 5)), st.just(torch.full((3, 4), torch.nan)),
    st.just(torch.zeros(2, dtype=torch.int32)),
)  # fmt: skip


class Bomb:
    """Unpickled, it makes a file. Nothing may ever unpickle it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil_bytes(draw, path: Path) -> None:
    """Cut, change, empty or replace a file."""
    data = bytearray(path.read_bytes())
    how = draw(st.sampled_from(["cut", "flip", "flip many", "empty", "rubbish", "zeros", "append"]))
    position = st.integers(0, max(len(data) - 1, 0))
    if how == "cut":
        del data[draw(position) :]
    elif how.startswith("flip"):
        for place in draw(st.lists(position, min_size=1, max_size=1 if how == "flip" else 200)):
            data[place] ^= draw(st.integers(1, 255)) if how == "flip" else 0xFF
    elif how == "zeros":
        start = draw(position)
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif how == "append":
        data += draw(st.binary(min_size=1, max_size=100))
    else:
        data = draw(st.binary(max_size=200)) if how == "rubbish" else b""
    path.write_bytes(bytes(data))


def spoil_table(draw, file: h5py.File) -> None:
    """One change to the contents of an HDF5 file."""
    key = draw(st.sampled_from(KEYS))
    how = draw(st.sampled_from(
        ["drop", "dtype", "shape", "value", "value", "group", "soft link", "external link", "attribute", "claim",
         "stranger", "gzip", "all one"]
    ))  # fmt: skip
    small = isinstance(file.get(key), h5py.Dataset) and file[key].size < 10**6  # not one that "claim" made
    values = file[key][()] if small else columns(30)[key]
    if how == "stranger":
        with contextlib.suppress(ValueError):
            file[draw(st.text("abc/é \n", min_size=1, max_size=9))] = np.zeros(draw(st.integers(0, 4)))
        return
    if how == "attribute":
        target = file.get(key) if key in file and draw(st.booleans()) else file
        target.attrs[draw(st.text("abé", min_size=1, max_size=5))] = np.zeros(draw(st.integers(0, 8000)))
        return
    if key in file or key in list(file):
        del file[key]
    if how == "dtype":
        with contextlib.suppress(TypeError, ValueError):
            file[key] = values.astype(draw(st.sampled_from(DTYPES)))
    elif how == "shape":
        new = draw(st.sampled_from([
            values[:-1], values[:1], values[:0], values[..., None], values[None], values.T, values.ravel(),
            values.reshape(-1)[:0], np.float32(1), np.repeat(values, 2, 0), np.zeros((len(values), 0), np.float32),
        ]))  # fmt: skip
        file[key] = new
    elif how == "value":
        values = values.astype(np.float64)
        if values.size:
            values.reshape(-1)[draw(st.integers(0, values.size - 1))] = draw(NUMBERS)
        file[key] = values
    elif how == "group":
        file.create_group(f"{key}/inner")
    elif how == "soft link":
        file[key] = h5py.SoftLink(draw(st.sampled_from(["/nowhere", f"/{key}", "/rewards", "/"])))
    elif how == "external link":
        file[key] = h5py.ExternalLink(draw(st.sampled_from(["nowhere.hdf5", "data.hdf5", "/dev/null"])), "/rewards")
    elif how == "claim":
        file.create_dataset(key, shape=(draw(st.sampled_from([10**8, 10**12, 2**62])), 3), chunks=(1000, 3), dtype="f4")
    elif how == "gzip" and values.ndim:
        file.create_dataset(key, data=values, compression="gzip", chunks=True if values.size else None)
    elif how == "all one":
        file[key] = np.ones_like(values)


def dataset_file(draw, folder: Path, given: dict) -> tuple[str, list[str]]:
    path = folder / "data.hdf5"
    write_hdf5(path, columns(draw(st.sampled_from([1, 2, 3, 19, 21, 30, 90]))))
    with h5py.File(path, "a") as file:
        for _ in range(draw(st.integers(0, 3))):
            spoil_table(draw, file)
    if draw(st.integers(0, 3)) == 0:
        spoil_bytes(draw, path)
    script = draw(st.sampled_from(["pspo", "iql"]))
    settings = TINY[script] | dict(iterations=3, eval_every=3, eval_episodes=1, final_episodes=2)
    return script, flags(settings | dict(env_id="hopper-x", dataset_path=path, eval_env_id="CrashSlide-v0"))


def spoil_content(draw, content: dict) -> dict:
    """Change entries of a dictionary that was saved, at its top or one level below."""
    content = dict(content)
    for _ in range(draw(st.integers(1, 2))):
        if not content:
            break
        key = draw(st.sampled_from(sorted(content)))
        inner = content[key]
        if draw(st.booleans()) and isinstance(inner, dict) and inner:
            inner = dict(inner)
            name = draw(st.sampled_from(sorted(inner, key=str)))
            if draw(st.booleans()):
                inner[name] = draw(RUBBISH)
            else:
                del inner[name]
            content[key] = inner
        elif draw(st.integers(0, 3)):
            content[key] = draw(RUBBISH)
        else:
            del content[key]
    return content


def spoil_tensors(draw, path: Path, module, bomb: Path) -> None:
    how = draw(st.sampled_from(["bytes", "content", "content", "content", "object", "pickle"]))
    if how == "bytes":
        spoil_bytes(draw, path)
    elif how == "content":
        content = spoil_content(draw, torch.load(path, weights_only=True))
        if draw(st.booleans()):
            module.save_atomically(content, path)
        else:
            torch.save(content, path)
    elif how == "object":
        torch.save(draw(RUBBISH), path)
    elif draw(st.booleans()):
        path.write_bytes(pickle.dumps({"kind": "x", "bomb": Bomb(bomb)}, protocol=draw(st.integers(0, 5))))
    else:
        torch.save({"kind": "dynamics", "pool": Bomb(bomb)}, path)


def checkpoint_file(draw, folder: Path, given: dict) -> tuple[str, list[str]]:
    script = draw(st.sampled_from(["pspo", "pspo", "iql", "iql, fine-tuning"]))
    shutil.copytree(draw(st.sampled_from(given[script])), folder / "run")
    name = draw(
        st.sampled_from(["checkpoint.pt", "checkpoint.pt", "dynamics.pt"] if script == "pspo" else ["checkpoint.pt"])
    )
    path = folder / "run" / name
    if not path.exists():
        path = folder / "run" / "checkpoint.pt"
    spoil_tensors(draw, path, MODULES[script], folder / "bomb")
    return script, [f"--resume={folder / 'run'}"]


def dynamics_file(draw, folder: Path, given: dict) -> tuple[str, list[str]]:
    path = folder / "dynamics.pt"
    shutil.copy(given["pspo"][0] / "dynamics.pt", path)
    spoil_tensors(draw, path, pspo, folder / "bomb")
    return "pspo", flags(TINY["pspo"] | dict(dynamics_path=path, iterations=3, eval_every=3))


def words_of_a_command_line(draw, folder: Path, given: dict) -> tuple[str, list[str]]:
    script = draw(st.sampled_from(["pspo", "iql"]))
    words = flags(TINY[script] | dict(iterations=3, eval_every=3, bc_updates=3) if script == "pspo" else TINY[script])
    values = st.sampled_from([
        "", "0", "1", "2", "3", "7", "-1", "1e3", "0.5", "1.0", "1e-300", "1e308", "nan", "inf", "-inf", "None", "True",
        "abc", "é\n\x1b[31m", "../..", "/", "a/b", "x" * 300, str(2**31), str(2**63), str(10**30), "liquidation",
        "hopper-medium-v2", "hoper-medium-v2", "a/b/c-v0", "evidence", "uniform", "pessimistic", "mean", "raw",
        "Hopper-v4", "nomodule:Env-v0", "os:system", "--seed",
    ])  # fmt: skip
    slow = ("iterations", "dynamics_epochs", "online_steps", "dataset_episodes", "runs_dir", "resume", "cuda")
    names = st.sampled_from([field.name for field in fields(MODULES[script].Args) if field.name not in slow])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(names).replace("_", "-")
        how = draw(st.integers(0, 9))
        word = f"--{name}" if how else draw(st.sampled_from(["--help", "--nonsense", "-x", "word", "--", "--seeds"]))
        words += [word] if how in (0, 1) else [f"{word}={draw(values)}"] if how < 6 else [word, draw(values)]
    if draw(st.integers(0, 9)) == 0:
        words.append(f"--resume={draw(st.sampled_from([folder, '/', '', 'nowhere', folder / ('x' * 300)]))}")
    return script, words


def minari_folder(draw, folder: Path, given: dict) -> tuple[str, list[str]]:
    target = folder / "minari"
    shutil.copytree(given["minari"], target)
    metadata = target / "data" / "metadata.json"
    how = draw(st.sampled_from(["spec", "spec", "spec", "metadata", "metadata", "bytes", "hdf5", "missing", "intact"]))
    content = json.loads(metadata.read_text())
    if how == "spec":
        spec = json.loads(content["env_spec"])
        code = draw(st.sampled_from(["os:mkdir", "os.path:join", "nomodule:x", "", "no colon", None]))
        name = draw(st.sampled_from(["entry_point", "vector_entry_point", "additional_wrappers", "kwargs", "id"]))
        wrapper = {"name": "x", "entry_point": code, "kwargs": {"path": str(folder / "bomb")}}
        names = ["CrashSlide-v0", "os:mkdir", "Nowhere-v0", "CartPole-v1", ""]
        hostile = {"additional_wrappers": [wrapper], "kwargs": {"path": str(folder / "bomb")}}
        spec[name] = hostile[name] if name in hostile else draw(st.sampled_from(names)) if name == "id" else code
        if name == "entry_point":
            spec["kwargs"] = hostile["kwargs"]
        if draw(st.integers(0, 3)) == 0:
            spec["max_episode_steps"] = draw(st.sampled_from([-1, 0, 10**9, 2.5, "x", None]))
        content["env_spec"] = json.dumps(spec)
        metadata.write_text(json.dumps(content))
    elif how == "metadata":
        rubbish = st.sampled_from([None, 0, -1, 10**9, "x", "", [], {}, "{}", "[1"])
        for _ in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from(sorted(content))) if content else ""
            if draw(st.booleans()):
                content.pop(key, None)
            else:
                content[key] = draw(rubbish)
        metadata.write_text(json.dumps(content))
    elif how == "bytes":
        spoil_bytes(draw, draw(st.sampled_from([metadata, target / "data" / "main_data.hdf5"])))
    elif how == "missing":
        draw(st.sampled_from([metadata, target / "data" / "main_data.hdf5"])).unlink()
    elif how == "hdf5":
        with h5py.File(target / "data" / "main_data.hdf5", "a") as file:
            name = draw(st.sampled_from(["observations", "actions", "rewards", "terminations", "truncations"]))
            values = file["episode_1"][name][()]
            del file["episode_1"][name]
            change = draw(st.sampled_from(["drop", "cut", "text", "nan", "rank"]))
            if change != "drop":
                new = {"cut": values[:-1], "text": np.full(len(values), b"x"), "rank": values[..., None]}
                file["episode_1"][name] = new.get(change, values * np.nan)
    script = draw(st.sampled_from(["pspo", "iql"]))
    settings = TINY[script] | dict(iterations=3, eval_every=3, eval_episodes=1, final_episodes=2)
    return script, flags(settings | dict(env_id="mujoco/hopper/crash-v0", dataset_path=target))


FAMILIES = {
    "dataset file": (dataset_file, 0.35), "checkpoint": (checkpoint_file, 0.25), "dynamics file": (dynamics_file, 0.1),
    "command line": (words_of_a_command_line, 0.2), "Minari folder": (minari_folder, 0.1),
}  # fmt: skip


def prepare_hostile(folder: Path) -> dict:
    """Whole files to spoil: run folders finished and stopped in each phase, a Minari folder."""
    given = {}
    for script, stops in {
        "pspo": [(pspo, "beta_nll", 9), (pspo, "gaussian_log_prob", 5), (pspo.PSPO, "iterate", 15)],
        "iql": [(iql.IQL, "update", 30)],
        "iql, fine-tuning": [(iql.IQL, "update", 70)],
    }.items():
        given[script] = []
        for i, stop in enumerate([None, *stops]):
            runs_dir, prepare = folder / f"{script}{i}", kill_at_call(*stop) if stop else (lambda: None)
            code, err = call(script, flags(TINY[script] | dict(runs_dir=runs_dir, checkpoint_minutes=0)), prepare)
            assert code == (-signal.SIGKILL if stop else 0), err
            given[script] += runs_dir.iterdir()
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    data, buffers = columns(120), []
    for i, rows in enumerate(np.split(np.arange(120), 3)):
        states = np.concatenate([data["observations"][rows], data["next_observations"][rows[-1:]]])
        parts = [data[key][rows] for key in ("actions", "rewards", "terminals", "timeouts")]
        buffers.append(EpisodeBuffer(i, None, None, states, *parts))
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers("mujoco/hopper/crash-v0", buffers, env="CrashSlide-v0")
    given["minari"] = folder / "minari" / "mujoco" / "hopper" / "crash-v0"
    return given


def hostile(family: str, number: int, seed: int, given: dict, folder: Path) -> tuple[Counter, list[str]]:
    """`number` inputs of a family; the outcomes, and a description of each that is not allowed."""
    make, outcomes, bad = FAMILIES[family][0], Counter(), []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(st.data())
    def one(data):
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        try:
            script, words = make(data.draw, case, given)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:  # h5py will not write such a file
            outcomes["not makeable"] += 1
            print(f"not makeable: {type(error).__name__}: {error}", file=sys.stderr)
            return
        words = [*words, f"--runs-dir={case / 'runs'}"] if not any("--resume" in word for word in words) else words
        code, err = call(script, words, lambda: os.chdir(case))
        lines = [line for line in err.splitlines() if line.strip()]
        wrong = []
        if code == 2:
            outcomes["refused"] += 1
            if not lines or not lines[-1].startswith("error: ") or any(x.startswith("error: ") for x in lines[:-1]):
                wrong.append("not one line")
        elif code == 0:
            outcomes["success"] += 1
        else:
            wrong.append({-14: "hung", -24: "hung", 99: "traceback"}.get(code, f"exit code {code}"))
        if "Traceback" in err:
            wrong.append("traceback")
        if (case / "bomb").exists():
            wrong.append("executed code from a file")
        if list(case.rglob("*.part*")):
            wrong.append("left a half-written file")
        if wrong:
            outcomes["not allowed"] += 1
            bad.append(f"{family}: {', '.join(wrong)}: {script} {' '.join(words)}\n{err[-3000:]}")
            print(bad[-1], file=sys.stderr)
            kept = folder.parent / f"{folder.parent.name}-bad" / f"{family}{len(bad)}"
            with contextlib.suppress(Exception):
                shutil.copytree(case, kept)

    one()
    return outcomes, bad


# --- Table ---


def main() -> int:
    args, rows, failures = tyro.cli(Args, description=__doc__.split("\n\n")[0]), [], []
    gym.register("CrashSlide-v0", "__main__:Slide", max_episode_steps=20)
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        folder = Path(name)
        places = [(script, place) for script in TINY for place in ("training", "checkpoint writing")]
        places += [("pspo", "dynamics"), ("pspo", "download"), ("iql", "download")]
        places = [(script, place) for script, place in places if args.only in f"SIGKILL, {place} ({script})"]
        families = [family for family in FAMILIES if args.hostile and args.only in f"hostile {family}"]
        for script, place in places if args.kills else []:
            generator, started = random.Random(f"{args.seed} {script} {place}"), time.monotonic()
            work = folder / f"{script} {place}"
            work.mkdir()
            try:
                if place == "download":
                    outcomes = download_kills(script, args.kills, generator, work)
                    outcome = f"{outcomes['runs']} files whole"
                else:
                    outcomes = kills(script, place, args.kills, generator, work)
                    outcome = f"{outcomes['runs']} runs, all equal to the uninterrupted one; "
                    outcome += f"{outcomes['killed before the first checkpoint']} killed before the first checkpoint"
            except Exception as error:
                traceback.print_exc()
                outcomes, outcome = Counter(), f"FAILED: {error}"
                failures.append(outcome)
            shutil.rmtree(work, ignore_errors=True)
            rows.append((f"SIGKILL, {place} ({script})", outcomes["killed"], outcome))
            print(*rows[-1], f"{time.monotonic() - started:.0f} s", sep=" | ", flush=True)
        given = prepare_hostile(folder) if families else {}
        for family in families:
            share = FAMILIES[family][1]
            started = time.monotonic()
            outcomes, bad = hostile(family, round(args.hostile * share), args.seed, given, folder)
            failures += bad
            counts = ", ".join(f"{outcomes[key]} {key}" for key in ("refused", "success", "not allowed"))
            rows.append((f"hostile {family}", sum(outcomes.values()) - outcomes["not makeable"], counts))
            print(*rows[-1], f"{time.monotonic() - started:.0f} s", sep=" | ", flush=True)
    if args.out:
        lines = ["| fault | cases | outcome |", "|---|---|---|"]
        lines += [f"| {fault} | {cases} | {outcome} |" for fault, cases, outcome in rows]
        what = f"`python benchmark/crash.py --kills {args.kills} --hostile {args.hostile} --seed {args.seed}`"
        lines += ["", f"{what}, {platform.platform()}, Python {platform.python_version()}, PyTorch {torch.__version__}"]
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        with open(args.out.with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows([("fault", "cases", "outcome"), *rows])
    return len(failures) > 0


if __name__ == "__main__":
    sys.exit(main())
