"""The evaluation of a training run, now and then and at its end, on data that it does not learn from."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from distillax.config import TrainConfig
from distillax.data.examples import Examples
from distillax.data.rows import BUILDERS
from distillax.data.targets import TargetStore
from distillax.errors import UserError, about
from distillax.models import tokenizers
from distillax.models.spec import Tree
from distillax.parallel import hosts
from distillax.progress import best_before
from distillax.run_dir import RunDir, read_metrics
from distillax.train.feed import COUNTED_ROWS, Feed, make_feed, read_examples
from distillax.train.objectives import Setup, measure_batch


def refuse_idle_evaluation(config: TrainConfig) -> None:
    """Raises UserError for keys of the evaluation of which one lacks the other."""
    data = config.eval_split or config.hf_eval_files
    if config.eval_cache_path and not (config.eval_interval > 0 and data):
        raise UserError(
            "eval_cache_path is set, but never used; set eval_interval, and eval_split or hf_eval_files"
        )
    if config.eval_interval > 0 and not data:
        raise UserError(
            "eval_interval is set without anything to evaluate on; set eval_split or hf_eval_files"
        )
    if config.eval_interval <= 0 and data:
        key = "eval_split" if config.eval_split else "hf_eval_files"
        raise UserError(f"{key} is set, but never used; set eval_interval")
    named = config.hf_path in BUILDERS and not Path(config.hf_path).is_dir()
    if data and named and not config.hf_eval_files:
        raise UserError(
            f"eval_split={config.eval_split}: hf_path={config.hf_path} has no splits, but files; name "
            "those to evaluate on with hf_eval_files"
        )


def owes_evaluation(config: TrainConfig, run: RunDir, done: int) -> bool:
    """Whether step `done`, the last one saved, was to be measured, and was not: the run was ended there."""
    if config.eval_interval < 1 or not done or (done % config.eval_interval and done < config.steps):
        return False
    lines = read_metrics(run.metrics)
    return not any(line["step"] == done and "eval_loss" in line for line in lines)


def past_best(run: Path) -> str | None:
    """The line about a finished run that was better on held-out data before its end, and what to do."""
    if (found := best_before(read_metrics(run / "metrics.jsonl"))) is None:
        return None
    step, said = found
    kept = run / "checkpoints" / str(step)
    then = f"take {kept}, or try" if kept.is_dir() else "try fewer steps, or"
    return f"note: {said}, a sign of overfitting; {then} a lower learning_rate"


def read_held_out(
    config: TrainConfig, tokenizer: Any, token: str | None, trained_on: Examples, say: Callable[[str], None]
) -> Examples | None:
    """The data to evaluate on, if there is to be an evaluation. Says of a file that it is trained on, too."""
    if config.eval_interval < 1:
        return None
    found = read_examples(config, tokenizer, config.eval_split or "test", config.hf_eval_files, token)
    files, others = (
        [path.resolve() for name in examples.conversations.names if (path := Path(name)).is_file()]
        for examples in (trained_on, found)
    )
    if both := sorted(set(files) & set(others)):
        say(f"note: {both[0]} is trained on, and measured as held-out data")
    return found


def open_targets(
    folder: str | Path, vocab_size: int, tokenizer: Any, limit: int | None = None
) -> TargetStore:
    """A cache to measure a student of so many ids and this tokenizer by. Raises UserError if it does not fit
    them, or has not the targets of rows of `limit` tokens."""
    store = TargetStore.open(folder, vocab_size)
    if store.manifest["temperature"] != 1:
        raise UserError(
            f"{store.directory} was captured at temperature {store.manifest['temperature']:g}, and KL is "
            "measured at 1; capture the data to evaluate on with --temperature 1"
        )
    fingerprint = tokenizers.fingerprint(tokenizer)
    store.check(tokenizer_fingerprint=fingerprint, temperature=1.0, max_target_length=limit)
    return store


def eval_targets(
    config: TrainConfig, setup: Setup, tokenizer: Any, trained_on: TargetStore | None
) -> TargetStore | None:
    """What the teacher expects of the data to evaluate on, if a cache of it is given. Raises UserError if it
    is of another teacher than the one that is trained on."""
    if not config.eval_cache_path:
        return None
    with about("eval_cache_path"):
        store = open_targets(config.eval_cache_path, setup.ids, tokenizer, config.max_target_length)
    hosts.same_for_all(store.manifest["sha256"], "eval_cache_path", "the same files")
    theirs = [found.manifest for found in (store, trained_on) if found is not None]
    known = [kept["teacher_identity"] for kept in theirs if kept["engine"] != "server"]  # it does not say
    if known[1:] and known[0] != known[1]:
        raise UserError(
            f"eval_cache_path is of other weights ({theirs[0]['teacher']}) than teacher_cache_path "
            f"({theirs[1]['teacher']}); capture both from one teacher"
        )
    return store


def held_out_feed(
    config: TrainConfig, setup: Setup, held_out: Examples | None, mesh: Mesh, targets: TargetStore | None
) -> Feed | None:
    """Batches of the data to evaluate on. Raises UserError for a row that cannot be encoded, or that
    `targets` lack, and where none can be measured: now, and not at the first evaluation."""
    if held_out is None:
        return None
    key = "hf_eval_files" if config.hf_eval_files else "eval_split"
    try:
        feed = make_feed(config, mesh, replace(held_out, ids=setup.ids), COUNTED_ROWS, targets)
        next(feed.evaluation())
    except UserError as error:
        raise UserError(f"{error} ({key} names the data to evaluate on)") from None
    return feed


def make_evaluation(
    feed: Feed | None, setup: Setup, teacher: Tree | None
) -> Callable[[Tree], dict[str, float]] | None:
    """A function of the parameters that measures the held-out data, if there are any: NLL,
    and, with a teacher in memory, KL(teacher || student) and top-1 agreement, or what a cache says of
    them."""
    if feed is None:
        return None
    if feed.targets is not None:  # as `distillax evaluate` has it, whatever is trained on
        setup = replace(setup, vocabulary=min(setup.ids, feed.targets.manifest["vocab_size"]))

    def evaluate(params: Tree) -> dict[str, float]:
        total: Counter[str] = Counter()
        for batch in feed.evaluation():
            _, tokens, terms = measure_batch(params, teacher, batch, None, setup=setup)
            total.update({name: float(value) for name, value in {**terms, "tokens": tokens}.items()})
        tokens, total["loss"] = total.pop("tokens"), total.pop("nll")
        return {"eval_tokens": tokens, **{f"eval_{name}": value / tokens for name, value in total.items()}}

    return evaluate
