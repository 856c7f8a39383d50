"""Embedded generation against transformers' generate: bfloat16, batch 32, greedy, real prompts.

    python benchmarks/generation.py [LIMIT ...]

Both answer the same 128 prompts, in turn, with at most 256 new tokens (what `distillax generate`
allows by default) and again with at most 64. The first round of each (compilation, warm-up) is not
counted. transformers gets batches of prompts of like length; it runs each until its last row ends.
"""

import statistics
import sys
import time

import common

BATCH, PROMPTS, ROUNDS = 32, 128, 2


def main() -> None:
    common.keep_freed_memory()
    import torch
    from transformers import AutoModelForCausalLM

    from distillax.checkpoints.source import find
    from distillax.data import chat
    from distillax.models.generate import Engine, Prompt
    from distillax.models.sampling import Sampler

    folder, tokenizer = common.smollm2()
    source = find(folder)
    texts = [[{"role": "user", "content": text}] for text in common.prompts(PROMPTS)]
    ids = [chat.encode(tokenizer, chat.render_prompt(tokenizer, text)) for text in texts]
    engine = Engine(source.params(), source.config, batch_size=BATCH, max_length=512, dtype="bfloat16")
    stop = int(tokenizer.eos_token_id)

    def ours(new_tokens: int) -> int:
        work = [Prompt(tokens, new_tokens) for tokens in ids]
        return sum(len(answer.tokens) for answer in engine.run(work, Sampler(stop_token_ids=(stop,))))

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ordered = sorted(ids, key=len)

    def theirs(new_tokens: int) -> int:
        count = 0
        for start in range(0, len(ordered), BATCH):
            group = ordered[start : start + BATCH]
            width = max(map(len, group))
            tokens = torch.tensor([[stop] * (width - len(row)) + row for row in group])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group])
            with torch.inference_mode():
                out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
            for row in out[:, width:].tolist():
                count += row.index(stop) if stop in row else len(row)
        return count

    for new_tokens in [int(limit) for limit in sys.argv[1:]] or (256, 64):
        speeds: dict[str, list[float]] = {"distillax": [], "transformers": []}
        for counted in range(ROUNDS + 1):
            for name, run in (("distillax", ours), ("transformers", theirs)):
                start = time.perf_counter()
                tokens = run(new_tokens)
                if counted:
                    speeds[name].append(tokens / (time.perf_counter() - start))
        ratios = [a / b for a, b in zip(speeds["distillax"], speeds["transformers"], strict=True)]
        middle = {name: round(statistics.median(values)) for name, values in speeds.items()}
        figures = {"max_new_tokens": new_tokens, "tokens_per_second": middle}
        common.report("generation", {**figures, "ratio": round(statistics.median(ratios), 2)})


if __name__ == "__main__":
    main()
