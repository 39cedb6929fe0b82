"""The recipe's section that says how answers are reached and compared."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from softcot_ds.backbone_config import Partition
from softcot_ds.choices import STRATEGIES, one_of
from softcot_ds.section import Section
from softcot_ds.strategy_config import GraphConfig, TreeConfig
from softcot_ds.values import AnyPath, Count, ExistingFile, Folder, ServerURL

Condition = Literal["learned", "shuffled", "mean", "zero", "empty", "placeholder", "none", "text", "static"]
STANDS_FOR: dict[str, str] = {
    "learned": "what was trained",
    "shuffled": "another question's thoughts",
    "mean": "the average thought",
    "zero": "zero vectors",
    "empty": "nothing, where thoughts would stand",
    "placeholder": "a token that says nothing",
    "none": "no thoughts, zero-shot CoT",
    "text": "the assistant's words",
    "static": "a tuned prompt",
}
"""By condition, what stands for the thoughts, in reports for people."""

_NOT_A_STRATEGYS = {
    *("conditions", "decode", "loss", "batch_size", "max_new_tokens", "text_max_tokens", "temperature", "top_p"),
    *("draft", "thoughts", "samples", "read", "partition", "plain_text", "placeholder", "static_adapter"),
    *("outputs", "server"),
}
"""Settings of an evaluation whatever the strategy: those that decide an output are in the key of what is decoded."""

DRAFT = 4
"""``draft`` where ``speculative`` alone is asked for."""


class EvaluationConfig(Section):
    """Accuracy and loss, never without their controls."""

    thoughts: Count | None = None
    """The number of thoughts in evaluation and answers, where training has another. Default: thoughts.count."""
    conditions: list[Condition] = Field(["learned", "shuffled", "mean", "zero", "none"])
    """What stands in for the thoughts; see the README."""
    decode: bool = True
    """Decode answers and grade them: accuracy."""
    loss: bool = True
    """Compare how likely the base finds the reference solutions: one pass, nothing is decoded for it."""
    strategy: Annotated[
        str, AfterValidator(one_of(STRATEGIES)), WithJsonSchema({"enum": [*STRATEGIES, "speculative"]})
    ] = "single"
    """How an answer is reached, under every condition. single: it is what is written after the prompt.
    self_consistency: it is the majority of the samples, each of which is reached so. tree, graph: it is searched for,
    see the sections of these names. speculative: short for single with draft: 4, where that is 0."""
    draft: int = Field(0, ge=0, le=64)
    """Tokens that the assistant writes ahead for each pass of the base, which decides what becomes of them: greedily
    the outputs stay the same, sampled ones have the same distribution. Both models need the same tokens. 0 for none."""
    batch_size: Count = 16
    """Problems decoded together on a rank, or whose solutions are read together. Decoding is divided among ranks in
    portions of at least two such batches."""
    max_new_tokens: Count = 512
    text_max_tokens: Count = 128
    """Longest answer of the assistant in words (condition text), tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily."""
    top_p: float = Field(1.0, gt=0, le=1)
    samples: Count = 1
    """Answers drawn for each problem, or for each set of its thoughts where it has several (chains): the report has the
    accuracy of one (self_consistency: of their vote), and majority votes and pass@k of every number of them."""
    read: Literal["text", "options"] = "text"
    """An answer is read from what is decoded; or, without decoding, which of a problem's options is likeliest."""
    server: ServerURL | None = None
    """A vLLM server that has the base and decodes, such as http://localhost:8000. The base is loaded here for losses
    alone, and the method must leave it as it is."""
    partition: Partition | None = None
    """How the base is held while decoding. Default: backbone.partition."""
    plain_text: ExistingFile | None = None
    """A file of text, of which it is told too how likely the base finds it, as it was and as it was trained: whether a
    method that changes it has it forget."""
    placeholder: str | None = None
    """The base's token at a thought's position, for the condition placeholder. Default: its unknown token, else pad,
    else end-of-sequence."""
    static_adapter: AnyPath | None = None
    """Adapter of a run with method=prompt_tuning, a directory or owner/name on the hub, for the condition static."""
    tree: TreeConfig = TreeConfig()
    """What strategy=tree does."""
    graph: GraphConfig = GraphConfig()
    """What strategy=graph does."""
    outputs: Folder | None = None
    """Where what is decoded is kept, by content; runs that name the same folder share what is the same for them.
    Default: outputs/ in the run's directory."""

    @property
    def votes(self) -> bool:
        """Whether the accuracy is that of the samples' vote, and not of one of them."""
        return self.strategy == "self_consistency"

    @property
    def other_strategy(self) -> dict[str, Any]:
        """A strategy that is not the default, and its own settings: reports of the default have neither."""
        if self.strategy == "single":
            return {}
        # A section is its strategy's alone. The wording of one decides what is asked, and is told apart by that.
        others = _NOT_A_STRATEGYS | (STRATEGIES.keys() - {self.strategy})
        return self.model_dump(mode="json", exclude={**dict.fromkeys(others, True), self.strategy: {"wording"}})

    @model_validator(mode="before")
    @classmethod
    def _speculative_is_a_way_to_decode(cls, values: Any) -> Any:
        """It changes how tokens are made and not which, whatever the strategy."""
        if not isinstance(values, dict) or values.get("strategy") != "speculative":
            return values
        return values | {"strategy": "single", "draft": values.get("draft") or DRAFT}

    @field_validator("conditions")
    @classmethod
    def _each_condition_once(cls, value: list[Condition]) -> list[Condition]:
        if not value:
            raise ValueError("empty; name what is to stand in for the thoughts, such as [learned, none]")
        if repeated := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands there more than once; each is decoded once")
        return value

    @field_validator("loss")
    @classmethod
    def _something_is_asked(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("decode") is False:
            raise ValueError("false, and evaluation.decode too: nothing is left to evaluate; set one of them to true")
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_divides(cls, value: float) -> float:
        if 0 < value < 1e-4:
            raise ValueError(f"{value} is too small: logits are divided by it; write 0, which decodes greedily")
        return value

    @field_validator("samples")
    @classmethod
    def _samples_differ(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("temperature") == 0:
            raise ValueError(
                f"{value}, and evaluation.temperature is 0, at which all samples are the same; set it to what they are "
                "to be drawn at, such as 0.7"
            )
        return value

    @field_validator("read")
    @classmethod
    def _options_are_not_decoded(cls, value: str, info: ValidationInfo) -> str:
        for key, default in {"samples": 1, "strategy": "single", "draft": 0}.items():
            if value == "options" and info.data.get(key, default) != default:
                raise ValueError(
                    f"options, and evaluation.{key} is {info.data[key]}: nothing is decoded for options; set read to "
                    f"text, or {key} to {default}"
                )
        return value

    @field_validator("server")
    @classmethod
    def _a_server_decodes(cls, value: str | None, info: ValidationInfo) -> str | None:
        for key, served in {"decode": True, "read": "text", "draft": 0}.items():
            if value is not None and (found := info.data.get(key, served)) != served:
                raise ValueError(
                    f"a server, and evaluation.{key} is {found}: it decodes answers whole, and does nothing else; "
                    f"set {key} to {served}, or leave server out"
                )
        return value

    @field_validator("tree", "graph")
    @classmethod
    def _what_is_drawn_differs(cls, value: TreeConfig | GraphConfig, info: ValidationInfo) -> TreeConfig | GraphConfig:
        if info.data.get("strategy") == info.field_name and info.data.get("temperature") == 0 and value.samples:
            raise ValueError(
                f"{'; '.join(value.samples)}, and evaluation.temperature is 0, at which all of them would be the same; "
                "set it to what they are to be drawn at, such as 0.7"
            )
        return value

    @field_validator("static_adapter")
    @classmethod
    def _static_has_an_adapter(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and "static" in info.data.get("conditions", []):
            raise ValueError("missing; the condition static needs an adapter directory")
        return value
