"""The model card of an adapter: README.md in its directory, and what the hub shows of it.

A checkpoint has one before anything is evaluated; ``softcot-ds push`` sends one with the results. It ends in a line by
which a card is known that somebody has changed: that one is theirs, and is not written anew.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from softcot_ds.adapter import AdapterConfig
from softcot_ds.data.targets import OwnShare
from softcot_ds.evaluation_config import STANDS_FOR
from softcot_ds.files import read_json
from softcot_ds.hub import CARD
from softcot_ds.methods.base import Method, method_class
from softcot_ds.models.model_files import config_folder
from softcot_ds.progress import count
from softcot_ds.recipe import ModelConfig, Recipe
from softcot_ds.values import PACKAGE_SCHEME, is_hub_name

Report = dict[str, Any]
"""See ``evaluation.report.make_report``."""
_SEAL = "<!-- softcot-ds wrote this card, and does so again when it sends it; changed, it is yours and stays: {} -->\n"
_SEALED = re.compile("(.*)" + re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{16})"), re.DOTALL)


def model_card(
    recipe: Recipe, config: AdapterConfig, trained: dict[str, Any], report: Report | None = None, repo: str = ""
) -> str:
    """The text of an adapter's card. It names no folder or file of this machine but by the last part.

    Args:
        recipe: as the adapter was trained, with the names of models and data by which others find them.
        trained: how it was trained, as its checkpoint says.
        report: of its evaluation on the task that it was trained on; None where there is none.
        repo: where it will lie on the hub; empty where that is not known.
    """
    method = method_class(config.method)
    models = [recipe.base, recipe.assistant] if method.needs_states else [recipe.base]
    title = repo.rpartition("/")[2] or recipe.name
    licence = _licence_of(recipe.base)
    data = ModelCardData(
        **licence,
        library_name="softcot-ds",
        pipeline_tag="text-generation",
        base_model=[name for name in map(public_name, models) if is_hub_name(name)] or None,
        # Of a whole model that was trained, its folder in the adapter's is one for everybody.
        base_model_relation="finetune" if "/" in method.weights_file else "adapter",
        datasets=[recipe.task.train] if _is_of_hub(recipe.task.train) else None,
        tags=["softcot", "soft-thoughts", config.method] if method.has_thoughts else ["softcot", config.method],
        model_name=title if report else None,
        eval_results=_metrics(recipe, report) if report else None,
    )
    unknown = "" if licence else "# license: that of the base is not known here; name it\n"
    parts = [
        f"---\n{data.to_yaml()}\n{unknown}---\n\n# {title}\n\n{_what(method, config)}",
        _models(recipe, config, method),
        _use(repo),
        _results(report, method),
        _training(recipe, config, trained),
    ]
    text = "\n\n".join(parts) + "\n\n"
    return text + _SEAL.format(_digest(text))


def is_edited(card: str) -> bool:
    """Whether somebody else has written a card, or changed one of ours."""
    sealed = _SEALED.fullmatch(card)
    return sealed is None or _digest(sealed[1]) != sealed[2]


def report_of(run_dir: Path, config: AdapterConfig, trained: dict[str, Any]) -> Report | None:
    """The report of a run, where it is of this adapter; else None.

    Args:
        trained: how the adapter was trained, as its checkpoint says; the report says so too.

    Raises:
        SoftCoTError: it is there and cannot be read.
    """
    path = run_dir / "report.json"
    report = read_json(path) if path.is_file() else None
    of_it = isinstance(report, dict) and (report.get("step"), report.get("train")) == (config.step, trained)
    return report if of_it else None


def public_name(config: ModelConfig) -> str:
    """A model's name as others may read it: of a folder its last part."""
    folder = Path(config.model)
    return folder.resolve().name if folder.is_dir() else config.model


def _is_of_hub(data: str | None) -> bool:
    return data is not None and is_hub_name(data) and not Path(data).is_file()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _licence_of(config: ModelConfig) -> dict[str, str]:
    """What the base's own card says of its licence, where it lies here: the keys of the card's YAML."""
    if config.model.startswith(PACKAGE_SCHEME):
        return {"license": "apache-2.0"}
    folder = config_folder(config)
    try:
        found = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data if folder else {}
    except Exception:  # no card there, or one that is none: whatever YAML's reader raises
        return {}
    named = {key: found.get(key) for key in ("license", "license_name", "license_link")}
    named = {key: value for key, value in named.items() if isinstance(value, str)}
    link = named.get("license_link", "")
    if link and "://" not in link:  # a file of the base's repository
        of_hub = is_hub_name(public_name(config))
        named["license_link"] = f"https://huggingface.co/{config.model}/blob/main/{link}" if of_hub else ""
    return {key: value for key, value in named.items() if value} if "license" in named else {}


def _metrics(recipe: Recipe, report: Report) -> list[EvalResult]:
    """What a report found, for programs: of each condition the accuracy and the loss, learned first."""
    test, of_hub = recipe.task.test, _is_of_hub(recipe.task.test)
    where: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": test if of_hub else recipe.task.name,
        "dataset_name": recipe.task.name,
        "dataset_config": recipe.task.subset if of_hub else None,
        "dataset_split": recipe.task.test_split if of_hub else "test",
    }
    found = []
    for name, row in sorted(report["conditions"].items(), key=lambda item: item[0] != "learned"):
        of_condition = f"{name}: {STANDS_FOR[name]}"
        said = {"condition": name, "num_problems": report["num_problems"]}
        if "accuracy" in row:
            interval = {"ci95": [*row["ci95"]]} if row["ci95"] else {}
            about = {"metric_name": f"accuracy ({of_condition})", "metric_args": said | interval}
            found.append(EvalResult(**where, metric_type="accuracy", metric_value=row["accuracy"], **about))
        if "loss" in row:
            about = {"metric_name": f"nats per token of the solutions ({of_condition})", "metric_args": said}
            found.append(EvalResult(**where, metric_type="loss", metric_value=row["loss"]["per_token"], **about))
    return found


def _what(method: type[Method], config: AdapterConfig) -> str:
    number, name = count(config.num_thoughts, "thought"), config.method
    if method.needs_states:
        return (
            f"Soft chain-of-thought (SoftCoT, [arXiv:2502.12134](https://arxiv.org/abs/2502.12134); `{name}`): a "
            f"frozen assistant reads a question, and what is here maps its hidden states to {number} in the embedding "
            "space of a frozen base, which reads them beside the question and reasons on."
        )
    if not method.changes_base:
        return f"Prompt tuning (`{name}`): {number} for a frozen base, the same for every question."
    thinks = f", which thinks {number} of its own before it answers" if method.has_thoughts else ", without thoughts"
    return f"A base model as it was trained by `{name}`{thinks}."


def _models(recipe: Recipe, config: AdapterConfig, method: type[Method]) -> str:
    rows = [("base", recipe.base, config.base)]
    rows += [("assistant", recipe.assistant, config.assistant)] if method.needs_states else []
    lines = ["## Models", "", "| | model | revision | fingerprint of its weights |", "|---|---|---|---|"]
    for role, model, identity in rows:
        lines.append(f"| {role} | {public_name(model)} | {model.revision or '-'} | `{identity.fingerprint[:12]}` |")
    return "\n".join([*lines, "", "Their weights are not in here: they are found by name, and others are refused."])


def _use(repo: str) -> str:
    source = repo or "this folder"
    return f"""## Use

```python
import softcot_ds
adapter = softcot_ds.load("{source}")
print(adapter.answer(["Tom has 3 bags of 4 plums. How many plums?"])[0])
```"""


def _results(report: Report | None, method: type[Method]) -> str:
    if report is None:
        return "## Results\n\nNot evaluated yet."
    conditions, learned = report["conditions"], report["conditions"].get("learned", {})
    samples = f", {report['samples']} samples of each" if "samples" in report else ""
    strategy = f", strategy {report['strategy']}" if "strategy" in report else ""
    thoughts = f", {count(report['num_thoughts'], 'thought')}" if method.has_thoughts else ""
    decoding = "greedy decoding" if not report["temperature"] else f"temperature {report['temperature']:g}"
    lines = [
        "## Results",
        "",
        f"{report['task']}, {report['num_problems']:,} test problems{thoughts}, {decoding}{samples}{strategy}; step "
        f"{report['step']}. Each line but `learned` is a control on the same problems; intervals are of 95%, leads in "
        "points, losses in nats per token of the reference solutions.",
        "",
    ]
    rows = [["what stands for thoughts", "accuracy", "interval", "`learned` leads by", "p", "loss", "`learned` - it"]]
    for name, row in sorted(conditions.items(), key=lambda item: item[0] != "learned"):
        beside = report["comparisons"].get(f"learned-{name}", {})
        given = f"`{name}`, {STANDS_FOR[name]}"
        rows.append([given, *_accuracy_cells(row, beside), *_loss_cells(row, beside)])
    kept = [0]
    kept += [1, 2, 3, 4] if "accuracy" in (learned or next(iter(conditions.values()))) else []
    kept += [5, 6] if "loss" in (learned or next(iter(conditions.values()))) else []
    table = [[row[column] for column in kept] for row in rows]
    return "\n".join([*lines, *_markdown(table)])


def _accuracy_cells(row: Report, beside: Report) -> list[str]:
    if "accuracy" not in row:
        return [""] * 4
    interval = "{:.1%} to {:.1%}".format(*row["ci95"]) if row["ci95"] else ""
    lead = [f"{100 * beside['difference']:+.1f}", f"{beside['p_value']:.2g}"] if "difference" in beside else ["", ""]
    return [f"{row['accuracy']:.1%}", interval, *lead]


def _loss_cells(row: Report, beside: Report) -> list[str]:
    if "loss" not in row:
        return ["", ""]
    found = beside.get("loss")
    difference = f"{found['per_token']:+.4f}" if found else ""
    difference += " ({:+.4f} to {:+.4f})".format(*found["ci95"]) if found and found["ci95"] else ""
    return [f"{row['loss']['per_token']:.4f}", difference]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _training(recipe: Recipe, config: AdapterConfig, trained: dict[str, Any]) -> str:
    task, lines = recipe.task, ["## Training", ""]
    data = "generated" if task.train is None else task.train if _is_of_hub(task.train) else Path(task.train).name
    lines.append(f"- task {config.task}, data {data}; {config.step} steps of {recipe.training.global_batch_size}")
    if own := trained.get("own_targets"):
        share = OwnShare(**own)
        lines.append(f"- {share.words()}")
    lines.append(f"- seed {recipe.seed}; softcot-ds {config.package_version}; the recipe is recipe.yaml")
    return "\n".join(lines)
