"""Methods by tasks by strategies by seeds, side by side: ``softcot-ds study STUDY.yaml``; study_config.py says what
stands in such a file.

Every cell is an ordinary run and an ordinary evaluation of it. The caches that they read are built first, then all runs
are trained, each in processes of its own, then all are evaluated. What is done is not done again, so the same command
goes on after an interruption; ``--submit`` puts what is left on SLURM. In the study's directory, output_dir/name:

    study.json     every cell, their means with intervals, paired tests (evaluation/study.py)
    study.html     the same as one page that opens offline (evaluation/study_page.py)
    outputs/       what was decoded, or losses, by content: of all cells
"""

import argparse
import os
import sys
from collections.abc import Sequence

from softcot_ds.apart import run_apart
from softcot_ds.cells import Cell
from softcot_ds.chain import Job, Submission, caches_complete, submit_chain, training_left, warn_if_too_large
from softcot_ds.command import add_settings, parsed, run_command
from softcot_ds.files import dump_yaml
from softcot_ds.launch import add_gpus, launch
from softcot_ds.progress import count
from softcot_ds.run_dir import recipe_and_adapter, refuse_other_steps
from softcot_ds.study_config import Study, load_study


def run_study(study: Study) -> None:
    """Build, train, evaluate and report whatever is left to do. All ranks call it."""
    _check_evaluations(study)
    from softcot_ds.experiment import Experiment

    trainings = study.trainings
    for cell in trainings:
        Experiment(cell.recipe).require_training()  # said before the first one has taken its hours
    for cell in _caches(study):
        run_apart("cache", cell)
    for number, cell in enumerate(trainings, 1):
        _tell(f"training {number} of {len(trainings)}: {cell.recipe.name}")
        run_apart("train", cell)
    cells = study.cells
    chosen = [recipe_and_adapter(cell.source, list(cell.overrides)) for cell in cells]
    for of_run in {(cell.task, cell.method) for cell in cells}:
        pairs = zip(cells, chosen, strict=True)
        refuse_other_steps([one for cell, one in pairs if (cell.task, cell.method) == of_run])
    _tell(f"{count(len(cells), 'evaluation')} of {count(len(trainings), 'run')}")

    from softcot_ds.distributed import on_main, say
    from softcot_ds.evaluation.grid import evaluate_all
    from softcot_ds.evaluation.study import make_study_report, write_study_report
    from softcot_ds.evaluation.study_page import write_page
    from softcot_ds.evaluation.words import study_table

    found = list(zip(cells, evaluate_all(chosen), strict=True))
    report = on_main(lambda: make_study_report(study, found))  # which reads what it has written; others may not see it
    path = on_main(lambda: write_study_report(study.run_dir, report))
    page = on_main(lambda: write_page(study.run_dir, report))
    say(f"\n{study_table(report)}\nresults: {path}; to look at: {page}")


def submit_study(study: Study, submission: Submission) -> None:
    """Put what is left to do on SLURM: the caches, the trainings side by side, and the study, which evaluates and
    reports when all are done.

    Raises:
        SoftCoTError: something is wrong with a cell's data or run, or see ``submit_chain``.
    """
    _check_evaluations(study)
    from softcot_ds.experiment import Experiment
    from softcot_ds.planning.lengths import data_of

    caches = [cell.recipe.to_yaml() for cell in _caches(study) if not caches_complete([cell.recipe])]
    jobs = [
        Job("cache", study.name, study.run_dir, settings, file=f"cache-{number}.yaml")
        for number, settings in enumerate(caches, 1)
    ]
    warned = set()
    for cell in study.trainings:
        experiment = Experiment(cell.recipe)
        experiment.require_training()
        recipe = experiment.count_epochs()
        if job := training_left(recipe, experiment):
            jobs.append(job)
            kind = recipe.model_copy(update={"name": "", "seed": 0}).to_yaml()
            if kind not in warned:
                warn_if_too_large(
                    recipe, data_of(experiment.splits), submission.scripts([job])[job.script], submission.gpu
                )
            warned.add(kind)
    settings = dump_yaml(study.model_dump(mode="json"))
    submit_chain([*jobs, Job("study", study.name, study.run_dir, settings, file="study.yaml")], submission)


def _check_evaluations(study: Study) -> None:
    """Raises SoftCoTError where a method cannot be evaluated as a cell asks: said before anything is trained for it."""
    from softcot_ds.methods.base import method_class  # brings torch and transformers, which take seconds

    for cell in study.cells:
        method_class(cell.recipe.method).check_evaluation(cell.recipe)


def _caches(study: Study) -> list[Cell]:
    """Cells whose caches are to be there, one for each cache: most have theirs in common."""
    from softcot_ds.methods.base import method_class
    from softcot_ds.thoughts.reader import cache_identity, cached, input_key

    # Of a task on which nothing is trained, each evaluation computes the few thoughts that it needs.
    own = [cell for cell in study.cells if study.tasks[cell.task].trained_on is None]
    evaluated = {(cell.recipe.name, cell.recipe.evaluation.thoughts): cell for cell in own}
    found: dict[tuple, Cell] = {}
    for cell in evaluated.values():
        if method_class(cell.recipe.method).needs_states and cell.recipe.thoughts.source == "cache":
            for of, inputs in cached(cell.recipe):
                held = frozenset(map(input_key, inputs))
                found.setdefault((of.cache.path, cache_identity(of).folder_name, held), cell)
    return list({cell.overrides: cell for cell in found.values()}.values())


def _tell(text: str) -> None:
    """On the first rank; they have not met yet."""
    if os.environ.get("RANK", "0") == "0":
        print(f"study: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="softcot-ds study", description="Methods by tasks by strategies by seeds, trained, evaluated and compared."
    )
    add_settings(parser, "study", "a YAML file; softcot-ds recipes lists one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a value of it, such as seeds=41..45")
    parser.add_argument("--submit", action="store_true", help="put what is left to do on SLURM, as these say:")
    Submission.add_arguments(parser, required=False)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_gpus(parser)
    args = parsed(parser, argv)
    if args.submit and args.gpus:
        parser.error("--gpus is for this machine; with --submit write --gpus-per-node")
    if args.submit and args.nodes is None:
        parser.error("--submit wants --nodes")
    if not args.submit and (args.nodes or args.dry_run):
        parser.error("--nodes and --dry-run are for --submit")

    def work() -> None:
        study = load_study(args.study, args.overrides)
        if args.submit:
            submit_study(study, Submission.asked_for(args))
        elif args.gpus:
            launch("study", [args.study, *args.overrides], args.gpus)
        else:
            run_study(study)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
