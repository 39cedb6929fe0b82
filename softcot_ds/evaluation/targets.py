"""Solutions that the base writes itself: sampled, graded, and kept where they are right.

A problem is asked again until it has enough right solutions, or ``targets.samples`` are through. Each round is a job of
its own, kept on disk part by part; what a round asks follows from those before it, so that it is the same on any
number of ranks and after any interruption.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcot_ds.agreement import agree
from softcot_ds.data.examples import Example
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.data.targets import OwnTargets, Solved
from softcot_ds.distributed import init_distributed, on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.decoder import Decoder
from softcot_ds.evaluation.jobs import Loaded, Worker
from softcot_ds.evaluation.run import assistant_words
from softcot_ds.experiment import Experiment
from softcot_ds.files import content_digest
from softcot_ds.models.backbone import context_length, weights_fingerprint
from softcot_ds.models.decoding import Output, Sampling
from softcot_ds.recipe import Recipe


def make_targets(recipe: Recipe) -> None:
    """Write the file that task.targets names, unless it is there and was made of the same. All ranks call it together.

    Raises:
        SoftCoTError: task.targets names no file; the one that is there is damaged, or was made otherwise; the data is
            malformed; the base cannot be asked, or solves nothing.
    """
    init_distributed(recipe.training.timeout_minutes)
    agree(recipe.flat())
    path = recipe.task.targets_file
    if path is None:
        raise SoftCoTError(
            "task.targets is gold; name the file that the base's own solutions are to go into, and that the recipe is "
            "then to be trained on: task.targets=targets.jsonl"
        )
    experiment = Experiment(recipe.on_gold())
    experiment.task.require_training()
    for note in experiment.splits.notes:
        say(f"data: {note}")
    examples = experiment.splits.train
    prompts = _prompts(experiment, examples)
    made_from = _made_from(experiment, examples, prompts)
    own = on_main(lambda: _made_before(path, made_from))
    if own is None:
        own = OwnTargets(made_from, _solve(experiment, examples, prompts))
        if not own.solved:
            raise SoftCoTError(
                f"the base has solved none of {len(examples):,} training problems: there are no targets in its own "
                "words. Ask more often (targets.samples), let it write more (evaluation.max_new_tokens, now "
                f"{recipe.evaluation.max_new_tokens}), or train on the data's solutions: task.targets=gold"
            )
        on_main(lambda: own.write(path))
    say(f"the base has solved {own.solved:,} of {len(own.problems):,} training problems: {path}")


def _prompts(experiment: Experiment, examples: Sequence[Example]) -> list[BasePrompt]:
    prompts, recipe = experiment.base_prompts, experiment.recipe
    questions = [example.problem.question for example in examples]
    if recipe.targets.condition == "none":
        return [prompts.without_thoughts(question) for question in questions]
    words, _ = assistant_words(recipe, experiment, examples, Loaded())
    return [prompts.with_words(question, text) for question, text in zip(questions, words, strict=True)]


def _made_from(experiment: Experiment, examples: Sequence[Example], prompts: Sequence[BasePrompt]) -> dict[str, Any]:
    """All that decides the file, by content and never by path. JSON values."""
    recipe = experiment.recipe
    return {
        "task": recipe.task.name,
        "problems": content_digest([[example.problem.id, example.problem.answer] for example in examples]),
        # As the base reads them: wording, chat template, tokenizer, and the assistant's words where there are any.
        "prompts": content_digest([[prompt.prefix_ids, prompt.suffix_ids] for prompt in prompts]),
        "base": {
            "model": recipe.base.model,
            "revision": recipe.base.revision,
            "fingerprint": weights_fingerprint(recipe.base),
            "dtype": recipe.base.dtype,
            "bits": recipe.backbone.bits,
        },
        "settings": recipe.targets.model_dump(mode="json", exclude={"otherwise"}),
        "longest": [recipe.evaluation.max_new_tokens, _longest(experiment)],
        "batch_size": recipe.evaluation.batch_size,
        "seed": recipe.seed,
    }


def _made_before(path: Path, made_from: dict[str, Any]) -> OwnTargets | None:
    """What the file holds where there is one.

    Raises:
        SoftCoTError: it is damaged, or was made of something else: hours of work are not written over.
    """
    if not path.exists():
        return None
    own = OwnTargets.read(path)
    differ = [
        f"{key} is {own.made_from.get(key)} there and {value} here"
        for key, value in made_from.items()
        if own.made_from.get(key) != value
    ]
    if differ:
        raise SoftCoTError(
            f"{path} was made otherwise: {'; '.join(differ)}. Train on it as it is, name another file in task.targets, "
            "or move it away"
        )
    return own


def _solve(experiment: Experiment, examples: Sequence[Example], prompts: Sequence[BasePrompt]) -> list[Solved]:
    recipe, settings = experiment.recipe, experiment.recipe.targets
    worker = Worker(recipe, recipe.base, weights_fingerprint(recipe.base))
    decoder = Decoder(worker, experiment.base_prompts.stop_ids, context_length(experiment.base_config))
    sampling = Sampling(recipe.evaluation.max_new_tokens, settings.temperature, settings.top_p)
    solved = [Solved(example.problem.id, 0, []) for example in examples]
    for draw in range(settings.samples):
        asked = [index for index, one in enumerate(solved) if len(one.solutions) < settings.per_problem]
        if not asked:
            break
        outputs = worker.run(decoder.job("targets", [prompts[index] for index in asked], None, sampling, draw))
        for index, output in zip(asked, outputs, strict=True):
            text = _right_text(experiment, examples[index], output)
            known = solved[index].solutions
            new = [text] if text is not None and text not in known else []
            solved[index] = Solved(solved[index].id, draw + 1, known + new)
        say(f"sample {draw + 1}: {sum(bool(one.solutions) for one in solved):,} of {len(solved):,} problems are solved")
    return solved


def _right_text(experiment: Experiment, example: Example, output: Output) -> str | None:
    """What the base wrote, where it is right and can be trained on as it stands; else None."""
    prompts = experiment.base_prompts
    text = experiment.base_tokenizer.decode(output.token_ids).strip()
    if output.cut or not experiment.task.solves(text, example.problem) or prompts.chat.plain(text) != text:
        return None
    try:
        target_ids = prompts.target_ids(text)
    except SoftCoTError:  # the chat template would show another text
        return None
    fits = example.length - len(example.target_ids) + len(target_ids) <= _longest(experiment)
    return text if fits and not {*prompts.stop_ids}.intersection(target_ids[:-1]) else None


def _longest(experiment: Experiment) -> int:
    """Tokens of an example that is trained on, at most."""
    context = context_length(experiment.base_config)
    return min(context, experiment.recipe.task.max_tokens or context)
