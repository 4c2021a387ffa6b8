"""Does a test notice? Each line below makes one mistake in a copy of a learner, and its tests are run: minutes.

Run it by hand after a change to a learner or its tests:    python tests/mutate.py [part of a line]
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import gymnasium  # noqa: F401  what the forked children need, imported once
import pytest
import torch
import torch._dynamo
import tyro  # noqa: F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

MUTATIONS = """
pspo: reward / self.reward_scale, terminal, self.value(next_obs) ⇒ reward / self.reward_scale, terminal & False, self.value(next_obs)
pspo: rollout_reward / self.reward_scale, rollout_end, next_value ⇒ rollout_reward / self.reward_scale, rollout_end & False, next_value
pspo: reward / self.reward_scale, terminal, self.value ⇒ reward, terminal, self.value
pspo: rollout_reward / self.reward_scale ⇒ rollout_reward
pspo: follow(self.target_critic, self.critic, args.target_rate) ⇒ pass
pspo: follow(self.average, self.actor, args.average_rate) ⇒ pass
pspo: self.log_eta.add_(0.05 * ⇒ self.log_eta.add_(-0.05 *
pspo: gaussian_kl(pi_mean, pi_log_std, *mu) ⇒ gaussian_kl(pi_mean, pi_log_std, *self.previous(obs))
pspo: *self.previous(obs)) ⇒ *self.behaviour(obs))
pspo: loss = (q - target).square().mean(1).sum() ⇒ loss = (q[:1] - target).square().mean(1).sum()
pspo: q = self.q_value(self.critic, obs, u, mu)  # (M/2 ⇒ q = self.q_value(self.target_critic, obs, u, mu)  # (M/2
pspo: torch.cat([self.q_value(self.critic, ⇒ torch.cat([self.q_value(self.target_critic,
pspo: loss = loss + args.alpha * projection_loss ⇒ loss = loss + projection_loss
pspo: if args.alpha:  # beside ⇒ if False:  # beside
pspo: self.q_value(self.target_critic, obs, u, mu), log_weights ⇒ self.q_value(self.critic, obs, u, mu), log_weights
pspo: ((action - mu[0]) * (-mu[1]).exp()).clamp(-5, 5) ⇒ ((action - mu[0]) * (-mu[1]).exp())
pspo: ((action - mu[0]) * (-mu[1]).exp()) ⇒ (action - mu[0])
pspo: rollout_action = (pi_mean + pi_log_std.exp() * noise) ⇒ rollout_action = (pi_mean + 0 * noise)
pspo: self.sampled.next(mean, std, log_odds, torch.randn_like(mean)) ⇒ self.sampled.next(mean, 0 * std, log_odds, torch.randn_like(mean))
pspo: held_out, train = order[:num_held_out], order[num_held_out:] ⇒ held_out, train = order[:num_held_out], order
pspo: noise = torch.randn_like(mean[0]) ⇒ noise = torch.randn_like(mean)
pspo: next_value = self.value(next_obs, len(mean)) ⇒ next_value = self.value(next_obs)
pspo: u.clamp(-1, 1).flatten ⇒ u.flatten
pspo: noise).clamp(-1, 1) ⇒ noise)
pspo: min(200, max(1, 50_000 // updates)) ⇒ min(200, max(1, 60_000 // updates))
pspo: noise[::2] = 0 ⇒ noise[1::2] = 0
pspo: rollout_end | outside | ⇒ rollout_end |
pspo: & (low < high)).any(-1) ⇒ ).any(-1)
pspo: low - 0.1 * (high - low), high + 0.1 * (high - low) ⇒ low, high
pspo: learner.actor_optimizer.param_groups[0]["lr"].fill_(args.actor_lr ⇒ learner.critic_optimizer.param_groups[0]["lr"].fill_(args.actor_lr
pspo: args.critic_lr * cosine(iteration, total) ⇒ args.critic_lr
pspo: self.args.gamma) ⇒ 1.0)
pspo: reward + gamma * torch.where ⇒ reward + torch.where
pspo: eta * kl_previous).mean() ⇒ -eta * kl_previous).mean()
pspo: self.updates % args.trust_region_every == 0 ⇒ self.updates % args.trust_region_every == 1
pspo: kl_previous.mean() / args.trust_region - 1 ⇒ kl_previous.mean() - args.trust_region
pspo: warm_up() if warm else iterate() ⇒ iterate()
pspo: torch.randperm(self.pool.net.size, device=self.device)[: len(self.members)] ⇒ torch.randint(self.pool.net.size, (len(self.members),))
pspo: if iteration % 1000 == 0 and ⇒ if iteration % 1000 == 1 and
pspo: bootstrap.gather(1, columns) ⇒ bootstrap[:1].expand(args.pool_size, -1).gather(1, columns)
pspo: rows = train[bootstrap.gather(1, columns).long()] ⇒ rows = train[columns]
pspo: p.data.copy_(kept) ⇒ pass
pspo: weight[rows] * beta_nll ⇒ beta_nll
pspo: weight[held_out] * (pool ⇒ (pool
pspo: mean[..., 1:] + obs ⇒ mean[..., 1:]
pspo: (-strength * excess) ⇒ (strength * excess)
pspo: delta = delta / delta.mean().clamp(min=1e-30) ⇒ pass
pspo: 0.98 * self.evidence_weight[self.members] + 1 ⇒ 0.98 * self.evidence_weight[self.members]
pspo: restart = rollout_end | ⇒ restart = False |
pspo: torch.where(restart[:, None], data["observations"][rows], rollout_next) ⇒ rollout_next
pspo: self.rollout_age.mul_(~restart) ⇒ pass
pspo: weight_decay=7.5e-5 ⇒ weight_decay=0.0
pspo: (2 * beta * log_std).exp().detach() ⇒ (2 * beta * log_std).exp()
pspo: torch.relu_(F.layer_norm(h, h.shape[-1:])) ⇒ torch.relu_(h)
pspo: if layer_norm else torch.relu_ ⇒ if True else torch.relu_
pspo: (mean, log_std)).amin(0) ⇒ (mean, log_std)).amax(0)
pspo: if self.rule is None else self.rule(next_obs) ⇒ if self.rule is None else self.rule(sample[..., 1:])
pspo: if not args.alpha: ⇒ if False:
pspo: low, high = data["next_observations"][known].amin(0) ⇒ low, high = data["next_observations"].amin(0)
pspo: total += alive * reward ⇒ total += reward
pspo: delta.mean().clamp(min=1e-30) ⇒ delta.mean()
iql: torch.where(difference < 0, 1 - expectile, expectile) ⇒ torch.where(difference > 0, 1 - expectile, expectile)
iql: self.value(torch.cat([obs, next_obs])).chunk(2) ⇒ self.value(torch.cat([obs, obs])).chunk(2)
iql: target_q = self.target_critic(obs, action).amin(0) ⇒ target_q = self.critic(obs, action).amin(0)
iql: .exp().clamp(max=clip) ⇒ .exp()
iql: noise = std * log_std.exp() * ⇒ noise = std * log_std.exp() ** 2 *
iql: lambda x: F.dropout(F.relu(x), dropout) ⇒ lambda x: F.dropout(F.relu(x), dropout if x.shape[-1] == 1 else 0.0)
iql: learner.actor_critic_optimizer.param_groups[0]["lr"] ⇒ learner.actor_critic_optimizer.param_groups[1]["lr"]
iql: follow(self.target_critic, self.critic, args.target_rate) ⇒ pass
iql: device=self.device) * self.size ⇒ device=self.device) * len(self.data["rewards"])
iql: terminal, next_v, args.gamma ⇒ terminal, next_v, 1.0
""".strip().splitlines()  # noqa: E501


def notices(script: str, old: str, new: str) -> bool:
    """Whether a test fails when the first `old` in the learner is `new`, in a copy of the tree."""
    root, folder = Path(__file__).resolve().parents[1], Path(tempfile.mkdtemp())
    shutil.copytree(root / "tests", folder / "tests")
    for path in (*root.glob("*.py"), root / "pyproject.toml"):
        shutil.copy(path, folder)
    text = (folder / f"{script}.py").read_text()
    assert old in text, f"{script}.py has no {old}: adapt the list"
    (folder / f"{script}.py").write_text(text.replace(old, new, 1))
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        flags = "-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-o", "addopts="
        os._exit(pytest.main([*flags, f"tests/test_{script}.py", "tests/test_theory.py"]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(folder)
    return status == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, survived = [line for line in MUTATIONS if "".join(sys.argv[1:]) in line], 0
    for line in chosen:
        (script, change), noticed = line.split(": ", 1), False
        noticed = notices(script, *change.split(" ⇒ "))
        survived += not noticed
        print("noticed " if noticed else "SURVIVED", line, flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} noticed")
    sys.exit(survived > 0)
