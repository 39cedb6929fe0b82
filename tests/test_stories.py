"""GSM8K with two small real models, of different widths and tokenizers: cache, train, be killed, resume, evaluate."""

import json

import pytest
from forked import kill_forked, run_forked
from launch import BIN, run

pytestmark = pytest.mark.distributed

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PROMPTS = """
assistant: [{role: user, content: "{question} {thoughts}"}]
assistant_text: [{role: user, content: "{question}"}]
base: [{role: user, content: "{question} {thoughts}"}]
base_without_thoughts: [{role: user, content: "{question}"}]
"""


def test_gsm8k_with_the_stories_models(shared_data, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    recipe = tmp_path / "stories.yaml"
    recipe.write_text(
        f"""
name: stories
output_dir: {tmp_path}
task:
  name: gsm8k
  train: {shared_data}/gsm8k/train.jsonl
  test: {shared_data}/gsm8k/test.jsonl
  prompts: {tmp_path}/prompts.yaml
  train_problems: 3000
  validation_problems: 100
  test_problems: 40
  max_tokens: 256
assistant: {{model: {shared_data}/stories_assistant, dtype: float32, chat_template: {tmp_path}/chat.jinja}}
base: {{model: {shared_data}/stories_base, dtype: float32, chat_template: {tmp_path}/chat.jinja}}
thoughts: {{count: 4}}
cache: {{path: {tmp_path}/cache}}
training: {{steps: 40, global_batch_size: 16, micro_batch_size: 8, learning_rate: 2.0e-3, log_every: 5,
  validate_every: 20, save_every: 10}}
evaluation: {{batch_size: 16, max_new_tokens: 8, partition: none}}
"""
    )
    mpirun = [str(BIN / "mpirun"), "--oversubscribe", "--bind-to", "none", "-n", "2"]
    built = run([*mpirun, str(BIN / "python"), "-m", "softcot_ds.cache", str(recipe)])
    assert "2 processes over MPI" in built.stdout
    kill_forked(tmp_path / "stories/checkpoints/step-10/COMPLETE", 2, "softcot_ds.train", recipe)
    resumed = run([str(BIN / "python"), "-m", "softcot_ds.train", str(recipe), "--gpus", "2"]).stdout
    assert "resuming from" in resumed
    run_forked(2, "softcot_ds.evaluate", recipe)

    report = json.loads((tmp_path / "stories/report.json").read_text())
    assert report["task"] == "gsm8k"
    assert report["train"]["world_size"] == 2
    assert report["train"]["zero_stage"] == 3
    assert set(report["conditions"]) == {"learned", "shuffled", "mean", "zero", "none"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "stories/losses.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.1, "the loss falls"
