"""Run by test_evaluate.py on two ranks: an evaluation, then the same questions through the Python door, one by command.

Arguments: an adapter directory, a file for what the door gives (``.RANK`` is added), overrides.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

import softcot_ds
from softcot_ds.distributed import rank
from softcot_ds.evaluation import evaluate
from softcot_ds.generate import main as generate_main

folder, output, *overrides = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
adapter = softcot_ds.load(folder, *overrides)
evaluate(adapter.recipe, adapter.folder)
questions = [example.problem.question for example in adapter.experiment.splits.test]
embedded = adapter.prompt_embeddings(questions)
tensors = {str(number): prompt.embeddings for number, prompt in enumerate(embedded)}
save_file({"thoughts": adapter.thoughts(questions), **tensors}, f"{output}.{rank()}")
Path(f"{output}.{rank()}.json").write_text(json.dumps(adapter.answer(questions)))
sys.exit(generate_main([folder, "--question", questions[0], *overrides]))
