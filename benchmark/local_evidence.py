"""pspo.py with evidence that is local: a belief over the models for every imagined (s, a), from the data nearest to it.

    python benchmark/local_evidence.py --env-id hopper-medium-v2 --quick        # pspo.py's own flags

Everything else is pspo.py. Eq. (4) is applied at each (s, a) of a rollout; Δ of a model there is the mean of
−log τ(r, s' | s, a) over the 50 nearest of 10,000 observed transitions (coordinates in standard deviations), in units
of its spread over the models. `benchmark/evidence_study.py` says why one may hope for something; docs/pspo.md has what
came of it. Runs on a CPU, and cannot be resumed. Diagnostics that need one belief for all states (posterior/*,
eval/predicted_return) show that of --evidence likelihood.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pspo  # the scripts are not installed; they lie in the repository's root

MEMORY, NEIGHBOURS = 10_000, 50


class LocalPSPO(pspo.PSPO):
    """PSPO whose model_targets draws from P(τ | s, a)."""

    place: torch.Tensor | None = None  # (B, obs+act), standardised, while targets are computed there

    def redraw(self, pool: pspo.Dynamics) -> None:
        super().redraw(pool)
        self.remember()

    def load_state_dict(self, *args, **kwargs):
        loaded = super().load_state_dict(*args, **kwargs)
        self.memory = None  # the models may be others now
        return loaded

    @torch.no_grad()
    def remember(self) -> None:
        """The transitions that are looked up, (M, obs+act), and how surprised each model was by them, (N, M)."""
        data, generator = self.data, torch.Generator().manual_seed(self.args.seed)
        rows = torch.randint(len(data["rewards"]), (MEMORY,), generator=generator)
        rows = rows[~data["terminals"][rows]]  # files without next states have a placeholder where an episode ends
        obs, action, reward, next_obs = (
            data[k][rows] for k in ("observations", "actions", "rewards", "next_observations")
        )
        mean, std = self.active(obs, action)  # (N, M, 1+obs)
        observed = torch.cat([reward[:, None], next_obs], -1)
        self.surprise = -torch.distributions.Normal(mean, std).log_prob(observed).sum(-1)
        self.memory = self.standardised(obs, action)

    def standardised(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return (torch.cat([obs, action], -1) - self.active.input_mean) / self.active.input_std

    def log_belief(self) -> torch.Tensor:
        """log P: (N,), or (B, N) while targets at B places are computed."""
        if self.place is None:
            return super().log_belief()
        if self.memory is None:
            self.remember()
        near = torch.cdist(self.place, self.memory).topk(NEIGHBOURS, largest=False).indices  # (B, k)
        delta = self.surprise[:, near].mean(-1).T  # (B, N)
        return pspo.posterior(self.scaled(delta), self.args.likelihood_coef)

    def model_targets(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.place = self.standardised(obs, action)
        try:
            return super().model_targets(obs, action)
        finally:
            self.place = None


def main() -> None:
    flags = [word.split("=")[0] for word in sys.argv[1:]]
    refused = {"--evidence", "--posterior", "--resume", "--cuda"} & set(flags)
    if refused:
        sys.exit(f"error: {', '.join(sorted(refused))}: not here: this is one belief, on a CPU, and starts anew")
    sys.argv += ["--evidence", "likelihood", "--no-cuda"]
    sys.argv += [] if "--exp-name" in flags else ["--exp-name", "local_evidence"]
    # Neither pspo.py nor the run folder's copy of it may go on with such a run: it would become plain likelihood.
    pspo.SCRIPT = b"raise SystemExit('a run of benchmark/local_evidence.py cannot be resumed')\n" + pspo.SCRIPT
    pspo.PSPO = LocalPSPO
    pspo.main()


if __name__ == "__main__":
    main()
