"""Programs that misbehave: each gets an outcome with a code, and nothing of it stays."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Literal

import pytest

from runners.base import Code, ProcessTarget
from runners.helpers import Pool
from runners.output import READ_SIZE, Output
from runners.process import ProcessRunner
from tests import programs
from tests.runner_fixtures import anyio_backend, nothing_left
from tests.support import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from runners.base import Outcome
    from runners.helper import Helper


async def run(name: str, payload: Mapping[str, Any] | None = None, **limits: Any) -> Outcome:
    return await start(programs.argv(name), payload, **limits)


async def start(argv: tuple[str, ...], payload: Mapping[str, Any] | None = None, **limits: Any) -> Outcome:
    target = ProcessTarget(argv, limits.pop("env", programs.ENV), limits.pop("stdin", "file"))
    runner = ProcessRunner(kill_grace_s=0.1)
    try:
        return await runner.run(programs.make_job(target, payload, **limits))
    finally:
        await runner.close()


def error_of(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error


def script(folder: Path, text: str, mode: int = 0o755) -> Path:
    path = folder / "run.sh"
    path.write_text(text, "utf-8")
    path.chmod(mode)
    return path


# Starting


async def test_a_missing_program_is_named(tmp_path: Path) -> None:
    outcome = await start(("no-such-program", "--flag"), folder=tmp_path)
    assert outcome.code is Code.START
    assert error_of(outcome) == "could not start 'no-such-program': No such file or directory"
    assert outcome.exit_code is None


async def test_a_program_that_is_not_executable_is_named(tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\necho 1\n", 0o644)
    outcome = await start(("./run.sh",), folder=tmp_path)
    assert outcome.code is Code.START
    assert error_of(outcome) == "could not start './run.sh': Permission denied"


async def test_a_missing_interpreter_is_told_from_a_missing_program(tmp_path: Path) -> None:
    script(tmp_path, "#!/no/such/interpreter\n")
    outcome = await start(("./run.sh",), folder=tmp_path)
    assert outcome.code is Code.START
    assert "interpreter" in error_of(outcome)


async def test_a_script_without_a_first_line_is_told_so(tmp_path: Path) -> None:
    script(tmp_path, "echo 1\n")
    outcome = await start(("./run.sh",), folder=tmp_path)
    assert outcome.code is Code.START
    assert "#!/bin/sh" in error_of(outcome)


@pytest.mark.parametrize("name", ["gone", "file"])
async def test_a_folder_that_cannot_be_entered_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    outcome = await start(programs.argv("writes_nothing.sh"), folder=tmp_path / name)
    assert outcome.code is Code.START
    assert str(tmp_path / name) in error_of(outcome)


async def test_an_environment_too_large_for_the_kernel_is_an_outcome() -> None:
    outcome = await start(programs.argv("writes_nothing.sh"), env={**programs.ENV, "BIG": "x" * 2**20})
    assert outcome.code is Code.START
    assert "too long" in error_of(outcome)


async def test_a_nul_in_the_command_is_an_outcome() -> None:
    outcome = await start(("echo", "a\0b"))
    assert outcome.code is Code.START
    assert "null byte" in error_of(outcome)


async def test_no_more_descriptors_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(24, f"Too many open files for {pid}")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    outcome = await run("ignores_term.sh")
    assert outcome.code is Code.START
    assert "Too many open files" in error_of(outcome)


async def test_the_program_is_looked_up_on_the_path_that_it_gets(tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\necho '\"found\"'\n")
    outcome = await start(("run.sh",), env={"PATH": str(tmp_path)})
    assert outcome.result == "found"
    assert (await start(("run.sh",))).code is Code.START


async def test_a_path_with_a_slash_is_seen_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin", "#!/bin/sh\necho '\"found\"'\n")
    assert (await start(("bin/run.sh",), folder=tmp_path)).result == "found"


async def test_the_program_gets_its_folder_its_arguments_and_this_environment_only(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "ONLY": "this"}
    command = (str(programs.FOLDER / "environment.sh"), "a b", "$HOME;`id`")
    outcome = await start(("/bin/sh", *command), env=env, folder=tmp_path)
    assert outcome.result["cwd"] == str(tmp_path)
    assert outcome.result["args"] == "a b $HOME;`id`"
    names = {part.partition("=")[0] for part in outcome.result["env"].split()}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "ONLY", "OVERLAY_CALL"}  # a shell adds these four


async def test_the_program_leads_a_session_of_its_own_and_holds_three_descriptors() -> None:
    code = "import os, json; print(json.dumps([os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd'))]))"
    outcome = await start((*programs.argv("echo.py")[:1], "-c", code))
    assert outcome.result == [True, ["0", "1", "2", "3"]]  # 3 is the listing's own


# Input


@pytest.mark.parametrize("stdin", ["file", "pipe"])
async def test_eight_megabytes_reach_a_program_that_reads_them(stdin: str) -> None:
    payload = {"text": "0123456789abcdef" * 2**19}
    outcome = await run("echo.py", payload, stdin=stdin)
    assert outcome.result == {"ok": True, "result": payload}


@pytest.mark.parametrize("stdin", ["file", "pipe"])
@pytest.mark.parametrize(("name", "result"), [("never_reads_stdin.sh", "unread"), ("closes_stdin.sh", "stdin closed")])
async def test_a_program_need_not_read_its_input(stdin: str, name: str, result: str) -> None:
    outcome = await run(name, {"text": "x" * 2**23}, stdin=stdin)
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": True, "result": result}


async def test_stdin_is_a_file_that_can_be_sized_and_read_again() -> None:
    outcome = await start(("bash", "-c", "wc -c < /dev/stdin; cat > /dev/null; wc -c < /dev/stdin"))
    assert outcome.log == "14\n"
    assert outcome.result == 14


# Output


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("exits_1.sh", Code.CRASH, "exit status 1 and wrote nothing"),
        ("writes_nothing.sh", Code.PROTOCOL, "wrote nothing to stdout"),
        ("writes_html.sh", Code.PROTOCOL, "<!doctype html>"),
        ("half_json.sh", Code.PROTOCOL, "not JSON"),
        ("half_json_lines.sh", Code.PROTOCOL, "not JSON"),
        ("dies_of_signal.sh", Code.CRASH, "SIGSEGV"),
        ("double_keys.sh", Code.PROTOCOL, "'ok' stands twice"),
        ("writes_nan.sh", Code.PROTOCOL, "NaN"),
    ],
)
async def test_a_program_without_a_reply_has_a_code_and_a_sentence(name: str, code: Code, said: str) -> None:
    outcome = await run(name)
    assert outcome.code is code
    assert said in error_of(outcome)
    assert outcome.result is None


async def test_output_that_is_not_json_is_kept_in_the_log() -> None:
    assert "It works!" in (await run("writes_html.sh")).log


async def test_exit_status_and_signal_are_kept() -> None:
    assert (await run("exits_1.sh")).exit_code == 1
    assert (await run("dies_of_signal.sh")).exit_code == -signal.SIGSEGV
    assert (await run("never_reads_stdin.sh")).exit_code == 0


async def test_a_signal_without_a_name_is_numbered() -> None:
    outcome = await start(("bash", "-c", "kill -40 $$"))
    assert outcome.code is Code.CRASH
    assert "signal 40" in error_of(outcome)


async def test_stderr_is_the_log_of_a_crash() -> None:
    assert (await run("exits_1.sh")).log == "it broke\n"


async def test_a_protocol_reply_counts_whatever_the_exit_status() -> None:
    outcome = await run("exits_3_with_reply.sh")
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": False, "error": "no such model"}
    assert outcome.exit_code == 3


async def test_any_other_json_of_a_failed_program_is_kept_beside_the_crash() -> None:
    outcome = await run("exits_3_with_value.sh")
    assert outcome.code is Code.CRASH
    assert outcome.result == {"half_done": [1, 2]}
    assert outcome.status == "partial"


async def test_noise_before_the_reply_goes_to_the_log() -> None:
    outcome = await run("noise_before_json.sh")
    assert outcome.result == {"ok": True, "result": "after the noise"}
    assert outcome.log == "loading [model] ...\ndone.\n"


async def test_the_fault_of_a_last_line_that_is_nearly_json_is_told() -> None:
    outcome = await start(("bash", "-c", """echo noise; echo '{"a":1,"a":2}'"""))
    assert outcome.code is Code.PROTOCOL
    assert "'a' stands twice" in error_of(outcome)


async def test_noise_with_a_scalar_in_the_middle_is_not_a_reply() -> None:
    assert (await start(("bash", "-c", "echo 12; echo thirteen"))).code is Code.PROTOCOL


async def test_a_big_whole_number_passes_unrounded() -> None:
    assert (await run("big_int.sh")).result == {"ok": True, "result": 9007199254740993}


async def test_a_hundred_megabytes_are_cut_off_at_the_cap() -> None:
    outcome = await run("writes_100_mb.sh", max_output_bytes=16 * 2**20)
    assert outcome.code is Code.OUTPUT_TOO_LARGE
    assert str(16 * 2**20) in error_of(outcome)
    assert outcome.exit_code in (-signal.SIGKILL, -signal.SIGPIPE)


async def test_of_a_long_log_the_head_and_the_tail_are_kept() -> None:
    outcome = await run("floods_stderr.sh", max_log_bytes=1000)
    assert outcome.result == {"ok": True, "result": 1}
    assert outcome.log.startswith("first words\n")
    assert outcome.log.endswith("last words\n")
    dropped = 4 * 2**20 + len("first words\nlast words\n") - 1000
    assert f"[... {dropped} bytes left out ...]" in outcome.log


async def test_noise_and_stderr_share_one_cap() -> None:
    outcome = await start(("bash", "-c", "head -c 3000 /dev/zero | tr '\\0' n; echo; echo 1; echo end >&2"),
                          max_log_bytes=1000)  # fmt: skip
    assert outcome.result == 1
    assert outcome.log.endswith("n\nend\n")
    assert len(outcome.log) < 1100


async def test_time_and_memory_are_the_kernels_figures() -> None:
    outcome = await run("echo.py")
    assert outcome.cpu_ms is not None
    assert outcome.cpu_ms > 0
    assert outcome.peak_mb is not None
    assert outcome.peak_mb > 1


# Ending


@pytest.mark.parametrize("name", ["background_child.sh", "grandchild.py"])
async def test_what_a_program_leaves_behind_dies_with_its_call_and_does_not_hold_it(name: str) -> None:
    runner = ProcessRunner(kill_grace_s=0.1)
    target = ProcessTarget(programs.argv(name), {**programs.ENV, "MARK": "left-by-" + name}, mode="spawn")
    outcome = await runner.run(programs.make_job(target))
    assert outcome.result == {"ok": True, "result": "left"}
    assert programs.running("left-by-" + name) == []
    await runner.close()


async def test_closing_asks_a_program_to_stop_first(tmp_path: Path) -> None:
    outcome = await close_while_running("heeds_term.sh", tmp_path, kill_grace_s=60)
    assert outcome.exit_code == 0
    assert outcome.log == "tidied up\n"


async def test_a_program_that_will_not_stop_is_killed(tmp_path: Path) -> None:
    outcome = await close_while_running("ignores_term.sh", tmp_path, kill_grace_s=0.05)
    assert outcome.exit_code == -signal.SIGKILL


@pytest.mark.parametrize("first", [True, False])
async def test_closing_at_once_gives_no_grace_nor_leaves_that_of_an_earlier_close(tmp_path: Path, first: bool) -> None:
    runner = ProcessRunner(kill_grace_s=1000)
    async with programs.start_signal(tmp_path) as (fifo, started):
        call = asyncio.create_task(runner.run(programs.make_job(programs.target("ignores_term.sh"), {"started": fifo})))
        await started
        closing = [asyncio.create_task(runner.close())] if first else []
        await asyncio.sleep(0)
        await runner.close(at_once=True)
        await asyncio.gather(*closing)
    outcome = await call
    assert (outcome.code, outcome.exit_code) == (Code.CANCELLED, -signal.SIGKILL)


async def test_closing_lets_workers_end_while_programs_have_their_grace(tmp_path: Path) -> None:
    runner = ProcessRunner(kill_grace_s=1000)
    (tmp_path / "worker").mkdir()
    async with programs.start_signal(tmp_path) as (fifo, started):
        call = asyncio.create_task(runner.run(programs.make_job(programs.target("ignores_term.sh"), {"started": fifo})))
        await started
    async with programs.start_signal(tmp_path / "worker") as (fifo, started):
        argv = ("sh", "-c", f"read line; echo > '{fifo}'; exec sleep 1000")
        hangs = ProcessTarget(argv, programs.ENV, mode="worker")
        at_worker = asyncio.create_task(runner.run(programs.make_job(hangs)))
        await started
    closing = asyncio.create_task(runner.close())
    await until(at_worker.done)
    assert (at_worker.result().code, call.done()) == (Code.CANCELLED, False)
    await runner.close(at_once=True)
    await asyncio.gather(closing, call)


async def test_no_program_is_started_once_closing_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ProcessRunner(kill_grace_s=1000)
    waits, goes_on = asyncio.Event(), asyncio.Event()
    ready = Pool.ready

    async def ready_late(pool: Pool) -> Helper:
        helper = await ready(pool)
        waits.set()
        await goes_on.wait()
        return helper

    async with programs.start_signal(tmp_path) as (fifo, started):
        job = programs.make_job(programs.target("ignores_term.sh"), {"started": fifo})
        running = asyncio.create_task(runner.run(job))
        await started
    monkeypatch.setattr(Pool, "ready", ready_late)
    late = asyncio.create_task(runner.run(programs.make_job(programs.target("echo.sh"))._replace(overlay="other")))
    await waits.wait()
    closing = asyncio.create_task(runner.close())
    await asyncio.sleep(0)
    goes_on.set()
    assert (await asyncio.wait_for(late, PATIENCE_S)).code is Code.CANCELLED
    await runner.close(at_once=True)
    await asyncio.gather(closing, running)


async def test_a_forgotten_overlay_keeps_no_helper_and_its_next_call_has_a_new_one(tmp_path: Path) -> None:
    runner = ProcessRunner()
    pids = []
    for _ in range(2):
        outcome = await runner.run(programs.make_job(programs.target("echo.sh"), folder=tmp_path))
        assert outcome.ok
        pids += [helper["pid"] for helper in runner.state("test")["helpers"]]
        runner.forget("test")
        assert runner.state("test") == {}
    assert len(set(pids)) == 2
    await runner.close()


async def test_an_output_that_somebody_still_writes_to_is_drained_of_what_its_pipe_holds() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    taken: list[int] = []

    def take(data: bytes) -> None:
        taken.append(len(data))
        os.write(writer, bytes(READ_SIZE))  # a pipe has that much room once so much was taken

    os.write(writer, bytes(READ_SIZE))
    Output(asyncio.get_running_loop(), reader, take, watched=False).drain()
    assert sum(taken) == fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    os.close(writer)


async def close_while_running(name: str, folder: Path, kill_grace_s: float) -> Outcome:
    runner = ProcessRunner(kill_grace_s=kill_grace_s)
    async with programs.start_signal(folder) as (fifo, started):
        task = asyncio.create_task(runner.run(programs.make_job(programs.target(name), {"started": fifo})))
        await started
        await runner.close()
        outcome = await task
    assert outcome.code is Code.CANCELLED
    return outcome


async def test_a_program_that_will_not_stop_is_killed_however_often_the_call_is_cancelled(tmp_path: Path) -> None:
    runner = ProcessRunner(kill_grace_s=0.05)
    async with programs.start_signal(tmp_path) as (fifo, started):
        task = asyncio.create_task(runner.run(programs.make_job(programs.target("ignores_term.sh"), {"started": fifo})))
        await started
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert task.cancelled()
    await runner.close()


@pytest.mark.parametrize("stdin", ["file", "pipe"])
async def test_cancelling_at_any_turn_of_a_quick_call_leaves_nothing(stdin: Literal["file", "pipe"]) -> None:
    runner = ProcessRunner(kill_grace_s=0.1)
    target = ProcessTarget(programs.argv("never_reads_stdin.sh"), programs.ENV, stdin)
    for turns in range(40):
        task = asyncio.create_task(runner.run(programs.make_job(target, {"x": "x" * 100_000})))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.result().code is Code.OK
    await runner.close()


async def test_a_program_is_reaped_where_child_signals_are_ignored() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        outcome = await run("echo.py", {"n": 1})
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert outcome.result == {"ok": True, "result": {"n": 1}}
    assert outcome.exit_code == 0


# Any language


async def test_a_bash_program_answers() -> None:
    outcome = await run("echo.sh", {"text": "ahoj"})
    assert outcome.result == {"ok": True, "result": {"payload": {"text": "ahoj"}}}


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
async def test_a_node_program_answers() -> None:
    outcome = await run("echo.js", {"text": "ahoj"})
    assert outcome.result == {"ok": True, "result": {"text": "ahoj"}}


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no cc")
async def test_a_compiled_program_answers(tmp_path: Path) -> None:
    subprocess.run(["cc", "-o", tmp_path / "echo", programs.FOLDER / "echo.c"], check=True)  # noqa: ASYNC221
    outcome = await start(("./echo",), {"text": "ahoj"}, folder=tmp_path)
    assert outcome.result == {"ok": True, "result": {"payload": {"text": "ahoj"}}}


@pytest.mark.parametrize("command", [("python3", "run.py"), ("python3", "-m", "run")])
async def test_modules_of_the_overlays_own_do_not_stand_in_for_those_that_a_fork_needs(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Not even where a library is loaded that has C's `printf` flushed at the end."""
    for name in ("resource", "ctypes"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError(__name__)")
    (tmp_path / "run.py").write_text("import _ctypes, mine\nprint(mine.HERE)")
    (tmp_path / "mine.py").write_text("HERE = 7")
    target = ProcessTarget(command, programs.ENV, mode="fork")
    runner = ProcessRunner()
    try:
        for _ in range(3):
            outcome = await runner.run(programs.make_job(target, folder=tmp_path))
            assert (outcome.code, outcome.result, outcome.log) == (Code.OK, 7, "")
        (helper,) = runner.state("test")["helpers"]
    finally:
        await runner.close()
    assert helper["mode"] == "fork"
