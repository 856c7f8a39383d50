"""The vLLM path (serve, HTTP, our client) against vLLM's own offline loop: the overhead.

    python benchmarks/vllm_overhead.py [LIMIT ...]

Both are started once for each limit (at most 256 new tokens, what `distillax generate` allows by
default, and at most 64), with the same settings and bound threads, and answer the same prompts in
turn; the first round of each is not counted. What a request costs besides its tokens weighs the
more the shorter its answer is, and the smaller the model.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import common

SEQS, LENGTH, PROMPTS = 64, 512, 192
IDLE_S = 3  # vLLM's workers look for work for a second after the last, on the cores that the other needs


def measure(new_tokens: int) -> None:
    from distillax.data import chat
    from distillax.teachers import Request, SamplingParams
    from distillax.teachers.vllm import VllmTeacher, server_environment

    folder, tokenizer = common.smollm2()
    stop = int(tokenizer.eos_token_id)
    requests = []
    for i, text in enumerate(common.prompts(PROMPTS)):
        messages = [{"role": "user", "content": text}]
        rendered = chat.render_prompt(tokenizer, messages)
        requests.append(Request(str(i), 0, messages, rendered, chat.encode(tokenizer, rendered)))
    prompts = folder.parent / "prompts.json"
    prompts.write_text(json.dumps([request.prompt_token_ids for request in requests]))
    sampling = SamplingParams(
        temperature=0, max_new_tokens=new_tokens, max_length=LENGTH, stop_token_ids=(stop,)
    )
    python = common.REPO / ".venv-vllm" / "bin" / "python"
    command = [
        python,
        common.REPO / "benchmarks/peer_vllm.py",
        folder,
        prompts,
    ]
    command += [new_tokens, SEQS, LENGTH, stop]
    peer = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=server_environment(os.environ, executable=python, cpu=True, local=True),
    )
    assert peer.stdin and peer.stdout

    def theirs() -> float:
        assert peer.stdin and peer.stdout
        print("go", file=peer.stdin, flush=True)
        while not (line := peer.stdout.readline()).startswith("{"):
            assert line, "the peer died"
        found = json.loads(line)
        return found["tokens"] / found["seconds"]

    speeds: dict[str, list[float]] = {"distillax": [], "vllm": []}
    with VllmTeacher(folder, max_num_seqs=SEQS, max_model_len=LENGTH) as teacher:

        def ours() -> float:
            start = time.perf_counter()
            tokens = sum(c.completion_tokens for c in teacher.generate(requests, sampling))
            return tokens / (time.perf_counter() - start)

        for counted in (False, True, True, True):
            for name, run in (("distillax", ours), ("vllm", theirs)):
                time.sleep(IDLE_S)
                speed = run()
                if counted:
                    speeds[name].append(speed)
    peer.stdin.close()
    peer.wait()
    middle = {name: round(statistics.median(values)) for name, values in speeds.items()}
    overhead = statistics.median(b / a - 1 for a, b in zip(speeds["distillax"], speeds["vllm"], strict=True))
    common.report(
        "vllm_overhead",
        {"max_new_tokens": new_tokens, "tokens_per_second": middle, "overhead": round(overhead, 3)},
    )


def main() -> None:
    for limit in [int(word) for word in sys.argv[1:]] or (256, 64):
        measure(limit)


if __name__ == "__main__":
    main()
