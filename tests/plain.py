"""Both learners' steps written again from the equations: one row, model and sample at a time; no learner is called.

A learner runs on a tape that keeps every random number it draws; the plain writing then takes them off, in the same
order and shapes. Its networks are the learner's `state_dict()`, its optimiser is Adam written out.
"""

import contextlib
import copy
import math

import torch
import torch.nn.functional as F


class Tape:
    """The random numbers of a run, as (name of the function, drawn tensor, its bound if it has one)."""

    NAMES = ("randn", "randn_like", "rand", "rand_like", "randint", "randperm")

    def __init__(self):
        self.drawn = []

    @contextlib.contextmanager
    def recording(self, monkeypatch):
        """Everything in float64, `.float()` too, and what is drawn is kept."""
        with monkeypatch.context() as patch:
            for name in self.NAMES:
                patch.setattr(torch, name, self.kept(name, getattr(torch, name)))
            patch.setattr(torch.Tensor, "exponential_", self.kept("exponential_", torch.Tensor.exponential_))
            patch.setattr(F, "dropout", self.kept("dropout", F.dropout))
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield

    def kept(self, name, function):
        def draw(*args, **kwargs):
            out = function(*args, **kwargs)
            bound = args[0] if name in ("randint", "randperm") else args[1] if name == "dropout" else None
            self.drawn.append((name, (out != 0) if name == "dropout" else out.detach().clone(), bound))
            return out

        return draw

    def take(self, name, *shape, bound=None):
        """The next draw, which must be of this function, shape and bound."""
        kind, drawn, limit = self.drawn.pop(0)
        assert (kind.removesuffix("_like"), tuple(drawn.shape), limit) == (name, shape, bound)
        return drawn


def network(state, name, x, activation, member=0):
    """One row x (in,) through one member of the MLP `name`: (out,)."""
    x = (x - state[f"{name}.mean"]) / state[f"{name}.std"]
    for layer in range(sum(key.startswith(f"{name}.weights.") for key in state)):
        x = activation(x) if layer else x
        x = x @ state[f"{name}.weights.{layer}"][member] + state[f"{name}.biases.{layer}"][member, 0]
    return x


def log_normal(u, mean, log_std):
    """log N(u; mean, diag exp(2 log_std)) of one row."""
    terms = zip(u, mean, log_std, strict=True)
    return sum(-((x - m) ** 2) / (2 * (2 * s).exp()) - s - math.log(2 * math.pi) / 2 for x, m, s in terms)


class Adam:
    """Adam with the decay of AdamW, of the entries of `state` whose names begin with `prefix`."""

    def __init__(self, state, prefix, decay=0.0):
        self.names = [name for name in state if name.startswith(prefix) and (".weights" in name or ".biases" in name)]
        self.names += [name for name in state if name == f"{prefix}log_std"]
        self.decay, self.updates = decay, 0
        self.mean, self.square = ({name: torch.zeros_like(state[name]) for name in self.names} for _ in range(2))

    def step(self, state, loss, rate):
        """`loss()` of `state` is lowered; only this optimiser's entries change, to new tensors."""
        for name in self.names:
            state[name] = state[name].detach().requires_grad_()
        gradients = torch.autograd.grad(loss(), [state[name] for name in self.names])
        self.updates += 1
        for name, gradient in zip(self.names, gradients, strict=True):
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * gradient
            self.square[name] = 0.999 * self.square[name] + 0.001 * gradient**2
            mean, square = self.mean[name] / (1 - 0.9**self.updates), self.square[name] / (1 - 0.999**self.updates)
            x = state[name].detach()
            state[name] = x - rate * self.decay * x - rate * mean / (square.sqrt() + 1e-8)


def numbers(metrics):
    return {name: float(torch.as_tensor(x).detach()) for name, x in metrics.items()}


def assert_same(learner, state):
    """Every parameter and buffer, to 1e-10."""
    found = learner.state_dict()
    assert found.keys() == state.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, state[name].to(value.dtype), rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


class PSPO:
    """PSPO's iteration on a copy of the learner's tensors and on the random numbers that it drew."""

    def __init__(self, learner, args, data, rule, tape):
        self.state, self.args, self.data = copy.deepcopy(dict(learner.state_dict())), args, data
        self.rule, self.take = rule, tape.take
        self.actor_adam, self.critic_adam = Adam(self.state, "actor."), Adam(self.state, "critic.")
        self.obs, self.act = data["observations"].shape[1], data["actions"].shape[1]
        low, high = min(data["rewards"]).item(), max(data["rewards"]).item()
        self.unit = high - low  # of rewards, returns and Q
        steps = args.rollout_horizon if args.gamma == 1 else 1 / (1 - args.gamma)
        self.least, self.most = min(low, 0) * steps / self.unit, max(high, 0) * steps / self.unit

    def policy(self, name, obs):
        out = network(self.state, f"{name}.net", obs, torch.relu)
        return out[: self.act], out[self.act :].clamp(-5, 2)

    def q(self, name, obs, action):
        """The twins' values of one action."""

        def activation(h):
            if not self.args.layer_norm:
                return torch.relu(h)
            return torch.relu((h - h.mean()) / ((h - h.mean()) ** 2).mean().add(1e-5).sqrt())

        mean, log_std = self.policy("behaviour", obs)
        x = torch.cat([obs, ((action - mean) / log_std.exp()).clamp(-5, 5)])
        return [network(self.state, f"{name}.net", x, activation, twin)[0] for twin in range(2)]

    def smaller_q(self, name, obs, u):
        return min(self.q(name, obs, u.clamp(-1, 1)))

    def value(self, obs, noise):
        """V of Eq. (8) in one state, noise (M, act)."""
        half = len(noise) // 2
        pi_mean, pi_log_std = self.policy("actor", obs)
        if self.args.alpha:
            mean, log_std = self.policy("behaviour", obs)
            actions = [mean + log_std.exp() * z for z in noise[:half]]
            actions += [pi_mean + pi_log_std.exp() * z for z in noise[half:]]
            alpha, total = self.args.alpha, 0
            for u in actions:
                mu, pi = log_normal(u, mean, log_std).exp(), log_normal(u, pi_mean, pi_log_std).exp()
                total += mu / (mu / 2 + pi / 2) / len(actions) * (self.smaller_q("target_critic", obs, u) / alpha).exp()
            value = alpha * total.log()
        else:
            actions = [pi_mean + pi_log_std.exp() * z for z in noise]
            value = sum(self.smaller_q("target_critic", obs, u) for u in actions) / len(actions)
        return min(max(value, self.least), self.most)

    def target(self, reward, ended, next_obs, noise):
        return reward / self.unit + (0 if ended else self.args.gamma * self.value(next_obs, noise))

    def model(self, pool, member, obs, action):
        out = network(self.state, f"{pool}.net", torch.cat([obs, action]), F.silu, member)
        mean = out[: 1 + self.obs] * self.state[f"{pool}.output_std"] + self.state[f"{pool}.output_mean"]
        log_std = 1 - (1 + (1 - out[1 + self.obs : -1]).exp()).log()
        log_std = -6 + (1 + (log_std + 6).exp()).log()
        change = torch.cat([torch.zeros(1), obs])
        return mean + change, log_std.exp() * self.state[f"{pool}.output_std"], out[-1]

    def arrive(self, mean, std, log_odds, noise, uniform):
        sample, (low, high) = mean + std * noise, self.state["active.box"]
        next_obs = sample[1:].minimum(high).maximum(low)
        return sample[0], next_obs, uniform < 1 / (1 + (-log_odds).exp()) if self.rule is None else self.rule(next_obs)

    def coins(self, *shape):
        return self.take("rand", *shape) if self.rule is None else torch.zeros(shape)

    def belief(self):
        """Eq. (4)."""
        delta = [self.state["evidence"][m] / self.state["evidence_weight"][m] for m in self.state["members"]]
        weights = [(-10 * self.args.likelihood_coef * (d - min(delta))).exp() for d in delta]
        return torch.stack(weights) / sum(weights)

    def update_belief(self, rows, observed):
        """Eq. (3)."""
        data, members = self.data, self.state["members"]
        noise, uniform = self.take("randn", len(rows), 1 + self.obs), self.coins(len(rows))
        action_noise = self.take("randn", self.args.action_samples, len(rows), self.act)
        delta = torch.zeros(len(members))
        for n in range(len(members)):
            for i, row in enumerate(rows):
                mean, std, log_odds = self.model("active", n, data["observations"][row], data["actions"][row])
                _, next_obs, ended = self.arrive(mean, std, log_odds, noise[i], uniform[i])
                error = self.target(mean[0], ended, next_obs, action_noise[:, i]) - observed[i]
                delta[n] += error**2 / len(rows)
        for n, member in enumerate(members):
            old = self.state["evidence"][member], self.state["evidence_weight"][member]
            self.state["evidence"][member] = 0.98 * old[0] + delta[n] / (delta.sum() / len(delta))
            self.state["evidence_weight"][member] = 0.98 * old[1] + 1

    def evaluate(self):
        args, state, data, half = self.args, self.state, self.data, self.args.batch_size // 2
        rows = self.take("randint", half, bound=len(data["rewards"]))
        noise = self.take("randn", args.action_samples, half, self.act)
        ended, rewards, following = (data[key][rows] for key in ("terminals", "rewards", "next_observations"))
        targets = [self.target(rewards[i], ended[i], following[i], noise[:, i]) for i in range(half)]
        self.update_belief(rows[: args.evidence_rows], targets)
        states, actions = [*data["observations"][rows], *state["rollout_obs"].clone()], [*data["actions"][rows]]

        noise, belief, arrivals = self.take("randn", half, self.act), self.belief(), []
        for i in range(half):
            mean, log_std = self.policy("actor", state["rollout_obs"][i])
            actions.append((mean + log_std.exp() * noise[i] * (i % 2)).clamp(-1, 1))
        exponential = self.take("exponential_", 2, args.active_models)
        models = [max(range(len(belief)), key=lambda n: belief[n] / exponential[g, n]) for g in range(2)]
        for name in state:
            if name.startswith("sampled."):
                theirs = state[name.replace("sampled", "active")]
                state[name] = theirs[models] if ".weights" in name or ".biases" in name else theirs.clone()
        noise, uniform = self.take("randn", 2, half // 2, 1 + self.obs), self.coins(2, half // 2)
        for i in range(half):
            g, j = divmod(i, half // 2)
            prediction = self.model("active", models[g], state["rollout_obs"][i], actions[half + i])
            arrivals.append(self.arrive(*prediction, noise[g, j], uniform[g, j]))
        noise = self.take("randn", args.action_samples, half, self.act)
        targets += [self.target(r, end, s, noise[:, i]) for i, (r, s, end) in enumerate(arrivals)]
        targets = [float(y) for y in targets]

        q, losses = [], []

        def loss():
            q.extend(self.q("critic", *pair) for pair in zip(states, actions, strict=True))
            for twin in range(2):
                losses.append(sum((q[i][twin] - y) ** 2 for i, y in enumerate(targets)) / len(targets))
            return sum(losses)

        self.critic_adam.step(state, loss, args.critic_lr)
        for name in self.critic_adam.names:
            state["target_" + name] += args.target_rate * (state[name] - state["target_" + name])
        rows = self.take("randint", half, bound=len(data["rewards"]))
        for i, (_, next_obs, end) in enumerate(arrivals):
            state["rollout_age"][i] += 1
            edges = zip(next_obs, *state["pool.box"], strict=True)
            out = any(low < high and not low < x < high for x, low, high in edges)
            restart = end or out or state["rollout_age"][i] >= args.rollout_horizon
            state["rollout_obs"][i] = data["observations"][rows[i]] if restart else next_obs
            state["rollout_age"][i] *= not restart
        means = [sum(map(sum, part)) / (2 * half) for part in (q[:half], q[half:])]
        ends = sum(bool(end) for *_, end in arrivals) / half
        entropy = -sum(p * p.log() for p in belief)
        metrics = {"critic/loss": sum(losses), "critic/q_data": means[0], "critic/q_model": means[1]}
        metrics |= {"critic/target_max": max(map(abs, targets)), "rollout/terminals": ends}
        return states, metrics | {"posterior/entropy": entropy, "posterior/largest": max(belief)}

    def improve(self, states):
        """Eq. (9)."""
        args, state, count = self.args, self.state, len(states)
        noise, seen = self.take("randn", args.action_samples // 2, count, self.act), {}
        alpha, eta = args.alpha, state["log_eta"].exp()

        def kl(p, other):
            moments = zip(*p, *other, strict=True)
            terms = [b - a + ((2 * a).exp() + (m - n) ** 2) / (2 * (2 * b).exp()) - 1 / 2 for m, a, n, b in moments]
            return sum(terms)

        def loss():
            policies = [self.policy("actor", obs) for obs in states]
            q = 0
            for i, (mean, log_std) in enumerate(policies):
                for z in noise[:, i]:
                    q = q + self.smaller_q("critic", states[i], mean + log_std.exp() * z) / len(noise) / count
            for name in ("behaviour", "previous"):
                others = [self.policy(name, obs) for obs in states]
                seen[name] = sum(kl(p, other) for p, other in zip(policies, others, strict=True)) / count
            seen["log_std"] = sum(log_std.mean() for _, log_std in policies) / count
            seen["objective"] = q - alpha * seen["behaviour"] - eta * seen["previous"]
            return -seen["objective"]

        before = {name: state[name].clone() for name in self.actor_adam.names}
        self.actor_adam.step(state, loss, args.actor_lr)
        state["updates"] += 1
        for name, old in before.items():
            if state["updates"] % args.trust_region_every == 0:
                state[name.replace("actor", "previous")] = old
            average = name.replace("actor", "average")
            state[average] = (1 - args.average_rate) * state[average] + args.average_rate * state[name]
        excess = seen["previous"].detach() / args.trust_region - 1
        state["log_eta"] = (state["log_eta"] + 0.05 * min(max(excess, -1), 1)).clamp(-6, 6)
        metrics = {"objective": seen["objective"], "kl_behaviour": seen["behaviour"], "kl_previous": seen["previous"]}
        metrics |= {"eta": state["log_eta"].exp(), "log_std": seen["log_std"]}
        return {f"policy/{name}": value for name, value in metrics.items()}


def train_pool(state, args, data, rule, tape):
    """A pool's tensors `state` by maximum likelihood, in place; (explained variance (pool, 1+obs), best epochs)."""
    obs, actions, known = data["observations"], data["actions"], data["known"]
    outputs = torch.cat([data["rewards"][:, None], data["next_observations"] - obs], 1)
    inputs, (rows, width), members = torch.cat([obs, actions], 1), outputs.shape, range(args.pool_size)
    seen = data["next_observations"][known]
    margin = (seen.max(0).values - seen.min(0).values) / 10
    state["box"] = torch.stack([seen.min(0).values - margin, seen.max(0).values + margin])
    state |= {"net.mean": inputs.mean(0), "net.std": inputs.std(0)}
    std = outputs[known].std(0)
    state |= dict(output_mean=outputs[known].mean(0), output_std=torch.where(std > 0, std, 1.0))
    standard = (outputs - state["output_mean"]) / state["output_std"]

    def predicted(member, row):  # standard mean and log-std (1+obs,), log-odds of an end
        out = network(state, "net", inputs[row], F.silu, member)
        log_std = 1 - (1 + (1 - out[width:-1]).exp()).log()
        return out[:width], -6 + (1 + (log_std + 6).exp()).log(), out[-1]

    def errors(member, row):
        return predicted(member, row)[0] - standard[row]

    order, held = tape.take("randperm", rows, bound=rows), rows // 10 + 1
    held_out, train = order[:held][known[order[:held]]], order[held:]
    bootstrap = tape.take("randint", len(members), len(train), bound=len(train))
    adam, updates = Adam(state, "net.", decay=7.5e-5), len(train) // args.dynamics_batch
    least, best, best_epochs = [math.inf for _ in members], [None for _ in members], [0 for _ in members]
    for update in range(args.dynamics_epochs * updates):
        drawn = tape.take("randint", len(members), args.dynamics_batch, bound=len(train))

        def loss(drawn=drawn):
            total = 0
            for member in members:
                for row in train[bootstrap[member, drawn[member]]]:
                    mean, log_std, log_odds = predicted(member, row)
                    for k in range(width if known[row] else 1):
                        nll = log_std[k] + (standard[row, k] - mean[k]) ** 2 / (2 * (2 * log_std[k]).exp())
                        total = total + log_std[k].detach().exp() * nll / width
                    if rule is None:  # the odds of what happened
                        total = total + (1 + (-log_odds if data["terminals"][row] else log_odds).exp()).log()
            return total / args.dynamics_batch

        share = (1 + math.cos(math.pi * update / (args.dynamics_epochs * updates))) / 2
        adam.step(state, loss, args.dynamics_lr * share)
        for member in members if (update + 1) % updates == 0 else ():
            error = sum((errors(member, row) ** 2).sum() for row in held_out) / (len(held_out) * width)
            if error < least[member]:
                least[member], best_epochs[member] = error, update // updates
                best[member] = {name: state[name][member] for name in adam.names}
    state |= {name: torch.stack([kept[name] for kept in best]) for name in adam.names}
    error = torch.stack([torch.stack([errors(member, row) for row in held_out]) for member in members])
    variance = standard[held_out].var(0)
    return 1 - error.var(1) / torch.where(variance > 0, variance, 1.0), best_epochs


def clone_behaviour(state, args, data, tape):
    """μ of a learner's tensors `state` by maximum likelihood, in place; π, π_i and the average of π are its copies."""
    adam = Adam(state, "behaviour.")
    for update in range(args.behaviour_updates):
        rows = tape.take("randint", args.batch_size, bound=len(data["rewards"]))

        def loss(rows=rows):
            total = 0
            for row in rows:
                mean, log_std = network(state, "behaviour.net", data["observations"][row], torch.relu).chunk(2)
                total = total - log_normal(data["actions"][row], mean, log_std.clamp(-5, 2)) / args.batch_size
            return total

        adam.step(state, loss, 5e-3 * (1 + math.cos(math.pi * update / args.behaviour_updates)) / 2)
    for name in adam.names:
        state |= {name.replace("behaviour", other): state[name] for other in ("actor", "previous", "average")}


class IQL:
    """IQL's update on a copy of the learner's tensors and on the random numbers that it drew."""

    def __init__(self, learner, args, rows, tape):
        self.state, self.args, self.rows, self.take = copy.deepcopy(dict(learner.state_dict())), args, rows, tape.take
        self.value_adam, self.actor_adam, self.critic_adam = (
            Adam(self.state, prefix) for prefix in ("value.", "actor.", "critic.")
        )

    def q(self, name, obs, action):
        return [network(self.state, f"{name}.net", torch.cat([obs, action]), torch.relu, twin)[0] for twin in range(2)]

    def value(self, obs):
        return network(self.state, "value.net", obs, torch.relu)[0]

    def update(self, actor_rate):
        """One update on `rows`, a list of (s, a, r, s', end); returns the metrics."""
        args, state, count = self.args, self.state, self.args.batch_size
        uniform = self.take("rand", count)
        batch = [self.rows[int(x * len(self.rows))] for x in uniform]
        kept = [self.take("dropout", 1, count, args.hidden, bound=args.dropout) for _ in range(2)]
        target_q, seen = [min(self.q("target_critic", s, a)) for s, a, *_ in batch], {}

        def value_loss():
            differences = [q - self.value(s) for q, (s, *_) in zip(target_q, batch, strict=True)]
            terms = [(args.expectile if u >= 0 else 1 - args.expectile) * u**2 for u in differences]
            seen["value"] = sum(terms) / count
            return seen["value"]

        self.value_adam.step(state, value_loss, args.critic_lr)
        v = [self.value(s) for s, *_ in batch]
        advantages = [q - value for q, value in zip(target_q, v, strict=True)]
        weights = [min(math.exp(args.beta * a), args.weight_clip) for a in advantages]
        targets = [r + (0 if end else args.gamma * self.value(following)) for _, _, r, following, end in batch]
        q = [self.q("critic", s, a) for s, a, *_ in batch]
        log_std = state["actor.log_std"].clamp(-5, 2)

        def actor_loss():
            log_probs = []
            for i, (s, a, *_) in enumerate(batch):
                masks = iter([mask[0, i] / (1 - args.dropout) for mask in kept])
                mean = network(state, "actor.net", s, lambda h, masks=masks: torch.relu(h) * next(masks)).tanh()
                log_probs.append(log_normal(a, mean, state["actor.log_std"].clamp(-5, 2)))
            seen["log_prob"] = sum(log_probs) / count
            seen["actor"] = -sum(w * p for w, p in zip(weights, log_probs, strict=True)) / count
            return seen["actor"]

        def critic_loss():
            pairs = zip(batch, targets, strict=True)
            seen["critic"] = sum((x - y) ** 2 for (s, a, *_), y in pairs for x in self.q("critic", s, a)) / count
            return seen["critic"]

        self.actor_adam.step(state, actor_loss, actor_rate)
        self.critic_adam.step(state, critic_loss, args.critic_lr)
        for name in self.critic_adam.names:
            state["target_" + name] = (1 - args.target_rate) * state["target_" + name] + args.target_rate * state[name]
        clipped = sum(w == args.weight_clip for w in weights) / count
        metrics = {"value/loss": seen["value"], "value/v": sum(v) / count, "critic/loss": seen["critic"]}
        metrics |= {"critic/q": sum(map(sum, q)) / (2 * count), "policy/loss": seen["actor"]}
        metrics |= {"policy/log_prob": seen["log_prob"], "policy/log_std": log_std.mean()}
        metrics |= {"policy/advantage": sum(advantages) / count, "policy/weight": sum(weights) / count}
        return metrics | {"policy/clipped": clipped}
