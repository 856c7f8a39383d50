"""The memory of MaxText's training step, compiled for a TPU by libtpu: prints JSON.

    PYTHONPATH=FOLDER python benchmarks/peer_maxtext.py compile_topology=v6e-8 [key=value ...]

FOLDER has what benchmarks/maxtext.txt names. What MaxText imports besides and a step of a dense model does
not call (clouds, servers, kernels for other models) is replaced by names without content.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

_NOT_CALLED = (
    "PIL",
    "cloud_accelerator_diagnostics",
    "drjax",
    "google.api_core",
    "google.auth",
    "google.cloud",
    "maxtext.kernels.mhc",  # in the syntax of Python 3.12, as tokamax
    "pathwaysutils",
    "sentencepiece",
    "tiktoken",
    "tokamax",
)


class _Hollow(types.ModuleType):
    """A module that has every name."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, found := MagicMock(name=f"{self.__name__}.{name}"))
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(name + ".") for name in _NOT_CALLED):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main(*keys: str) -> None:
    sys.meta_path.insert(0, _Finder())
    import jax.experimental.xla_metadata as metadata
    import jax.stages

    if not hasattr(metadata, "must_fuse_call"):  # of a younger JAX, for a kernel that is not the default
        vars(metadata)["must_fuse_call"] = MagicMock()
    compile_it = jax.stages.Lowered.compile
    found: list[Any] = []

    def compile_and_keep(lowered: Any, *args: Any, **options: Any) -> Any:
        found.append(compile_it(lowered, *args, **options))
        return found[-1]

    jax.stages.Lowered.compile = compile_and_keep
    from maxtext.trainers.pre_train import train_compile

    spec = importlib.util.find_spec("maxtext")
    assert spec and spec.origin
    base = Path(spec.origin).parent / "configs" / "base.yml"
    try:
        train_compile.main(["train_compile", str(base), "compile_topology_num_slices=1", *keys])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("", json.dumps({"fits": False, "said": str(error)}), sep="\n")
        return
    memory = found[-1].memory_analysis()
    names = ("peak_memory_in_bytes", "argument_size_in_bytes", "temp_size_in_bytes")
    print("", json.dumps({"fits": True, **{name: getattr(memory, name) for name in names}}), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
