"""What to do where memory runs out, by the command that ran."""

from distillax.errors import out_of_memory

_TRAIN = (
    "a smaller {0}per_device_batch_size with as many times more {0}gradient_accumulation_steps, "
    "{0}remat_policy=full, more devices to split the weights over ({0}ici_fsdp_parallelism), "
    "{1}teacher_quantization=int8 for a teacher in memory, or a shorter {0}max_target_length"
)
_SMALLER = {
    "train": f"{_TRAIN.format('', '')}; `distillax plan` says beforehand what a recipe needs",
    "run": f"{_TRAIN.format('train.', 'match.')} (and so for match.), or a lower generate.max_num_seqs",
    "generate": "a lower --max-num-seqs, or a shorter --max-target-length",
    "capture": "a shorter --max-target-length, or --teacher-quantization int8",
    "evaluate": "a shorter --max-target-length, or bfloat16 exports of the models "
    "(`distillax convert to-hf MODEL DIR --dtype bfloat16`)",
}


def sentence(error: BaseException, command: str) -> str | None:
    """The sentence about an error that says that memory ran out, or None if it is another one."""
    if (what := out_of_memory(error)) is None:
        return None
    return f"{what}; give {_SMALLER.get(command, 'it more')}"
