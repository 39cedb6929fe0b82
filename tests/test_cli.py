"""What the shell sees: exit codes, one clear message on standard error, help without waiting for torch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softcot_ds import __version__, cli
from softcot_ds.command import EXIT_MISTAKE, recipe_command, run_command
from softcot_ds.errors import STOP_SIGNALS, SoftCoTError

ROOT = Path(__file__).parents[1]


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = (
        os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | variables
    )
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "softcot_ds.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def errors(result: subprocess.CompletedProcess) -> str:
    return "".join(line for line in result.stderr.splitlines(True) if not line.startswith("import time:"))


@pytest.mark.distributed
@pytest.mark.parametrize("command", ["", "evaluate", "generate", "push", "study"])
def test_help_does_not_wait_for_torch(command):
    result = shell(*command.split(), "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: softcot-ds {command}")
    assert command or all(f"  {name} " in result.stdout for name in cli.COMMANDS)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert not {"torch", "transformers", "deepspeed"} & imported


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("softcot-ds ev", ["evaluate"]),
        ("softcot-ds train recipes/word_c", ["recipes/word_choices.yaml", "recipes/word_claims.yaml"]),
        ("softcot-ds plan recipes/word_claims.yaml training.lo", ["training.log_every="]),
    ],
)
def test_a_shell_is_told_what_may_come_next(line, completed, tmp_path):
    pytest.importorskip("argcomplete")
    told = tmp_path / "told"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    result = shell(**asked, _ARGCOMPLETE_STDOUT_FILENAME=str(told))  # as argcomplete's own script in a shell does
    assert result.returncode == 0
    assert sorted(word.strip() for word in told.read_text().splitlines()) == completed


@pytest.mark.distributed
def test_an_unknown_command_is_told_the_known_ones():
    result = shell("nonsense")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "'nonsense'" in errors(result)
    assert all(name in errors(result) for name in cli.COMMANDS)
    assert "Traceback" not in result.stderr


# A study says so itself, without torch, and the others are given no recipe.
@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - {"study", "recipes", "init", "schema"}))
def test_a_missing_recipe_is_said_before_the_command_is_imported(command, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"{name} takes seconds"))
    assert cli.main([command, "no/such.yaml", "seed=1"]) == EXIT_MISTAKE
    assert "no/such.yaml; softcot-ds recipes lists some to start from" in capsys.readouterr().err


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "command" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"softcot-ds {__version__}\n"


def test_the_arguments_after_the_command_are_the_commands_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").touch()

    class Module:
        @staticmethod
        def main(arguments):
            seen.append(arguments)
            return 7

    monkeypatch.setattr(cli.importlib, "import_module", {"softcot_ds.train": Module}.__getitem__)
    assert cli.main(["train", "recipe.yaml", "training.steps=3", "--help"]) == 7
    assert seen == [["recipe.yaml", "training.steps=3", "--help"]]


@pytest.fixture
def command():
    """A command that remembers what it was asked to work on."""
    seen = []
    main = recipe_command("train", "Train.", seen.append)
    return main, seen


def test_a_recipe_command_works_on_the_recipe_with_overrides(command, monkeypatch):
    main, seen = command
    monkeypatch.chdir(ROOT)
    assert main(["--local_rank=0", "recipes/gsm8k_llama_8b.yaml", "training.steps=333", "name=other"]) == 0
    assert [(recipe.training.steps, recipe.name) for recipe in seen] == [(333, "other")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "softcot-ds: error: no such recipe: "),
        (["recipes/gsm8k_llama_8b.yaml", "seed=-1"], "softcot-ds: error: recipes/gsm8k_llama_8b.yaml: 1 mistake in"),
    ],
)
def test_what_a_user_can_mend_is_a_message_and_exit_code_2(command, capfd, monkeypatch, arguments, message):
    main, seen = command
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(arguments) == 2
    assert seen == []
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert "Traceback" not in err


def test_a_recipe_command_without_recipe_or_with_a_typo_in_an_option_is_refused(command):
    main, seen = command
    for arguments in ([], ["recipe.yaml", "--stepz=3"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert seen == []


@pytest.mark.parametrize("launcher", [[], ["--local_rank=0"]])
def test_a_recipe_may_be_left_out_where_the_command_allows_it(monkeypatch, launcher):
    seen = []
    main = recipe_command("doctor", "Look.", seen.append, needs_recipe=False)
    monkeypatch.chdir(ROOT)
    assert main(launcher) == 0
    assert main([*launcher, "recipes/gsm8k_llama_8b.yaml", "name=other"]) == 0
    assert seen[0] is None
    assert seen[1].name == "other"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_that_ask_to_stop_end_in_a_message_even_where_they_are_ignored(number, capfd, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = signal.signal(number, signal.SIG_IGN)  # as below a batch script's trap
    try:
        assert run_command(lambda: os.kill(os.getpid(), number)) == 128 + number
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    message = f"interrupted by {number.name}; the same command goes on from what is finished"
    assert capfd.readouterr().err == f"softcot-ds: {message}\n"


@pytest.mark.distributed
def test_forked_children_leave_signals_to_their_parent(capfd, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def work() -> None:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5

    assert run_command(work) == 0
    assert capfd.readouterr().err == ""


def test_a_rank_that_lost_another_says_so(capfd, monkeypatch):
    import softcot_ds.distributed  # noqa: F401  # only commands that bring it work with other ranks

    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def work() -> None:
        raise RuntimeError(
            "[/x/gloo/tcp/buffer.cc:78] Timed out waiting 18000ms for recv operation to complete. Advice."
        )

    assert run_command(work) == 3
    message = capfd.readouterr().err
    assert "(Timed out waiting 18000ms for recv operation to complete)" in message
    assert "Advice" not in message
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


def test_success_is_silent_and_0(capfd):
    assert run_command(lambda: None) == 0
    assert capfd.readouterr() == ("", "")


def test_output_that_nobody_reads_any_more_ends_the_command_without_a_word(capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", output)
        assert run_command(lambda: print("a line")) == 128 + signal.SIGPIPE
    assert capfd.readouterr() == ("", "")
    with pytest.raises(BrokenPipeError):  # of another pipe
        run_command(lambda: (_ for _ in ()).throw(BrokenPipeError("of a worker")))


def test_a_mistake_of_ours_keeps_its_stack_trace():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken)


def test_ranks_behind_the_first_wait_and_say_which_they_are(capfd, monkeypatch):
    waited = []
    monkeypatch.setattr("softcot_ds.command.time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")

    def fail():
        raise SoftCoTError("no room")

    assert run_command(fail) == 2
    assert waited
    assert capfd.readouterr().err == "softcot-ds: [rank 9] error: no room\n"
