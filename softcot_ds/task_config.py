"""The recipe's sections for the task: which problems, from which data, how they are graded, who solves them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from softcot_ds.choices import TASKS, chosen, one_of
from softcot_ds.section import FREE, Section
from softcot_ds.values import Count, CountOrZero, DataName, ExistingFile, Key, TargetsName


class FieldsConfig(Section):
    """What the keys of a record are called in data of one's own."""

    question: Key
    answer: Key
    """A number, an option, a yes or no (also true or false), or a text, as task.answer says. An option is named by its
    letter, by its text, or by its position, an integer from 0."""
    reasoning: Key | None = None
    """The worked solution that the base is trained to write before the answer, a text or a list of steps. Default: the
    answer alone."""
    options: Key | None = None
    """A list of texts, all of which may carry "A)", "(A)", "A." or "A:", and so on; else these are put in front. With
    task.answer=option."""

    @field_validator("answer", "reasoning", "options")
    @classmethod
    def _each_has_its_own(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (same := [name for name, key in info.data.items() if key == value]):
            raise ValueError(f"{value!r} is the key of {same[0]} too; each has one of its own")
        return value


class TaskConfig(Section):
    """What the models are asked, and from which data."""

    name: Annotated[str, AfterValidator(one_of(TASKS)), WithJsonSchema({"enum": [*TASKS]})]
    """Which task class reads and grades the problems. custom: data of one's own, as fields and answer describe it."""
    test_from_train: Literal["order", "content"] | None = None
    """Where there is no test data: a fifth of the training data, which is then not trained on. order: the last one, as
    it is published. content: chosen by a hash of the question, so that no problem moves when others come or go."""
    test: DataName | None = None
    """Test data: a JSON file (one object on each line, or a list of them) or a hub name. It is never trained on and
    never used to choose anything. Default: what the task is published as on the hub. Generated tasks have none."""
    train: DataName | None = None
    """Training data, likewise. Without, where test data is named, adapters of other tasks are evaluated."""
    validation: DataName | None = None
    """Validation data, likewise. Default: what the published data set has for that, where it is trained on (AQuA); else
    some of the training data, which is then not trained on."""
    train_split: str = "train"
    """What the training data is called within a data set of the hub."""
    validation_split: str = "validation"
    test_split: str = "test"
    subset: str | None = None
    """Of a data set of the hub. Default: that of the published one."""
    fields: FieldsConfig | None = None
    """custom: what its records' keys are called."""
    answer: Literal["number", "option", "yes_no", "text"] | None = None
    """custom: of which kind its answers are."""
    metric_rule: Annotated[Literal["ours", "reference"], FREE] = "ours"
    """How answers are found for the accuracy of a report; that by the other rule stands beside it. reference: as the
    paper's own code finds them."""
    targets: Annotated[TargetsName, FREE] = "gold"
    """What the base is trained to write. gold: the solutions of the data. Else a file, of solutions that the base wrote
    itself, which `softcot-ds targets` makes. Validation problems keep the data's own: there the losses of runs with
    different targets can be compared."""
    train_problems: Count | None = None
    """Use at most this many training problems (generated tasks: generate this many)."""
    validation_problems: CountOrZero = 256
    """How many problems are cut from the training data for validation; of task.validation, at most this many."""
    test_problems: Annotated[Count | None, FREE] = None
    """Use at most this many test problems (generated tasks: generate this many)."""
    prompts: Annotated[ExistingFile | None, FREE] = None
    """A prompt file that replaces the task's own (see softcot_ds/tasks/gsm8k.yaml)."""
    max_tokens: Count | None = None
    """Problems longer than this, in base tokens, are left out: prompt, thoughts and target; of test problems without
    the target."""

    @property
    def targets_file(self) -> Path | None:
        """The file of own targets, which may be yet to be made; None where the data's are trained on."""
        return None if self.targets == "gold" else Path(self.targets)

    @field_validator("train", "validation", "test", "subset")
    @classmethod
    def _some_tasks_generate_data(cls, value: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if value is not None and name is not None and chosen(TASKS, name).most_generated is not None:
            raise ValueError(f"{name} makes its problems itself; leave it out, or see task.name=custom for other data")
        return value

    @field_validator("test")
    @classmethod
    def _some_tasks_read_data(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("test_from_train") is not None:
            task = chosen(TASKS, info.data["name"]) if "name" in info.data else None
            if task is not None and (task.most_generated is not None or not task.has_training_data):
                raise ValueError(f"{info.data['name']} has no training data that test_from_train could cut some from")
            if value is not None:
                raise ValueError("test_from_train is for data without test problems; leave one of the two out")
            return None
        return value or cls._published(info)

    @field_validator("train")
    @classmethod
    def _some_tasks_train(cls, value: str | None, info: ValidationInfo) -> str | None:
        task = chosen(TASKS, info.data["name"]) if "name" in info.data else None
        if task is None or value is not None:
            if task is not None and not task.has_training_data:
                raise ValueError(f"{info.data['name']} has none; leave it out, and evaluate another task's adapter")
            return value
        test = info.data.get("test")
        is_wanted = info.data.get("test_from_train") or (test is not None and test == task.published)
        return cls._published(info) if is_wanted and task.has_training_data else None

    @field_validator("validation")
    @classmethod
    def _some_tasks_validate(cls, value: str | None, info: ValidationInfo) -> str | None:
        task = chosen(TASKS, info.data["name"]) if "name" in info.data else None
        if value is not None or task is None or task.sizes is None or not task.sizes.validation:
            return value
        return task.published if info.data.get("train") == task.published else None

    @classmethod
    def _published(cls, info: ValidationInfo) -> str | None:
        task = chosen(TASKS, info.data["name"]) if "name" in info.data else None
        if task is None or task.most_generated is not None:
            return None
        if task.published is None:
            raise ValueError("missing; name a JSON-lines file or a hub name (owner/name)")
        return task.published

    @field_validator("fields", "answer", "prompts")
    @classmethod
    def _some_tasks_are_described(cls, value: Any, info: ValidationInfo) -> Any:
        if "name" not in info.data:
            return value
        described = chosen(TASKS, info.data["name"]).is_described_by_recipe
        if described and value is None:
            raise ValueError(f"missing; {_DESCRIBED[info.field_name]}")
        if not described and value is not None and info.field_name != "prompts":
            raise ValueError(f"{info.data['name']} knows its own; task.name=custom is for other data")
        return value

    @field_validator("answer")
    @classmethod
    def _options_are_chosen(cls, value: str | None, info: ValidationInfo) -> str | None:
        fields = info.data.get("fields")
        if fields is not None and (value == "option") != (fields.options is not None):
            raise ValueError(
                f"{value!r} does not fit fields.options={fields.options}; option is the answer where there are some"
            )
        return value

    @field_validator("train_problems", "test_problems")
    @classmethod
    def _some_tasks_generate(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = chosen(TASKS, info.data["name"]).most_generated if "name" in info.data else None
        if most is not None:
            if value is None:
                raise ValueError("missing; this task's problems are generated, say how many")
            if value > most:
                raise ValueError(f"{value:,} are more than the {most:,} that this task generates")
        return value


class TargetsConfig(Section):
    """How `softcot-ds targets` lets the base solve the training problems itself. The longest output and the batch size
    are those of evaluation."""

    samples: Count = 4
    """How often the base is asked each problem, at most: one that has enough right solutions is not asked again."""
    per_problem: Count = 1
    """How many right solutions of a problem are kept and trained on, at most; no two are the same."""
    temperature: float = Field(0.7, ge=0)
    """0 decodes greedily."""
    top_p: float = Field(1.0, gt=0, le=1)
    condition: Literal["none", "text"] = "none"
    """What the base is asked with. none: the question alone. text: the assistant's words too."""
    otherwise: Literal["gold", "leave_out"] = "gold"
    """Problems without a right solution. gold: the data's own is trained on. leave_out: they are not. Training asks
    for it: a file serves for both."""

    @field_validator("per_problem")
    @classmethod
    def _enough_are_asked_for(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("samples", value):
            raise ValueError(f"{value} is more than targets.samples={info.data['samples']}")
        return value

    @field_validator("temperature")
    @classmethod
    def _samples_differ(cls, value: float, info: ValidationInfo) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"{value} is too small: logits are divided by it; write 0, which decodes greedily")
        if not value and info.data.get("samples", 1) > 1:
            raise ValueError(f"0 decodes greedily: all of targets.samples={info.data['samples']} would be the same")
        return value


_DESCRIBED = {
    "fields": "say what the keys of a record are called: task.fields={question: ..., answer: ...}",
    "answer": "say what an answer is: number, option, yes_no or text",
    "prompts": "write a prompt file; softcot-ds init softcot_ds/tasks/gsm8k.yaml copies one to start from",
}
"""What a task of one's own wants of a recipe."""
