"""D4RL's AntMaze as Gymnasium environments, to evaluate what was learnt from D4RL's AntMaze data.

    pip install gymnasium-robotics==1.4.2
    python iql.py --env-id antmaze-umaze-v2 --eval-env-id benchmark.d4rl_antmaze:D4RLAntMaze-umaze-v0

Ids: D4RLAntMaze-umaze-v0, -medium-v0 and -large-v0, for the data of that maze; run it from the repository's root. Made
from D4RL's published maps and constants on gymnasium-robotics' ant; not compared with D4RL's own simulator.
"""

import gymnasium as gym
import numpy as np

MAZES = {  # 4 units a cell, y growing downwards; r: start, g: goal; #: wall
    "umaze": "##### #r..# ###.# #g..# #####",
    "medium": "######## #r.##..# #..#...# ##...### #..#...# #.#..#.# #...#.g# ########",
    "large": "############ #r...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### "
    "#..#...#.g.# ############",
}


class D4RLAntMaze(gym.Wrapper):
    """29 observations without the goal; reward 1 and the end at the goal.

    Other than in gymnasium-robotics the start is the origin, y grows downwards in the map, and the ant has torques up
    to 30 at 10 Hz instead of 150 at 20 Hz.
    """

    def __init__(self, maze: str, **kwargs):
        import gymnasium_robotics  # not at the top: the registration below needs no such package

        gym.register_envs(gymnasium_robotics)
        grid = [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in MAZES[maze].split()]
        # gymnasium-robotics counts rows from the north, D4RL from the south
        kwargs |= dict(maze_map=grid[::-1], continuing_task=False, max_episode_steps=1000)
        super().__init__(gym.make("AntMaze_UMaze-v4", **kwargs))
        self.task = self.env.unwrapped
        self.origin = self.task.maze.unique_reset_locations[0].copy()
        self.goal_cell = self.task.maze.unique_goal_locations[0].copy()
        self.task.position_noise_range, self.task.ant_env._reset_noise_scale = 0.0, 0.1
        model = self.task.ant_env.model
        model.opt.timestep, model.actuator_gear[:, 0] = 0.02, 30.0
        model.geom_solref[:], model.geom_solimp[:, :3] = (0.02, 1.0), (0.8, 0.8, 0.01)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,))

    def observation(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([obs["achieved_goal"] - self.origin, obs["observation"]]).astype(np.float32)

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        random = self.task.np_random
        self.goal = self.goal_cell - self.origin + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2)
        return self.observation(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, truncated, info = self.env.step(action)
        obs = self.observation(obs)
        reached = bool(np.linalg.norm(obs[:2] - self.goal) <= 0.5)
        return obs, float(reached), reached, truncated, info


for maze in MAZES:
    limit = 700 if maze == "umaze" else 1000
    gym.register(f"D4RLAntMaze-{maze}-v0", D4RLAntMaze, max_episode_steps=limit, kwargs=dict(maze=maze))
