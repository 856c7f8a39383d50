"""`distillax train`: sets up model, data and state, then steps, measures, saves, and resumes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distillax.checkpoints.convert import write_side
from distillax.checkpoints.source import HF_FOLDER, Source
from distillax.checkpoints.state import RunCheckpoints
from distillax.config import TrainConfig
from distillax.data import chat
from distillax.data.batches import Counts, count_rows
from distillax.data.examples import Examples
from distillax.data.targets import TargetStore
from distillax.errors import Stopped, UserError
from distillax.models.families import param_specs
from distillax.models.layout import on_mesh
from distillax.models.spec import Tree, count_params
from distillax.parallel import hosts
from distillax.parallel.mesh import check_length, check_rows, make_mesh, notes_on_heads, rows_a_step
from distillax.progress import Progress, progress
from distillax.run_dir import Metrics, RunDir, check_name
from distillax.settings import dump
from distillax.train.evaluation import (
    eval_targets,
    held_out_feed,
    make_evaluation,
    owes_evaluation,
    past_best,
    read_held_out,
    refuse_idle_evaluation,
)
from distillax.train.feed import COUNTED_ROWS, Feed, make_feed, read_examples, refuse_idle_splits
from distillax.train.method import (
    Method,
    check_sources,
    knobs,
    make_method,
    refuse_idle_keys,
    student_tokenizer,
    summary,
)
from distillax.train.optimizer import learning_rate_schedule, make_optimizer
from distillax.train.setup import (
    abstract_state,
    from_saved,
    new_state,
    student_source,
    to_saved,
    trained_specs,
)
from distillax.train.step import TrainState, make_step

# Sampled targets that are read more often have their noise learnt, unless a position has so many ids
# (docs/cached.md).
MOST_READS, ENOUGH_IDS = 4, 48


@dataclass(frozen=True)
class Result:
    """What a training run leaves: its folder, its last step, and that step's numbers (none if
    there was nothing left to do)."""

    run: Path
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


def train(config: TrainConfig, say: Callable[[str], None] = print) -> Result:
    """Trains as `config` says, or goes on where an earlier start of the same run was stopped.

    Raises UserError for whatever is wrong with configuration, model or data, before anything is
    written where that can be known; Stopped after SIGTERM, with everything saved, and
    KeyboardInterrupt after Ctrl-C, likewise, once a step has been made. Where several
    processes train together, whatever is raised in one ends the others (`hosts.joined`).
    """
    check_name(config.run_name)
    refuse_idle_keys(config)
    refuse_idle_evaluation(config)
    refuse_idle_splits(config)
    check_sources(config)
    with hosts.joined(config):
        return _train(config, say if hosts.is_first() else _say_nothing)


def _train(config: TrainConfig, say: Callable[[str], None]) -> Result:
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    mesh = make_mesh(config)
    check_length(config, mesh)
    source = student_source(config, token)
    hosts.same_for_all(source.version(), "the student")
    tokenizer = student_tokenizer(config, source, token)
    examples = read_examples(config, tokenizer, config.train_split, config.hf_train_files, token)
    held_out = read_held_out(config, tokenizer, token, examples, say)  # before any weights: it may be missing
    method = make_method(config, source, tokenizer, mesh, token)
    expected = eval_targets(config, method.setup, tokenizer, method.targets)
    examples = replace(examples, ids=method.setup.ids)
    with ExitStack() as stack:
        folder = config.base_output_directory, config.run_name, dump(config)
        wait = jax.process_count() > 1 or "SLURM_RESTART_COUNT" in os.environ
        how = {"leader": hosts.is_first(), "wait": say if wait else None, "defaults": dump(TrainConfig())}
        run = stack.enter_context(RunDir(*folder, **how))
        run.check_shared(hosts.from_first(run.token))
        stack.enter_context(on_mesh(mesh))
        # Before the checkpoints: a second SIGTERM must not end what the first one had saved.
        stopping = stack.enter_context(hosts.stopping())
        checkpoints = RunCheckpoints(run.checkpoints, config.max_num_checkpoints_to_keep)
        stack.enter_context(checkpoints)
        done = hosts.from_first(checkpoints.latest_step() or 0)
        metrics = stack.enter_context(Metrics(run, done)) if hosts.is_first() else None
        owed = hosts.from_first(int(hosts.is_first() and owes_evaluation(config, run, done)))
        if done >= config.steps and not owed:
            say(f"nothing to do: {run.path} has all of its {config.steps} steps")
            return Result(run.path, done)
        saved = checkpoints.restore_iterator(done) if done else {}
        place = _place(config, mesh, run, examples, saved)
        _write_side(source, run, tokenizer, examples)
        feed = make_feed(config, mesh, examples, COUNTED_ROWS, method.targets)
        batches = feed.training()
        stack.callback(batches.close)
        optimizer = make_optimizer(config, trained_specs(method.setup))
        abstract = to_saved(abstract_state(method.setup, optimizer, config, mesh))
        if hosts.is_first() and (line := checkpoints.check_room(*abstract)):
            say(line)
        measured = held_out_feed(config, method.setup, held_out, mesh, expected)
        teacher = method.load_teacher()
        if done:
            state = from_saved(*checkpoints.restore(done, *abstract))
            batches.set_state(saved["batches"])
        else:
            state = new_state(source, method.setup, optimizer, config, mesh)
        _announce(config, source, feed, method, mesh, done, say)
        evaluate = make_evaluation(measured, method.setup, teacher)
        update = jax.jit(make_step(method.objective, method.setup, optimizer), donate_argnums=0)
        with progress(config.steps, config.run_name, done=done, enabled=hosts.is_first()) as bar:
            recorder = _Recorder(config, metrics, bar)
            trace = _Trace(config, run, done)
            stack.callback(trace.close)
            parts = (evaluate, checkpoints, recorder, trace, stopping, place)
            training = _Training(config, feed, update, teacher, batches, *parts)
            if owed:
                training.measure(state, done)
            number, told = training.run(state, done)
    return _finished(config, Result(run.path, number, recorder.last), told, say)


def _finished(config: TrainConfig, result: Result, told: int, say: Callable[[str], None]) -> Result:
    """Says how the run ended. Raises Stopped or KeyboardInterrupt if it was by a signal, be it at the last
    step: who called us shall not go on."""
    saved = result.run / "checkpoints" / str(result.step)
    ended = f"after step {result.step} of {config.steps}; the checkpoint is in {saved}"
    if result.step < config.steps:
        ended += ", and the same command goes on from there"
    if told == signal.SIGINT:
        raise KeyboardInterrupt(f"interrupted {ended}")
    if told:
        raise Stopped(f"stopped by SIGTERM {ended}")
    say(f"done: {config.steps} step{'s' * (config.steps != 1)}; checkpoint in {saved}")
    if hosts.is_first() and (line := past_best(result.run)):
        say(line)
    return result


@dataclass(frozen=True)
class _Training:
    """All that the steps of a run need."""

    config: TrainConfig
    feed: Feed
    update: Callable[..., Any]
    teacher: Tree | None
    batches: Any
    evaluate: Callable[[Tree], dict[str, float]] | None
    checkpoints: RunCheckpoints
    recorder: "_Recorder"
    trace: "_Trace"
    stopping: Callable[[int], int]
    place: dict[str, Any]  # in which data a checkpoint's place is one

    def run(self, state: TrainState, done: int) -> tuple[int, int]:
        """The steps after the first `done`: batch, update, metrics, and now and then an evaluation or a
        checkpoint. Returns the last one, and the signal, if one came, that made it the last."""
        c, recorder, trace = self.config, self.recorder, self.trace
        number, stop = done, 0
        last = number >= c.steps  # nothing is left but an evaluation
        while not last:
            number += 1
            trace.before(number)
            batch = self.feed.to_devices(next(self.batches))
            state, values = self.update(state, self.teacher, batch, knobs(c, number))
            recorder.add(number, values)
            stop = self.stopping(number)
            last = bool(stop) or number == c.steps
            save = last or number % c.checkpoint_period == 0
            measure = self.evaluate is not None and not stop and (last or number % c.eval_interval == 0)
            if save or measure or trace.ends(number):
                recorder.settle(kept=save)
            if save:
                place = self.place | {"batches": self.batches.get_state()}
                self.checkpoints.save(number, *to_saved(state), place)
            if measure:
                self.measure(state, number)
            trace.after(number)
        return number, stop

    def measure(self, state: TrainState, number: int) -> None:
        if self.evaluate is not None:
            self.recorder.write_evaluation(number, self.evaluate(state.params))


def _place(
    config: TrainConfig, mesh: Mesh, run: RunDir, examples: Examples, saved: dict[str, Any]
) -> dict[str, Any]:
    """In what a checkpoint's place is one. Raises UserError if the one `saved` is in other data, in other
    tokens of them, or in steps of other rows."""
    place = {
        "data": examples.fingerprint(),
        "tokenizer": examples.tokens_by(),
        "rows": rows_a_step(config, mesh),
    }
    if not saved:
        return place
    check_rows(config, mesh, saved["rows"])
    for key, name, old in (
        ("data", examples.conversations.names[0], "data"),
        ("tokenizer", "the tokenizer, or its chat template,", "one"),
    ):
        if saved[key] != place[key]:
            raise UserError(
                f"{name} has changed since {run.path} was trained on it, so the run cannot go on where it "
                f"was; give the old {old}, or another run_name to start a new run"
            )
    return place


def _say_nothing(_: str) -> None: ...


def _write_side(source: Source, run: RunDir, tokenizer: Any, examples: Examples) -> None:
    """Config and tokenizer, without which a checkpoint could not be loaded."""
    if hosts.is_first():
        stops = chat.stop_tokens(source.generation_config, tokenizer)
        names = [] if examples.conversations.local else examples.conversations.names
        write_side(source, run.path / HF_FOLDER, tokenizer, stops, names)


class _Recorder:
    """Writes the numbers of a step. They are fetched while the next step runs."""

    def __init__(self, config: TrainConfig, metrics: Metrics | None, bar: Progress):
        # All at once: a step's own would be computed on the device, behind the step that runs there.
        steps = np.arange(config.steps, dtype=np.float32)
        self._rates = np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config)))(steps))
        self._metrics, self._bar = metrics, bar
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock = time.monotonic()
        self._shown: dict[str, float] = {}  # on the progress line
        self.last: dict[str, float] = {}

    def add(self, number: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's numbers, which may still be being computed, and writes those before."""
        self.settle()
        self._pending = (number, values)

    def write_evaluation(self, number: int, values: dict[str, float]) -> None:
        """Writes an evaluation, which the progress line shows from now on; its time is no step's."""
        self._write(number, values)
        self._shown |= {name: value for name, value in values.items() if name != "eval_tokens"}
        self._bar.update(0, **self._shown)
        self._clock = time.monotonic()

    def _write(self, number: int, values: dict[str, Any]) -> None:
        if self._metrics is not None:  # one process of a run writes
            self._metrics.write(number, values)

    def settle(self, kept: bool = False) -> None:
        """Writes what is pending, so that it is `kept` if the machine goes, too. Raises UserError if the loss
        is not finite."""
        self._settle()
        if kept and self._metrics is not None:
            self._metrics.sync()

    def _settle(self) -> None:
        if self._pending is None:
            return
        number, values = self._pending
        self._pending = None
        found = {name: float(value) for name, value in jax.device_get(values).items()}
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        speed = found["weight_sum"] / seconds
        rate = self._rates[number - 1].item()
        self.last = {**found, "learning_rate": rate, "step_seconds": seconds, "tokens_per_second": speed}
        self._write(number, self.last)
        self._shown |= {"loss": found["loss"], "tokens_per_s": round(speed)}
        self._bar.update(1, **self._shown)
        for name in ("loss", "grad_norm"):
            if not np.isfinite(found[name]):
                raise UserError(
                    f"step {number}: {name} is {found[name]}; lower learning_rate, or check the data"
                )


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
    feed: Feed,
    method: Method,
    mesh: Mesh,
    done: int,
    say: Callable[[str], None],
) -> None:
    c, compute = source.config, method.setup.compute
    size = count_params(param_specs(c), c.layers)
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(f"student: {source.name} ({c.family}, {c.layers} layers, {size / 1e6:,.1f}M parameters)")
    for line in summary(config, method):
        say(line)
    for who, model in (("student", c), ("teacher", method.setup.teacher)):
        if model is not None and config.max_target_length > model.max_position:
            made_for = f"{model.max_position:,} tokens that the {who} was made for"
            say(f"note: max_target_length is beyond the {made_for}")
    for line in notes_on_heads(mesh, c, method.setup.teacher):
        say(line)
    say(f"loss on train_on={feed.examples.train_on}, normalised by the loss tokens of the global batch")
    if config.weight_dtype == "bfloat16":
        say("note: bfloat16 master weights do not take updates below some 1/256 of a weight")
    say(f"compute: {compute.dtype} on {jax.default_backend()}, {axes}; remat {compute.remat}")
    ids = "sampled token ids" if feed.examples.sampled_ids else "text, tokenised"
    if feed.sizes is not None:
        n = count_rows(feed.sizes, config.max_target_length, config.overlong)
        say(
            f"data: {n.rows:,} rows ({ids}), {n.loss_tokens:,} loss tokens of {n.tokens:,}; "
            f"{n.truncated:,} truncated, {n.dropped:,} dropped, {n.empty:,} without a loss token"
        )
        if n.truncated:
            limit = f"max_target_length={config.max_target_length}"
            say(f"note: {n.truncated:,} of {n.rows:,} rows are cut at {limit}; their ends are not learnt")
        if n.empty:
            left = f"{n.empty:,} of {n.rows:,} rows are left out"
            say(f"note: {left}, whose answers have no text, or begin after max_target_length")
        for line in _times_over(config, mesh, n, method.targets):
            say(line)
    else:
        say(f"data: {len(feed.examples):,} rows ({ids})")
    if done:
        say(f"resuming after step {done} of {config.steps}")


def _times_over(config: TrainConfig, mesh: Mesh, data: Counts, targets: TargetStore | None) -> Iterator[str]:
    """How often the steps read the data, and whether that is too often for a cache's draws."""
    rows = config.steps * rows_a_step(config, mesh)
    if config.packing:  # as if no row had room left
        times = rows * config.max_target_length / max(data.tokens, 1)
    else:
        times = rows / max(data.rows - data.dropped - data.empty, 1)
    at_most = "up to " if config.packing else ""
    yield f"steps: {config.steps:,}, which read the data {at_most}{times:.2f} times"
    few = targets is not None and targets.format == "sampled" and targets.k < ENOUGH_IDS
    if few and times > MOST_READS:
        yield (
            f"note: a student that reads sampled targets more than some {MOST_READS} times learns their "
            f"noise; take fewer steps, or capture with --k {ENOUGH_IDS} (docs/cached.md)"
        )
