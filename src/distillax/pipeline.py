"""`distillax run`: prune, generate, capture, train, match, export, evaluate, report; what is done is skipped.

The evaluation comes after the export, and reads it: its figures are those of the model that one takes away.
`distillax.stages` knows what is done.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from distillax.checkpoints.card import called
from distillax.checkpoints.convert import to_hf
from distillax.checkpoints.prune import prune
from distillax.checkpoints.source import find
from distillax.comparison import compare, longest_row
from distillax.config import PipelineConfig, TrainConfig
from distillax.data.prompts import Prompt
from distillax.errors import UserError
from distillax.preflight import (
    by_keys,
    capture_config,
    check_trainings,
    is_served,
    matched,
    read_prompts,
    tokenizer_path,
    with_keys,
)
from distillax.report import tables
from distillax.report.page import write_page
from distillax.run_dir import MAY_CHANGE, RunDir, read_json, read_metrics, write_atomically, write_json
from distillax.settings import dump
from distillax.stages import RESULTS, Stages
from distillax.teachers.capture import capture, try_server
from distillax.teachers.dataset import Summary
from distillax.teachers.stage import generate
from distillax.train.loop import train

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
    check_trainings(config)
    prompts = read_prompts(config)
    if (asked := config.prompts.num_prompts) > (left := len(prompts[0])):
        say(f"prompts: {left:,} to train on, as there are no more; prompts.num_prompts={asked}")
    wait = say if "SLURM_RESTART_COUNT" in os.environ else None
    folder = config.base_output_directory, config.run_name, dump(config)
    with RunDir(*folder, check=False, wait=wait) as directory:
        pipeline = _Pipeline(config, directory, say, *prompts)
        pipeline.prune()
        pipeline.generate()
        pipeline.capture()
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
                    f"max_new_tokens, {_how_made(summary)}"
                )
                if summary.failed:
                    raise UserError(
                        f"{summary.failed} requests to the teacher failed; run again to retry them"
                    )
            assert summary is not None
            write_json(self.path / "data" / "summary.json", {**asdict(summary), "held_out": len(held_out)})

        teacher, output = self.config.teacher, self.path / "data" / "summary.json"
        own = [
            teacher,
            self._identity(teacher, is_served(self.config)),
            *(p.prompt_id for p in (*prompts, *held_out)),
        ]
        section, tried = self.config.generate, self._try_server
        self.stages.do("generate", section, own, [], output, work, leave_out=_HOW_NOT_WHAT, check=tried)

    def _try_server(self) -> None:
        """Whether targets can come from where the answers do is known before hours of them."""
        answered = self.stages.source("generate", self.path / "data") / "summary.json"
        if matched(self.config) == "cached" and is_served(self.config) and not answered.exists():
            config = capture_config(self.config, 1.0, self.config.match.max_target_length)
            with by_keys():
                try_server(self.config.teacher, config, self.token)

    def capture(self) -> None:
        """What the teacher expects of its answers: targets/train, and targets/held_out to measure with. Now,
        and not before they are matched: a server may not wait for the training."""
        if matched(self.config) != "cached":
            return
        match, targets, student = self.config.match, self.path / "targets", self.config.student.source
        # The tokens must be those that the student reads: by its own template, if it has one.
        chatty = student and not tokenizer_path(self.config, find(student, hf_access_token=self.token))
        longest = max(longest_row(self.config), match.max_target_length)
        parts = {
            "held_out": capture_config(self.config, 1.0, longest),  # KL is measured at temperature 1
            "train": capture_config(self.config, match.distill_temperature, match.max_target_length),
        }
        parts["held_out"] = replace(parts["held_out"], train_on=None, enable_thinking=None)

        def work() -> None:
            self.stages.begin("capture", targets)
            for name, config in parts.items():
                with by_keys():
                    summary = capture(
                        self.config.teacher,
                        str(self.path / "data" / f"{name}.parquet"),
                        targets / name,
                        config,
                        tokenizer_path=student if chatty else None,
                        hf_access_token=self.token,
                    )
                size = summary.bytes / summary.positions
                self.say(f"{name}: targets of {summary.positions:,} tokens, {size:,.1f} bytes each")

        own: list[Any] = [student, self._identity(student, True)] if chatty else []
        own += [(c.temperature, c.max_target_length, c.train_on, c.enable_thinking) for c in parts.values()]
        output = targets / "train" / "manifest.json"
        self.stages.do("capture", self.config.capture, own, ["generate"], output, work)

    def train(self) -> None:
        """The student fine-tuned on the answers."""
        if self.config.train.steps:
            self._train("train", self.config.train, self.student, ["prune", "generate"])

    def match(self) -> None:
        """The student matched with the teacher's logits, from where the training left it."""
        if not self.config.match.steps:
            return
        trained = bool(self.config.train.steps)
        inputs = ["train"] if trained else ["prune", "generate"]
        inputs += ["capture"] if matched(self.config) == "cached" else []
        start = str(self.path / "train") if trained else self.student
        self._train("match", self.config.match, start, inputs)

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
            "tokenizer_path": tokenizer_path(self.config, find(student, hf_access_token=self.token)),
            "hf_path": "parquet",
            "hf_train_files": str(self.path / "data" / "train.parquet"),
            "hf_eval_files": str(self.path / "data" / "held_out.parquet") * (section.eval_interval > 0),
            "hf_access_token": self.config.hf_access_token,
        }
        own: list[Any] = []
        if section.method == "online":
            owned["teacher_load_parameters_path"] = self.config.teacher
            own = [self._identity(self.config.teacher)] if is_served(self.config) else []
        if section.method == "cached":
            owned["teacher_cache_path"] = str(self.path / "targets" / "train")
            measures = section.eval_interval > 0 and section.train_on in (None, "last")
            if measures and section.enable_thinking is None:  # else the held-out targets are of other tokens
                owned["eval_cache_path"] = str(self.path / "targets" / "held_out")
            owned["max_target_length"] = self._captured(section.max_target_length)
        config = TrainConfig.model_validate({**section.model_dump(), **owned})
        output = self.path / f"{name}.json"

        def work() -> None:
            self.stages.begin(name, self.path / name)
            # What it says of a cache names flags of the command that made it, which here are keys.
            result = train(config, lambda line: self.say(with_keys(line)))
            lines = read_metrics(result.run / "metrics.jsonl")
            seconds = sum(line.get("step_seconds", 0.0) for line in lines)
            tokens = sum(line.get("weight_sum", 0.0) for line in lines)
            write_json(output, {"steps": result.step, "seconds": seconds, "loss_tokens": tokens})

        self.stages.do(name, section, own, inputs, output, work, leave_out=MAY_CHANGE)

    def export(self) -> None:
        """The student in the Hugging Face format, bfloat16, as transformers and vLLM load it."""
        target = self.path / "export"

        def work() -> None:
            student = self.config.student
            teacher, source = called(self.config.teacher), called(student.source or self.config.teacher)
            layers = student.layers or len(student.keep)
            cut = f", cut to {layers} layers" if layers else ""
            to_hf(
                self.path / self.trained,
                target,
                dtype="bfloat16",
                title=self.path.name,
                source_name=f"{source}{cut}, distilled from {teacher}",
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

        inputs = ["export", *(name for name in ("control", "capture") if name in self.stages)]
        self.stages.do("evaluate", self.config.evaluate, [], inputs, self.path / RESULTS, work)
        return read_json(self.path / RESULTS)

    def _results(self) -> dict[str, Any]:
        students = {"student before": self.student}
        if self.config.train.steps and self.config.match.steps:
            students["after SFT"] = str(self.path / "train")
        students["student after"] = str(self.path / "export")
        if self.config.evaluate.sft_control:
            students["SFT alone, as long"] = str(self.path / "control")
        cached = matched(self.config) == "cached"
        # Those of a teacher that a server answers for may not be here, or have no room.
        weights = not cached and (matched(self.config) == "online" or not is_served(self.config))
        compared = compare(
            self.config,
            students,
            self.path / "data" / "held_out.parquet",
            weights=weights,
            cache=self.path / "targets" / "held_out" if cached else None,
            token=self.token,
        )
        return {
            "title": self.path.name,
            "data": read_json(self.path / "data" / "summary.json"),
            "training": {
                name: read_json(self.path / f"{name}.json")
                for name in ("train", "match", "control")
                if (self.path / name).is_dir() and name in self.stages
            },
            **compared,
        }

    def _captured(self, limit: int) -> int:
        """Tokens of a row of which all targets are there: vLLM scores no token at the end of its context."""
        for name in ("train", "held_out"):
            kept = read_json(self.path / "targets" / name / "manifest.json")
            if kept["counts"]["longest"] > kept["max_target_length"]:
                limit = min(limit, kept["max_target_length"])
        return limit

    def _identity(self, name: str, served: bool = False) -> list[Any]:
        """What changes when a model does, its tokenizer and its stop tokens included; where it is `served`,
        these alone."""
        source = find(name, hf_access_token=self.token, weights=not served)
        beside = {file: hashlib.sha256(data).hexdigest()[:16] for file, data in source.sidecars().items()}
        return [[] if served else source.identity(), beside]


def _how_made(summary: Summary) -> str:
    """At which speed, and how many are not new."""
    if not summary.seconds:
        return "all there before"
    before = f", {summary.had_before:,} there before" if summary.had_before else ""
    return f"{summary.tokens_per_second:,.0f} tokens per second{before}"


def _step_tokens(section: TrainConfig) -> int:
    """The most tokens that a step takes on one device: a measure of those of all, as long as the axes of both
    trainings are the same."""
    rows = section.per_device_batch_size * section.gradient_accumulation_steps
    return rows * section.max_target_length
