"""distillax: distil a large language model into a smaller one."""

import os
from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first used, so that `import distillax` costs nothing."""
    if name in ("Model", "load"):
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that there is no PyTorch
        from distillax import api

        return getattr(api, name)
    if name == "UserError":
        from distillax.errors import UserError

        return UserError
    raise AttributeError(f"module 'distillax' has no attribute {name!r}")
