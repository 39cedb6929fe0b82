"""An adapter directory: what evaluation and generation need of a training.

    projection.safetensors   the trained weights, float32 (the optimizer's master copy); or what the method calls it
    adapter.json             both models with fingerprints, task, thoughts, package version
    recipe.yaml              the resolved recipe of the run
    prompts.yaml             the wording that the run was trained with; beside it the chat templates that it named
    trainer.json             how it was trained
    README.md                what it is, for people and for the hub (card.py)
    COMPLETE                 the marker, written last

It is a checkpoint (training/checkpoint.py), of which only training needs the rest. The frozen weights are in none.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from softcot_ds import __version__
from softcot_ds.choices import METHOD_OF_KIND, METHODS, one_of
from softcot_ds.distributed import device, is_main
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.files import parse_json
from softcot_ds.methods.base import method_class
from softcot_ds.methods.initial import projection_weights
from softcot_ds.methods.projection import Projection, check_fits
from softcot_ds.models.assistant import states_layer
from softcot_ds.models.backbone import weights_fingerprint
from softcot_ds.recipe import ModelConfig
from softcot_ds.run_dir import require_complete


class _Record(BaseModel):
    """What a JSON file of ours holds; checked when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises SoftCoTError when the file cannot be read or holds something else."""
        try:
            return cls.model_validate(parse_json(path.read_bytes()))
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, found["loc"]))
            raise damaged(path, f"{key}: {found['msg']}" if key else found["msg"]) from error
        except ValueError as error:
            raise damaged(path, str(error)) from error


class ModelIdentity(_Record):
    """Which frozen model an adapter belongs to."""

    model: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelIdentity":
        return cls(model=config.model, revision=config.revision, fingerprint=weights_fingerprint(config))


class AdapterConfig(_Record):
    """What an adapter directory says about itself."""

    assistant: ModelIdentity
    base: ModelIdentity
    task: str
    method: Annotated[str, AfterValidator(one_of(METHODS))]
    num_thoughts: int = Field(ge=1)
    step: int = Field(ge=0)
    package_version: str = __version__
    training_data: str | None = None
    """Digest of the training examples' tokens, in their order, and of the validation examples' where those have data of
    their own. None: written before it was recorded."""
    chat_templates: dict[str, str] | None = None
    """Digest of the effective chat template of base and assistant. None: written before they were recorded."""
    layer: int | None = Field(None, ge=1)
    """Of the assistant, whose states it was trained on; None for the last."""
    placeholders: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] | None = Field(None, min_length=1)
    """Ids of the assistant's tokens at whose places those states were, which thoughts take in turn. None: written
    before they were recorded."""
    initial_embeddings: str | None = None
    """What the assistant read at these places instead, in several chains: ``InitialEmbeddings.identity``."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, values: Any) -> Any:
        """They wrote what kind of projection it is, and no method."""
        if not isinstance(values, dict) or "projection" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "projection"}
        return {"method": METHOD_OF_KIND.get(str(values["projection"])), **rest}

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig":
        """Raises SoftCoTError when ``folder`` is no complete adapter directory."""
        require_complete(folder)
        return cls.read(folder / "adapter.json")

    def at_step(self, step: int) -> "AdapterConfig":
        return self.model_copy(update={"step": step})

    def check_models(self, experiment: Experiment, assistant: bool = True) -> None:
        """Raises SoftCoTError when the recipe's models, or the layer or placeholders of the assistant, are not those
        that the adapter was trained with.

        Args:
            assistant: whether the assistant matters; it does not for free vectors.
        """
        recipe = experiment.recipe
        pairs = [("base", self.base, recipe.base)]
        if assistant:
            pairs.append(("assistant", self.assistant, recipe.assistant))
        for name, trained, config in pairs:
            fingerprint = weights_fingerprint(config)
            if fingerprint != trained.fingerprint:
                raise SoftCoTError(
                    f"the adapter was trained with the {name} {trained.model} (revision {trained.revision}, "
                    f"fingerprint {trained.fingerprint[:12]}), but {config.model} holds other weights "
                    f"(fingerprint {fingerprint[:12]}); set {name}.model to the model it was trained with"
                )

        if assistant and (layer := states_layer(recipe)) != self.layer:
            trained, now = ("the last layer" if number is None else f"layer {number}" for number in (self.layer, layer))
            raise SoftCoTError(
                f"the adapter was trained on states of {trained} of the assistant, and thoughts.layer="
                f"{recipe.thoughts.layer} names {now}; set it to {-1 if self.layer is None else self.layer}"
            )
        now = experiment.assistant_prompts.placeholder_cycle
        if assistant and self.placeholders not in (None, now):
            texts = [experiment.assistant_tokenizer.convert_ids_to_tokens(ids) for ids in (self.placeholders, now)]
            raise SoftCoTError(
                f"the adapter was trained on states at the assistant's tokens {texts[0]}, and thoughts.placeholder="
                f"{recipe.thoughts.placeholder} names {texts[1]}; set it as in recipe.yaml of the adapter's folder"
            )

        now = experiment.initial.identity if experiment.initial else None
        if assistant and self.initial_embeddings != now:
            raise SoftCoTError(
                f"the adapter was trained with {self.initial_embeddings or 'no'!r} initial embeddings, and the recipe "
                f"has {now or 'no'!r}; set method and chains as in recipe.yaml of the adapter's folder"
            )

    def other_templates(self, experiment: Experiment) -> list[str]:
        """Which models have another chat template now than in training, for messages."""
        trained, now = self.chat_templates or {}, _chat_templates(experiment)
        return [f"the chat template of {name}" for name in now if trained.get(name, now[name]) != now[name]]


class TrainerState(_Record):
    """What training needs to go on, beside tensors."""

    step: int = Field(ge=0)
    optimizer_steps: int = Field(ge=0)
    summary: dict[str, Any]


def _warn(text: str) -> None:
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)  # standard output may be answers


def damaged(path: Path, why: str) -> SoftCoTError:
    """The error that a file of a checkpoint is no good, with what to do."""
    return SoftCoTError(
        f"{path} is damaged: {why}; use another checkpoint. To train on from the one before, remove {path.parent}"
    )


def _chat_templates(experiment: Experiment) -> dict[str, str]:
    return {
        name: hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        for name, identity in experiment.chat_identity.items()
    }


def adapter_config(experiment: Experiment) -> AdapterConfig:
    """What the adapters of this recipe's run say about themselves, at step 0."""
    recipe = experiment.recipe
    return AdapterConfig(
        assistant=ModelIdentity.of(recipe.assistant),
        base=ModelIdentity.of(recipe.base),
        task=recipe.task.name,
        method=recipe.method,
        num_thoughts=recipe.thoughts.count,
        step=0,
        training_data=experiment.splits.data,
        chat_templates=_chat_templates(experiment),
        layer=states_layer(recipe),
        placeholders=experiment.assistant_prompts.placeholder_cycle,
        initial_embeddings=experiment.initial and experiment.initial.identity,
    )


def load_adapter(folder: Path, experiment: Experiment) -> Projection:
    """The trained projection in float32 on this process's device.

    Prompts that are rendered otherwise than in training are warned of: they may be meant.

    Raises:
        SoftCoTError: it is damaged or does not fit the models or the thought count.
    """
    config = AdapterConfig.load(folder)
    method, trained, count = method_class(config.method), config.num_thoughts, experiment.recipe.thoughts.count
    kind = method.projection_class
    if trained != count and not kind.is_per_thought:
        raise SoftCoTError(
            f"{folder} was trained with {trained} thoughts, and method={config.method} makes just as many, "
            f"not {count}; set evaluation.thoughts={trained}, or train one with thoughts.count={count}"
        )
    for text in config.other_templates(experiment):
        _warn(f"{text} is not the one that {folder} was trained with")
    if config.chat_templates is None:
        _warn(f"{folder} is of an older version, which kept no trace of the chat templates; they are not compared")
    projection = kind.empty(experiment.recipe, *experiment.widths)
    path = folder / method.weights_file
    weights = projection_weights(path, experiment.recipe)
    check_fits(weights, projection, path)
    projection.load_state_dict(weights)
    return projection.to(device())


def train_summary(folder: Path) -> dict[str, Any]:
    """How an adapter was trained: ranks, ZeRO stage, steps, losses, speed."""
    return TrainerState.read(folder / "trainer.json").summary
