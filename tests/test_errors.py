"""What the user gets wrong: one clear sentence on standard error, exit code 2, and no traceback."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import distillax
from distillax.checkpoints import gguf
from distillax.checkpoints.source import find
from distillax.cli import main
from distillax.errors import UserError, first_line
from distillax.teachers.capture import CaptureConfig, capture
from distillax.teachers.stage import identify

SECRET = "hf_" + "secret" * 6


def write_jsonl(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"words of the {role}"} for role in roles]}


def change_tensors(source: Path, target: Path, change) -> None:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def save_tokenizers(world: Path, smollm2_gguf: Path) -> None:
    tokenizer = gguf.tokenizer(smollm2_gguf)
    tokenizer.save_pretrained(world / "model")
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    tokenizer.save_pretrained(world / "no_template")
    vocabulary = {"[UNK]": 0, "<s>": 1, "</s>": 2, "words": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    other.chat_template = template
    other.save_pretrained(world / "other_tokenizer")


@pytest.fixture(scope="module")
def world(tmp_path_factory, smollm2_gguf) -> Path:
    """Good and bad models and data, by name."""
    world = tmp_path_factory.mktemp("world")
    tiny.make("smollm2", world / "bare", vocab_size=49152)
    for name in ("model", "no_template", "other_tokenizer"):
        shutil.copytree(world / "bare", world / name)
    save_tokenizers(world, smollm2_gguf)
    (world / "vocabulary.gguf").symlink_to(smollm2_gguf)

    small = world / "small"
    tiny.make("smollm2", small)
    norm = "model.layers.1.input_layernorm.weight"
    change_tensors(small, world / "missing_tensor", lambda t: t.pop(norm))
    change_tensors(small, world / "wrong_shape", lambda t: t.update({norm: np.ones(63, np.float32)}))
    extra = {"model.layers.1.extra.weight": np.ones(2, np.float32)}
    change_tensors(small, world / "unknown_tensor", lambda t: t.update(extra))
    for name, text in (
        ("unknown_family", '{"model_type": "mamba"}'),
        ("broken_config", "{"),
        ("long_number", f'{{"n": {"9" * 5000}}}'),
    ):
        shutil.copytree(small, world / name)
        (world / name / "config.json").write_text(text)
    shutil.copytree(small, world / "cut_off")
    shutil.copytree(world / "model", world / "few_rows")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(small / name, world / "few_rows" / name)
    weights = (small / "model.safetensors").read_bytes()
    (world / "cut_off" / "model.safetensors").write_bytes(weights[:-1000])

    write_jsonl(world / "data.jsonl", turns("user", "assistant"), turns("system", "user", "assistant"))
    write_jsonl(world / "no_user.jsonl", turns("user", "assistant"), turns("system", "assistant"))
    write_jsonl(world / "bad_role.jsonl", turns("user", "assistant"), turns("user", "narrator"))
    write_jsonl(world / "no_answer.jsonl", turns("user"))
    write_jsonl(world / "other.jsonl", turns("user", "assistant", "user", "assistant"))
    for format in ("sampled", "topk"):
        targets = CaptureConfig(format=format, k=4)
        model, data = str(world / "model"), str(world / "data.jsonl")
        capture(model, data, world / format, targets, show_progress=False)
    (world / "empty.jsonl").write_text("")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), world / "empty.parquet")
    (world / "broken.jsonl").write_text('{"prompt": "good"}\n{"prompt": \n')
    (world / "recipe.yml").write_text("method: sft\nstepz: 3\n")
    (world / "run.yml").write_text("student:\n  layers: 2\n")
    (world / "full").mkdir()
    (world / "full" / "thesis.txt").write_text("years of work")
    return world


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GENERATE = "generate --teacher-model {w}/model --dataset-path {w}/data.jsonl --output-file {out}/a.parquet"
TRAIN = (
    "train run_name=r base_output_directory={out} load_parameters_path={w}/model hf_path=parquet "
    "hf_train_files={w}/data.jsonl steps=1 max_target_length=32"
)
PROMPTS = GENERATE + " --dataset-path {w}/"
LEARN = TRAIN + " hf_train_files={w}/"
EVALUATE = "evaluate --student {w}/model --data {w}/data.jsonl"
TEACHER = GENERATE + " --teacher-model {w}/"
WEIGHTS = TRAIN + " load_parameters_path={w}/"
STUDENT = EVALUATE + " --student {w}/"
ONLINE = TRAIN + " method=online teacher_load_parameters_path={w}/model distill_"
CACHED = TRAIN + " method=cached distill_alpha=1 teacher_cache_path={w}/"

# name -> (command, what the sentence must hold)
MISTAKES = {
    # Words
    "no such command": ("distil", ["distil", "generate"]),
    "unknown key": ("train stepz=3", ["stepz", "did you mean steps?"]),
    "recipe of another command": (
        "plan {w}/run.yml",
        ["run.yml has student.layers", "`distillax run {w}/run.yml`"],
    ),
    "unknown key in a recipe": ("train {w}/recipe.yml", ["recipe.yml:2", "stepz", "did you mean steps?"]),
    "key of a section": ("run steps=3", ["steps", "did you mean train.steps?"]),
    "key as an option": ("train --steps=3", ["--steps", "key=value"]),
    "key after an option": (
        "plan model_name=qwen3-8b --json {out}/p.json topology=v6e-7",
        ["topology=v6e-7 is no slice"],
    ),
    "figures into a file": (EVALUATE + " --json {w}/data.jsonl/s.json", ["data.jsonl is no folder"]),
    "option of a recipe's command": ("plan recipes/online.yml --jsn x", ["--jsn", "did you mean --json?"]),
    "unknown command": ("trian recipes/sft.yml", ["no command trian;", "did you mean train?"]),
    "unknown option, and no other": (
        "generate --teacher X",
        ["unknown option --teacher;", "--teacher-model?"],
    ),
    "no such option": ("convert to-hf A --dtpye=float32", ["unknown option --dtpye; did you mean --dtype?"]),
    "no kind": ("convert --dtype=float32", ["required: to-orbax|to-hf"]),
    "nothing to train": ("train", ["RECIPE.yml, key=value", "distillax train --help"]),
    "unknown option": (GENERATE + " --num-prompt 3", ["--num-prompt;", "did you mean --num-prompts?"]),
    "stray word": (EVALUATE + " stray", ["stray", "distillax evaluate --help"]),
    "option left out": ("prune {w}/model {out}/x", ["--layers", "--keep", "distillax prune --help"]),
    "wrong type of a key": ("train steps=many", ["command line: steps must be a whole number", "many"]),
    "wrong type of a flag": (GENERATE + " --temperature hot", ["temperature must be a number", "hot"]),
    "wrong type of a count": (GENERATE + " --num-prompts few", ["--num-prompts", "whole number", "few"]),
    "out of range": (GENERATE + " --top-p 1.5", ["--top-p", "less than or equal to 1", "1.5"]),
    "unknown choice": (GENERATE + " --engine warp", ["engine", "'embedded', 'vllm' or 'server'", "warp"]),
    "no prompts wanted": (GENERATE + " --num-prompts 0", ["--num-prompts", "must be at least 1, not 0"]),
    "flag of another engine": (
        GENERATE + " --tp-size 2",
        ["--tp-size", "--engine embedded", "--engine vllm"],
    ),
    "two prompt columns": (GENERATE + " --data-columns a b", ["--data-columns a b", "one column"]),
    "two free mesh axes": ("train ici_fsdp_parallelism=-1 ici_tensor_parallelism=-1", ["both -1"]),
    # Files
    "missing recipe": ("train {w}/nowhere.yml", ["nowhere.yml", "no such recipe"]),
    "files without a reader": (
        TRAIN + " hf_path=jsonl",
        ["'jsonl' reads no files", "json for .json and .jsonl"],
    ),
    "misspelt recipe": (f"train {RECIPES}/onlin.yml", ["onlin.yml", f"did you mean {RECIPES}/online.yml?"]),
    "two recipes": (
        f"train {RECIPES}/sft.yml {RECIPES}/online.yml",
        ["online.yml is a recipe", "one at most"],
    ),
    "recipe after keys": (
        "train steps=1 recipes/sft.yml",
        ["recipes/sft.yml is a recipe", "before all keys"],
    ),
    "missing recipe of a run": ("run {w}/nowhere.yml", ["nowhere.yml", "no such recipe"]),
    "missing prompts": (PROMPTS + "nowhere.jsonl", ["nowhere.jsonl"]),
    "missing training data": (LEARN + "nowhere.jsonl", ["nowhere.jsonl"]),
    "missing evaluation data": (EVALUATE + " --data {w}/nowhere.jsonl", ["nowhere.jsonl"]),
    "missing teacher": (TEACHER + "nowhere", ["--teacher-model {w}/nowhere does not exist; "]),
    "missing student": (WEIGHTS + "nowhere", ["load_parameters_path: ", "nowhere does not exist"]),
    "missing teacher of a training": (
        ONLINE + "alpha=1 teacher_load_parameters_path={w}/nowhere",
        ["teacher_load_parameters_path: ", "nowhere does not exist"],
    ),
    "missing student to measure": (
        "evaluate --student {w}/nowhere --data {w}/data.jsonl",
        ["--student {w}/nowhere does not exist; "],
    ),
    "missing teacher of a run": (
        "run teacher={w}/nowhere prompts.path={w}/data.jsonl run_name=r",
        ["error: teacher={w}/nowhere does not exist; "],
    ),
    "temperature in words": (
        "capture --teacher-model m --dataset d --output-dir o --temperature hot",
        ["--temperature: must be a number, not 'hot'"],
    ),
    "missing source": ("convert to-orbax {w}/nowhere {out}/x", ["nowhere does not exist"]),
    "folder without a model": ("prune {w}/full {out}/x --layers 1", ["full holds no model"]),
    "folder of models": ("prune {w} {out}/x --layers 1", ["holds no model", "/bare or "]),
    "plan for no topology": ("plan topology= model_name=llama3.2-1b", ["topology is not set", "v6e-8"]),
    "missing run to report": ("report {w}/nowhere --output {out}/p.html", ["nowhere"]),
    "page of several runs": ("report {w}/full {w}/small", ["--output page.html"]),
    "no student": ("train run_name=r", ["load_parameters_path is not set"]),
    "no data set": (TRAIN + " hf_path=", ["hf_path"]),
    "no run name": (TRAIN + " run_name=", ["run_name"]),
    "no run name, nor anything else": ("train load_parameters_path={w}/none", ["run_name"]),
    "no teacher, nor data": ("train run_name=r method=online", ["teacher_load_parameters_path"]),
    "no teacher in a recipe": ("run run_name=r", ["teacher is not set"]),
    "output is a folder of other things": ("convert to-hf {w}/small {w}/full", ["full", "another output"]),
    "output below a file": (
        GENERATE + " --output-file {w}/data.jsonl/a.parquet",
        ["data.jsonl", "another path"],
    ),
    "output of another type": (GENERATE + " --output-file {out}/a.csv", ["a.csv", ".parquet"]),
    "figures into no folder": (EVALUATE + " --json {w}/nowhere/s.json", ["nowhere"]),
    "figures into a folder itself": (EVALUATE + " --json {w}", ["--json", "is a folder"]),
    # Data
    "empty data set": (PROMPTS + "empty.jsonl", ["empty.jsonl has no rows"]),
    "empty Parquet file": (LEARN + "empty.parquet", ["empty.parquet has no rows"]),
    "broken JSON": (
        PROMPTS + "broken.jsonl",
        ["broken.jsonl, line 2", "not valid JSON"],
    ),
    "no user turn": (
        PROMPTS + "no_user.jsonl",
        ["no_user.jsonl, line 2 (row 1, ", "no user turn"],
    ),
    "no assistant turn": (
        LEARN + "no_answer.jsonl",
        ["no_answer.jsonl, line 1 (row 0, ", "assistant"],
    ),
    "unknown role": (PROMPTS + "bad_role.jsonl", ["bad_role.jsonl, line 2 (row 1, ", "narrator"]),
    "unknown role in training": (
        LEARN + "bad_role.jsonl",
        ["bad_role.jsonl, line 2 (row 1, ", "narrator"],
    ),
    "id without a row": (STUDENT + "few_rows", ["data.jsonl, line 1 (row 0, ", "the id", "rows for 160 ids"]),
    "id without a row in training": (WEIGHTS + "few_rows", ["data.jsonl, line ", "rows for 160 ids"]),
    "id without a row of the teacher": (
        ONLINE + "alpha=1 teacher_load_parameters_path={w}/few_rows",
        ["data.jsonl, line ", "rows for 160 ids"],
    ),
    "id without a row in a capture": (
        "capture --teacher-model {w}/few_rows --dataset {w}/data.jsonl --output-dir {out}/c",
        ["data.jsonl, line 1 (row 0, ", "rows for 160 ids"],
    ),
    "id without a row in a prompt": (TEACHER + "few_rows", ["the prompt 'words of the user'", "160 ids"]),
    "no such column": (GENERATE + " --data-columns question", ["'question'", "data.jsonl", "messages"]),
    "no such column in training": (TRAIN + " train_data_columns=chat", ["'chat'", "data.jsonl", "messages"]),
    "no such split": (PROMPTS + "full", ["full", "no data files"]),
    "all prompts too long": (GENERATE + " --max-prefill-length 3", ["all 2 prompts", "max_prefill_length"]),
    # Models
    "unknown family": ("convert to-orbax {w}/unknown_family {out}/x", ["mamba", "llama"]),
    "broken config.json": ("convert to-orbax {w}/broken_config {out}/x", ["config.json", "not valid JSON"]),
    "a number of 5,000 digits": (
        "convert to-orbax {w}/long_number {out}/x",
        ["long_number/config.json", "not valid JSON (a number of too many digits: line 1 column 7 "],
    ),
    "missing tensor": (
        "convert to-orbax {w}/missing_tensor {out}/x",
        ["missing_tensor", "missing model.layers.1.input_layernorm.weight"],
    ),
    "wrong shape": (
        "convert to-orbax {w}/wrong_shape {out}/x",
        ["wrong_shape", "model.layers.1.input_layernorm.weight (63,) instead of (64,)"],
    ),
    "unknown tensor": (
        "convert to-orbax {w}/unknown_tensor {out}/x",
        ["unknown_tensor", "unknown model.layers.1.extra.weight"],
    ),
    "weights cut off": ("convert to-orbax {w}/cut_off {out}/x", ["cut_off/model.safetensors"]),
    "too many layers": (
        "prune {w}/model {out}/x --layers 9",
        ["cannot keep 9", "has 3; keep between 1 and 2"],
    ),
    "layer out of range": ("prune {w}/model {out}/x --keep 0,9", ["--keep 0,9", "from 0 to 2"]),
    "evaluation split of a file": (
        TRAIN.replace("hf_path=parquet hf_train_files=", "hf_path=") + " eval_split=test eval_interval=1",
        ["eval_split=test", "is one file, without splits"],
    ),
    "training split of a file": (
        TRAIN.replace("hf_path=parquet hf_train_files=", "hf_path=") + " train_split=test",
        ["train_split=test", "is one file, without splits"],
    ),
    "training split of files": (TRAIN + " train_split=test", ["train_split=test: hf_train_files names"]),
    "evaluation split of files": (
        TRAIN + " eval_split=test eval_interval=1 hf_eval_files={w}/data.jsonl",
        ["eval_split=test: hf_eval_files names"],
    ),
    "files beside a file": (
        TRAIN.replace("hf_path=parquet", "hf_path={w}/data.jsonl"),
        ["data.jsonl is one file, so", "would not be read", "hf_eval_files"],
    ),
    "split of a file": (GENERATE + " --data-split test", ["--data-split test", "one file, without splits"]),
    "layers out of order": ("prune {w}/model {out}/x --keep 2,0", ["--keep 2,0", "ascending"]),
    "hub id out of reach": ("convert to-orbax nobody/nothing {out}/x", ["nobody/nothing", "hub id"]),
    "unknown preset": (
        TRAIN + " load_parameters_path=random model_name=llama9-8b tokenizer_path={w}/model",
        ["llama9-8b", "llama3.1-8b"],
    ),
    "another architecture": (
        TRAIN + " model_name=llama3.1-8b",
        ["llama3.1-8b", "layers"],
    ),
    "wrong mesh": (
        TRAIN + " ici_fsdp_parallelism=3",
        ["fsdp_parallelism=3", "3 devices", "are 1; set ici_fsdp_parallelism=1"],
    ),
    "no tokenizer to generate": (TEACHER + "bare", ["bare has no tokenizer"]),
    "no tokenizer to train": (WEIGHTS + "bare", ["bare has no tokenizer"]),
    "no tokenizer to evaluate": (
        STUDENT + "bare",
        ["bare has no tokenizer", "--tokenizer-path"],
    ),
    "no chat template to generate": (TEACHER + "no_template", ["no chat template"]),
    "no chat template to train": (WEIGHTS + "no_template", ["no chat template"]),
    "no chat template to evaluate": (STUDENT + "no_template", ["no chat template", "--tokenizer-path"]),
    "tokenizer without a use": (
        STUDENT + "model --tokenizer-path {w}/other_tokenizer",
        ["--tokenizer-path has no use"],
    ),
    "different tokenizers": (
        EVALUATE + " --teacher {w}/other_tokenizer",
        ["different tokenizers"],
    ),
    "GGUF for vLLM": (
        GENERATE + " --engine vllm --teacher-model {w}/vocabulary.gguf",
        ["vocabulary.gguf", "distillax convert to-hf"],
    ),
    "no server": (GENERATE + " --engine server", ["no teacher URL"]),
    # Distillation
    "no teacher": (TRAIN + " method=online", ["method=online", "teacher_load_parameters_path"]),
    "teacher nowhere": (
        ONLINE + "alpha=1 teacher_load_parameters_path={w}/nowhere",
        ["nowhere does not exist"],
    ),
    "teacher with another tokenizer": (
        ONLINE + "alpha=1 teacher_load_parameters_path={w}/other_tokenizer",
        ["other_tokenizer has another tokenizer", "distillax generate", "method=sft"],
    ),
    "teacher without a use": (
        TRAIN + " teacher_load_parameters_path={w}/model",
        ["teacher_load_parameters_path", "method=sft", "method=online or cached"],
    ),
    "divergence without a use": (
        TRAIN + " distill_divergence=jsd",
        ["distill_divergence", "method=sft", "method=online or cached"],
    ),
    "cache without a use": (
        ONLINE + "alpha=1 teacher_cache_path={w}/topk",
        ["teacher_cache_path", "method=cached"],
    ),
    "unknown divergence": (ONLINE + "divergence=kl", ["distill_divergence", "'forward_kl'", "kl"]),
    "alpha above one": (ONLINE + "alpha=1.5", ["distill_alpha", "less than or equal to 1", "1.5"]),
    "alpha below zero": (ONLINE + "alpha=-1", ["distill_alpha", "greater than or equal to 0", "-1"]),
    "temperature of zero": (ONLINE + "temperature=0", ["distill_temperature", "greater than 0"]),
    "temperature that falls to zero": (
        ONLINE + "temperature_end=0",
        ["distill_temperature_end", "greater than 0"],
    ),
    "schedule without an end": (
        ONLINE + "alpha_schedule=linear",
        ["distill_alpha_schedule=linear", "distill_alpha_end"],
    ),
    "end without a schedule": (ONLINE + "temperature_end=2", ["distill_temperature_end=2", "cosine"]),
    "beta of another divergence": (
        ONLINE + "jsd_beta=0.2",
        ["distill_jsd_beta", "distill_divergence=forward_kl"],
    ),
    "skew of another divergence": (
        ONLINE + "skew=0.2 distill_divergence=jsd",
        ["distill_skew", "distill_divergence=jsd"],
    ),
    "distance without a weight": (
        ONLINE + "feature_loss_type=l2",
        ["distill_feature_loss_type", "distill_beta"],
    ),
    "hidden states of no layer": (ONLINE + "beta=1", ["distill_beta", "distill_layer_indices"]),
    "layers without a weight": (ONLINE + "layer_indices=0", ["distill_beta", "distill_layer_indices"]),
    "student layer out of range": (
        ONLINE + "beta=1 distill_layer_indices=0,3 distill_teacher_layer_indices=0,1",
        ["distill_layer_indices: there is no layer 3", "0 to 2"],
    ),
    "teacher layer out of range": (
        ONLINE + "beta=1 distill_layer_indices=1 distill_teacher_layer_indices=-1",
        ["distill_teacher_layer_indices: there is no layer -1", "0 to 2"],
    ),
    "layer maps of unequal length": (
        ONLINE + "beta=1 distill_layer_indices=0,1 distill_teacher_layer_indices=2",
        ["distill_layer_indices names 2", "distill_teacher_layer_indices 1"],
    ),
    "no cache": (TRAIN + " method=cached", ["teacher_cache_path", "distillax capture"]),
    "missing cache": (CACHED + "nowhere", ["nowhere", "distillax capture --output-dir"]),
    "cache of other data": (
        CACHED + "topk hf_train_files={w}/other.jsonl max_target_length=64",
        ["row 0", "topk", "data.jsonl"],
    ),
    "cache of another tokenizer": (
        CACHED + "topk load_parameters_path={w}/other_tokenizer",
        ["topk", "{w}/model", "same tokenizer"],
    ),
    "cache of another teacher": (
        CACHED + "topk teacher_load_parameters_path={w}/small",
        ["topk", "other weights", "{w}/model"],
    ),
    "cache of another temperature": (
        CACHED + "topk distill_temperature=2",
        ["temperature 1, not 2", "distill_temperature=1", "--temperature 2"],
    ),
    "temperature that leaves the cache's": (
        CACHED + "topk distill_temperature_end=2 distill_temperature_schedule=linear",
        ["distill_temperature_end", "one temperature", "method=online"],
    ),
    "divergence that samples cannot estimate": (
        CACHED + "sampled distill_divergence=jsd",
        ["distill_divergence=jsd", "sampled", "--format topk"],
    ),
    "divergence that no cache can estimate": (
        CACHED + "topk distill_divergence=akl",
        ["distill_divergence=akl", "method=online"],
    ),
    "hidden states of a cache": (
        CACHED + "topk distill_beta=1 distill_layer_indices=0",
        ["distill_beta", "method=cached", "method=online"],
    ),
}


def refusal(command: str, capsys) -> str:
    """The sentence with which a command line is refused."""
    code = main(shlex.split(command))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("distillax: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and "Error(" not in err
    return err


def test_prompts_are_read_before_anything_is_made(world, tmp_path, capsys):
    recipe = f"run run_name=r teacher={world}/model student.layers=1 base_output_directory={tmp_path}/runs"
    assert "none.jsonl" in refusal(f"{recipe} prompts.path={world}/none.jsonl", capsys)
    err = refusal(f"{recipe} prompts.path={world}/data.jsonl prompts.split=test", capsys)
    assert "prompts.split=test: " in err and "one file, without splits" in err
    assert "leaves none to train on" in refusal(
        f"{recipe} prompts.path={world}/data.jsonl prompts.held_out=64", capsys
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_sentence(name, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, parts = MISTAKES[name]
    err = refusal(command.format(w=world, out=tmp_path), capsys)
    assert [part for part in parts if part.format(w=world) not in err] == [], err
    assert (world / "full" / "thesis.txt").is_file()


def test_an_id_without_a_row_from_python(world):
    with pytest.raises(UserError, match="rows for 160 ids"):
        distillax.load(world / "few_rows").generate(["words of the user"])


def test_vllm_that_is_not_there(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISTILLAX_VLLM", "/nowhere/vllm")
    err = refusal(GENERATE.format(w=world, out=tmp_path) + " --engine vllm", capsys)
    assert "/nowhere/vllm" in err and "DISTILLAX_VLLM" in err


def test_a_data_set_of_another_configuration_is_refused_and_kept(world, tmp_path, capsys):
    command = GENERATE.format(w=world, out=tmp_path) + " --max-new-tokens 2 --max-target-length 64"
    assert main(shlex.split(command)) == 0
    before = (tmp_path / "a.parquet").read_bytes()
    capsys.readouterr()
    err = refusal(command + " --seed 7 --temperature 0.5", capsys)
    assert "a.parquet was made with another configuration" in err
    assert " seed=0 (now 7), temperature=" in err and "(now 0.5); give the old values" in err
    assert (tmp_path / "a.parquet").read_bytes() == before


def test_a_run_of_another_configuration_is_refused_and_kept(world, tmp_path, capsys):
    command = TRAIN.format(w=world, out=tmp_path)
    assert main(shlex.split(command)) == 0
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    err = refusal(command + " learning_rate=0.5", capsys)
    assert "r/config.yml: this run was started with learning_rate=" in err and "(now 0.5)" in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        f"train stepz=3 hf_access_token={SECRET}",
        f"train --hf_access_token={SECRET}",
        f"train hf_acess_token={SECRET}",
        f"train {SECRET}",
        f"train steps=1 {SECRET}",
        f"convert to-orbax {SECRET} x",
        f"{EVALUATE} --hf-access-token {SECRET} --data {SECRET}",
        f"{EVALUATE} --hf-acces-token={SECRET}",
        f"{GENERATE} --hf-access-token=short --data-columns short",
    ],
)
def test_a_token_is_never_shown(command, world, tmp_path, capsys):
    err = refusal(command.format(w=world, out=tmp_path), capsys)
    assert "secret" not in err and "short" not in err


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_none(world: Path, tmp_path: Path) -> None:
    """What is told of another one's ids could not be checked."""
    damaged = tmp_path / "damaged"
    shutil.copytree(world / "model", damaged)
    (damaged / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match=r"the tokenizer in .*damaged cannot be read"):
        find(damaged).tokenizer_or_none()
    with pytest.raises(UserError, match=r"the tokenizer in .*damaged cannot be read"):
        identify(str(damaged), "embedded", str(world / "model"), None)


def test_a_tokenizer_of_another_kind_may_be_replaced(world: Path, tmp_path: Path) -> None:
    """tokenizer.model alone needs a package that we do not."""
    old = tmp_path / "old"
    shutil.copytree(world / "bare", old)
    (old / "tokenizer.model").write_bytes(b"of sentencepiece")
    assert find(old).tokenizer_or_none() is None
    assert identify(str(old), "embedded", str(world / "model"), None)[1].chat_template
    with pytest.raises(UserError, match="has no tokenizer; give --tokenizer-path"):
        identify(str(old), "embedded", None, None)
    with pytest.raises(UserError, match=r"^--teacher-model, or --tokenizer-path: .*bare has no tokenizer"):
        identify(str(world / "bare"), "server", None, None)


def test_a_teachers_tokenizer_must_know_its_ids(world: Path) -> None:
    sentence = r"--tokenizer-path: .*other_tokenizer is another tokenizer than that of .*model, whose weights"
    with pytest.raises(UserError, match=sentence):
        identify(str(world / "model"), "embedded", str(world / "other_tokenizer"), None)


def test_what_is_read_of_the_hub(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tokenizer no weights; of a model no second copy of them. By the hub's own rule for patterns."""
    side = {"config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    whole = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    others = {"consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model.bin"}
    others |= {"original/consolidated.00.pth", "original/model.safetensors", "fp8/model.safetensors"}
    asked = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str], token: None) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked.append(set(filter_repo_objects(side | whole | others, **patterns)))
        return str(world / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source, tokenizer = identify("somebody/large", "server", None, None)
    assert source is None and tokenizer.chat_template
    find("somebody/large")
    assert asked == [side, side | whole]


def test_what_is_quoted_of_another_library() -> None:
    assert first_line(OSError("\n no route;\nat 0x7f")) == "no route"
    assert first_line(RuntimeError(" ")) == "RuntimeError"
