"""The command line: help, exit codes, start-up, and that every flag of `generate` has its effect."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import pyarrow.parquet as pq
import pytest
import small
import tiny
from safetensors.numpy import load_file

from distillax import __version__, cli
from distillax.checkpoints import gguf
from distillax.cli import environment, main
from distillax.cli.commands import COMMANDS
from distillax.config import GenerateConfig, PipelineConfig, TrainConfig
from distillax.data import prompts
from distillax.settings import describe
from distillax.teachers import Completion, Request, SamplingParams, stage
from distillax.teachers.embedded import DEFAULT_BATCH

HELPS = [*COMMANDS, "convert to-orbax", "convert to-hf"]


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distillax", *words], capture_output=True, text=True, timeout=60, **options
    )


# ------------------------------------------------------------------ help and start-up


@pytest.mark.parametrize("command", HELPS)
def test_help_has_an_example_that_parses(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: distillax {command}" in out
    example = re.search(rf"example:\n  (distillax {command}(?:\\\n|.)*)", out)
    assert example, out
    words = shlex.split(example[1].replace("\\\n", ""))[1:]
    args, unknown = cli.parsing.make_parser(COMMANDS, words).parse_known_args(words)
    assert not unknown and callable(args.run)


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("run", PipelineConfig)])
@pytest.mark.parametrize("width", [60, 100])
def test_help_shows_every_key_within_the_terminal(command, config, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--help"]) == 0
    keys = capsys.readouterr().out.partition("keys, with their types and defaults:\n")[2]
    assert max(map(len, keys.splitlines())) <= width
    flat = " ".join(keys.split())
    for name, kind, default, meaning in describe(config):
        if config is PipelineConfig and name.startswith(("train.", "match.")):  # 85 keys each
            assert f"{name.partition('.')[0]}.KEY" in flat and f"{name}:" not in flat
        else:
            assert f"{name}: {kind} = {default or chr(34) * 2} {meaning}" in flat
    assert config is TrainConfig or "after it: any key of `distillax train`" in flat


def test_help_of_generate_shows_every_key_with_its_default(capsys):
    assert main(["generate", "--help"]) == 0
    flat = " ".join(capsys.readouterr().out.split())
    for name, _, default, _ in describe(GenerateConfig):
        assert f"--{name.replace('_', '-')}" in flat
        assert default in ("", "null") or f"(default: {default})" in flat
    assert "null" not in flat


def test_no_subcommand_shows_the_help(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"distillax {__version__}\n", "")


def test_start_up_is_instant():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert run("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.3


def test_start_up_imports_nothing_heavy():
    code = "import sys; from distillax.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "numpy", "transformers", "datasets", "pyarrow", "pydantic", "yaml"}
    assert heavy & set(done.stdout.split()) == set()


# ------------------------------------------------------------------ exit codes

REPORT = """
import sys, types
sys.modules["distillax.report.page"] = types.SimpleNamespace(write_page=lambda runs, output: None)
from distillax.cli import main
sys.argv[1:] = ["report", "run", "--output", "page.html"]
sys.exit(main())
"""


def test_a_mistake_exits_with_2_and_no_traceback():
    done = run("train", "stepz=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "distillax: error: command line: unknown key stepz; did you mean steps?\n"


def raising(error: BaseException):
    def function(*args, **kwargs):
        raise error

    return function


def test_our_own_fault_keeps_its_traceback(monkeypatch):
    for error in (RuntimeError("boom"), OSError("no path in it"), BrokenPipeError("a server's")):
        monkeypatch.setattr("distillax.checkpoints.prune.prune", raising(error))
        with pytest.raises(type(error)):
            main(["prune", "a", "b", "--layers", "1"])


def test_our_own_fault_exits_with_1():
    broken = REPORT.replace("output: None", "output: 1 / 0")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_an_interrupt_says_what_is_kept(monkeypatch, capsys):
    capture = ["capture", "--teacher-model", "a", "--dataset", "b", "--output-dir", "c"]
    noted, anywhere = KeyboardInterrupt(), KeyboardInterrupt()
    noted.add_note("7 of 9 rows are kept")
    for error, words, said in (
        (noted, capture, "interrupted; 7 of 9 rows are kept"),
        (anywhere, capture, "interrupted; the same command goes on from what was kept, if anything"),
        (anywhere, ["prune", "a", "b", "--layers", "1"], "interrupted"),
    ):
        monkeypatch.setattr("distillax.teachers.capture.capture", raising(error))
        monkeypatch.setattr("distillax.checkpoints.prune.prune", raising(error))
        assert main(words) == 130
        assert capsys.readouterr().err == f"distillax: {said}\n"


def test_a_full_disk_is_no_fault_of_ours(monkeypatch, capsys):
    error = OSError(28, "No space left on device", "/data/x")
    monkeypatch.setattr("distillax.checkpoints.prune.prune", raising(error))
    assert main(["prune", "a", "b", "--layers", "1"]) == 2
    assert "/data/x: No space left on device" in capsys.readouterr().err


GENERATE = "generate --teacher-model m --dataset-path d --output-file f.parquet"
DEVICE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.\nBFC allocator"
TPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.0G of 15.75G hbm. Exceeded by 4.3G."


@pytest.mark.parametrize(
    ("function", "command", "error", "said"),
    [
        (
            "train.loop.train",
            "train run_name=r",
            DEVICE,
            "(68719476736 bytes); give a smaller per_device_batch",
        ),
        (
            "train.loop.train",
            "train run_name=r",
            TPU,
            "(it needs 20.0G of 15.75G); give a smaller per_device",
        ),
        ("pipeline.run", "run teacher=t", DEVICE, "; give a smaller train.per_device_batch_size"),
        (
            "api.load",
            "evaluate --student s --data d",
            "CUDA_ERROR_OUT_OF_MEMORY",
            "give a shorter --max-target",
        ),
        ("data.prompts.load_prompts", GENERATE, DEVICE, "give a lower --max-num-seqs"),
        (
            "checkpoints.prune.prune",
            "prune a b --layers 1",
            MemoryError(),
            "machine's memory is too small; give it",
        ),
        (
            "checkpoints.prune.prune",
            "prune a b --layers 1",
            MemoryError("Unable to allocate 7.45 GiB for an array with shape (10,)"),
            "this machine's memory is too small (7.45 GiB); give it more",
        ),
    ],
)
def test_too_little_memory_is_said_in_a_sentence(function, command, error, said, monkeypatch, capsys):
    error = jax.errors.JaxRuntimeError(error) if isinstance(error, str) else error
    monkeypatch.setattr(f"distillax.{function}", raising(error))
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_device_that_is_really_too_small_is_told(monkeypatch, capsys):
    monkeypatch.setattr(
        "distillax.train.loop.train", lambda *_: jnp.zeros(1 << 50, jnp.int8).block_until_ready()
    )
    assert main(["train", "run_name=r"]) == 2
    assert "the memory of the device is too small (1125899906842624 bytes); give" in capsys.readouterr().err


def test_a_crash_at_the_end_of_the_interpreter_does_not_hide_the_exit_code():
    """JAX's threads crash it if an interrupt has left them computing; here a hook plays them."""
    code = """
import atexit, os
atexit.register(os.abort)
def interrupt(*_):
    raise KeyboardInterrupt
""" + REPORT.replace("lambda runs, output: None", "interrupt")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr


def test_an_interrupt_within_the_garbage_collector_is_not_lost():
    code = """
import time
class Collected:
    def __del__(self):
        raise KeyboardInterrupt
def collect(*_):
    Collected()
    time.sleep(20)
""" + REPORT.replace("lambda runs, output: None", "collect")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (["-c", REPORT], {128 + signal.SIGPIPE}),
        (["-m", "distillax", "--help"], {128 + signal.SIGPIPE, 0}),  # argparse may swallow the fault
        (["-m", "distillax", "train", "--help"], {128 + signal.SIGPIPE, 0}),
    ],
)
def test_output_that_nobody_reads_is_no_fault(words, codes, unbuffered):
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) in codes


# ------------------------------------------------------------------ environment


def test_compilations_are_kept_apart_by_jaxlib_and_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environment.cache_folder()
    assert folder is not None and folder.is_dir()
    assert folder.parent == tmp_path / "distillax" / "jax" and re.fullmatch(
        r"[\d.]+-[0-9a-f]{8}", folder.name
    )
    monkeypatch.setattr(environment, "version", lambda package: "9.9")
    assert environment.cache_folder() == folder.with_name("9.9" + folder.name[-9:])


def test_a_home_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert environment.cache_folder() is None


@pytest.mark.parametrize(("call", "heard"), [("main(sys.argv[1:])", True), ("main()", False)])
def test_the_hub_is_muted_only_where_the_program_is_alone(call, heard):
    code = f"""
import logging
logging.basicConfig(format="mine: %(message)s")
{REPORT.replace("sys.exit(main())", call)}
logging.getLogger("huggingface_hub.file_download").warning("slow")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and ("mine: slow" in done.stderr) is heard, done.stderr


def test_what_the_user_has_set_wins():
    code = (
        "import json, os; from distillax.cli import environment; "
        "environment.prepare(); print(json.dumps(dict(os.environ)))"
    )
    mine = {"JAX_COMPILATION_CACHE_DIR": "/mine", "TF_CPP_MIN_LOG_LEVEL": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | mine, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert mine.items() <= found.items()
    assert found["TOKENIZERS_PARALLELISM"] == "false" and found["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


# ------------------------------------------------------------------ generate: every flag has its effect


class Recorder:
    """A teacher that notes how it was made and what it was asked; its second answer is cut off."""

    made: dict
    asked: list[Request]
    sampling: SamplingParams
    kind: str

    @classmethod
    def named(cls, kind: str):
        def make(*args, **kwargs):
            cls.kind, cls.made = kind, kwargs | {"args": args}
            return cls()

        return make

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, requests, sampling, working):
        Recorder.asked, Recorder.sampling = list(requests), sampling
        for i, r in enumerate(requests):
            reason = "length" if i == 1 else "stop"
            yield Completion(r.prompt_id, r.generation, "yes", reason, len(r.prompt_token_ids), 1, [5])


@pytest.fixture(scope="module")
def world(tmp_path_factory, smollm2_gguf) -> Path:
    """A tiny model with the tokenizer of SmolLM2, the same without it, and three prompts."""
    world = tmp_path_factory.mktemp("cli")
    tiny.make("smollm2", world / "bare", vocab_size=49152)
    shutil.copytree(world / "bare", world / "model")
    gguf.tokenizer(smollm2_gguf).save_pretrained(world / "model")
    rows = [{"prompt": f"{name}?", "other": f"other {name}?"} for name in ("one", "two", "three " * 40)]
    (world / "data").mkdir()
    for name, count in (("train", 3), ("test", 2)):
        lines = [json.dumps(row) + "\n" for row in rows[:count]]
        (world / "data" / f"{name}.jsonl").write_text("".join(lines))
    answers = [{"prompt": "one?", "completion": "yes"}, {"prompt": "two?", "completion": "no no"}]
    (world / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return world


@pytest.fixture
def generate(world, tmp_path, monkeypatch):
    """Runs `distillax generate` with recorders for engines; returns the rows of the Parquet file."""
    for name in ("EmbeddedTeacher", "VllmTeacher", "ServerTeacher"):
        monkeypatch.setattr(stage, name, Recorder.named(name))
    Recorder.asked = []

    def generate(flags: str, model: str = "model") -> list[dict]:
        output = tmp_path / "answers.parquet"
        words = ["--teacher-model", f"{world}/{model}", "--dataset-path", f"{world}/data"]
        assert main(["generate", *words, "--output-file", str(output), *shlex.split(flags)]) == 0
        return pq.read_table(output).to_pylist()

    return generate


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--temperature 0.25", "temperature", 0.25),
        ("--top-p 0.5", "top_p", 0.5),
        ("--top-k 7", "top_k", 7),
        ("--seed 11", "seed", 11),
        ("--max-new-tokens 9", "max_new_tokens", 9),
        ("--max-target-length 300", "max_length", 300),
        ("--logprobs", "logprobs", True),
    ],
)
def test_sampling_flags(flag, name, value, generate):
    generate(flag)
    assert getattr(Recorder.sampling, name) == value != getattr(SamplingParams(), name)


def test_without_flags_the_config_s_defaults_hold(generate):
    generate("")
    default = GenerateConfig()
    assert Recorder.kind == "EmbeddedTeacher" and Recorder.made["batch_size"] == DEFAULT_BATCH
    assert Recorder.sampling.temperature == default.temperature
    assert Recorder.sampling.max_new_tokens == default.max_new_tokens
    assert len(Recorder.asked) == 3 and Recorder.asked[0].prompt_text.startswith("<|im_start|>")


VLLM = "--engine vllm "
SERVER = "--engine server --teacher-url http://a/v1 "
TWO_URLS = ("http://a/v1", "http://b/v1")


@pytest.mark.parametrize(
    ("flags", "kind", "name", "value"),
    [
        ("--engine embedded --max-num-seqs 3", "EmbeddedTeacher", "batch_size", 3),
        ("--dtype float32", "EmbeddedTeacher", "dtype", "float32"),
        (VLLM + "--tp-size 4", "VllmTeacher", "tensor_parallel_size", 4),
        (VLLM + "--max-model-len 512", "VllmTeacher", "max_model_len", 512),
        (VLLM + "--max-num-seqs 5", "VllmTeacher", "max_num_seqs", 5),
        (VLLM + "--max-num-batched-tokens 640", "VllmTeacher", "max_num_batched_tokens", 640),
        (VLLM + "--gpu-memory-utilization 0.5", "VllmTeacher", "gpu_memory_utilization", 0.5),
        (VLLM + "--enable-thinking", "VllmTeacher", "enable_thinking", True),
        (VLLM + "--no-enable-thinking", "VllmTeacher", "enable_thinking", False),
        (VLLM + "--no-use-chat-template", "VllmTeacher", "use_chat_template", False),
        (SERVER, "ServerTeacher", "args", (("http://a/v1",), None)),
        (
            SERVER + "--teacher-url http://b/v1",
            "ServerTeacher",
            "args",
            (TWO_URLS, None),
        ),
        (SERVER + "http://b/v1", "ServerTeacher", "args", (TWO_URLS, None)),
        (SERVER + "--teacher-name big", "ServerTeacher", "args", (("http://a/v1",), "big")),
        (SERVER + "--no-enable-thinking", "ServerTeacher", "enable_thinking", False),
    ],
)
def test_engine_flags(flags, kind, name, value, generate):
    generate(flags)
    assert Recorder.kind == kind and Recorder.made[name] == value


def test_flags_that_choose_prompts(generate):
    generate("--num-prompts 2")
    assert [r.messages[-1]["content"] for r in Recorder.asked] == ["one?", "two?"]


def test_flags_that_choose_split_and_column(generate):
    generate("--data-split test --data-columns other")
    assert [r.messages[-1]["content"] for r in Recorder.asked] == ["other one?", "other two?"]


def test_the_configuration_of_a_data_set_reaches_it_from_every_command(
    generate, world, tmp_path, monkeypatch, capsys
):
    asked = []

    def load_dataset(path, config, **options):
        asked.append((path, config, options["split"]))
        if len(asked) > 1:
            raise ValueError("no more")
        return datasets.Dataset.from_list([{"prompt": "q"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    generate("--dataset-path org/data --data-name main")
    manifest = json.loads((tmp_path / "answers.manifest.json").read_text())
    assert manifest["config"]["provenance"]["hf_name"] == "main"
    model = f"{world}/model"
    for command in (
        f"capture --teacher-model {model} --dataset org/data --data-name main --output-dir {tmp_path}/c",
        f"evaluate --student {model} --data org/data --data-name main",
        f"train run_name=r base_output_directory={tmp_path} load_parameters_path={model} hf_path=org/data "
        "hf_name=main",
        f"run run_name=p base_output_directory={tmp_path} teacher={model} prompts.path=org/data "
        "prompts.name=main",
    ):
        assert main(shlex.split(command)) == 2
        assert "org/data is neither here" in capsys.readouterr().err
    assert asked == [("org/data", "main", "train")] * 5


def test_long_prompts_are_left_out_and_counted(generate, capsys):
    rows = generate("--max-prefill-length 50")
    assert len(rows) == len(Recorder.asked) == 2
    assert re.search(r"prompts +3 \(1 too long, left out\)", capsys.readouterr().out)


def test_several_answers_a_prompt(generate, caplog):
    rows = generate("--temperature 1 --num-generations 2 --max-target-length 300 --max-new-tokens 299")
    assert [row["generation"] for row in rows] == [0, 1] * 3
    assert not caplog.messages


def test_what_is_asked_for_and_cannot_be_is_told(generate, caplog):
    generate("--temperature 0 --num-generations 2 --max-new-tokens 600")
    room = "with their prompts they have room for 512 tokens, by what the teacher was made for"
    alike = "at temperature 0 the 2 answers to a prompt are all alike"
    assert caplog.messages == [alike, f"answers end before max_new_tokens=600: {room}"]


@pytest.mark.parametrize(("flag", "kept"), [("", 3), ("--keep-truncated", 3), ("--drop-truncated", 2)])
def test_truncated_answers(flag, kept, generate, capsys):
    assert len(generate(flag)) == kept
    assert re.search(r"truncated +1\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flag", "text"), [("--use-chat-template", "<|im_start|>"), ("--no-use-chat-template", "one?")]
)
def test_chat_template(flag, text, generate):
    generate(flag)
    assert Recorder.asked[0].prompt_text.startswith(text)


def test_another_tokenizer(generate, world):
    generate(f"--tokenizer-path {world}/model", model="bare")
    assert Recorder.asked[0].prompt_text.startswith("<|im_start|>")


def test_the_token_goes_to_the_hub_and_nowhere_else(generate, tmp_path, monkeypatch, capsys):
    seen = []

    def noting(function):
        def call(*args, **kwargs):
            seen.append(kwargs["hf_access_token"])
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(stage, "find", noting(stage.find))
    monkeypatch.setattr("distillax.data.prompts.load_prompts", noting(prompts.load_prompts))
    generate("--hf-access-token my-secret")
    assert seen == ["my-secret"] * 2
    shown = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "my-secret" not in shown.out + shown.err and b"my-secret" not in written


def test_the_tutorial_s_command(world, tmp_path, generate):
    """The words of the tutorial, with local stand-ins for the hub's data set and the teacher."""
    (tmp_path / "ultrachat_200k").mkdir()
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    row = json.dumps({"messages": talk}) + "\n"
    (tmp_path / "ultrachat_200k" / "train_sft.jsonl").write_text(row * 3)
    output = tmp_path / "distillation_data.parquet"
    command = f"""generate \
      --dataset-path {tmp_path}/ultrachat_200k \
      --data-split train_sft \
      --data-columns messages \
      --hf-access-token token \
      --teacher-model {world}/model \
      --use-chat-template \
      --num-prompts 5120 \
      --num-generations 2 \
      --output-file {output}"""
    assert main(shlex.split(command)) == 0
    rows = pq.read_table(output).to_pylist()
    assert len(rows) == 6
    assert {tuple(m["role"] for m in row["messages"]) for row in rows} == {
        ("user", "assistant", "user", "assistant")
    }


# ------------------------------------------------------------------ the other subcommands, for real


def test_models_go_from_format_to_format(world, tmp_path, capsys):
    for command in (
        f"convert to-orbax {world}/model {tmp_path}/orbax",
        f"convert to-hf {tmp_path}/orbax {tmp_path}/hf",
        f"prune {tmp_path}/hf {tmp_path}/two --layers 2 --dtype bfloat16",
        f"prune {tmp_path}/orbax {tmp_path}/ends --keep 0,2",
    ):
        assert main(command.split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path}/orbax/0/items" and out[3] == f"{tmp_path}/ends: layers 0, 2"
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (world / "model", tmp_path / "hf"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (2, "bfloat16")


def test_evaluate_prints_and_writes_the_figures(world, tmp_path, capsys):
    figures = tmp_path / "s.json"
    command = (
        f"evaluate --student {world}/model --data {world}/answers.jsonl "
        "--data-columns prompt completion --max-target-length 64"
    )
    assert main([*command.split(), "--json", str(figures)]) == 0
    alone = json.loads(figures.read_text())
    counts = {"tokens", "left_out_long", "without_answer"}
    assert alone.keys() == {"nll", "perplexity", "bits_per_byte"} | counts
    out = capsys.readouterr().out
    assert re.search(rf"^NLL +{alone['nll']:.3f}  nats per token of the answers$", out, re.M)
    assert re.search(rf"^Tokens +{alone['tokens']}  that were measured$", out, re.M) and "KL" not in out

    bare = f"--teacher {world}/bare --tokenizer-path {world}/model --answers 1"
    assert main([*command.split(), *bare.split(), "--json", str(figures)]) == 0
    assert re.search(r"^Top-1 +100.0%", capsys.readouterr().out, re.M)
    both = json.loads(figures.read_text())
    assert both["nll"] == pytest.approx(alone["nll"], rel=1e-3)
    assert both["top1_agreement"] == 1 and both["kl_teacher_student"] == pytest.approx(0, abs=1e-6)
    (answer,) = both["answers"]
    assert answer["prompt"] == "one?" and answer["student"] == answer["teacher"]

    data = f"{world}/answers.jsonl --data-columns prompt completion --max-target-length 64"
    capture = f"capture --teacher-model {world}/model --dataset {data} --format topk --k 8"
    assert main([*capture.split(), "--output-dir", str(tmp_path / "cache")]) == 0
    cached = ["--teacher-cache", str(tmp_path / "cache"), "--json", str(figures)]
    capsys.readouterr()
    assert main([*command.split(), *cached]) == 0
    out, few = capsys.readouterr().out, json.loads(figures.read_text())
    assert "Note: KL is a lower bound, from a cache of the 8 likeliest ids" in out
    assert few["kl_teacher_student"] == pytest.approx(0, abs=1e-3) and few["top1_agreement"] == 1
    assert few["teacher_nll"] == pytest.approx(few["nll"], rel=2e-3)
    assert f"Its NLL       {few['teacher_nll']:.3f}  the teacher's own" in out
    assert main([*command.split(), *cached, "--teacher", "t"]) == 2
    assert "--teacher and --teacher-cache both name a teacher; leave one" in capsys.readouterr().err


def test_evaluate_takes_thinking_and_shows_each_prompt_once(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{% if enable_thinking is false %}no {% endif %}" + template.read_text())
    lines = [{"prompt": p, "completion": c} for p, c in (("one?", "yes"), ("one?", "no"), ("two?", "no no"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []

    def answer(self, prompts, **how):
        asked.append(([prompt[-1]["content"] for prompt in prompts], how))
        return ["hm"] * len(prompts)

    monkeypatch.setattr("distillax.api.Model.generate", answer)
    command = (
        f"evaluate --student {tmp_path}/model --data {tmp_path}/data.jsonl --answers 2 "
        f"--data-columns prompt completion --json {tmp_path}/s.json"
    ).split()
    nll = []
    for flags in ([], ["--enable-thinking"], ["--no-enable-thinking", "--max-new-tokens", "9"]):
        assert main([*command, *flags]) == 0
        nll.append(json.loads((tmp_path / "s.json").read_text())["nll"])
    assert nll[0] == nll[1] != nll[2]
    assert [prompts for prompts, _ in asked] == [["one?", "two?"]] * 3
    assert [how["enable_thinking"] for _, how in asked] == [None, True, False]
    assert [how["max_new_tokens"] for _, how in asked] == [128, 128, 9]
    assert main(["evaluate", "--student", "s", "--data", "d", "--max-new-tokens", "9"]) == 2
    assert "--max-new-tokens has no effect without --answers; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r.yml", "a=1"], ("r.yml", ["a=1"])),
        (["a=1", "b=2"], (None, ["a=1", "b=2"])),
        ([], (None, [])),
    ],
)
def test_the_recipe_may_be_left_out(words, expected):
    assert cli.parsing.recipe_and_overrides(words) == expected


def test_a_recipe_with_an_equals_sign_in_its_path(tmp_path):
    recipe = tmp_path / "lr=1.yml"
    recipe.write_text("steps: 3\n")
    assert cli.parsing.recipe_and_overrides([str(recipe), "a=1"]) == (str(recipe), ["a=1"])


def test_train_run_and_report_get_their_config(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("distillax.train.loop.train", lambda config, say: seen.append(config))
    monkeypatch.setattr("distillax.pipeline.run", lambda config, say: seen.append(config))
    monkeypatch.setattr("distillax.report.page.write_page", lambda runs, output: seen.append((runs, output)))
    recipe = tmp_path / "r.yml"
    recipe.write_text("steps: 3\nlearning_rate: 1e-3\n")
    assert main(["train", str(recipe), "steps=7"]) == 0
    assert main(["run", "teacher=t", "train.steps=9"]) == 0
    assert main(["report", "one", "two", "--output", "page.html"]) == 0
    assert main(["report", "one"]) == 0
    train, pipeline, report, alone = seen
    assert (type(train), train.steps, train.learning_rate) == (TrainConfig, 7, 1e-3)
    assert (type(pipeline), pipeline.teacher, pipeline.train.steps) == (PipelineConfig, "t", 9)
    assert report == ([Path("one"), Path("two")], Path("page.html"))
    assert alone == ([Path("one")], Path("one/report.html"))
    assert "page.html" in capsys.readouterr().out


def test_a_heavy_command_asks_for_huge_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the user's own settings of glibc alone."""
    started: list[list[str]] = []
    monkeypatch.setattr(environment.os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(environment.Path, "read_text", lambda *a, **k: "always [madvise] never")
    monkeypatch.setattr(environment.Path, "is_file", lambda self: True)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back afterwards
    monkeypatch.delenv("GLIBC_TUNABLES")
    environment.use_huge_pages(["convert"])
    environment.use_huge_pages([])
    assert not started
    environment.use_huge_pages(["train"])
    assert len(started) == 1 and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    environment.use_huge_pages(["train"])  # the process that was started so
    assert len(started) == 1 and "GLIBC_TUNABLES" not in os.environ
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    environment.use_huge_pages(["train"])
    assert len(started) == 1 and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0"


WITHOUT_TORCH = """
import sys
from distillax import cli

sys.argv = ["distillax", *sys.argv[1:]]
code = cli.main()
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
sys.exit(code)
"""


def test_pytorch_stays_out_of_the_command_line(tmp_path):
    """Where it is installed, as here, others import it for nothing, and seconds. What asks whether it is
    there, as datasets does, must not be misled: it reads a URL here, as it would a data set of the hub."""
    assert find_spec("torch")
    world = {"root": tmp_path, "student": small.chat_model("qwen3", tmp_path / "model")}
    world["data"] = small.questions(tmp_path / "data.jsonl", 4)
    keys = {"hf_path": "json", "hf_train_files": world["data"].as_uri(), "steps": 1, "max_target_length": 96}
    words = small.training("sft", world, "run", **keys)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "train", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr
    assert "done: 1 step;" in done.stdout


FULL = (
    'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/r/c/2.orbax-checkpoint-tmp/": '
    "Failed to write 8519680 bytes to file 7: No space left on device [os_error_code='28']"
)


def test_a_full_disk_is_not_taken_for_memory(monkeypatch, capsys):
    """As TensorStore says it while a checkpoint is written."""
    monkeypatch.setattr("distillax.train.loop.train", raising(ValueError(FULL)))
    assert main(["train", "run_name=r"]) == 2
    told = "/r/c/2.orbax-checkpoint-tmp/: No space left on device; choose another path, or make room there"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "x"], "--max-new-tokens must be a whole number, not 'x'."),
        (["--tp-size", "2"], "--tp-size has no effect with --engine embedded, but with --engine vllm."),
    ],
)
def test_flags_are_named_as_they_were_given(words: list[str], said: str, capsys) -> None:
    given = ["--teacher-model", "m", "--dataset-path", "d", "--output-file", "f.parquet"]
    assert main(["generate", *given, *words]) == 2
    assert capsys.readouterr().err == f"distillax: error: {said}\n"
