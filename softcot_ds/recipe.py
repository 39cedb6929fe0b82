"""The recipe: everything that decides a run, in one YAML file, checked before any work starts.

A recipe is validated as a whole: every mistake is reported at once, each with the value found and, for an unknown key,
the nearest known one. Overrides on the command line (``training.steps=200``) win over the file. Relative paths are
relative to the current directory.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import to_jsonable_python

from softcot_ds.backbone_config import BackboneConfig
from softcot_ds.ccot_config import CompressedCoTConfig
from softcot_ds.chains_config import ChainsConfig
from softcot_ds.choices import METHOD_OF_KIND, METHODS, one_of
from softcot_ds.coconut_config import CoconutConfig
from softcot_ds.evaluation_config import EvaluationConfig
from softcot_ds.files import dump_yaml
from softcot_ds.lora_config import LoraConfig
from softcot_ds.section import FREE, Section
from softcot_ds.settings import flattened, read_settings, section_of, validated
from softcot_ds.shipped import found
from softcot_ds.task_config import TargetsConfig, TaskConfig
from softcot_ds.values import (
    UNPUBLISHED_SCHEME,
    Beta,
    Count,
    CountOrZero,
    ExistingFile,
    Folder,
    ModelName,
    Scale,
    TextOrTexts,
)

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


class ModelConfig(Section):
    """One of the two frozen models."""

    model: ModelName
    """A local folder, a hub name (owner/name), or package:FOLDER for a model shipped with this package."""
    revision: str | None = Field(None, pattern=r"^[\w./+@-]+$")
    """Hub revision: a commit hash makes the run repeatable."""
    dtype: Dtype = "bfloat16"
    """The dtype that the weights are loaded and computed in."""
    attention: Attention = "sdpa"
    """Attention implementation of transformers."""
    chat_template: ExistingFile | None = None
    """A Jinja file that replaces the tokenizer's own chat template, or gives it one."""
    template_kwargs: dict[str, Any] = Field({"date_string": "26 Jul 2024"})
    """Passed to the chat template. Llama 3 templates put today's date into the prompt unless one is given here."""
    end_of_turn: str | None = None
    """The text of the one token that ends an answer. Default: what the chat template closes an answer with."""


class ThoughtsConfig(Section):
    """The soft thoughts."""

    count: Count = 32
    """T, the number of soft thoughts of a question."""
    source: Annotated[Literal["cache", "online"], FREE] = "cache"
    """cache: read the assistant's states from disk, no assistant in the training job. online: run the assistant."""
    placeholder: TextOrTexts | None = None
    """The assistant's token at a thought's position, or several that thoughts take in turn. Default: its unknown token,
    else pad, else end-of-sequence."""
    layer: int = -1
    """The assistant's layer whose states are taken, as transformers numbers hidden_states: from 1 on, or from the end,
    where -1 is the last one, after the final norm. Those of others are before it, and layers above are not run."""


class CacheConfig(Section):
    """Where the assistant's hidden states live on disk."""

    path: Annotated[Folder, FREE] = Path("runs/cache")
    """Folder of caches; each assistant, thought count and dtype has a folder of its own in it."""
    dtype: Dtype | None = None
    """Stored dtype. Default: the assistant's."""
    shard_mib: Annotated[Count, FREE] = 256
    """Largest size of a shard, MiB. Rows go to disk as they are computed, so memory does not depend on it."""
    tokens_per_batch: Annotated[Count, FREE] = 16384
    """Assistant tokens, padding included, in one batch. A builder process holds thoughts of four batches at most."""
    partition: Annotated[Literal["none", "zero3", "node"], FREE] = "none"
    """none: each process holds the whole assistant. zero3: the processes hold 1/N of its weights each. node: those of a
    node hold one copy between them."""


class ProjectionConfig(Section):
    """What makes the thoughts, of methods that train nothing else: softcot, softcot_pp and prompt_tuning. Others take
    no notice of it."""

    condition: Literal["none", "center", "whiten"] = "none"
    """softcot: what is trained is an affine map of states whose mean over the training problems is as small as what
    varies in them (center), or of these with equal variance in all directions too (whiten). The adapter is one of plain
    states; see conditioning.py."""
    init_scale: Scale = 1.0
    """softcot: the standard initialization of nn.Linear is multiplied by this. auto: what varies of the first thoughts,
    with the training problem, and what is constant each have the size of token embeddings; see ``token_sized``."""
    init_from: Annotated[ExistingFile | None, FREE] = None
    """Start from these weights: a .safetensors file, or a projection.bin of the original implementation."""


class TrainingConfig(Section):
    """The optimization."""

    epochs: Count | None = None
    """How often the training data is gone through, in the place of steps: as many steps as its whole global batches.
    What fills none in one epoch's order is left to others'. The run's own recipe has the steps that this comes to."""
    steps: Count | None = Field(default_factory=lambda known: None if known.get("epochs") else 1000)
    """Optimizer steps; default: 1000, unless there are epochs. A run that has begun takes another number only with the
    constant schedule: with others, its learning rates would have been others from the first step on."""
    step: Annotated[Literal["fast", "full"], FREE] = "fast"
    """fast: only the work that the gradient needs. full: the naive step, an oracle. Both give the same gradient.
    Methods that change the base run the full one in any case."""
    global_batch_size: Count = 32
    """Examples per optimizer step, over all ranks."""
    micro_batch_size: Annotated[Count, FREE] = 4
    """Examples per forward pass of a rank, at most; gradient accumulation makes up the rest."""
    micro_batch_tokens: Annotated[Count | None, FREE] = None
    """In training, in the place of micro_batch_size: tokens per forward pass of a rank, at most, thoughts and padding
    included. Short examples then come in larger micro-batches, and their number differs from step to step."""
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up; the last of them has the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak, in the first step after the warm-up, to min_lr_ratio times the peak, in the step that would come
    after the last."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 switches clipping off."""
    activation_checkpointing: Annotated[bool, FREE] = False
    """Recompute the layers in the backward pass instead of keeping their activations."""
    log_every: Annotated[Count, FREE] = 10
    """Steps between two points of the TensorBoard curves; the only place where a step waits for the GPU."""
    profile_steps: Annotated[tuple[Count, Count] | None, Field(strict=False), FREE] = None
    """The first and the last step of a window that is profiled, such as [10, 12]; the trace goes to profile/ in the
    run's directory. Profiled steps are slower."""
    validate_every: Annotated[Count, FREE] = 100
    """Steps between two validations, with sample generations."""
    save_every: Annotated[Count, FREE] = 100
    """Steps between two checkpoints. The last step is always saved."""
    keep_checkpoints: Annotated[Count, FREE] = 3
    """How many of the newest checkpoints are kept, beside the one of the least validation loss."""
    timeout_minutes: Annotated[float, FREE] = Field(30.0, ge=0.1, le=60 * 24 * 30)
    """How long a rank waits for the others before it gives up, minutes. Loading a large model takes long, and so may
    validation and a checkpoint."""
    step_timeout_minutes: Annotated[float, FREE] = Field(10.0, ge=0.1, le=60 * 24 * 30)
    """The same within a training step, from the second on; timeout_minutes where that is shorter."""
    max_restarts: Annotated[CountOrZero, FREE] = 100
    """How often a SLURM job goes back into the queue: after a time limit, a preemption, a dead node or rank."""

    @property
    def num_steps(self) -> int:
        """The steps, of a recipe whose epochs have been counted (``data.batches.in_steps``)."""
        assert self.steps is not None, "how many steps an epoch has is known with the data"
        return self.steps

    @field_validator("steps")
    @classmethod
    def _steps_or_epochs(cls, value: int | None, info: ValidationInfo) -> int | None:
        epochs = info.data.get("epochs")
        if "epochs" in info.data and (value is None) == (epochs is None):
            raise ValueError(f"{value} beside training.epochs={epochs}: set one of the two, and the other to null")
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, value: int, info: ValidationInfo) -> int:
        if value >= (info.data.get("steps") or value + 1):
            raise ValueError(f"{value} steps of warm-up do not fit into training.steps={info.data['steps']}")
        return value

    @field_validator("profile_steps")
    @classmethod
    def _profiled_steps_are_taken(cls, value: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        first, last = value or (0, 0)
        if first > last:
            raise ValueError(f"[{first}, {last}] ends before it begins; write the first and the last step")
        if last > (info.data.get("steps") or last):
            raise ValueError(f"[{first}, {last}] goes beyond training.steps={info.data['steps']}")
        return value

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batch_is_a_part(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("global_batch_size", value):
            raise ValueError(f"{value} is more than training.global_batch_size={info.data['global_batch_size']}")
        return value


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)
    """The run's name; everything about it lies in output_dir/name. It begins with neither a dot nor a dash."""
    output_dir: Annotated[Folder, FREE] = Path("runs")
    seed: int = Field(0, ge=0, le=2**64 - 1)
    """Seeds the initialization of what is trained, the order of the data and sampled decoding."""
    method: Annotated[str, AfterValidator(one_of(METHODS)), WithJsonSchema({"enum": [*METHODS]})] = "softcot"
    """What is trained. softcot: W h + b, a projection of the assistant's states. softcot_pp: the same of several sets
    of states, with a loss that keeps their thoughts apart. prompt_tuning: T free vectors, the same for every question,
    a baseline. lora: low-rank matrices beside weights of the base, full: all its weights; as baselines, without
    thoughts. coconut, coconut_full: the same two, that the base thinks steps instead of writing them. compressed_cot:
    two sets of matrices, one that makes few states of a whole chain of thought, one that answers from them."""
    task: TaskConfig
    assistant: ModelConfig
    base: ModelConfig
    thoughts: ThoughtsConfig = ThoughtsConfig()
    chains: ChainsConfig | None = None
    """softcot_pp: several sets of thoughts for a question."""
    cache: CacheConfig = CacheConfig()
    # Validated with the rest, also where it is the default.
    backbone: BackboneConfig = Field({}, validate_default=True)  # type: ignore[assignment]
    projection: ProjectionConfig = ProjectionConfig()
    lora: LoraConfig = LoraConfig()
    coconut: CoconutConfig | None = Field(None, validate_default=True)
    """coconut and coconut_full: how many latents, and the curriculum."""
    compressed_cot: CompressedCoTConfig | None = Field(None, validate_default=True)
    """compressed_cot: how short contemplation is, and what is trained for it."""
    training: TrainingConfig = TrainingConfig()
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], FREE] = Field(["tensorboard"])
    """Who is told the curves of a training. All but tensorboard are packages to be installed, and set up by their own
    variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and so on)."""
    evaluation: Annotated[EvaluationConfig, FREE] = EvaluationConfig()
    targets: Annotated[TargetsConfig, FREE] = TargetsConfig()

    @field_validator("chains")
    @classmethod
    def _chains_are_of_one_method(cls, value: ChainsConfig | None, info: ValidationInfo) -> ChainsConfig | None:
        method = info.data.get("method")
        if method == "softcot_pp":
            return value or ChainsConfig()
        if value is not None and method is not None:
            raise ValueError(f"a section of method=softcot_pp, and method is {method}; leave it out")
        return value

    @field_validator("evaluation")
    @classmethod
    def _votes_are_several(cls, value: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        if value.votes and value.samples == 1 and info.data.get("chains", "") is None:
            raise ValueError(
                "strategy=self_consistency is a vote of several, and evaluation.samples is 1; set it to how many, such "
                "as 10, and evaluation.temperature to what they are to be drawn at, such as 0.7"
            )
        return value

    @field_validator("lora")
    @classmethod
    def _matrices_are_trained(cls, value: LoraConfig, info: ValidationInfo) -> LoraConfig:
        method = info.data.get("method")
        if value != LoraConfig() and method not in (None, "lora", "coconut"):
            raise ValueError(
                f"a section of method=lora and coconut, and method is {method}; leave it out, or write lora={{}} "
                "beside a recipe that has it"
            )
        return value

    @field_validator("coconut")
    @classmethod
    def _who_thinks_has_a_curriculum(cls, value: CoconutConfig | None, info: ValidationInfo) -> CoconutConfig | None:
        method = info.data.get("method")
        if method in ("coconut", "coconut_full"):
            if value is None:
                raise ValueError(
                    "missing; say how many latents a step has, and how many optimizer steps each stage, such as "
                    "coconut={latents_per_step: 2, stage_steps: [300, 100, 100]}"
                )
        elif value is not None and method is not None:
            raise ValueError(f"a section of method=coconut and coconut_full, and method is {method}; leave it out")
        return value

    @field_validator("compressed_cot")
    @classmethod
    def _who_contemplates_says_how(
        cls, value: CompressedCoTConfig | None, info: ValidationInfo
    ) -> CompressedCoTConfig | None:
        method = info.data.get("method")
        if method == "compressed_cot" and value is None:
            raise ValueError(
                "missing; say what part of a chain contemplation is as long as, and how many optimizer steps it is "
                "trained for, such as compressed_cot={ratio: 0.1, ccot_steps: 500}"
            )
        if value is not None and method not in ("compressed_cot", None):
            raise ValueError(f"a section of method=compressed_cot, and method is {method}; leave it out")
        return value

    @field_validator("training")
    @classmethod
    def _curriculum_is_of_steps(cls, value: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        if value.epochs is not None and info.data.get("coconut") is not None:
            raise ValueError(
                f"epochs is {value.epochs}, and coconut.stage_steps are steps: how far an epoch gets is known with the "
                "data only; set steps in its place"
            )
        return value

    @field_validator("base")
    @classmethod
    def _base_needs_no_loss_scaling(cls, value: ModelConfig) -> ModelConfig:
        if value.dtype == "float16":
            raise ValueError("dtype float16 would need loss scaling, which there is not; use bfloat16 or float32")
        return value

    def bits_of(self, model: ModelConfig) -> int:
        """Bits of a weight of one of the recipe's two models: the assistant keeps its dtype."""
        return self.backbone.bits if model is self.base else 16

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    def on_gold(self) -> "Recipe":
        """The same recipe with the data's own solutions as targets."""
        return self.model_copy(update={"task": self.task.model_copy(update={"targets": "gold"})})

    @property
    def in_evaluation(self) -> "Recipe":
        """The recipe as evaluation and answers see it: ``thoughts.count`` is ``evaluation.thoughts``."""
        count = self.evaluation.thoughts or self.thoughts.count
        return self.model_copy(update={"thoughts": self.thoughts.model_copy(update={"count": count})})

    def trained_to(self, step: int) -> "Recipe":
        """The recipe of a training that has got to this step, the last or an earlier one, as evaluation sees it: where
        there is a curriculum, its stage and the thoughts of that count."""
        changed: dict[str, Any] = {"training": self.training.model_copy(update={"steps": step, "epochs": None})}
        if self.coconut is not None:  # two vectors stand around its latents
            count = self.coconut.stage(step).latents + 2
            changed["thoughts"] = self.thoughts.model_copy(update={"count": count})
        return self.model_copy(update=changed)

    @property
    def answers(self) -> int:
        """How often each problem is answered in an evaluation: so often for each set of its thoughts."""
        chains = self.chains.count if self.chains and self.evaluation.read == "text" else 1
        return self.evaluation.samples * chains

    def to_yaml(self) -> str:
        """The resolved recipe: defaults and overrides written out; loads to an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))

    @property
    def for_others(self) -> dict[str, Any]:
        """The values of a recipe, as JSON, by which an adapter is opened on other machines: without the files and
        folders of this one, whose settings have their defaults there. Data files leave a name that says so."""
        values = _without_paths(self)
        task, evaluation = values["task"], values["evaluation"]
        task["targets"] = "gold"  # what else was trained on is in the adapter
        evaluation["server"] = None
        for split in ("train", "validation", "test"):
            if task[split] is not None and os.path.isfile(task[split]):
                task[split] = UNPUBLISHED_SCHEME + Path(task[split]).name
        if self.evaluation.static_adapter is not None:
            evaluation["conditions"] = [name for name in evaluation["conditions"] if name != "static"] or ["learned"]
        return values

    def flat(self) -> dict[str, Any]:
        """Every setting as ``section.key``, JSON values."""
        return flattened(self.model_dump(mode="json"))


def _without_paths(section: BaseModel) -> dict[str, Any]:
    values = section.model_dump(mode="json")
    for name, value in section:
        if isinstance(value, Path):
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = _without_paths(value)
    return values


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, without: str | None = None, is_saved: bool = False
) -> Recipe:
    """Read a recipe, apply ``key.sub=value`` overrides, validate.

    Args:
        path: of the current directory, or the name of a recipe that is shipped.
        without: a section of the file that does not count: the overrides alone say what it is.
        is_saved: it is a checkpoint's, written by this version or an older one.

    Raises:
        SoftCoTError: the file is missing or no YAML mapping, or the recipe is wrong; lists every mistake.
    """
    path = found(Path(path))
    values = read_settings(path, "recipe")
    values.pop(without, None)
    if is_saved:
        values = in_todays_words(values)
    return parse_recipe(values, overrides or [], str(path))


def parse_recipe(values: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    """Validate ``values`` with ``overrides`` on top. ``source`` names the origin in the error message.

    Raises:
        WrongSettings: lists every mistake.
    """
    return validated(Recipe, values, overrides, source, "recipe")


def in_todays_words(values: Any) -> Any:
    """A recipe as an older version has written it, with what is called otherwise now under its name of today."""
    projection = values.get("projection") if isinstance(values, Mapping) else None
    if not isinstance(projection, Mapping) or "kind" not in projection:
        return values
    rest = {key: value for key, value in projection.items() if key != "kind"}
    return {**values, "method": METHOD_OF_KIND.get(projection["kind"], projection["kind"]), "projection": rest}


def fixed_settings(values: Mapping[str, Any], section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """The settings that decide what a run computes: those that are not marked FREE, as ``section.key``.

    Args:
        values: a recipe as ``to_yaml`` writes it, perhaps in an older version: what it lacks has its default.

    Raises:
        ValueError: a section is no mapping, or a setting without a default is missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'it'} is no mapping of keys to values, but {type(values).__name__}")
    fixed = {prefix + str(key): value for key, value in values.items() if key not in section.model_fields}
    for name, field in section.model_fields.items():
        if FREE in field.metadata:
            continue
        if name not in values and field.is_required():
            raise ValueError(f"{prefix}{name} is missing")
        value = values[name] if name in values else to_jsonable_python(field.get_default())
        kind = section_of(field.annotation)
        if kind is not None and value is not None:  # some sections may be left out
            fixed |= fixed_settings(value, kind, f"{prefix}{name}.")
        else:
            fixed[prefix + name] = value
    return fixed
