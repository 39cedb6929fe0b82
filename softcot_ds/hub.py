"""What comes from the Hugging Face hub, into the local cache: downloaded by one process, or refused with what to do.

What is in the cache is never asked about again, so that a run does not change when what it was made with does. Needs no
torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from softcot_ds.errors import SoftCoTError
from softcot_ds.values import is_hub_name

CARD = "README.md"
"""A repository's card: what it holds, for people, and before that in YAML, for programs."""
_OF_ADAPTERS = (".safetensors", ".json", ".yaml", ".jinja")
"""What the files of an adapter end in. Nothing else is downloaded: no pickle, which could hold code."""
_OF_TRAINING = "optimizer.safetensors"


def adapter_on_hub(source: str, marker: str) -> Path | None:
    """The folder in the local cache of an adapter of the hub.

    Args:
        source: ``owner/name``, or ``owner/name@revision``.
        marker: the file that an adapter which is whole has. It is downloaded last, as it is written last: a download
            that is cut short leaves no adapter that looks whole.

    Returns:
        None where ``source`` is not of this form.

    Raises:
        SoftCoTError: it is not in the cache and cannot be downloaded, or is no adapter; with what to do.
    """
    name, _, revision = source.partition("@")
    if not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache  # takes a second

    def cached() -> Path | None:
        found = try_to_load_from_cache(name, marker, revision=revision or None)
        return Path(found).parent if isinstance(found, str) else None

    def wanted(sizes: Mapping[str, int]) -> list[str]:
        if marker not in sizes:
            raise SoftCoTError(
                f"{name} on the hub is no adapter of softcot-ds: it has no file {marker}; name another, or send it "
                f"there with softcot-ds push ADAPTER {name}"
            )
        files = [path for path in sizes if (path.endswith(_OF_ADAPTERS) and path != _OF_TRAINING) or path == CARD]
        return [*files, marker]

    return fetched(name, revision or None, cached, wanted)


def fetched(
    name: str,
    revision: str | None,
    cached: Callable[[], Path | None],
    wanted: Callable[[Mapping[str, int]], list[str]],
    what: str = "",
) -> Path:
    """The folder in the local cache of what is wanted of a hub repository. One process of those that share a cache
    downloads what is not there; the others wait for it.

    Args:
        cached: the folder, where it holds all that is asked for; else None.
        wanted: the files, of those that the repository has, whose bytes it is told; the last one comes last.
        what: of the repository is asked for, in words, if not all.

    Raises:
        SoftCoTError: it is not there and cannot be downloaded; with what to do.
    """
    if (folder := cached()) is not None:
        return folder
    from filelock import FileLock
    from huggingface_hub import constants

    with plainly_said(name, revision):
        locks = Path(constants.HF_HUB_CACHE) / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"softcot-ds--{name.replace('/', '--')}.lock"):
            return cached() or _download(name, revision, wanted, what)


def _download(name: str, revision: str | None, wanted: Callable[[Mapping[str, int]], list[str]], what: str) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    api = HfApi()
    # Asked once: the list of a repository's tree is asked for again and again where there is no network.
    there = api.model_info(name, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in there.siblings or ()}
    *files, last = wanted(sizes)
    gigabytes = sum(sizes[path] for path in (*files, last)) / 1e9
    text = f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:,.1f} MB"
    print(f"downloading {name}{what and f' ({what})'}, {text}", file=sys.stderr, flush=True)
    disable_progress_bars()
    folder = Path(api.snapshot_download(name, revision=revision, allow_patterns=files))
    api.hf_hub_download(name, last, revision=folder.name)  # of the same commit
    return folder


@contextmanager
def plainly_said(name: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Makes one message, with what to do, of what a download raises. ``file``: the one that is wanted, if not all."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except SoftCoTError:
        raise
    except GatedRepoError as error:
        raise SoftCoTError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then log in with that account: "
            "hf auth login (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise SoftCoTError(f"{name} has no revision {revision!r} on the hub; see its commits there") from error
    except RepositoryNotFoundError as error:
        raise SoftCoTError(
            f"there is no folder {name}, and the hub has none of this name, or it is private; check the name, or log "
            "in: hf auth login (or set HF_TOKEN)"
        ) from error
    except Exception as error:  # whatever the HTTP library of the day raises without a network; a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        missing = (
            f"{file} of {name} is not" if file else f"there is no folder {name}, and it is not (or not completely)"
        )
        command = f"hf download {name} {file}".rstrip()
        command += f" --revision {revision}" if revision else ""
        raise SoftCoTError(
            f"{missing} in {constants.HF_HUB_CACHE}, and downloading it fails: {reason}. "
            f"Where there is internet, with the same HF_HOME: {command}"
        ) from error
