"""PSPO's equations as numbers: each function against a closed form, quadrature or sampling, and the learner itself.

Equation numbers are the paper's (arXiv 2605.07393), as in the docstring of pspo.py. Where a statement is exact the
arithmetic is float64; where it is about sampling, the tolerance is that of a fixed seed with a known standard error.
Propositions, lemma and theorems are in test_theorems_pspo.py.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from tqdm import tqdm

import liquidation_env
import pspo

torch.set_num_threads(1)  # more is slower on networks this small, much slower on a busy machine
F64 = torch.float64
QUIET = functools.partial(tqdm, disable=True)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected).square() / expected).sum().item()


# --- Drawing models, Eq. (6) ---


def test_sample_models_frequencies():
    """τ ~ P of one belief (N,): frequencies and pairs of draws match P; a model with P = 0 is never drawn."""
    torch.manual_seed(0)
    belief = torch.tensor([0.05, 0.5, 0.0, 0.15, 0.3])
    drawn = pspo.sample_models(belief.log(), (50, 1000))
    assert drawn.shape == (50, 1000)
    counts = torch.bincount(drawn.flatten(), minlength=5)
    assert counts[2] == 0
    kept = belief > 0
    assert chi_square(counts[kept].double(), belief[kept].double()) < 16.3  # 99.9% quantile, 3 degrees of freedom
    # Independent along both dimensions: the joint frequencies of neighbours are products.
    for first, second in ((drawn[:-1:2], drawn[1::2]), (drawn[:, :-1:2], drawn[:, 1::2])):
        pairs = torch.bincount((5 * first + second).flatten(), minlength=25).view(5, 5)[kept][:, kept]
        product = belief[kept].double().outer(belief[kept].double())
        assert chi_square(pairs.double(), product) < 37.7  # 99.9% quantile, 15 degrees of freedom


def test_sample_models_frequencies_with_a_belief_per_row():
    """τ ~ P(· | s, a) of a batch of beliefs (B, N): every column of the draws follows its own row."""
    torch.manual_seed(0)
    belief = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    drawn = pspo.sample_models(belief.log(), (20_000, 2))
    assert drawn.shape == (20_000, 2)
    for column, expected in zip(drawn.T, belief.double(), strict=True):
        assert chi_square(torch.bincount(column, minlength=3).double(), expected) < 13.8  # 99.9%, 2 degrees


def test_bellman_target_masks_the_value_after_the_end():
    """Eq. (6): y = r where the episode ends, even if the value there is NaN or infinite, and r + γ V(s') elsewhere."""
    next_value = torch.tensor([math.nan, math.inf, 5.0, 5.0])
    y = pspo.bellman_target(torch.ones(4), torch.tensor([True, True, True, False]), next_value, 0.9)
    assert y.tolist() == pytest.approx([1, 1, 1, 5.5])
    y = pspo.bellman_target(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4), 1.0)
    assert (y == 1).all()


# --- Gaussians ---


def gaussian_pair():
    """Two diagonal Gaussians over u, (mean, log-std) each, both (2,)."""
    p = (torch.tensor([0.3, -0.5], dtype=F64), torch.tensor([-0.4, 0.2], dtype=F64))
    q = (torch.tensor([-0.2, 0.4], dtype=F64), torch.tensor([0.1, -0.6], dtype=F64))
    return p, q


def test_gaussian_log_prob_is_a_density():
    """log N(u; mean, std): the value of PyTorch's own normal distribution, summed over the dimensions."""
    p, _ = gaussian_pair()
    u = torch.randn(20, 2, dtype=F64)
    expected = torch.distributions.Normal(p[0], p[1].exp()).log_prob(u).sum(-1)
    assert (pspo.gaussian_log_prob(u, *p) - expected).abs().max() < 1e-12


def test_gaussian_kl_against_monte_carlo():
    """KL(p ‖ q) in closed form is the mean of log p − log q under p; not symmetric, zero for p = q."""
    p, q = gaussian_pair()
    torch.manual_seed(0)
    u = p[0] + p[1].exp() * torch.randn(200_000, 2, dtype=F64)
    log_ratio = pspo.gaussian_log_prob(u, *p) - pspo.gaussian_log_prob(u, *q)
    kl = pspo.gaussian_kl(*p, *q).item()
    assert kl == pytest.approx(log_ratio.mean().item(), abs=4 * log_ratio.std().item() / 200_000**0.5)
    assert abs(pspo.gaussian_kl(*q, *p).item() - kl) > 0.1
    assert pspo.gaussian_kl(*p, *p).item() == pytest.approx(0, abs=1e-15)


def test_gaussian_kl_is_unchanged_by_tanh():
    """KL of the actions a = tanh(u), whose density is p(u) / (1 − a²): integrated over a, it is the Gaussians' KL."""
    p, q = gaussian_pair()
    edges = torch.linspace(-1, 1, 400_001, dtype=F64)
    a = (edges[1:] + edges[:-1]) / 2
    total = 0.0
    for dimension in range(2):
        log_density = [
            pspo.gaussian_log_prob(a.atanh()[:, None], mean[dimension, None], log_std[dimension, None])
            - torch.log1p(-a.square())
            for mean, log_std in (p, q)
        ]
        assert log_density[0].exp().mean().item() * 2 == pytest.approx(1, abs=1e-4)
        total += 2 * (log_density[0].exp() * (log_density[0] - log_density[1])).mean().item()
    assert total == pytest.approx(pspo.gaussian_kl(*p, *q).item(), abs=1e-3)


def test_beta_nll_without_weight_is_maximum_likelihood():
    """β = 0: the Gaussian negative log-likelihood up to log √2π, and its gradient in closed form."""
    mean, log_std, wanted = (torch.randn(50, 3, dtype=F64, requires_grad=grad) for grad in (True, True, False))
    loss = pspo.beta_nll(mean, log_std, wanted, beta=0.0)
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(wanted)
    assert (loss + density + 0.5 * math.log(2 * math.pi)).abs().max() < 1e-10
    loss.sum().backward()
    scaled = (wanted - mean.detach()) / log_std.detach().exp()
    torch.testing.assert_close(mean.grad, -scaled / log_std.detach().exp())
    torch.testing.assert_close(log_std.grad, 1 - scaled.square())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_nll_weight_is_constant(beta):
    """β > 0: each term, hence each gradient, times σ^2β, which is not differentiated itself (Seitzer et al., 2022)."""
    mean, log_std, wanted = (torch.randn(50, 3, dtype=F64, requires_grad=grad) for grad in (True, True, False))
    plain = torch.autograd.grad(pspo.beta_nll(mean, log_std, wanted, beta=0.0).sum(), (mean, log_std))
    weighted = torch.autograd.grad(pspo.beta_nll(mean, log_std, wanted, beta=beta).sum(), (mean, log_std))
    weight = log_std.detach().exp() ** (2 * beta)
    for a, b in zip(plain, weighted, strict=True):
        torch.testing.assert_close(weight * a, b)


# --- Eq. (9) ---


def test_policy_objective_gradient():
    """Eq. (9): value by hand, and the gradient in the policy's mean and log-std against finite differences."""
    one = torch.ones(2)
    assert pspo.policy_objective(10 * one, 0.5, 2 * one, 3.0, one).item() == pytest.approx(10 - 1 - 3)
    mu, previous = gaussian_pair()
    noise = torch.randn(6, 2, dtype=F64)

    def objective(mean, log_std):
        q = -(mean + log_std.exp() * noise - 0.7).square().sum(-1)
        kl_mu, kl_previous = (pspo.gaussian_kl(mean, log_std, *other) for other in (mu, previous))
        return pspo.policy_objective(q, 0.4, kl_mu, 1.3, kl_previous)

    policy = torch.randn(2, 6, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(objective, (policy[0], policy[1]))


# --- Termination ---


def states(*rows):
    """Full Hopper/Walker2d states from the entries that matter; the rest are zero."""
    return torch.tensor([[*row, *[0.0] * (11 - len(row))] for row in rows])


def test_terminal_hopper():
    """Hopper's rule at its boundaries; entries below −100 end the episode too (a bug of older model-based code)."""
    alive = states((0.71, 0.0), (1.2, 0.19), (1.2, -0.19), (1.2, 0, 99.9), (1.2, 0, -99.9), (500.0, 0))
    dead = states(
        (0.7, 0), (1.2, 0.2), (1.2, -0.2), (1.2, 0, 100.0), (1.2, 0, -100.0), (1.2, 0, -101.0),
        (1.2, 0, 0, 0, 0, 0, -1e6), (math.nan, 0), (1.2, math.nan), (1.2, 0, math.nan), (math.inf, 0),
        (1.2, 0, -math.inf),
    )  # fmt: skip
    assert not pspo.terminal_hopper(alive).any()
    assert pspo.terminal_hopper(dead).all()


def test_terminal_walker2d():
    """Walker2d's rule at its boundaries: height in (0.8, 2.0), angle in (−1, 1), velocities free."""
    alive = states((0.81, 0), (1.99, 0), (1.2, 0.99), (1.2, -0.99), (1.2, 0, -1e4))
    dead = states((0.8, 0), (2.0, 0), (1.2, 1.0), (1.2, -1.0), (-150.0, 0), (math.nan, 0), (1.2, math.nan))
    assert not pspo.terminal_walker2d(alive).any()
    assert pspo.terminal_walker2d(dead).all()


def test_terminal_halfcheetah():
    """HalfCheetah never ends."""
    ends = pspo.terminal_halfcheetah(states((0, 0), (-500, 9), (math.nan, 0)))
    assert ends.dtype == torch.bool
    assert not ends.any()


def test_terminal_liquidation():
    """Liquidation ends at step 20 or below an inventory of 0.1; a model predicts the step with an error."""
    alive = torch.tensor([[0, 100, 1.0], [19, 100, 1.0], [19.3, 50, 1.0], [5, 0.1, 1.0]])
    dead = torch.tensor([[20, 100, 1.0], [19.8, 100, 1.0], [5, 0.0999, 1.0], [5, 0, 1.0], [5, -1, 1.0]])
    assert not pspo.terminal_liquidation(alive).any()
    assert pspo.terminal_liquidation(dead).all()


def test_terminal_rules_keep_leading_dimensions():
    """(K, B, obs) -> (K, B) bool for every rule."""
    for rule in pspo.TERMINAL.values():
        ends = rule(torch.zeros(2, 5, 11))
        assert (ends.shape, ends.dtype) == ((2, 5), torch.bool)


# --- Networks ---


@pytest.mark.parametrize("activation", [torch.relu_, torch.nn.functional.silu])
def test_mlp_is_a_stack_of_linear_networks(activation):
    """Each member of an MLP computes what a plain stack of torch.nn.Linear with its weights computes."""
    torch.manual_seed(0)
    stack = pspo.MLP(3, [4, 8, 8, 2], activation).double()
    shared, own = torch.randn(6, 4, dtype=F64), torch.randn(3, 6, 4, dtype=F64)
    kept = shared.clone(), own.clone()
    for member in range(3):
        layers = []
        for weight, bias in zip(stack.weights, stack.biases, strict=True):
            linear = torch.nn.Linear(*weight.shape[1:]).double()
            linear.load_state_dict({"weight": weight[member].T, "bias": bias[member, 0]})
            layers += [linear, torch.nn.SiLU() if activation is not torch.relu_ else torch.nn.ReLU()]
        plain = torch.nn.Sequential(*layers[:-1])
        torch.testing.assert_close(stack(shared)[member], plain(shared))
        torch.testing.assert_close(stack(own)[member], plain(own[member]))
    assert torch.equal(shared, kept[0])  # the activation works in place, but not on the input
    assert torch.equal(own, kept[1])


def test_load_members_copies():
    """Active models are copies of the named members, buffers too: later changes of the pool do not reach them."""
    torch.manual_seed(0)
    pool, active = pspo.Dynamics(5, 3, 1, 8, 1), pspo.Dynamics(2, 3, 1, 8, 1)
    for buffer in pool.buffers():
        buffer.uniform_(0.5, 2.0)
    obs, action = torch.randn(4, 3), torch.randn(4, 1)
    active.load_members(pool, torch.tensor([3, 1]))
    for mine, theirs in zip(active(obs, action), pool(obs, action), strict=True):
        torch.testing.assert_close(mine, theirs[[3, 1]])
    before = active(obs, action)[0].clone()
    with torch.no_grad():
        for tensor in (*pool.parameters(), *pool.buffers()):
            tensor.add_(1.0)
    assert torch.equal(active(obs, action)[0], before)


# --- Reporting ---


def test_normalised_score():
    """Eq. (15): 0 and 100 at the references. A difference of returns must lose the range, not the minimum too."""
    for domain, (low, high) in pspo.REFERENCE_RETURNS.items():
        assert pspo.normalised_score(np.array([low, high]), domain).tolist() == pytest.approx([0, 100])
    assert pspo.normalised_score(135.0, "liquidation") == 100
    low, high = pspo.REFERENCE_RETURNS["halfcheetah"]
    returns = np.random.default_rng(0).normal(5000, 100, 50)
    # How pspo.run reports the interval of a score. Passing the half-width through the score adds 2.3 points here.
    half_width = 100 * pspo.confidence_interval(returns) / (high - low)
    scores = pspo.normalised_score(returns, "halfcheetah")
    assert half_width == pytest.approx(pspo.confidence_interval(scores))
    assert pspo.normalised_score(pspo.confidence_interval(returns), "halfcheetah") > half_width + 2


def test_paper_scores():
    """Tables 1 and 2: eighteen data sets whose average is the paper's 91.2, and liquidation."""
    scores = dict(pspo.PAPER_SCORES)
    assert scores.pop("liquidation") == 102.3
    assert len(scores) == 18 and scores.keys() == pspo.D4RL_FILES.keys()
    assert np.mean(list(scores.values())) == pytest.approx(91.2, abs=0.05)


def test_settings_of_table_5():
    """Table 5, for each of the three tasks; hopper's models are the smaller ones of section 12.2."""
    for task, dynamics_size in (("hopper", 256), ("walker2d", 512), ("halfcheetah", 512)):
        args, _ = pspo.resolve(pspo.Args(env_id=f"{task}-medium-v2"))
        assert (args.gamma, args.likelihood_coef, args.pool_size, args.active_models) == (0.99, 1.0, 100, 10)
        assert (args.hidden, args.batch_size, args.dynamics_epochs) == (256, 256, 1000)
        assert (args.dynamics_hidden, args.dynamics_batch) == (dynamics_size, dynamics_size)


def test_confidence_interval():
    """1.96 standard errors with the sample's own standard deviation; unknown for one value."""
    assert pspo.confidence_interval(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2)
    assert math.isnan(pspo.confidence_interval(np.array([1.0])))


# --- The learner, on a small pool trained on 500 episodes of liquidation ---


SMALL = dict(
    pool_size=10, active_models=10, redraw_every=0, dynamics_hidden=32, dynamics_layers=2, dynamics_epochs=15,
    dynamics_batch=256, dynamics_lr=3e-3, dynamics_patience=0, gamma=1.0, hidden=32, batch_size=64, evidence_rows=32,
    bc_updates=200, model_samples=2, action_samples=6, rollout_horizon=20, actor_lr=1e-3, critic_lr=1e-3,
    target_rate=0.005, alpha=0.0002, target_kl=0.0, trust_region=0.02, trust_region_every=50, eta_lr=0.05,
)  # fmt: skip


def dataset_tensors(episodes, seed):
    arrays = liquidation_env.behaviour_dataset(episodes, seed)
    dataset = pspo.make_dataset(arrays, "liquidation", f"generated, seed {seed}")
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    return {name: torch.as_tensor(getattr(dataset, name)) for name in names}


@pytest.fixture(scope="module")
def small():
    """(data, pool): never changed by a test."""
    torch.manual_seed(0)
    data = dataset_tensors(500, seed=0)
    args, _ = pspo.resolve(pspo.Args(**SMALL))
    return data, pspo.train_dynamics(args, data, QUIET)[0]


def make_learner(small, pool=None, **settings):
    """A PSPO learner whose policy and behaviour policy are random networks, not trained ones."""
    data, trained = small
    torch.manual_seed(0)
    args, domain = pspo.resolve(pspo.Args(**SMALL | settings))
    learner = pspo.PSPO(args, data, domain)
    learner.redraw(pool or trained)
    return learner


def set_gaussian(actor, mean, std):
    """Make an Actor the constant N(mean, diag std²) over u, whatever the observation."""
    with torch.no_grad():
        for parameter in actor.net.parameters():
            parameter.zero_()
        actor.net.biases[-1][0, 0] = torch.cat([torch.tensor(mean), torch.tensor(std).log()])


def test_models_explain_held_out_data(small):
    """Maximum likelihood with β = 0.5 learns the reward (zero on 80% of the rows) and the state on unseen episodes."""
    _, pool = small
    unseen = dataset_tensors(300, seed=1)
    inputs = torch.cat([unseen["observations"], unseen["actions"]], -1)
    change = unseen["next_observations"] - unseen["observations"]
    outputs = torch.cat([unseen["rewards"][:, None], change], -1)
    with torch.no_grad():
        explained = pspo.explained_variance(pool, inputs, outputs)
        mean, std = pool(unseen["observations"], unseen["actions"])
    assert explained[:, 0].min() > 0.9  # reward
    assert explained[:, 2].min() > 0.95  # inventory
    # The price's change is nearly pure noise: no model can explain it, but each must know how large it is.
    assert explained[:, 3].max() < 0.1
    assert std[..., 3].mean().item() == pytest.approx(0.2, rel=0.1)
    # Forward adds the state to the predicted change and returns raw units.
    assert (mean[..., 1] - unseen["observations"][:, 0] - 1).abs().max() < 0.2


class QuadraticCritic(torch.nn.Module):
    """Q(s, tanh u) = −c (u − p)², p the state's price; the other twin is higher and must not be used."""

    curvature = 0.8

    def forward(self, obs, action):
        q = -self.curvature * (action[:, 0].atanh() - obs[:, 2]).square()
        return torch.stack([q, q + 1])


MU, PI, ALPHA = (-0.3, 0.8), (0.4, 0.5), 0.4  # mean and std of μ and π over u


def value_learner(small, alpha=ALPHA, **settings):
    learner = make_learner(small, alpha=alpha, **settings).double()
    set_gaussian(learner.behaviour, [MU[0]], [MU[1]])
    set_gaussian(learner.actor, [PI[0]], [PI[1]])
    learner.target_critic = QuadraticCritic()
    learner.value_bounds = [-math.inf, math.inf]
    return learner


def value_by_quadrature(price, alpha=ALPHA):
    u = torch.linspace(-10, 10, 20_001, dtype=F64)
    density = torch.distributions.Normal(*MU).log_prob(u).exp()
    return alpha * math.log((density * (-0.8 * (u - price).square() / alpha).exp()).sum() * (u[1] - u[0]))


@pytest.mark.parametrize("alpha", [0.05, 0.4, 5.0])
def test_value_by_importance_sampling(small, alpha):
    """Eq. (8): PSPO.value, sampling from the mixture of μ and π, against quadrature over the action."""
    learner = value_learner(small, alpha, action_samples=400_000)
    prices = [-0.5, 0.0, 1.5]
    with torch.no_grad():
        value = learner.value(torch.tensor([[0.0, 0.0, price] for price in prices], dtype=F64))
    exact = [value_by_quadrature(price, alpha) for price in prices]
    assert value.tolist() == pytest.approx(exact, abs=0.005 + 0.004 * alpha)  # 4 standard errors or more


def test_value_estimator_is_unbiased_before_the_logarithm(small):
    """Eq. (8): with 4 action samples exp(V/α) has the right mean over many estimates of one state."""
    learner = value_learner(small, action_samples=4)
    with torch.no_grad():
        estimates = (learner.value(torch.tensor([[0.0, 0.0, 0.5]], dtype=F64).expand(50_000, 3)) / ALPHA).exp()
    exact = math.exp(value_by_quadrature(0.5) / ALPHA)
    assert estimates.mean().item() == pytest.approx(exact, abs=4 * estimates.std().item() / 50_000**0.5)
    # The weights μ / (μ/2 + π/2) are at most 2, so no estimate exceeds α log(2 e^0).
    assert estimates.max() <= 2


def test_value_without_regularisation(small):
    """α = 0 (the ablation): V(s) = E_{a~π} Q(s, a), here −c ((m − p)² + s²) in closed form."""
    learner = value_learner(small, regularization=False, action_samples=200_000)
    with torch.no_grad():
        value = learner.value(torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)).item()
    assert value == pytest.approx(-0.8 * ((PI[0] - 1.0) ** 2 + PI[1] ** 2), abs=0.01)


def test_value_shapes_noise_and_bounds(small):
    """(..., obs) -> (...); common_noise: equal states of different models get equal values; bounds are kept."""
    learner = value_learner(small)
    obs = torch.tensor([0.0, 0.0, 1.0], dtype=F64).expand(5, 7, 3)
    with torch.no_grad():
        common, separate = learner.value(obs, common_noise=True), learner.value(obs)
        assert common.shape == separate.shape == (5, 7)
        assert (common - common[0]).abs().max() < 1e-12 < common[0].sort().values.diff().min()
        assert (separate - separate[0]).abs().max() > 1e-3
        learner.value_bounds = [-0.1, 0.0]
        assert (learner.value(obs) >= -0.1).all()


def test_posterior_sampled_target_is_the_belief_weighted_mean(small):
    """Eqs. (5) and (8): the targets of model_targets average to E_{τ~P}[r] where V = 0, for a far from even belief."""
    learner = make_learner(small, model_samples=40_000, likelihood_coef=3.0)
    learner.value = lambda obs: torch.zeros(obs.shape[:-1])
    obs, action = torch.tensor([[5.0, 100.0, 1.2]] * 3), torch.tensor([[-0.5], [0.5], [1.0]])
    with torch.no_grad():
        learner.active.net.biases[-1][:, 0, 0] += torch.linspace(-1, 1, 10)  # the models disagree about the reward
        learner.evidence_sum.copy_(torch.linspace(0, 5, 10))
        belief, (mean, std) = learner.log_belief().exp(), learner.active(obs, action)
        y, next_obs, ends = learner.model_targets(obs, action)
    assert belief.max() > 2 * belief.min()
    expected = (belief[:, None] * mean[..., 0]).sum(0) / learner.reward_scale
    uniform = mean[..., 0].mean(0) / learner.reward_scale
    error = (std[..., 0].amax(0) + mean[..., 0].std(0)) / learner.reward_scale / 40_000**0.5
    assert ((y - expected).abs() < 4 * error).all()
    assert ((y - uniform).abs() > 4 * error).all()
    assert next_obs.shape == (3, 3)
    assert ends.shape == (3,)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_pessimistic_target_is_the_kth_smallest(small, k):
    """--posterior pessimistic: y is the k-th smallest of the models' targets."""
    learner = make_learner(small, posterior="pessimistic", pessimistic_k=k)
    learner.value = lambda obs: torch.zeros(obs.shape[:-1])
    obs, action = torch.tensor([[5.0, 100.0, 1.2]]), torch.tensor([[0.5]])
    with torch.no_grad():
        learner.active.net.biases[-1][:, 0, 0] += torch.linspace(-3, 3, 10)  # far apart, compared with the noise
        learner.active.net.biases[-1][:, 0, 4] -= 20  # the log-std of the reward: no noise
        y, _, _ = learner.model_targets(obs, action)
        rewards = learner.active(obs, action)[0][:, 0, 0] / learner.reward_scale
    assert y.item() == pytest.approx(rewards.sort().values[k - 1].item(), abs=0.02)


class DisagreeingModels(torch.nn.Module):
    """Model n pays reward n for ever; no noise, and the state stays as it is."""

    def forward(self, obs, action):
        reward = torch.arange(10.0)[:, None, None].expand(10, len(obs), 1)
        mean = torch.cat([reward, obs.expand(10, *obs.shape)], -1)
        return mean, torch.zeros_like(mean)

    def split(self, sample):
        return sample[..., 0], sample[..., 1:]


def test_predicted_return_draws_a_model_at_every_step(small):
    """Eq. (1): over 4 steps the mean is 4 E_P[r] and the variance 4 Var_P[r]; one model an episode, Eq. (2), has 16."""
    learner = make_learner(small)
    learner.active, learner.terminal = DisagreeingModels(), lambda obs: torch.zeros(len(obs), dtype=torch.bool)
    learner.evidence_sum.copy_(torch.linspace(0, 5, 10))
    belief, reward = learner.log_belief().exp(), torch.arange(10.0)
    mean = (belief * reward).sum()
    variance = (belief * (reward - mean).square()).sum()
    predicted = learner.predicted_return(torch.zeros(50_000, 3), 4)
    assert predicted.mean().item() == pytest.approx(4 * mean.item(), abs=4 * (4 * variance.item() / 50_000) ** 0.5)
    assert predicted.var().item() == pytest.approx(4 * variance.item(), rel=0.05)


CORRUPTED = [1, 4, 7]


def learned_belief(small, corrupt, iterations=60, **settings):
    """Mass on three models of ten after some iterations, if `corrupt` changed their output biases (3, 2 (1 + obs))."""
    pool = copy.deepcopy(small[1])
    with torch.no_grad():
        corrupt(pool.net.biases[-1][CORRUPTED, 0], pool)
    biases = pool.net.biases[-1].detach().clone()
    learner = make_learner(small, pool, **settings)
    assert torch.equal(learner.active.net.biases[-1], biases[learner.members])
    data = small[0]
    with torch.no_grad():
        for _ in range(iterations):
            rows = torch.randint(len(data["rewards"]), (32,))
            obs, action, reward, next_obs, ends = (data[name][rows] for name in data)
            observed = pspo.bellman_target(reward / learner.reward_scale, ends, learner.value(next_obs), 1.0)
            learner.update_belief(obs, action, reward, next_obs, ends, observed)
        belief = learner.log_belief().exp()
    return sum(belief[learner.members == member].item() for member in CORRUPTED)


def bias_reward(amount):
    """A corruption: rewards off by `amount` standard deviations of the data's rewards, in place."""

    def corrupt(_, pool):
        pool.net.biases[-1][CORRUPTED, 0, 0] += amount

    return corrupt


@pytest.mark.parametrize("amount", [0.7, -0.7])
def test_belief_leaves_corrupted_models(small, amount):
    """Eqs. (3) and (4): models whose reward is too high, or too low (no pessimism), lose nearly all their mass."""
    mass = learned_belief(small, bias_reward(amount))
    assert mass < 0.12  # uniform: 0.3
    assert learned_belief(small, bias_reward(amount), likelihood_coef=5.0) < 1e-2 < mass


def test_belief_without_evidence_is_uniform(small):
    """λ = 0 and "Average Utilization" keep the mass of corrupted models; without corruption evidence says little."""
    assert learned_belief(small, bias_reward(0.7), likelihood_coef=0.0) == pytest.approx(0.3)
    assert learned_belief(small, bias_reward(0.7), posterior="uniform") == pytest.approx(0.3)
    assert 0.12 < learned_belief(small, bias_reward(0.0)) < 0.6


def test_mean_surprise_is_the_negative_log_likelihood():
    """−log τ(r, s' | s, a) as torch.distributions has it, up to a constant; rows without a next state are left out."""
    torch.manual_seed(0)
    mean, std, observed = torch.randn(3, 5, 4), torch.rand(3, 5, 4) + 0.1, torch.randn(5, 4)
    known = torch.tensor([True, True, False, True, True])
    expected = -torch.distributions.Normal(mean, std).log_prob(observed).sum(-1)[:, known].mean(1).double()
    surprise = pspo.mean_surprise(mean, std, observed, known)
    assert surprise.dtype == F64 and surprise.shape == (3,)
    torch.testing.assert_close(surprise - surprise[0], expected - expected[0], rtol=1e-5, atol=1e-5)
    assert pspo.mean_surprise(mean, std, observed, torch.zeros_like(known)).tolist() == [0, 0, 0]


def test_likelihood_evidence_leaves_corrupted_models(small):
    """--evidence likelihood: a bias costs a model its mass, and so does a spread that is too small, which says little
    about Δ; at λ = 0 nothing does."""

    def overconfident(_, pool):
        pool.net.biases[-1][CORRUPTED, 0, 4:] -= 1.5  # log-std

    for corrupt in (bias_reward(0.7), overconfident):
        assert learned_belief(small, corrupt, evidence="likelihood") < 0.12  # uniform: 0.3
    assert learned_belief(small, overconfident, evidence="likelihood", likelihood_coef=0.0) == pytest.approx(0.3)
    assert 0.12 < learned_belief(small, overconfident) < 0.6


def test_mixture_log_weights_integrate_to_one():
    """E_q[ μ / q ] = 1 for q = (μ + π) / 2, and no weight exceeds 2: half of q is μ."""
    generator = torch.Generator().manual_seed(0)
    mu, pi = (torch.zeros(1, 1), torch.zeros(1, 1)), (torch.ones(1, 1), torch.full((1, 1), -1.0))
    noise = torch.randn(200_000, 1, 1, generator=generator)
    u = torch.cat([mean + log_std.exp() * x for (mean, log_std), x in zip((mu, pi), noise.chunk(2), strict=True)])
    weights = pspo.mixture_log_weights(u, *mu, *pi).exp() * len(u)
    assert weights.mean().item() == pytest.approx(1, abs=0.01)
    assert weights.max() <= 2 + 1e-4


def policy_steps(small, epsilon, updates):
    """Train; for every step π_i -> π_{i+1}: KL as the learner measured it and on 1,024 fixed states; the last η."""
    learner = make_learner(small, trust_region=epsilon)
    learner.clone_behaviour(QUIET)
    fixed = small[0]["observations"][:1024]
    measured, on_fixed = [], []
    for _ in range(updates):
        i, before = learner.policy_iteration.item(), copy.deepcopy(learner.previous)
        kl = learner.iterate()[learner.METRICS.index("policy/kl_previous")].item()
        if learner.policy_iteration.item() > i:
            measured.append(kl)
            with torch.no_grad():
                on_fixed.append(pspo.gaussian_kl(*learner.previous(fixed), *before(fixed)).mean().item())
        else:
            assert all(
                torch.equal(a, b) for a, b in zip(learner.previous.parameters(), before.parameters(), strict=True)
            )
    return np.array(measured), np.array(on_fixed), learner.log_eta.exp().item()


def test_trust_region(small):
    """Eq. (9): every step π_i -> π_{i+1} keeps E KL(π_{i+1} ‖ π_i) <= ε; a tighter ε means larger η, shorter steps."""
    measured, on_fixed, eta = policy_steps(small, 0.02, 600)
    assert len(measured) > 300 / SMALL["trust_region_every"]  # it does move
    assert (measured <= 0.02).all()
    assert on_fixed.mean() < 2 * 0.02 and on_fixed.max() < 3 * 0.02  # on other states: batches are small here
    tight, _, tight_eta = policy_steps(small, 0.0002, 200)
    loose, _, loose_eta = policy_steps(small, 100.0, 200)
    assert tight.mean() < 0.2 * loose.mean()
    assert tight_eta > 10 * loose_eta
    assert tight_eta > eta


def test_rollouts_restart_at_data_states(small):
    """Model rollouts end at a terminal state or the horizon and begin again in the data, never after the end."""
    learner = make_learner(small, rollout_horizon=5)
    data = {tuple(row) for row in small[0]["observations"].tolist()}
    for _ in range(30):
        age = learner.rollout_age.clone()
        learner.iterate()
        assert not learner.terminal(learner.rollout_obs).any()
        assert ((learner.rollout_age == age + 1) | (learner.rollout_age == 0)).all()
        assert learner.rollout_age.max() < 5
        fresh = learner.rollout_obs[learner.rollout_age == 0]
        assert all(tuple(row) in data for row in fresh.tolist())
