"""The chunked loss against full logits in float64: every divergence, chunk, mask, cap and cache format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distillax.models.backend import compile_for
from distillax.models.transformer import matmul
from distillax.train import losses, rows
from distillax.train.divergences import DIVERGENCES
from distillax.train.fused import chunked

E, F, V = 16, 12, 50
PARAMETERS = {"jsd": 0.3, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.2}


def problem(tokens: int, share: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(tokens, E)).astype(np.float32),
        "head": rng.normal(size=(V, E)).astype(np.float32),
        "teacher": rng.normal(size=(tokens, F)).astype(np.float32),
        "teacher_head": rng.normal(size=(V, F)).astype(np.float32),
        "targets": rng.integers(0, V, tokens),
        "weights": ((rng.random(tokens) < share) * rng.uniform(0.5, 2, tokens)).astype(np.float32),
    }


def knobs(alpha: float = 1.0, temperature: float = 1.0, **arrays) -> dict[str, jax.Array]:
    values = {"alpha": alpha, "temperature": temperature, **arrays}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def value_and_gradients(row, p, tokens, constants, cap=None, chunk=8):
    """(loss, terms, gradients of hidden states and head) of the chunked loss, float32."""

    def loss(hidden, head):
        weights = jnp.asarray(p["weights"])
        return chunked(row, hidden, head, weights, tokens, constants, cap=cap, chunk=chunk)

    arguments = jnp.asarray(p["hidden"]), jnp.asarray(p["head"])
    (value, terms), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arguments)
    again, _ = jax.jit(loss)(*arguments)  # without its gradient
    np.testing.assert_allclose(again, value, rtol=1e-6, atol=1e-6)
    return float(value), terms, gradients


def in_float64(p, per_token, cap=None, teacher_cap=None):
    """The weighted sum of per_token(student logits, teacher logits) and its gradients, in float64."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in p.items() if name != "targets"}

        def loss(hidden, head):
            z, zt = hidden @ head.T, wide["teacher"] @ wide["teacher_head"].T
            z = cap * jnp.tanh(z / cap) if cap else z
            zt = teacher_cap * jnp.tanh(zt / teacher_cap) if teacher_cap else zt
            return (wide["weights"] * per_token(z, zt)).sum()

        value, gradients = jax.value_and_grad(loss, (0, 1))(wide["hidden"], wide["head"])
        return float(value), [np.asarray(g) for g in gradients]


def assert_equal(found, wanted, tolerance=1e-5) -> None:
    (value, gradients), (wanted_value, wanted_gradients) = found, wanted
    np.testing.assert_allclose(value, wanted_value, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        scale = max(np.abs(want).max(), 0.1)  # of numbers around one: less is what they cancel to
        np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@settings(deadline=None, max_examples=4)
@given(
    tokens=st.sampled_from([1, 7, 24]),
    chunk=st.sampled_from([1, 5, 8, 64]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    caps=st.sampled_from([(None, None), (5.0, 3.0)]),
    seed=st.integers(0, 5),
)
@example(tokens=24, chunk=1, share=0.3, alpha=1.0, temperature=0.5, caps=(None, None), seed=2)
def test_online_equals_the_reference(divergence, tokens, chunk, share, alpha, temperature, caps, seed):
    p, parameter = problem(tokens, share, seed), PARAMETERS.get(divergence, 0.0)
    row = rows.Online(divergence, parameter, temperature == 1, caps[1])
    value, terms, gradients = value_and_gradients(
        row,
        p,
        {"targets": jnp.asarray(p["targets"]), "teacher": jnp.asarray(p["teacher"])},
        knobs(alpha, temperature, teacher_head=p["teacher_head"]),
        caps[0],
        chunk,
    )

    def soft(z, zt):
        return losses.DIVERGENCES[divergence](z, zt, parameter, temperature)

    def hard(z, zt):
        return losses.cross_entropy(z, jnp.asarray(p["targets"]))

    def both(z, zt):
        return alpha * soft(z, zt) + (1 - alpha) * hard(z, zt)

    assert_equal((value, gradients), in_float64(p, both, *caps))
    expected = {
        divergence: soft,
        "cross_entropy": hard,
        "student_entropy": lambda z, zt: losses.entropy(z),
        "teacher_entropy": lambda z, zt: losses.entropy(zt),
    }
    assert set(terms) == set(expected)
    for name, per_token in expected.items():
        np.testing.assert_allclose(
            terms[name], in_float64(p, per_token, *caps)[0], rtol=1e-5, atol=1e-5, err_msg=name
        )


@settings(deadline=None, max_examples=10)
@given(
    tokens=st.sampled_from([1, 7, 24]),
    chunk=st.sampled_from([1, 5, 64]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 5),
)
def test_cross_entropy_equals_the_reference(tokens, chunk, share, cap, seed) -> None:
    p = problem(tokens, share, seed)
    targets = jnp.asarray(p["targets"])
    value, _, gradients = value_and_gradients(rows.CrossEntropy(), p, {"targets": targets}, None, cap, chunk)
    assert_equal((value, gradients), in_float64(p, lambda z, zt: losses.cross_entropy(z, targets), cap))


def test_three_tokens_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) and uniform: losses log 2 and log 3; the third token bears none."""
    hidden = jnp.asarray([[1.0], [0.0], [5.0]])
    head = jnp.asarray([[np.log(2.0)], [0.0], [0.0]], jnp.float32)
    tokens = {"targets": jnp.asarray([0, 2, 1])}
    loss, terms = chunked(rows.CrossEntropy(), hidden, head, jnp.asarray([1.0, 1.0, 0.0]), tokens)
    assert float(loss) == pytest.approx(np.log(2) + np.log(3), rel=1e-6)
    assert float(terms["cross_entropy"]) == float(loss)


def test_bfloat16_is_close_and_head_gradient_keeps_its_dtype() -> None:
    p = problem(40, 1.0, 0)
    tokens = {"targets": jnp.asarray(p["targets"]), "teacher": jnp.asarray(p["teacher"], jnp.bfloat16)}
    constants = knobs(teacher_head=p["teacher_head"])
    constants["teacher_head"] = constants["teacher_head"].astype(jnp.bfloat16)

    def loss(hidden, head):
        return chunked(
            rows.Online("forward_kl", 0.0, True),
            hidden.astype(jnp.bfloat16),
            head,
            jnp.asarray(p["weights"]),
            tokens,
            constants,
        )[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.asarray(p["hidden"]), jnp.asarray(p["head"]))
    # Of the same rounded numbers: logits and their softmax are float32 (pitfall 17).
    names = ("hidden", "head", "teacher", "teacher_head")
    rounded = {name: np.asarray(jnp.asarray(p[name], jnp.bfloat16).astype(jnp.float32)) for name in names}
    wanted, (_, dhead) = in_float64({**p, **rounded}, lambda z, zt: losses.forward_kl(z, zt))
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert gradients[1].dtype == jnp.float32
    assert np.abs(np.asarray(gradients[1]) - dhead).max() < 0.03 * np.abs(dhead).max()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_model_has_no_distance_from_itself(divergence, temperature) -> None:
    """Pitfalls 9 and 23, on the chunked path and on that of the top-k with its tail."""
    p = problem(24, 1.0, 3)
    options = (divergence, PARAMETERS.get(divergence, 0.0), temperature == 1)
    tokens = {"targets": jnp.asarray(p["targets"]), "teacher": jnp.asarray(p["hidden"])}
    found = [
        value_and_gradients(rows.Online(*options), p, tokens, knobs(1, temperature, teacher_head=p["head"]))
    ]
    if divergence != "akl":
        probabilities = softmax(p["hidden"] @ p["head"].T / temperature)
        tokens = {"targets": tokens["targets"], **top_k(probabilities, 8)}
        found.append(value_and_gradients(rows.TopK(*options), p, tokens, knobs(1, temperature)))
    for value, _, gradients in found:
        assert abs(value) <= 1e-6 * p["weights"].sum()
        if divergence != "tvd":  # whose slope is a sign, of rounding errors here
            assert all(float(jnp.abs(g).max()) < 1e-4 for g in gradients)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top_k(probabilities: np.ndarray, k: int) -> dict[str, jax.Array]:
    ids = np.sort(np.argsort(-probabilities, axis=-1)[:, :k], axis=-1)
    weights = np.take_along_axis(probabilities, ids, -1)
    return {"target_ids": jnp.asarray(ids), "target_weights": jnp.asarray(weights, jnp.float32)}


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"akl"}))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_and_tail_equals_the_divergence_between_buckets(divergence, temperature) -> None:
    p, k, parameter = problem(9, 0.7, 1), 6, PARAMETERS.get(divergence, 0.0)
    targets = top_k(softmax(p["teacher"] @ p["teacher_head"].T / temperature), k)
    tokens = {"targets": jnp.asarray(p["targets"]), **targets}
    row = rows.TopK(divergence, parameter, temperature == 1)
    value, _, gradients = value_and_gradients(row, p, tokens, knobs(0.6, temperature))
    ids = np.asarray(targets["target_ids"])

    def buckets(logits):
        q = jax.nn.softmax(logits / temperature)
        head = jnp.take_along_axis(q, jnp.asarray(ids), -1)
        return temperature * jnp.log(jnp.concatenate([head, 1 - head.sum(-1, keepdims=True)], -1))

    def per_token(z, zt):
        soft = losses.DIVERGENCES[divergence](buckets(z), buckets(zt), parameter, temperature)
        return 0.6 * soft + 0.4 * losses.cross_entropy(z, jnp.asarray(p["targets"]))

    assert_equal((value, gradients), in_float64(p, per_token), 3e-5)


def test_top_k_of_the_whole_vocabulary_is_the_divergence_itself() -> None:
    p = problem(9, 0.7, 1)
    targets = top_k(softmax(p["teacher"] @ p["teacher_head"].T), V)
    tokens = {"targets": jnp.asarray(p["targets"]), **targets}
    value, _, gradients = value_and_gradients(rows.TopK("reverse_kl", 0.0, True), p, tokens, knobs())
    assert_equal((value, gradients), in_float64(p, lambda z, zt: losses.reverse_kl(z, zt)), 1e-4)


def test_ids_that_only_the_teacher_has_are_left_alone() -> None:
    """A repeated id of weight zero, as the cache gives it for a padding row of the teacher."""
    p = problem(5, 1.0, 1)
    targets = top_k(softmax(p["teacher"] @ p["teacher_head"].T), 4)
    padded = {
        "target_ids": jnp.pad(targets["target_ids"], ((0, 0), (0, 2))),
        "target_weights": jnp.pad(targets["target_weights"], ((0, 0), (0, 2))),
    }
    row, base = rows.TopK("jsd", 0.5, True), {"targets": jnp.asarray(p["targets"])}
    found = value_and_gradients(row, p, {**base, **padded}, knobs())
    wanted = value_and_gradients(row, p, {**base, **targets}, knobs())
    assert_equal((found[0], found[2]), (wanted[0], [np.asarray(g) for g in wanted[2]]), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_targets_give_the_divergence_in_expectation(temperature) -> None:
    """Weights that are the teacher's probabilities, of all ids, are the sample's expectation."""
    p = problem(9, 0.7, 1)
    probabilities = softmax(p["teacher"] @ p["teacher_head"].T / temperature)
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    order = np.random.default_rng(0).permutation(V)  # ids need not be sorted
    tokens = {
        "targets": jnp.asarray(p["targets"]),
        "target_ids": jnp.asarray(np.broadcast_to(order, (9, V))),
        "target_weights": jnp.asarray(probabilities[:, order], jnp.float32),
        "teacher_entropy": jnp.asarray(entropy, jnp.float32),
    }
    row = rows.Sampled("forward_kl", 0.0, temperature == 1)
    value, _, gradients = value_and_gradients(row, p, tokens, knobs(0.8, temperature))

    def per_token(z, zt):
        soft = losses.forward_kl(z, zt, temperature)
        return 0.8 * soft + 0.2 * losses.cross_entropy(z, jnp.asarray(p["targets"]))

    assert_equal((value, gradients), in_float64(p, per_token))


NEVER = -np.inf
# What a student may think of four ids, by tokens: one is never said, and it may be certain.
EXCLUDING = np.asarray([[2.0, 0.5, NEVER, -1.0], [0.0, 900.0, NEVER, 1.0], [1.0, -900.0, NEVER, 4.0]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("divergence", "parameter"),
    [
        *((name, PARAMETERS.get(name, 0.0)) for name in sorted(DIVERGENCES)),
        *(("jsd", b) for b in (0.0, 0.7, 1.0)),
    ],
)
def test_excluded_ids_give_finite_gradients(divergence, parameter, temperature) -> None:
    """Pitfall 16, online: -inf on both sides, and a student that is certain."""
    teacher_head = np.asarray([[1.0], [0.0], [NEVER], [0.3]])
    teacher, targets = np.asarray([[1.0], [2.0], [0.5]]), np.asarray([0, 1, 3])

    def per_token(z):
        zt = jnp.asarray(teacher @ teacher_head.T)
        soft = losses.DIVERGENCES[divergence](z, zt, parameter, temperature)
        return 0.6 * soft + 0.4 * losses.cross_entropy(z, jnp.asarray(targets))

    row = rows.Online(divergence, parameter, temperature == 1)
    tokens = {"targets": jnp.asarray(targets), "teacher": jnp.asarray(teacher, jnp.float32)}
    found = one_chunk(row, tokens, knobs(0.6, temperature, teacher_head=teacher_head))
    assert_like_the_equation(found, per_token)


@pytest.mark.parametrize(
    "row", [rows.CrossEntropy(), rows.Sampled(), rows.TopK("jsd", 0.5), rows.TopK("reverse_kl")]
)
def test_ids_that_the_student_excludes_give_finite_gradients(row) -> None:
    """Pitfall 16, without a teacher's logits: the excluded id may be among those kept, with no weight."""
    targets, ids = np.asarray([0, 1, 3]), np.broadcast_to([2, 0], (3, 2))
    weights = np.broadcast_to([0.0, 0.6], (3, 2))
    tokens = {
        "targets": jnp.asarray(targets),
        "target_ids": jnp.asarray(ids),
        "target_weights": jnp.asarray(weights, jnp.float32),
        "teacher_entropy": jnp.zeros(3),
    }

    def per_token(z):
        log_q = jax.nn.log_softmax(z)
        if isinstance(row, rows.CrossEntropy):
            return -jnp.take_along_axis(log_q, jnp.asarray(targets)[:, None], 1)[:, 0]
        if isinstance(row, rows.Sampled):
            return -0.6 * log_q[:, 0]
        buckets = jnp.stack([log_q[:, 0], jnp.log1p(-jnp.exp(log_q[:, 0]))], -1)
        p = jnp.log(jnp.asarray([[0.6, 0.4]]))
        return losses.DIVERGENCES[row.divergence](buckets, p, row.parameter, 1.0)

    assert_like_the_equation(one_chunk(row, tokens, knobs()), per_token)


def one_chunk(row, tokens, constants):
    """(loss, gradient by logits) of what EXCLUDING says; the terms are finite, too."""
    loss, terms, gradient = jax.jit(row)(jnp.asarray(EXCLUDING.T, jnp.float32), tokens, constants)
    assert all(bool(jnp.isfinite(x).all()) for x in terms.values()), terms
    return loss, gradient


def assert_like_the_equation(found, per_token) -> None:
    with jax.enable_x64(True):
        z = jnp.asarray(EXCLUDING)
        wanted = per_token(z), jax.grad(lambda z: per_token(z).sum())(z).T
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)


def test_what_bears_no_loss_may_be_anything() -> None:
    """No token's gradient, and that of one among others in its chunk that are no numbers."""
    p = problem(6, 0.0, 0)
    row, constants = rows.Online("forward_kl", 0.0, True), knobs(teacher_head=p["teacher_head"])
    bad = dict(p, hidden=np.full((6, E), np.nan, np.float32), teacher=np.full((6, F), np.inf, np.float32))
    for bears in ([], [3]):
        for name in ("hidden", "teacher"):
            bad[name][bears] = p[name][bears]
        bad["hidden"][:2] = np.inf
        p["weights"][bears] = 1.5
        tokens = {"targets": jnp.asarray(p["targets"]), "teacher": jnp.asarray(bad["teacher"])}
        value, _, gradients = value_and_gradients(row, bad | {"weights": p["weights"]}, tokens, constants)
        assert_equal((value, gradients), in_float64(p, losses.forward_kl))


@pytest.mark.optimised
def test_memory_is_a_tenth_of_the_naive_form() -> None:
    """V = 128,256, 8,192 tokens, width 2,048, as XLA plans it: nothing is run."""
    N, wide, vocabulary = 8192, 2048, 128_256
    shapes = {
        "hidden": jax.ShapeDtypeStruct((N, wide), jnp.bfloat16),
        "head": jax.ShapeDtypeStruct((vocabulary, wide), jnp.bfloat16),
    }
    targets, weights = jax.ShapeDtypeStruct((N,), jnp.int32), jax.ShapeDtypeStruct((N,), jnp.float32)

    def ours(h, w, ht, wt, targets, weights):
        constants = {**knobs(), "teacher_head": wt}
        tokens = {"targets": targets, "teacher": ht}
        return chunked(rows.Online("forward_kl", 0.0, True), h, w, weights, tokens, constants)[0]

    def naive(h, w, ht, wt, targets, weights):
        def logits(h, w):
            return jnp.einsum("ne,ve->nv", h, w, preferred_element_type=jnp.float32)

        return (weights * losses.forward_kl(logits(h, w), logits(ht, wt))).sum()

    def peak(loss) -> int:
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        arguments = (*shapes.values(), *shapes.values(), targets, weights)
        return gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert peak(ours) < peak(naive) / 10


def products(jaxpr) -> list[tuple[str, ...]]:
    """(dtype of both operands, of the result, and that asked for) of every dot_general, loops included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            kinds = [x.aval.dtype for x in (*equation.invars, *equation.outvars)]
            found.append((*map(str, kinds), str(equation.params["preferred_element_type"])))
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for part in inner:
            if hasattr(part, "eqns"):
                found += products(getattr(part, "jaxpr", part))
    return found


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_product_is_of_bfloat16_and_adds_up_in_float32(platform):
    """Those of a layer and of the loss, forward and backward: weights are float32, and so are the cotangents
    where a CPU keeps what a layer gives in float32, which would make the slow products of the backward
    pass."""

    def dense(x, w):
        return (matmul(x, w, (None, None)).astype(jnp.float32) ** 2).sum()

    def loss(hidden, head, teacher, teacher_head):
        constants = knobs(0.5, 2.0) | {"teacher_head": teacher_head}
        tokens = {"targets": jnp.zeros(8, jnp.int32), "teacher": teacher}
        row = rows.Online("forward_kl", 0.0, False)
        return chunked(row, hidden, head, jnp.ones(8), tokens, constants, chunk=4)[0]

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    narrow, wide = jnp.bfloat16, jnp.float32
    layer = array(narrow, 2, 8, E), array(wide, E, F)
    arrays = array(narrow, 8, E), array(wide, V, E), array(narrow, 8, F), array(narrow, V, F)
    with compile_for(platform):
        of_layer = jax.make_jaxpr(jax.grad(dense, (0, 1)))(*layer)
        of_loss = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays)
    right = ("bfloat16", "bfloat16", "float32", "float32")
    assert products(of_layer.jaxpr) == 3 * [right]  # the output, and the gradients of both
    assert products(of_loss.jaxpr) == 4 * [right]  # and the teacher's logits
