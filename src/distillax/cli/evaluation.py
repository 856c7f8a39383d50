"""distillax evaluate."""

import argparse
import json
from pathlib import Path
from typing import Any

from distillax.cli import parsing
from distillax.cli.output import say
from distillax.cli.parsing import SOURCE
from distillax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--student", required=True, metavar="MODEL", help=SOURCE)
    add("--teacher", metavar="MODEL", help="measure the distance to this model, too (same tokenizer)")
    add("--teacher-cache", metavar="DIR", help="instead: what `distillax capture` wrote of the same data")
    parsing.add_data(parser, "--data", parsing.PAIRS)
    add(
        "--max-target-length", type=parsing.positive, default=2048, metavar="N", help="tokens in a row (2048)"
    )
    parsing.add_dtype(parser)
    add("--tokenizer-path", metavar="TOKENIZER", help="for a model without one, or without a chat template")
    add("--answers", type=parsing.positive, default=0, metavar="N", help="show greedy answers to N prompts")
    add("--max-new-tokens", type=parsing.positive, metavar="N", help="of such an answer (128)")
    parsing.add_thinking(parser)
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parsing.add_token(parser)


def run(args: argparse.Namespace) -> None:
    from distillax.run_dir import write_atomically

    parsing.check_output("--json", args.json)
    if args.max_new_tokens and not args.answers:
        raise UserError("--max-new-tokens has no effect without --answers; leave it out")
    if args.teacher and args.teacher_cache:
        raise UserError("--teacher and --teacher-cache both name a teacher; leave one of them out")
    from distillax.evaluate import evaluate
    from distillax.report import tables

    models = _models(args)
    scores = evaluate(
        models["student"],
        args.data,
        teacher=models.get("teacher"),
        teacher_cache=args.teacher_cache,
        split=parsing.split_of(args.data, args.data_split),
        columns=parsing.columns(args.data_columns) or None,
        enable_thinking=args.enable_thinking,
        hf_name=args.data_name,
        max_target_length=args.max_target_length,
        dtype=args.dtype,
        hf_access_token=args.hf_access_token,
    )
    results: dict[str, Any] = scores.as_dict()
    say(*tables.figures(results))
    if args.json:  # before the answers, which take longer
        write_atomically(args.json, json.dumps(results, indent=2) + "\n")
    if args.answers:
        results["answers"] = _answers(models, args)
        for answer in results["answers"]:
            say("", *(f"{name + ':':<10}{' '.join(text.split())}" for name, text in answer.items()))
    if args.json:
        write_atomically(args.json, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _models(args: argparse.Namespace) -> dict[str, Any]:
    """The student, and the teacher if there is one, with the tokenizer that is given for those without."""
    from distillax.api import load
    from distillax.checkpoints.source import find
    from distillax.evaluate import with_tokenizer
    from distillax.models import tokenizers
    from distillax.models.backend import compute_dtype

    names = {"student": args.student} | ({"teacher": args.teacher} if args.teacher else {})
    token = args.hf_access_token
    if args.tokenizer_path:
        found = (find(source, hf_access_token=token, weights=False) for source in names.values())
        if all(tokenizers.template_of(source.tokenizer_or_none()) for source in found):
            raise UserError(
                "--tokenizer-path has no use, as no model lacks a tokenizer or a template; leave it out"
            )
    # Answers are computed in what is fast here.
    dtypes = {compute_dtype(args.dtype), *([compute_dtype("auto")] if args.answers else [])}
    products = "" if "float32" in dtypes else dtypes.pop()
    return {
        name: with_tokenizer(
            load(source, hf_access_token=token, products=products), args.tokenizer_path, token
        )
        for name, source in names.items()
    }


def _answers(models: dict[str, Any], args: argparse.Namespace) -> list[dict[str, str]]:
    """Greedy answers of each model to the first prompts of the data."""
    from distillax.data.examples import generated_with
    from distillax.data.prompts import load_conversations
    from distillax.evaluate import first_prompts

    columns = parsing.columns(args.data_columns)
    where: dict[str, Any] = {"hf_name": args.data_name, "hf_access_token": args.hf_access_token}
    prompts = first_prompts(
        args.data, args.answers, split=args.data_split, column=(*columns, None)[0], **where
    )
    thinking = args.enable_thinking
    if thinking is None:  # as the answers in the data were, if a teacher wrote them
        names = load_conversations(args.data, args.data_split, columns, **where).names
        thinking = generated_with(names).get("enable_thinking")
    sampling = {"max_new_tokens": args.max_new_tokens or 128, "max_length": args.max_target_length}
    texts = {
        name: model.generate(prompts, enable_thinking=thinking, label=f"answers ({name})", **sampling)
        for name, model in models.items()
    }
    return [
        {"prompt": prompt[-1]["content"]} | {name: answers[i] for name, answers in texts.items()}
        for i, prompt in enumerate(prompts)
    ]
