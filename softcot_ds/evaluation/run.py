"""The story of an evaluation: every condition is put to the base on the same problems with the same settings."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softcot_ds.adapter import train_summary
from softcot_ds.agreement import agree
from softcot_ds.choices import STRATEGIES, chosen
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import init_distributed, on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import Conditions, Posed
from softcot_ds.evaluation.decoder import Decoder
from softcot_ds.evaluation.forgetting import PlainText, forgetting, forgetting_lines, read_plain_text
from softcot_ds.evaluation.jobs import Job, Loaded, Thoughts, Worker
from softcot_ds.evaluation.losses import Losses
from softcot_ds.evaluation.nearest import NearestTokens
from softcot_ds.evaluation.options import Options, written_options
from softcot_ds.evaluation.report import Record, Scores, make_report, scores, table, write_results
from softcot_ds.evaluation.report_page import report_page
from softcot_ds.evaluation.spent import Round, Spent, alone, of_drafts, per_problem, together
from softcot_ds.evaluation.strategies import Answer, Reply
from softcot_ds.evaluation.votes import voted
from softcot_ds.evaluation_config import Condition
from softcot_ds.experiment import Experiment
from softcot_ds.files import content_digest
from softcot_ds.inference import Adapter
from softcot_ds.models.backbone import context_length, weights_fingerprint
from softcot_ds.models.decoding import Sampling
from softcot_ds.recipe import Recipe
from softcot_ds.tasks import Problem, Task


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to."""

    report: Record
    scores: dict[Condition, Scores]
    folder: Path
    """The evaluation's own, in the run's directory."""


def evaluate(recipe: Recipe, adapter: Path) -> Record:
    """Evaluate an adapter under the recipe's conditions; writes and returns the report. Raises SoftCoTError; see
    ``evaluated``."""
    return evaluated(recipe, adapter, Loaded()).report


def evaluated(recipe: Recipe, adapter: Path, loaded: Loaded) -> Evaluation:
    """Evaluate an adapter, one of several perhaps; writes its report.

    Args:
        loaded: the base, where another evaluation has loaded it; or room for it.

    Raises:
        SoftCoTError: the adapter is incomplete, damaged, or of other models; a condition cannot be met. Said before a
            model is loaded.
    """
    init_distributed(recipe.training.timeout_minutes)
    agree({"the adapter": adapter, **recipe.flat()})
    opened = Adapter(recipe, adapter)
    config, experiment, server = opened.config, opened.experiment, opened.server
    if config.method != recipe.method:
        raise SoftCoTError(
            f"{adapter} was trained by method={config.method}, and the recipe has {recipe.method}; "
            f"set method={config.method}"
        )
    trained = train_summary(adapter)
    examples = experiment.splits.test
    if not examples:
        raise SoftCoTError("there is no test problem to evaluate on; check task.test and task.max_tokens")
    for note in experiment.splits.notes:
        say(f"data: {note}")
    say(f"evaluating {adapter} on {len(examples)} problems")

    records, costs, key = _ask_all(opened, examples, loaded)
    report = make_report(recipe, adapter, config, trained, records, costs)
    if server:
        report["served_by"] = f"vLLM {server.version}"
    text = _plain_text(opened, loaded)
    if found := forgetting(report, text, opened.method.changes_base, config.base.fingerprint):
        report["forgetting"] = found
    if text is not None:
        key = content_digest([key, text.key])[:8]
    folder = recipe.run_dir / "evaluation" / f"step-{config.step}-{key}"
    questions = [example.problem.question for example in examples]
    written = on_main(
        lambda: write_results(recipe.run_dir, folder, records, report, report_page(report, records, questions))
    )
    lines = "\n".join([table(report), *forgetting_lines(found), written])
    say(lines)
    return Evaluation(report, scores(records, recipe.evaluation.votes), folder)


def _plain_text(adapter: Adapter, loaded: Loaded) -> PlainText | None:
    recipe, experiment = adapter.recipe, adapter.experiment
    if (path := recipe.evaluation.plain_text) is None:
        return None
    asked = recipe, recipe.base, adapter.config.base.fingerprint, loaded
    changed = Worker(*asked, adapter.change) if adapter.change else None
    context = context_length(experiment.base_config)
    return read_plain_text(path, experiment.base_tokenizer, context, Worker(*asked), changed)


def _ask_all(
    adapter: Adapter, examples: Sequence[Example], loaded: Loaded
) -> tuple[dict[Condition, list[Record]], dict[Condition, Record], str]:
    """By condition a record of each problem, and what was spent on one; and what tells this evaluation from others, of
    the same adapter."""
    recipe, experiment = adapter.recipe, adapter.experiment
    settings, context = recipe.evaluation, context_length(experiment.base_config)
    written = written_options(experiment, examples) if settings.decode and settings.read == "options" else None
    asked = recipe, recipe.base, adapter.config.base.fingerprint, loaded
    worker = Worker(*asked)
    decoding = Worker(*asked, server=adapter.server) if adapter.server else worker
    changed = Worker(*asked, adapter.change) if adapter.change else None
    conditions = Conditions(adapter, examples, loaded.release, changed)
    posed: dict[Condition, Posed] = {}
    inquiries: dict[Condition, _Inquiry] = {}
    words = Spent()
    # Text is the last, as it may run the assistant: all the others have been checked then.
    for name in sorted(settings.conditions, key=lambda name: name == "text"):
        if name == "text":
            conditions.words, words = assistant_words(recipe, experiment, examples, loaded)
        posed[name] = conditions.of(name)
        if settings.decode and settings.read == "text":
            asked_of = posed[name].asked_of or decoding
            decoder = Decoder(asked_of, experiment.base_prompts.stop_ids, adapter.context, adapter.drafter)
            inquiries[name] = _Inquiry(posed[name], decoder, experiment)
    losses = Losses(worker, posed, examples, context) if settings.loss else None
    options = Options(worker, posed, written, experiment.base_prompts, context) if written else None
    # For them alone a base that is somewhere else is not loaded here.
    nearest = None if adapter.server and not losses else _nearest(worker, posed)
    scored = [one for one in (losses, options, nearest) if one]
    if any(inquiry.needs_states for inquiry in inquiries.values()) or any(one.need_states for one in scored):
        conditions.read_states()  # now, as it may load the assistant: not beside the base
    lost = losses.run() if losses else {}
    answers = {name: inquiry.answers() for name, inquiry in inquiries.items()}
    if options:
        answers = {name: {experiment.task.rule: [chosen]} for name, chosen in options.run().items()}
    records = {
        name: _records(posed[name], examples, experiment, answers.get(name), lost.get(name))
        for name in settings.conditions
    }
    if nearest:
        for record, tokens in zip(records["learned"], nearest.run(experiment.base_tokenizer.decode), strict=True):
            record["nearest_tokens"] = tokens
    spent = {name: inquiry.spent for name, inquiry in inquiries.items()}
    spent |= {name: options.spent(name) for name in posed} if options else {}
    costs = {}
    for name, of_base in spent.items():
        of_assistant = words if name == "text" else _read_for_states(posed[name], examples)
        costs[name] = per_problem(of_base + _thinking(posed[name]), of_assistant, len(examples))
    for name, inquiry in inquiries.items():
        costs[name] |= inquiry.drafts
    keys = {name: inquiry.key for name, inquiry in inquiries.items()}
    keys |= {f"{name} loss": losses.key(name) for name in posed} if losses else {}
    keys |= {f"{name} options": options.key(name) for name in posed} if options else {}
    return records, costs, _evaluation_hash(recipe, keys, examples)


def _nearest(worker: Worker, posed: Mapping[Condition, Posed]) -> NearestTokens | None:
    """None where nothing is learned that stands in a prompt, or the base itself has to make it anew for that."""
    learned = posed.get("learned")
    return NearestTokens(worker, learned) if learned and learned.thoughts and not learned.thoughts.reads else None


def _thinking(problems: Posed) -> Spent:
    """What the base reads for thoughts of its own: once for all samples. Its seconds are those of what is decoded."""
    return Spent(0 if problems.thoughts is None else problems.thoughts.reads)


def _read_for_states(problems: Posed, examples: Sequence[Example]) -> Spent:
    """What the assistant reads for thoughts that are made of its states."""
    if problems.thoughts is None or not problems.thoughts.need_states:
        return Spent()
    return Spent(sum(len(example.assistant.token_ids) for example in examples))


class _Undecoded(Exception):
    """Raised in place of replies that are not there yet."""


class _Inquiry:
    """The recipe's strategy at work under one condition."""

    def __init__(self, problems: Posed, decoder: Decoder, experiment: Experiment) -> None:
        """Goes through the rounds that are on disk already; no model is loaded for it.

        Raises:
            SoftCoTError: what comes next cannot be asked.
        """
        self.problems = problems
        self._decoder = decoder
        self._experiment = experiment
        self._decoding = False
        self._jobs: dict[str, Job] = {}
        self._told: dict[str, Round] = {}
        """By job, in the sample that is being asked for."""
        self._samples: list[list[Round]] = []
        with contextlib.suppress(_Undecoded):
            self.answers()
        self._decoding = True

    @property
    def needs_states(self) -> bool:
        """Whether thoughts have to be made of the assistant's states for it, now or in a later round."""
        thoughts = self.problems.thoughts
        return thoughts is not None and thoughts.need_states and any(job.todo for job in self._jobs.values())

    @property
    def key(self) -> str:
        """Of all that was asked."""
        return "+".join(self._jobs)

    @property
    def spent(self) -> Spent:
        """What one answer to each problem costs, found by the recipe's rule, once they are there."""
        return together(self._samples) if self._experiment.recipe.evaluation.votes else alone(self._samples)

    @property
    def drafts(self) -> Record:
        """What became of the assistant's drafts, once the answers are there; empty where nothing was to be drafted."""
        outputs = (output for job in self._jobs.values() for output in job.results or ())
        count = self._experiment.recipe.evaluation.draft
        return of_drafts(outputs, count) if count else {}

    def answers(self) -> dict[str, list[list[Answer]]]:
        """By rule under which they are found, and by sample: one per problem. All ranks call it together."""
        self._jobs.clear()
        self._samples.clear()
        samples = range(self._experiment.recipe.answers)
        return {rule: [self._sample(rule, number) for number in samples] for rule in self._experiment.task.kind.rules}

    def _sample(self, rule: str, number: int) -> list[Answer]:
        settings, task = self._experiment.recipe.evaluation, self._experiment.task.under(rule)
        self._told.clear()
        ask, chains = functools.partial(self._ask, number), self.problems.chains
        answers = chosen(STRATEGIES, settings.strategy)(ask, chains[number % len(chains)], task, settings)
        if len(answers) != len(self.problems.prompts) or not all(isinstance(answer, Answer) for answer in answers):
            raise TypeError(
                f"the strategy {settings.strategy!r} is to return an Answer for each of {len(self.problems.prompts)} "
                f"problems; it returned {len(answers)}, of {sorted({type(answer).__name__ for answer in answers})}"
            )
        if rule == self._experiment.task.rule:
            self._samples.append([*self._told.values()])
        return answers

    def _ask(
        self,
        sample: int,
        name: str,
        prompts: Sequence[BasePrompt],
        thoughts: Thoughts | None,
        sampling: Sampling,
        draw: int = 0,
        count: int = 1,
    ) -> list[Reply]:
        """See ``strategies.Ask``. Each sample draws anew, and what is decoded greedily is the same in all."""
        if not prompts:
            return []
        recipe, is_first = self._experiment.recipe, not self._told
        samples, chains = recipe.answers, len(self.problems.chains)
        jobs = [
            self._decoder.job(name, prompts, thoughts, sampling, number + which * samples)
            # Before anything is told, all samples of a chain ask the same, which is then read once for all.
            for number in (range(sample, samples, chains) if is_first else [sample])
            for which in range(draw, draw + count)
        ]
        wanted = jobs[:count]
        self._jobs |= {job.key: job for job in wanted}
        if len({job.key for job in wanted} - self._told.keys()) < count:
            raise SoftCoTError(
                f"{name}: the strategy asks the same again, and would be told the same: sampled rounds want a draw of "
                f"their own each, and evaluation.temperature above 0 (it is {sampling.temperature:g})"
            )
        if any(job.todo for job in wanted) and not self._decoding:
            raise _Undecoded
        outputs = [self._decoder.worker.run(*jobs[number:]) for number in range(count)]
        num_thoughts = thoughts.count if thoughts else 0
        for number, job in enumerate(wanted):
            spent = Spent.on(job, [] if number else prompts, num_thoughts)
            self._told[job.key] = Round(job.key, spent, along=is_first and sample >= chains)
        decode = self._experiment.base_tokenizer.decode
        return [Reply(decode(one.token_ids), one.cut) for of_prompt in zip(*outputs, strict=True) for one in of_prompt]


def assistant_words(
    recipe: Recipe, experiment: Experiment, examples: Sequence[Example], loaded: Loaded
) -> tuple[list[str], Spent]:
    """What the assistant answers in words, for the condition text, and what that costs. Where it is loaded, it is in
    the place of another model, and the next one takes its own."""
    prompts = experiment.assistant_prompts
    worker = Worker(recipe, recipe.assistant, weights_fingerprint(recipe.assistant), loaded)
    decoder = Decoder(worker, prompts.stop_ids, context_length(experiment.assistant_config))
    inputs = [BasePrompt(prompts.words_prompt(example.problem.question), []) for example in examples]
    sampling = replace(Sampling.of(recipe.evaluation), max_new_tokens=recipe.evaluation.text_max_tokens)
    job = decoder.job("assistant", inputs, None, sampling)
    words = [experiment.assistant_tokenizer.decode(output.token_ids) for output in worker.run(job)]
    return words, Spent.on(job, inputs, 0)


def _records(
    problems: Posed,
    examples: Sequence[Example],
    experiment: Experiment,
    answers: Mapping[str, Sequence[Sequence[Answer]]] | None,
    losses: Sequence[float | None] | None,
) -> list[Record]:
    """What was asked of the base under one condition, and what it said: one of each problem.

    Args:
        answers: by the recipe's rule, and by each that there is, of each sample; None where nothing was decoded.
        losses: of the solutions; None where none were asked for.
    """
    decode, task = experiment.base_tokenizer.decode, experiment.task
    marker = "" if problems.thoughts is None else f"[{problems.num_thoughts} thoughts]"
    records: list[Record] = []
    for index, (example, prompt) in enumerate(zip(examples, problems.prompts, strict=True)):
        record = {
            "id": example.problem.id,
            "prompt": decode(prompt.prefix_ids) + marker + decode(prompt.suffix_ids),
            "reference": example.problem.answer,
        }
        if answers is not None:
            samples = [
                _graded({rule: of_rule[number][index] for rule, of_rule in answers.items()}, task, example.problem)
                for number in range(experiment.recipe.answers)
            ]
            record |= samples[0] if len(samples) == 1 else voted(samples)
        if losses is not None:
            record |= {"loss": losses[index], "solution_tokens": len(example.target_ids)}
        records.append(record)
    return records


def _graded(answers: Mapping[str, Answer], task: Task, problem: Problem) -> Record:
    """One reply: by the recipe's rule, and by each that there is."""
    by_rule = {
        rule: {"answer": answer.value, "correct": task.is_correct(answer.value, problem)}
        for rule, answer in answers.items()
    }
    answer = answers[task.rule]
    reply = {"output": answer.reply.text, "cut": answer.reply.cut}
    return {**reply, **by_rule[task.rule], "by_rule": by_rule, **answer.details}


def _evaluation_hash(recipe: Recipe, keys: Mapping[str, str], examples: Sequence[Example]) -> str:
    """Of all that decides a report, the references and how answers are found too: none is ever overwritten by another.

    Args:
        keys: of all that was asked.
    """
    problems = [[each.problem.question, each.problem.answer, *each.problem.options] for each in examples]
    rule = [] if recipe.task.metric_rule == "ours" else [recipe.task.metric_rule]
    kind = [] if recipe.task.answer is None else [recipe.task.answer]
    strategy = recipe.evaluation.other_strategy.values()
    return content_digest([recipe.task.name, keys, problems, *strategy, *rule, *kind])[:8]
