"""Attention in blocks: short rows without a loop and long ones with, against a float64 reference in torch."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from distillax.errors import UserError
from distillax.models import attention, backend

B, T, H, K, D, SCALE = 2, 93, 4, 2, 16, 0.3


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs of blocks of 8 queries, of two or three blocks each, and what is left."""
    monkeypatch.setattr(attention, "_BLOCK", 8)
    monkeypatch.setattr(attention, "_UNROLLED", 4)


def drawn(first: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(q, k, v and weights of the outputs; segments of the keys): the queries are those from `first` on."""
    rng = np.random.default_rng(0)
    shapes = [(B, T - first, H, D), (B, T, K, D), (B, T, K, D), (B, T - first, H, D)]
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [30, 5, 50, 8], 1)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], segments.astype(np.int32)


def reference(arrays: list[np.ndarray], segments: np.ndarray, window: int, first: int) -> list[np.ndarray]:
    """The output and the gradients of q, k and v, in float64 from the whole table of scores."""
    q, k, v, mix = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays)
    many_k, many_v = (x.repeat_interleave(H // K, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, many_k) * SCALE
    back = torch.arange(first, T)[:, None] - torch.arange(T)[None]
    seen = (back >= 0) & ((back < window) if window else torch.tensor(True))
    same = torch.tensor(segments[:, first:, None] == segments[:, None, :])
    scores = scores.masked_fill(~(seen & same)[:, None], -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), many_v)
    (out * mix).sum().backward()
    return [out.detach().numpy(), *(x.grad.numpy() for x in (q, k, v))]


@pytest.mark.parametrize(("window", "first"), [(0, 0), (7, 0), (40, 0), (0, 26), (7, 26)])
def test_blocks_in_loops(looped: None, window: int, first: int) -> None:
    """Packed documents, windows that are known only in the loop over layers, groups of query heads, a last
    block that is not whole, and queries of a part of the row, as where a mesh splits it."""
    arrays, segments = drawn(first)
    position = jnp.asarray(first) if first else None

    @jax.jit
    def run(window: Any, *arrays: Any) -> tuple[Any, ...]:
        def total(q: Any, k: Any, v: Any) -> Any:
            own = jnp.asarray(segments)[:, first:]
            out = attention._attend(q, k, v, window, own, jnp.asarray(segments), position, SCALE)
            return (out * arrays[3]).sum(), out

        gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(*arrays[:3])
        return (out, *gradients)

    for found, wanted in zip(
        run(jnp.asarray(window), *arrays), reference(arrays, segments, window, first), strict=True
    ):
        assert np.abs(np.asarray(found) - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_programs_of_long_rows_are_no_larger() -> None:
    """Rows of 2,048 tokens have no loop; of 65,536 the program would be as long as a book."""

    def program(length: int) -> str:
        def total(q: jax.Array, k: jax.Array) -> jax.Array:
            return attention.causal_attention(q, k, k, 0.1).astype(jnp.float32).sum()

        q, k = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.bfloat16) for n in (4, 2))
        return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(q, k))

    short, long, longer = map(program, (2048, 16_384, 65_536))
    assert "scan" not in short and "scan" in long
    assert len(longer) < 1.1 * len(long) < 1.5 * len(short)


def test_no_masks_are_kept(looped: None) -> None:
    """Of a checkpointed layer in a loop, JAX keeps what needs none of its inputs: not masks of T * T."""

    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        attend = jax.checkpoint(lambda x: attention.causal_attention(x, x[:, :, :K], x[:, :, :K], SCALE))
        return attend(x), None

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, None, length=2)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(total))(jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)))
    masks = {math.prod(map(int, found.split(","))) for found in re.findall(r"bool\[([\d,]+)\]", program)}
    assert max(masks) == B * H * 8 * 88  # those of the last whole block


def test_what_jax_no_longer_has_is_told() -> None:
    """When it is needed, and not by the import of all of distillax."""
    assert backend.from_jax("jax._src.distributed", "global_state") is not None
    for module, name in (("jax._src.no_such_module", "x"), ("jax._src.distributed", "no_such_name")):
        with pytest.raises(UserError, match=rf"has no {module}.{name}; install an older one, or a newer"):
            backend.from_jax(module, name)
