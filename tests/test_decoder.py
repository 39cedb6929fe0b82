"""Decoding what an evaluation asks: portions that are kept on disk, over any number of ranks."""

import json
import shutil

import pytest
from evaluations import make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import ROOT

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.distributed import DataRanks
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.decoder import Decoder
from softcot_ds.evaluation.jobs import Job, Thoughts, Worker, neighbours
from softcot_ds.models.decoding import Output, Sampling, portions

SETTINGS = {"max_new_tokens": 5, "batch_size": 2, "prompts": "some"}
PROMPTS = [BasePrompt([1] * length, [2]) for length in (3, 1, 2, 5, 4)]
OUTPUTS = {0: [Output([7, 12], False), Output([], True)], 1: [Output([10**4], True)] * 2, 2: [Output([1, 2, 3], False)]}


def job(folder, **changes):
    return Job(
        "learned",
        [prompt.prefix_ids for prompt in PROMPTS],
        SETTINGS | changes,
        folder,
        None,
        lambda output: Output(**output),
        neighbours,
    )


def make_decoder(recipe, context=512):
    return Decoder(Worker(recipe, recipe.base, "weights"), [2], context)


def written_job(folder):
    first = job(folder)
    for number, outputs in OUTPUTS.items():
        first.write(number, outputs, 0.25 + number)
    (part,) = folder.glob("*/*.batches")
    return part


def test_what_was_written_is_read_again(tmp_path):
    written_job(tmp_path)
    again = job(tmp_path)
    assert again.done == OUTPUTS
    assert again.todo == []
    assert again.seconds == 0.25 + 1.25 + 2.25
    assert again.batches == [[1, 2], [0, 4], [3]], "neighbours in length"
    assert job(tmp_path, max_new_tokens=6).todo == [0, 1, 2]


@pytest.mark.parametrize(("problems", "batch_size", "count"), [(3, 1, 1), (4, 1, 2), (1319, 32, 16), (1000, 125, 4)])
def test_portions_have_several_batches_and_are_alike(problems, batch_size, count):
    lengths = [7 * number % 31 for number in range(problems)]
    found = portions(lengths, batch_size)
    assert len(found) == count
    assert sorted(index for portion in found for index in portion) == list(range(problems))
    assert {len(portion) - problems // count for portion in found} <= {0, 1}
    for portion in found:
        assert [lengths[index] for index in portion] == sorted((lengths[index] for index in portion), reverse=True)
    sums = [sum(lengths[index] for index in portion) for portion in found]
    assert max(sums) - min(sums) <= 31


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_part_is_done_again_and_never_believed(tmp_path_factory, data):
    part = written_job(tmp_path_factory.mktemp("outputs"))
    content = bytearray(part.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]))
        some = data.draw(st.binary(min_size=1, max_size=9))
        if kind == "flip":
            content[start] ^= data.draw(st.integers(1, 255))
        elif kind == "cut" and start:
            del content[start:]
        elif kind == "insert":
            content[start:start] = some
        elif kind == "remove" and len(content) > 9:
            del content[start : start + len(some)]
        else:
            content += content[start:]
    part.write_bytes(content)
    again = job(part.parent.parent)
    assert again.done == {number: OUTPUTS[number] for number in again.done}
    assert sorted([*again.done, *again.todo]) == [0, 1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"\xff\x00\x80",
        b'{"batch": 0, "outputs": {"0": "text of an older version", "1": "and more"}}',
        b'{"batch": 99, "seconds": 1.0, "outputs": []}',
        b'{"batch": "0", "outputs": [[1], 2]}',
        b"0" * 64 + b' {"batch": 0, "outputs": []}',
        b"[" * 10**5,
    ],
)
def test_a_line_that_is_none_of_ours_is_passed_over(tmp_path, line):
    part = written_job(tmp_path)
    part.write_bytes(line + b"\n" + part.read_bytes() + line)
    assert job(tmp_path).done == OUTPUTS


def test_outputs_of_a_version_that_kept_no_seconds_are_done_again(tmp_path):
    part, old = written_job(tmp_path), job(tmp_path)
    line = b'{"batch": 0, "outputs": [{"token_ids": [7], "cut": false}, {"token_ids": [], "cut": true}]}'
    part.write_bytes(old._checksum(line) + b" " + line + b"\n")
    assert (job(tmp_path).done, job(tmp_path).seconds) == ({}, 0)


def test_outputs_of_other_settings_are_not_taken_from_a_file_that_was_copied(tmp_path):
    part = written_job(tmp_path)
    other = job(tmp_path, prompts="others")
    shutil.copy(part, tmp_path / other.key[:16])
    assert job(tmp_path, prompts="others").done == {}


class Asked(Exception):
    """Raised where a rank would ask the others for their outputs."""


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (3, 1), (2**31, 0), (2**63, 9), (2**64 - 1, 0)])
def test_a_problem_is_sampled_with_a_seed_of_its_own_on_any_number_of_ranks(tmp_path, scribe, monkeypatch, seed, draw):
    recipe = make_recipe(tmp_path, f"seed={seed}", "evaluation.temperature=1", "evaluation.batch_size=2")
    prompts = [BasePrompt([index], []) for index in range(16)]
    decoder = make_decoder(recipe)
    results = {}
    for partitioned in (False, True):
        decoder.worker._partition = "zero3" if partitioned else "none"
        for ranks in (1, 2, 3):
            outputs = {}

            def collect(mine, outputs=outputs):
                outputs.update({number: results for _, number, results, _ in mine})
                raise Asked

            for rank in range(ranks):
                scribe.batches.clear()
                work = decoder.job(f"{partitioned}/{ranks}/{rank}", prompts, None, Sampling(9, temperature=1), draw)
                work.todo, work._folder, work._file = [0, 1, 2, 3], tmp_path, tmp_path / "batches"
                place = DataRanks(rank, ranks)
                with monkeypatch.context() as patch:
                    patch.setattr(jobs, "data_ranks", lambda *_, place=place: place)
                    patch.setattr(jobs, "from_all_ranks", collect)
                    with pytest.raises(Asked):
                        decoder.worker.run(work)
                rounds = -(-4 // ranks)
                assert len(scribe.batches) == (rounds if partitioned or rank < 4 - ranks * (rounds - 1) else rounds - 1)
            results[partitioned, ranks] = outputs
            assert (tmp_path / "batches").read_bytes().count(b"\n") == 4, "each portion is written once"
            (tmp_path / "batches").unlink()
    assert all(outputs == results[False, 1] for outputs in results.values())
    written = [output.token_ids for outputs in results[False, 1].values() for output in outputs]
    chances = {scribe.tokenizer.decode(token_ids).split()[1] for token_ids in written}
    assert len(chances) == 16, "no two problems have the same random numbers"


@pytest.mark.parametrize(
    ("context", "said"), [(7, "room for 1 tokens; its output is cut"), (12, ""), (11, "for 5 tokens")]
)
def test_outputs_that_the_context_cuts_are_announced(tmp_path, capsys, context, said):
    recipe = make_recipe(tmp_path)
    make_decoder(recipe, context).job("none", PROMPTS, None, Sampling(6))
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(said) == bool(printed)


def test_a_prompt_that_fills_the_context_is_refused(tmp_path):
    recipe = make_recipe(tmp_path)
    decoder = make_decoder(recipe, 6)
    with pytest.raises(
        SoftCoTError, match="the longest prompt has 6 tokens, which leaves no room for an answer in the 6"
    ):
        decoder.job("none", PROMPTS, None, Sampling(6))
    thoughts = Thoughts(lambda _: None, 4, {})
    with pytest.raises(SoftCoTError, match="the longest prompt has 10 tokens"):
        decoder.job("learned", PROMPTS, thoughts, Sampling(6))


def test_each_round_of_a_name_is_checked_and_told_of_once(tmp_path, capsys):
    decoder = make_decoder(make_recipe(tmp_path), 8)
    decoder.job("none", PROMPTS[:3], None, Sampling(4))
    assert not capsys.readouterr().out
    for draw in range(2):
        decoder.job("none", PROMPTS, None, Sampling(4), draw)
    assert capsys.readouterr().out.count("none: the longest prompt leaves room for 2 tokens") == 1
    with pytest.raises(SoftCoTError, match="none: the longest prompt has 9 tokens, which leaves no room"):
        decoder.job("none", [BasePrompt([1] * 9, [])], None, Sampling(4), 2)


def test_a_quantized_base_is_another_only_where_it_is_partitioned(tmp_path):
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["zero_quantized_weights"] = True
    (tmp_path / "quantized.json").write_text(json.dumps(config))
    keys = {}
    for partition in ("none", "zero3"):
        for file in (ROOT / "ds_configs/zero3.json", tmp_path / "quantized.json"):
            recipe = make_recipe(tmp_path, f"evaluation.partition={partition}", f"backbone.deepspeed={file}")
            decoder = make_decoder(recipe)
            keys[partition, file.stem] = decoder.job("none", PROMPTS, None, Sampling(5)).key
    assert keys["none", "zero3"] == keys["none", "quantized"] == keys["zero3", "zero3"] != keys["zero3", "quantized"]
