"""Projections are loaded from what users have, and nothing that a file says is ever run."""

import os
import pickle

import pytest
import torch
from launch import ROOT
from safetensors.torch import save_file
from torch import nn

from softcot_ds import choices
from softcot_ds.choices import chosen
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Method, method_class
from softcot_ds.methods.projection import Projection, check_fits, load_projection
from softcot_ds.methods.prompt_tuning import StaticThoughts
from softcot_ds.methods.soft_thoughts import SoftThoughts, new_projection
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.recipe import load_recipe

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -1.0])}


def refused(path) -> str:
    with pytest.raises(SoftCoTError) as caught:
        load_projection(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") or str(path) in message
    assert "\n" not in message
    return message


def test_the_linear_projection_is_a_matrix_and_a_bias():
    projection = LinearProjection(3, 2)
    projection.load_state_dict(WEIGHTS)
    hidden = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]])
    assert projection(hidden, len(hidden)).tolist() == [[[8.5, 25.0], [2.5, 4.0]]]
    assert projection(hidden.bfloat16()).dtype == torch.float32


def test_the_initialization_is_that_of_a_linear_layer_times_the_scale():
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    torch.manual_seed(0)
    projection = LinearProjection(3, 2, init_scale=0.5)
    assert torch.equal(projection.weight, linear.weight * 0.5)
    assert torch.equal(projection.bias, linear.bias * 0.5)


def test_static_thoughts_repeat_their_vectors_and_own_them():
    vectors = torch.randn(4, 2)
    thoughts = StaticThoughts(vectors)
    before = vectors.clone()
    vectors.zero_()
    assert torch.equal(thoughts(None, 3), before.expand(3, 4, 2))
    thoughts(None, 3).sum().backward()
    assert torch.equal(thoughts.weight.grad, torch.full((4, 2), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_safetensors_and_projection_bin_give_the_same_float32_weights(tmp_path, dtype):
    weights = {name: value.to(dtype) for name, value in WEIGHTS.items()}
    save_file(weights, tmp_path / "projection.safetensors")
    torch.save(weights, tmp_path / "projection.bin")
    torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("projection.safetensors", "projection.bin", "old.bin"):
        loaded = load_projection(tmp_path / name)
        assert loaded.keys() == WEIGHTS.keys()
        assert all(torch.equal(loaded[key], WEIGHTS[key]) and loaded[key].dtype == torch.float32 for key in loaded)


def test_the_state_dict_of_a_linear_layer_is_a_projection(tmp_path):
    linear = nn.Linear(3, 2)
    torch.save(linear.state_dict(), tmp_path / "projection.bin")
    projection = LinearProjection(3, 2)
    weights = load_projection(tmp_path / "projection.bin")
    check_fits(weights, projection, tmp_path / "projection.bin")
    projection.load_state_dict(weights)
    hidden = torch.randn(1, 4, 3)
    torch.testing.assert_close(projection(hidden, len(hidden)), linear(hidden))


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, save, suffix):
    path, evidence = tmp_path / f"projection{suffix}", tmp_path / "evidence"
    save({"weight": Malicious(f"touch {evidence}"), "bias": WEIGHTS["bias"]}, path)
    message = refused(path)
    assert suffix == ".safetensors" or "refused to run what it holds" in message
    assert not evidence.exists()
    with path.open("rb") as file:  # the bait is real: an unsafe loader runs it
        (torch.load(file, weights_only=False) if save is torch.save else pickle.load(file))
    assert evidence.exists()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_truncated_or_empty_or_missing_file_is_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"projection{suffix}"
    assert "No such file" in refused(path)
    path.write_bytes(b"")
    refused(path)
    path.write_bytes(b"\x80")
    refused(path)
    path.write_bytes(os.urandom(300))
    refused(path)
    (save_file if suffix == ".safetensors" else torch.save)(WEIGHTS, path)
    whole = path.read_bytes()
    for size in (1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)


def test_a_folder_is_no_projection(tmp_path):
    (tmp_path / "projection.bin").mkdir()
    assert "projection.bin" in refused(tmp_path / "projection.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": [1.0], "bias": WEIGHTS["bias"]}, "expected tensors by name, found"),
        (WEIGHTS["weight"], "expected tensors by name, found Tensor"),
        ([WEIGHTS["weight"]], "expected tensors by name, found list"),
    ],
)
def test_other_content_is_refused_by_what_it_is(tmp_path, content, message):
    path = tmp_path / "projection.bin"
    torch.save(content, path)
    assert message in refused(path)


def test_weights_of_other_models_do_not_fit(tmp_path):
    path = tmp_path / "projection.bin"
    check_fits(WEIGHTS, LinearProjection(3, 2), path)
    for module in (LinearProjection(2, 3), LinearProjection(3, 4), StaticThoughts(WEIGHTS["weight"])):
        with pytest.raises(SoftCoTError) as caught:
            check_fits(WEIGHTS, module, path)
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        assert "{'weight': (2, 3), 'bias': (2,)}" in str(caught.value)
        assert str(wanted) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": WEIGHTS["weight"], "extra": WEIGHTS["bias"]},
        {"projection.weight": WEIGHTS["weight"]},
        {},
        {1: WEIGHTS["weight"], "bias": WEIGHTS["bias"]},
        {"weight": WEIGHTS["weight"]},
    ],
)
def test_tensors_of_other_names_do_not_fit(tmp_path, content):
    path = tmp_path / "projection.bin"
    torch.save(content, path)
    with pytest.raises(SoftCoTError, match=r"projection.bin: the tensors .* do not fit these models, which need"):
        check_fits(load_projection(path), LinearProjection(3, 2), path)


class Bottleneck(Projection):
    """A projection that is in no list: two layers, by way of one number."""

    needs_states = True

    def __init__(self, assistant_width, base_width):
        super().__init__()
        self.inner, self.outer = nn.Linear(assistant_width, 1), nn.Linear(1, base_width)

    @classmethod
    def create(cls, recipe, assistant_width, base, base_width):
        return cls(assistant_width, base_width)

    @classmethod
    def empty(cls, recipe, assistant_width, base_width):
        return cls(assistant_width, base_width)

    def forward(self, hidden_BTP, batch_size):
        return self.outer(torch.tanh(self.inner(hidden_BTP.to(self.inner.weight.dtype))))


class ByBottleneck(SoftThoughts):
    projection_class = Bottleneck


def test_a_method_of_ones_own_is_a_module_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(choices.METHODS, "bottleneck", f"{__name__}:ByBottleneck")
    assert method_class("bottleneck") is ByBottleneck
    assert ByBottleneck.needs_states
    saved = Bottleneck(3, 2)
    save_file(saved.state_dict(), tmp_path / "projection.safetensors")
    loaded = Bottleneck.empty(None, 3, 2)
    weights = load_projection(tmp_path / "projection.safetensors")
    check_fits(weights, loaded, tmp_path)
    loaded.load_state_dict(weights)
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(loaded(hidden, 2), saved(hidden, 2))
    assert loaded.fused_with(nn.Embedding(5, 2)) is None


class Unfinished(Method):
    def forward(self, batch, per_token=False):
        return batch


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (f"{__name__}:Unfinished", r":Unfinished lacks build, num_trained, trained; see Method in methods/base.py"),
        (f"{__name__}:Absent", r"choices.py: no 'Absent' in the module .*test_projection.*; mend the line of 'own'"),
        ("softcot_ds.methods.absent:Own", r"choices.py: no module 'softcot_ds.methods.absent'; mend the line of 'own'"),
        (
            "softcot_ds.methods.softcot.Own",
            r"choices.py: 'softcot_ds.methods.softcot.Own' is not MODULE:NAME; mend the",
        ),
    ],
)
def test_a_line_that_leads_nowhere_is_named(monkeypatch, entry, message):
    monkeypatch.setitem(choices.METHODS, "own", entry)
    with pytest.raises(SoftCoTError, match=message):
        method_class("own")


@pytest.mark.parametrize("listed", [choices.METHODS, choices.TASKS, choices.STRATEGIES])
def test_every_line_leads_somewhere(listed):
    assert all(callable(chosen(listed, name)) for name in listed)


class Buffered(LinearProjection):
    @classmethod
    def create(cls, recipe, assistant_width, base, base_width):
        created = cls(assistant_width, base_width)
        created.register_buffer("scale", torch.ones(1), persistent=recipe.seed == 1)
        return created


def test_state_that_no_checkpoint_would_hold_is_refused():
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", ["seed=0"])
    assert isinstance(new_projection(Buffered, recipe, (3, 2), None), Buffered)
    recipe = recipe.model_copy(update={"seed": 1})
    with pytest.raises(SoftCoTError, match=r"method=softcot: checkpoints hold parameters, and scale would be lost"):
        new_projection(Buffered, recipe, (3, 2), None)
