"""The story of an evaluation: every condition is decoded on the same problems with the same settings."""

from collections.abc import Sequence
from pathlib import Path

from softcot_ds.adapter import AdapterConfig, train_summary
from softcot_ds.agreement import agree
from softcot_ds.backbone import context_length, weights_fingerprint
from softcot_ds.conditions import Conditions
from softcot_ds.decoder import Decoder, Job, content_digest
from softcot_ds.decoding import Output
from softcot_ds.distributed import init_distributed, on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.examples import Example
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import projection_class
from softcot_ds.prompts import BasePrompt
from softcot_ds.recipe import Condition, Recipe
from softcot_ds.report import Record, make_report, table, write_results


def evaluate(recipe: Recipe, adapter: Path) -> Record:
    """Evaluate an adapter under the recipe's conditions; writes and returns the report.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models; a condition cannot be met. Said before a
            model is loaded.
    """
    init_distributed(recipe.training.timeout_minutes)
    agree({"the adapter": adapter, **recipe.flat()})
    config = AdapterConfig.load(adapter)
    config.check_models(recipe, assistant=projection_class(config.projection).needs_states)
    if config.projection != recipe.projection.kind:
        raise SoftCoTError(
            f"{adapter} is a {config.projection} projection and projection.kind is {recipe.projection.kind}; "
            f"set it to {config.projection}"
        )
    trained = train_summary(adapter)
    experiment = Experiment(recipe)
    examples = experiment.splits.test
    if not examples:
        raise SoftCoTError("there is no test problem to evaluate on; check task.test and task.max_tokens")
    for note in experiment.splits.notes:
        say(f"data: {note}")
    say(f"evaluating {adapter} on {len(examples)} problems")

    inputs = Conditions(recipe, experiment, examples, adapter)
    names, limit = recipe.evaluation.conditions, recipe.evaluation.max_new_tokens
    decoder = Decoder(
        recipe,
        recipe.base,
        config.base.fingerprint,
        experiment.base_prompts.stop_ids,
        context_length(experiment.base_config),
    )
    jobs = {name: decoder.job(name, *inputs.of(name), limit) for name in names if name != "text"}
    if "text" in names:  # last, as it may run the assistant: all the others have been checked then
        inputs.words = _assistant_words(recipe, experiment, examples)
        jobs["text"] = decoder.job("text", *inputs.of("text"), limit)
    if any(job.todo and job.thoughts is not None and job.thoughts.need_states for job in jobs.values()):
        inputs.read_states()  # now, as it may load the assistant: not beside the base
    outputs: dict[str, list[Output]] = {}
    for job in jobs.values():
        if job.key not in outputs:  # of free vectors, learned and shuffled are the same
            outputs[job.key] = decoder.run(job)
    records = {name: _grade(outputs[jobs[name].key], jobs[name], examples, experiment) for name in names}
    report = make_report(recipe, adapter, config, trained, records)
    folder = recipe.run_dir / "evaluation" / f"step-{config.step}-{_evaluation_hash(recipe, jobs, examples)}"
    written = on_main(lambda: write_results(recipe.run_dir, folder, records, report))
    say(f"{table(report)}\n{written}")
    return report


def _assistant_words(recipe: Recipe, experiment: Experiment, examples: Sequence[Example]) -> list[str]:
    """What the assistant answers in words, for the condition text. The assistant is gone when this returns."""
    prompts = experiment.assistant_prompts
    decoder = Decoder(
        recipe,
        recipe.assistant,
        weights_fingerprint(recipe.assistant),
        prompts.stop_ids,
        context_length(experiment.assistant_config),
    )
    inputs = [BasePrompt(prompts.words_prompt(example.problem.question), []) for example in examples]
    outputs = decoder.run(decoder.job("assistant", inputs, None, recipe.evaluation.text_max_tokens))
    return [experiment.assistant_tokenizer.decode(output.token_ids) for output in outputs]


def _grade(outputs: Sequence[Output], job: Job, examples: Sequence[Example], experiment: Experiment) -> list[Record]:
    tokenizer, task = experiment.base_tokenizer, experiment.task
    marker = "" if job.thoughts is None else f"[{experiment.recipe.thoughts.count} thoughts]"
    records = []
    for output, prompt, example in zip(outputs, job.prompts, examples, strict=True):
        text = tokenizer.decode(output.token_ids)
        answer = task.extract(text, output.cut)
        records.append(
            {
                "id": example.problem.id,
                "prompt": tokenizer.decode(prompt.prefix_ids) + marker + tokenizer.decode(prompt.suffix_ids),
                "output": text,
                "cut": output.cut,
                "answer": answer,
                "reference": example.problem.answer,
                "correct": task.is_correct(answer, example.problem),
            }
        )
    return records


def _evaluation_hash(recipe: Recipe, jobs: dict[Condition, Job], examples: Sequence[Example]) -> str:
    """Of all that decides a report, the references too: none is ever overwritten by another."""
    problems = [[example.problem.question, example.problem.answer] for example in examples]
    return content_digest([recipe.task.name, {name: job.key for name, job in jobs.items()}, problems])[:8]
