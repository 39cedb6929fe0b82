"""Run by test_evaluate.py on two ranks: own targets, an evaluation, the same questions through the Python door, and
one by command.

Arguments: an adapter directory, a file for what the door gives (``.RANK`` is added, ``.targets`` for those), overrides.
"""

import json
import sys
from pathlib import Path

from evaluations import SEARCH
from safetensors.torch import save_file

import softcot_ds
from softcot_ds.distributed import rank
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation.targets import make_targets
from softcot_ds.generate import main as generate_main
from softcot_ds.models import scoring
from softcot_ds.models.partition import needs_all_ranks
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import recipe_and_adapter

OWN = ["evaluation.partition=none", "evaluation.batch_size=1", "evaluation.max_new_tokens=40", "targets.samples=2"]

folder, output, *overrides = sys.argv[1:]
scoring._LOGITS_BYTES = 60 * 768 * 4  # a batch of solutions takes several passes, of each rank another number
make_targets(load_recipe(f"{folder}/recipe.yaml", [*overrides, *OWN, f"task.targets={output}.targets"]))
evaluate(*recipe_and_adapter(folder, overrides))
for strategy in ("tree", "graph"):
    evaluate(*recipe_and_adapter(folder, [*overrides, *SEARCH, f"evaluation.strategy={strategy}", f"name={strategy}"]))
adapter = softcot_ds.load(
    folder, *overrides, "evaluation.partition=null", "backbone.partition=node"
)  # then as in training
assert needs_all_ranks(adapter.base), "the base is split"
questions = [example.problem.question for example in adapter.experiment.splits.test]
embedded = adapter.prompt_embeddings(questions)
tensors = {str(number): prompt.embeddings for number, prompt in enumerate(embedded)}
save_file({"thoughts": adapter.thoughts(questions), **tensors}, f"{output}.{rank()}")
Path(f"{output}.{rank()}.json").write_text(json.dumps(adapter.answer(questions)))
sys.exit(generate_main([folder, "--question", questions[0], *overrides]))
