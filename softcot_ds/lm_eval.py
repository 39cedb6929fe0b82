"""An adapter in lm-evaluation-harness: ``softcot-ds lm-eval ADAPTER --tasks gsm8k_cot_zeroshot ...``.

The base reads what the harness has rendered. Thoughts stand in it behind the question, with the words around them that
the adapter was trained with; the assistant reads the raw question, from the record, in its own wording as ever.

The harness is not among our dependencies: ``pip install 'softcot-ds[lm-eval]'``.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from softcot_ds import load
from softcot_ds.command import add_recipe, complete, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.launchers import launched_ranks
from softcot_ds.run_dir import recipe_and_adapter

try:
    from lm_eval.api.model import LM
except ImportError as error:
    LM, _why_missing = object, str(error)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from softcot_ds.data.prompts import RenderedPrompt
    from softcot_ds.inference import Question
    from softcot_ds.models.sampling import Sampling

NAME = "softcot"
"""Of the model in the harness: ``--model softcot``."""
TASKS = Path(__file__).with_name("lm_eval_tasks")
"""Task files for the harness, of what it has not itself."""
QUESTIONS = {
    "gsm8k*": "{{question}}",
    "asdiv": "{{body}}\nQuestion:{{question}}",
    "asdiv_cot_llama": "{{body}} {{question}}",
    "bbh_cot_*": "{{input}}",
    "strategyqa_cot": "{{question}}",
}
"""By the names of tasks, what of a record is the question, as it stands in the prompt."""


class Rendered(str):
    """Text that a chat template has written, its special tokens among it."""


class SoftCoT(LM):
    """An adapter as a model of the harness."""

    def __init__(
        self,
        adapter: str,
        question: str | None = None,
        thoughts: bool = True,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            adapter: see ``softcot_ds.load``.
            question: the field of a record that is the question, or a Jinja template; None where ``QUESTIONS`` knows
                the task.
            thoughts: False for the base alone.
            batch_size: wins over the recipe's evaluation.batch_size; "auto" is that.
            max_batch_size, device: of no account; the harness names a GPU where there is none.
            overrides: values that win over the recipe's: ``{"evaluation.temperature": 0.7}``.

        Raises:
            SoftCoTError: see ``softcot_ds.load``; or this is one of several ranks.
        """
        super().__init__()
        if (ranks := launched_ranks()) > 1:
            raise SoftCoTError(f"{ranks} ranks were started, and the harness runs on one; start it without a launcher")
        if not str(batch_size).startswith("auto"):
            overrides["evaluation.batch_size"] = batch_size
        texts = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in overrides.items()]
        self.adapter = load(adapter, *texts)
        self.question = question if question is None or "{{" in question else "{{" + question + "}}"
        self.thoughts = thoughts

    @property
    def tokenizer_name(self) -> str:
        return self.adapter.recipe.base.model.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The base's, of which there is one, if any is asked for."""
        return self.adapter.experiment.base_prompts.chat.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Rendered:
        """A prompt by the base's own template. A last message of the role ``assistant`` is left open, any other is
        answered, whatever is asked for."""
        chat = self.adapter.experiment.base_prompts.chat
        plain = [{**message, "content": chat.plain(message["content"])} for message in chat_history]
        return Rendered(chat.prompt(plain))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the base writes after each prompt, up to the first of the texts that end it.

        Raises:
            SoftCoTError: a record's question is not known, or a setting of the generation.
        """
        asked = [self._asked(request)[1] for request in requests]
        settings = [self._sampling(request.args[1]) for request in requests]
        decode_text = self.adapter.experiment.base_tokenizer.decode
        texts: list[str] = []
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for sampling, group in groupby(range(len(requests)), key=lambda index: settings[index][0]):
                questions = [asked[index] for index in group]
                done = len(texts)
                outputs = self.adapter.outputs(questions, sampling, lambda n, done=done: bar.update(done + n - bar.n))
                texts += [decode_text(output.token_ids) for output in outputs]
        return [_until(text, ends) for text, (_, ends) in zip(texts, settings, strict=True)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each text after its prompt, and whether greedy decoding writes it.

        Raises:
            SoftCoTError: a record's question is not known.
        """
        questions, texts, last = [], [], None
        for request in requests:
            prompt, text = request.args
            if last != (prompt, request.doc):  # options of one question come together
                rendered, question = self._asked(request)
                questions.append(question)
                last = prompt, request.doc
            texts.append((len(questions) - 1, rendered.continuation_ids(text)))
        with tqdm(total=len(texts), disable=disable_tqdm) as bar:
            scores = self.adapter.scores(questions, texts, lambda read: bar.update(read - bar.n))
        return [(-score.loss, score.is_likeliest) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise SoftCoTError(
            f"{requests[0].task_name} asks for the likelihood of texts without a question, and thoughts are of a "
            "question; leave that task out"
        )

    def _asked(self, request: Instance) -> tuple[RenderedPrompt, Question]:
        from softcot_ds.data.prompts import RenderedPrompt

        text, own = request.args[0], self.adapter.experiment.base_prompts
        first_ids = [] if isinstance(text, Rendered) else _first_ids(own.chat.tokenizer, text)
        rendered = RenderedPrompt(own, text, first_ids)
        needs_question = self.thoughts and self.adapter.method.has_thoughts
        question = self._question(request) if needs_question else text
        return rendered, self.adapter.question(question, self.thoughts, rendered)

    def _question(self, request: Instance) -> str:
        from jinja2 import TemplateError
        from lm_eval.utils import apply_template

        task, fields = request.task_name, ", ".join(request.doc)
        known = (template for name, template in QUESTIONS.items() if fnmatchcase(task, name))
        template = self.question or next(known, None)
        if template is None:
            raise SoftCoTError(
                f"which field of its records is the question of {task} is not known; they have {fields}: name one with "
                "--question FIELD, or what of several stands in the prompt: --question '{{body}} {{question}}'"
            )
        try:
            return apply_template(template, request.doc).strip()
        except TemplateError as error:
            raise SoftCoTError(f"the question {template!r} of {task}: {error}; its records have {fields}") from error

    def _sampling(self, settings: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        """How the base's tokens are chosen, and the texts that end what it writes."""
        from lm_eval.models.utils import normalize_gen_kwargs

        from softcot_ds.models.sampling import Sampling

        given = dict(normalize_gen_kwargs(dict(settings), self.adapter.recipe.evaluation.max_new_tokens))
        until, most, _ = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        temperature, top_p = given.pop("temperature", 0.0), given.pop("top_p", 1.0)  # 0 without do_sample
        if given:
            unknown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise SoftCoTError(
                f"generation setting {unknown}: known are until, max_gen_toks, do_sample, temperature and top_p; leave "
                "others out of --gen_kwargs and of the task's file"
            )
        return Sampling(most, float(temperature), float(top_p)), until


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer begins every text with, where this one has it not."""
    begin = tokenizer.bos_token_id
    begins = begin is not None and tokenizer("x")["input_ids"][:1] == [begin]
    return [begin] if begins and not text.startswith(tokenizer.bos_token) else []


def _until(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of these."""
    return text[: min((text.index(end) for end in ends if end and end in text), default=len(text))]


def evaluate(adapter: str, overrides: Sequence[str], arguments: Sequence[str], **settings: Any) -> None:
    """Run the harness's own command line with an adapter.

    Args:
        overrides: ``key=value``, which win over the recipe's.
        arguments: of ``lm-eval run``.
        settings: see ``SoftCoT``.

    Raises:
        SoftCoTError: the harness is not installed, or refuses its arguments or a task; the adapter cannot be used.
    """
    recipe_and_adapter(adapter, list(overrides))  # what is wrong with them is said before the seconds of all the rest
    if LM is object:
        raise SoftCoTError(
            f"lm-evaluation-harness does not work here: {_why_missing}. Install it: pip install 'softcot-ds[lm-eval]'"
        )
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if model_registry.get(NAME, None) is None:  # releases after 0.4.13 find the entry point
        model_registry.register(NAME)(SoftCoT)
    given = {"adapter": adapter, **settings, **dict(text.split("=", 1) for text in overrides)}
    ours = ["--model", NAME, "--model_args", json.dumps(given), "--batch_size", "auto", "--include_path", str(TASKS)]
    before, sys.argv = sys.argv, ["lm-eval", "run", *ours, *arguments]
    try:
        cli_evaluate()
    except Exception as error:
        if not _is_of_harness(error):
            raise
        raise SoftCoTError(f"lm_eval: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before


def _is_of_harness(error: Exception) -> bool:
    """Whether it comes out of the harness, or what that calls, and not out of our code."""
    rooms = [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return [room for room in rooms if room in ("softcot_ds", "__main__", "lm_eval")][-1] == "lm_eval"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="softcot-ds lm-eval",
        usage="softcot-ds lm-eval ADAPTER [key=value ...] [--question FIELD] [--no-thoughts] --tasks TASK ...",
        description="Evaluate an adapter with lm-evaluation-harness.",
        epilog="All other arguments are those of lm_eval: see lm-eval run --help. Left out, --batch_size is "
        "evaluation.batch_size, and --include_path the folder of strategyqa_cot, a task of ours.",
        allow_abbrev=False,
    )
    add_recipe(parser, "the directory of a run or an adapter, or the recipe of a trained run", "adapter")
    parser.add_argument("--question", help="the field of a record that is the question, or a Jinja template of several")
    parser.add_argument("--no-thoughts", action="store_true", help="the base alone, for comparison")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    complete(parser)
    args, of_harness = parser.parse_known_args(argv)
    settings = {"question": args.question, "thoughts": not args.no_thoughts}
    return run_command(lambda: evaluate(args.adapter, args.overrides, of_harness, **settings))


if __name__ == "__main__":
    sys.exit(main())
