"""`distillax train`: sets up model, data and state, then steps, measures, saves, and resumes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillax.checkpoints.convert import write_side
from distillax.checkpoints.source import HF_FOLDER, Source, find, find_tokenizer
from distillax.checkpoints.state import RunCheckpoints
from distillax.config import TrainConfig, dump
from distillax.data.batches import make_batches, scan_lengths
from distillax.data.examples import Examples, load_examples
from distillax.errors import UserError
from distillax.models.backend import compute_dtype
from distillax.models.families import param_specs, preset
from distillax.models.spec import count_params, init_params, unflatten
from distillax.parallel.mesh import batch_devices, batch_sharding, make_mesh, param_shardings
from distillax.progress import progress
from distillax.run_dir import Metrics, RunDir
from distillax.train.objectives import OBJECTIVES, Compute
from distillax.train.optimizer import learning_rate_schedule, make_optimizer
from distillax.train.step import TrainState, evaluate_sums, make_step

RANDOM = "random"  # load_parameters_path for random weights, which must be asked for by name
_COUNTED_ROWS = 50_000  # beyond this many, the rows are not all encoded just to be counted


@dataclass(frozen=True)
class Result:
    """What a training run leaves: its folder, its last step, and that step's numbers."""

    run: Path
    step: int
    metrics: dict[str, float]


def train(config: TrainConfig, say: Callable[[str], None] = print) -> Result:
    """Trains as `config` says, or goes on where an earlier start of the same run was stopped.

    Raises UserError for whatever is wrong with configuration, model or data, before anything is
    written where that can be known.
    """
    if config.method not in OBJECTIVES:
        raise UserError(f"method={config.method} cannot be trained yet; method=sft can")
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    mesh = make_mesh(config)
    source = _source(config, token)
    tokenizer = find_tokenizer(config.tokenizer_path, token) if config.tokenizer_path else source.tokenizer()
    examples = _examples(config, tokenizer, config.train_split, config.hf_train_files, token)
    compute = Compute(compute_dtype(config.dtype), config.remat_policy, config.scan_layers)
    optimizer = make_optimizer(config, source.config)
    with ExitStack() as stack:
        run = stack.enter_context(RunDir(config.base_output_directory, config.run_name, dump(config)))
        checkpoints = RunCheckpoints(run.checkpoints, config.max_num_checkpoints_to_keep)
        stack.callback(checkpoints.close)
        batches = _batches(config, examples, mesh)
        stack.callback(batches.close)
        done = checkpoints.latest_step() or 0
        if done > config.steps:
            raise UserError(f"{run.path} has already done {done} steps, more than steps={config.steps}")
        if done:
            state = _abstract_state(source, optimizer, config, mesh)
            params, optimizer_state, iterator = checkpoints.restore(done, *state)
            state = TrainState(params, optimizer_state)
            batches.set_state(iterator)
        else:
            state = _new_state(source, optimizer, config, mesh)
        if jax.process_index() == 0:
            write_side(source, run.path / HF_FOLDER)
            tokenizer.save_pretrained(str(run.path / HF_FOLDER))
        _announce(config, source, examples, compute, mesh, done, say)
        step = jax.jit(
            make_step(OBJECTIVES[config.method], optimizer, source.config, compute), donate_argnums=0
        )
        evaluation = _evaluation(config, source, tokenizer, compute, mesh, token)
        metrics = stack.enter_context(Metrics(run, done))
        last = _steps(config, run, step, state, batches, checkpoints, metrics, evaluation, mesh, done)
    say(f"done: {config.steps} steps; checkpoint in {run.checkpoints / str(config.steps)}")
    return Result(run.path, config.steps, last)


def _steps(
    config: TrainConfig,
    run: RunDir,
    step: Callable[..., Any],
    state: TrainState,
    batches: Any,
    checkpoints: RunCheckpoints,
    metrics: Metrics,
    evaluation: Callable[[Any], dict[str, float]] | None,
    mesh: Mesh,
    done: int,
) -> dict[str, float]:
    """The loop. A step's numbers are fetched while the next one runs. Returns the last step's."""
    schedule = learning_rate_schedule(config)
    trace = _Trace(config, run, done)
    numbers: dict[str, float] = {}
    pending: tuple[int, Any] | None = None
    clock = time.monotonic()
    with progress(config.steps, "train", done=done) as bar:

        def settle() -> None:
            nonlocal pending, clock, numbers
            if pending is None:
                return
            number, values = pending
            pending = None
            numbers = {name: float(value) for name, value in jax.device_get(values).items()}
            seconds, clock = time.monotonic() - clock, time.monotonic()
            numbers["learning_rate"] = float(schedule(number - 1))
            numbers["step_seconds"] = seconds
            numbers["tokens_per_second"] = numbers["weight_sum"] / seconds
            metrics.write(number, numbers)
            bar.update(1, loss=numbers["loss"], tokens_per_s=round(numbers["tokens_per_second"]))
            if not np.isfinite(numbers["loss"]):
                raise UserError(
                    f"step {number}: the loss is {numbers['loss']}; lower learning_rate, or check the data"
                )

        for number in range(done + 1, config.steps + 1):
            trace.before(number)
            batch = _to_devices(next(batches), config, mesh)
            state, values = step(state, None, batch)
            settle()
            pending = (number, values)
            save = number == config.steps or number % config.checkpoint_period == 0
            evaluate = evaluation is not None and number % config.eval_interval == 0
            if save or evaluate or trace.ends(number):
                settle()
            if save:
                checkpoints.save(number, state.params, state.optimizer_state, batches.get_state())
            if evaluate and evaluation is not None:
                metrics.write(number, evaluation(state.params))
            trace.after(number)
        trace.close()
    return numbers


def _source(config: TrainConfig, token: str | None) -> Source:
    if not config.load_parameters_path:
        raise UserError(
            "load_parameters_path is not set; give the student's weights, "
            f"or {RANDOM} with a model_name to begin from random ones"
        )
    if config.load_parameters_path == RANDOM:
        if not config.model_name:
            raise UserError(f"load_parameters_path={RANDOM} needs a model_name")
        preset(config.model_name)  # a misspelt name is the first thing to say
        return Source(config.model_name, RANDOM, Path(), None, config.model_name)
    source = find(config.load_parameters_path, model_name=config.model_name or None, hf_access_token=token)
    if config.model_name and source.side is not None:
        _check_name(config.model_name, source)
    return source


def _check_name(model_name: str, source: Source) -> None:
    """A model_name that is not what the checkpoint holds is a mistake worth stopping for."""
    wanted, found = preset(model_name), source.config
    for name in ("family", "layers", "width", "heads", "kv_heads", "mlp_width"):
        if getattr(wanted, name) != getattr(found, name):
            raise UserError(
                f"model_name={model_name} has {name} {getattr(wanted, name)}, but {source.name} has "
                f"{getattr(found, name)}; leave model_name out, or give the weights that belong to it"
            )


def _examples(config: TrainConfig, tokenizer: Any, split: str, files: str, token: str | None) -> Examples:
    return load_examples(
        config.hf_path,
        tokenizer,
        split=split,
        columns=config.train_data_columns,
        files=files,
        train_on=config.train_on,
        enable_thinking=config.enable_thinking,
        hf_access_token=token,
    )


def _batches(config: TrainConfig, examples: Examples, mesh: Mesh) -> Any:
    """Batches of this host's share of the global batch, for ever, in the order of the seed."""
    rows = config.per_device_batch_size * batch_devices(mesh) * config.gradient_accumulation_steps
    return make_batches(
        examples,
        examples.encode,
        batch_size=rows // jax.process_count(),
        max_target_length=config.max_target_length,
        packing=config.packing,
        shuffle_seed=config.data_shuffle_seed,
        overlong=config.overlong,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _to_devices(batch: dict[str, np.ndarray], config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """[A * B, T] of this host -> [A, B, T] over all devices, A being the microbatches."""
    sharding = batch_sharding(mesh, leading=1)

    def put(x: np.ndarray) -> jax.Array:
        split = x.reshape(config.gradient_accumulation_steps, -1, x.shape[-1])
        return jax.make_array_from_process_local_data(sharding, split)

    return {name: put(x) for name, x in batch.items()}


def _new_state(source: Source, optimizer: Any, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Master weights from the source, each placed on the devices as it is read."""
    dtype, shardings = jnp.dtype(config.weight_dtype), param_shardings(source.config, mesh)
    if source.kind == RANDOM:
        specs, key = param_specs(source.config), jax.random.key(config.init_weights_seed)
        make = jax.jit(lambda: init_params(specs, source.config.layers, key, dtype), out_shardings=shardings)
        params = make()
    else:
        placed = {}
        for path, _, _, read in source.iter_params(dtype):
            sharding = shardings
            for name in path:
                sharding = sharding[name]
            placed[path] = jax.device_put(read(), sharding)
        params = unflatten(placed)
    optimizer_state = jax.jit(optimizer.init, out_shardings=_optimizer_shardings(optimizer, params, mesh))(
        params
    )
    return TrainState(params, optimizer_state)


def _abstract_state(source: Source, optimizer: Any, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore."""
    dtype, shardings = jnp.dtype(config.weight_dtype), param_shardings(source.config, mesh)
    layers = source.config.layers

    def leaf(spec: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.full_shape(layers), dtype, sharding=sharding)

    params = jax.tree.map(leaf, param_specs(source.config), shardings)
    shapes = jax.eval_shape(optimizer.init, params)
    optimizer_state = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        _optimizer_shardings(optimizer, params, mesh),
    )
    return TrainState(params, optimizer_state)


def _optimizer_shardings(optimizer: Any, params: Any, mesh: Mesh) -> Any:
    """Moments are split like the parameters they belong to; counters are whole."""
    import optax

    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda _, param: param.sharding,
        shapes,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def _evaluation(
    config: TrainConfig, source: Source, tokenizer: Any, compute: Compute, mesh: Mesh, token: str | None
) -> Callable[[Any], dict[str, float]] | None:
    """A function of the parameters that measures the evaluation split, if there is to be one."""
    if config.eval_interval < 1 or not (config.eval_split or config.hf_eval_files):
        return None
    examples = _examples(config, tokenizer, config.eval_split or "test", config.hf_eval_files, token)
    sums = evaluate_sums(OBJECTIVES[config.method], source.config, compute)

    def evaluate(params: Any) -> dict[str, float]:
        loss = weight = 0.0
        for batch in _evaluation_batches(config, examples, mesh):
            found, terms = sums(params, None, batch)
            loss, weight = loss + float(terms["loss"]), weight + float(found)
        return {"eval_loss": loss / weight, "eval_tokens": weight}

    return evaluate


def _evaluation_batches(
    config: TrainConfig, examples: Examples, mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    batches = make_batches(
        examples,
        examples.encode,
        batch_size=config.per_device_batch_size * batch_devices(mesh) // jax.process_count(),
        max_target_length=config.max_target_length,
        packing=config.packing,
        shuffle_seed=None,
        overlong=config.overlong,
        num_epochs=1,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    try:
        for number, batch in enumerate(batches):
            if number == config.eval_steps:
                return
            sharding = batch_sharding(mesh)
            yield {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}
    finally:
        batches.close()


class _Trace:
    """Writes the profile that the profiler keys ask for."""

    def __init__(self, config: TrainConfig, run: RunDir, done: int):
        first = done + 1 + config.skip_first_n_steps_for_profiler
        self._first = min(first, config.steps) if config.profiler else 0
        self._last = min(self._first + config.profiler_steps - 1, config.steps) if config.profiler else 0
        self._folder, self._open = run.path / "profile", False

    def before(self, number: int) -> None:
        if number == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def ends(self, number: int) -> bool:
        return self._open and number == self._last

    def after(self, number: int) -> None:
        if self.ends(number):
            self.close()

    def close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False


def _announce(
    config: TrainConfig,
    source: Source,
    examples: Examples,
    compute: Compute,
    mesh: Mesh,
    done: int,
    say: Callable[[str], None],
) -> None:
    c = source.config
    size = count_params(param_specs(c), c.layers)
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(f"student: {source.name} ({c.family}, {c.layers} layers, {size / 1e6:,.1f}M parameters)")
    say(
        f"method: {config.method}, loss on {config.train_on} tokens, normalised by the global batch's loss tokens"
    )
    say(f"compute: {compute.dtype} on {jax.default_backend()}, {axes}; remat {compute.remat}")
    ids = "sampled token ids" if examples.sampled_ids else "text, tokenised"
    if len(examples) <= _COUNTED_ROWS:
        n = scan_lengths(examples, examples.encode, config.max_target_length, config.overlong)
        say(
            f"data: {n.rows:,} rows ({ids}), {n.loss_tokens:,} loss tokens of {n.tokens:,}; "
            f"{n.truncated:,} truncated, {n.dropped:,} dropped, {n.empty:,} without a loss token"
        )
    else:
        say(f"data: {len(examples):,} rows ({ids})")
    if done:
        say(f"resuming after step {done} of {config.steps}")
