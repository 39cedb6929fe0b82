"""The recipe's section for the task: which problems, from which data, how they are graded."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationInfo, field_validator

from softcot_ds.choices import TASKS, chosen, one_of
from softcot_ds.section import FREE, Section
from softcot_ds.values import Count, CountOrZero, DataName, ExistingFile


class FieldsConfig(Section):
    """What the keys of a record are called in data of one's own."""

    question: str
    answer: str
    """A number, a letter, a yes or no (also true or false), or a text, as task.answer says."""
    reasoning: str | None = None
    """The worked solution that the base is trained to write before the answer, a text or a list of steps. Default: the
    answer alone."""
    options: str | None = None
    """A list of texts; A, B, and so on are put in front of them. With task.answer=option."""


class TaskConfig(Section):
    """What the models are asked, and from which data."""

    name: Annotated[str, AfterValidator(one_of(TASKS))]
    """Which task class reads and grades the problems. custom: data of one's own, as fields and answer describe it."""
    test_from_train: Literal["order", "content"] | None = None
    """Where there is no test data: a fifth of the training data, which is then not trained on. order: the last one, as
    it is published. content: chosen by a hash of the question, so that no problem moves when others come or go."""
    test: DataName | None = None
    """Test data: a JSON file (one object on each line, or a list of them) or a hub name. It is never trained on and
    never used to choose anything. Default: what the task is published as on the hub. Generated tasks have none."""
    train: DataName | None = None
    """Training data, likewise. Without, where test data is named, adapters of other tasks are evaluated."""
    train_split: str = "train"
    """What the training data is called within a data set of the hub."""
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
    train_problems: Count | None = None
    """Use at most this many training problems (generated tasks: generate this many)."""
    validation_problems: CountOrZero = 256
    """How many problems are cut from the training data for validation."""
    test_problems: Count | None = None
    """Use at most this many test problems (generated tasks: generate this many)."""
    prompts: Annotated[ExistingFile | None, FREE] = None
    """A prompt file that replaces the task's own (see softcot_ds/tasks/gsm8k.yaml)."""
    max_tokens: Count | None = None
    """Problems longer than this, in base tokens, are left out: prompt, thoughts and target; of test problems without
    the target."""

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


_DESCRIBED = {
    "fields": "say what the keys of a record are called: task.fields={question: ..., answer: ...}",
    "answer": "say what an answer is: number, option, yes_no or text",
    "prompts": "write a prompt file; softcot_ds/tasks/gsm8k.yaml is one to start from",
}
"""What a task of one's own wants of a recipe."""
