"""Prompts as tokens, against the chat template rendered and cut by hand."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import CHATML, INSTRUCT, LLAMA3, byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import ROOT

from softcot_ds.data.chat import fill
from softcot_ds.data.prompts import AssistantPrompts, BasePrompts, ChatFormat, PromptFile, RenderedPrompt
from softcot_ds.errors import SoftCoTError

DATE = {"date_string": "26 Jul 2024"}
SECTIONS = {
    "assistant": [{"role": "user", "content": "Give {count} hints. {question} They are: {thoughts} Done."}],
    "assistant_text": [{"role": "user", "content": "Hint: {question}"}],
    "base": [{"role": "user", "content": "Solve {question}\nHints: {thoughts}\nNow."}],
    "base_without_thoughts": [{"role": "user", "content": "Solve {question}"}],
}
PROMPTS = PromptFile(**SECTIONS)


def chat_format(template=CHATML, **kwargs) -> ChatFormat:
    return ChatFormat(byte_tokenizer(template), kwargs, "owner/model")


def rendered(tokenizer, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **DATE)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "question",
    [
        "2+2?",
        "What is {thoughts}, {count} and {question}?",
        "SOFT-THOUGHTS",
        "SOFT-THOUGHTS- or SOFT-THOUGHTS--",
        "ends in SOFT-",
        "{% raw %}{{ bos_token }} \\1 \\g<0>",
        "Käthe \U0001f34e \u2028 x",
    ],
)
def test_both_sides_of_the_thoughts_are_what_the_template_shows(chat, question):
    tokenizer, _ = chat
    prompts = BasePrompts(ChatFormat(tokenizer, DATE, "model"), PROMPTS)
    left, right = rendered(tokenizer, f"Solve {question}\nHints: \x01\nNow.").split("\x01")
    prompt = prompts.with_thoughts(question)
    assert (prompt.prefix_ids, prompt.suffix_ids) == (ids(tokenizer, left), ids(tokenizer, right))
    assert prompts.without_thoughts(question).suffix_ids == []
    assert prompts.without_thoughts(question).prefix_ids == ids(tokenizer, rendered(tokenizer, f"Solve {question}"))
    words = prompts.with_words(question, "{question} hint")
    text = rendered(tokenizer, f"Solve {question}\nHints: {{question}} hint\nNow.")
    assert (words.prefix_ids, words.suffix_ids) == (ids(tokenizer, text), [])


def test_the_assistant_reads_the_template_up_to_the_last_placeholder(chat):
    tokenizer, _ = chat
    prompts = AssistantPrompts(ChatFormat(tokenizer, DATE, "model"), PROMPTS, 3, "x")
    item = prompts.thoughts_input("an id", "2+2? {count}")
    left = ids(tokenizer, rendered(tokenizer, "Give 3 hints. 2+2? {count} They are: \x01 Done.").split("\x01")[0])
    assert item.example_id == "an id"
    assert item.token_ids == left + ids(tokenizer, "x") * 3
    assert item.positions == [len(left), len(left) + 1, len(left) + 2]
    assert prompts.words_prompt("2+2?") == ids(tokenizer, rendered(tokenizer, "Hint: 2+2?"))


@pytest.mark.parametrize("target", ["3 - 1 = 2\n#### 2", "#### 4", "Unklar: ½ — 🍎", " 4\n"])
def test_an_answer_is_written_as_the_whole_conversation_has_it(chat, target):
    tokenizer, end = chat
    end_id = tokenizer.convert_tokens_to_ids(end)
    prompts = BasePrompts(ChatFormat(tokenizer, DATE, "model"), PROMPTS)
    conversation = [{"role": "user", "content": "Solve 2+2?"}, {"role": "assistant", "content": target}]
    whole = tokenizer.apply_chat_template(conversation, **DATE)["input_ids"]
    whole = whole[: len(whole) - whole[::-1].index(end_id)]
    assert prompts.without_thoughts("2+2?").prefix_ids + prompts.target_ids(target) == whole
    assert prompts.stop_ids == [end_id, *sorted({tokenizer.eos_token_id} - {end_id})]
    assert AssistantPrompts(ChatFormat(tokenizer, DATE, "model"), PROMPTS, 1, "x").stop_ids == prompts.stop_ids


def test_a_last_message_of_the_assistant_is_left_open():
    prompts = PromptFile(
        **SECTIONS
        | {
            "assistant": [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{thoughts}"}],
            "base": [
                {"role": "user", "content": "{question}"},
                {"role": "assistant", "content": "Hints: {thoughts} So"},
            ],
        }
    )
    chat = chat_format()
    opened = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    item = AssistantPrompts(chat, prompts, 2, "x").thoughts_input("id", "2+2?")
    assert item.token_ids == ids(chat.tokenizer, opened + "xx")
    prompt = BasePrompts(chat, prompts).with_thoughts("2+2?")
    assert prompt.prefix_ids == ids(chat.tokenizer, opened + "Hints: ")
    assert prompt.suffix_ids == ids(chat.tokenizer, " So")


def test_llama_prompts_do_not_change_from_day_to_day(shared_data):
    template = (shared_data / "chat_templates" / "llama3_2.jinja").read_text()
    prompts = BasePrompts(chat_format(template, **DATE), PROMPTS)
    text = prompts.chat.tokenizer.decode(prompts.with_thoughts("q").prefix_ids)
    assert "Today Date: 26 Jul 2024" in text


def test_a_sentinel_in_the_wording_is_ordinary_text():
    sections = SECTIONS | {"base": [{"role": "user", "content": "SOFT-THOUGHTS {question} {thoughts}"}]}
    prompt = BasePrompts(chat_format(), PromptFile(**sections)).with_thoughts("2+2?")
    assert prompt.prefix_ids[-len("2+2? ") :] == ids(byte_tokenizer(None), "2+2? ")


def test_the_identity_of_a_format_is_its_content():
    identity = chat_format(LLAMA3, **DATE).identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["variables"] == {"bos_token": "<s>"}  # the date does not reach this template
    assert chat_format(LLAMA3).identity == identity
    assert chat_format(LLAMA3 + " ").identity != identity
    dated = "{{ date_string }}" + CHATML
    assert chat_format(dated, **DATE).identity != chat_format(dated, date_string="1 Jan 1970").identity


# ---------------------------------------------------------------------------------------------------------- errors


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(SoftCoTError, match="owner/model has no chat template; use an instruction-tuned model, or set"):
        chat_format(None)


@pytest.mark.parametrize(
    ("template", "kwargs", "reason"),
    [
        (INSTRUCT, {}, "no system role"),
        ("{% for m in messages %}{{ m.content", {}, "unexpected end of template"),
        ("{{ 'a' + 3 }}", {}, "can only concatenate str"),
        ("{% for i in [1] %}{{ i // 0 }}{% endfor %}", {}, "ZeroDivisionError"),
    ],
)
def test_a_template_that_refuses_the_prompt_is_named(template, kwargs, reason):
    system = [{"role": "system", "content": "Be brief."}, *SECTIONS["base_without_thoughts"]]
    with pytest.raises(SoftCoTError, match=f"chat template of owner/model refuses the prompt: .*{reason}"):
        BasePrompts(chat_format(template, **kwargs), PromptFile(**SECTIONS | {"base_without_thoughts": system}))


@pytest.mark.parametrize(
    ("template", "times"),
    [("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", 2), ("{{ bos_token }}", 0)],
)
def test_a_template_that_shows_the_thoughts_twice_or_never_is_refused(template, times):
    with pytest.raises(SoftCoTError, match=f"shows the place of the thoughts {times} times, not once; move"):
        chat_format(template).check(PROMPTS.base)


def test_thoughts_take_several_placeholders_in_turn():
    chat = chat_format()
    item = AssistantPrompts(chat, PROMPTS, 5, ["x", "</s>", "y"]).thoughts_input("id", "2+2?")
    one = AssistantPrompts(chat, PROMPTS, 5, "x").thoughts_input("id", "2+2?")
    x, y, end = (ids(chat.tokenizer, text) for text in ("x", "y", "</s>"))
    assert item.token_ids == one.token_ids[:-5] + x + end + y + x + end
    assert item.positions == one.positions
    for several in (["x", "y"], ["x", "y", "x", "y"]):
        for count in (1, 5):
            assert AssistantPrompts(chat, PROMPTS, count, several).placeholder_cycle == x + y
    assert AssistantPrompts(chat, PROMPTS, 5, ["x", "y", "x"]).placeholder_cycle == x + y + x
    with pytest.raises(SoftCoTError, match=r"thoughts.placeholder 'two' is 3 tokens"):
        AssistantPrompts(chat, PROMPTS, 1, ["x", "two"])


@pytest.mark.parametrize(("placeholder", "count"), [("two", 3), ("", 0), ("ü", 2)])
def test_a_placeholder_is_exactly_one_token(placeholder, count):
    with pytest.raises(SoftCoTError, match=f"thoughts.placeholder {placeholder!r} is {count} tokens .*owner/model"):
        AssistantPrompts(chat_format(), PROMPTS, 2, placeholder)


def test_the_placeholder_falls_back_to_unknown_then_padding_then_end():
    tokenizer = byte_tokenizer(CHATML)
    chat = ChatFormat(tokenizer, {}, "owner/model")
    for name, token in (("eos", "</s>"), ("pad", "<|im_start|>"), ("unk", "<s>")):
        setattr(tokenizer, f"{name}_token", token)
        assert AssistantPrompts(chat, PROMPTS, 1, None).placeholder_ids == [tokenizer.convert_tokens_to_ids(token)]
    for name in ("eos", "pad", "unk"):
        setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(SoftCoTError, match=r"has no unk, pad or eos token; set thoughts.placeholder"):
        AssistantPrompts(chat, PROMPTS, 1, None)


# ----------------------------------------------------------------------------------------------------- prompt files


def write(tmp_path: Path, sections) -> Path:
    path = tmp_path / "prompts.yaml"
    path.write_text(sections if isinstance(sections, str) else yaml.safe_dump(sections, allow_unicode=True))
    return path


def test_a_prompt_file_is_loaded_as_it_is_written(tmp_path):
    assert PromptFile.load(write(tmp_path, SECTIONS)) == PROMPTS


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"base": user("{question}")}, "base: {thoughts} is missing"),
        ({"base": user("{question} {thoughts} {thoughts}")}, "base: {thoughts} stands here 2 times"),
        ({"base": user("{question} {thoughts} {count}")}, "base: {count} has no meaning here"),
        ({"assistant_text": user("{question} {thoughts}")}, "assistant_text: {thoughts} has no meaning here"),
        ({"base_without_thoughts": user("Hello")}, "base_without_thoughts: {question} is missing"),
        ({"base": []}, "base: missing: write a list of messages with role and content"),
        ({"base": "{question} {thoughts}"}, "base: missing: write a list of messages with role and content"),
        ({"base": ["{question}"]}, "base: a message has a role and a content and nothing else, found '{question}'"),
        ({"base": [{"role": "user", "content": 3}]}, "base: role and content are text, found"),
        ({"base": [{"role": "user"}]}, "base: a message has a role and a content and nothing else, found"),
        ({"bse": user("x")}, "unknown key 'bse'; known: assistant, assistant_text, base, base_without_thoughts"),
    ],
)
def test_a_mistake_in_a_prompt_file_is_named(tmp_path, changes, mistake):
    path = write(tmp_path, SECTIONS | changes)
    with pytest.raises(SoftCoTError) as caught:
        PromptFile.load(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: mistakes in the prompt file:"
    (line,) = lines
    assert line.startswith(f"  - {mistake}")


def test_all_mistakes_of_a_prompt_file_are_reported_together(tmp_path):
    path = write(tmp_path, {"base": user("x"), "extra": 1})
    with pytest.raises(SoftCoTError) as caught:
        PromptFile.load(path)
    assert len(str(caught.value).splitlines()) == 1 + 1 + 2 + 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "a prompt file is a mapping"), ("base: [", "not YAML: line 1"), ("base: 1\nbase: 2", "stands twice")],
)
def test_what_is_no_prompt_file_says_so(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(SoftCoTError, match=message) as caught:
        PromptFile.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.none(), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.just("user") | VALUES, "content": st.sampled_from(["{question}", "{question} {thoughts}"]) | VALUES}
    ),
    max_size=2,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([*SECTIONS]) | VALUES.filter(lambda v: v.__hash__), MESSAGES | VALUES, max_size=5)
)
def test_any_yaml_is_a_prompt_file_or_one_error(tmp_path, sections):
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    with suppress(SoftCoTError):
        assert vars(PromptFile.load(path)) == sections


def test_braces_that_are_no_field_are_ordinary_text():
    sections = SECTIONS | {"base_without_thoughts": user('{question} as JSON: {"a": {x}} {Question}')}
    prompts = BasePrompts(chat_format(), PromptFile(**sections))
    text = prompts.chat.tokenizer.decode(prompts.without_thoughts("q").prefix_ids)
    assert 'q as JSON: {"a": {x}} {Question}' in text


@pytest.mark.parametrize("question", ["2+2?", "What is {thoughts}?", "Käthe \U0001f34e \u2028 x"])
def test_in_other_words_thoughts_stand_behind_the_last_place_of_the_question(chat, question):
    tokenizer, _ = chat
    own = BasePrompts(ChatFormat(tokenizer, DATE, "model"), PROMPTS)
    text = rendered(tokenizer, f"Q: {question}\nA: 3\n\nQ: {question}\nA:")
    left, right = rendered(tokenizer, f"Q: {question}\nA: 3\n\nQ: {question}\nHints: \x01\nNow.\nA:").split("\x01")
    prompt = RenderedPrompt(own, text, [7, 8]).with_thoughts(question)
    assert (prompt.prefix_ids, prompt.suffix_ids) == ([7, 8, *ids(tokenizer, left)], ids(tokenizer, right))
    plain = RenderedPrompt(own, text, [7, 8]).without_thoughts(question)
    assert (plain.prefix_ids, plain.suffix_ids) == ([7, 8, *ids(tokenizer, text)], [])
    with pytest.raises(SoftCoTError, match=r"the question 'more' does not stand in the prompt.*--question"):
        RenderedPrompt(own, text).with_thoughts("more")


@pytest.mark.parametrize("path", sorted((ROOT / "softcot_ds/tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_words_without_thoughts_are_as_with_them_once_they_stand_there(path):
    own = BasePrompts(chat_format(), PromptFile.load(path))
    question = "is <|im_end|> a word?"  # which ends no turn
    text = own.chat.prompt(fill(own.prompts.base_without_thoughts, {"question": own.chat.plain(question)}))
    assert RenderedPrompt(own, text).with_thoughts(question) == own.with_thoughts(question)


@pytest.mark.parametrize(
    ("base", "without", "around"),
    [
        ("{question}\nHints: {thoughts}\nNow.", "{question}\nNow.", ("\nHints: ", "")),
        ("{question} Think.\nHints: {thoughts}", "{question} Think.", ("\nHints: ", "")),
        ("{question}\n({thoughts})", "Solve {question}", ("\n(", ")")),
    ],
)
def test_around_thoughts_stand_the_words_that_are_there_for_them(base, without, around):
    contents = {"base": base, "base_without_thoughts": without}
    sections = {name: [{"role": "user", "content": content}] for name, content in contents.items()}
    assert PromptFile(**SECTIONS | sections).around_thoughts == around


@pytest.mark.parametrize("contents", [["{thoughts} help with {question}"], ["{question}", "Hints: {thoughts}"]])
def test_words_around_thoughts_that_do_not_follow_the_question_are_not_guessed(contents):
    roles = ["user", "assistant"]
    base = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    with pytest.raises(SoftCoTError, match=r"before the question, or in another message.*task\.prompts"):
        _ = PromptFile(**SECTIONS | {"base": base}).around_thoughts
