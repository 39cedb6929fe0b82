"""Send an adapter to the Hugging Face hub: ``softcot-ds push ADAPTER owner/name``, first with ``--dry-run``.

What is sent is what others need to open it, in one commit: the weights, adapter.json, trainer.json, prompts.yaml, chat
templates that the recipe names, and three files as others can use them:

    recipe.yaml   without the paths of this machine
    README.md     with the results of the run's report and the name on the hub; one that somebody has changed as it is
    *.json        where a model was a folder here, with the name that is given for it

Moments of the optimizer and whatever else lies there stay here.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softcot_ds.command import add_settings, parsed, run_command
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import dump_yaml, parse_json
from softcot_ds.hub import CARD
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import CHAT_TEMPLATES, MARKER, load_for_evaluation, recipe_and_adapter
from softcot_ds.values import is_hub_name

NAMES = (
    "base.model",
    "base.revision",
    "assistant.model",
    "assistant.revision",
    "task.train",
    "task.validation",
    "task.test",
)
"""What may be called otherwise where others are to find it."""
File = bytes | Path
"""What is sent: a content, or a file as it is."""


def push(source: str, repo: str, names: Sequence[str], private: bool = False, dry_run: bool = False) -> None:
    """Send an adapter to the hub, or with ``dry_run`` say what would be sent, without a network.

    The list of files goes to standard error; in a dry run the card to standard output.

    Args:
        source: an adapter directory, or the directory or the recipe of a run, whose newest checkpoint is meant.
        repo: owner/name; it is created where there is none.
        names: overrides of ``NAMES``.

    Raises:
        SoftCoTError: the adapter is incomplete; others could not open it; the hub does not take it.
    """
    if not is_hub_name(repo):
        raise SoftCoTError(f"{repo!r} is no name on the hub; write owner/name, with your account or organization first")
    if wrong := [text for text in names if text.partition("=")[0] not in NAMES]:
        raise SoftCoTError(f"{wrong[0]}: an adapter is sent as it was trained; only names change: {', '.join(NAMES)}")
    _, folder = recipe_and_adapter(source, list(names))
    recipe = load_for_evaluation(str(folder), list(names))  # as it was trained, whatever has become of the run's recipe
    _refuse_folders(recipe, folder)
    files = files_for_others(folder, recipe, repo)
    _tell(f"{'would be sent' if dry_run else 'sending'} to {repo}{' (private)' if private else ''}, from {folder}:")
    for name, content in sorted(files.items()):
        _tell(f"  {len(content) if isinstance(content, bytes) else content.stat().st_size:>14,} bytes  {name}")
    kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if kept := [name for name in kept if name not in files]:
        _tell(f"not: {', '.join(kept)}")
    if dry_run:
        card = files[CARD]
        print(card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8", errors="replace"), end="")
        return
    with _plainly_refused(repo):
        _tell(_send(repo, files, private))


def _refuse_folders(recipe: Recipe, folder: Path) -> None:
    """Raises SoftCoTError where a model is a folder of this machine, or named otherwise and of other weights."""
    from softcot_ds.adapter import AdapterConfig  # takes seconds, as transformers does
    from softcot_ds.card import public_name
    from softcot_ds.models.backbone import weights_fingerprint
    from softcot_ds.models.model_files import is_here

    config = AdapterConfig.load(folder)
    models = {"base": (recipe.base, config.base), "assistant": (recipe.assistant, config.assistant)}
    for role, (model, trained) in models.items():
        if (public := public_name(model)) != model.model:
            raise SoftCoTError(
                f"{role}.model={model.model} is a folder of this machine, and others could not open the adapter: say "
                f"what it is on the hub, {role}.model=owner/{public}; one that is not there is to be sent first"
            )
        if model.model == trained.model:
            continue
        if not is_here(model):
            _tell(
                f"{role}: {model.model} is not in the cache here: its weights are not compared with those of training"
            )
        elif (found := weights_fingerprint(model)) != trained.fingerprint:
            raise SoftCoTError(
                f"{role}.model={model.model} holds other weights (fingerprint {found[:12]}) than {trained.model}, with "
                f"which the adapter was trained (fingerprint {trained.fingerprint[:12]}); name the model that it is"
            )


def files_for_others(folder: Path, recipe: Recipe, repo: str) -> dict[str, File]:
    """What is sent of an adapter directory, by its path in the repository.

    Args:
        recipe: the adapter's, with the names by which others find models and data.
    """
    from softcot_ds.adapter import AdapterConfig, train_summary
    from softcot_ds.methods.base import method_class

    config = AdapterConfig.load(folder)
    method = method_class(config.method)
    names = [method.weights_file, *method.other_files, "adapter.json", "trainer.json", "prompts.yaml", MARKER]
    weights = folder / method.weights_file
    if weights.parent != folder:  # a whole model
        names += [str(path.relative_to(folder)) for path in weights.parent.iterdir()]
    files: dict[str, File] = {name: folder / name for name in names}
    for model, name in CHAT_TEMPLATES.items():
        if (template := getattr(recipe, model).chat_template) is not None:
            files[name] = template
    renamed = {config.base.model: recipe.base.model, config.assistant.model: recipe.assistant.model}
    trained = train_summary(folder)
    if own := trained.get("own_targets"):  # by the same base, perhaps under another name
        renamed[own["base"]] = recipe.base.model
    renamed = {old: new for old, new in renamed.items() if old != new}
    written = [text.encode() for old in renamed for text in (old, json.dumps(old)[1:-1])]
    for name in names:
        if name.endswith(".json") and any(text in (folder / name).read_bytes() for text in written):
            values = _renamed(parse_json((folder / name).read_bytes()), renamed)
            files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    files["recipe.yaml"] = dump_yaml(recipe.for_others).encode()
    files[CARD] = _card(folder, recipe, config, trained, repo)
    return files


def _card(folder: Path, recipe: Recipe, config: Any, trained: dict[str, Any], repo: str) -> File:
    """The adapter's own where somebody has changed it, else a new one with the results there are."""
    from softcot_ds.card import is_edited, model_card, report_of

    own = folder / CARD
    if own.is_file() and is_edited(own.read_text(encoding="utf-8", errors="replace")):
        _tell(f"{own} has been changed, and is sent as it is, without results; where it is removed, a new one is made")
        return own
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else recipe.run_dir
    report = report_of(run_dir, config, trained)
    if report is None:
        _tell(f"the card has no results: {run_dir}/report.json is none of this adapter; softcot-ds evaluate {folder}")
    return model_card(recipe, config, trained, report, repo).encode()


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _send(repo: str, files: dict[str, File], private: bool) -> str:
    """Returns a sentence about what was done."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from softcot_ds.card import is_edited

    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:  # of one that was there, the visibility has not changed
        raise SoftCoTError(f"{repo} is public on the hub; make it private there, name another, or leave out --private")
    note = ""
    if api.file_exists(repo, CARD):
        there = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8", errors="replace")
        if is_edited(there):
            files = {name: content for name, content in files.items() if name != CARD}
            note = f"; its {CARD} has been changed by somebody, and stays. To replace it: hf upload {repo} {CARD}"
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    done = api.create_commit(repo, operations, commit_message="Adapter of softcot-ds")
    return f"sent: {done.repo_url.url}{note}"


@contextmanager
def _plainly_refused(repo: str) -> Iterator[None]:
    """Makes one message, with what to do, of what the hub raises."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except SoftCoTError:
        raise
    except Exception as error:  # whatever the HTTP library of the day raises without a network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "mend that, and run the same command again"
        if isinstance(error, LocalTokenNotFoundError) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)
        ):
            remedy = f"log in with an account that may write to {repo}: hf auth login (or set HF_TOKEN)"
        raise SoftCoTError(f"{repo} does not take the adapter: {reason}; {remedy}") from error


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="softcot-ds push", description="Send an adapter to the Hugging Face hub.")
    add_settings(parser, "adapter", "an adapter: its directory, its run's, or the run's recipe")
    parser.add_argument("repo", metavar="owner/name", help="where to; it is made where it is not there yet")
    parser.add_argument("names", nargs="*", metavar="key=value", help=f"names by which others find: {', '.join(NAMES)}")
    parser.add_argument("--private", action="store_true", help="for you and whom you let in")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and show the card; no network")
    args = parsed(parser, argv)
    return run_command(lambda: push(args.adapter, args.repo, args.names, args.private, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
