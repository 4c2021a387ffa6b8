"""The papers' lemmas and theorems, executed: read it beside PSPO's sections 3, 4, 9.1, 11 and IQL's section 4.

Every test states one claim with its number, takes a decision problem small enough to be solved exactly (`Tabular`:
a few states, actions and models, float64), and checks the claim with the functions that pspo.py and iql.py train
with. Beside most claims stand the cases where one of its assumptions is broken, and it fails. What is about networks,
samples and bookkeeping is in test_pspo.py and test_iql.py. Where the formulas of PSPO's paper are open, docs/pspo.md
says what we read.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import iql
import pspo

F64 = torch.float64


# --- Problems with exact answers ---


@dataclass(frozen=True)
class Tabular:
    """A Markov decision problem with S states, A actions and N models of it; all tensors float64."""

    transition: torch.Tensor  # (N, S, A, S), τ(s' | s, a)
    reward: torch.Tensor  # (N, S, A), E_τ[r]
    belief: torch.Tensor  # (N,), P(τ)
    behaviour: torch.Tensor  # (S, A), μ(a | s); for IQL an action with 0 is not in the data
    start: torch.Tensor  # (S,), ρ₀
    gamma: float = 0.9
    alpha: float = 0.3

    def expected_target(self, next_value, script=pspo):
        """E_{τ~P}[ r + γ E_{s'~τ} V(s') ], the common part of Eqs. (5) and (8), and what minimises IQL's Eq. (6), which
        is least squares: (S,) -> (S, A)."""
        targets = target(self.reward, self.transition @ next_value, self.gamma, script)
        return torch.einsum("n,nsa->sa", self.belief, targets)

    def evaluation_operator(self, q, policy):
        """T^π of Eq. (5)."""
        return self.expected_target((policy * q).sum(1))

    def value(self, q):
        """V(s) = α log E_{a~μ} exp(Q(s, a) / α)."""
        return pspo.soft_value(q.T, self.behaviour.log().T, self.alpha)

    def optimality_operator(self, q):
        """T* of Eq. (8)."""
        return self.expected_target(self.value(q))

    def fixed_point(self, q):
        """The limit of T*ⁿ q. 400 iterations at γ = 0.9 leave 1e-18 of the starting error."""
        for _ in range(400):
            q = self.optimality_operator(q)
        return q

    def values(self, policy, alpha):
        """V^π (S,) and Q^π (S, A), exactly: V = Σ_a π ( E_τ[r + γ E V] − α log(π / μ) ) is a linear system."""
        expected_reward = torch.einsum("n,nsa->sa", self.belief, self.reward)
        earned = (policy * expected_reward).sum(1) - alpha * kl(policy, self.behaviour)
        v = torch.linalg.solve(self.system(policy), earned)
        return v, self.expected_target(v)

    def system(self, policy):
        """1 − γ E_{τ~P}[ the chain of states under π ], (S, S)."""
        chain = torch.einsum("n,nsat,sa->st", self.belief, self.transition, policy)
        return torch.eye(len(chain), dtype=F64) - self.gamma * chain

    def visits(self, policy):
        """Discounted number of visits of each state under π, (S,)."""
        return torch.linalg.solve(self.system(policy).T, self.start)

    def objective(self, policy, alpha=0.0):
        """J(π) of Eq. (1), or J̄(π) of Eq. (7) for α > 0."""
        return self.start @ self.values(policy, alpha)[0]

    def regularised_objective(self, policy):
        """J̄(π) of Eq. (7)."""
        return self.objective(policy, self.alpha)

    def expectile_operator(self, v, tau):
        """V → V, one round of IQL's Eqs. (6) and (5): the exact minimisers of iql.py's losses over the data."""
        q = self.expected_target(v, iql)
        return newton(lambda v: (self.behaviour * iql.expectile_loss(q - v[:, None], tau)).sum(1), v)

    def expectile_value(self, tau):
        """The fixed point V_τ: 250 rounds at γ = 0.9 leave 4e-12 of the first error."""
        v = torch.zeros(len(self.start), dtype=F64)
        for _ in range(250):
            v = self.expectile_operator(v, tau)
        return v

    def best_in_support(self):
        """V* over the actions of the data, by value iteration."""
        v = torch.zeros(len(self.start), dtype=F64)
        for _ in range(500):
            v = self.expected_target(v).masked_fill(self.behaviour == 0, -torch.inf).amax(1)
        return v


def target(reward, next_value, gamma, script=pspo):
    """The script's bellman_target of a row that does not end the episode."""
    return script.bellman_target(reward, torch.zeros_like(reward, dtype=torch.bool), next_value, gamma)


def kl(p, other):
    """KL(p ‖ other) over the last dimension."""
    return (p * (p / other).log()).sum(-1)


def distribution(*shape, generator, spread=1.0):
    return (spread * torch.randn(shape, generator=generator, dtype=F64)).softmax(-1)


def tabular(seed, models=4, states=5, actions=3, **constants):
    """A random member of the family; the belief comes from random evidence through Eq. (4)."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(distribution, generator=generator)
    return Tabular(
        transition=draw(models, states, actions, states, spread=2.0),
        reward=2 * torch.rand((models, states, actions), generator=generator, dtype=F64) - 1,
        belief=pspo.posterior(torch.rand(models, generator=generator, dtype=F64), 2.0).exp(),
        behaviour=draw(states, actions),
        start=draw(states),
        **constants,
    )


def random_q(mdp, seed, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(mdp.behaviour.shape, generator=generator, dtype=F64)


def maximise(objective, *shape):
    """The distribution over the last dimension that maximises a concave objective, found without using its theory."""
    logits = torch.zeros(shape, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -objective(logits.softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def newton(loss, v):
    """The minimiser of a sum of piecewise quadratic functions of one number each, from v: Newton's method is exact."""
    for _ in range(6):
        v = v.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(v).sum(), v, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), v)
        v = v - gradient / curvature
    return v.detach()


# --- Eqs. (1) and (2): a model drawn anew at every step, or kept for an episode ---


def one_model(mdp, index):
    """The same problem under a belief that is certain of one model."""
    return replace(mdp, belief=torch.nn.functional.one_hot(torch.tensor(index), len(mdp.belief)).to(F64))


@pytest.mark.parametrize("certain", [False, True])
def test_equations_1_and_2_agree_only_for_a_certain_belief(certain):
    """Eq. (1) draws τ ~ P anew at every step; Eq. (2) draws it once an episode. One value if P is a point mass.

    Both are played out by sampling, and computed: (1) is the return in the one averaged model Σ P(τ) τ, (2) the
    average of the returns in the models.
    """
    mdp = tabular(5, gamma=0.8)
    mdp = one_model(mdp, 2) if certain else replace(mdp, belief=torch.full((4,), 0.25, dtype=F64))
    policy = distribution(5, 3, generator=torch.Generator().manual_seed(0))
    anew = mdp.objective(policy)
    kept = sum(p * one_model(mdp, n).objective(policy) for n, p in enumerate(mdp.belief))

    def play(draw_anew, episodes=20_000, steps=40):  # 0.8^40 is 1e-4
        torch.manual_seed(0)
        state = mdp.start.multinomial(episodes, replacement=True)
        model, total = pspo.sample_models(mdp.belief.log(), (episodes,)), torch.zeros(episodes, dtype=F64)
        for step in range(steps):
            if draw_anew:
                model = pspo.sample_models(mdp.belief.log(), (episodes,))
            action = policy[state].multinomial(1)[:, 0]
            total += mdp.gamma**step * mdp.reward[model, state, action]
            state = mdp.transition[model, state, action].multinomial(1)[:, 0]
        return total.mean().item(), 4 * total.std().item() / episodes**0.5

    for exact, (mean, error) in ((anew, play(True)), (kept, play(False))):
        assert mean == pytest.approx(exact.item(), abs=error)
    assert (abs(anew - kept) < 1e-12) == certain


# --- Eqs. (3) and (4): evidence and posterior ---


def test_equation_3_is_least_for_the_true_model():
    """Eq. (3): a mean squared difference of targets, by hand; on transitions of model 2 its own expected target has the
    least Δ, and the belief finds it."""
    model = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    assert pspo.model_evidence(model, torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([0, 3, 14 / 3])
    mdp = tabular(0, models=6)
    torch.manual_seed(0)
    state, action = torch.randint(5, (20_000,)), torch.randint(3, (20_000,))
    next_state = mdp.transition[2, state, action].multinomial(1)[:, 0]
    value = mdp.value(random_q(mdp, 0))
    observed = target(mdp.reward[2, state, action], value[next_state], mdp.gamma)
    by_model = target(mdp.reward, mdp.transition @ value, mdp.gamma)[:, state, action]  # (N, rows)
    belief = pspo.posterior(pspo.model_evidence(by_model, observed), 3.0).exp()
    assert belief.argmax() == 2
    assert belief[2] > 0.5


def test_remark_4_the_belief_depends_on_the_critic():
    """Remark 4: Δ compares *values*, so another critic prefers another model, on the same transitions.

    Nature goes to state 0. Model 0 says state 1, model 1 says state 2. A critic to which states 0 and 1 are worth the
    same finds no fault in model 0; one to which states 0 and 2 are worth the same finds none in model 1.
    """
    for value, good in (([1.0, 1.0, 5.0], 0), ([1.0, 5.0, 1.0], 1), ([1.0, 1.0, 1.0], None)):
        by_model = target(torch.zeros(2), torch.tensor(value)[[1, 2]], 0.9)[:, None]
        observed = target(torch.zeros(1), torch.tensor(value)[[0]], 0.9)
        belief = pspo.posterior(pspo.model_evidence(by_model, observed), 1.0).exp()
        if good is None:  # a critic that tells no states apart is no evidence at all
            assert belief.tolist() == [0.5, 0.5]
        else:
            assert belief[good] > 0.99


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_equation_4_is_the_minimiser_and_its_value(strength):
    """Eq. (4) and section 9.1: P ∝ exp(−λ Δ) minimises E_P[Δ] + KL(P ‖ P₀) / λ, P₀ uniform; the least value is
    −(1/λ) log E_{P₀} exp(−λ Δ)."""
    evidence = torch.tensor([0.3, 0.0, 1.7, 0.9, 2.5], dtype=F64)

    def loss(p):
        return p @ evidence + (p @ (5 * p).log()) / strength

    belief = pspo.posterior(evidence, strength).exp()
    assert belief.sum().item() == pytest.approx(1, abs=1e-12)
    assert (maximise(lambda p: -loss(p), 5) - belief).abs().max() < 1e-5
    least = -(-strength * evidence).exp().mean().log() / strength
    assert loss(belief).item() == pytest.approx(least.item(), abs=1e-12)


def test_equation_4_at_its_limits():
    """Eq. (4): λ = 0 is P₀ whatever the evidence; a huge λ or Δ picks the best model and nothing becomes NaN."""
    evidence = torch.tensor([1e30, 0.5, 0.25, 3.0])
    assert pspo.posterior(evidence, 0.0).exp().tolist() == pytest.approx([0.25] * 4)
    for strength in (1.0, 1e6):
        belief = pspo.posterior(evidence, strength)
        assert not belief.isnan().any()
        assert belief.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert belief.exp().tolist() == [0, 0, 1, 0]
    assert pspo.posterior(torch.full((4,), 1e30), 1e6).exp().tolist() == pytest.approx([0.25] * 4)
    # A constant added to Δ is no evidence; every column of a batch is a posterior of its own.
    batch = torch.rand(7, 4, dtype=F64)
    assert (pspo.posterior(batch + 5, 2.0) - pspo.posterior(batch, 2.0)).abs().max() < 1e-12
    assert (pspo.posterior(batch, 2.0)[3] - pspo.posterior(batch[3], 2.0)).abs().max() < 1e-15


def test_principle_2_fails_when_all_evidence_is_summed():
    """Section 3.2, Principle 2: the KL term keeps every model possible. Not so if λ grows with the number of
    observations, which is what Bayes' sum does: after 2,000 rows a hundredth of difference leaves one model."""
    evidence = torch.tensor([1.00, 1.01, 1.02, 1.03], dtype=F64)
    assert pspo.posterior(evidence, 1.0).exp().min() > 0.24
    assert pspo.posterior(evidence, 1.0 * 2000).exp().max() > 1 - 1e-8


# --- Proposition 1: T^π is a contraction ---


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_proposition_1_evaluation_operator_is_a_contraction(gamma):
    """Proposition 1: ‖T^π Q₁ − T^π Q₂‖ ≤ γ ‖Q₁ − Q₂‖ in the sup norm for Eq. (5), and no smaller factor will do."""
    ratios = []
    for seed in range(200):
        mdp = tabular(seed, gamma=gamma)
        policy = distribution(5, 3, generator=torch.Generator().manual_seed(seed))
        q = random_q(mdp, seed)
        # From differences in every direction (seed 0) to nearly constant ones, which the bound is tight for.
        other = q + 1 + random_q(mdp, seed + 1000, scale=5 * (1 - seed / 200))
        gap = (mdp.evaluation_operator(q, policy) - mdp.evaluation_operator(other, policy)).abs().max()
        ratios.append((gap / (q - other).abs().max()).item())
    assert max(ratios) <= gamma * (1 + 1e-12)
    assert max(ratios) > 0.95 * gamma
    assert min(ratios) < 0.7 * gamma


def test_proposition_1_and_theorem_1_fail_without_discount():
    """Proposition 1 needs γ < 1. At γ = 1 a constant difference stays as it is, and the iterates run away: by the
    average reward in every iteration, for ever. Theorem 1 too, where nothing ends: there are many limits, or none."""
    mdp = tabular(0, gamma=1.0)
    policy = distribution(5, 3, generator=torch.Generator().manual_seed(0))
    q = random_q(mdp, 0)
    gap = mdp.evaluation_operator(q + 7, policy) - mdp.evaluation_operator(q, policy)
    assert (gap - 7).abs().max() < 1e-12
    iterates = [q]
    for _ in range(2000):
        iterates.append(mdp.evaluation_operator(iterates[-1], policy))
    growth = iterates[-1] - iterates[-2]
    assert growth.abs().min() > 0.01
    assert (iterates[-1] - iterates[1000]).abs().min() > 900 * growth.abs().min()
    first, second = mdp.fixed_point(q), mdp.fixed_point(q + 100)
    assert (second - first - 100).abs().max() < 1e-9
    assert (mdp.optimality_operator(first) - first).abs().max() > 0.1


# --- Proposition 2 and Remark 1: sampled targets, Robbins and Monro ---


def test_proposition_2_variance_of_the_sampled_target():
    """Proposition 2: |r| ≤ R_max ⇒ Var(y) ≤ R_max² / (1−γ)² for y = r + γ Q(s', a'), by Popoviciu's inequality."""
    for seed in range(100):
        mdp = tabular(seed)
        policy = distribution(5, 3, generator=torch.Generator().manual_seed(seed))
        bound = mdp.reward.abs().max() / (1 - mdp.gamma)
        q = (2 * torch.rand(5, 3, dtype=F64) - 1) * bound  # any Q that rewards within R_max can have
        y = target(mdp.reward[..., None, None], q.expand(4, 5, 3, 5, 3), mdp.gamma)  # (τ, s, a, s', a')
        weight = mdp.belief[:, None, None, None, None] * mdp.transition[..., None] * policy
        mean = (weight * y).sum((0, 3, 4))
        variance = (weight * (y - mean[..., None, None]).square()).sum((0, 3, 4))
        assert (weight.sum((0, 3, 4)) - 1).abs().max() < 1e-12
        assert 0 < variance.max() <= bound**2


def test_proposition_2_is_tight_and_fails_for_a_critic_outside_the_rewards_range():
    """Proposition 2 with equality: one model pays R_max for ever, the other takes it away, the belief is even. Its
    premise is on Q too, |Q| ≤ R_max / (1−γ): a critic that has drifted beyond breaks the bound; clipping it, as
    PSPO.value does, restores it."""
    gamma, reward = 0.9, torch.tensor([3.0, -3.0], dtype=F64)
    bound = 3.0 / (1 - gamma)
    drifted = 3 * bound * reward.sign()
    assert target(reward, reward / (1 - gamma), gamma).var(correction=0).item() == pytest.approx(bound**2, rel=1e-12)
    assert target(reward, drifted, gamma).var(correction=0) > 5 * bound**2
    assert target(reward, drifted.clamp(-bound, bound), gamma).var(correction=0) <= bound**2 * (1 + 1e-12)


STEP_SIZES = {  # η_t of Eq. (6), t = 1 … 3,000
    "Robbins–Monro": lambda t: t**-0.7,  # Ση = ∞, Ση² < ∞
    "constant": lambda t: 0.5 + 0 * t,  # Ση² = ∞
    "too fast": lambda t: t**-2.0,  # Ση < ∞
    "to zero in time": lambda t: 0.5 * torch.tensor([pspo.cosine(i, 3000) for i in t]),  # what pspo.py does
}


@pytest.fixture(scope="module")
def errors():
    """Eq. (6) from Q = 5, 50 times for every rule: root-mean-square distance to Q* after each update."""
    mdp, shape = tabular(0, models=3, states=3, actions=2, gamma=0.5, alpha=0.5), (4, 50, 3, 2)  # rules, runs, S, A
    exact = mdp.fixed_point(random_q(mdp, 0))
    step_sizes = torch.stack([rule(torch.arange(1.0, 3001)) for rule in STEP_SIZES.values()]).to(F64)
    torch.manual_seed(0)
    state, action = torch.arange(3)[:, None], torch.arange(2)
    q, distances = torch.full(shape, 5.0, dtype=F64), []
    for step_size in step_sizes.T:
        model = pspo.sample_models(mdp.belief.log(), shape)  # τ ~ P, one for every entry of Q
        chance = mdp.transition[model, state, action]  # (4, 50, S, A, S)
        next_state = (chance.cumsum(-1) < torch.rand(*shape, 1, dtype=F64)).sum(-1).clamp(max=2)
        value = pspo.soft_value(q.movedim(3, 0), mdp.behaviour.log().T[:, None, None], mdp.alpha)  # (4, 50, S)
        y = target(mdp.reward[model, state, action], value.gather(2, next_state.flatten(2)).view(shape), mdp.gamma)
        q = q + step_size[:, None, None, None] * (y - q)
        distances.append((q - exact).square().mean((1, 2, 3)).sqrt())
    return dict(zip(STEP_SIZES, torch.stack(distances, 1).numpy(), strict=True))


def test_remark_1_stochastic_approximation_converges(errors):
    """Remark 1: Q ← Q + η_t (y − Q) with τ ~ P, s' ~ τ tends to Q* of Eq. (8) if Ση = ∞ and Ση² < ∞: the error falls
    like the square root of the step, by 10^−0.35 = 0.45 from 300 to 3,000 updates."""
    decreasing = errors["Robbins–Monro"]
    assert decreasing[-1] < 0.6 * decreasing[299] < 0.6 * 0.6 * decreasing[29]
    assert decreasing[-1] < 0.03


def test_remark_1_fails_for_other_step_sizes(errors):
    """Ση² = ∞: a constant step stops at a noise floor that more updates do not lower. Ση < ∞: with η_t = t⁻² the
    iterates stop on the way, without noise and far from Q*. pspo.py lowers its step to zero over a fixed budget, along
    a cosine: no Robbins–Monro sequence, which has no end, but the noise of its start is gone at the end."""
    constant, too_fast, best = errors["constant"], errors["too fast"], errors["Robbins–Monro"][-1]
    assert constant[-300:].min() > 5 * best and constant[-300:].mean() > 0.8 * constant[300:600].mean()
    assert too_fast[-1] > 10 * best and abs(too_fast[-1] - too_fast[299]) < 0.01 * too_fast[-1]
    assert errors["to zero in time"][-1] < min(0.2 * constant[-300:].mean(), 0.05)


# --- PSPO's Lemma 1 ---


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 10.0])
def test_lemma_1_soft_value_is_a_non_expansion(alpha):
    """Lemma 1: |f(Q₁) − f(Q₂)| ≤ ‖Q₁ − Q₂‖ for f(Q) = α log E_μ exp(Q/α), with equality for a constant difference."""
    mdp = tabular(0, states=50, actions=6, alpha=alpha)
    for seed in range(100):
        q, other = random_q(mdp, seed), random_q(mdp, seed + 1000)
        gap = (mdp.value(q) - mdp.value(other)).abs()
        assert (gap <= (q - other).abs().amax(1) * (1 + 1e-12)).all()
    assert (mdp.value(q + 7) - mdp.value(q) - 7).abs().max() < 1e-10


def test_lemma_1_fails_for_another_temperature_inside():
    """Lemma 1 needs the same α outside and inside: f(Q) = log E_μ exp(Q/α) with α = 0.3 stretches by 1/0.3."""
    mdp = tabular(0, alpha=0.3)
    q = random_q(mdp, 0)
    stretched = (mdp.value(q + 1) - mdp.value(q)) / mdp.alpha
    assert (stretched - 1 / 0.3).abs().max() < 1e-10


# --- PSPO's Theorem 1: the fixed point and the optimal policy ---


def test_theorem_1_fixed_point_is_unique():
    """Theorem 1, first step: T* of Eq. (8) is a γ-contraction; iterated from two distant starts it ends in the same
    Q*, and T* Q* = Q*."""
    for seed in range(100):
        mdp = tabular(seed)
        q, other = random_q(mdp, seed), random_q(mdp, seed + 1000)
        gap = (mdp.optimality_operator(q) - mdp.optimality_operator(other)).abs().max()
        assert gap <= mdp.gamma * (q - other).abs().max() * (1 + 1e-12)
    for mdp in map(tabular, range(3)):
        first, second = mdp.fixed_point(random_q(mdp, 0)), mdp.fixed_point(100 + random_q(mdp, 1, scale=100.0))
        assert (first - second).abs().max() < 1e-11
        assert (mdp.optimality_operator(first) - first).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_optimal_policy(seed):
    """Theorem 1: π* ∝ μ exp(Q*/α) maximises E_π Q* − α KL(π ‖ μ) in every state, and the maximum is V(s)."""
    mdp = tabular(seed)
    q = mdp.fixed_point(random_q(mdp, 0))
    best = (mdp.behaviour.log() + q / mdp.alpha).softmax(1)

    def objective(policy):
        return pspo.policy_objective((policy * q).sum(1), mdp.alpha, kl(policy, mdp.behaviour), 0.0, 0.0)

    assert objective(best).item() == pytest.approx(mdp.value(q).mean().item(), abs=1e-12)
    assert (maximise(objective, *q.shape) - best).abs().max() < 1e-5
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        assert objective(distribution(*q.shape, generator=generator)) < objective(best)


@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_maximises_the_regularised_return(seed):
    """Theorem 1: J̄ of Eq. (7), evaluated exactly, is E_{s₀} V*(s₀) for π* and less for every other policy."""
    mdp = tabular(seed)
    q = mdp.fixed_point(random_q(mdp, 0))
    logits = mdp.behaviour.log() + q / mdp.alpha
    optimum = mdp.regularised_objective(logits.softmax(1)).item()
    assert optimum == pytest.approx((mdp.start @ mdp.value(q)).item(), abs=1e-11)
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.01, 0.1, 1.0):  # near π* as well as far from it
        for _ in range(100):
            other = logits + scale * torch.randn(logits.shape, generator=generator, dtype=F64)
            assert mdp.regularised_objective(other.softmax(1)) < optimum
    assert mdp.regularised_objective(mdp.behaviour) < optimum


# --- Eq. (9): the step within a trust region ---


def product_of_experts(q, mu, previous, alpha, eta):
    """The maximiser of E_π Q − α KL(π ‖ μ) − η KL(π ‖ π_i): π ∝ μ^(α/(α+η)) π_i^(η/(α+η)) exp(Q/(α+η))."""
    return ((alpha * mu.log() + eta * previous.log() + q) / (alpha + eta)).softmax(-1)


def trust_region_problem():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(6, generator=generator, dtype=F64)
    mu, previous = (distribution(6, generator=generator) for _ in range(2))
    return q, mu, previous, 0.2  # α


@pytest.mark.parametrize("eta", [0.0, 0.1, 2.0])
def test_equation_9_is_solved_by_a_product_of_experts(eta):
    """Eq. (9) by its KKT conditions: π ∝ μ^(α/(α+η)) π_i^(η/(α+η)) exp(Q/(α+η)) maximises the penalised objective."""
    q, mu, previous, alpha = trust_region_problem()

    def objective(policy):
        return pspo.policy_objective(policy @ q, alpha, kl(policy, mu), eta, kl(policy, previous))

    best = product_of_experts(q, mu, previous, alpha, eta)
    assert (maximise(objective, 6) - best).abs().max() < 1e-5
    assert objective(maximise(objective, 6)) <= objective(best) + 1e-12


# --- Theorem 2: solving Eq. (9) improves J itself, not only J̄ ---
#
# The proof: at the solution ∇J̄ = ∇J − α ∇D is η times the gradient of the constraint, about η F δ, with δ the step, F
# the Fisher matrix at π_i and D(π) = E[ Σ γᵗ KL(π ‖ μ) ] the regulariser. So δ = F⁻¹ ∇J̄ / η, and to first order J
# changes by ∇J · δ = η δ·F δ + α ∇D · δ. The condition whose formula our text of the paper has lost must make that
# positive: we read it as ∇J · F⁻¹ (∇J − α ∇D) > 0 (derived).


def step_of_equation_9(mdp, policy, eta):
    """π_{i+1} and E_s KL(π_{i+1} ‖ π_i), states weighted by how often π_i visits them; critic exact, every state.

    The objective of the script, policy_objective, with the exact Q of J̄ at π_i; its maximiser is the product of
    experts above. η is the multiplier of the constraint: the larger, the smaller the trust region.
    """
    _, q = mdp.values(policy, mdp.alpha)
    new = product_of_experts(q, mdp.behaviour, policy, mdp.alpha, eta)
    weight = mdp.visits(policy)
    return new, (weight @ kl(new, policy) / weight.sum()).item()


def natural_step(mdp, policy):
    """(δ, ∇J · δ): δ = F⁻¹ ∇J̄ in the logits of a tabular policy, (S, A), and the first-order change of J along it."""
    logits = policy.log().requires_grad_()
    (of_j,) = torch.autograd.grad(mdp.objective(logits.softmax(1)), logits)
    (of_regularised,) = torch.autograd.grad(mdp.regularised_objective(logits.softmax(1)), logits)
    fisher = torch.diag_embed(policy) - policy[:, :, None] * policy[:, None, :]  # (S, A, A)
    fisher = mdp.visits(policy)[:, None, None] * fisher
    delta = (torch.linalg.pinv(fisher, rtol=1e-9, hermitian=True) @ of_regularised[..., None])[..., 0]
    return delta, (of_j * delta).sum().item()


def random_policy(number):
    """The number-th policy of a fixed sequence."""
    generator = torch.Generator().manual_seed(1)
    return [distribution(5, 3, generator=generator, spread=2.0) for _ in range(number + 1)][-1]


ETAS = np.geomspace(1000, 0.01, 11)  # from a tiny trust region to none worth the name


def gains(mdp, policy):
    """J(π_{i+1}) − J(π_i) and the KL of the step, for every η of ETAS."""
    steps = [step_of_equation_9(mdp, policy, eta) for eta in ETAS]
    return np.array([(mdp.objective(new) - mdp.objective(policy)).item() for new, _ in steps]), [k for _, k in steps]


def test_theorem_2_step_is_the_natural_gradient():
    """Theorem 2's proof: for a small trust region the solution of Eq. (9) is π_i moved along F⁻¹ ∇J̄, 1/η far; and
    J(π_{i+1}) − J(π_i) → ∇J · F⁻¹ (∇J − α ∇D) / η as it shrinks."""
    mdp, policy, eta = tabular(1, alpha=0.5), random_policy(3), 1e4
    delta, _ = natural_step(mdp, policy)
    moved = eta * (step_of_equation_9(mdp, policy, eta)[0] / policy).log()  # (S, A), up to a constant in every state
    centred = [x - (policy * x).sum(1, keepdim=True) for x in (moved, delta)]
    assert (centred[0] - centred[1]).abs().max() < 1e-3 * centred[1].abs().max()
    for policy in map(random_policy, range(6)):
        gain = (mdp.objective(step_of_equation_9(mdp, policy, 1e6)[0]) - mdp.objective(policy)).item()
        assert gain * 1e6 == pytest.approx(natural_step(mdp, policy)[1], rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_2_monotone_improvement_from_the_behaviour_policy(seed):
    """Theorem 2 as pspo.py uses it: π₀ = μ, where ∇D = 0 and the condition holds. J rises at every one of 100 steps
    of small KL, and J̄ too."""
    mdp, policy = tabular(seed), tabular(seed).behaviour
    for _ in range(100):
        new, size = step_of_equation_9(mdp, policy, eta=3.0)
        assert size < 0.12
        assert natural_step(mdp, policy)[1] > 0
        assert mdp.objective(new) > mdp.objective(policy)
        assert mdp.regularised_objective(new) > mdp.regularised_objective(policy)
        policy = new


def test_theorem_2_fails_when_the_trust_region_is_too_large():
    """Theorem 2 needs a *small* ε: from this π_i, where the condition holds, J gains up to a KL of about 0.02 and
    loses beyond 0.1; J̄, which is what Eq. (9) maximises, gains with every size."""
    mdp, policy = tabular(1, alpha=1.0), random_policy(3)
    assert natural_step(mdp, policy)[1] > 0
    gain, size = gains(mdp, policy)
    assert np.diff(size).min() > 0
    assert all(g > 0 for g, k in zip(gain, size, strict=True) if k < 0.02)
    assert all(g < 0 for g, k in zip(gain, size, strict=True) if k > 0.1)
    assert gain[-1] < -10 * gain.max()
    steps = [step_of_equation_9(mdp, policy, eta)[0] for eta in ETAS]
    assert all(mdp.regularised_objective(new) > mdp.regularised_objective(policy) for new in steps)


def test_theorem_2_fails_without_its_condition():
    """Theorem 2 needs its condition: from this π_i, better in J than the regulariser allows, every step loses J,
    however small the trust region. "An arbitrary policy" is too much to say, most plainly of (nearly) the optimum of J
    itself, which Eq. (9) must leave towards π* of Theorem 1, which earns less."""
    mdp, policy = tabular(1, alpha=0.5), random_policy(2)
    assert natural_step(mdp, policy)[1] < 0
    gain, size = gains(mdp, policy)
    assert min(size) < 1e-5 and (gain < 0).all()
    mdp = tabular(0)
    greedy = replace(mdp, alpha=1e-2)  # nearly unregularised
    policy = (greedy.behaviour.log() + greedy.fixed_point(random_q(mdp, 0)) / greedy.alpha).softmax(1).clamp(min=1e-9)
    gain, _ = gains(mdp, policy / policy.sum(1, keepdim=True))
    assert (gain < 0).all()


# --- IQL: the expectile, Figure 1 and Lemma 1 ---

TAUS = (0.5, 0.7, 0.9, 0.99)


def expectile(x, probability, tau):
    """The τ-expectile: the root of τ E[(X − v)⁺] = (1 − τ) E[(v − X)⁺], by bisection; it needs no loss."""
    low, high = x.min(), x.max()
    for _ in range(200):
        v = (low + high) / 2
        excess = tau * (probability * (x - v).clip(0)).sum() - (1 - tau) * (probability * (v - x).clip(0)).sum()
        low, high = (v, high) if excess > 0 else (low, v)
    return v


@pytest.mark.parametrize("tau", [0.1, *TAUS])
def test_iql_equation_5_loss_is_least_at_the_expectile(tau):
    """L₂^τ of Eq. (5): the v that minimises E[ L₂^τ(X − v) ] is the τ-expectile of X; the mean for τ = 1/2."""
    rng = np.random.default_rng(0)
    x, probability = rng.normal(size=9), rng.dirichlet(np.ones(9))
    chance, outcome = torch.as_tensor(probability), torch.as_tensor(x)
    v = newton(lambda v: (chance * iql.expectile_loss(outcome - v, tau)).sum(), torch.zeros(1, dtype=F64))
    assert v.item() == pytest.approx(expectile(x, probability, tau), abs=1e-7)  # 1 − τ is float32
    if tau == 0.5:
        assert v.item() == pytest.approx((probability * x).sum(), abs=1e-12)


def test_iql_lemma_1_expectiles_tend_to_the_maximum():
    """IQL's Lemma 1: for X bounded by its largest value x*, the τ-expectile grows with τ and tends to x* for τ → 1,
    however unlikely x* is: here 1 in 1,000."""
    x, probability = np.array([0.0, 1.0, 4.0]), np.array([0.6, 0.399, 0.001])
    gaps = [4 - expectile(x, probability, 1 - 10.0**-k) for k in range(1, 8)]
    assert all(a > b > 0 for a, b in itertools.pairwise(gaps))
    assert gaps[-1] < 1e-3


def test_iql_lemma_1_fails_for_an_unbounded_variable():
    """IQL's Lemma 1 needs a largest value. The exponential distribution has none, and its expectiles pass every bound
    (for it E(X − v)⁺ = e⁻ᵛ and E(v − X)⁺ = v − 1 + e⁻ᵛ)."""
    v = np.linspace(0, 60, 600_001)

    def at(tau):
        return v[np.argmin(np.abs(tau * np.exp(-v) - (1 - tau) * (v - 1 + np.exp(-v))))]

    assert at(0.5) == pytest.approx(1, abs=1e-3)
    assert [at(1 - 10.0**-k) > 2 * k - 3 for k in (2, 4, 8, 12)] == [True] * 4
    assert at(1 - 1e-12) > 20


def collected():
    """A random problem of one model; in state 0 the third action is not in the data, though it would be by far the
    best."""
    rng = np.random.default_rng(0)
    behaviour, reward = rng.dirichlet(np.full(3, 5.0), 4), rng.uniform(0, 1, (1, 4, 3))
    behaviour[0], reward[0, 0, 2] = [0.5, 0.5, 0.0], 50.0
    transition, one = rng.dirichlet(np.ones(4), (1, 4, 3)), np.ones(1)
    return Tabular(*map(torch.as_tensor, (transition, reward, one, behaviour, np.full(4, 0.25))), 0.9)


@pytest.fixture(scope="module")
def solved():
    """The problem and V_τ for every τ of TAUS."""
    return collected(), {tau: collected().expectile_value(tau) for tau in TAUS}


# --- IQL's Eqs. (5) and (6): what their fixed point is ---


def test_iql_half_expectile_is_the_value_of_the_behaviour(solved):
    """τ = 1/2 is policy evaluation: V_½ is V^μ, the solution of a linear system."""
    mdp, values = solved
    v = torch.linalg.solve(mdp.system(mdp.behaviour), (mdp.behaviour * mdp.reward[0]).sum(1))
    assert (values[0.5] - v).abs().max() < 1e-8


# --- IQL's Lemma 2, Corollary 2.1, Theorem 3 ---


def test_iql_lemma_2_corollary_2_1_and_theorem_3(solved):
    """Lemma 2: τ₁ < τ₂ ⇒ V_τ₁(s) ≤ V_τ₂(s) in every state. Corollary 2.1: V_τ(s) ≤ max over the data's actions of
    Q*(s, a), though an action worth 50 is one step away. Theorem 3: lim τ → 1 of V_τ(s) is that best value."""
    mdp, values = solved[0], torch.stack([*solved[1].values(), solved[0].expectile_value(0.9999)])
    best = mdp.best_in_support()
    assert (values[:-1].diff(dim=0) > 1e-3).all() and (values.diff(dim=0) > 0).all()
    assert (values <= best + 1e-8).all() and best.max() < 50
    gaps = (best - values).abs().amax(1)
    assert (gaps.diff() < 0).all() and gaps[-1] < 0.01 < gaps[-2]


def test_iql_theorem_3_fails_when_v_cannot_tell_states_apart():
    """Theorem 3 is about a table. A V that gives two states one number takes the expectile over both: towards τ = 1
    the poor state gets the good one's value, 1, though its own best action is worth 0.2."""
    q, chance = torch.tensor([[1.0, 0.5], [0.2, 0.1]], dtype=F64), torch.full((2, 2), 0.25, dtype=F64)
    own = newton(lambda v: (chance * iql.expectile_loss(q - v[:, None], 0.999)).sum(1), torch.zeros(2, dtype=F64))
    shared = newton(lambda v: (chance * iql.expectile_loss(q - v, 0.999)).sum(), torch.zeros(1, dtype=F64))
    assert own.tolist() == pytest.approx([1.0, 0.2], abs=0.01)
    assert shared.item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("tau", [0.7, 0.9, 0.99])
def test_iql_why_there_is_a_value_function_at_all(tau):
    """Section 4: the expectile is taken over actions only. Taken over whole targets r + γ Q(s', a') it would also
    pick the lucky *next states*, which no action can choose: heads is worth 1, tails 0, and there is one action."""
    next_value, chance = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    lucky = newton(lambda q: (chance * iql.expectile_loss(0.9 * next_value - q, tau)).sum(), torch.zeros(1, dtype=F64))
    flip = Tabular(  # state 0 tosses the coin; 1 and 2 pay 1 and 0 and go on to nothing
        transition=torch.tensor([[[[0.0, 0.5, 0.5]], [[0, 0, 1]], [[0, 0, 1]]]], dtype=F64),
        reward=torch.tensor([[[0.0], [1.0], [0.0]]], dtype=F64),
        belief=torch.ones(1, dtype=F64), behaviour=torch.ones(3, 1, dtype=F64), start=torch.eye(3, dtype=F64)[0],
    )  # fmt: skip
    honest = flip.expectile_value(tau)[0].item()
    assert honest == pytest.approx(0.45, abs=1e-9)
    assert lucky.item() == pytest.approx(0.9 * tau, abs=1e-7) and lucky > honest + 0.1


# --- IQL's Eq. (7): the policy ---


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_iql_equation_7_is_solved_by_the_tilted_behaviour(beta):
    """Eq. (7) without its clip: π ∝ μ exp(β A), the same policy as Theorem 1 of PSPO with α = 1/β."""
    generator = torch.Generator().manual_seed(0)
    mu, advantage = torch.randn(2, 6, generator=generator, dtype=F64)
    mu = mu.softmax(0)
    weights = iql.advantage_weights(advantage, beta, 1e9)
    found = maximise(lambda p: -6 * iql.policy_loss(p.log(), mu * weights), 6)  # its mean over the actions, as a sum
    assert (found - (mu.log() + beta * advantage).softmax(0)).abs().max() < 1e-5
    clipped = iql.advantage_weights(torch.tensor([2.0, 20.0, 200.0]), 3.0, 100.0)
    assert clipped.tolist() == [100, 100, 100]  # with it the policy no longer tells good from best


def test_iql_equation_7_fails_for_a_gaussian_on_two_behaviours():
    """π of Eq. (7) is a table above and a Gaussian in iql.py, whose mean is the weighted mean of the actions. On
    liquidation 80% of the rows hold (a uniform in [−1, 0)) and 20% sell (in (0, 1]): unless selling weighs more than
    four times as much, β ΔA > ln 4, the mean is negative. It holds for ever and earns 0, less than either behaviour."""
    torch.manual_seed(0)
    sells = torch.rand(100_000, dtype=F64) < 0.2
    action = torch.rand(100_000, dtype=F64) * torch.where(sells, 1.0, -1.0)

    def mean_action(difference, beta=3.0):
        weights = iql.advantage_weights(difference * sells, beta, 100.0)
        return newton(  # of L_π in the mean; log-std 0
            lambda mean: iql.policy_loss(iql.gaussian_log_prob(action[:, None], mean, torch.zeros(1)), weights),
            torch.zeros(1, dtype=F64),
        ).item()

    threshold = np.log(4) / 3
    assert mean_action(0.0) == pytest.approx(-0.3, abs=0.01)  # behaviour cloning
    assert mean_action(threshold) == pytest.approx(0, abs=0.01)
    assert mean_action(threshold - 0.1) < -0.02 < 0.02 < mean_action(threshold + 0.1)
    assert 0.4 < mean_action(10.0) < 0.5  # and with the largest weight it sells the average fraction, not all
