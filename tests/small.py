"""Tiny models with a real tokenizer, small data sets, and processes that are killed on purpose."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import parts
import tiny

from distillax.checkpoints import gguf

VOCABULARY = 2048

KILL = """
import os, signal, sys
from distillax import cli
from distillax.checkpoints import state
from distillax.data import shards
from distillax.train import loop

what, after, *arguments = sys.argv[1:]
count = 0
save, begun = state.RunCheckpoints.save, []

def saving(self, *arguments):
    begun.append(self)
    save(self, *arguments)

def killing(method):
    def wrapped(*args, **kwargs):
        global count
        result = method(*args, **kwargs)
        count += 1
        if count == int(after):
            if what == "saved" and begun:
                begun[-1]._manager.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

state.RunCheckpoints.save = saving
if what in ("step", "saved"):
    loop.Metrics.write = killing(loop.Metrics.write)
elif what == "answer":
    shards.ShardStore.add = killing(shards.ShardStore.add)
sys.exit(cli.main(arguments))
"""


def chat_model(name: str, folder: Path, seed: int = 0, rows: int = VOCABULARY, **options: Any) -> Path:
    """A random model of a family with `save_tokenizer`'s tokenizer, as a Hugging Face folder."""
    tiny.make(name, folder, seed=seed, vocab_size=rows, **options)
    save_tokenizer(folder)
    return folder


def of_another_family(source: Path, folder: Path) -> Path:
    """A copy of a model's folder in which all ids mean other tokens."""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's tokenizer and chat template, but for the tokens from VOCABULARY on: these take nearly all
    of the time of a tiny model."""
    gguf.tokenizer(parts.smollm2_gguf()).save_pretrained(str(folder))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def questions(file: Path, number: int) -> Path:
    """A JSONL file of different short conversations, some with several turns, some long."""
    rows = []
    for i in range(number):
        messages = [
            {"role": "user", "content": f"What is {i} plus {i % 7}?"},
            {"role": "assistant", "content": f"It is {i + i % 7}." + " Really." * (i % 5)},
        ]
        if i % 3 == 0:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        rows.append(json.dumps({"messages": messages}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def training(recipe: str, world: dict[str, Path], run_name: str, **keys: object) -> list[str]:
    """The words after `distillax train`: of the world's student on its data, in float32."""
    usual: dict[str, object] = dict(
        run_name=run_name,
        base_output_directory=world["root"] / "runs",
        load_parameters_path=world["student"],
        hf_path=world["data"],
        dtype="float32",
    )
    return [f"recipes/{recipe}.yml", *(f"{key}={value}" for key, value in (usual | keys).items())]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(*arguments: Any, kill: tuple[str, int] | None = None, code: int = 0) -> str:
    """`distillax ...` in a process of its own, killed after its n-th answer or step if `kill` says so: at
    once ("answer", "step"), or when the checkpoint that the steps began is on disk ("saved")."""
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "distillax", *words]
    if kill is not None:
        command = [sys.executable, "-c", KILL, kill[0], str(kill[1]), *words]
        code = -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == code, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
