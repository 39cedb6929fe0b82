"""A recipe says everything, and every mistake in it is told at once."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from softcot_ds.choices import METHODS, TASKS
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import dump_yaml
from softcot_ds.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the smallest recipe, changed by the arguments, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(text=None, **changes) -> Path:
        values = {
            "name": "run",
            "task": {"name": "gsm8k", "train": "openai/gsm8k", "test": "openai/gsm8k"},
            "assistant": {"model": "owner/assistant"},
            "base": {"model": "owner/base"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(values | changes), encoding="utf-8")
        return path

    return write


def mistakes_in(path, *overrides) -> list[str]:
    with pytest.raises(SoftCoTError) as caught:
        load_recipe(path, list(overrides))
    first, *lines = str(caught.value).splitlines()
    assert str(path) in first
    assert f"{len(lines)} mistake{'s' * (len(lines) != 1)} in the recipe:" in first
    return [line.removeprefix("  - ") for line in lines]


def test_the_smallest_recipe_gets_the_documented_defaults(write):
    recipe = load_recipe(write())
    assert (recipe.thoughts.count, recipe.thoughts.source, recipe.backbone.partition) == (32, "cache", "zero3")
    assert recipe.backbone.deepspeed_config()["zero_optimization"]["stage"] == 3
    assert recipe.run_dir == Path("runs/run")
    assert recipe.evaluation.conditions == ["learned", "shuffled", "mean", "zero", "none"]


def test_the_resolved_recipe_loads_to_an_equal_one(write, tmp_path):
    recipe = load_recipe(write(), ["training.learning_rate=1e-5", "cache.path=some/where", "training.betas=[0.8, 0.9]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert yaml.safe_load(recipe.to_yaml())["training"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("training.steps=7", "training", "steps", 7),
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
        ("training.betas=[0.5, 0.6]", "training", "betas", (0.5, 0.6)),
        ("evaluation.conditions=[learned, none]", "evaluation", "conditions", ["learned", "none"]),
        ("thoughts.placeholder='<|x=y|>'", "thoughts", "placeholder", "<|x=y|>"),
        ("thoughts.placeholder=<|x=y|>", "thoughts", "placeholder", "<|x=y|>"),
        ("task.max_tokens=null", "task", "max_tokens", None),
        ("task.max_tokens=", "task", "max_tokens", None),
        ("base.template_kwargs.enable_thinking=false", "base", "template_kwargs", {"enable_thinking": False}),
    ],
)
def test_an_override_wins_over_the_file(write, override, section, field, value):
    recipe = load_recipe(write(training={"steps": 3, "learning_rate": 1.0}), [override])
    assert getattr(getattr(recipe, section), field) == value


def test_the_last_of_two_overrides_wins(write):
    assert load_recipe(write(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "override 'training.steps': write key=value, such as training.steps=200"),
        ("=3", "override '=3': write key=value"),
        ("name.first=x", "override 'name.first=x': 'name' is a value, not a section"),
        ("seed=[1", "override 'seed=[1': '[1' is not a YAML value"),
        ("seed=2024-13-01", "seed: input should be a valid integer, found '2024-13-01'"),
        ("training.stps=3", "training.stps: unknown key; did you mean training.steps?"),
        ("training..steps=3", "training.: unknown key"),
        ("trainin.steps=3", "trainin: unknown key; did you mean training?"),
        ("training=3", "training: a section of keys and values, found 3"),
    ],
)
def test_a_bad_override_is_named_as_it_was_written(write, override, message):
    (mistake,) = mistakes_in(write(), override)
    assert mistake.startswith(message)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.learningrate=1", "training.learning_rate"),
        ("training.lr=1", "training.learning_rate"),
        ("lr=1", "training.learning_rate"),
        ("training.num_train_epochs=3", "training.epochs"),
        ("training.max_steps=3", "training.steps"),
        ("training.globalbatchsize=1", "training.global_batch_size"),
        ("thoughts.cont=1", "thoughts.count"),
        ("tsk=1", "task"),
        ("steps=1", "training.steps"),
        ("learning_rate=1", "training.learning_rate"),
        ("base.dtyp=float32", "base.dtype"),
        ("task.fields.option=a", "task.fields.options"),
    ],
)
def test_unknown_key_names_the_nearest_one(write, override, nearest):
    assert f"{override.partition('=')[0]}: unknown key; did you mean {nearest}?" in mistakes_in(write(), override)


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("cache.zzzz=1", "path, dtype, shard_mib, tokens_per_batch, partition"),
        ("lora.rank=8", "r, alpha, dropout, targets"),  # and not task.train, which has letters in common with it
    ],
)
def test_unknown_key_without_a_near_one_lists_what_is_known_there(write, override, known):
    (mistake,) = mistakes_in(write(), override)
    assert mistake == f"{override.partition('=')[0]}: unknown key; known here: {known}"


@pytest.mark.parametrize("value", ["5", "[]", "[x, 1]", "{a: b}"])
def test_placeholders_are_a_text_or_texts(write, value):
    (mistake,) = mistakes_in(write(), f"thoughts.placeholder={value}")
    assert mistake.startswith("thoughts.placeholder: a text, or a list of texts, found ")
    assert load_recipe(write(), ["thoughts.placeholder=[x, '1']"]).thoughts.placeholder == ["x", "1"]
    assert load_recipe(write(), ["thoughts.placeholder=x"]).thoughts.placeholder == "x"


def test_all_mistakes_are_reported_together(write):
    path = write(
        task={"name": "gsm8k", "train": "missing.jsonl", "validation_problems": -1},
        training={"steps": 10, "warmup_steps": 10, "micro_batch_size": 64, "stps": 3, "schedule": "sinus"},
        evaluation={"conditions": ["learned", "static", "magic"]},
        thoughts={"count": "many"},
    )
    mistakes = mistakes_in(path, "colour=red", "base.revision=5", "nonsense")
    places = [mistake.partition(": ")[0] for mistake in mistakes]
    assert sorted(places) == sorted(
        [
            "override 'nonsense'",
            "task.train",
            "task.validation_problems",
            "training.warmup_steps",
            "training.micro_batch_size",
            "training.stps",
            "training.schedule",
            "evaluation.conditions.2",
            "thoughts.count",
            "colour",
            "base.revision",
        ]
    )


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (["training.steps=ten"], "training.steps: input should be a valid integer, found 'ten'"),
        (["training.steps=0"], "training.steps: input should be greater than or equal to 1, found 0"),
        (["training.steps=1.5"], "training.steps: input should be a valid integer, found 1.5"),
        (["training.steps=true"], "training.steps: input should be a valid integer, found True"),
        (["training.steps=1e3"], "training.steps: input should be a valid integer, found 1000.0"),
        (["training.steps='12'"], "training.steps: input should be a valid integer, found '12'"),
        (["training.steps=1_000"], "training.steps: input should be a valid integer, found '1_000'"),
        (["training.steps=1:30"], "training.steps: input should be a valid integer, found '1:30'"),
        (["training.steps="], "training.steps: None beside training.epochs=None: set one of the two"),
        (
            ["training.steps=400", "training.epochs=2"],
            "training.steps: 400 beside training.epochs=2: set one of the two, and the other to null",
        ),
        (["training.steps=", "training.epochs=1.5"], "training.epochs: input should be a valid integer, found 1.5"),
        ([f"training.steps={10**30}"], "training.steps: input should be less than or equal to 2147483647, found 1000"),
        ([f"cache.shard_mib={2**31}"], "cache.shard_mib: input should be less than or equal to 2147483647, found 214"),
        (["training.learning_rate=true"], "training.learning_rate: input should be a valid number, found True"),
        (["training.learning_rate='1e-3'"], "training.learning_rate: input should be a valid number, found '1e-3'"),
        (["training.learning_rate=.inf"], "training.learning_rate: input should be a valid number, found '.inf'"),
        (["training.learning_rate=.nan"], "training.learning_rate: input should be a valid number, found '.nan'"),
        (["training.timeout_minutes=1e300"], "training.timeout_minutes: input should be less than or equal to 43200"),
        (
            ["training.timeout_minutes=0"],
            "training.timeout_minutes: input should be greater than or equal to 0.1, found 0",
        ),
        (["training.activation_checkpointing=yes"], "training.activation_checkpointing: input should be a valid bool"),
        (["training.activation_checkpointing=1"], "training.activation_checkpointing: input should be a valid boolean"),
        (["training=5"], "training: a section of keys and values, found 5"),
        (["training="], "training: a section of keys and values, found None"),
        (["training.betas=0.9"], "training.betas: a list of two numbers, found 0.9"),
        (["base.revision=1234567"], "base.revision: a text, found 1234567; put it in quotes"),
        (["base.template_kwargs=[1]"], "base.template_kwargs: a mapping of keys to values, found [1]"),
        (["output_dir="], "output_dir: a path, found None"),
        (["output_dir=~/runs"], "output_dir: '~/runs': ~ stands for a home folder in a shell only"),
        (["base.revision=''"], "base.revision: string should match pattern"),
        ([r'base.revision="a\n"'], "base.revision: string should match pattern"),
        (
            ["task={name: word_problems, train_problems: 2000000000, test_problems: 1}"],
            "task.train_problems: 2,000,000,000 are more than the 100,000 that this task generates",
        ),
        (["output_dir=recipe.yaml"], "output_dir: "),
        (["cache.path=recipe.yaml/cache"], "cache.path: "),
        ([r'output_dir="a\0b"'], r"output_dir: 'a\x00b' has a NUL character in it, and no path has"),
        ([r'evaluation.static_adapter="\0"'], r"evaluation.static_adapter: '\x00' has a NUL character"),
        ([r'task.prompts="\0"'], r"task.prompts: '\x00' has a NUL character"),
        ([r'base.model="\0"'], r"base.model: '\x00' is neither a folder nor a hub name"),
        ([f"cache.path={'x' * 256}"], "cache.path: a name of 256 bytes in it; file systems take 255 at most"),
        (["task.prompts=."], "task.prompts: /"),
        (["base.model=owner/name/."], "base.model: 'owner/name/.' is neither a folder nor a hub name"),
        (["training.betas=[0.9, 1.0]"], "training.betas.1: input should be less than 1, found 1.0"),
        (["training.betas=[0.9]"], "training.betas.1: missing"),
        (["base.dtype=float8"], "base.dtype: input should be 'float32', 'bfloat16' or 'float16', found 'float8'"),
        (["base.model=null"], "base.model: input should be a valid string, found None"),
        (
            ["training.steps=5", "training.warmup_steps=5"],
            "training.warmup_steps: 5 steps of warm-up do not fit into t",
        ),
        (["training.micro_batch_size=33"], "training.micro_batch_size: 33 is more than training.global_batch_size=32"),
        (
            ["training.profile_steps=[12,10]"],
            "training.profile_steps: [12, 10] ends before it begins; write the",
        ),
        (
            ["training.profile_steps=[10,12]", "training.steps=11"],
            "training.profile_steps: [10, 12] goes beyond training.steps=11",
        ),
        (["training.profile_steps=10-12"], "training.profile_steps: a list of two numbers, found '10-12'"),
        (
            ["training.profile_steps=[0,2]"],
            "training.profile_steps.0: input should be greater than or equal to 1",
        ),
        (["training.profile_steps=[3]"], "training.profile_steps.1: missing"),
        (
            ["evaluation.strategy=self_consistency", "evaluation.temperature=0.7"],
            "evaluation: strategy=self_consistency is a vote of several, and evaluation.samples is 1; set it to how",
        ),
        (
            ["evaluation.strategy=tree"],
            "evaluation.tree: candidates=5; judgements=5, and evaluation.temperature is 0, at which all of them would",
        ),
        (["evaluation.tree={generate: propose, depth: 1}"], "evaluation.tree.generate: propose, and depth is 1: the l"),
        (["evaluation.tree.values={not sure: 1, sure: 2}"], "evaluation.tree.values: 'not sure' is no single word; a"),
        (["evaluation.tree.values={Sure: 1, sure: 2}"], "evaluation.tree.values: {'Sure': 1.0, 'sure': 2.0}: two diff"),
        (["evaluation.tree.wording=README.md"], "evaluation.tree.wording: "),
        (
            [
                "evaluation.strategy=graph",
                "evaluation.graph.operations=[{do: generate}, {do: generate}, {do: aggregate, of: [1, 2]}]",
            ],
            "evaluation.graph: operation 2 (generate), which is not the first, and evaluation.temperature is 0",
        ),
        (["evaluation.graph.operations=[]"], "evaluation.graph.operations: empty; begin with {do: generate, count: 5}"),
        (
            ["evaluation.graph.operations=[{do: vote}]"],
            "evaluation.graph.operations.0.do: input should be 'generate', ",
        ),
        (
            ["evaluation.graph.operations=[{do: score}]"],
            "evaluation.graph.operations: operation 1 (score) has nothing to work on; t",
        ),
        (
            ["evaluation.graph.operations=[{do: generate, count: 3}]"],
            "evaluation.graph.operations: 3 answers come out of the last operation, and it is to be one; end with {do",
        ),
        (
            ["evaluation.graph.operations=[{do: generate, count: 3}, {do: keep}]"],
            "evaluation.graph.operations: operation 2 (keep) chooses among answers without a score; let score come be",
        ),
        (
            ["evaluation.graph.operations=[{do: generate, count: 2}, {do: score}, {do: keep, count: 3}]"],
            "evaluation.graph.operations: operation 3 (keep) keeps 3 of 2",
        ),
        (
            ["evaluation.graph.operations=[{do: generate}, {do: generate}, {do: improve, of: [2]}]"],
            "evaluation.graph.operations: nothing works on what comes out of operation 1",
        ),
        (
            ["evaluation.graph.operations=[{do: generate}, {do: improve, of: [2]}]"],
            "evaluation.graph.operations: operation 2 (improve) works on operation 2, which is not before it",
        ),
        (
            ["evaluation.graph.operations=[{do: generate}, {do: improve, of: [1, 1]}]"],
            "evaluation.graph.operations: operation 2 (improve) works on the same operation twice: of=[1, 1]",
        ),
        (
            ["evaluation.graph.operations=[{do: generate}, {do: generate, of: [1]}]"],
            "evaluation.graph.operations: operation 2 (generate) works on the problem alone; leave `of` out",
        ),
        (
            ["evaluation.graph.operations=[{do: generate}, {do: aggregate}]"],
            "evaluation.graph.operations: operation 2 (aggregate) has a single answer to work on; that is improve",
        ),
        (["evaluation.samples=8"], "evaluation.samples: 8, and evaluation.temperature is 0, at which all samples are"),
        (
            ["evaluation.read=options", "evaluation.temperature=1", "evaluation.samples=2"],
            "evaluation.read: options, and evaluation.samples is 2: nothing is decoded for options",
        ),
        (
            ["evaluation.read=options", "evaluation.strategy=speculative"],
            "evaluation.read: options, and evaluation.draft is 4: nothing is decoded for options",
        ),
        (["evaluation.draft=65"], "evaluation.draft: input should be less than or equal to 64, found 65"),
        (["evaluation.temperature=1e-300"], "evaluation.temperature: 1e-300 is too small: logits are divided by it"),
        (["evaluation.conditions=[]"], "evaluation.conditions: empty; name what is to stand in for the thoughts"),
        (["evaluation.conditions=[none,zero,none]"], "evaluation.conditions: none stands there more than once"),
        ([f"seed={2**64}"], f"seed: input should be less than or equal to {2**64 - 1}, found {2**64}"),
        (
            ["evaluation.loss=false", "evaluation.decode=false"],
            "evaluation.loss: false, and evaluation.decode too: nothing",
        ),
        (["evaluation.conditions=[static]"], "evaluation.static_adapter: missing; the condition static needs"),
        (["task.test=null", "task.test_from_train=all"], "task.test_from_train: input should be 'order' or 'content'"),
        (["task.name=gsm"], f"task.name: input should be {' or '.join(map(repr, TASKS))}, found 'gsm'"),
        (
            ["method=magic"],
            f"method: input should be {' or '.join(map(repr, METHODS))}, found 'magic'",
        ),
        (
            ["projection.kind=static"],
            "projection.kind: what is trained is named outside of all sections; write method: prompt_tuning in its",
        ),
        (
            ["projection.kind=deep"],
            "projection.kind: what is trained is named outside of all sections; write method: NAME",
        ),
        (["name=a/b"], "name: string should match pattern"),
        (["name=."], "name: string should match pattern"),
        (["name=.."], "name: string should match pattern"),
        (["name=-rf"], "name: string should match pattern"),
        (["name=.hidden"], "name: string should match pattern"),
        ([r'name="run\n"'], "name: string should match pattern"),
        (["name=r\u00fcn"], "name: string should match pattern"),
        ([f"name={'x' * 129}"], "name: string should have at most 128 characters, found 'xxx"),
        (["name="], "name: input should be a valid string, found None"),
        (["name=5"], "name: a text, found 5; put it in quotes"),
        (
            ["task.train=nowhere.jsonl"],
            "task.train: no such file: /",
        ),
        *(
            (["task.train=data/no" + end], "task.train: no such file: /")
            for end in (".jsonl", ".XML", ".tsv", ".json.gz")
        ),
        (["task.train=../a"], "task.train: no such file: /"),
        (["base.model=my model"], "base.model: 'my model' is neither a folder nor a hub name (owner/name)"),
        (["base.model=/no/such"], "base.model: '/no/such' is neither a folder nor a hub name (owner/name)"),
        (["base.model=package:nothing"], "base.model: '"),
        ([f"task.train={'x' * 5000}"], "task.train: no such file: /"),
        (["task.prompts=no.yaml"], "task.prompts: no such file: "),
    ],
)
def test_a_wrong_value_is_shown_with_what_would_be_right(write, overrides, mistake):
    (found,) = mistakes_in(write(), *overrides)
    assert found.startswith(mistake)


def test_a_folder_without_a_model_is_refused(write, tmp_path):
    (tmp_path / "model").mkdir()
    (mistake,) = mistakes_in(write(base={"model": "model"}))
    assert mistake == ("base.model: the folder 'model' holds no config.json; name a folder written by save_pretrained")


def test_generated_problems_must_be_counted(write):
    mistakes = mistakes_in(write(task={"name": "word_problems"}))
    assert [mistake.partition(";")[0] for mistake in mistakes] == [
        "task.train_problems: missing",
        "task.test_problems: missing",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; softcot-ds recipes lists some to start from"),
        ("# name: a\n", "empty; softcot-ds recipes lists some to start from"),
        ("- a\n- b", "a recipe is a mapping of keys to values, found list"),
        ("name: [", "not YAML: line 1, column 8: while parsing a flow node, expected the node content"),
        ("name: a\nbase: {model: a/b}\nname: b", "not YAML: line 3, column 1: the key 'name' stands twice"),
        ("training:\n  steps: 1\n  steps: 2", "not YAML: line 3, column 3: the key 'steps' stands twice"),
        ("name: a\n---\nname: b", "not YAML: line 2, column 1: expected a single document"),
        ("training: {steps: 0100}", "not YAML: line 1, column 19: 0100 is octal to some readers; write it without"),
        ("name: !!python/name:os.system", "not YAML: line 1, column 7: the tag !!python/name:os.system is not read"),
        ("training: {1: 2}", "not YAML: line 1, column 12: a key is a text, not '1'; put it in quotes"),
        ("name: &a [*a]", "not YAML: nested deeper than 100 levels"),
        ("name: a\n\tb: c", "not YAML: line 2, column 1: "),
        ("name: \x01", "not YAML: "),
    ],
)
def test_a_file_that_is_no_recipe_says_where(write, text, message):
    path = write(text)
    with pytest.raises(SoftCoTError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys_still_work(write):
    path = write(
        "name: run\n"
        "task: {name: gsm8k, train: a/b, test: a/b}\n"
        "assistant: &model {model: a/small, dtype: float32}\n"
        "base: {<<: *model, model: a/large}\n"
    )
    base = load_recipe(path).base
    assert (base.model, base.dtype) == ("a/large", "float32")


def test_a_byte_order_mark_is_no_mistake(write):
    path = write()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path).name == "run"


def test_binary_and_missing_files_are_refused(write, tmp_path):
    path = write()
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(SoftCoTError, match="byte 4: not UTF-8 text, so not YAML"):
        load_recipe(path)
    with pytest.raises(
        SoftCoTError, match=r"no such recipe: .*nothing.yaml; softcot-ds recipes lists some to start from"
    ):
        load_recipe("nothing.yaml")
    with pytest.raises(SoftCoTError, match=r"no such recipe: .*, which is a folder"):
        load_recipe(tmp_path)
    path.write_text("name: run", encoding="utf-16")
    with pytest.raises(SoftCoTError, match="byte 0: not UTF-8 text, so not YAML"):
        load_recipe(path)
    with pytest.raises(SoftCoTError, match="no such recipe"):
        load_recipe("a\0b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: line 1, column 2: "),
        ('{"zero_optimization": {"stage": 3, "stage": 3}}', "not JSON: the key 'stage' stands twice"),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage is 0, 1, 2 or 3, found '3'"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is 0, 1, 2 or 3, found True"),
        ('{"zero_optimization": {"stage": null}}', "zero_optimization.stage is 0, 1, 2 or 3, found None"),
        ('{"zero_optimization": {"stage": [3]}}', "zero_optimization.stage is 0, 1, 2 or 3, found [3]"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 0, 1, 2 or 3, found 4"),
        (
            '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}',
            'zero_optimization.reduce_bucket_size is "auto", which only',
        ),
        (
            '{"zero_optimization": {"stage": 3}, "train_batch_size": 8}',
            "train_batch_size is decided by the recipe: training.global_batch_size",
        ),
        ('{"zero_optimization": {"stage": 3}, "fp16": {"enabled": true}}', "fp16 is decided by the recipe: base.dtype"),
        ('{"zero_optimization": {"stage": 3, "a": NaN}}', "not JSON: NaN is no number"),
        ("[]", "no DeepSpeed configuration"),
        ("null", "no DeepSpeed configuration"),
        ('{"zero_optimization": 3}', "no DeepSpeed configuration"),
        (
            '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}',
            "zero_hpz_partition_size would split the weights a second time: backbone.partition=node holds",
        ),
        ('{"zero_optimization": {"stage": 1}}', "partition 'zero3' does not fit stage 1"),
        ("{}", "partition 'zero3' does not fit stage 0"),
        ('{"zero_optimization": {"stage": 0}}', "partition 'zero3' does not fit stage 0"),
    ],
)
def test_a_wrong_deepspeed_configuration_is_a_mistake_of_the_recipe(write, tmp_path, content, message):
    (tmp_path / "ds.json").write_text(content)
    (mistake,) = mistakes_in(write(), "backbone.deepspeed=ds.json")
    assert mistake.startswith("backbone: ")
    assert message in mistake
    assert "ds.json" in mistake


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_deepspeed_configuration_is_accepted(write, path):
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    for partition in ("zero3", "node") if stage == 3 else ("none",):
        recipe = load_recipe(write(), [f"backbone.deepspeed={path}", f"backbone.partition={partition}"])
        assert recipe.backbone.deepspeed_config()["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    missing = [folder for folder in ("assistant", "base") if not (ROOT / "softcot_ds" / "pair" / folder).is_dir()]
    if "package:pair" in text and missing:
        pytest.skip(f"the embedded pair is not built: {missing}")
    recipe = load_recipe(path)
    assert load_recipe(path, ["seed=7"]) == recipe.model_copy(update={"seed": 7})


def test_resident_layers_and_offloaded_weights_are_refused_together(write, monkeypatch):
    monkeypatch.chdir(ROOT)
    (mistake,) = mistakes_in(write(), "backbone.deepspeed=ds_configs/zero3_cpu_offload.json", "backbone.resident_gib=2")
    assert "offload_param puts all weights elsewhere, and resident_gib would keep some" in mistake


def test_what_cannot_be_trained_together_is_refused(write, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert mistakes_in(write(), "base.dtype=float16", "assistant.dtype=float16") == [
        "base: dtype float16 would need loss scaling, which there is not; use bfloat16 or float32"
    ]


SNIPPETS = [
    "!!python/object:os.system", "!", "&a", "*a", "<<: ", "\t", "\0", "\n---\n", "\n...\n", "? ", "[", "]", "{", "}",
    "0100", "1e999", "1:30", "yes", "#", "'", '"', ": ", "- ", "%YAML 1.1\n", "\\ud800", "\ufeff", "\x85", "|", ">",
    "@", "`", ",", "\n",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, -1, 2**31, 2**64, 10**400]) | st.floats()
    | st.text(max_size=20) | st.sampled_from(["", ".", "..", "/", "~", "\0", "a/b", "package:", "x" * 300, *SNIPPETS])
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


def paths_in(values: dict, prefix: tuple = ()) -> list[tuple[str, ...]]:
    below = [
        path for key, value in values.items() if isinstance(value, dict) for path in paths_in(value, (*prefix, key))
    ]
    return [(*prefix, key) for key in values] + below


SMALLEST = {
    "name": "run",
    "task": {"name": "gsm8k", "train": "openai/gsm8k", "test": "openai/gsm8k"},
    "assistant": {"model": "owner/assistant", "template_kwargs": {"date_string": "26 Jul 2024"}},
    "base": {"model": "owner/base", "revision": None},
}
WHOLE = parse_recipe(SMALLEST, [], "test").model_dump(mode="json")


def outcome(path, overrides=()) -> Recipe | str:
    """The recipe, which is read as the same from what it writes; or what is wrong. Anything else is a failure."""
    try:
        recipe = load_recipe(path, list(overrides))
    except SoftCoTError as error:
        return str(error)
    path.with_name("written.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path.with_name("written.yaml")) == recipe
    return recipe


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


@pytest.mark.slow
@given(path=st.sampled_from(paths_in(WHOLE)), value=VALUES, as_override=st.booleans())
@settings(max_examples=150)
def test_any_value_at_any_key_is_a_recipe_or_a_mistake_with_its_name(fuzzed, path, value, as_override):
    values, overrides = copy.deepcopy(SMALLEST), []
    if as_override:
        overrides = [f"{'.'.join(path)}={json.dumps(value)}"]
    else:
        section = values
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    fuzzed.write_text(dump_yaml(values), encoding="utf-8")
    result = outcome(fuzzed, overrides)
    if isinstance(result, str):
        assert str(fuzzed) in result
    if isinstance(result, str) and "not YAML" not in result:
        assert path[0] in result
        assert "mistake" in result.splitlines()[0]


@given(data=st.data(), edits=st.integers(1, 4))
@settings(max_examples=100)
def test_any_edit_of_a_recipes_text_is_a_recipe_or_a_mistake(fuzzed, data, edits):
    text = dump_yaml({key: WHOLE[key] for key in ("name", "task", "assistant", "base")})
    for _ in range(edits):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(st.sampled_from(SNIPPETS) | st.text(max_size=3)) + text[stop:]
    fuzzed.write_text(text, encoding="utf-8")
    outcome(fuzzed)


@given(
    override=st.text(max_size=30)
    | st.builds(
        "{}{}={}".format,
        st.sampled_from([".".join(p) for p in paths_in(WHOLE)]),
        st.sampled_from(["", ".", ".x", ".0", " "]),
        st.text(max_size=12),
    )
)
@settings(max_examples=100)
def test_any_override_is_a_recipe_or_a_mistake(override):
    with contextlib.suppress(SoftCoTError):
        parse_recipe(copy.deepcopy(WHOLE), [override], "test")
