"""The subcommands. Whatever is slow to import is imported by the one that needs it."""

import argparse
from pathlib import Path
from typing import Any

from distillax.cli import evaluation, parsing
from distillax.cli.output import say
from distillax.cli.parsing import SOURCE, Command
from distillax.errors import UserError


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    text = f"{SOURCE} (engine vllm: one of the first two)"
    parser.add_argument("--teacher-model", required=True, metavar="MODEL", help=text)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from distillax.config import GenerateConfig

    add = parser.add_argument
    _add_teacher(parser)
    parsing.add_data(parser, "--dataset-path", parsing.PROMPTS)
    add("--num-prompts", type=parsing.positive, metavar="N", help="the first N prompts (default: all)")
    add("--output-file", required=True, metavar="FILE", help="the .parquet file to write")
    add("--tokenizer-path", metavar="TOKENIZER", help="default: that of --teacher-model")
    parsing.add_token(parser)
    parsing.add_flags(parser, GenerateConfig)


def _generate(args: argparse.Namespace) -> None:
    from distillax.config import GenerateConfig
    from distillax.settings import load_config

    given = {name: getattr(args, name) for name in GenerateConfig.model_fields if hasattr(args, name)}
    overrides = [f"{name}={','.join(v) if isinstance(v, list) else v}" for name, v in given.items()]
    try:
        config = load_config(GenerateConfig, None, overrides)
    except UserError as error:
        raise UserError(parsing.with_flags(str(error), GenerateConfig)) from None
    columns = parsing.columns(args.data_columns)
    if len(columns) > 1:
        raise UserError(f"--data-columns {' '.join(columns)}: prompts are in one column; name that one")
    column = columns[0] if columns else None

    from distillax.data.prompts import load_prompts
    from distillax.teachers.stage import generate

    token = args.hf_access_token
    split = parsing.split_of(args.dataset_path, args.data_split)
    name = {"hf_name": args.data_name} if args.data_name else {}
    prompts = load_prompts(args.dataset_path, split, column, args.num_prompts, **name, hf_access_token=token)
    summary = generate(
        args.teacher_model,
        prompts,
        args.output_file,
        config,
        prompt_source={"prompts": args.dataset_path, **name, "split": split, "column": column},
        tokenizer_path=args.tokenizer_path,
        hf_access_token=token,
    )
    for line in summary.lines():
        say(line)
    say(f"{'file':<18}{args.output_file}")


def _capture_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_teacher(parser)
    parsing.add_data(parser, "--dataset", parsing.PAIRS)
    add("--output-dir", required=True, metavar="DIR", help="the folder to write")
    add(
        "--format",
        choices=("sampled", "topk"),
        default="sampled",
        help="sampled (default): unbiased draws; topk: the k likeliest ids and the mass of the rest",
    )
    add("--k", type=parsing.whole, metavar="N", help="ids a position (default: 19 if sampled, 64 for topk)")
    softmax = "of the teacher's softmax (default: 1)"
    add("--temperature", type=parsing.number, default=1.0, metavar="T", help=softmax)
    add("--seed", type=parsing.whole, default=0, metavar="N", help="of the draws (default: 0)")
    add(
        "--max-target-length",
        type=parsing.whole,
        default=2048,
        metavar="N",
        help="tokens of an example (2048)",
    )
    add("--train-on", choices=("assistant", "last", "all"), help="as in training")
    parsing.add_thinking(parser)
    parsing.add_dtype(parser)
    bits = "int8: the teacher's layers in 8 bits; embedded only (default: as stored)"
    add("--teacher-quantization", choices=("int8",), default="", help=bits)
    engines = ("embedded", "vllm", "server")
    add("--engine", choices=engines, default="embedded", help="what runs the teacher (default: embedded)")
    urls = "URL(s) of vLLM servers, for --engine server"
    add("--teacher-url", nargs="+", action="extend", default=[], metavar="URL", help=urls)
    add("--teacher-name", metavar="NAME", help="server: name of the model there (default: the one it serves)")
    add("--tp-size", type=parsing.positive, metavar="N", help="vLLM: tensor parallelism")
    add("--max-model-len", type=parsing.positive, metavar="N", help="vLLM: context length")
    add("--max-num-seqs", type=parsing.positive, metavar="N", help="vLLM, server: examples at once (16)")
    add("--gpu-memory-utilization", type=parsing.number, metavar="SHARE", help="vLLM: of the device's memory")
    add("--tokenizer-path", metavar="TOKENIZER", help="default: that of --teacher-model")
    parsing.add_token(parser)


def _capture(args: argparse.Namespace) -> None:
    from distillax.teachers.capture import capture
    from distillax.teachers.capture_config import CaptureConfig

    given = {name: getattr(args, name) for name in CaptureConfig.__dataclass_fields__}
    given["teacher_url"] = tuple(args.teacher_url)
    summary = capture(
        args.teacher_model,
        args.dataset,
        args.output_dir,
        CaptureConfig(**given),
        split=parsing.split_of(args.dataset, args.data_split),
        columns=parsing.columns(args.data_columns) or None,
        hf_name=args.data_name,
        tokenizer_path=args.tokenizer_path,
        hf_access_token=args.hf_access_token,
    )
    for line in summary.lines():
        say(line)
    say(f"{'folder':<18}{args.output_dir}")


def _convert_arguments(parser: parsing.Parser) -> None:
    kinds = parser.add_subparsers(metavar="to-orbax|to-hf", dest="to", required=True)
    for name, text in (
        ("to-orbax", "write a checkpoint for load_parameters_path: DIR, DIR/0 and DIR/0/items all name it"),
        ("to-hf", "write a Hugging Face folder, as transformers and vLLM load it"),
    ):
        kind = parsing.add_parser(kinds, name, text, f"distillax convert {name} MODEL DIR")
        parsing.add_source_and_folder(kind)
        kind.set_defaults(parser=kind)
        kind.words = parser.words[1:]


def _convert(args: argparse.Namespace) -> None:
    from distillax.checkpoints.convert import to_hf, to_orbax

    write = to_orbax if args.to == "to-orbax" else to_hf
    say(write(args.source, args.folder, dtype=args.dtype, hf_access_token=args.hf_access_token))


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parsing.add_source_and_folder(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    rule = "keep N layers: the first, the last, and others evenly between them"
    which.add_argument("--layers", type=parsing.whole, metavar="N", help=rule)
    named = "keep these layers, counted from 0"
    which.add_argument("--keep", type=parsing.whole_numbers, metavar="0,1,5", help=named)


def _prune(args: argparse.Namespace) -> None:
    from distillax.checkpoints.prune import prune

    kept = prune(
        args.source,
        args.folder,
        layers=args.layers,
        keep=args.keep,
        dtype=args.dtype,
        hf_access_token=args.hf_access_token,
    )
    say(f"{args.folder}: layers {', '.join(map(str, kept))}")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from distillax.config import TrainConfig

    parsing.add_keys(parser, TrainConfig)


def _config(command: str, words: list[str]) -> Any:
    """The config of a command that reads recipes."""
    from distillax.config import PipelineConfig, PlanConfig, TrainConfig
    from distillax.settings import load_config

    of = {"distillax train": TrainConfig, "distillax run": PipelineConfig, "distillax plan": PlanConfig}
    return load_config(of[command], *parsing.recipe_and_overrides(words), of)


def _train(args: argparse.Namespace) -> None:
    config = _config("distillax train", args.words)
    from distillax.train.loop import train

    train(config, say)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from distillax.config import PlanConfig

    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parsing.add_keys(parser, PlanConfig)


def _plan(args: argparse.Namespace) -> None:
    from distillax.run_dir import write_json

    parsing.check_output("--json", args.json)
    config = _config("distillax plan", args.words)
    from distillax.plan.plan import plan

    found = plan(config, say)
    say(*found.lines())
    if args.json:
        write_json(args.json, found.as_dict())


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    from distillax.config import PipelineConfig

    parsing.add_keys(parser, PipelineConfig)


def _run(args: argparse.Namespace) -> None:
    config = _config("distillax run", args.words)
    from distillax.pipeline import run

    run(config, say)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run folders to show or compare")
    add("--output", type=Path, metavar="FILE", help="the .html page (default: report.html of the one run)")


def _report(args: argparse.Namespace) -> None:
    from distillax.report.page import write_page
    from distillax.run_dir import REPORT

    if not args.output and len(args.run_dirs) > 1:
        raise UserError("several runs share no folder for the page; give --output page.html")
    output = args.output or args.run_dirs[0] / REPORT
    write_page(args.run_dirs, output)
    say(output)


COMMANDS = {
    "generate": Command(
        "have a teacher answer prompts; the answers become a data set",
        "distillax generate --teacher-model HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        "      --dataset-path prompts.jsonl --num-prompts 100 --output-file answers.parquet",
        _generate_arguments,
        _generate,
    ),
    "capture": Command(
        "keep what a teacher expects after each token of a data set, to train without the teacher",
        "distillax capture --teacher-model HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        "      --dataset answers.parquet --output-dir targets",
        _capture_arguments,
        _capture,
    ),
    "convert": Command(
        "copy a model into another format, bit by bit the same",
        "distillax convert to-orbax meta-llama/Llama-3.1-8B-Instruct student\n"
        "  distillax convert to-hf runs/my-run exported",
        _convert_arguments,
        _convert,
    ),
    "prune": Command(
        "make a student of some of a model's layers",
        "distillax prune HuggingFaceTB/SmolLM2-135M-Instruct student --layers 12",
        _prune_arguments,
        _prune,
    ),
    "train": Command(
        "train a student; the same command again goes on from its last checkpoint",
        "distillax train recipes/sft.yml run_name=my-run load_parameters_path=student \\\n"
        "      hf_path=parquet hf_train_files=answers.parquet steps=200",
        _train_arguments,
        _train,
    ),
    "plan": Command(
        "compile a recipe for devices that are not here: does it fit, and what does it cost",
        "distillax plan recipes/llama3.1-8b-sft-v6e-8.yml topology=v6e-8",
        _plan_arguments,
        _plan,
    ),
    "evaluate": Command(
        "measure a student on held-out conversations",
        "distillax evaluate --student exported --teacher HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
        "      --data held_out.parquet --json scores.json",
        evaluation.add_arguments,
        evaluation.run,
    ),
    "run": Command(
        "run the whole pipeline of a recipe, but for what is done already",
        "distillax run recipes/demo.yml teacher=MODEL prompts.path=prompts.jsonl run_name=r2 train.steps=60",
        _run_arguments,
        _run,
    ),
    "report": Command(
        "write one HTML page about a run, or several side by side",
        "distillax report runs/one runs/two --output page.html",
        _report_arguments,
        _report,
    ),
}
