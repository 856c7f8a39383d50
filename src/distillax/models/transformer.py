"""The decoder's forward pass: tokens to hidden states to logits.

Shapes: B batch, T tokens, E model width, V vocabulary, L layers, H query heads, K key/value
heads, D head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from distillax.models.attention import causal_attention
from distillax.models.backend import converted, packed, product, stream_dtype, transposed, unpacked
from distillax.models.families import MATRIX_AXES, ModelConfig
from distillax.models.layout import constrain_tokens, gathered, summed_over_tokens
from distillax.models.quantize import Quantized
from distillax.models.spec import Tree

# What the backward pass of a layer finds saved; the rest it computes again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything is saved: fastest, where memory allows
    "minimal": jax.checkpoint_policies.save_only_these_names("dense"),  # the outputs of the matrix products
    "full": jax.checkpoint_policies.nothing_saveable,  # each layer's input alone
}

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Axes = tuple[str | None, str | None]
Linear = Callable[[jax.Array, Tree, str], jax.Array]


def hidden_states(params: Tree, tokens_BT: jax.Array, config: ModelConfig, **options: Any) -> jax.Array:
    """The last layer's output after the final norm, [B, T, E]; options as below."""
    return hidden_states_and_features(params, tokens_BT, config, **options)[0]


def hidden_states_and_features(
    params: Tree,
    tokens_BT: jax.Array,
    config: ModelConfig,
    collect: tuple[int, ...] = (),
    *,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    scan: bool = True,
    frozen: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(the last layer's output after the final norm [B, T, E] in `dtype`, the residual stream after
    each of the layers `collect` [M, B, T, E], or None).

    Packed rows need `segment_ids_BT` (a document sees itself only) and `positions_BT` (restarting in
    each). `dtype` is that of the matrix products; norms, softmax and sums are float32, the residual stream
    between layers is `backend.stream_dtype`. `scan` compiles one layer and loops over it, else the layers
    are unrolled.
    `frozen` promises that no gradient of the weights is asked for: there is none.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    rope = rope_tables(positions_BT, config)
    scale = attention_scale(config)

    def layer_step(x_BTE: jax.Array, layer: Tree, window: int | jax.Array) -> jax.Array:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            cos, sin = select_rope(rope, window)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            return causal_attention(q, k, v, scale, window, segment_ids_BT), None

        x_BTE, _ = block(x_BTE.astype(jnp.float32), layer, config, attend, dtype)
        return constrain_tokens(x_BTE.astype(stream_dtype(dtype)))

    x_BTE, features = _through_layers(
        layer_step,
        constrain_tokens(embed(params, tokens_BT, config, dtype).astype(stream_dtype(dtype))),
        # Integers have no gradients: only what needs none may be packed.
        jax.tree.map(packed, params["layers"]) if frozen and scan else params["layers"],
        config.windows,
        collect,
        remat,
        scan,
    )
    return rms_norm(x_BTE, params["final_norm"], config).astype(dtype), features


def _through_layers(
    layer_step: Callable[..., jax.Array],
    x_BTE: jax.Array,
    layers: Tree,
    windows: tuple[int, ...],
    collect: tuple[int, ...],
    remat: str,
    scan: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """(the last layer's output, those of the layers `collect`)."""
    if remat == "none":
        step = layer_step
    else:
        # A uniform stack has one window, which is then static.
        static = (2,) if not scan or len(set(windows)) == 1 else ()
        policy: Any = REMAT_POLICIES[remat]
        step = jax.checkpoint(layer_step, policy=policy, prevent_cse=not scan, static_argnums=static)
    if not scan:
        found = {}
        for i, window in enumerate(windows):
            x_BTE = step(x_BTE, jax.tree.map(lambda w, i=i: w[i], layers), window)
            found[i] = x_BTE
        return x_BTE, jnp.stack([found[i] for i in collect]) if collect else None

    # The carry holds what is collected: outputs of every layer would cost a stack of them.
    wanted = jnp.asarray(collect, jnp.int32)

    def body(carry: tuple[jax.Array, Any], xs: Any) -> tuple[tuple[jax.Array, Any], None]:
        x, kept = carry
        number, layer, window = xs
        x = step(x, jax.tree.map(unpacked, layer), windows[0] if window is None else window)
        if kept is not None:
            kept = jnp.where((wanted == number)[:, None, None, None], x[None], kept)
        return (x, kept), None

    uniform = len(set(windows)) == 1
    numbers = jnp.arange(len(windows), dtype=jnp.int32) if collect else None
    kept = jnp.zeros((len(collect), *x_BTE.shape), x_BTE.dtype) if collect else None
    per_layer = None if uniform else jnp.asarray(windows, jnp.int32)
    (x_BTE, kept), _ = jax.lax.scan(body, (x_BTE, kept), (numbers, layers, per_layer))
    return x_BTE, kept


def logits(params: Tree, hidden_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """float32[B, T, V]. For evaluation and tests: training never holds them (see train.fused)."""
    head_VE = head_weights(params, config).astype(hidden_BTE.dtype)
    return softcap(product("bte,ve->btv", hidden_BTE, head_VE), config.logit_softcap)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else np.float32(cap) * jnp.tanh(x / np.float32(cap))


def head_weights(params: Tree, config: ModelConfig) -> jax.Array:
    """The output projection [V, E]: the embedding itself where the two are tied."""
    return params["embed"] if config.tied else params["head"]


def embed(params: Tree, tokens: jax.Array, config: ModelConfig, dtype: Any) -> jax.Array:
    """Embeddings of tokens, float32[..., E]."""
    x = params["embed"][tokens].astype(jnp.float32)
    if config.scale_embeddings:
        # The reference implementations round this factor to the compute dtype.
        x = x * np.asarray(np.sqrt(np.float32(config.width)), dtype).astype(np.float32)
    return x


def block(
    x_BTE: jax.Array,
    layer: Tree,
    config: ModelConfig,
    attend: Attend,
    dtype: Any,
    linear: Linear | None = None,
) -> tuple[jax.Array, Any]:
    """One layer. `attend(q, k, v)` gives ([B, T, H, D], anything), and the anything is passed on.
    `linear(x, layer, name)` is `dense`, unless the weights are laid out in another way."""
    linear = linear or dense
    c = config
    B, T, _ = x_BTE.shape
    h = rms_norm(x_BTE, layer["attention_norm"], c).astype(dtype)
    q = linear(h, layer, "q").reshape(B, T, c.heads, c.head_dim)
    k = linear(h, layer, "k").reshape(B, T, c.kv_heads, c.head_dim)
    v = linear(h, layer, "v").reshape(B, T, c.kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], c), rms_norm(k, layer["k_norm"], c)
    out, carried = attend(q.astype(dtype), k.astype(dtype), v.astype(dtype))
    out = linear(out.reshape(B, T, -1).astype(dtype), layer, "o")
    if c.post_norms:
        out = rms_norm(out, layer["post_attention_norm"], c)
    x_BTE = x_BTE + out.astype(jnp.float32)
    h = rms_norm(x_BTE, layer["mlp_norm"], c).astype(dtype)
    hidden: Any = gated(linear(h, layer, "gate"), linear(h, layer, "up"), c.activation, dtype)
    out = linear(hidden, layer, "down")
    if c.post_norms:
        out = rms_norm(out, layer["post_mlp_norm"], c)
    return x_BTE + out.astype(jnp.float32), carried


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gated(gate: jax.Array, up: jax.Array, activation: str, dtype: Any) -> jax.Array:
    """activation(gate) * up in `dtype`, computed in float32. The backward pass keeps no more than the
    operands, and these in `dtype`: a layer's memory is mostly here."""
    return _gated(gate, up, activation).astype(dtype)


def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.gelu(gate, approximate=True) if activation == "gelu_tanh" else jax.nn.silu(gate)) * up


def _gated_forward(gate: jax.Array, up: jax.Array, activation: str, dtype: Any) -> tuple[jax.Array, Any]:
    return gated(gate, up, activation, dtype), (packed(gate.astype(dtype)), packed(up.astype(dtype)))


def _gated_backward(activation: str, dtype: Any, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    operands = (unpacked(x).astype(stream_dtype(dtype)) for x in saved)
    _, backward = jax.vjp(lambda gate, up: _gated(gate, up, activation), *operands)
    return backward(dy.astype(jnp.float32))


gated.defvjp(_gated_forward, _gated_backward)


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, float32 in and out."""
    weight = weight.astype(jnp.float32) + np.float32(config.norm_offset)
    return _rms_norm(x.astype(jnp.float32), weight.reshape((1,) * (x.ndim - 1) + (-1,)), config.rms_eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * _inverse_rms(x, eps) * weight


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))


def _rms_norm_forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    return _rms_norm(x, weight, eps), (x, weight)


def _rms_norm_backward(eps: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From x and the weight alone: what lies between is cheaper computed again than kept."""
    x, weight = saved
    r = _inverse_rms(x, eps)
    normed, dnormed = x * r, dy * weight
    dx = r * (dnormed - normed * (dnormed * normed).mean(-1, keepdims=True))
    return dx, (dy * normed).sum(tuple(range(x.ndim - 1)), keepdims=True)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def attention_scale(config: ModelConfig) -> float:
    return config.head_dim**-0.5 if config.query_scale is None else config.query_scale


def rope_tables(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, ...]:
    """(cos, sin), each float32[B, T, D/2]; (cos, sin, local cos, local sin) with a second base."""
    tables: list[jax.Array] = []
    bases = [(config.rope_theta, config.rope_scaling)]
    if config.local_rope_theta is not None:
        bases.append((config.local_rope_theta, None))
    for theta, scaling in bases:
        frequencies = rope_frequencies(config.head_dim, theta, scaling)
        angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
        tables += [jnp.cos(angles), jnp.sin(angles)]
    return tuple(tables)


def select_rope(tables: tuple[jax.Array, ...], window: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tables of one layer: windowed layers use the local base, where there is one."""
    if len(tables) == 2:
        return tables[0], tables[1]
    if isinstance(window, int):
        return tables[2:] if window else tables[:2]  # type: ignore[return-value]
    return jnp.where(window > 0, tables[2], tables[0]), jnp.where(window > 0, tables[3], tables[1])


def rope_frequencies(head_dim: int, theta: float, scaling: Any) -> np.ndarray:
    """float32[D/2]: radians per position of each pair, after context extension."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:  # llama3: by wavelength, against the context the model was trained on
        turns = scaling.original_max_position * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rotate(x_BTHD: jax.Array, cos_BTd: jax.Array, sin_BTd: jax.Array) -> jax.Array:
    """Rotary positions on the two halves of each head (Hugging Face's convention)."""
    a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHD.dtype)


def dense(x: jax.Array, layer: Tree, name: str) -> jax.Array:
    """x @ weight + bias, [..., O]."""
    w_IO, multiply = layer[name], matmul_quantized if isinstance(layer[name], Quantized) else matmul
    y = checkpoint_name(multiply(x, w_IO, MATRIX_AXES[name]), "dense")
    return add_bias(y, layer.get(f"{name}_bias"))


def add_bias(y: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    return y if bias_O is None else y.astype(jnp.float32) + _last_axis(bias_O, y)


def _last_axis(values_O: jax.Array, y: jax.Array) -> jax.Array:
    """float32 values [O] with as many axes as y [..., O] has."""
    return values_O.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


def matmul_quantized(x: jax.Array, w_IO: Quantized, axes: Axes) -> jax.Array:
    """As `matmul`. The scale is one number an output, so it may wait until after the product, whose
    operands are then exact: bfloat16 holds every integer up to 256.

    The weights are gathered while they are 8 bits: the partitioner would turn them into the compute dtype
    first, and send two to four times as much. The barrier keeps the layout that the gathering prefers
    from the stack of all layers, of which it would make a copy.
    """
    values = gathered(jax.lax.optimization_barrier(w_IO.values), axes)
    y = product("...i,io->...o", x, values.astype(x.dtype))
    return (y * _last_axis(w_IO.scale, y)).astype(stream_dtype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w_IO: jax.Array, axes: Axes) -> jax.Array:
    """x @ w in x's dtype, accumulated in float32, `axes` being the logical axes of w. The result is rounded
    as `backend.stream_dtype` says; the gradient of w has w's dtype.

    On a mesh, w is gathered in x's dtype, and not kept: whoever needs it again gathers it again.
    """
    y = product("...i,io->...o", x, gathered(converted(w_IO, x.dtype), axes))
    return y.astype(stream_dtype(x.dtype))


def _matmul_forward(x: jax.Array, w_IO: jax.Array, axes: Axes) -> tuple[jax.Array, Any]:
    return matmul(x, w_IO, axes), (packed(x), w_IO)


def _matmul_backward(axes: Axes, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both products are of the compute dtype, whatever the cotangent comes in, and accumulated in float32."""
    x, w_IO = unpacked(saved[0]), saved[1]
    dy = dy.astype(x.dtype)
    dx = product("...o,io->...i", dy, gathered(converted(w_IO, x.dtype), axes)).astype(x.dtype)
    return dx, summed_over_tokens(_weight_gradient, x, dy, axes).astype(w_IO.dtype)


def _weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    x_NI, dy_NO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return product("in,no->io", transposed(x_NI), dy_NO)


matmul.defvjp(_matmul_forward, _matmul_backward)
