"""Other implementations' update code, made ready for benchmark/speed.py: imported from checkouts, with random rows.

Each function builds the objects that the project's own training program builds, with its default sizes, and returns
named steps; a step is one update, its sampling of the batch included. They compute where `data` are.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HIDDEN = [256, 256]


class StandIn(types.ModuleType):
    """A module that has every name; enough for what is imported and not used in an update."""

    __path__ = ()

    def __call__(self, *args, **kwargs):
        return lambda function: function

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower():  # a module or a function
            return StandIn(f"{self.__name__}.{name}")
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, f: f})


class StandIns:
    """An import finder that makes a StandIn of every module of these packages."""

    PACKAGES = ("gym", "d4rl", "wandb", "pyrallis", "prettytable")

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if name.partition(".")[0] in cls.PACKAGES:
            return importlib.machinery.ModuleSpec(name, cls, is_package=True)

    @staticmethod
    def create_module(spec):
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module) -> None:
        pass


def corl_iql(data: dict[str, torch.Tensor]) -> dict[str, Callable]:
    corl = importlib.import_module("algorithms.offline.iql")
    obs, act, device = data["observations"].shape[1], data["actions"].shape[1], str(data["rewards"].device)
    buffer = corl.ReplayBuffer(obs, act, len(data["rewards"]), device)
    buffer.load_d4rl_dataset({key: value.cpu().numpy() for key, value in data.items()})
    nets = [x.to(device) for x in (corl.GaussianPolicy(obs, act, 1.0), corl.TwinQ(obs, act), corl.ValueFunction(obs))]
    optimizers = [torch.optim.Adam(x.parameters(), lr=3e-4) for x in nets]
    pairs = (x for pair in zip(nets, optimizers, strict=True) for x in pair)
    trainer = corl.ImplicitQLearning(1.0, *pairs, device=device)
    return {"CORL, IQL": lambda: trainer.train(buffer.sample(256))}


def offlinerlkit_iql(data: dict[str, torch.Tensor]) -> dict[str, Callable]:
    nets = importlib.import_module("offlinerlkit.nets")
    modules = importlib.import_module("offlinerlkit.modules")
    policy = importlib.import_module("offlinerlkit.policy")
    buffers = importlib.import_module("offlinerlkit.buffer")
    obs, act, rows = data["observations"].shape[1], data["actions"].shape[1], len(data["rewards"])
    device = str(data["rewards"].device)
    body = nets.MLP(obs, HIDDEN)
    head = modules.DiagGaussian(body.output_dim, act, unbounded=False, conditioned_sigma=False, max_mu=1.0)
    actor = modules.ActorProb(body, head, device)
    critics = [modules.Critic(nets.MLP(width, HIDDEN), device) for width in (obs + act, obs + act, obs)]
    optimizers = [torch.optim.Adam(x.parameters(), lr=3e-4) for x in (actor, *critics)]
    space = types.SimpleNamespace(low=-np.ones(act), high=np.ones(act))
    learner = policy.IQLPolicy(actor, *critics, *optimizers, action_space=space, expectile=0.7, temperature=3.0)
    buffer = buffers.ReplayBuffer(rows, (obs,), np.float32, act, np.float32, device)
    buffer.load_dataset({key: value.cpu().numpy() for key, value in data.items()})
    return {"OfflineRL-Kit, IQL": lambda: learner.learn(buffer.sample(256))}


def pmdb(data: dict[str, torch.Tensor]) -> dict[str, Callable]:
    if data["rewards"].device.type != "cpu":
        raise NotImplementedError("made ready for the CPU only")
    config = importlib.import_module("config")
    sys.argv, argv = [sys.argv[0], "--cpu"], sys.argv
    try:
        args = config.args_setting()  # its defaults
    finally:
        sys.argv = argv
    importlib.import_module("utils.static.hopper")
    termination = sys.modules["utils.static.hopper"].StaticFns.termination_fn
    trainer_module = importlib.import_module("module.ensemble_trainer")
    agent_module = importlib.import_module("module.offline_agent")
    dynamics_module = importlib.import_module("module.adversarial_dynamics")
    memory_module = importlib.import_module("module.replay_memory")
    arrays = {key: value.numpy() for key, value in data.items()}
    obs, act, rows = arrays["observations"].shape[1], arrays["actions"].shape[1], 10_000
    args.dynamics_path = args.dynamics_save_path = None
    trainer = trainer_module.EnsembleTrainer(obs, act, True, args)
    states, actions, rewards = (arrays[key][:rows] for key in ("observations", "actions", "rewards"))
    inputs = torch.tensor(np.concatenate([states, actions], -1))
    outputs = torch.tensor(np.concatenate([arrays["next_observations"][:rows], rewards[:, None]], -1))
    rng = np.random.default_rng(0)
    order = rng.integers(rows, size=(args.ensemble_size, rows))

    def update_dynamics() -> None:
        start = rng.integers(rows - args.transition_batch_size)
        batch = order[:, start : start + args.transition_batch_size]
        trainer.update_transition(inputs[batch], outputs[batch], beta=0.5)

    transition = trainer.transition
    for name, value in dict(pred_min=-50.0, pred_max=50.0, pred_min_2=-60.0, pred_max_2=60.0).items():
        getattr(transition, name).data.fill_(value)
    memory = memory_module.ReplayMemory(rows)
    memory.push(states, actions, rewards[:, None], arrays["next_observations"][:rows], np.zeros((rows, 1), bool))
    space = types.SimpleNamespace(low=-np.ones(act, np.float32), high=np.ones(act, np.float32), shape=(act,))
    agent = agent_module.OfflineAgent(obs, space, memory, args, value_clip=True)
    game = dynamics_module.AdversarialDynamics(states, agent, transition, args, termination)

    def iterate() -> None:
        state = game.state.numpy().copy()
        with torch.no_grad():
            action = agent.policy.sample(game.state)[0].reshape(len(state), act).numpy()
            targets = game.step(action)[1]
        agent.offline_update_parameters(state, action, targets.reshape(-1))

    return {"PMDB, dynamics, 100 × 4 × 256, batch 256": update_dynamics, "PMDB, policy iteration": iterate}


PEERS = {"CORL": corl_iql, "OfflineRL-Kit": offlinerlkit_iql, "PMDB": pmdb}


def peer_steps(folder: Path, data: dict[str, torch.Tensor]) -> dict[str, Callable]:
    """Named steps of the checkouts that are in `folder`; a missing or unusable one is skipped with a line."""
    steps: dict[str, Callable] = {}
    sys.meta_path.insert(0, StandIns)
    for name, prepare in PEERS.items():
        if not (folder / name).is_dir():
            print(f"{name}: no checkout at {folder / name}: not measured")
            continue
        with contextlib.chdir(folder / name):  # PMDB looks for its own files
            sys.path.insert(0, str(folder / name))
            try:
                ready = prepare(data)
                for step in ready.values():
                    step()
                steps |= ready
            except Exception as error:  # another version than the one that this was written for
                print(f"{name}: not measured: {type(error).__name__}: {str(error)[:120]}")
            sys.path.remove(str(folder / name))
    sys.meta_path.remove(StandIns)
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]
    return steps
