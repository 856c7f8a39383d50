"""Hugging Face -> Orbax -> Hugging Face, bit for bit; pruning; and what may stand where."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
import tiny
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from distillax.checkpoints import huggingface, safetensors_io, source, state
from distillax.checkpoints.convert import to_hf, to_orbax, write_side
from distillax.checkpoints.huggingface import FolderSource
from distillax.checkpoints.prune import layers_to_keep, prune
from distillax.checkpoints.source import find
from distillax.config import TrainConfig
from distillax.errors import UserError
from distillax.settings import dump


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "llama3.1"])
def test_round_trip_is_bit_exact(name: str, dtype: str, tmp_path: Path) -> None:
    """NaN payloads and negative zeros too: the bytes are what counts."""
    source = tmp_path / "source"
    tiny.make(name, source)
    arrays = {k: v.astype(getattr(ml_dtypes, dtype, dtype)) for k, v in tensors(source).items()}
    arrays["model.norm.weight"].view(np.uint8)[:8] = 0xFF
    save_file(arrays, source / "model.safetensors")
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    assert_same(source, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and config["model_type"] == find(source).config.hf["model_type"]


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read by layers, and still what Orbax writes: it restores every array itself."""
    tiny.make("llama3.2-tied", tmp_path / "source")
    params = find(tmp_path / "source").params()
    read_whole = []

    def spy(function: Callable[..., np.ndarray], whole_at: int) -> Callable[..., np.ndarray]:
        def read(*args: Any) -> np.ndarray:
            array = function(*args)
            if len(args) < whole_at or args[-1] is None:
                read_whole.append(array.shape)
            return array

        return read

    monkeypatch.setattr(state, "_CHUNK_BYTES", 1_000)
    monkeypatch.setattr(state, "read_param", spy(state.read_param, 3))
    monkeypatch.setattr(huggingface, "_read", spy(huggingface._read, 5))
    items = to_orbax(tmp_path / "source", tmp_path / "orbax")
    to_hf(items, tmp_path / "back")
    unstacked = [x.shape for name, x in params.items() if name != "layers"]
    small_ones = [x.shape for x in jax.tree.leaves(params["layers"]) if x.nbytes <= 1_000]
    assert sorted(read_whole) == sorted(unstacked * 2 + small_ones)
    assert_same(tmp_path / "source", tmp_path / "back")
    for path, store in state.open_params(items).items():
        assert store.chunk_layout.read_chunk.shape[0] == 1 or path[0] != "layers"
    with ocp.StandardCheckpointer() as plain:
        restored = plain.restore(items.absolute())
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_a_run_saves_its_parameters_by_layers(tmp_path: Path) -> None:
    params = {"embed": jnp.ones((6, 4)), "layers": {"q": jnp.arange(24.0).reshape(3, 2, 4)}}
    with state.RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, params, {"mu": jnp.zeros(2)}, {"epoch": 0})
    stores = state.open_params(tmp_path / "1" / state.MODEL_PARAMS)
    assert stores["layers", "q"].chunk_layout.read_chunk.shape == (1, 2, 4)
    one = state.read_param(stores["layers", "q"], np.dtype(np.float32), 1)
    np.testing.assert_array_equal(one, params["layers"]["q"][1])
    assert state.read_param(stores["embed",], np.dtype(np.float16)).dtype == np.float16


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small.chat_model("qwen3", tmp_path / "source")
    monkeypatch.setattr("distillax.checkpoints.huggingface._MAX_FILE_BYTES", 200_000)
    to_hf(source, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert_same(source, tmp_path / "many")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.num_parameters() == sum(v.size for v in tensors(source).values())
    to_orbax(tmp_path / "many", tmp_path / "orbax")
    to_hf(tmp_path / "orbax" / "0" / "items", tmp_path / "again")
    assert_same(source, tmp_path / "again")
    assert find(tmp_path / "again").tokenizer().chat_template == find(source).tokenizer().chat_template
    (tmp_path / "many" / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next((tmp_path / "many").glob("model-00003-*")).unlink()
    with pytest.raises(UserError, match="download it again"):
        FolderSource(tmp_path / "many")


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_tells_what_was_trained_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that went on from another one, from a model of the hub, cut: each on its own, and its base."""
    tiny.make("qwen3", tmp_path / "source")
    with monkeypatch.context() as hub:
        hub.setattr(source.Source, "base_model", "some/model")
        prune(tmp_path / "source", tmp_path / "cut", keep=[0, 2])
    before = tmp_path / "cut"
    for name, step, changes in (
        ("first", 20, {"hf_path": "json"}),
        (
            "second",
            3,
            {"method": "online", "teacher_load_parameters_path": "some/teacher", "distill_temperature": 2.0},
        ),
    ):
        run = tmp_path / name
        write_side(find(before), run / "huggingface", datasets=["some/data"] if name == "first" else ())
        items = to_orbax(tmp_path / "cut", tmp_path / "orbax")
        shutil.copytree(items, run / "checkpoints" / str(step) / "model_params")
        config = TrainConfig(**{"hf_path": "parquet", "load_parameters_path": str(before), **changes})
        (run / "config.yml").write_text(dump(config))
        lines = [{"step": n, "weight_sum": 10.0} for n in range(1, step + 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step')
        before = run
    to_hf(run, tmp_path / "out", datasets=["other/prompts", str(tmp_path)])
    card = (tmp_path / "out" / "README.md").read_text()
    head = front_matter(card)
    assert (head["base_model"], head["datasets"]) == ("some/model", ["other/prompts", "some/data"])
    assert head["tags"] == ["distillax", "distillation"] and "license" not in head
    assert "- Source: `source, cut to 2 layers`\n- License: see the source model\n" in card
    first, second = (line for line in card.splitlines() if line.startswith("- Training "))
    assert "fine-tuning on text (`sft`); 20 steps, 200 tokens with loss, peak learning rate 2e-05" in first
    assert "logits of `some/teacher` matched (`online`), forward_kl at temperature 2, weight 0.5" in second
    assert "; 3 steps, 30 tokens" in second
    # The export, once more exported, or as the student of another run, still has its history.
    shutil.copytree(run, later := tmp_path / "later")
    (later / "config.yml").write_text(dump(config.model_copy(update={"load_parameters_path": "out"})))
    to_hf(tmp_path / "out", tmp_path / "again")
    to_hf(later, tmp_path / "more", source_name="out, distilled from teacher")
    again, more = ((tmp_path / name / "README.md").read_text() for name in ("again", "more"))
    told = [line for line in card.splitlines() if line.startswith(("- Source: ", "- Training "))]
    assert [line for line in again.splitlines() if line in told] == told
    assert "- Source: `out, distilled from teacher`\n- Begun from: `source, cut to 2 layers`\n" in more
    assert f"{first}\n{second}\n{second.replace('Training 2', 'Training 3')}\n- Versions" in more
    assert re.search(r"^- Versions: distillax [\d.]+, jax [\d.]+, transformers [\d.]+", card, re.M)
    # One that lies in its run's folder is of the step that was exported, and not of the run's last.
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "5")
    to_hf(run / "checkpoints" / "3", run / "exported")
    to_hf(run / "exported", tmp_path / "moved")
    assert f"{first}\n{second}\n- Versions" in (tmp_path / "moved" / "README.md").read_text()


def run_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the Python of an export's card prints, and its shell commands."""
    card = (folder / "README.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", card, re.S)
    capsys.readouterr()
    exec(python.replace("PATH", str(folder)), {})
    return capsys.readouterr().out, "".join(re.findall(r"```sh\n(.*?)```", card, re.S))


def test_a_card_says_how_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a chat template, without one, and without a tokenizer; what it says runs in transformers."""
    source = small.chat_model("qwen3", tmp_path / "source")
    to_hf(source, tmp_path / "chat")
    said, shell = run_card(tmp_path / "chat", capsys)
    assert said.strip() and "vllm serve PATH" in shell
    url, body = re.findall(r"curl (\S+) .*-d '(.*)'", shell, re.S)[0]
    assert url == "http://localhost:8000/v1/chat/completions"
    assert json.loads(body)["messages"][0]["role"] == "user"
    jinja = source / "chat_template.jinja"
    assert "enable_thinking" not in (tmp_path / "chat" / "README.md").read_text() + jinja.read_text()
    jinja.write_text(jinja.read_text() + "{% if enable_thinking %}{% endif %}")
    to_hf(source, tmp_path / "thinking")
    assert "template `enable_thinking=False`" in (tmp_path / "thinking" / "README.md").read_text()
    jinja.unlink()
    to_hf(source, tmp_path / "base")
    said, shell = run_card(tmp_path / "base", capsys)
    url, body = re.findall(r"curl (\S+) .*-d '(.*)'", shell, re.S)[0]
    assert said.strip() and url.endswith("/v1/completions") and json.loads(body)["prompt"]
    (source / "tokenizer.json").unlink()
    to_hf(source, tmp_path / "bare")
    assert run_card(tmp_path / "bare", capsys) == ("", "")


def test_a_card_follows_paths_that_were_given_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones, of runs in a project's folder, for a card that is written in another folder; and the
    teacher of a cache, by its manifest."""
    tiny.make("qwen3", tmp_path / "source")
    items = to_orbax(tmp_path / "source", tmp_path / "orbax")
    project, cache = tmp_path / "project", tmp_path / "project" / "data" / "cache"

    def train(name: str, **keys: str) -> Path:
        run = project / "runs" / name
        write_side(find(tmp_path / "source"), run / "huggingface")
        shutil.copytree(items, run / "checkpoints" / "2" / "model_params", dirs_exist_ok=True)
        (run / "config.yml").write_text(dump(TrainConfig(run_name=name, hf_path="json", **keys)))
        return run

    def trainings() -> list[str]:
        to_hf(second, tmp_path / "out", replace=True)
        return re.findall("^- Training .*", (tmp_path / "out" / "README.md").read_text(), re.M)

    train("first", load_parameters_path="models/student")
    keys = {"load_parameters_path": "runs/first/latest", "method": "cached"}
    second = train("second", teacher_cache_path="data/cache", **keys)
    (project / "models" / "teacher").mkdir(parents=True)
    (project / "models" / "student").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, last = trainings()
    assert "`sft`" in first and "logits matched from a cache (`cached`)" in last  # which is gone
    cache.mkdir(parents=True)
    for manifest, said in (
        ({"teacher": "some/teacher"}, "some/teacher"),
        ({"teacher": "models/teacher"}, "teacher"),  # a folder of the project
        ({}, ""),
    ):
        (cache / "manifest.json").write_text(json.dumps(manifest))
        of = f" of `{said}`" if said else ""
        assert f"logits{of} matched from a cache (`cached`), forward_kl" in trainings()[1]
    # What is named for the check of the cache goes first; where the base folder is absolute, it is the same.
    keys["base_output_directory"] = str(project / "runs")
    second = train("second", teacher_load_parameters_path="models/teacher", **keys)
    assert len(trainings()) == 2 and "logits of `teacher` matched" in trainings()[1]
    # A run is called by its name, as a teacher and as a source.
    for end in ("latest", "checkpoints/2/model_params"):
        second = train("second", teacher_load_parameters_path=f"runs/first/{end}", **keys)
        assert "logits of `first` matched" in trainings()[1]
        to_hf(second / end, tmp_path / "of_run", replace=True)
        assert "\n# second\n" in (card := (tmp_path / "of_run" / "README.md").read_text())
        assert "- Source: `student`\n" in card  # from which the first was begun
    # A path that is nowhere, or a hub id, leads to no run, not even to the one where the command is given.
    monkeypatch.chdir(train("other", load_parameters_path="some/student"))
    assert len(trainings()) == 2


def test_a_license_goes_along(tmp_path: Path, smollm2_gguf: Path) -> None:
    tiny.make("qwen3", tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(
        "---\ntags: [x]\nlicense: apache-2.0\n---\n\nlicense: mit\n"
    )
    to_orbax(tmp_path / "source", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["distillax"],
    }
    assert "- License: apache-2.0\n" in card and "Training" not in card
    assert find(smollm2_gguf).license == "apache-2.0"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps(config | {"license": "ours: all\nrights: reserved"})
    )
    assert find(tmp_path / "out").license is None
    tiny.make("qwen3", tmp_path / "bare")
    to_hf(tmp_path / "bare", tmp_path / "out2")
    assert "- License: see the source model\n" in (tmp_path / "out2" / "README.md").read_text()


def test_a_tokenizer_is_not_read_again_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find(small.chat_model("qwen3", tmp_path / "model"))
    tokenizer = model.tokenizer()
    monkeypatch.delattr(AutoTokenizer, "from_pretrained")
    write_side(model, tmp_path / "side", tokenizer)
    kept = (tmp_path / "side" / "tokenizer.json").read_bytes()
    assert kept == (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert source.tokenizer_folder(tokenizer) == tmp_path / "model"
    tokenizer.add_tokens(["another"])
    assert source.tokenizer_folder(tokenizer) is None


def test_a_tokenizer_keeps_its_files_or_has_such_as_transformers_4_reads(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    """4.57 loads neither the class TokenizersBackend nor a list of extra tokens, which 5 writes."""
    made = find(smollm2_gguf).tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    write_side(find(smollm2_gguf), tmp_path / "made", made)
    written = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<extra>"]
    assert not {"extra_special_tokens", "backend"} & set(written)
    again = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert again.encode("<extra> a") == made.encode("<extra> a")
    assert "<extra>" in again.all_special_tokens and again.chat_template == made.chat_template

    folder = small.chat_model("qwen3", tmp_path / "folder")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n\n")  # nobody else writes it so
    write_side(find(folder), tmp_path / "kept", find(folder).tokenizer(), (3,))
    assert (tmp_path / "kept" / config.name).read_bytes() == config.read_bytes()
    assert json.loads((tmp_path / "kept" / "generation_config.json").read_text())["eos_token_id"] == 3
    changed = find(folder).tokenizer()
    changed.chat_template = "{{ messages[0].content }}"
    write_side(find(folder), tmp_path / "changed", changed)
    assert AutoTokenizer.from_pretrained(tmp_path / "changed").chat_template == changed.chat_template


def test_orbax_has_nothing_to_complain_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.make("qwen3", tmp_path / "source")
    caplog.set_level("WARNING", logger="absl")
    to_orbax(tmp_path / "source", tmp_path / "orbax")
    find(tmp_path / "orbax").params()
    assert not caplog.records
    logging.getLogger("absl").warning("Metadata file does not exist")  # of somebody else's
    assert len(caplog.records) == 1


def test_a_run_is_known_by_its_export(tmp_path: Path) -> None:
    tiny.make("smollm2", tmp_path / "run" / "export")
    (tmp_path / "run" / "student").symlink_to("export")
    found = find(tmp_path / "run")
    assert found.path == tmp_path / "run" / "export" and found.name == str(found.path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    tiny.make("llama2", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            safetensors_io.read_header(file)


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make("llama2", tmp_path / "source")

    def fail(self: object, name: str, array: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_io.Writer, "write", fail)
    with pytest.raises(OSError):
        to_hf(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_overwritten(tmp_path: Path) -> None:
    tiny.make("llama2", tmp_path / "source")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    for convert in (to_hf, to_orbax):
        with pytest.raises(UserError, match="something else"):
            convert(tmp_path / "source", tmp_path / "thesis")


def test_a_tied_model_may_repeat_its_head_but_not_change_it(tmp_path: Path) -> None:
    tiny.make("qwen2", tmp_path)
    arrays = tensors(tmp_path)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, tmp_path / "model.safetensors")
    assert find(tmp_path).params()["embed"].shape == (160, 64)
    arrays["lm_head.weight"][3, 3] += 1
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="differs from the embedding"):
        find(tmp_path).params()


@pytest.mark.parametrize(
    ("total", "layers", "kept"),
    [(30, 4, [0, 10, 19, 29]), (6, 3, [0, 3, 5]), (6, 2, [0, 5]), (6, 1, [0]), (5, 4, [0, 1, 3, 4])],
)
def test_the_pruning_rule(total: int, layers: int, kept: list[int]) -> None:
    assert layers_to_keep(total, layers) == kept


def test_the_pruning_rule_keeps_different_layers_from_the_first_to_the_last() -> None:
    for total in range(2, 100):
        for layers in range(2, total):
            kept = layers_to_keep(total, layers)
            gaps = np.diff(kept)
            assert len(kept) == layers and (kept[0], kept[-1]) == (0, total - 1)
            assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("name", ["gemma3", "gemma3-softcap", "qwen2-window", "llama3.2-tied"])
def test_pruned_layers_are_the_teachers_own(name: str, tmp_path: Path) -> None:
    """Weights, windows and output: as transformers' model has them with the other layers taken out."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = tiny.make(name, tmp_path / "whole")
    assert prune(tmp_path / "whole", tmp_path / "cut", keep=[0, 2]) == [0, 2]
    before, after = find(tmp_path / "whole").config, find(tmp_path / "cut").config
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "# whole, cut to 2 layers" in card and "with 2 layers of width" in card
    assert "- Source: `whole, cut to 2 layers`\n" in card
    assert after.windows == (before.windows[0], before.windows[2])
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", attn_implementation="eager").eval()
    for name, tensor in cut.model.layers[1].state_dict().items():
        assert torch.equal(tensor, whole.model.layers[2].state_dict()[name])
    import distillax

    tokens = np.random.default_rng(0).integers(3, 160, (1, 40))
    with torch.no_grad():
        wanted = cut(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(distillax.load(tmp_path / "cut").logits(tokens))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_folders_beside_models_survive(tmp_path: Path) -> None:
    """A folder of models, a run, and the source itself are not taken for an earlier export."""
    source = small.chat_model("qwen3", tmp_path / "models" / "a")
    (tmp_path / "models" / "thesis.txt").write_text("years of work")
    for output in (tmp_path / "models", source):
        with pytest.raises(UserError):
            to_hf(source, output)
    to_hf(source, tmp_path / "export")
    with pytest.raises(UserError, match="the source itself"):
        to_hf(tmp_path / "export", tmp_path / "export")
    to_hf(source, tmp_path / "export")  # what the same call wrote is replaced
    to_orbax(source, tmp_path / "orbax")
    to_orbax(source, tmp_path / "orbax")
    for folder, again in (
        ("export", lambda out: to_hf(tmp_path / "orbax", out)),
        ("export", lambda out: to_hf(source, out, dtype="bfloat16")),
        ("export", lambda out: prune(source, out, keep=[0])),
        ("orbax", lambda out: to_orbax(tmp_path / "export", out)),
    ):
        with pytest.raises(UserError, match=f"{folder} holds a model that another command wrote"):
            again(tmp_path / folder)
    for folder, again in (("export", to_hf), ("orbax", to_orbax)):
        (tmp_path / folder / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match=f"{folder} holds something else"):
            again(source, tmp_path / folder)
        (tmp_path / folder / "notes.txt").unlink()
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match=r"new\.partial is in the way"):
        to_hf(source, tmp_path / "new")
    assert prune(source, tmp_path / "export", keep=[0], replace=True) == [0]
    assert prune(source, tmp_path / "export", keep=[0]) == [0]
    with pytest.raises(UserError, match="another command"):
        to_hf(source, tmp_path / "orbax")
    assert (tmp_path / "models" / "thesis.txt").exists() and (source / "model.safetensors").exists()


def test_a_killed_conversion_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make("llama2", tmp_path / "source")
    with monkeypatch.context() as broken:
        broken.setattr("distillax.checkpoints.state.save_params", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_orbax(tmp_path / "source", tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    assert to_orbax(tmp_path / "source", tmp_path / "orbax").is_dir()


def test_layers_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    tiny.make("llama2", tmp_path)
    arrays = tensors(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name].astype(np.float16)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="float16, float32"):
        find(tmp_path).params()
    assert find(tmp_path).params(np.float32)["embed"].dtype == np.float32


@pytest.mark.parametrize("kind", ["folder", "orbax"])
def test_a_copy_is_the_same_model_and_another_byte_is_not(kind: str, tmp_path: Path) -> None:
    """A cache or a data set may be made on one host and used on another."""
    model = tmp_path / "model"
    tiny.make("qwen3", model)
    if kind == "orbax":
        to_orbax(str(model), str(tmp_path / "orbax"))
        model = tmp_path / "orbax"
    identity = find(model).identity()
    copied = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    (copied / "README.md").write_text("A copy.")
    assert find(copied).identity() == identity
    largest = max(
        (path for path in copied.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert find(copied).identity() != identity


def test_a_large_file_is_known_by_blocks_from_all_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_BLOCK", 8)
    file = tmp_path / "file"
    data = bytes(range(251)) * 4
    file.write_bytes(data)
    whole, digest = source._digest(file, 1000), source._digest(file, 3)
    for changed, seen in ((0, True), (500, True), (1003, True), (20, False)):
        file.write_bytes(data[:changed] + b"?" + data[changed + 1 :])
        assert (source._digest(file, 3) != digest) == seen and source._digest(file, 1000) != whole
