"""The steering paper's identity, value bound and graceful degradation: where they reach, and where they end.

The claims themselves, for diagonal Gaussians, are checked in test_steer_poe.py: test_identity_on_ten_thousand_pairs,
test_value_bound_holds_in_random_markov_decision_processes and
test_a_random_prior_of_growing_variance_leaves_the_frozen_mean. Here each is taken to the edge of its assumptions.
"""

import pytest
import torch

import steer_poe

F64 = torch.float64


def number(x):
    return torch.tensor([x], dtype=F64)


# --- Identity: PoE(α) and KL-Reg(α / (1 − α)) act alike ---


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_identity_is_about_modes_and_gaussian_means(alpha):
    """Identity: log PoE(α) = (1−α) log KL-Reg(β), β = α / (1−α), whatever the densities, so the *mode* is the same for
    any two experts. The *mean* is too for Gaussians; for a prior with two humps it is not."""
    u = torch.linspace(-12, 12, 48_001, dtype=F64)

    def density(log_density):
        return (log_density - log_density.max()).exp() / (log_density - log_density.max()).exp().sum()

    def normal(mean, var):
        return steer_poe.gaussian_log_prob(u[:, None], number(mean), number(var))

    for log_prior, gaussian in (
        (normal(1.5, 0.5), True),
        (torch.logaddexp(normal(2.0, 0.1), normal(-1.0, 0.3)), False),
    ):
        log_frozen, beta = normal(0.3, 1.0), alpha / (1 - alpha)
        poe = density((1 - alpha) * log_frozen + alpha * log_prior)
        kl_reg = density(log_frozen + beta * log_prior)
        assert u[poe.argmax()] == u[kl_reg.argmax()]
        means = (poe * u).sum(), (kl_reg * u).sum()
        assert (abs(means[0] - means[1]) < 1e-6) == gaussian
        if gaussian:
            gaussians = number(0.3), number(1.0), number(1.5), number(0.5)
            assert means[0].item() == pytest.approx(steer_poe.poe(*gaussians, alpha)[0].item(), abs=1e-6)
            assert means[1].item() == pytest.approx(steer_poe.kl_reg(*gaussians, beta)[0].item(), abs=1e-6)


def test_identity_ends_where_actions_are_sampled():
    """Identity is about deterministic actions: sampled ones differ, for KL-Reg is surer by the factor 1 + β; at α = 0.9
    its KL from the frozen actor is another as well, so a KL budget is not the same budget for both rules."""
    gaussians = number(0.0), number(1.0), number(1.0), number(0.5)
    (mean, var), (same, narrower) = (steer_poe.compose(rule, 0.9, *gaussians) for rule in ("poe", "kl-reg"))
    assert mean.item() == pytest.approx(same.item(), rel=1e-12)
    assert (var / narrower).item() == pytest.approx(10, rel=1e-9)
    kls = [steer_poe.mean_kl(rule, 0.9, *gaussians) for rule in ("poe", "kl-reg")]
    assert kls[1] > kls[0] + 0.5
    assert steer_poe.select_alpha("poe", 0.5, *gaussians) > steer_poe.select_alpha("kl-reg", 0.5, *gaussians)


# --- Value bound ---


def test_value_bound_needs_the_largest_total_variation():
    """|V^π − V^{π_f}| ≤ δ R / (1−γ)² with δ the *largest* total variation. With the mean over data states it can be
    false: 999 of 1,000 rows are where π = π_f, one is at the fork, and there π turns the other way."""
    gamma, noise = 0.99, torch.randn(20_000, 2, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    mean_f, mean = torch.tensor([[1.0], [1.0]], dtype=F64), torch.tensor([[1.0], [-9.0]], dtype=F64)
    var = torch.full((2, 1), 0.01, dtype=F64)
    distance = steer_poe.total_variation(mean, var, mean_f, var, noise)  # the common state, the fork
    assert distance.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    # From the fork a positive action leads to reward 1 for ever, a negative one to 0 for ever.
    difference = 1 / (1 - gamma)
    share_of_the_fork = 1e-3
    mean_distance = ((1 - share_of_the_fork) * distance[0] + share_of_the_fork * distance[1]).item()
    assert difference <= steer_poe.value_bound(distance.max().item(), 1.0, gamma)
    assert difference > steer_poe.value_bound(mean_distance, 1.0, gamma)


def test_value_bound_is_far_from_the_truth():
    """The bound's price: at γ = 0.99 a total variation of 1% already allows the whole range of values, R / (1−γ)."""
    assert steer_poe.value_bound(0.01, 1.0, 0.99) == pytest.approx(1 / (1 - 0.99))


# --- Graceful degradation ---


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_poe_stays_with_the_frozen_actor_only_if_the_bad_prior_knows_it_is_bad(alpha):
    """PoE weighs by precision: a wrong prior that admits a large variance hardly moves it, the same prior with a small
    variance takes it all the way. Additive does not ask, and moves by α either way."""
    frozen, wrong = (number(0.0), number(0.1)), number(5.0)
    humble = steer_poe.poe(*frozen, wrong, number(1000.0), alpha)[0].item()
    sure = steer_poe.poe(*frozen, wrong, number(1e-4), alpha)[0].item()
    assert humble < 0.001 and sure > 4.9
    for var in (1000.0, 1e-4):
        assert steer_poe.additive(*frozen, wrong, number(var), alpha)[0].item() == pytest.approx(5 * alpha)


def test_the_selector_holds_even_an_overconfident_prior():
    """What the KL budget is for: under the sure and wrong prior it leaves α so small that the mean hardly moves."""
    frozen, prior = (number(0.0), number(0.1)), (number(5.0), number(1e-4))
    alpha = steer_poe.select_alpha("poe", 0.5, *frozen, *prior)
    mean, var = steer_poe.poe(*frozen, *prior, alpha)
    assert steer_poe.gaussian_kl(mean, var, *frozen).item() <= 0.5
    assert 0 < alpha < 1e-3 and mean.item() < 0.4
