"""What several test files share.

PyTorch and transformers take seconds to import: only the fixtures that use them do so, and a file that needs neither
runs in the time of its tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from launch import BIN, ROOT
from slurm_cluster import Cluster, why_unavailable

if TYPE_CHECKING:
    from scribe import Scribe
    from transformers import PreTrainedTokenizerFast

# Read when PyTorch is imported. Ranks have one thread each; with more here, one process would round otherwise than two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Likewise: a name that no hub has is asked for again and again where there is no internet, for half a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is slow; pytest-timeout stops what hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

_MAY_START = {"distributed", "slurm", "gpu"}
_running: list[pytest.Item] = []


def _refuse_unmarked_processes(event: str, arguments: tuple) -> None:
    if event not in ("subprocess.Popen", "os.fork") or not _running or _MAY_START & set(_running[0].keywords):
        return
    # Tools such as git and bash -n take no time; Python and the launchers, which lie beside it, do.
    if event == "os.fork" or Path(os.fsdecode(arguments[0] or arguments[1][0])).parent == BIN:
        pytest.fail("a test that starts a process is to be marked: @pytest.mark.distributed")


sys.addaudithook(_refuse_unmarked_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """``make check`` leaves out what starts processes; a marker that is missing fails its test."""
    _running[:] = [item]
    try:
        return (yield)
    finally:
        _running.clear()


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and 4,000 times some milliseconds are a tenth of ``make check``. What is called when is
    seen by tests that put their own in the place of this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def without_a_group_of_another_file() -> Iterator[None]:
    """A command that is called here joins a process group, and the next one takes it as it is. Which files share a
    worker is chance."""
    yield
    if "torch.distributed" in sys.modules:
        from softcot_ds.distributed import shut_down

        shut_down()


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Names of the models that are loaded, where the assistant is, the base, and who drafts."""
    from softcot_ds.models import assistant, backbone, drafting

    loaded, load_frozen = [], backbone.load_frozen

    def load(config, *rest):
        loaded.append(config.model.rpartition("/")[2])
        return load_frozen(config, *rest)

    for module in (assistant, backbone, drafting):
        monkeypatch.setattr(module, "load_frozen", load)
    return loaded


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No system messages, and an end of turn that is the end of the sequence, after a space.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('no system role') }}{% endif %}"
    "{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def byte_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A token per byte and some special tokens: 263 in all, for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.chat_template = chat_template
    return tokenizer


def _shared(folder: Path, name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if name == "llama3 shared":
        tokenizer = byte_tokenizer((folder / "chat_templates" / "llama3_2.jinja").read_text())
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder / f"{name}_tokenizer")
    return tokenizer


END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "instruct": "</s>",
    "qwen2.5": "<|im_end|>",
    "llama3 shared": "<|eot_id|>",
    "minimind": "<|im_end|>",
}
"""The text that ends an answer, for every tokenizer of the fixture below."""


# A real vocabulary of 152,000 tokens takes seconds where logits are computed; its template is chatml.
_CHATS = [pytest.param(name, marks=pytest.mark.slow if name == "qwen2.5" else ()) for name in END_OF_TURN]


@pytest.fixture(scope="session", params=_CHATS)
def chat(request) -> tuple[PreTrainedTokenizerFast, str]:
    """A tokenizer with a chat template, and the text of its end of turn."""
    own = {"chatml": CHATML, "llama3": LLAMA3, "instruct": INSTRUCT}
    if request.param in own:
        return byte_tokenizer(own[request.param]), END_OF_TURN[request.param]
    return _shared(request.getfixturevalue("shared_data"), request.param), END_OF_TURN[request.param]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of third-party data that the project does not ship: beside the checkout, or named by an environment
    variable. Tests that want it are skipped where it is missing."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SOFTCOT_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder}; name one in SOFTCOT_SHARED_DATA")
    return folder


@pytest.fixture
def scribe(monkeypatch) -> Scribe:
    """Nothing is decoded by the embedded base, nor is it loaded: the scribe writes instead."""
    from scribe import Scribe, replace_decoding

    from softcot_ds.models.backbone import load_tokenizer
    from softcot_ds.recipe import load_recipe

    scribe = Scribe(load_tokenizer(load_recipe(ROOT / "recipes/word_problems.yaml").base))
    replace_decoding(monkeypatch, scribe)
    return scribe


@pytest.fixture(scope="session")
def first_evaluation(tmp_path_factory) -> Path:
    """A folder in which everything lies that ``evaluations.recipe_in`` names, and one evaluation of it. Tests change a
    copy."""
    from evaluations import evaluate_first

    folder = tmp_path_factory.mktemp("first")
    evaluate_first(folder)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A SLURM cluster of three nodes, started when the first test asks for it. A test leaves its nodes idle."""
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    cluster.start()
    yield cluster
    cluster.stop()
