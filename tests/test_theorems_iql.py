"""IQL's lemmas, corollary and theorem, executed: read it beside section 4 of the paper.

Every test states one claim, takes a decision problem small enough to be solved exactly, and checks the claim with the
losses that iql.py trains with. Beside each claim stand the cases where one of its assumptions is broken, and it
fails. Networks, order of updates and bookkeeping are tested in test_iql.py.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import iql

F64 = torch.float64
TAUS = (0.5, 0.7, 0.9, 0.99)


def expectile(x, probability, tau):
    """The τ-expectile: the root of τ E[(X − v)⁺] = (1 − τ) E[(v − X)⁺], by bisection; it needs no loss."""
    low, high = x.min(), x.max()
    for _ in range(200):
        v = (low + high) / 2
        excess = tau * (probability * (x - v).clip(0)).sum() - (1 - tau) * (probability * (v - x).clip(0)).sum()
        low, high = (v, high) if excess > 0 else (low, v)
    return v


def minimise(loss, start):
    """The minimiser of a sum of piecewise quadratic functions of one number each: Newton's method is exact."""
    v = start
    for _ in range(6):
        v = v.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(v).sum(), v, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), v)
        v = v - gradient / curvature
    return v.detach()


# --- The expectile, Figure 1 and Lemma 1 ---


@pytest.mark.parametrize("tau", [0.1, *TAUS])
def test_equation_5_loss_is_least_at_the_expectile(tau):
    """L₂^τ of Eq. (5): the v that minimises E[ L₂^τ(X − v) ] is the τ-expectile of X; the mean for τ = 1/2."""
    rng = np.random.default_rng(0)
    x, probability = rng.normal(size=9), rng.dirichlet(np.ones(9))
    chance, outcome = torch.as_tensor(probability), torch.as_tensor(x)
    v = minimise(lambda v: (chance * iql.expectile_loss(outcome - v, tau)).sum(), torch.zeros(1, dtype=F64))
    assert v.item() == pytest.approx(expectile(x, probability, tau), abs=1e-7)  # 1 − τ is float32
    if tau == 0.5:
        assert v.item() == pytest.approx((probability * x).sum(), abs=1e-12)


def test_lemma_1_expectiles_tend_to_the_maximum():
    """Lemma 1: for X bounded by its largest value x*, the τ-expectile grows with τ and tends to x* for τ → 1, however
    unlikely x* is: here 1 in 1,000."""
    x, probability = np.array([0.0, 1.0, 4.0]), np.array([0.6, 0.399, 0.001])
    gaps = [4 - expectile(x, probability, 1 - 10.0**-k) for k in range(1, 8)]
    assert all(a > b > 0 for a, b in itertools.pairwise(gaps))
    assert gaps[-1] < 1e-3


def test_lemma_1_fails_for_an_unbounded_variable():
    """Lemma 1 needs a largest value. The exponential distribution has none, and its expectiles pass every bound (for
    it E(X − v)⁺ = e⁻ᵛ and E(v − X)⁺ = v − 1 + e⁻ᵛ)."""
    v = np.linspace(0, 60, 600_001)

    def at(tau):
        return v[np.argmin(np.abs(tau * np.exp(-v) - (1 - tau) * (v - 1 + np.exp(-v))))]

    assert at(0.5) == pytest.approx(1, abs=1e-3)
    assert [at(1 - 10.0**-k) > 2 * k - 3 for k in (2, 4, 8, 12)] == [True] * 4
    assert at(1 - 1e-12) > 20


# --- A problem with exact answers ---


@dataclass(frozen=True)
class Tabular:
    """A Markov decision problem and the policy that collected infinitely many transitions of it; float64."""

    behaviour: torch.Tensor  # (S, A), μ(a | s): an action with 0 is not in the data
    transition: torch.Tensor  # (S, A, S)
    reward: torch.Tensor  # (S, A)
    gamma: float = 0.9

    def backup(self, v):
        """Eq. (6) is least squares: its minimiser is E[y], y = r + γ V(s'). (S,) -> (S, A)."""
        ends = torch.zeros_like(self.reward, dtype=torch.bool)
        return iql.bellman_target(self.reward, ends, self.transition @ v, self.gamma)

    def operator(self, v, tau):
        """V → V, one round of Eqs. (6) and (5): the exact minimisers of iql.py's losses over the data."""
        q = self.backup(v)
        return minimise(lambda v: (self.behaviour * iql.expectile_loss(q - v[:, None], tau)).sum(1), v)

    def solve(self, tau):
        """The fixed point V_τ: 250 rounds at γ = 0.9 leave 4e-12 of the first error."""
        v = torch.zeros(len(self.reward), dtype=F64)
        for _ in range(250):
            v = self.operator(v, tau)
        return v

    def best_in_support(self):
        """V* over the actions of the data, by value iteration."""
        v = torch.zeros(len(self.reward), dtype=F64)
        for _ in range(500):
            v = self.backup(v).masked_fill(self.behaviour == 0, -torch.inf).amax(1)
        return v


def tabular(seed=0, states=4, actions=3, gamma=0.9):
    """A random problem; in state 0 the third action is not in the data, though it would be by far the best."""
    rng = np.random.default_rng(seed)
    behaviour = rng.dirichlet(np.full(actions, 5.0), states)
    behaviour[0] = [0.5, 0.5, 0.0]
    reward = rng.uniform(0, 1, (states, actions))
    reward[0, 2] = 50.0
    transition = rng.dirichlet(np.ones(states), (states, actions))
    return Tabular(*map(torch.as_tensor, (behaviour, transition, reward)), gamma)


@pytest.fixture(scope="module")
def solved():
    """The problem and V_τ for every τ of TAUS."""
    return tabular(), {tau: tabular().solve(tau) for tau in TAUS}


# --- Eqs. (5) and (6): what their fixed point is ---


@pytest.mark.parametrize("tau", TAUS)
def test_equation_5_value_is_the_expectile_of_q_under_the_behaviour(solved, tau):
    """Eqs. (5), (6): at the fixed point V_τ(s) is the τ-expectile of Q_τ(s, a), a ~ μ, in every state."""
    mdp, values = solved
    q, mu = mdp.backup(values[tau]).numpy(), mdp.behaviour.numpy()
    exact = [expectile(q[s], mu[s], tau) for s in range(len(q))]
    assert np.allclose(values[tau], exact, atol=1e-8)


def test_half_expectile_is_the_value_of_the_behaviour(solved):
    """τ = 1/2 is policy evaluation: V_½ is V^μ, the solution of a linear system."""
    mdp, values = solved
    reward, chain = (mdp.behaviour * mdp.reward).sum(1), torch.einsum("sa,sat->st", mdp.behaviour, mdp.transition)
    assert (values[0.5] - torch.linalg.solve(torch.eye(4, dtype=F64) - 0.9 * chain, reward)).abs().max() < 1e-8


@pytest.mark.parametrize("tau", TAUS)
def test_the_backup_is_a_contraction(tau):
    """Why there is one fixed point: ‖T_τ V₁ − T_τ V₂‖ ≤ γ ‖V₁ − V₂‖ in the sup norm, for every τ."""
    mdp, generator = tabular(), torch.Generator().manual_seed(0)
    for _ in range(20):
        first, second = 5 * torch.randn(2, 4, generator=generator, dtype=F64)
        gap = (mdp.operator(first, tau) - mdp.operator(second, tau)).abs().max()
        assert gap <= 0.9 * (first - second).abs().max() * (1 + 1e-9)


def test_the_contraction_fails_without_discount():
    """γ = 1 where nothing ends: a constant difference stays as it is, and the values grow without bound."""
    mdp, v = tabular(gamma=1.0), torch.zeros(4, dtype=F64)
    assert (mdp.operator(v + 7, 0.9) - mdp.operator(v, 0.9) - 7).abs().max() < 1e-9
    values = []
    for _ in range(60):
        v = mdp.operator(v, 0.9)
        values.append(v.min().item())
    assert all(b > a + 0.3 for a, b in itertools.pairwise(values))


# --- Lemma 2, Corollary 2.1, Theorem 3 ---


def test_lemma_2_values_grow_with_tau(solved):
    """Lemma 2: τ₁ < τ₂ ⇒ V_τ₁(s) ≤ V_τ₂(s) in every state."""
    values = torch.stack([solved[1][tau] for tau in TAUS])
    assert (values.diff(dim=0) > 1e-3).all()


def test_corollary_2_1_values_stay_below_the_best_of_the_data(solved):
    """Corollary 2.1: V_τ(s) ≤ max over the data's actions of Q*(s, a), though an action worth 50 is one step away."""
    mdp, values = solved
    best = mdp.best_in_support()
    assert all((v <= best + 1e-8).all() for v in values.values())
    assert best.max() < 50


def test_theorem_3_values_tend_to_the_best_of_the_data(solved):
    """Theorem 3: lim τ → 1 of V_τ(s) is the best value that the data's actions can have."""
    mdp, values = solved
    best = mdp.best_in_support()
    gaps = [(v - best).abs().max().item() for v in values.values()]
    gaps.append((mdp.solve(0.9999) - best).abs().max().item())
    assert all(a > b for a, b in itertools.pairwise(gaps))
    assert gaps[-1] < 0.01 < gaps[-2]


def test_theorem_3_fails_when_v_cannot_tell_states_apart():
    """Theorem 3 is about a table. A V that gives two states one number takes the expectile over both: towards τ = 1
    the poor state gets the good one's value, 1, though its own best action is worth 0.2."""
    q, chance = torch.tensor([[1.0, 0.5], [0.2, 0.1]], dtype=F64), torch.full((2, 2), 0.25, dtype=F64)
    own = minimise(lambda v: (chance * iql.expectile_loss(q - v[:, None], 0.999)).sum(1), torch.zeros(2, dtype=F64))
    shared = minimise(lambda v: (chance * iql.expectile_loss(q - v, 0.999)).sum(), torch.zeros(1, dtype=F64))
    assert own.tolist() == pytest.approx([1.0, 0.2], abs=0.01)
    assert shared.item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("tau", [0.7, 0.9, 0.99])
def test_why_there_is_a_value_function_at_all(tau):
    """Section 4: the expectile is taken over actions only. Taken over whole targets r + γ Q(s', a') it would also
    pick the lucky *next states*, which no action can choose: heads is worth 1, tails 0, and there is one action."""
    next_value, chance = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    lucky = minimise(
        lambda q: (chance * iql.expectile_loss(0.9 * next_value - q, tau)).sum(), torch.zeros(1, dtype=F64)
    )
    flip = Tabular(
        behaviour=torch.ones(3, 1, dtype=F64),  # state 0 tosses the coin; 1 and 2 pay 1 and 0 and go on to nothing
        transition=torch.tensor([[[0.0, 0.5, 0.5]], [[0, 0, 1]], [[0, 0, 1]]], dtype=F64),
        reward=torch.tensor([[0.0], [1.0], [0.0]], dtype=F64),
    )
    honest = flip.solve(tau)[0].item()
    assert honest == pytest.approx(0.45, abs=1e-9)
    assert lucky.item() == pytest.approx(0.9 * tau, abs=1e-7) and lucky > honest + 0.1


# --- Eq. (7): the policy ---


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_equation_7_is_solved_by_the_tilted_behaviour(beta):
    """Eq. (7) without its clip: π ∝ μ exp(β A), the same policy as Theorem 1 of PSPO with α = 1/β."""
    generator = torch.Generator().manual_seed(0)
    mu, advantage = torch.randn(2, 6, generator=generator, dtype=F64)
    mu = mu.softmax(0)
    weights = iql.advantage_weights(advantage, beta, 1e9)
    logits = torch.zeros(6, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = 6 * iql.policy_loss(logits.log_softmax(0), mu * weights)  # its mean over the six actions, as a sum
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits.softmax(0) - (mu.log() + beta * advantage).softmax(0)).abs().max() < 1e-5


def test_equation_7_clip_forgets_how_good_the_best_is():
    """The clip of Eq. (7): above a weight of 100 the policy no longer tells good from best."""
    weights = iql.advantage_weights(torch.tensor([2.0, 20.0, 200.0]), 3.0, 100.0)
    assert weights.tolist() == [100, 100, 100]


def test_equation_7_fails_for_a_gaussian_on_two_behaviours():
    """π of Eq. (7) is a table above and a Gaussian in iql.py, whose mean is the weighted mean of the actions. On
    liquidation 80% of the rows hold (a uniform in [−1, 0)) and 20% sell (in (0, 1]): unless selling weighs more than
    four times as much, β ΔA > ln 4, the mean is negative. It holds for ever and earns 0, less than either behaviour."""
    torch.manual_seed(0)
    sells = torch.rand(100_000, dtype=F64) < 0.2
    action = torch.rand(100_000, dtype=F64) * torch.where(sells, 1.0, -1.0)

    def mean_action(difference, beta=3.0):
        weights = iql.advantage_weights(difference * sells, beta, 100.0)
        return minimise(  # of L_π in the mean; log-std 0
            lambda mean: iql.policy_loss(iql.gaussian_log_prob(action[:, None], mean, torch.zeros(1)), weights),
            torch.zeros(1, dtype=F64),
        ).item()

    threshold = np.log(4) / 3
    assert mean_action(0.0) == pytest.approx(-0.3, abs=0.01)  # behaviour cloning
    assert mean_action(threshold) == pytest.approx(0, abs=0.01)
    assert mean_action(threshold - 0.1) < -0.02 < 0.02 < mean_action(threshold + 0.1)
    assert 0.4 < mean_action(10.0) < 0.5  # and with the largest weight it sells the average fraction, not all
