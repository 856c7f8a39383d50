"""The offline half, end to end: killed and resumed, the tutorial's commands, and a real vLLM."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import small

from distillax.checkpoints.source import find


def test_generation_killed_at_three_points_gives_the_same_bytes(tmp_path: Path) -> None:
    """Pitfall 26: with the real engine, sampling, other batches after each start. What is on disk by then,
    a block of 64 answers after each start but the first, is not made again."""
    teacher = small.chat_model("llama3.1", tmp_path / "teacher")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}" + "!" * (i % 11)}) + "\n" for i in range(90)))

    def generate(name: str, kill: tuple[str, int] | None = None) -> Path:
        output = tmp_path / name / "answers.parquet"
        flags = ["--num-generations", 2, "--max-new-tokens", 10, "--max-num-seqs", 16, "--temperature", 1.0]
        small.run(
            *("generate", "--teacher-model", teacher, "--dataset-path", prompts, "--output-file", output),
            *("--seed", 7, "--max-target-length", 128, "--max-prefill-length", 64, "--logprobs", *flags),
            kill=kill,
        )
        return output

    whole = generate("whole")
    for blocks, after in enumerate((1, 90, 84)):
        shards = generate("killed", ("answer", after)).with_name("answers.parquet.shards")
        assert len(list(shards.glob("shard-*.json"))) == blocks
    killed = generate("killed")
    assert killed.read_bytes() == whole.read_bytes()
    manifests = [f.with_name("answers.manifest.json").read_text() for f in (killed, whole)]
    assert manifests[0] == manifests[1]
    table = datasets.load_dataset("parquet", data_files=str(whole), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert len(table) == 180
    for row in table:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"]
        assert len(row["completion_token_ids"]) == row["completion_tokens"] == len(row["logprobs"])
    assert len({str(row["messages"]) for row in table}) > 170  # two different answers to each prompt


def test_the_tutorial_command_for_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate, convert, SFT, and SFT again from `latest` on the original data: MaxText's keys, with
    local stand-ins for hub ids, on eight simulated devices."""
    teacher = small.chat_model("qwen3", tmp_path / "qwen3-32b")
    student = small.chat_model("llama3.1", tmp_path / "llama3.1-8b")
    small.questions(tmp_path / "ultrachat" / "train_sft.jsonl", 40)
    base, run_name = tmp_path / "base", "distill-20260115"
    dataset = base / "datasets" / "distillation_data.parquet"
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    small.run("convert", "to-orbax", student, base / "llama3.1-8b-ckpt")
    small.run(
        "generate",
        *(
            "--dataset-path",
            tmp_path / "ultrachat",
            "--data-split",
            "train_sft",
            "--data-columns",
            "messages",
        ),
        *("--hf-access-token", "hf_not_a_token", "--teacher-model", teacher, "--use-chat-template"),
        *("--num-prompts", 24, "--num-generations", 2, "--max-new-tokens", 12, "--output-file", dataset),
    )
    assert "hf_not_a_token" not in dataset.with_name("distillation_data.manifest.json").read_text()
    shared = [
        f"base_output_directory={base}/distillation",
        f"tokenizer_path={student}",
        "tokenizer_type=huggingface",
        "dataset_type=hf",
        "train_data_columns=['messages']",
        "per_device_batch_size=2",
        "ici_expert_parallelism=-1",
        "ici_fsdp_parallelism=4",
        "hf_access_token=hf_not_a_token",
        "profiler=xplane",
        "steps=3",
        "max_target_length=64",
        "learning_rate=1e-3",
    ]
    small.run(
        *("train", "recipes/sft.yml", f"run_name={run_name}", "hf_path=parquet", f"hf_train_files={dataset}"),
        *("train_split=train", f"load_parameters_path={base}/llama3.1-8b-ckpt/0/items", *shared),
    )
    run = base / "distillation" / run_name
    small.run(
        *("train", "recipes/sft.yml", f"run_name={run_name}_stage2", f"hf_path={tmp_path / 'ultrachat'}"),
        *("train_split=train_sft", f"load_parameters_path={run}/checkpoints/latest", *shared),
    )
    assert sorted(p.name for p in (run / "checkpoints" / "3").iterdir() if p.is_dir()) == [
        "iter",
        "model_params",
        "optimizer_state",
    ]
    stages = [
        student,
        run / "checkpoints" / "3" / "model_params",
        base / "distillation" / f"{run_name}_stage2",
    ]
    weights = [np.asarray(find(stage).params()["layers"]["up"], np.float32) for stage in stages]
    assert np.abs(weights[1] - weights[0]).max() > 1e-4 and np.abs(weights[2] - weights[1]).max() > 1e-4
    for file in run.rglob("*"):
        if file.is_file() and file.suffix in (".yml", ".json", ".jsonl"):
            assert "hf_not_a_token" not in file.read_text(), file


def test_real_vllm_both_ways(smollm2_folder: Path, tmp_path: Path) -> None:
    """The real teacher in the real vLLM -> Parquet -> SFT of its cut -> export -> the export in vLLM."""
    prompts = tmp_path / "prompts.jsonl"
    topics = ["the sea", "bread", "Paris", "a cat", "rain", "music", "the moon", "chess"]
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {t}."}) + "\n" for t in topics))
    answers, again = tmp_path / "answers.parquet", tmp_path / "again.parquet"

    def ask(model: Path, output: Path) -> list[dict]:
        small.run(
            *("generate", "--engine", "vllm", "--teacher-model", model, "--dataset-path", prompts),
            *("--output-file", output, "--max-new-tokens", 24, "--max-target-length", 256),
            *("--max-prefill-length", 64, "--max-model-len", 256, "--max-num-seqs", 8, "--temperature", 0),
        )
        return datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache")).to_list()  # type: ignore[union-attr]

    rows = ask(smollm2_folder, answers)
    assert len(rows) == len(topics) and all(row["completion_token_ids"] for row in rows)
    small.run("prune", smollm2_folder, tmp_path / "student", "--layers", 6)
    small.run(
        *(
            "train",
            "recipes/sft.yml",
            "run_name=real",
            f"base_output_directory={tmp_path}",
            "hf_path=parquet",
        ),
        *(f"load_parameters_path={tmp_path / 'student'}", f"hf_train_files={answers}", "steps=12"),
        *("max_target_length=64", "per_device_batch_size=8", "learning_rate=2e-3", "remat_policy=none"),
    )
    losses = [json.loads(x)["loss"] for x in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    small.run("convert", "to-hf", tmp_path / "real", tmp_path / "export", "--dtype", "bfloat16")
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "export").iterdir()
    }
    out = ask(tmp_path / "export", again)
    assert len(out) > 0 and all(row["messages"][-1]["content"].strip() for row in out)
