"""What the trial says of a model, against what the step and the thoughts give: examples run alone are the truth."""

import re
from functools import partial, wraps

import pytest
import torch
from test_step import UNEVEN, P, check, draw_examples, loss_and_gradient, true_loss_and_gradient
from torch import nn
from toy_models import WIDTH, make_toy

from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.methods.trial import check_model, why_gradient_wrong, why_not_fast, why_unsuitable
from softcot_ds.models.assistant import compute_thoughts, decoder_of, end_after, read_shared
from softcot_ds.models.frozen_prefix import FrozenPrefix, why_unsupported
from softcot_ds.models.shared_prefix import NO_PREFIX

FAST = (
    *("llama", "qwen2-sliding", "qwen3", "mistral", "mixtral", "phi3", "gemma", "gemma2", "gemma3_text", "gemma3"),
    *("granite", "olmo3", "smollm3", "cohere2", "deepseek_v3", "gpt_oss", "opt", "biogpt", "xglm"),
    *("gemma4_text-plain", "opt-projected"),
)
FULL = (
    *("gpt2", "gpt_neox", "bloom", "falcon", "falcon-alibi", "gptj", "llama4_text", "mamba", "jamba", "bamba", "lfm2"),
    *("minimax", "qwen3_next", "rwkv", "recurrent_gemma", "xlstm", "inkling_text", "openai-gpt", "longcat_flash"),
)

QUICK = {
    *("llama", "qwen2-sliding", "gemma2", "gemma3", "gpt_oss", "opt", "xglm", "gemma4_text-plain", "opt-projected"),
    *("gpt2", "bloom", "llama4_text", "mamba", "rwkv", "openai-gpt"),
}
"""One of each kind; the others are tried by ``make test``."""


def why_no_fast_step(model) -> str | None:
    reason = why_unsupported(model)
    if reason is None:
        prefixed = FrozenPrefix(model)
        reason = why_not_fast(model, prefixed)
        prefixed.remove()
    return reason


def make_projection(base_width: int) -> LinearProjection:
    torch.manual_seed(6)
    return LinearProjection(P, base_width)


@pytest.mark.filterwarnings("ignore:.*runs the full step")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*FAST, *FULL)]
)
def test_what_is_called_fit_gives_what_examples_alone_give(family):
    model = make_toy(family)
    examples, base_width = draw_examples(UNEVEN, thoughts=3, shared=6), model.get_input_embeddings().weight.shape[1]
    try:
        truth = true_loss_and_gradient(model, make_projection(base_width), examples)
    except RuntimeError:  # some parts (experts, a mask) know no float64
        truth = true_loss_and_gradient(model, make_projection(base_width), examples, torch.float32)

    assert why_unsuitable(model, "base") is None
    assert why_gradient_wrong(model) is None
    fast = why_no_fast_step(model) is None
    assert fast == (family in FAST)
    kind = "fast" if fast else "full"
    step = SoftThoughts(model, make_projection(base_width), step=kind, shared_ids=examples[0][0][:6])
    assert step.num_shared == (6 if fast else 0)
    check(loss_and_gradient(step, examples, torch.float32), truth, 3e-6, 1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "xlstm", "rwkv", "llama4_text", "openai-gpt", "minimax", "mamba"]
)
def test_assistants_that_are_called_fit_give_the_states_of_inputs_run_alone(family):
    model = make_toy(family)
    assert why_unsuitable(model, "assistant") is None
    inputs = [
        AssistantInput("a", [30, 31, 32, 33, 40, 41, 50], [4, 5]),
        AssistantInput("b", [30, 31, 35, 40, 41], [3, 4]),
    ]
    hidden = [
        decoder_of(model)(input_ids=torch.tensor([item.token_ids]), use_cache=False).last_hidden_state[
            0, item.positions
        ]
        for item in inputs
    ]
    for prefix in (read_shared(model, inputs), NO_PREFIX):
        torch.testing.assert_close(compute_thoughts(model, inputs, prefix), torch.stack(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "opt", "gpt2", "openai-gpt", "bloom"])
def test_assistants_that_end_early_give_the_states_of_that_layer(family):
    """Whatever a family calls its layers, and whatever they give out."""
    model = make_toy(family)
    inputs = [
        AssistantInput("a", [30, 31, 32, 33, 40, 41, 50], [4, 5]),
        AssistantInput("b", [30, 31, 35, 40, 41], [3, 4]),
    ]
    truth = [
        decoder_of(model)(input_ids=torch.tensor([item.token_ids]), output_hidden_states=True).hidden_states[2]
        for item in inputs
    ]
    truth = torch.stack([states[0, item.positions] for states, item in zip(truth, inputs, strict=True)])
    reads_once = read_shared(model, inputs).length
    end_after(model, 2)
    assert why_unsuitable(model, "assistant") is None
    prefix = read_shared(model, inputs)
    assert prefix.length == reads_once
    for used in (prefix, NO_PREFIX):
        torch.testing.assert_close(compute_thoughts(model, inputs, used), truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(SoftCoTError, match=r"layers of .* are not found in it; set it to -1"):
        end_after(make_toy("longcat_flash"), 1)


@pytest.mark.parametrize(("unlucky", "reason"), [(2, None), (3, "a trial of the fast one gave another result")])
def test_rounding_differs_much_for_some_rows_and_a_fault_for_all(unlucky, reason):
    prefixed = FrozenPrefix(make_toy("llama"))
    right, read = prefixed.logits, []

    def logits(embeds, *rest):
        read.append(embeds)
        return right(embeds, *rest).roll(int(len(read) <= unlucky), dims=-1)

    prefixed.logits = logits
    assert why_not_fast(prefixed._model, prefixed) == reason
    assert len(read) == 3
    assert not torch.equal(read[0], read[1])


@pytest.mark.parametrize("family", ["bart", "bigbird_pegasus", "blenderbot-small", "moshi"])
def test_a_fault_of_the_fast_step_shows_with_every_pair_of_rows_in_bfloat16(family, monkeypatch):
    """Families that differ in the fast step: more pairs let none through."""
    monkeypatch.setattr("softcot_ds.methods.trial._DRAWS", 12)
    model = make_toy(family).to(torch.bfloat16)
    assert why_not_fast(model, FrozenPrefix(model)) == "a trial of the fast one gave another result"


# ------------------------------------------------------------------------------- models that are not what they seem


class Changed(nn.Module):
    """A module whose output another function changes."""

    def __init__(self, module: nn.Module, change) -> None:
        super().__init__()
        self.module, self.change = module, change

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight

    def forward(self, *args, **kwargs):
        return self.change(self.module(*args, **kwargs))


def looks_ahead(model):
    for layer in model.model.layers:
        layer.self_attn.forward = changed_attention(
            layer.self_attn.forward, lambda out: out + out.mean(1, keepdim=True)
        )


def changed_attention(forward, change):
    def run(*args, **kwargs):
        out, *rest = forward(*args, **kwargs)
        return change(out), *rest

    return run


def forgets_gradients(model):
    forward = model.model.forward
    model.model.forward = lambda inputs_embeds=None, **kwargs: forward(
        inputs_embeds=None if inputs_embeds is None else inputs_embeds.detach().requires_grad_(), **kwargs
    )


def counts_embeddings(model):
    model.set_input_embeddings(
        Changed(model.get_input_embeddings(), lambda out: out + torch.arange(out.shape[1])[:, None] / 8)
    )


def asks_for_ids(model):
    forward = model.forward

    def run(input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is None:
            raise ValueError("You have to specify input_ids\nand more")
        return forward(input_ids=input_ids, **kwargs)

    model.forward = run


def adds_what_ids_say(model):
    forward = model.forward

    def run(input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = model.get_input_embeddings()(input_ids) + input_ids[:, :, None] / 100
        return forward(inputs_embeds=inputs_embeds, **kwargs)

    model.forward = run


def draws_lots(model):
    model.model.norm = Changed(model.model.norm, lambda out: out + 0.05 * torch.randn_like(out))


def mixes_rows(model):
    model.model.norm = Changed(model.model.norm, lambda out: out + 0.05 * (out.mean(0, keepdim=True) - out))


def says_nan(model):
    model.model.norm = Changed(model.model.norm, lambda out: out * torch.nan)


@pytest.mark.parametrize(
    ("make", "base", "assistant"),
    [
        (looks_ahead, "it is not causal", "depend on what stands after them"),
        (forgets_gradients, "RuntimeError", None),
        (counts_embeddings, "rows in a batch come out other", "when it reads what all inputs begin with once"),
        (asks_for_ids, "a trial with a few tokens ended in ValueError: You have to specify input_ids", None),
        (adds_what_ids_say, "it needs token ids beside embeddings", None),
        (draws_lots, "it does not give the same twice", "depend on"),
        (mixes_rows, "rows in a batch come out other", "or on the other rows"),
        (says_nan, "is not finite", "is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(make, base, assistant):
    model = make_toy("llama")
    make(model)
    for role, reason in (("base", base), ("assistant", assistant)):
        if reason is None:
            check_model(model, role, "toy")
            continue
        with pytest.raises(
            SoftCoTError, match=r"Set thoughts.layer=-1: that it ends after layer 2 may be .* Or name ano"
        ):
            check_model(model, role, "toy", 2)
        with pytest.raises(SoftCoTError) as caught:
            check_model(model, role, "toy")
        message = str(caught.value)
        assert message.startswith(f"toy (model type 'llama') cannot be the {role}: ")
        assert reason in message
        assert f"{role}.model" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("family", "role", "reason"),
    [
        ("gemma3n_text", "base", "it needs token ids beside embeddings"),
        ("gemma4_text", "base", "without providing `input_ids`"),
        ("electra", "assistant", "its states are 32 wide, and its token embeddings 128"),
    ],
)
def test_families_that_do_not_fit_are_refused_with_the_reason(family, role, reason):
    assert reason in why_unsuitable(make_toy(family), role)


class Passes(torch.autograd.Function):
    """What it is given, and back a part of the gradient."""

    @staticmethod
    def forward(ctx, states, part):
        ctx.part = part
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.part * gradient, None


@pytest.mark.parametrize("part", [0.0, 0.9])
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", ""), ("llama", "q_proj"), ("llama", "down_proj"), ("mixtral", "v_proj")]
)
def test_layers_that_pass_back_a_wrong_gradient_are_found_though_some_arrives(family, kind, part):
    model = make_toy(family)
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and kind in name:
            module.register_forward_pre_hook(lambda _, inputs: (Passes.apply(inputs[0], part),))
    assert why_unsuitable(model, "base") is None, "a gradient arrives, and is the same in a batch"
    reason = why_gradient_wrong(model)
    found = re.fullmatch(r"the gradient that reaches the thoughts is (\d+)% off from .* pass back none, .*", reason)
    assert int(found[1]) >= (15 if part == 0 else 2)


def test_a_family_that_cuts_its_gradient_short_is_found():
    model = make_toy("hrm_text")  # most rounds through its layers are without gradient
    assert why_unsuitable(model, "base") is None
    assert "pass back none" in why_gradient_wrong(model)


def change_layer(model, change):
    layer = model.model.layers[1]
    layer.forward = wraps(layer.forward)(partial(change, layer.forward))


def counts_from_its_own_start(model):
    """Right for whole rows, wrong where a layer is run on the suffix alone."""
    change_layer(
        model,
        lambda forward, hidden, **kwargs: forward(hidden + torch.arange(hidden.shape[1])[:, None] / 8, **kwargs),
    )


def returns_a_tuple(model):
    change_layer(model, lambda forward, hidden, **kwargs: (forward(hidden, **kwargs),))
    model.model.layers[2].register_forward_pre_hook(
        lambda _, args: tuple(arg[0] if isinstance(arg, tuple) else arg for arg in args)
    )


@pytest.mark.parametrize("make", [counts_from_its_own_start, returns_a_tuple])
def test_a_base_that_the_fast_step_does_not_suit_keeps_the_full_one(make):
    model = make_toy("llama")
    make(model)
    assert why_unsuitable(model, "base") is None
    before = [layer.forward for layer in model.model.layers]
    assert why_no_fast_step(model)
    assert [layer.forward for layer in model.model.layers] == before
    assert why_unsuitable(model, "base") is None


def test_the_full_step_after_a_refused_fast_one_gives_what_examples_alone_give():
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    models = [make_toy("llama") for _ in range(2)]
    for model in models:
        counts_from_its_own_start(model)
    truth = true_loss_and_gradient(models[0], make_projection(WIDTH), examples, torch.float32)
    step = SoftThoughts(models[1], make_projection(WIDTH), shared_ids=examples[0][0][:6], activation_checkpointing=True)
    assert step.num_shared == 6
    with pytest.warns(UserWarning, match="LlamaForCausalLM runs the full step: for a test"):
        step.use_full_step("for a test")
    assert step.num_shared == 0
    check(loss_and_gradient(step, examples, torch.float32), truth, 1e-6, 1e-5)


def test_memory_that_runs_out_says_nothing_about_the_model():
    model = make_toy("llama")

    def run(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = run
    with pytest.raises(torch.OutOfMemoryError):
        why_unsuitable(model, "base")
