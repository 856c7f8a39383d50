"""vLLM's own offline loop, in its own environment: a line in, a round of generation, its figures out.

python benchmarks/peer_vllm.py MODEL PROMPTS.json NEW_TOKENS SEQS LENGTH STOP
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main(model: str, prompts: str, new_tokens: int, seqs: int, length: int, stop: int) -> None:
    with open(prompts) as file:
        requests = [{"prompt_token_ids": ids} for ids in json.load(file)]
    llm = LLM(
        model,
        max_num_seqs=seqs,
        max_model_len=length,
        dtype="bfloat16",
        enforce_eager=True,
        enable_chunked_prefill=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, stop_token_ids=[stop])
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len([t for t in o.outputs[0].token_ids if t != stop]) for o in outputs)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
