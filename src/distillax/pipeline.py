"""`distillax run`: prune, generate, train, match, export, evaluate, report; what is done is skipped.

The evaluation comes after the export, and reads it: its figures are those of the model that one takes away.
`distillax.stages` knows what is done.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distillax.api import Model, load
from distillax.checkpoints.convert import to_hf
from distillax.checkpoints.prune import prune
from distillax.checkpoints.source import Source, choose_tokenizer, find
from distillax.config import PipelineConfig, TrainConfig
from distillax.data.prompts import Prompt, load_prompts, split_prompts
from distillax.data.rows import refuse_split_of_file
from distillax.errors import UserError
from distillax.evaluate import Expected, evaluate, finished_prompts, with_tokenizer
from distillax.models import tokenizers
from distillax.models.families import param_specs
from distillax.models.spec import count_params
from distillax.report import tables
from distillax.report.page import write_page
from distillax.run_dir import MAY_CHANGE, RunDir, read_json, write_atomically, write_json
from distillax.settings import dump
from distillax.stages import RESULTS, Stages
from distillax.teachers.stage import generate
from distillax.train.loop import train
from distillax.train.method import check_tokenizer, matched_layers, refuse_idle_keys

Say = Callable[[str], None]
_SCORES = "\n## Scores\n\n"  # in the model card
# Keys of `generate` that say how the answers are made, not which: they may change on the way.
_HOW_NOT_WHAT = {
    "teacher_url",
    "max_num_batched_tokens",
    "max_model_len",
    "tp_size",
    "gpu_memory_utilization",
}


def run(config: PipelineConfig, say: Say = print) -> dict[str, Any]:
    """Runs the recipe and returns what results.json holds. The same call again does only what is missing.

    Raises UserError for whatever is wrong with the recipe or with what it names.
    """
    if not config.teacher:
        raise UserError(
            "teacher is not set; give a Hugging Face folder or hub id, a GGUF file or a checkpoint"
        )
    if not config.prompts.path:
        raise UserError(
            "prompts.path is not set; give a hub id, a folder, or a .parquet, .json or .jsonl file"
        )
    _check_trainings(config)
    prompts = _read_prompts(config)
    if (asked := config.prompts.num_prompts) > (left := len(prompts[0])):
        say(f"prompts: {left:,} to train on, as there are no more; prompts.num_prompts={asked}")
    wait = say if "SLURM_RESTART_COUNT" in os.environ else None
    folder = config.base_output_directory, config.run_name, dump(config)
    with RunDir(*folder, check=False, wait=wait) as directory:
        pipeline = _Pipeline(config, directory, say, *prompts)
        pipeline.prune()
        pipeline.generate()
        pipeline.train()
        pipeline.match()
        pipeline.control()
        pipeline.export()
        results = pipeline.evaluate()
        write_page([directory.path], directory.report)
    for line in tables.text(results):
        say(line)
    say(f"report: {directory.report}")
    say(f"model:  {directory.path / 'export'}")
    return results


def _check_trainings(config: PipelineConfig) -> None:
    """What would else come out after hours of generation, or of training."""
    for section in (config.train, config.match):
        refuse_idle_keys(section)
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    source = find(config.student.source or config.teacher, hf_access_token=token)
    _check_teacher(config, token)
    own, path = source.tokenizer_or_none(), _tokenizer_path(config, source)
    tokenizer = choose_tokenizer(own, source.name, path, "teacher", token)
    if not tokenizers.template_of(tokenizer):
        raise UserError(f"neither {source.name} nor the teacher has a chat template; give one of them one")
    if not config.match.steps:
        return
    teacher = find(config.teacher, hf_access_token=token)
    check_tokenizer(tokenizer, teacher)
    layers = config.student.layers or len(config.student.keep) or source.config.layers
    matched_layers(config.match, layers, teacher.config.layers)


def _check_teacher(config: PipelineConfig, token: str | None) -> None:
    """Raises UserError for a teacher that cannot be asked as the recipe says, or not be measured."""
    teacher = find(config.teacher, hf_access_token=token, weights=False)
    own = teacher.tokenizer_or_none()
    if own is None:
        raise UserError(
            f"teacher: {teacher.name} has no tokenizer, which text goes through; put one beside it"
        )
    if not tokenizers.template_of(own):
        if config.generate.use_chat_template:
            raise UserError(
                f"teacher: {teacher.name} has no chat template; set generate.use_chat_template=false to put "
                "the bare text to it, or give a chat model"
            )
        choose_tokenizer(own, teacher.name, config.student.source, "student.source", token)


def _tokenizer_path(config: PipelineConfig, student: Source) -> str:
    """The teacher, whose chat template a student without one learns: a base model of the same family."""
    own = student.tokenizer_or_none()
    return "" if own is not None and tokenizers.template_of(own) else config.teacher


def _read_prompts(config: PipelineConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Those to learn from, and those to measure with. First of all, as they may be missing, or too few."""
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    keys = config.prompts
    refuse_split_of_file(keys.path, keys.split, f"prompts.split={keys.split}")
    found = load_prompts(keys.path, keys.split, keys.column or None, hf_name=keys.name, hf_access_token=token)
    return split_prompts(found, keys.num_prompts, keys.held_out)


class _Pipeline:
    """The stages of one run directory. Each leaves its fingerprint for those after it."""

    def __init__(
        self,
        config: PipelineConfig,
        directory: RunDir,
        say: Say,
        prompts: list[Prompt],
        held_out: list[Prompt],
    ):
        self.config, self.path, self.say = config, directory.path, say
        self.prompts, self.held_out = prompts, held_out
        self.token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
        self.stages = Stages(self.path, say)

    def prune(self) -> None:
        """The student before training: a cut of its source, or the source itself."""
        student = self.config.student
        source = student.source or self.config.teacher
        target = self.path / "student"
        cut = bool(student.layers or student.keep)
        self.student = str(target) if cut else source

        def work() -> None:
            if not cut:
                return
            kept = prune(
                source,
                self.student,
                layers=student.layers or None if not student.keep else None,
                keep=list(student.keep) or None,
                hf_access_token=self.token,
                replace=True,
            )
            self.say(f"student: layers {', '.join(map(str, kept))} of {source}")

        own = [source, self._identity(source)]
        self.stages.do("prune", student, own, [], target if cut else self.path, work)

    def generate(self) -> None:
        """The teacher's answers: train.parquet, and held_out.parquet to measure with."""
        prompts, held_out = self.prompts, self.held_out

        def work() -> None:
            self.stages.begin("generate", self.path / "data")
            summary = None
            for name, part in (("held_out", held_out), ("train", prompts)):
                output = self.path / "data" / f"{name}.parquet"
                output.parent.mkdir(exist_ok=True)
                summary = generate(
                    self.config.teacher,
                    part,
                    output,
                    self.config.generate,
                    prompt_source={"prompts": self.config.prompts.path, "part": name},
                    hf_access_token=self.token,
                )
                self.say(
                    f"{name}: {summary.answers:,} answers, {summary.truncated:,} of them cut off at "
                    f"max_new_tokens, {summary.tokens_per_second:,.0f} tokens per second"
                )
                if summary.failed:
                    raise UserError(
                        f"{summary.failed} requests to the teacher failed; run again to retry them"
                    )
            assert summary is not None
            write_json(self.path / "data" / "summary.json", {**asdict(summary), "held_out": len(held_out)})

        teacher, output = self.config.teacher, self.path / "data" / "summary.json"
        own = [teacher, self._identity(teacher), *(p.prompt_id for p in (*prompts, *held_out))]
        self.stages.do("generate", self.config.generate, own, [], output, work, leave_out=_HOW_NOT_WHAT)

    def train(self) -> None:
        """The student fine-tuned on the answers."""
        self._train("train", self.config.train, self.student, ["prune", "generate"])

    def match(self) -> None:
        """The student matched with the teacher's logits, from where the training left it."""
        if self.config.match.steps:
            self._train("match", self.config.match, str(self.path / "train"), ["train"])

    def control(self) -> None:
        """Another student, fine-tuned on as many tokens as the first was trained and matched on."""
        if self.config.evaluate.sft_control:
            train, match = self.config.train, self.config.match
            steps = train.steps + math.ceil(match.steps * _step_tokens(match) / _step_tokens(train))
            config = train.model_copy(update={"steps": steps})
            self._train("control", config, self.student, ["prune", "generate"])

    @property
    def trained(self) -> str:
        """The stage that leaves the student as it is taken away."""
        return "match" if self.config.match.steps else "train"

    def _train(self, name: str, section: TrainConfig, student: str, inputs: list[str]) -> None:
        """A training run in the folder `name`."""
        owned = {
            "run_name": name,
            "base_output_directory": str(self.path),
            "load_parameters_path": student,
            "tokenizer_path": _tokenizer_path(self.config, find(student, hf_access_token=self.token)),
            "hf_path": "parquet",
            "hf_train_files": str(self.path / "data" / "train.parquet"),
            "hf_eval_files": str(self.path / "data" / "held_out.parquet") * (section.eval_interval > 0),
            "hf_access_token": self.config.hf_access_token,
        }
        if section.method != "sft":
            owned["teacher_load_parameters_path"] = self.config.teacher
        config = TrainConfig.model_validate({**section.model_dump(), **owned})
        output = self.path / f"{name}.json"

        def work() -> None:
            self.stages.begin(name, self.path / name)
            result = train(config, self.say)
            lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
            seconds = sum(line.get("step_seconds", 0.0) for line in lines)
            tokens = sum(line.get("weight_sum", 0.0) for line in lines)
            write_json(output, {"steps": result.step, "seconds": seconds, "loss_tokens": tokens})

        self.stages.do(name, section, [], inputs, output, work, leave_out=MAY_CHANGE)

    def export(self) -> None:
        """The student in the Hugging Face format, bfloat16, as transformers and vLLM load it."""
        target = self.path / "export"

        def work() -> None:
            student = self.config.student
            teacher, source = Path(self.config.teacher), Path(student.source or self.config.teacher)
            layers = student.layers or len(student.keep)
            cut = f", cut to {layers} layers" if layers else ""
            to_hf(
                self.path / self.trained,
                target,
                dtype="bfloat16",
                title=self.path.name,
                source_name=f"{source.name}{cut}, distilled from {teacher.name}",
                datasets=[self.config.prompts.path],
                replace=True,
            )

        self.stages.do("export", None, [], [self.trained], target / "config.json", work)

    def evaluate(self) -> dict[str, Any]:
        def work() -> None:
            results = self._results()
            write_json(self.path / RESULTS, results)
            card = self.path / "export" / "README.md"
            if card.is_file():
                # In the place of those of an earlier evaluation. Sections that somebody added stay.
                before, _, after = card.read_text(encoding="utf-8").partition(_SCORES)
                _, heading, rest = after.partition("\n## ")
                scores = "\n".join(tables.markdown(results)) + "\n"
                write_atomically(card, before + _SCORES + scores + heading + rest)

        inputs = ["export", *(["control"] if self.config.evaluate.sft_control else [])]
        self.stages.do("evaluate", self.config.evaluate, [], inputs, self.path / RESULTS, work)
        return read_json(self.path / RESULTS)

    def _results(self) -> dict[str, Any]:
        sources = {"teacher": self.config.teacher, "student before": self.student}
        if self.config.match.steps:
            sources["after SFT"] = str(self.path / "train")
        sources["student after"] = str(self.path / "export")
        if self.config.evaluate.sft_control:
            sources["SFT alone, as long"] = str(self.path / "control")
        held_out = self.path / "data" / "held_out.parquet"
        prompts = finished_prompts(str(held_out), self.config.evaluate.answers)
        settings = self.config.generate
        teacher = load(self.config.teacher, hf_access_token=self.token, products="auto")
        # Of a base and a chat model, whichever is the teacher, both are measured with the one's template.
        lender = (
            self.config.teacher if tokenizers.template_of(teacher.tokenizer) else self.config.student.source
        )
        teacher = with_tokenizer(teacher, lender, self.token)
        scores, models, expected = {}, {}, Expected()
        answers = [{"prompt": prompt[-1]["content"]} for prompt in prompts]
        for name, path in sources.items():
            model = teacher if name == "teacher" else load(path, hf_access_token=self.token, products="auto")
            model = with_tokenizer(model, lender, self.token)
            same = tokenizers.same(model.tokenizer, teacher.tokenizer)
            measured = evaluate(
                model,
                str(held_out),
                teacher=teacher if same else None,
                max_target_length=max(2048, settings.max_target_length),
                label=f"evaluate {name}",
                expected=expected,
            )
            scores[name] = measured.as_dict()
            models[name] = describe(model)
            texts = model.generate(
                prompts,
                enable_thinking=settings.enable_thinking,
                label=f"answers ({name})",
                max_new_tokens=settings.max_new_tokens,
                max_length=settings.max_target_length,
            )
            for answer, text in zip(answers, texts, strict=True):
                answer[name] = text
            del model  # before the next one is read
        return {
            "title": self.path.name,
            "models": models,
            "data": read_json(self.path / "data" / "summary.json"),
            "training": {
                name: read_json(self.path / f"{name}.json")
                for name in ("train", "match", "control")
                if (self.path / name).is_dir() and name in self.stages
            },
            "scores": scores,
            "answers": answers,
        }

    def _identity(self, name: str) -> list[Any]:
        """What changes when a model does, its tokenizer and its stop tokens included."""
        source = find(name, hf_access_token=self.token)
        beside = {file: hashlib.sha256(data).hexdigest()[:16] for file, data in source.sidecars().items()}
        return [source.identity(), beside]


def _step_tokens(section: TrainConfig) -> int:
    """The most tokens that a step takes on one device: a measure of those of all, as long as the axes of both
    trainings are the same."""
    rows = section.per_device_batch_size * section.gradient_accumulation_steps
    return rows * section.max_target_length


def describe(model: Model) -> dict[str, Any]:
    c = model.config
    return {
        "name": model.name,
        "family": c.family,
        "layers": c.layers,
        "parameters": count_params(param_specs(c), c.layers),
    }
