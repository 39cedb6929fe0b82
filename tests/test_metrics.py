"""TensorBoard's files, whenever a run was killed."""

import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf.text_format import Parse
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.backend_context import _sort_and_reduce_to_hparams_limit
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import _read_tensor_tsv_file

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import load_recipe
from softcot_ds.training import record
from softcot_ds.training.gap import Gap
from softcot_ds.training.metrics import TensorBoard
from softcot_ds.training.record import History, Validations, Window, rates
from softcot_ds.training.tags import DESCRIPTIONS
from softcot_ds.training.validation import Validation

ROOT = Path(__file__).parents[1]


def points_in_files(folder: Path) -> Counter:
    """How often each tag has a point at each step, in the records of all event files."""
    records = [record for path in folder.iterdir() for record in RawEventFileLoader(str(path)).Load()]
    events = map(Event.FromString, records)
    return Counter((value.tag, event.step) for event in events for value in event.summary.value)


def attempt(folder: Path, resumed_step: int, last_step: int) -> TensorBoard:
    """Train from ``resumed_step`` to ``last_step``, and be killed: nothing is closed."""
    board = TensorBoard(folder, True, resumed_step)
    board.block("recipe", "name: x", resumed_step + 1)
    for step in range(resumed_step + 1, last_step + 1):
        board.scalars({"loss": last_step + step / 100}, step)
    return board


@settings(max_examples=15)
@given(attempts=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=5))
def test_each_step_is_there_once_whenever_a_run_was_killed(tmp_path_factory, attempts):
    """Each attempt begins at some step that an earlier one has reached, or at 0, and lasts some steps."""
    folder, values = tmp_path_factory.mktemp("board"), {}
    for resumed_step, steps in attempts:
        resumed_step = min(resumed_step, max(values, default=0))
        last_step = resumed_step + steps
        attempt(folder, resumed_step, last_step)
        values = {step: value for step, value in values.items() if step <= resumed_step}
        values |= {step: last_step + step / 100 for step in range(resumed_step + 1, last_step + 1)}
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    # Names of files tell seconds, so those of attempts within one second are read in any order.
    shown = sorted((event.step, event.value) for event in accumulator.Scalars("loss"))
    assert shown == [(step, pytest.approx(value)) for step, value in values.items()]
    counts = points_in_files(folder)
    assert {step for tag, step in counts if tag == "loss"} == values.keys()
    assert set(counts.values()) == {1}


def test_clock_of_another_node_and_a_record_that_was_cut_short_do_no_harm(tmp_path):
    attempt(tmp_path, 0, 5)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])  # step 5 did not get to the disk whole
    path.rename(tmp_path / "events.out.tfevents.9999999999.node1.1.0")  # sorts behind all that comes now
    attempt(tmp_path, 2, 4)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert sorted((event.step, event.value) for event in accumulator.Scalars("loss")) == [
        (1, pytest.approx(5.01)), (2, pytest.approx(5.02)), (3, pytest.approx(4.03)), (4, pytest.approx(4.04))
    ]  # fmt: skip


def test_board_that_is_open_forgets_what_was_never_saved(tmp_path):
    attempt(tmp_path, 0, 5)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    attempt(tmp_path, 2, 4)
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4]


def test_curves_say_what_they_are_and_both_losses_are_on_one_chart(tmp_path):
    for start in (0, 2):  # an attempt goes on where another has ended: each says it, one is kept
        board = TensorBoard(tmp_path, True, start)
        for step in (start + 1, start + 2):
            board.scalars({"loss/train": 1.0, "loss/validation": 2.0, "loss/validation_gap": 0.5, "own": 3.0}, step)
    # As TensorBoard reads them.
    accumulator = PluginEventAccumulator(str(tmp_path))
    accumulator.Reload()
    for tag in ("loss/train", "loss/validation", "own"):
        metadata = accumulator.SummaryMetadata(tag)
        assert metadata.plugin_data.plugin_name == "scalars"
        assert metadata.summary_description == DESCRIPTIONS.get(tag, "")
        assert [event.step for event in accumulator.Tensors(tag)] == [1, 2, 3, 4]
    layouts = accumulator.Tensors("custom_scalars__config__")
    layout = Layout.FromString(layouts[-1].tensor_proto.string_val[0])
    shown = [tag for tag in accumulator.Tags()["tensors"] for wanted in layout.category[0].chart[0].multiline.tag
             if re.match(wanted, tag)]  # fmt: skip
    assert shown == ["loss/train", "loss/validation"]


def test_columns_of_what_runs_differ_in_come_first_and_accuracy_is_what_they_are_compared_by(tmp_path):
    board = TensorBoard(tmp_path, True, 0)
    values = {
        "name": "x",
        "base.model": "b",
        "training.steps": 9,
        "seed": 4,
        "training.betas": (0.9, 0.99),
        "chains": None,
    }
    board.hyperparameters(values, {"seed", "training.betas"}, ["accuracy/learned", "loss/train"], 9)
    board.close()
    accumulator = PluginEventAccumulator(str(tmp_path))
    accumulator.Reload()
    content = accumulator.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    _sort_and_reduce_to_hparams_limit(experiment)  # TensorBoard's own order
    assert [info.name for info in experiment.hparam_infos] == [
        "seed", "training.betas", "base.model", "name", "training.steps"
    ]  # fmt: skip
    assert [info.name.tag for info in experiment.metric_infos] == ["accuracy/learned", "loss/train"]
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (session["seed"].number_value, session["training.betas"].string_value) == (4, "(0.9, 0.99)")


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer")
def test_samples_are_shown_as_they_are_and_wrap(tmp_path):
    from tensorboard.plugin_util import markdown_to_safe_html  # which warns

    lines = [
        "1. **5** * 3 = `15`",
        "    indented | a | b",
        "- - | -",
        "# <b>no</b> &amp; [x](http://y) \\\\ _a_",
        "",
        "~~ 2 > 1 !",
    ]
    board = TensorBoard(tmp_path, True, 0)
    board.prose("samples", "\n".join(lines), 1)
    board.flush()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("samples/text_summary")
    shown = markdown_to_safe_html(event.tensor_proto.string_val[0])  # as TensorBoard's text tab does
    assert "<pre" not in shown
    assert set(re.findall("<(\\w+)", shown)) == {"p", "br"}
    text = unescape(re.sub("</?p>|<br ?/?>", "", shown)).replace("\xa0", " ")
    assert [line.rstrip() for line in text.splitlines() if line] == [line for line in lines if line]


def test_attempts_that_saved_nothing_leave_nothing(tmp_path):
    for _ in range(3):
        attempt(tmp_path, 0, 2)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "null",
        "[1, 2]",
        '{"step": 2}',
        '{"step": 2, "loss": "x"}',
        "\x00",
        "",
        '{"step": 2, "loss": ' + "9" * 400 + "}",
    ],
)
def test_damaged_losses_of_a_resumed_run_are_named_by_their_line(tmp_path, line):
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}"])
    recipe.run_dir.mkdir()
    path = recipe.run_dir / "losses.jsonl"
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3, "loss": 0.25, "skipped": true}}\n')
    with pytest.raises(SoftCoTError, match=r"losses.jsonl:2 is damaged: .* move it away"):
        History(recipe, start=3)
    path.write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 3, "loss": 0.25, "skipped": true}\n{"step": 4, "loss": 0.125}\n'
    )
    history = History(recipe, start=3)
    history.write()
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 3, "loss": 0.25, "skipped": true}\n'


def test_validations_of_a_resumed_run_go_on_where_it_was_saved(tmp_path):
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}"])
    recipe.run_dir.mkdir()
    one = {"loss/validation": 0.5, "loss/validation_shuffled": 0.75, "loss/validation_gap": 0.25, "thoughts/norm": 2.0}
    first = Validations(recipe, start=0)
    first.add(10, one)
    first.add(20, {"loss/validation": 0.25})
    assert first.best == (20, 0.25)
    assert Validations(recipe, start=10).best == (10, 0.5)
    Validations(recipe, start=10).add(15, {"loss/validation": 0.125})
    lines = (recipe.run_dir / "validation.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"step": 10, "loss": 0.5, "shuffled": 0.75, "gap": 0.25}, {"step": 15, "loss": 0.125}
    ]  # fmt: skip


def test_losses_that_cannot_be_read_are_named(tmp_path):
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}"])
    (recipe.run_dir / "losses.jsonl").mkdir(parents=True)
    with pytest.raises(SoftCoTError, match=r"cannot read .*losses.jsonl: Is a directory\. .* move it away"):
        History(recipe, start=3)


@pytest.mark.parametrize("ranks", [1, 4])
def test_rates_are_of_all_steps_since_the_last_look_and_of_one_rank(monkeypatch, ranks):
    """Two steps in half a second, 300 tokens and 40 TFLOP on each rank, of a GPU with at most 200 TFLOP/s."""
    clock = iter([10.0, 10.5, 10.5, 12.5, 12.5])
    monkeypatch.setattr(record.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(record, "world_size", lambda: ranks)
    monkeypatch.setattr(record, "sum_over_ranks", lambda values: values * ranks)
    window = Window(200e12)
    one, two = ({"language_model": torch.tensor(loss), "contrastive": torch.tensor(0.5)} for loss in (1.0, 2.0))
    window.add(1, [0, 1], one, 100, int(15e12))
    window.add(2, [2, 3], two, 200, int(25e12))
    losses, throughput = window.read([], None)
    of_steps = {1: 1.0 * ranks, 2: 2.0 * ranks}
    assert losses == {step: {"language_model": loss, "contrastive": 0.5 * ranks} for step, loss in of_steps.items()}
    assert throughput == {
        "throughput/tokens_per_second": pytest.approx(600 * ranks),
        "throughput/tokens_per_second_per_rank": pytest.approx(600),
        "throughput/samples_per_second": pytest.approx(8),
        "throughput/mfu": pytest.approx(0.4),
    }
    assert rates(throughput) == "600 tokens/s per rank  MFU 40.0%"
    window.add(3, [0, 1], one, 100, 0)  # a base whose operations are not known
    _, throughput = window.read([], None)
    assert throughput["throughput/tokens_per_second_per_rank"] == pytest.approx(50)
    assert rates(throughput) == "50 tokens/s per rank"


def test_utilisation_of_an_unknown_device_is_not_told():
    window = Window(None)
    window.add(1, [0], {"language_model": torch.tensor(1.0)}, 100, int(1e12))
    _, throughput = window.read([], None)
    assert "throughput/mfu" not in throughput


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (
            0.0003,
            "cannot tell a question's thoughts from another's: +0.0003 ± 0.0004 nats per token with those, over 150",
        ),
        (-0.0004, "cannot tell a question's thoughts from another's: -0.0004 ± 0.0004"),
        (-0.0005, "another question's thoughts are better than the question's own: -0.0005 ± 0.0004"),
        (0.0005, None),
    ],
)
def test_run_that_ends_without_a_gap_says_what_its_interval_does(tmp_path, capsys, mean, said):
    gap = Gap(mean, 0.0004, 150)
    run = record.Record(load_recipe(ROOT / "recipes/word_problems.yaml", [f"output_dir={tmp_path}"]), range(64), 0)
    run.report_validation(100, Validation({"loss/validation": 1.0}, Gap(0.0, 0.1, 150), "samples"))
    run.report_validation(200, Validation({"loss/validation": 0.9}, gap, "samples"))
    run.finish({"first_loss": 1.0, "last_loss": 0.5}, tmp_path / "adapter")
    printed = capsys.readouterr().out
    assert f"step 200  validation loss 0.9000, {gap.mean:+.4f} ± 0.0004 with another question's thoughts" in printed
    assert printed.count("validation at step") == (said is not None)
    assert said is None or f"validation at step 200: {said}" in printed


def test_the_projector_finds_the_newest_vectors_with_what_each_is(tmp_path):
    board = TensorBoard(tmp_path, enabled=True, resumed_step=0)
    board.projector("thoughts", [np.zeros(3, np.float32)], ["old"], ["thought"])
    vectors = [np.array(one, np.float32) for one in ([1.5, -2, 1e-3], [0, 1, 2])]
    board.projector("thoughts", vectors, ['1: how\tmany\n"now" ?', "' skip'"], ["thought", "token"])
    board.close()
    (shown,) = Parse((tmp_path / PROJECTOR_FILENAME).read_text(), ProjectorConfig()).embeddings
    np.testing.assert_allclose(_read_tensor_tsv_file(str(tmp_path / shown.tensor_path)), vectors)
    rows = [line.split("\t") for line in (tmp_path / shown.metadata_path).read_text().splitlines()]
    assert rows == [["label", "kind"], ['1: how many "now" ?', "thought"], ["' skip'", "token"]]
