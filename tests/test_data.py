"""The shared data block: what a row means, what is refused, how D4RL's files are downloaded."""

import hashlib
import http.server
import importlib
import socketserver
import sys
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from d4rl_layout import KEYS, columns, episodes, write

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["pspo", "iql", "steer_poe"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def without(arrays, *keys):
    return {key: value for key, value in arrays.items() if key not in keys}


def three_episodes():
    """Rows 0-3 end in a terminal, 4-8 in a timeout, 9-11 in a terminal."""
    return columns(episodes(4, 5, 3), ("terminal", "timeout", "terminal"))


def same(one, other):
    return all(np.array_equal(getattr(one, key), getattr(other, key)) for key in KEYS)


# --- What a row means ---
def test_columns_keep_their_values_and_get_their_types(script):
    arrays = three_episodes()
    data = script.make_dataset(arrays, "name", "source")
    for key in KEYS:
        assert np.array_equal(getattr(data, key), arrays[key])
        assert getattr(data, key).dtype == (bool if key in ("terminals", "timeouts") else np.float32)
    assert (data.name, data.source, data.dropped, data.cut) == ("name", "source", 0, False)


def test_next_state_derived_from_the_following_row(script):
    arrays = three_episodes()
    data = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    kept = np.delete(np.arange(12), 8)  # row 8 timed out: its successor is unknown
    assert data.dropped == 1
    for key in ("observations", "actions", "rewards", "terminals"):
        assert np.array_equal(getattr(data, key), arrays[key][kept])
    inner = ~data.terminals
    assert np.array_equal(data.next_observations[inner], arrays["next_observations"][kept][inner])
    # a terminal row stays, and its placeholder is its own state: never the next episode's first one
    assert np.array_equal(data.next_observations[~inner], data.observations[~inner])
    assert np.flatnonzero(data.terminals).tolist() == [3, 10]
    assert np.flatnonzero(data.timeouts).tolist() == [7]  # row 7 is now its episode's last


def test_rows_after_an_unmarked_end_of_file(script):
    arrays = columns(episodes(3, 4), ("terminal", ""))
    with_next = script.make_dataset(arrays, "name", "source")
    assert with_next.cut and len(with_next.rewards) == 7 and with_next.timeouts.tolist() == [False] * 6 + [True]
    assert script.episode_returns(with_next) == pytest.approx([arrays["rewards"][:3].sum()])
    derived = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    assert derived.cut and derived.dropped == 1 and np.flatnonzero(derived.timeouts).tolist() == [5]
    assert np.array_equal(derived.next_observations[3:], arrays["next_observations"][3:6])


def test_one_row_episodes_without_next_state_vanish(script):
    arrays = columns(episodes(2, 1, 3, 1), ("terminal", "timeout", "terminal", ""))
    data = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    assert data.dropped == 2 and not data.cut
    assert np.flatnonzero(data.terminals).tolist() == [1, 4] and not data.timeouts.any()


def test_clusters_of_terminals_are_kept(script):
    arrays = columns(episodes(1, 1, 1, 4), ("terminal", "terminal", "terminal", "timeout"))
    data = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    assert data.terminals.tolist() == [True, True, True, False, False, False]


def test_timeouts_are_not_terminals_and_a_terminal_is_no_timeout(script):
    arrays = three_episodes()
    arrays["timeouts"] = arrays["timeouts"] | arrays["terminals"]
    data = script.make_dataset(arrays, "name", "source")
    assert np.flatnonzero(data.terminals).tolist() == [3, 11]
    assert np.flatnonzero(data.timeouts).tolist() == [8]


def test_missing_timeouts_are_found_by_continuity(script):
    arrays = columns(episodes(4, 5, 3), ("", "terminal", ""))
    data = script.make_dataset(without(arrays, "timeouts"), "name", "source")
    assert np.flatnonzero(data.timeouts).tolist() == [3, 11]
    assert script.episode_ends(data).tolist() == [3, 8, 11]


def test_unmarked_jump_ends_an_episode(script):
    arrays = columns(episodes(6, 4), ("", "terminal"))
    assert not arrays["timeouts"].any()
    assert np.flatnonzero(script.make_dataset(arrays, "name", "source").timeouts).tolist() == [5]
    arrays = columns(episodes(6), ("terminal",))
    arrays["observations"][3] += np.float32(1e-4)  # small, but no rounding
    assert np.flatnonzero(script.make_dataset(arrays, "name", "source").timeouts).tolist() == [2]


def test_time_limit_episodes_have_1000_rows_or_999(script):
    arrays = columns(episodes(1000, 1000, 300), ("timeout", "timeout", "terminal"))
    data = script.make_dataset(arrays, "name", "source")
    assert np.diff(script.episode_ends(data), prepend=-1).tolist() == [1000, 1000, 300]
    data = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    assert np.diff(script.episode_ends(data), prepend=-1).tolist() == [999, 999, 300]
    steps = np.split(arrays["rewards"].astype(np.float64), [1000, 2000])
    expected = [steps[0][:-1].sum(), steps[1][:-1].sum(), steps[2].sum()]
    assert np.allclose(script.episode_returns(data), expected, rtol=0, atol=1e-9)


def test_other_dtypes_and_column_vectors(script, tmp_path):
    arrays = three_episodes()
    other = {key: value.astype(np.float64) for key, value in arrays.items()}
    other["timeouts"] = arrays["timeouts"].astype(np.uint8)
    other["rewards"], other["terminals"] = other["rewards"][:, None], other["terminals"][:, None]
    data = script.load_dataset("name", write(tmp_path / "a.hdf5", other))
    assert same(data, script.make_dataset(arrays, "name", "source"))
    assert data.rewards.dtype == np.float32


def test_hash_tells_content_not_origin(script):
    arrays = three_episodes()
    data = script.make_dataset(arrays, "one", "here")
    assert data.sha256 == script.make_dataset(arrays, "two", "there").sha256
    arrays["rewards"][5] += 1
    assert data.sha256 != script.make_dataset(arrays, "one", "here").sha256


def test_returns_are_summed_in_float64(script):
    arrays = columns(episodes(3, 2), ("terminal", "terminal"))
    arrays["rewards"][:] = [2.0**24, 1, 1, 1, 2]
    returns = script.episode_returns(script.make_dataset(arrays, "name", "source"))
    assert returns.dtype == np.float64 and returns.tolist() == [2.0**24 + 2, 3]


def test_data_card(script):
    arrays = columns(episodes(4, 5, 3), ("terminal", "timeout", ""))
    arrays["rewards"][:] = 1
    data = script.make_dataset(arrays, "hopper-medium-v2", "file x.hdf5")
    card = script.data_card(data)
    for text in ("hopper-medium-v2: file x.hdf5", "observations 3", "actions 2", "cut off", data.sha256[:12]):
        assert text in card
    assert "min 4.0, mean 4.5, max 5.0 of 2 complete episodes" in card
    dropped = script.make_dataset(without(arrays, "next_observations"), "name", "source")
    assert "10 (2 more without a next state left out)" in script.data_card(dropped)


# --- What is refused ---
def spoil(key, index, value):
    def change(arrays):
        arrays[key] = arrays[key].astype(np.float64)
        arrays[key][index] = value

    return change


def put(key, value):
    return lambda arrays: arrays.update({key: value(arrays[key])})


BAD = {
    "missing key": (lambda a: a.pop("actions"), "no actions; it has observations"),
    "missing ends": (lambda a: (a.pop("timeouts"), a.pop("next_observations")), "no timeouts (or next_obs"),
    "lengths": (put("rewards", lambda x: x[:-1]), "'rewards' has shape (11,)"),
    "more rows": (put("timeouts", lambda x: np.append(x, False)), "'timeouts' has shape (13,)"),
    "rank": (put("observations", lambda x: x[:, 0]), "'observations' has shape (12,)"),
    "rank of rewards": (put("rewards", lambda x: np.stack([x, x], 1)), "'rewards' has shape (12, 2)"),
    "scalar": (put("terminals", lambda x: np.float32(0)), "'terminals' has shape ()"),
    "widths": (put("next_observations", lambda x: x[:, :2]), "'next_observations' has shape (12, 2)"),
    "empty": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "'observations' is empty"),
    "text": (put("actions", lambda x: x.astype("S8")), "'actions' has dtype"),
    "complex": (put("rewards", lambda x: x.astype(complex)), "'rewards' has dtype complex128"),
    "NaN": (spoil("observations", (7, 2), np.nan), "has a NaN or infinite value, first in row 7"),
    "first row": (spoil("actions", (0, 0), np.nan), "'actions' has a NaN or infinite value, first in row 0"),
    "infinite": (spoil("rewards", 11, -np.inf), "'rewards' has a NaN or infinite value, first in row 11"),
    "beyond float32": (spoil("next_observations", (3, 0), 1e39), "'next_observations' has a NaN or infinite"),
    "NaN flag": (spoil("terminals", 2, np.nan), "'terminals' has a value other than 0 and 1, first in row 2"),
    "flag 2": (spoil("timeouts", 4, 2), "'timeouts' has a value other than 0 and 1, first in row 4"),
    "actions": (spoil("actions", (2, 1), -1.01), "'actions' reach 1.01"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_are_refused_by_file_and_key(script, tmp_path, case):
    change, message = BAD[case]
    arrays = three_episodes()
    change(arrays)
    with pytest.raises(script.UserError) as error:
        script.load_dataset("name", write(tmp_path / "bad.hdf5", arrays))
    assert str(error.value).startswith("file bad.hdf5: ") and message in str(error.value)
    assert "\n" not in str(error.value) and ": " in str(error.value)[len("file bad.hdf5: ") :]


def test_no_row_with_a_next_state(script):
    arrays = columns(episodes(1, 1), ("timeout", "timeout"))
    with pytest.raises(script.UserError, match="no row has a known next state"):
        script.make_dataset(without(arrays, "next_observations"), "name", "source")


def test_rounding_over_one_is_clipped(script):
    arrays = three_episodes()
    arrays["actions"][2, 1], arrays["actions"][3, 0] = 1.0005, -1.0005
    data = script.make_dataset(arrays, "name", "source")
    assert data.actions[2, 1] == 1 and data.actions[3, 0] == -1 and np.abs(arrays["actions"]).max() > 1


def test_unreadable_files(script, tmp_path, monkeypatch):
    def message(path, env_id="name"):
        with pytest.raises(script.UserError) as error:
            script.load_dataset(env_id, path and str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "absent.hdf5 does not exist" in message(tmp_path / "absent.hdf5")
    (tmp_path / "text.hdf5").write_text("<html>not found</html>")
    assert "text.hdf5 is not a whole HDF5 file" in message(tmp_path / "text.hdf5")
    whole = Path(write(tmp_path / "whole.hdf5", three_episodes())).read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in message(tmp_path / "cut.hdf5")
    (tmp_path / "folder").mkdir()
    assert "data/metadata.json" in message(tmp_path / "folder")
    (tmp_path / "group.hdf5").touch()
    with h5py.File(tmp_path / "group.hdf5", "w") as file:
        file.create_group("observations/images")
    assert "it has none of D4RL's keys" in message(tmp_path / "group.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "text.hdf5"))  # a file, where a folder should be
    monkeypatch.setenv("D4RL_MIRRORS", "http://127.0.0.1:9")
    assert "text.hdf5" in message(None, next(iter(script.D4RL_FILES)))


def test_forbidden_file(script, tmp_path, monkeypatch):
    def forbid(*_):  # not chmod: the tests may run as root, who may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(script.h5py, "File", forbid)
    with pytest.raises(script.UserError, match=r"secret.hdf5 cannot be read: change its permissions"):
        script.load_dataset("name", str(tmp_path / "secret.hdf5"))


def test_user_error_is_one_line(script):
    assert str(script.UserError("one\ntwo")) == "one two"


def test_unknown_name_lists_the_nearest(script, monkeypatch):
    monkeypatch.setattr(script, "D4RL_FILES", dict.fromkeys(("hopper-medium-v2", "pen-human-v1"), ("", 0, "")))
    with pytest.raises(script.UserError, match="unknown data set 'hoper-medum-v2': did you mean hopper-medium-v2, "):
        script.load_dataset("hoper-medum-v2")


def test_check_spaces(script):
    class Task(gym.Env):
        def __init__(self, obs_dim, action_space):
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
            self.action_space = action_space

    data = script.make_dataset(three_episodes(), "name", "source")
    box = gym.spaces.Box(-1, 1, (2,))
    script.check_spaces(data, Task(3, box))
    for task, message in (
        (Task(4, box), "name has 3 observations, 2 actions, but .* 4 observations"),
        (Task(3, gym.spaces.Box(-1, 1, (5,))), "5 actions"),
        (Task(3, gym.spaces.Discrete(2)), "Discrete"),
        (Task(3, gym.spaces.Box(-1, 2, (2,))), "Box"),
        (Task(3, gym.spaces.Box(-2, 1, (2,))), "Box"),
    ):
        with pytest.raises(script.UserError, match=message):
            script.check_spaces(data, task)
    task = Task(0, box)
    task.observation_space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)), b=gym.spaces.Box(-1, 1, (1,)))
    script.check_spaces(data, task)


# --- Minari ---
def minari_dataset(dataset_id, trajectories, ends, space, observe=lambda obs: obs):
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, ((obs, actions, rewards), end) in enumerate(zip(trajectories, ends, strict=True)):
        last = np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=observe(obs),
                actions=actions,
                rewards=rewards,
                terminations=last & (end == "terminal"),
                truncations=last & (end == "timeout"),
            )
        )
    action_space = gym.spaces.Box(-1, 1, (2,))
    minari.create_dataset_from_buffers(dataset_id, buffers, action_space=action_space, observation_space=space)


def box(size):
    return gym.spaces.Box(-np.inf, np.inf, (size,))


@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.mark.filterwarnings("ignore")  # Minari asks for authors and code of the data
def test_minari_gives_the_tensors_of_the_hdf5(script, minari_root):
    trajectories, ends = episodes(4, 5, 3), ("terminal", "timeout", "")  # the last one is just left
    minari_dataset("test/box-v0", trajectories, ends, box(3))
    data = script.load_dataset("test/box-v0")
    hdf5 = script.make_dataset(columns(trajectories, ends), "name", "source")
    assert same(data, hdf5) and data.sha256 == hdf5.sha256
    assert np.flatnonzero(data.terminals).tolist() == [3] and np.flatnonzero(data.timeouts).tolist() == [8, 11]
    assert (data.name, data.source, data.cut) == ("test/box-v0", "Minari test/box-v0", False)
    assert same(script.load_dataset("name", str(minari_root / "test" / "box-v0")), data)


@pytest.mark.filterwarnings("ignore")
def test_minari_dicts_are_flattened_like_gymnasium_does(script, minari_root):
    trajectories, ends = episodes(4, 5, 3, obs_dim=7), ("terminal", "timeout", "timeout")
    space = gym.spaces.Dict(
        {
            "observation": box(2),
            "achieved_goal": gym.spaces.Dict({"kettle": box(1), "burner": box(1)}),  # kitchen's are nested
            "desired_goal": box(3),
        }
    )
    minari_dataset(
        "test/dict-v0",
        trajectories,
        ends,
        space,
        lambda obs: {
            "observation": obs[:, 5:],
            "achieved_goal": {"burner": obs[:, :1], "kettle": obs[:, 1:2]},
            "desired_goal": obs[:, 2:5],
        },
    )
    data = script.load_dataset("test/dict-v0")
    assert same(data, script.make_dataset(columns(trajectories, ends), "name", "source"))
    goals = {"burner": data.observations[0, :1], "kettle": data.observations[0, 1:2]}
    step = {"observation": data.observations[0, 5:], "achieved_goal": goals, "desired_goal": data.observations[0, 2:5]}
    assert np.array_equal(gym.spaces.flatten(space, step), data.observations[0])
    # not every format of Minari's gives the keys back in order
    parts = {"b": np.ones((2, 1)), "a": np.zeros((2, 2))}
    assert script.flatten_observations(parts).tolist() == [[0, 0, 1]] * 2


@pytest.mark.filterwarnings("ignore")
def test_minari_errors(script, minari_root, monkeypatch):
    with pytest.raises(script.UserError, match="minari download --force not an id/at all"):
        script.load_dataset("not an id/at all")
    minari_dataset("test/cut-v0", episodes(4), ("terminal",), box(3))
    file = minari_root / "test" / "cut-v0" / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(script.UserError, match="minari download --force test/cut-v0"):
        script.load_dataset("test/cut-v0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "minari.storage.remotes.huggingface", raising=False)
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    with pytest.raises(script.UserError, match=r"pip install 'minari\[hdf5,hf\]' pillow"):
        script.load_dataset("test/absent-v0")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(script.UserError, match=r"pip install 'minari\[hdf5,hf\]' pillow"):
        script.load_dataset("test/absent-v0")


# --- Download ---
NAME = "tiny-medium-v2"


class Server:
    """A file server here: `content` by path, the `ranges` it was asked for; hangs up after `cut` bytes."""

    def __init__(self):
        self.content, self.ranges, self.cut, self.honours_range, self.during = ({}, [], None, True, lambda: None)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers["Range"]
                server.ranges.append(asked)
                body = server.content.get(self.path)
                if isinstance(body, int) or body is None:
                    return self.send_error(body or 404)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.honours_range else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                server.during()
                self.wfile.write(body[start:][: server.cut])
                return None

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def remote(script, server, tmp_path, monkeypatch):
    """(content of the tiny D4RL file that the server has, its path here, its .part)."""
    content = Path(write(tmp_path / "original.hdf5", three_episodes())).read_bytes()
    table = {NAME: ("gym/tiny_medium-v2.hdf5", len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(script, "D4RL_FILES", table)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "deep" / "folder"))
    monkeypatch.delenv("D4RL_MIRRORS", raising=False)
    server.content["/data/gym/tiny_medium-v2.hdf5"] = content
    path = tmp_path / "deep" / "folder" / "tiny_medium-v2.hdf5"
    return content, path, path.with_name(path.name + ".part")


def test_download_whole(script, server, remote):
    content, path, part = remote
    data = script.load_dataset(NAME, mirrors=(server.url,))
    assert same(data, script.make_dataset(three_episodes(), "name", "source"))
    assert data.source == "file tiny_medium-v2.hdf5 (D4RL's)"
    assert path.read_bytes() == content and not part.exists()
    script.load_dataset(NAME, mirrors=("http://127.0.0.1:9",))
    assert server.ranges == [None]  # asked once, without a range


def test_download_goes_on_after_a_cut(script, server, remote):
    content, path, part = remote
    server.cut = len(content) // 2
    with pytest.raises(script.UserError, match=f"broke after {len(content) // 2:,} of {len(content):,}"):
        script.load_dataset(NAME, mirrors=(server.url,))
    assert not path.exists() and part.read_bytes() == content[: len(content) // 2]
    server.cut = None
    script.load_dataset(NAME, mirrors=(server.url,))
    assert server.ranges == [None, f"bytes={len(content) // 2}-"]
    assert path.read_bytes() == content and not part.exists()


def test_download_from_a_server_that_ignores_range(script, server, remote):
    content, path, part = remote
    server.honours_range = False
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    script.load_dataset(NAME, mirrors=(server.url,))
    assert server.ranges == ["bytes=100-"] and path.read_bytes() == content


def test_download_finishes_a_whole_part_without_asking(script, server, remote):
    content, path, part = remote
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    script.load_dataset(NAME, mirrors=(server.url,))
    assert server.ranges == [] and path.read_bytes() == content


def test_download_starts_anew_when_the_part_is_too_long(script, server, remote):
    content, path, part = remote
    part.parent.mkdir(parents=True)
    part.write_bytes(content + b"x")
    script.load_dataset(NAME, mirrors=(server.url,))
    assert server.ranges == [None] and path.read_bytes() == content


def test_download_tries_the_mirrors_in_turn(script, server, remote):
    content, path, _ = remote
    server.content["/data/no/gym/tiny_medium-v2.hdf5"] = 403
    server.content["/data/broken/gym/tiny_medium-v2.hdf5"] = 500
    mirrors = (f"{server.url}/no/", "nonsense", f"{server.url}/broken", f"{server.url}/absent", server.url)
    script.load_dataset(NAME, mirrors=mirrors)
    assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(script.UserError) as error:
        script.load_dataset(NAME, mirrors=mirrors[:-1])
    for text in ("403", "nonsense", "500", "404", f"{server.url}/absent/gym/tiny_medium-v2.hdf5", str(path)):
        assert text in str(error.value)
    assert "\n" not in str(error.value) and not path.exists()


def test_download_mirrors_from_the_environment(script, server, remote, monkeypatch):
    content, path, _ = remote
    monkeypatch.setenv("D4RL_MIRRORS", f"{server.url}/absent , {server.url}/ ")
    script.load_dataset(NAME)
    assert path.read_bytes() == content and len(server.ranges) == 2


def test_download_default_is_the_server_of_d4rl(script, remote, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "fetch", lambda url, *_: asked.append(url) or (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(script.UserError):
        script.load_dataset(NAME)
    assert asked == ["http://rail.eecs.berkeley.edu/datasets/offline_rl/gym/tiny_medium-v2.hdf5"]


def test_download_refuses_other_content(script, server, remote):
    content, path, part = remote
    server.content["/data/gym/tiny_medium-v2.hdf5"] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(script.UserError, match="wrong SHA-256"):
        script.load_dataset(NAME, mirrors=(server.url,))
    assert not path.exists() and not part.exists()


@pytest.mark.parametrize("length", [50, 100_000])
def test_download_refuses_another_size_unread(script, server, remote, length):
    _, path, part = remote
    server.content["/data/gym/tiny_medium-v2.hdf5"] = b"<" * length  # such as a login page
    with pytest.raises(script.UserError, match=f"offers {length:,} bytes"):
        script.load_dataset(NAME, mirrors=(server.url,))
    assert not path.exists() and not part.exists()


def test_download_by_two_processes_at_once(script, server, remote):
    _, path, part = remote
    server.during = lambda: (threading.Event().wait(0.05), part.write_bytes(b"another's"))
    part.parent.mkdir(parents=True)
    with pytest.raises(script.UserError, match="another process"):
        script.load_dataset(NAME, mirrors=(server.url,))
    assert part.read_bytes() == b"another's" and not path.exists()


def test_download_from_a_slow_server(script, server, remote):
    """What has arrived is written at once, so that a stop loses nothing."""
    content, path, part = remote
    seen, half = [], len(content) // 2

    def pause():
        server.cut = half
        threading.Timer(0.3, lambda: seen.append(part.stat().st_size)).start()

    original = http.server.BaseHTTPRequestHandler.finish

    def wait(handler):  # the connection stays open after the first half
        threading.Event().wait(0.6)
        original(handler)

    server.during, http.server.BaseHTTPRequestHandler.finish = pause, wait
    try:
        with pytest.raises(script.UserError, match="broke after"):
            script.load_dataset(NAME, mirrors=(server.url,))
    finally:
        http.server.BaseHTTPRequestHandler.finish = original
    server.cut, server.during = None, lambda: None
    script.load_dataset(NAME, mirrors=(server.url,))
    assert path.read_bytes() == content and server.ranges == [None, f"bytes={half}-"]
    assert seen == [half]


def test_download_from_a_silent_server(script, server, remote, monkeypatch):
    _, path, _ = remote
    monkeypatch.setattr(script, "SILENCE", 0.2)
    server.during = lambda: threading.Event().wait(1)
    with pytest.raises(script.UserError, match="timed out"):
        script.load_dataset(NAME, mirrors=(server.url,))
    assert not path.exists()


ANSWERS = {  # what a server can say; None: the file is whole afterwards
    "nothing": (lambda body: b"", "cannot download"),
    "nonsense": (lambda body: b"hello\r\n\r\n", "cannot download"),
    "half a header": (lambda body: b"HTTP/1.1 200 OK\r\nContent-Le", "offers|broke after"),
    "no length": (lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + body, None),
    "no length, too short": (lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + body[:-9], "broke after"),
    "no length, too long": (lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + body + b"x", "wrong SHA-256"),
    "length in words": (lambda body: b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + body, "cannot download"),
    "a range not asked for": (
        lambda body: b"HTTP/1.1 206 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) - 5) + body[5:], "offers"
    ),
    "round and round": (lambda body: b"HTTP/1.1 302 Found\r\nLocation: /data/x\r\n\r\n", "redirect"),
    "too many requests": (lambda body: b"HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\n\r\n", "429"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_download_from_a_strange_server(script, remote, monkeypatch, case):
    """One line or the whole file, whatever is answered; never another file under its name."""
    monkeypatch.setenv("no_proxy", "*")
    content, path, _ = remote
    answer, message = ANSWERS[case]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(10_000)
            self.request.sendall(answer(content))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        threading.Thread(target=tcp.serve_forever, args=(0.01,), daemon=True).start()
        mirror = f"http://127.0.0.1:{tcp.server_address[1]}"
        if message is None:
            script.load_dataset(NAME, mirrors=(mirror,))
        else:
            with pytest.raises(script.UserError, match=message):
                script.load_dataset(NAME, mirrors=(mirror,))
        tcp.shutdown()
    assert path.read_bytes() == content if message is None else not path.exists()


def test_other_data_under_a_d4rl_name_are_named_so(script, remote):
    content, path, _ = remote
    path.parent.mkdir(parents=True)
    other = three_episodes()
    other["rewards"] += 1
    assert len(Path(write(path, other)).read_bytes()) == len(content)  # only the hash can tell
    expected = "file tiny_medium-v2.hdf5 (regenerated or modified: not D4RL's size/hash)"
    assert script.load_dataset(NAME).source == expected
    write(path, columns(episodes(40), ("terminal",)))
    assert script.load_dataset(NAME).source == script.load_dataset(NAME, str(path)).source == expected


def test_size_is_compared_before_the_hash(script, remote, monkeypatch):
    _, path, _ = remote
    path.parent.mkdir(parents=True)
    write(path, columns(episodes(400), ("terminal",)))
    monkeypatch.setattr(script, "file_sha256", lambda path: pytest.fail("hashed a file of another size"))
    script.load_dataset(NAME)


def test_table_of_d4rl_files(script):
    for name, (path, size, sha256) in script.D4RL_FILES.items():
        assert path.endswith(".hdf5") and not path.startswith("/") and size > 1_000_000, name
        assert len(sha256) == 64 and int(sha256, 16), name
