import math
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distillax.config import GenerateConfig, MatchConfig, PipelineConfig, PlanConfig, TrainConfig
from distillax.errors import UserError
from distillax.parallel.mesh import _resolve
from distillax.settings import describe, dump, load_config

REPO = Path(__file__).parents[1]


def train(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, None, overrides)


COMMANDS = {"distillax train": TrainConfig, "distillax run": PipelineConfig, "distillax plan": PlanConfig}


def refusal(cls: type, *overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(cls, str(recipe) if recipe else None, overrides, COMMANDS)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Values


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_learning_rates_read_the_same_in_a_recipe_and_on_the_command_line(tmp_path, text):
    recipe = write(tmp_path / "r.yml", f"learning_rate: {text}\n")
    assert (
        load_config(TrainConfig, str(recipe)).learning_rate
        == train(f"learning_rate={text}").learning_rate
        == 1e-4
    )


@pytest.mark.parametrize("text", ["['messages']", "[messages]", '["messages"]', "messages"])
def test_columns_read_as_typed_on_a_shell(text):
    assert train(f"train_data_columns={text}").train_data_columns == ("messages",)


def test_two_columns():
    assert train("train_data_columns=prompt,completion").train_data_columns == ("prompt", "completion")
    assert train("train_data_columns=['prompt', 'completion']").train_data_columns == ("prompt", "completion")


@pytest.mark.parametrize("name", ["007", "2024-01-01", "no", "12:30", "1e3", "true", "a=b", "x: y # z"])
def test_text_is_never_read_as_something_else(tmp_path, name):
    assert train(f"run_name={name}").run_name == name
    quoted = yaml.safe_dump({"run_name": name})
    assert load_config(TrainConfig, str(write(tmp_path / "r.yml", quoted))).run_name == name


def test_plain_yaml_text_is_never_read_as_something_else(tmp_path):
    recipe = write(tmp_path / "r.yml", "run_name: 007\nhf_path: no\ntrain_split: 2024-01-01\n")
    config = load_config(TrainConfig, str(recipe))
    assert (config.run_name, config.hf_path, config.train_split) == ("007", "no", "2024-01-01")


def test_null_is_the_absence_of_a_value():
    config = train("enable_thinking=null", "hf_train_files=null")
    assert config.enable_thinking is None and config.hf_train_files == ""
    assert train("enable_thinking=False").enable_thinking is False


def test_the_keys_of_the_tutorials_two_commands_are_taken():
    for stage in (["hf_path=parquet", "hf_train_files=d.parquet", "train_split=train"], ["hf_path=org/data"]):
        config = train(
            "run_name=r",
            "base_output_directory=/mnt/x",
            "tokenizer_path=meta-llama/Llama-3.1-8B-Instruct",
            "tokenizer_type=huggingface",
            "dataset_type=hf",
            *stage,
            "train_data_columns=[messages]",
            "load_parameters_path=/mnt/x/0/items",
            "model_name=llama3.1-8b",
            "per_device_batch_size=2",
            "steps=200",
            "ici_expert_parallelism=-1",
            "ici_fsdp_parallelism=4",
            "max_target_length=2048",
            "hf_access_token=hf_x",
            "profiler=xplane",
        )
        assert config.ici_data_parallelism == 1  # the -1 of another axis takes what is left
    assert train("scan_layers=True").scan_layers


# Mesh axes


@pytest.mark.parametrize(
    ("keys", "data", "fsdp"),
    [
        ("", 1, -1),  # as in MaxText
        ("tensor=2", 1, -1),
        ("data=4", 4, -1),
        ("data=-1", -1, 1),
        ("expert=-1", 1, 1),
        ("fsdp=4", -1, 4),
        ("fsdp=1", -1, 1),
        ("fsdp=4 tensor=2", -1, 4),
        ("fsdp=4 expert=-1", 1, 4),
        ("fsdp=-1", 1, -1),
        ("data=2 fsdp=4", 2, 4),
    ],
)
def test_the_axis_that_takes_what_is_left(keys, data, fsdp):
    config = train(*(f"ici_{key.replace('=', '_parallelism=')}" for key in keys.split()))
    assert (config.ici_data_parallelism, config.ici_fsdp_parallelism) == (data, fsdp)
    assert (config.dcn_data_parallelism, config.dcn_fsdp_parallelism) == (-1, 1)


def test_slices_split_the_batch_unless_another_axis_takes_them():
    config = TrainConfig(dcn_fsdp_parallelism=-1)
    assert (config.dcn_data_parallelism, config.ici_data_parallelism, config.ici_fsdp_parallelism) == (
        1,
        1,
        -1,
    )
    assert TrainConfig(dcn_fsdp_parallelism=2).dcn_data_parallelism == -1
    assert _resolve(train(), "dcn", 2) == (2, 1, 1, 1, 1) and _resolve(train(), "ici", 8) == (1, 8, 1, 1, 1)


def test_two_free_axes_are_refused():
    sentence = refusal(TrainConfig, "ici_tensor_parallelism=-1", "ici_fsdp_parallelism=-1")
    assert "ici_fsdp_parallelism and ici_tensor_parallelism are both -1" in sentence
    assert "both -1" in refusal(TrainConfig, "ici_data_parallelism=-1", "ici_fsdp_parallelism=-1")


@pytest.mark.parametrize(
    ("keys", "devices", "advice"),
    [
        ("fsdp=3", 8, "a multiple of 3 devices, but there are 8; set ici_fsdp_parallelism=2"),
        ("fsdp=-1 tensor=3", 8, "3 devices, but there are 8; set ici_tensor_parallelism=2"),
        ("data=1 fsdp=4", 8, " asks for 4 devices, but there are 8; set ici_data_parallelism=-1"),
        ("fsdp=8 tensor=4", 8, "32 devices, but there are 8; set ici_tensor_parallelism=1"),
        ("fsdp=6 tensor=4", 8, "set ici_fsdp_parallelism=4 ici_tensor_parallelism=2"),
        (
            "data=1 fsdp=1",
            8,
            "ici_data_parallelism=1 asks for 1 device, but there are 8; set ici_data_parallelism=-1",
        ),
        ("fsdp=3 tensor=5", 8, "set ici_fsdp_parallelism=2 ici_tensor_parallelism=4"),
    ],
)
def test_sizes_that_fit_are_named(keys, devices, advice):
    words = [f"ici_{key.replace('=', '_parallelism=')}" for key in keys.split()]
    with pytest.raises(UserError) as refused:
        _resolve(train(*words), "ici", devices)
    assert str(refused.value).endswith(advice)
    changed = dict(word.split("=") for word in [*words, *advice.split("set ")[1].split()])
    assert math.prod(_resolve(train(*("=".join(x) for x in changed.items())), "ici", devices)) == devices


def test_an_axis_of_zero_is_refused():
    assert refusal(TrainConfig, "dcn_fsdp_parallelism=0") == (
        "command line: dcn_fsdp_parallelism must be -1 (whatever is left) or at least 1, not '0'."
    )


# Errors


def test_an_unknown_key_names_the_nearest_and_its_place(tmp_path):
    assert refusal(TrainConfig, "stepz=1") == "command line: unknown key stepz; did you mean steps?"
    recipe = write(tmp_path / "r.yml", "run_name: r\n\nlerning_rate: 1\n")
    assert refusal(TrainConfig, recipe=recipe) == (
        f"{recipe}:3: unknown key lerning_rate; did you mean learning_rate?"
    )
    assert refusal(TrainConfig, "seed=1").endswith("did you mean data_shuffle_seed or init_weights_seed?")
    assert "--help" in refusal(TrainConfig, "zzz=1")


def test_the_line_is_that_of_the_base_recipe_where_the_key_stands(tmp_path):
    base = write(tmp_path / "base.yml", "# comment\nstepz: 1\n")
    recipe = write(tmp_path / "r.yml", "base: base.yml\nsteps: 2\n")
    assert refusal(TrainConfig, recipe=recipe).startswith(f"{base}:2: unknown key stepz")


def test_a_recipe_of_another_command_names_the_command(tmp_path):
    """And no file of the program's, which nobody should edit; but a key that is wrong in either is told."""
    for name in ("sft", "online.yml", "recipes/cached.yml"):
        said = refusal(PipelineConfig, "teacher=x", "steps=9", recipe=Path(name))
        assert said == f"{name} has steps, so it is a recipe for `distillax train {name}`."
    for cls in (TrainConfig, PlanConfig):
        said = refusal(cls, recipe=Path("demo"))
        assert said == "demo has student.layers, so it is a recipe for `distillax run demo`."
    mine = write(tmp_path / "mine.yml", "teacher: x\nprompts: {path: q.jsonl}\n")
    assert refusal(TrainConfig, recipe=mine).endswith(f"so it is a recipe for `distillax run {mine}`.")
    mine = write(tmp_path / "mine.yml", "steps: 3\ntopology: v6e-8\n")
    assert refusal(TrainConfig, recipe=mine).endswith(f"so it is a recipe for `distillax plan {mine}`.")
    mine = write(tmp_path / "mine.yml", "steps: 3\noptimizer: {lr: 1}\n")
    assert refusal(TrainConfig, recipe=mine).startswith(f"{mine}:2: unknown key optimizer.lr")
    mine = write(tmp_path / "mine.yml", "teacher: x\nsteps: 3\n")
    assert refusal(PipelineConfig, recipe=mine).startswith(f"{mine}:2: unknown key steps; did you mean")
    assert refusal(PipelineConfig, "steps=3").startswith("command line: unknown key steps; did you mean")
    mine = write(tmp_path / "mine.yml", "train: {stepz: 3}\n")
    assert refusal(PipelineConfig, recipe=mine).startswith(f"{mine}:1: unknown key train.stepz; did you mean")


@pytest.mark.parametrize(
    ("override", "must"),
    [
        ("steps=many", "steps must be a whole number, not 'many'"),
        ("steps=1.5", "steps must be a whole number, not '1.5'"),
        ("steps=true", "steps must be a whole number, not 'true'"),
        ("steps=null", "steps must be a whole number, not null"),
        ("steps=0", "steps must be greater than or equal to 1, not '0'"),
        ("learning_rate=fast", "learning_rate must be a number, not 'fast'"),
        ("learning_rate=nan", "learning_rate must be a finite number, not 'nan'"),
        ("packing=maybe", "packing must be true or false, not 'maybe'"),
        ("method=magic", "method must be 'sft', 'online' or 'cached', not 'magic'"),
        ("train_data_columns=['a'", "train_data_columns must be a list such as ['messages'], not \"['a'\""),
        ("distill_alpha=2", "distill_alpha must be less than or equal to 1, not '2'"),
    ],
)
def test_a_wrong_value_says_key_value_and_what_it_must_be(override, must):
    assert refusal(TrainConfig, override) == f"command line: {must}."


def test_a_wrong_value_in_a_recipe_says_where(tmp_path):
    recipe = write(tmp_path / "r.yml", "a: &x\nsteps: [1, 2]\n")
    assert refusal(TrainConfig, recipe=recipe).startswith(f"{recipe}:1: unknown key a")
    recipe = write(tmp_path / "r.yml", "run_name: r\nsteps: [1, 2]\n")
    assert refusal(TrainConfig, recipe=recipe) == f"{recipe}:2: steps must be a whole number, not ['1', '2']."
    recipe = write(tmp_path / "r.yml", "steps: {}\n")
    assert refusal(TrainConfig, recipe=recipe) == f"{recipe}:1: steps must be a whole number, not null."


@pytest.mark.parametrize(
    ("cls", "values", "sentence"),
    [
        (
            TrainConfig,
            {"learning_rte": 1},
            "TrainConfig: unknown key learning_rte; did you mean learning_rate?",
        ),
        (TrainConfig, {"steps": 0}, "TrainConfig: steps must be greater than or equal to 1, not 0."),
        (TrainConfig, {"steps": "many"}, "TrainConfig: steps must be a whole number, not 'many'."),
        (
            TrainConfig,
            {"distill_layer_indices": (0, "x")},
            "TrainConfig: distill_layer_indices must be a list of whole numbers, not (0, 'x').",
        ),
        (TrainConfig, {"hf_access_token": ["hf_s3cret"]}, "TrainConfig: hf_access_token must be text."),
        (GenerateConfig, {"tp_size": 2}, "tp_size has no effect with engine=embedded, but with engine=vllm."),
        (
            PipelineConfig,
            {"train": {"stepz": 1}},
            "PipelineConfig: unknown key train.stepz; did you mean train.steps?",
        ),
        (
            PipelineConfig,
            {"train": {"steps": -1}},
            "PipelineConfig: train.steps must be greater than or equal to 0, not -1.",
        ),
        (
            PipelineConfig,
            {"train": 3},
            "PipelineConfig: train is a section, not a value; set its keys, as in train.KEY=VALUE.",
        ),
        (
            PipelineConfig,
            {"generate": {"tp_size": 2}},
            "tp_size has no effect with engine=embedded, but with engine=vllm.",
        ),
        (
            PipelineConfig,
            {"train": {"hf_path": "d"}},
            "train.hf_path is set by the pipeline; leave it out of the recipe.",
        ),
    ],
)
def test_a_config_made_in_python_is_refused_in_the_same_sentence(cls, values, sentence):
    with pytest.raises(UserError) as refused:
        cls(**values)
    assert str(refused.value) == sentence


def test_a_section_made_in_python_is_what_a_recipe_gives():
    made = PipelineConfig(teacher="t", train=TrainConfig(steps=3), student={"layers": 2})  # type: ignore[arg-type]
    assert made == load_config(PipelineConfig, None, ["teacher=t", "train.steps=3", "student.layers=2"])


def test_an_override_without_a_value():
    assert refusal(TrainConfig, "steps") == "command line: `steps` has no value; give overrides as key=value."


def test_secrets_are_never_shown():
    secret = "hf_s3cret"
    config = train(f"hf_access_token={secret}")
    assert config.hf_access_token is not None and config.hf_access_token.get_secret_value() == secret
    pipeline = load_config(
        PipelineConfig, None, [f"hf_access_token={secret}", f"train.hf_access_token={secret}"]
    )
    shown = [
        dump(config),
        repr(config),
        str(config),
        config.model_dump_json(),
        dump(pipeline),
        repr(pipeline),
    ]
    shown += [
        refusal(TrainConfig, override) for override in (f"hf_acces_token={secret}", secret, "hf_access_token")
    ]
    shown += [refusal(TrainConfig, f"hf_access_token={secret}", "steps=x")]
    assert not [text for text in shown if secret in text]


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path):
    recipe = write(tmp_path / "r.yml", "hf_access_token: [hf_s3cret]\n")
    sentence = refusal(TrainConfig, recipe=recipe)
    assert "hf_access_token" in sentence and "hf_s3cret" not in sentence


# Recipes


def test_overrides_lie_over_the_recipe_over_its_bases(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yml", "steps: 1\neval_steps: 1\ncheckpoint_period: 1\neval_interval: 1\n")
    write(tmp_path / "deep" / "middle.yml", "base: ../root.yml\neval_steps: 2\ncheckpoint_period: 2\n")
    recipe = write(tmp_path / "leaf.yml", "base: deep/middle.yml\ncheckpoint_period: 3\n")
    config = load_config(TrainConfig, str(recipe), ["eval_interval=4"])
    assert (config.steps, config.eval_steps, config.checkpoint_period, config.eval_interval) == (1, 2, 3, 4)


def test_bases_that_lead_back_are_refused(tmp_path):
    write(tmp_path / "a.yml", "base: b.yml\n")
    b = write(tmp_path / "b.yml", "base: a.yml\n")
    assert "leads back to itself" in refusal(TrainConfig, recipe=b)
    c = write(tmp_path / "c.yml", "base: c.yml\n")
    assert "leads back to itself" in refusal(TrainConfig, recipe=c)


def test_missing_and_broken_recipes(tmp_path):
    missing = tmp_path / "none.yml"
    assert f"{missing}: no such recipe" in refusal(TrainConfig, recipe=missing)
    child = write(tmp_path / "child.yml", "base: none.yml\n")
    assert refusal(TrainConfig, recipe=child).startswith(f"{child}: base {missing}: no such recipe")
    broken = write(tmp_path / "broken.yml", "run_name: r\nsteps: [1\neval_steps: 2\n")
    assert refusal(TrainConfig, recipe=broken).startswith(f"{broken}:3: not valid YAML")
    other = write(tmp_path / "list.yml", "- a\n- b\n")
    assert "`key: value`" in refusal(TrainConfig, recipe=other)
    binary = tmp_path / "binary.yml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a UTF-8 text file" in refusal(TrainConfig, recipe=binary)
    assert load_config(TrainConfig, str(write(tmp_path / "empty.yml", "# nothing\n"))) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("hf_path: parquet\nrun_name: r\n  steps 100\n", 3, "this line is read as part of run_name; write"),
        ("train_data_columns:\n- a\n\n  b\n", 4, "this line is read as part of train_data_columns; write"),
        ("run_name: r\nsteps 100\n\nhf_path: parquet\n", 2, "not valid YAML: a line without `: `; correct"),
        ("run_name: r\nsteps 100\n", 2, "not valid YAML: a line without `: `; correct this line."),
        ("run_name:r\nsteps: 1\n", 2, "mapping values are not allowed here; correct this line, or the one"),
    ],
)
def test_a_line_that_is_no_key_and_value_is_named(tmp_path, text, line, said):
    recipe = write(tmp_path / "r.yml", text)
    sentence = refusal(TrainConfig, recipe=recipe)
    assert sentence.startswith(f"{recipe}:{line}: ") and said in sentence


def test_what_is_meant_to_have_many_lines_may(tmp_path):
    text = "run_name: >-\n  a\n  b\nhf_path: 'c\n  d'\ntrain_data_columns: [e,\n  f]\n"
    config = load_config(TrainConfig, str(write(tmp_path / "r.yml", text)))
    assert (config.run_name, config.hf_path, config.train_data_columns) == ("a b", "c d", ("e", "f"))
    long = train("hf_path=a" + " long word" * 40)
    assert load_config(TrainConfig, str(write(tmp_path / "long.yml", dump(long)))) == long


def test_every_recipe_is_part_of_the_package():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    (pattern,) = project["tool"]["setuptools"]["package-data"]["distillax"]
    packaged = {file.name for file in (REPO / "src" / "distillax").glob(pattern)}
    assert packaged == {file.name for file in (REPO / "recipes").iterdir()} and "demo.yml" in packaged


def test_recipes_that_come_with_the_program(tmp_path, monkeypatch):
    """From any folder, with or without its ending, as a base, too; a file of one's own comes first."""
    monkeypatch.chdir(tmp_path)
    for name in ("online.yml", "recipes/online.yml", "online"):
        config = load_config(TrainConfig, name, ["steps=7"])
        assert (config.method, config.distill_alpha, config.steps) == ("online", 1.0, 7)
    write(tmp_path / "mine.yml", "base: online.yml\nsteps: 3\n")
    config = load_config(TrainConfig, "mine.yml")
    assert (config.method, config.learning_rate, config.steps) == ("online", 1e-4, 3)
    write(tmp_path / "online.yml", "steps: 2\n")
    assert load_config(TrainConfig, "online.yml").method == "sft"
    assert load_config(TrainConfig, "mine.yml").method == "sft"
    assert load_config(TrainConfig, "recipes/online.yml").method == "online"
    for name in ("elsewhere/online.yml", "../online.yml", "onlin.yml"):
        assert f"{name}: no such recipe" in refusal(TrainConfig, recipe=name)
    assert refusal(TrainConfig, recipe="sfft.yml").endswith("did you mean sft.yml?")


def test_from_python_a_config_has_what_the_recipes_give():
    """But for what logit matching wants: no hard labels, and a higher rate."""
    assert load_config(TrainConfig, "sft") == TrainConfig()
    matching = {"learning_rate": 1e-4, "distill_alpha": 1.0}
    for method in ("online", "cached"):
        assert load_config(TrainConfig, method) == TrainConfig(method=method, **matching)
    keys = MatchConfig().model_dump() | {"steps": TrainConfig().steps}
    assert keys == load_config(TrainConfig, "online").model_dump()
    assert PipelineConfig().train.model_dump() == TrainConfig().model_dump()
    assert PipelineConfig().match == MatchConfig()


def test_a_key_given_twice_is_refused(tmp_path):
    recipe = write(tmp_path / "r.yml", "steps: 1\neval_steps: 2\nsteps: 3\n")
    assert refusal(TrainConfig, recipe=recipe).startswith(f"{recipe}:3: steps is given twice")


# Pipelines


def test_sections_and_dotted_overrides(tmp_path):
    text = "teacher: t\nstudent:\n  layers: 4\ntrain:\n  steps: 5\n  packing: no\nevaluate:\nprompts: {}\n"
    recipe = write(tmp_path / "p.yml", text)
    overrides = ["train.steps=10", "generate.engine=server", "generate.teacher_url=http://a:1,http://b:2"]
    config = load_config(PipelineConfig, str(recipe), overrides)
    assert config.student.layers == 4 and config.train.steps == 10 and config.train.packing is False
    assert config.generate.teacher_url == ("http://a:1", "http://b:2")
    assert load_config(PipelineConfig, None, ["student.keep=0,3,5"]).student.keep == (0, 3, 5)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=1", "command line: unknown key train.stepz; did you mean train.steps?"),
        (
            "steps=1",
            "command line: unknown key steps; did you mean train.steps? Without a section, steps is a key of "
            "distillax train and its recipes.",
        ),
        ("layers=1", "command line: unknown key layers; did you mean student.layers?"),
        ("train=1", "command line: train is a section, not a value; set its keys, as in train.KEY=VALUE."),
        ("train.steps=x", "command line: train.steps must be a whole number, not 'x'."),
        ("student.keep=0,x", "command line: student.keep must be a list of whole numbers, not '0,x'."),
        (
            "evaluate.sft_control=true",
            "evaluate.sft_control compares with match; set match.steps, or it to false.",
        ),
        ("train.hf_path=d", "train.hf_path is set by the pipeline; leave it out of the recipe."),
    ],
)
def test_pipeline_errors_name_the_whole_key(override, sentence):
    assert refusal(PipelineConfig, override) == sentence


def test_a_control_is_for_a_student_that_is_matched():
    overrides = ["evaluate.sft_control=true", "match.steps=1"]
    assert load_config(PipelineConfig, None, overrides).evaluate.sft_control


def test_layers_and_keep_must_agree():
    assert "student.keep names 1 layers" in refusal(PipelineConfig, "student.layers=2", "student.keep=1")


# Dump and describe

_words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)


@settings(deadline=None)
@given(
    st.builds(
        TrainConfig,
        run_name=_words | st.sampled_from(["null", "~", "no", "1e3", "[a]", "'", "a: b"]),
        train_data_columns=st.lists(_words, max_size=3).map(tuple),
        learning_rate=st.floats(0, 1e3),
        steps=st.integers(1, 2**40),
        packing=st.booleans(),
        enable_thinking=st.none() | st.booleans(),
        ici_fsdp_parallelism=st.sampled_from([-1, 1, 8]),
    )
)
def test_a_dumped_config_is_read_back_unchanged(tmp_path_factory, config):
    recipe = write(tmp_path_factory.getbasetemp() / "dumped.yml", dump(config))
    assert load_config(TrainConfig, str(recipe)) == config


def test_a_dumped_pipeline_is_read_back_unchanged(tmp_path):
    overrides = ["teacher=t", "student.keep=1,2", "train.learning_rate=1e-5", "train.ici_fsdp_parallelism=-1"]
    config = load_config(PipelineConfig, None, overrides)
    assert load_config(PipelineConfig, str(write(tmp_path / "p.yml", dump(config)))) == config


@pytest.mark.parametrize("cls", [TrainConfig, PipelineConfig])
def test_every_key_is_described(cls):
    rows = describe(cls)
    assert len({row[0] for row in rows}) == len(rows)
    for name, kind, _, meaning in rows:
        assert name and kind and meaning and "\n" not in meaning and len(meaning) < 90, name


def test_descriptions_show_types_and_defaults():
    rows = {name: (kind, default) for name, kind, default, _ in describe(PipelineConfig)}
    assert rows["train.steps"] == ("int", "200")
    assert rows["train.train_data_columns"] == ("list of text", "")
    assert rows["train.distill_divergence"][1] == "forward_kl" and rows["train.hf_train_files"] == (
        "text",
        "",
    )
    assert rows["generate.teacher_url"] == ("list of text", "")
    assert rows["train.packing"] == ("true|false", "true")
    assert rows["train.profiler"] == ('""|xplane', "")
    assert rows["generate.enable_thinking"] == ("true|false|null", "null")
    assert rows["hf_access_token"] == ("secret|null", "null")


@pytest.mark.parametrize("cls", [TrainConfig, PipelineConfig])
def test_defaults_shown_are_the_defaults_that_load(cls):
    overrides = [f"{name}={default}" for name, kind, default, _ in describe(cls) if "secret" not in kind]
    assert load_config(cls, None, overrides) == cls()


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        TrainConfig().steps = 3  # type: ignore[misc]
