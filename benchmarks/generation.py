"""Embedded generation against transformers' generate: bfloat16, batch 32, greedy, real prompts.

    python benchmarks/generation.py

Both answer the same prompts with at most 64 tokens, in turn, three times; the first round of each
(compilation, warm-up) is not counted. transformers gets batches of prompts of like length.
"""

import statistics
import time

import common

NEW_TOKENS, BATCH, PROMPTS = 64, 32, 192


def main() -> None:
    common.keep_freed_memory()
    import parts
    import torch
    from transformers import AutoModelForCausalLM

    from distillax.checkpoints.convert import to_hf
    from distillax.checkpoints.source import find
    from distillax.data import chat
    from distillax.models.generate import Engine, Prompt
    from distillax.models.sampling import Sampler

    folder = common.REPO / ".cache" / "bench" / "smollm2"
    if not folder.exists():
        to_hf(parts.smollm2_gguf(), folder, dtype="bfloat16")
    source = find(folder)
    tokenizer = source.tokenizer()
    texts = [[{"role": "user", "content": text}] for text in common.prompts(PROMPTS)]
    ids = [chat.encode(tokenizer, chat.render_prompt(tokenizer, text)) for text in texts]
    engine = Engine(source.params(), source.config, batch_size=BATCH, max_length=256, dtype="bfloat16")
    stop = int(tokenizer.eos_token_id)

    def ours() -> int:
        work = [Prompt(tokens, NEW_TOKENS) for tokens in ids]
        return sum(len(answer.tokens) for answer in engine.run(work, Sampler(stop_token_ids=(stop,))))

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ordered = sorted(ids, key=len)

    def theirs() -> int:
        count = 0
        for start in range(0, len(ordered), BATCH):
            group = ordered[start : start + BATCH]
            width = max(map(len, group))
            tokens = torch.tensor([[stop] * (width - len(row)) + row for row in group])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group])
            with torch.inference_mode():
                out = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            for row in out[:, width:].tolist():
                count += row.index(stop) if stop in row else len(row)
        return count

    speeds: dict[str, list[float]] = {"distillax": [], "transformers": []}
    for counted in (False, True, True, True):
        for name, run in (("distillax", ours), ("transformers", theirs)):
            start = time.perf_counter()
            tokens = run()
            if counted:
                speeds[name].append(tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(speeds["distillax"], speeds["transformers"], strict=True)]
    middle = {name: round(statistics.median(values)) for name, values in speeds.items()}
    common.report("generation", {"tokens_per_second": middle, "ratio": round(statistics.median(ratios), 2)})


if __name__ == "__main__":
    main()
