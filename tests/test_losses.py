"""Divergences: by hand, against numpy in float64, their gradients, and where probabilities are zero."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from distillax.train import losses
from distillax.train.losses import DIVERGENCES

# (name, parameter): the table, and the ends of the generalised JSD.
CASES = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("jsd", 0.0),
    ("jsd", 0.3),
    ("jsd", 0.5),
    ("jsd", 1.0),
    ("skewed_forward_kl", 0.1),
    ("skewed_reverse_kl", 0.1),
    ("tvd", None),
    ("akl", None),
]
every_case = pytest.mark.parametrize(("name", "parameter"), CASES)
TAU = 2.5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    """sum a log(a / b), a token at a time."""
    total = np.zeros(a.shape[:-1])
    for at in np.ndindex(a.shape):
        if a[at] > 0:
            total[at[:-1]] += a[at] * np.log(a[at] / b[at])
    return total


def head_share(p, q):
    """Of adaptive KL: the head grows by all tokens of one probability, until its mass reaches 1/2."""
    shares = []
    for p_V, q_V in zip(p, q, strict=True):
        gap, head, mass = abs(p_V - q_V), np.zeros(p_V.shape, bool), 0.0
        for level in sorted(set(p_V), reverse=True):
            if mass < 0.5:
                head |= p_V == level
            mass += p_V[p_V == level].sum()
        shares.append(gap[head].sum() / gap.sum() if gap.any() else 0.5)
    return np.asarray(shares)


def reference(name, parameter, student, teacher, tau=1.0, share=None):
    """float64[N] from the definitions, with numpy. `share`: adaptive KL's weight, if it is held."""
    p, q, w = softmax(teacher / tau), softmax(student / tau), parameter
    if name == "jsd" and w in (0, 1):
        name = "reverse_kl" if w else "forward_kl"
    if name == "jsd":
        m = w * p + (1 - w) * q
        value = w * kl(p, m) + (1 - w) * kl(q, m)
    elif name == "akl":
        share = head_share(p, q) if share is None else share
        value = share * kl(p, q) + (1 - share) * kl(q, p)
    else:
        value = {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "skewed_forward_kl": lambda: kl(p, w * p + (1 - w) * q),
            "skewed_reverse_kl": lambda: kl(q, w * q + (1 - w) * p),
            "tvd": lambda: abs(p - q).sum(-1) / 2,
        }[name]()
    return tau**2 * value


def random_logits(seed, shape=(6, 17), masked=True, scale=3.0):
    """Logits of student and teacher, float64; with three tokens, other ones in each row, that neither has."""
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, *shape))
    if masked:
        for row in range(shape[0]):
            student[row, (at := rng.permutation(shape[1])[:3])] = teacher[row, at] = -np.inf
    return student, teacher


@cache
def compiled(name, parameter):
    def total(student, teacher, tau):
        value = DIVERGENCES[name](student, teacher, parameter, tau)
        return value.sum(), value

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def evaluate(name, parameter, student, teacher, tau):
    """Value [N], and the gradients of its sum with respect to student and teacher, compiled."""
    (_, value), slopes = compiled(name, parameter)(jnp.asarray(student), jnp.asarray(teacher), tau)
    return value, *slopes


def test_the_table_has_every_name() -> None:
    assert list(DIVERGENCES) == list(dict.fromkeys(name for name, _ in CASES))


# p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4); p's first token is the head, and holds half of the gap.
QUARTER = 0.25 * np.log(2)
MIXED = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)  # KL(p || (p + q) / 2), m = (3/8, 3/8, 1/4)


@pytest.mark.parametrize(
    ("name", "parameter", "wanted"),
    [
        ("forward_kl", None, QUARTER),
        ("reverse_kl", None, QUARTER),
        ("jsd", 0.0, QUARTER),
        ("jsd", 0.5, MIXED),
        ("jsd", 1.0, QUARTER),
        ("skewed_forward_kl", 0.5, MIXED),
        ("skewed_reverse_kl", 0.5, MIXED),
        ("tvd", None, 0.25),
        ("akl", None, QUARTER),
    ],
)
def test_three_tokens_by_hand(name, parameter, wanted) -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    value = DIVERGENCES[name](jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32), parameter, 1.0)
    assert value.shape == (1,)
    assert float(value[0]) == pytest.approx(wanted, rel=1e-6)


def test_the_teacher_is_what_forward_kl_averages_over() -> None:
    """KL of a fair coin from (3/4, 1/4) and back are different numbers: the sides are not exchanged."""
    student, teacher = jnp.log(jnp.asarray([0.75, 0.25])), jnp.zeros(2)
    forward = 0.5 * np.log(2 / 3) + 0.5 * np.log(2)
    reverse = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert float(losses.forward_kl(student, teacher)) == pytest.approx(forward, rel=1e-6)
    assert float(losses.reverse_kl(student, teacher)) == pytest.approx(reverse, rel=1e-6)
    small = 1e-3  # beta and skew belong to p
    assert float(losses.jsd(student, teacher, small)) / small == pytest.approx(forward, rel=1e-2)
    assert float(losses.jsd(student, teacher, 1 - small)) / small == pytest.approx(reverse, rel=1e-2)
    assert float(losses.skewed_forward_kl(student, teacher, small)) == pytest.approx(forward, rel=1e-2)
    assert float(losses.skewed_reverse_kl(student, teacher, small)) == pytest.approx(reverse, rel=1e-2)


@every_case
@pytest.mark.parametrize("tau", [1.0, TAU])
def test_equals_the_reference(name, parameter, tau) -> None:
    student, teacher = random_logits(0)
    wanted = reference(name, parameter, student, teacher, tau)
    with jax.enable_x64(True):
        value, *_ = evaluate(name, parameter, student, teacher, tau)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-10)
    single = [jnp.asarray(x, jnp.float32) for x in (student, teacher)]
    value, *_ = evaluate(name, parameter, *single, tau)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=2e-6)
    blocks = [x.reshape(2, 3, -1) for x in single]
    np.testing.assert_array_equal(
        DIVERGENCES[name](*blocks, parameter, tau).reshape(-1), DIVERGENCES[name](*single, parameter, tau)
    )


@every_case
def test_gradients_match_finite_differences(name, parameter) -> None:
    """At temperature 2.5, so with its square; adaptive KL's weights are held, since they are constants."""
    student, teacher = random_logits(1, masked=False)
    share = head_share(softmax(teacher / TAU), softmax(student / TAU))
    wanted, step = np.zeros(student.shape), 1e-5
    for v in range(student.shape[1]):
        moved = np.zeros(student.shape)
        moved[:, v] = step
        up = reference(name, parameter, student + moved, teacher, TAU, share)
        down = reference(name, parameter, student - moved, teacher, TAU, share)
        wanted[:, v] = (up - down) / (2 * step)
    with jax.enable_x64(True):
        _, found, _ = evaluate(name, parameter, student, teacher, TAU)
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-8)


@every_case
def test_gradients_match_their_closed_forms(name, parameter) -> None:
    """With respect to the logits before the temperature, hence a factor T; -inf in both models included."""
    student, teacher = random_logits(2)
    p, q = softmax(teacher / TAU), softmax(student / TAU)

    def along(r):
        """q (r - <r>), where <r> = sum q r."""
        r = np.where(q > 0, r, 0)
        return q * (r - (q * r).sum(-1, keepdims=True))

    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = np.log(p), np.log(q)
        forward, reverse = q - p, along(log_q - log_p)
        share = head_share(p, q)[:, None]
        if name == "jsd" and parameter not in (0, 1):
            wanted = (1 - parameter) * along(log_q - np.log(parameter * p + (1 - parameter) * q))
        elif name == "skewed_forward_kl":
            wanted = along(-(1 - parameter) * p / (parameter * p + (1 - parameter) * q))
        elif name == "skewed_reverse_kl":
            m = parameter * q + (1 - parameter) * p
            wanted = along(log_q - np.log(m) - parameter * q / m)
        elif name == "tvd":
            wanted = along(np.sign(q - p)) / 2
        elif name == "akl":
            wanted = share * forward + (1 - share) * reverse
        else:
            wanted = reverse if name == "reverse_kl" or parameter == 1 else forward
    with jax.enable_x64(True):
        _, found, _ = evaluate(name, parameter, student, teacher, TAU)
    np.testing.assert_allclose(found, TAU * wanted, rtol=1e-9, atol=1e-12)
    assert (np.asarray(found)[np.isinf(student)] == 0).all()


def test_a_high_temperature_matches_logits() -> None:
    """The gradient of T^2 KL tends to the difference of the centred logits, over V (Hinton et al. 2015)."""
    student, teacher = random_logits(3, masked=False)
    gap = student - teacher
    wanted = (gap - gap.mean(-1, keepdims=True)) / gap.shape[-1]
    with jax.enable_x64(True):
        for name in ("forward_kl", "reverse_kl"):
            _, found, _ = evaluate(name, None, student, teacher, 1e5)
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


@every_case
def test_zero_between_equals(name, parameter) -> None:
    """Value and gradient; so too for a teacher with other constants added, which changes no probability."""
    student, _ = random_logits(4)
    teacher = student + np.arange(6.0)[:, None]
    with jax.enable_x64(True):
        value, *_ = evaluate(name, parameter, student, teacher, TAU)
        np.testing.assert_allclose(value, 0, atol=1e-13)
        _, exact, _ = evaluate(name, parameter, student, student, TAU)
    np.testing.assert_allclose(exact, 0, atol=1e-13)


@every_case
def test_constants_and_impossible_tokens_change_nothing(name, parameter) -> None:
    student, teacher = random_logits(5)
    pad = np.full((6, 4), -np.inf)  # ids that neither model uses
    other_student, other_teacher = np.hstack([student + 7, pad]), np.hstack([teacher - 3, pad])
    with jax.enable_x64(True):
        plain, other = (
            DIVERGENCES[name](jnp.asarray(s), jnp.asarray(t), parameter, TAU)
            for s, t in ((student, teacher), (other_student, other_teacher))
        )
        np.testing.assert_allclose(other, plain, rtol=0, atol=1e-12)


def test_the_ends_of_the_generalised_jsd() -> None:
    """beta KL(p || q) for beta -> 0 and (1 - beta) KL(q || p) for beta -> 1; the ends are KL itself."""
    student, teacher = random_logits(6)
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        forward, reverse = losses.forward_kl(s, t, TAU), losses.reverse_kl(s, t, TAU)
        np.testing.assert_array_equal(losses.jsd(s, t, 0, TAU), forward)
        np.testing.assert_array_equal(losses.jsd(s, t, 1, TAU), reverse)
        np.testing.assert_allclose(losses.jsd(s, t, 1e-8, TAU) / 1e-8, forward, rtol=1e-5)
        np.testing.assert_allclose(losses.jsd(s, t, 1 - 1e-8, TAU) / 1e-8, reverse, rtol=1e-5)
        np.testing.assert_array_equal(losses.skewed_forward_kl(s, t, 0.0, TAU), forward)
        np.testing.assert_array_equal(losses.skewed_reverse_kl(s, t, 0.0, TAU), reverse)
        np.testing.assert_array_equal(losses.skewed_forward_kl(s, t, 1.0, TAU), 0)


@pytest.mark.parametrize(
    ("p", "q", "share"),
    [
        ([0.6, 0.3, 0.1], [0.3, 0.3, 0.4], 1 / 2),  # head {0}
        ([0.4, 0.3, 0.3], [0.2, 0.5, 0.3], 1),  # two tokens are needed; the tied third belongs
        ([0.3, 0.3, 0.4], [0.3, 0.5, 0.2], 1),  # the same in another order
        ([0.4, 0.35, 0.25], [0.3, 0.35, 0.35], 1 / 2),  # head {0, 1}
        ([0.6, 0.3, 0.1], [0.6, 0.1, 0.3], 0),  # all of the gap in the tail
    ],
)
def test_the_head_of_adaptive_kl(p, q, share) -> None:
    p, q = np.asarray([p]), np.asarray([q])
    assert head_share(p, q)[0] == pytest.approx(share)
    value = losses.akl(jnp.log(jnp.asarray(q, jnp.float32)), jnp.log(jnp.asarray(p, jnp.float32)))
    assert float(value[0]) == pytest.approx((share * kl(p, q) + (1 - share) * kl(q, p))[0], rel=1e-5)


LARGEST = {"jsd": lambda w: -(w * np.log(w) + (1 - w) * np.log(1 - w)), "tvd": lambda _: 1.0}
LARGEST["skewed_forward_kl"] = LARGEST["skewed_reverse_kl"] = lambda w: -np.log(w)


@settings(deadline=None, max_examples=60)
@given(
    case=st.sampled_from(CASES),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    tau=st.sampled_from([1.0, 0.5, 4.0]),
    seed=st.integers(0, 1000),
)
def test_within_the_range_and_finite(case, scale, tau, seed) -> None:
    """In float32, for any logits, some of them -inf; rounding may be below zero by little."""
    name, parameter = case
    student, teacher = (x.astype(np.float32) for x in random_logits(seed, (3, 8), scale=scale))
    value, *slopes = map(np.asarray, evaluate(name, parameter, student, teacher, tau))
    assert all(np.isfinite(x).all() for x in (value, *slopes))
    assert (value >= -1e-6 * tau**2).all()
    if name in LARGEST and parameter not in (0, 1):
        assert (value <= tau**2 * (LARGEST[name](parameter) + 1e-5)).all()


@every_case
def test_rows_without_any_token(name, parameter) -> None:
    """A row of -inf in both models is zero, with gradient zero, and leaves the other rows alone."""
    student, teacher = (x.astype(np.float32) for x in random_logits(7))
    empty = np.full((1, 17), -np.inf, np.float32)
    plain = evaluate(name, parameter, student, teacher, TAU)
    with_empty = evaluate(name, parameter, np.vstack([student, empty]), np.vstack([teacher, empty]), TAU)
    for found, wanted in zip(with_empty, plain, strict=True):
        np.testing.assert_array_equal(found[-1], 0)
        np.testing.assert_allclose(found[:-1], wanted, rtol=1e-6, atol=1e-6)
        assert np.isfinite(wanted).all()


@every_case
def test_no_nan_on_the_way(name, parameter) -> None:
    """Not even one that a mask would drop: so JAX's own search for NaNs stays of use."""
    student, teacher = (jnp.asarray(x, jnp.float32) for x in random_logits(7))
    with jax.debug_nans(True):
        jax.grad(lambda *both: DIVERGENCES[name](*both, parameter, TAU).sum(), (0, 1))(student, teacher)


@every_case
def test_tokens_of_one_model_only(name, parameter) -> None:
    """KL is infinite where its second side excludes a token of its first; whatever is bounded stays so."""
    student, teacher = jnp.asarray([0.0, 0.0, -jnp.inf]), jnp.zeros(3)
    value, slope = jax.value_and_grad(DIVERGENCES[name])(student, teacher, parameter, TAU)
    infinite = name in ("forward_kl", "akl") or parameter == 0
    assert np.isinf(value) if infinite else np.isfinite(value)
    assert infinite or (np.isfinite(slope).all() and slope[2] == 0)


@every_case
def test_nan_is_not_hidden(name, parameter) -> None:
    student, teacher = jnp.asarray([[0.0, jnp.nan, 1.0]]), jnp.zeros((1, 3))
    assert np.isnan(DIVERGENCES[name](student, teacher, parameter, TAU)).all()
    assert np.isnan(DIVERGENCES[name](teacher, student, parameter, TAU)).all()


@every_case
def test_bfloat16_is_computed_in_float32(name, parameter) -> None:
    """The value is that of the same numbers in float32, bit for bit; the gradient keeps its dtype."""
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in random_logits(8))
    value = DIVERGENCES[name](student, teacher, parameter, TAU)
    wide = DIVERGENCES[name](student.astype(jnp.float32), teacher.astype(jnp.float32), parameter, TAU)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, wide)
    mixed = DIVERGENCES[name](student.astype(jnp.float32), teacher, parameter, TAU)
    np.testing.assert_array_equal(mixed, wide)
    assert evaluate(name, parameter, student, teacher, TAU)[1].dtype == jnp.bfloat16


def test_cross_entropy() -> None:
    student, _ = random_logits(9, masked=False)
    targets = np.asarray([0, 16, 3, 5, 5, 1])
    q, rows = softmax(student), np.arange(6)
    with jax.enable_x64(True):
        value = losses.cross_entropy(jnp.asarray(student), jnp.asarray(targets))
        np.testing.assert_allclose(value, -np.log(q[rows, targets]), rtol=1e-12)
        slope = jax.grad(lambda z: losses.cross_entropy(z, jnp.asarray(targets)).sum())(jnp.asarray(student))
        np.testing.assert_allclose(slope, q - np.eye(17)[targets], atol=1e-12)
    by_hand = losses.cross_entropy(jnp.log(jnp.asarray([0.5, 0.25, 0.25])), jnp.asarray(2))
    assert float(by_hand) == pytest.approx(np.log(4), rel=1e-6)
    assert losses.cross_entropy(jnp.zeros((1, 2), jnp.bfloat16), jnp.asarray([0])).dtype == jnp.float32


def test_cross_entropy_is_forward_kl_to_a_certain_teacher() -> None:
    """Also with tokens that the student excludes: their gradient is zero, all are finite."""
    student = jnp.asarray([[1.0, -jnp.inf, 0.0], [0.5, 2.0, -jnp.inf]])
    targets = jnp.asarray([2, 0])
    certain = jnp.where(jnp.arange(3)[None] == targets[:, None], 0.0, -jnp.inf)

    def one(z):
        return losses.cross_entropy(z, targets).sum()

    def other(z):
        return losses.forward_kl(z, certain).sum()

    np.testing.assert_allclose(one(student), other(student), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(one)(student), jax.grad(other)(student), atol=1e-6)
    assert np.isfinite(jax.grad(one)(student)).all()


def test_entropy() -> None:
    logits, _ = random_logits(10)
    p = softmax(logits / TAU)
    with jax.enable_x64(True):
        found = losses.entropy(jnp.asarray(logits), TAU)
        np.testing.assert_allclose(found, -kl(p, np.ones_like(p)), atol=1e-12)
        slope = jax.grad(lambda z: losses.entropy(z, TAU).sum())(jnp.asarray(logits))
    assert np.isfinite(slope).all()
    assert float(losses.entropy(jnp.zeros(8))) == pytest.approx(np.log(8), rel=1e-6)
    assert float(losses.entropy(jnp.asarray([0.0, -jnp.inf]))) == 0
    assert losses.entropy(jnp.zeros(8, jnp.bfloat16)).dtype == jnp.float32


def test_hidden_state_distances() -> None:
    student, teacher = (
        jnp.asarray([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0]]),
        jnp.asarray([[4.0, 3.0], [0.0, 2.0], [-2.0, -4.0]]),
    )
    np.testing.assert_allclose(losses.cosine_distance(student, teacher), [1 / 25, 1, 2], atol=1e-6)
    np.testing.assert_allclose(losses.l2_distance(student, teacher), [1, 2.5, 22.5], rtol=1e-6)
    np.testing.assert_allclose(losses.cosine_distance(100 * student, student), 0, atol=1e-6)
    for distance in (losses.cosine_distance, losses.l2_distance):
        assert distance(student.astype(jnp.bfloat16), teacher).dtype == jnp.float32
        with jax.enable_x64(True):
            x, y = (jnp.asarray(z) for z in random_logits(11, (4, 5), masked=False))
            assert distance(x, y).dtype == jnp.float64
            check_grads(distance, (x, y), order=1, modes=["rev"])


def test_zero_vectors_are_at_distance_one() -> None:
    zero, other = jnp.zeros((1, 4)), jnp.ones((1, 4))
    for pair in ((zero, other), (other, zero), (zero, zero)):
        assert losses.cosine_distance(*pair)[0] == 1
        slopes = jax.grad(lambda x, y: losses.cosine_distance(x, y).sum(), (0, 1))(*pair)
        assert all(np.isfinite(slope).all() for slope in slopes)
