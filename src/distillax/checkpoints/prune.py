"""Depth pruning: a student made of some of the teacher's own layers."""

from pathlib import Path
from typing import Any

from distillax.checkpoints.convert import to_hf
from distillax.checkpoints.source import find
from distillax.errors import UserError
from distillax.models.families import with_layers


def layers_to_keep(total: int, layers: int) -> list[int]:
    """The rule: the first layer, the last, and between them as evenly as can be (of one: the first).

    So the student of Distil-Whisper is begun (arXiv 2311.00430). Others cut one stretch out of the middle
    (ShortGPT, arXiv 2403.03853), which was no better after training where that was measured
    (docs/models.md). Raises UserError for a number that is not below `total`.
    """
    if not 1 <= layers < total:
        raise UserError(
            f"cannot keep {layers} layers: the model has {total}; keep between 1 and {total - 1} of them"
        )
    last = max(layers - 1, 1)
    return [(i * (total - 1) + last // 2) // last for i in range(layers)]


def prune(
    source: str | Path,
    folder: str | Path,
    *,
    layers: int | None = None,
    keep: list[int] | None = None,
    dtype: Any = None,
    hf_access_token: str | None = None,
    replace: bool = False,
) -> list[int]:
    """Writes a Hugging Face folder with some of the layers of any source. Returns the layers kept.

    `keep` names them (counted from 0, in ascending order); `layers` leaves the choice to
    `layers_to_keep`. `replace` as in `convert.to_hf`.
    """
    found = find(source, hf_access_token=hf_access_token)
    total = found.config.layers
    if (layers is None) == (keep is None):
        raise UserError("give either --layers, a number, or --keep, a list such as 0,1,5")
    chosen = layers_to_keep(total, layers) if layers is not None else list(keep or [])
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= total:
        raise UserError(
            f"--keep {','.join(map(str, chosen))}: name layers from 0 to {total - 1} in ascending order"
        )
    to_hf(
        source,
        folder,
        dtype=dtype,
        layers=chosen,
        config=with_layers(found.config, chosen),
        title=f"{Path(found.name).name}, cut to {len(chosen)} layers",
        hf_access_token=hf_access_token,
        replace=replace,
    )
    return chosen
