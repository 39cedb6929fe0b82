"""A vLLM server in the place of the base: what it is asked, what becomes of its faults, what is kept."""

import json
import shutil

import pytest
from adapters import make_adapter
from evaluations import EVERY, edit, make_recipe, records
from scribe import no_figure
from vllm_like import SAYS, served

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import report_page
from softcot_ds.evaluation.run import evaluate
from softcot_ds.generate import main as generate
from softcot_ds.models import server
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.values import resolve_location

CONDITIONS = f"evaluation.conditions=[{','.join([*EVERY, 'empty'])}]"
START = "--enable-prompt-embeds --trust-request-chat-template"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "adapter", make_recipe(folder))
    make_adapter(folder / "static", make_recipe(folder, "method=prompt_tuning"))
    return folder


@pytest.fixture
def vllm(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", server.KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(report_page, "drawn", no_figure)
    with served() as (url, state):
        yield url, state


def of(folder, adapters, *overrides):
    return make_recipe(
        folder,
        "task.test_problems=8",
        "evaluation.loss=false",
        f"evaluation.static_adapter={adapters}/static",
        *overrides,
    )


def outputs(recipe, *conditions):
    return {name: [row["output"] for row in records(recipe, name)] for name in conditions}


def test_it_writes_what_the_base_writes_under_every_condition(tmp_path, adapters, vllm, loaded):
    url, state = vllm
    own = of(tmp_path / "own", adapters, CONDITIONS)
    evaluate(own, adapters / "adapter")
    loaded.clear()
    asked = of(tmp_path / "served", adapters, CONDITIONS, f"evaluation.server={url}/v1/")
    report = evaluate(asked, adapters / "adapter")
    assert set(loaded) == {"assistant"}, "the base is loaded for nothing"
    names = [*EVERY, "empty"]
    found, true = outputs(asked, *names), outputs(own, *names)
    assert found == true
    assert len({tuple(texts) for texts in found.values()}) > 4, "what stands for the thoughts matters"
    assert report["served_by"] == "vLLM 0.32.0"
    assert {name: row["correct"] for name, row in report["conditions"].items()} == {
        name: row["correct"]
        for name, row in json.loads((own.run_dir / "report.json").read_text())["conditions"].items()
    }
    before = len(state.asked)
    evaluate(asked, adapters / "adapter")
    assert len(state.asked) == before + 1, "what is done is not asked again; only whether thoughts are taken"


def test_losses_are_those_of_the_base_here(tmp_path, adapters, vllm, loaded):
    few = ["evaluation.conditions=[learned,none]", "evaluation.loss=true"]
    asked = evaluate(of(tmp_path / "a", adapters, *few, f"evaluation.server={vllm[0]}"), adapters / "adapter")
    own = evaluate(of(tmp_path / "b", adapters, *few), adapters / "adapter")
    for name, row in asked["conditions"].items():
        assert row["loss"] == own["conditions"][name]["loss"]
        assert row["accuracy"] == own["conditions"][name]["accuracy"]


def test_a_server_that_dies_midway_leaves_what_it_wrote_and_is_gone_on_with(tmp_path, adapters, vllm):
    url, state = vllm
    sampled = [
        "evaluation.batch_size=2",
        "evaluation.temperature=1",
        "evaluation.samples=2",
        "evaluation.strategy=self_consistency",
    ]
    sampled += ["evaluation.conditions=[learned,none]", f"evaluation.server={url}"]
    whole, broken = of(tmp_path / "whole", adapters, *sampled), of(tmp_path / "broken", adapters, *sampled)
    evaluate(whole, adapters / "adapter")
    total = len(state.asked)
    state.asked.clear()
    state.lives = total * 5 // 8
    with pytest.raises(SoftCoTError, match=f"does not answer(.|\n)*the same command goes on(.|\n)*{START}"):
        evaluate(broken, adapters / "adapter")
    state.asked.clear()
    state.lives = total
    evaluate(broken, adapters / "adapter")
    assert len(state.asked) < total - 10, "portions of four problems that were done are not asked again"
    for name in ("learned", "none"):
        assert records(broken, name) == records(whole, name)
    samples = [[one["output"] for one in record["samples"]] for record in records(whole, "learned")]
    assert any(first != second for first, second in samples)


def test_a_moment_of_trouble_is_waited_for(tmp_path, adapters, vllm, capsys):
    url, state = vllm
    arguments = [str(adapters / "adapter"), "--question", "tom has 2 coins .", "evaluation.max_new_tokens=12"]
    assert generate(arguments) == 0
    own = capsys.readouterr().out
    state.faults = [None, 503, "closes"]  # after the first, which asks whether thoughts are taken
    assert generate([*arguments, "evaluation.decode=false", "--server", url]) == 0
    assert capsys.readouterr().out == own
    assert len(state.asked) == 4


def test_an_answer_that_the_server_gives_up_is_none(adapters, vllm, capsys):
    url, state = vllm
    state.faults = [None, "abort"]
    arguments = [str(adapters / "adapter"), "--question", "tom has 2 coins .", "--server", url]
    assert generate(arguments) == 2
    said = capsys.readouterr()
    assert "has given up an answer (abort). Start it so" in said.err
    assert not said.out


def test_an_adapter_does_not_say_who_is_told_the_key(tmp_path, adapters, vllm, monkeypatch, capsys):
    url, state = vllm
    monkeypatch.setenv(server.KEY, "secret")
    own = make_recipe(tmp_path, f"evaluation.server={url}")
    adapter = make_adapter(own.run_dir / "checkpoints/step-5", own, step=5)
    for named in (adapter, own.run_dir):
        assert generate([str(named), "--question", "tom has 2 coins .", "evaluation.max_new_tokens=2"]) == 0
        assert recipe_and_adapter(str(named), [])[0].evaluation.server is None
        assert recipe_and_adapter(str(named), [f"evaluation.server={url}"])[0].evaluation.server == url
    assert state.got == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"root": "meta-llama/Llama-3.1-8B"},
            "has meta-llama/Llama-3.1-8B, and the recipe's base is package:pair/base",
        ),
        ({"root": resolve_location("package:pair/assistant")}, "and the recipe's base is"),
        ({"without": {"embeds"}}, SAYS["embeds"]),
        ({"without": {"template"}}, "--trust-request-chat-template is not set"),
        ({"first_ids": [1]}, "has read other tokens than the prompt's"),
        ({"key": "secret"}, "wants a key: set VLLM_API_KEY"),
        ({"faults": ["closes"]}, "does not answer"),
    ],
)
def test_a_server_that_will_not_do_is_told_before_a_model_is_loaded(adapters, vllm, loaded, capsys, wrong, message):
    url, state = vllm
    for name, value in wrong.items():
        setattr(state, name, value)
    assert generate([str(adapters / "adapter"), "--question", "tom has 2 coins .", "--server", url]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert START in said or "key" in wrong
    assert loaded == []


def test_a_key_is_sent_and_a_server_that_is_not_there_is_told(adapters, vllm, monkeypatch, capsys):
    url, state = vllm
    state.key = "secret"
    monkeypatch.setenv(server.KEY, "secret")
    arguments = [str(adapters / "adapter"), "--question", "tom has 2 coins .", "--server"]
    assert generate([*arguments, url]) == 0
    assert generate([*arguments, "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9 does not answer (ConnectError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.server=localhost:8000"], "is no address of a server; write one such as http://localhost:8000"),
        (["evaluation.server=http://host:port"], "is no address of a server"),
        (["evaluation.server=http://me:hidden@host"], "give the key in VLLM_API_KEY"),
        (["evaluation.server=http://host", "evaluation.read=options"], "evaluation.read is options: it decodes"),
        (["evaluation.server=http://host", "evaluation.draft=4"], "set draft to 0, or leave server out"),
        (["evaluation.server=http://host", "evaluation.decode=false"], "evaluation.decode is False"),
    ],
)
def test_what_cannot_go_by_a_server_is_refused_with_the_recipe(tmp_path, overrides, message):
    with pytest.raises(SoftCoTError, match=message):
        make_recipe(tmp_path, *overrides)


def test_a_changed_base_is_on_no_server(tmp_path, adapters, loaded):
    recipe = make_recipe(tmp_path, "method=lora", "evaluation.conditions=[learned,none]", "evaluation.server=http://x")
    adapter = shutil.copytree(adapters / "adapter", tmp_path / "adapter")
    edit(adapter / "adapter.json", '"softcot"', '"lora"')
    with pytest.raises(SoftCoTError, match=r"evaluation.server has the base as it was, and method=lora changes it"):
        evaluate(recipe, adapter)
    assert loaded == []
