"""Projections are loaded from what users have, and nothing that a file says is ever run."""

import os
import pickle

import pytest
import torch
from launch import ROOT, deepspeed_command, run
from safetensors.torch import save_file
from torch import nn

from softcot_ds.errors import SoftCoTError
from softcot_ds.projection import LinearProjection, StaticThoughts, check_fits, load_projection

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
    assert projection(hidden).tolist() == [[[8.5, 25.0], [2.5, 4.0]]]
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
    assert torch.equal(thoughts(3), before.expand(3, 4, 2))
    thoughts(3).sum().backward()
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
    torch.testing.assert_close(projection(hidden), linear(hidden))


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
        ({"weight": WEIGHTS["weight"], "extra": WEIGHTS["bias"]}, "expected the tensors weight and bias, found"),
        ({"projection.weight": WEIGHTS["weight"]}, "expected the tensors weight and bias, found ['projection.weight']"),
        ({}, "expected the tensors weight and bias, found []"),
        ({1: WEIGHTS["weight"], "bias": WEIGHTS["bias"]}, "expected the tensors weight and bias, found"),
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


@pytest.mark.distributed
def test_fused_embedding_reads_a_partitioned_table():
    done = run(deepspeed_command(2, "embedding_worker"), PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}")
    assert done.stdout.count("embedding equal") == 2
