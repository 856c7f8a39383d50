"""The models of a `distillax run` side by side: their scores on the held-out answers, and what they answer.

Where the teacher's weights are not read, its scores and the distances to it come from a cache of what it
expects of these answers, if there is one, and its answers are those that it gave when it was asked.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from distillax.api import load
from distillax.checkpoints.source import find
from distillax.config import PipelineConfig
from distillax.errors import UserError
from distillax.evaluate import Expected, evaluate, finished_answers, with_tokenizer
from distillax.models import tokenizers
from distillax.models.families import ModelConfig, param_specs
from distillax.models.spec import count_params

TEACHER = "teacher"
_AS_ASKED = "the teacher's answers are those that it gave when it was asked, the students' are greedy"


def compare(
    config: PipelineConfig,
    students: dict[str, str],
    held_out: Path,
    *,
    weights: bool,
    cache: Path | None,
    token: str | None,
) -> dict[str, Any]:
    """`models`, `scores` and `answers` of results.json, a model a name, and a `note` where no teacher is run.

    `weights`: the teacher's are read. Else `cache` may hold what it expects of the answers in `held_out`.
    """
    settings = config.generate
    shown = finished_answers(str(held_out), config.evaluate.answers)
    answers = [{"prompt": prompt[-1]["content"]} for prompt, _ in shown]
    theirs = find(config.teacher, hf_access_token=token, weights=weights)
    # Of a base and a chat model, whichever is the teacher, both are measured with the one's template.
    chatty = tokenizers.template_of(theirs.tokenizer_or_none())
    lender = config.teacher if chatty else config.student.source
    scores: dict[str, Any] = {}
    models: dict[str, Any] = {}
    teacher, expected = None, Expected()
    if weights:
        teacher = with_tokenizer(load(config.teacher, hf_access_token=token, products="auto"), lender, token)
        students = {TEACHER: config.teacher, **students}
    else:
        with suppress(UserError):  # a server may have one that is not known here
            models[TEACHER] = describe(theirs.name, theirs.config)
        answers = [{**answer, TEACHER: text} for answer, (_, text) in zip(answers, shown, strict=True)]
    for name, path in students.items():
        own = teacher if name == TEACHER else load(path, hf_access_token=token, products="auto")
        model = with_tokenizer(own, lender, token)
        same = teacher is not None and tokenizers.same(model.tokenizer, teacher.tokenizer)
        measured = evaluate(
            model,
            str(held_out),
            teacher=teacher if same else None,
            teacher_cache=cache,
            max_target_length=longest_row(config),
            label=f"evaluate {name}",
            expected=expected,
        )
        scores[name] = measured.as_dict()
        models[name] = describe(model.name, model.config)
        texts = model.generate(
            [prompt for prompt, _ in shown],
            enable_thinking=settings.enable_thinking,
            label=f"answers ({name})",
            max_new_tokens=settings.max_new_tokens,
            max_length=settings.max_target_length,
        )
        for answer, text in zip(answers, texts, strict=True):
            answer[name] = text
        del own, model  # before the next one is read
    results = {"models": models, "scores": scores, "answers": answers}
    results |= _by_cache(scores) if cache else {}
    if not weights and answers:
        results["note"] = "; ".join(filter(None, [results.get("note"), _AS_ASKED]))
    return results


def longest_row(config: PipelineConfig) -> int:
    """Tokens of a row that is measured, at most."""
    return max(2048, config.generate.max_target_length)


def _by_cache(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores with the teacher's, of which the cache says the NLL, and what there is to note."""
    notes = [one.pop("note") for one in scores.values()]
    nlls = [one.pop("teacher_nll", None) for one in scores.values()]
    one, nll = next(iter(scores.values())), nlls[0]  # all are of the same tokens and answers
    if nll is None:
        return {"note": notes[0]}
    own = {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": one["bits_per_byte"] * nll / one["nll"],
        **{name: one[name] for name in ("tokens", "left_out_long", "without_answer")},
        "kl_teacher_student": 0.0,
        **({"top1_agreement": 1.0} if "top1_agreement" in one else {}),
    }
    return {"note": notes[0], "scores": {TEACHER: own, **scores}}


def describe(name: str, config: ModelConfig) -> dict[str, Any]:
    return {
        "name": name,
        "family": config.family,
        "layers": config.layers,
        "parameters": count_params(param_specs(config), config.layers),
    }
