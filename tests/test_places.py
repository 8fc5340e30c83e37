"""Where a process may go: libraries, its program with what that reads, its folder; and no trick with links."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runners import places, programs
from runners.places import Places, Wishes
from runners.programs import Program

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING: dict[str, str] = {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of an overlay, with its real path."""
    path = tmp_path.resolve() / "overlays/own"
    path.mkdir(parents=True)
    return path


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def on_path(*folders: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(map(str, folders))}


def of(folder: Path, wishes: Wishes | None = None, env: dict[str, str] | None = None) -> Places:
    return places.places(wishes or Wishes(), Program(), folder, env or NOTHING)


# --- programs ---


def test_a_script_is_executed_with_its_interpreter_and_the_loader_of_that(folder: Path) -> None:
    script(folder / "run", f"#!{sys.executable} -I")
    program = programs.look("./run", folder, NOTHING)
    python = Path(sys.executable).resolve()
    loader = programs.elf_loader(python)
    assert program.executed == (folder / "run", python, *([loader.resolve()] if loader else []))
    assert program.stand_in is None


def test_env_in_the_first_line_is_executed_with_what_it_finds_on_the_path(folder: Path) -> None:
    tool = script(folder.parent / "bin/tool", "")
    for words in ("tool", "-S tool -x", "-i A=b tool", "-S A=b 'tool' -u"):
        script(folder / "run", f"#!/usr/bin/env {words}")
        executed = programs.look("./run", folder, on_path(tool.parent)).executed
        assert {tool, Path("/usr/bin/env").resolve()} <= set(executed), words


def test_scripts_that_name_each_other_do_not_go_on_for_ever(folder: Path) -> None:
    script(folder / "one", f"#!{folder / 'two'}")
    script(folder / "two", f"#!{folder / 'one'}")
    assert programs.look("./one", folder, NOTHING).executed == (folder / "one", folder / "two")


def test_the_first_program_of_a_name_on_the_path_counts_that_may_be_executed(folder: Path) -> None:
    plain = script(folder.parent / "first/tool", "")
    plain.chmod(0o644)
    second = script(folder.parent / "second/tool", "")
    third = script(folder / "bin/tool", "")
    assert programs.look("tool", folder, on_path(plain.parent, second.parent)).executed == (second,)
    assert programs.look("tool", folder, {"PATH": f"bin:{second.parent}"}).executed == (third,)


@pytest.mark.parametrize("name", ["", "no-such-program", "./none", "sub", "a\0b", "/"])
def test_a_program_that_is_not_there_has_nothing(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    assert programs.look(name, folder, on_path(folder)) == Program()


def test_a_virtual_environment_is_read_with_the_python_that_it_was_made_from(folder: Path) -> None:
    base = folder.parent / "python"
    python = script(base / "bin/python3.11", "")
    home = folder / ".venv"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to(python)
    (home / "pyvenv.cfg").write_text(f"home = {folder.parent / 'other/bin'}\nversion = 3.11\n")
    program = programs.look("python3", folder, on_path(home / "bin"))
    assert program.executed == (python,)
    assert {home / "pyvenv.cfg", home / "lib", base / "lib", folder.parent / "other/lib"} <= set(program.read)


def test_packages_that_a_person_installed_are_read_by_python_alone(folder: Path) -> None:
    for name in ("python3", "tool"):
        script(folder / "bin" / name, "")
    packages = folder.parent / "home/.local/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    env = {**on_path(folder / "bin"), "HOME": str(folder.parent / "home")}
    assert packages in programs.look("python3", folder, env).read
    assert packages not in programs.look("tool", folder, env).read


def test_folders_that_the_environment_names_for_libraries_are_read(folder: Path) -> None:
    script(folder / "tool", "")
    env = {"PYTHONPATH": "lib:/opt/more:", "HOME": "/nonexistent"}
    assert programs.look("./tool", folder, env).read == (folder / "lib", Path("/opt/more"))


def test_of_a_home_folder_a_program_in_its_local_bin_reads_no_data(folder: Path) -> None:
    tool = script(folder.parent / ".local/bin/tool", "")
    read = programs.look("tool", folder, on_path(tool.parent)).read
    assert folder.parent / ".local/lib" in read
    assert not {folder.parent / ".local", folder.parent / ".local/share"} & set(read)


def test_a_shim_that_env_finds_stands_in_as_well(folder: Path) -> None:
    root = folder.parent / "manager"
    script(root / "shims/python3", "#!/usr/bin/env sh")
    script(folder / "run.py", "#!/usr/bin/env python3")
    program = programs.look("./run.py", folder, {"PATH": f"{root / 'shims'}:{os.defpath}"})
    assert (program.stand_in, program.trees) == ("python3 is a version manager's shim", (root,))


def test_a_version_managers_shim_stands_in_for_what_it_will_find(folder: Path) -> None:
    root = folder.parent / "manager"
    script(root / "shims/python3", "#!/usr/bin/env sh")
    program = programs.look("python3", folder, {"PATH": f"{root / 'shims'}:{os.defpath}"})
    assert (program.stand_in, program.trees) == ("python3 is a version manager's shim", (root,))


def test_a_shell_script_on_the_path_stands_in_for_a_program_but_not_the_overlays_own(folder: Path) -> None:
    script(folder.parent / "bin/tool", "#!/bin/sh")
    script(folder / "bin/own", "#!/bin/sh")
    outside = programs.look("tool", folder, on_path(folder.parent / "bin"))
    assert outside.stand_in == "tool is a shell script that stands in for a program"
    assert programs.look("own", folder, on_path(folder / "bin")).stand_in is None
    assert programs.look("bin/own", folder, NOTHING).stand_in is None


def elf(interp: bytes, *, wide: bool, order: str) -> bytes:
    """An ELF file of one program header, after elf(5)."""
    size, at = (56, 64) if wide else (32, 52)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2]) + bytes(10)
    words = "Q" if wide else "I"
    header = struct.pack(f"{order}HHI{words}{words}{words}IHHHHHH", 2, 0, 1, 0, at, 0, 0, at, size, 1, 0, 0, 0)
    where = at + size
    if wide:
        entry = struct.pack(f"{order}IIQQQQQQ", 3, 0, where, 0, 0, len(interp), len(interp), 1)
    else:
        entry = struct.pack(f"{order}IIIIIIII", 3, where, 0, 0, len(interp), len(interp), 0, 1)
    return ident + header + entry + interp


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_loader_of_an_elf_file_is_read_in_every_form(tmp_path: Path, wide: bool, order: str) -> None:
    file = tmp_path / "program"
    whole = elf(b"/lib/ld.so\0", wide=wide, order=order)
    file.write_bytes(whole)
    assert programs.elf_loader(file) == Path("/lib/ld.so")
    for end in range(len(whole) - len(b"/lib/ld.so\0")):
        file.write_bytes(whole[:end])
        assert programs.elf_loader(file) is None


def test_a_file_that_is_no_elf_or_is_not_there_has_no_loader(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\n" * 20)
    assert programs.elf_loader(tmp_path / "text") is programs.elf_loader(tmp_path / "none") is None


def a_secret(folder: Path) -> Path:
    """A program beside it that is nobody's to read, with a folder of libraries."""
    (folder.parent / "secret/lib").mkdir(parents=True)
    return script(folder.parent / "secret/bin/tool", f"#!{sys.executable}")


def of_program(name: str, folder: Path, own: tuple[Path, ...], env: dict[str, str] | None = None) -> set[Path]:
    """What is read and executed below the folder's parent, but for the folder."""
    program = programs.look(name, folder, env or NOTHING, own)
    found = places.places(Wishes(own=own, any_program=True), program, folder, env or NOTHING)
    paths = {*found.read, *found.execute, *program.executed, *program.trees}
    return {path for path in paths if path.is_relative_to(folder.parent) and not path.is_relative_to(folder)}


def a_link(folder: Path) -> None:
    (folder / "bin/tool").symlink_to(a_secret(folder))


def an_interpreter(folder: Path) -> None:
    script(folder / "bin/tool", f"#!{a_secret(folder)}")


def a_loader(folder: Path) -> None:
    script(folder / "bin/tool").write_bytes(elf(bytes(a_secret(folder)) + b"\0", wide=True, order="<"))


def libraries(folder: Path) -> None:
    script(folder / "bin/tool")
    a_secret(folder)
    (folder / "lib").symlink_to("../secret/lib")


def an_environment(folder: Path) -> None:
    script(folder / "bin/tool")
    (folder / "pyvenv.cfg").write_text(f"home = {a_secret(folder).parent}\n")


@pytest.mark.parametrize("lay", [a_link, an_interpreter, a_loader, libraries, an_environment])
def test_a_program_leads_to_what_its_author_says_but_not_to_what_the_overlay_may_have_written(
    folder: Path, lay: Callable[[Path], None]
) -> None:
    (folder / "bin").mkdir()
    lay(folder)
    secrets = {folder.parent / "secret/bin/tool", folder.parent / "secret/lib"}
    assert of_program("bin/tool", folder, ()) & secrets
    assert of_program("bin/tool", folder, (folder,)) == set()


@pytest.mark.parametrize("variable", ["PATH", "PYTHONPATH"])
def test_a_folder_of_the_environment_that_the_overlay_may_have_made_a_link_leads_nowhere(
    folder: Path, variable: str
) -> None:
    script(folder / "run")
    secret = a_secret(folder).parent
    (folder / "linked").symlink_to(secret)
    env = {"PATH": "bin", variable: "linked"}
    assert secret in of_program("./run", folder, (), env)
    assert of_program("./run", folder, (folder,), env) == set()


@pytest.mark.parametrize("lay", [a_link, an_interpreter, a_loader, libraries, an_environment])
def test_a_program_leads_to_nothing_that_the_bus_keeps(folder: Path, lay: Callable[[Path], None]) -> None:
    (folder / "bin").mkdir()
    lay(folder)
    program = programs.look("bin/tool", folder, NOTHING)
    wishes = Wishes(kept=places.keep([folder.parent], [folder]))
    found = places.places(wishes, program, folder, NOTHING)
    assert [path for path in (*found.read, *found.execute) if path.is_relative_to(folder.parent / "secret")] == []


def test_a_link_in_the_folder_leads_to_nothing_that_the_bus_keeps(folder: Path) -> None:
    for name in (".aal", "overlays/other", "shared"):
        (folder.parent.parent / name).mkdir()
        (folder / Path(name).name).symlink_to(folder.parent.parent / name)
    root = folder.parent.parent
    read = of(folder, Wishes(kept=places.keep([root / ".aal", root / "overlays"], [folder]))).read
    assert [path for path in read if path.is_relative_to(root)] == [folder, root / "shared"]


def test_a_program_that_names_no_path_is_no_fault(folder: Path) -> None:
    script(folder / "bin/tool", f"#!{folder}/a\0b")
    (folder / "pyvenv.cfg").write_text("home = /a\0b/bin\n")
    assert of_program("bin/tool", folder, ()) == set()


# --- places ---


def test_what_is_read_is_there_and_resolved_and_is_no_folder_of_programs_nor_a_secret_of_the_machine(
    folder: Path,
) -> None:
    read = of(folder).read
    assert folder in read
    assert all(path.exists() and path == path.resolve() for path in read)
    for secret in ("/etc/shadow", "/etc/ssl/private/key.pem", "/root/.ssh/id", "/home/you/.ssh/id", "/usr/bin/env"):
        assert not any(programs.is_below(Path(secret), place) or Path(secret) == place for place in read), secret


def test_devices_are_those_that_keep_nothing_and_of_graphics_only_where_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "GPU", (f"{folder}/nvidia*",))
    (folder / "nvidia0").touch()
    assert of(folder).devices == tuple(map(Path, places.DEVICES))
    assert folder / "nvidia0" in of(folder, Wishes(gpu=True)).devices


def test_every_program_of_the_path_may_be_executed_where_any_may(folder: Path) -> None:
    tools = folder.parent / "tools"
    tools.mkdir()
    found = of(folder, Wishes(any_program=True), {"PATH": f"{tools}:bin"})
    assert {tools, folder, Path("/usr")} <= set(found.execute)
    assert set(found.execute) <= set(found.read)
    assert of(folder, env=on_path(tools)).execute == ()


def test_links_in_the_folder_lead_outside_but_to_no_folder_that_it_is_in(folder: Path) -> None:
    shared = folder.parent / "shared"
    shared.mkdir()
    (folder / "sub").mkdir()
    (folder / "sub/link").symlink_to("../../shared")
    (folder / "up").symlink_to("..")
    (folder / "root").symlink_to("/")
    (folder / "self").symlink_to(".")
    (folder / "round").symlink_to("round")
    (folder / "gone").symlink_to("/nonexistent")
    read = of(folder).read
    assert shared in read
    assert not {folder.parent, Path("/"), Path("/nonexistent")} & set(read)


def test_what_is_installed_in_the_folder_is_not_looked_through(folder: Path) -> None:
    shared = folder.parent / "shared"
    shared.mkdir()
    (folder / "node_modules").mkdir()
    (folder / "node_modules/link").symlink_to(shared)
    assert shared not in of(folder).read


def test_a_link_below_what_the_overlay_may_write_leads_nowhere(folder: Path) -> None:
    """Whoever laid it: the overlay could have, in a call before."""
    state, secret = folder.parent / "state", folder.parent / "secret"
    for path in (state, secret, folder / "data"):
        path.mkdir()
    (state / "link").symlink_to(secret)
    (folder / "data/link").symlink_to(secret)
    (folder / "by-two").symlink_to(state / "link")
    wishes = Wishes(read=(state / "link", folder / "by-two"), write=(folder / "data", state / "link"), own=(state,))
    found = of(folder, wishes)
    assert secret not in found.read + found.write
    assert found.write == (folder / "data",)


def test_of_a_folder_of_programs_with_what_is_kept_in_it_the_rest_is_executed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = folder.parent / "opt"
    for name in ("tool/bin", "bus/.aal", "bus/bin"):
        (opt / name).mkdir(parents=True)
    (opt / "link").symlink_to("bus")
    monkeypatch.setattr(places, "_OF_PROGRAMS", (opt,))
    kept = places.keep([opt / "bus/.aal"], [folder])
    found = of(folder, Wishes(any_program=True, kept=kept), on_path(opt / "link/.aal"))
    assert set(found.execute) == {folder, opt / "tool", opt / "bus/bin"}
    assert opt not in found.read


def test_a_path_on_which_a_link_may_not_be_read_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def realpath(path: Path) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(os.path, "realpath", realpath)
    assert programs.real(Path("/proc/1/root/etc")) == Path("/proc/1/root/etc")


def test_a_link_to_a_place_to_write_counts_as_it_lies_now(folder: Path) -> None:
    (folder.parent / "real").mkdir()
    link = folder.parent / "link"
    link.symlink_to("real")
    assert of(folder, Wishes(write=(link,))).write == (folder.parent / "real",)
    assert of(folder, Wishes(write=(folder.parent / "none",))).write == ()


def test_a_folder_that_the_overlay_may_write_to_is_not_searched_for_links(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.mkdir()
    (folder / "link").symlink_to(secret)
    assert secret in of(folder).read
    assert secret not in of(folder, Wishes(own=(folder,))).read


def test_a_folder_with_more_entries_than_are_looked_at_has_its_first_ones_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "LOOKED_AT", 1)
    secret = folder.parent / "secret"
    (folder / "sub").mkdir()
    secret.mkdir()
    (folder / "sub/link").symlink_to(secret)
    assert secret not in of(folder).read


def test_the_folder_of_a_resolver_is_read_where_its_file_comes_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder.parent / "run"
    for name in ("resolve", "NetworkManager"):
        (run / name).mkdir(parents=True)
        (run / name / "resolv.conf").touch()
    monkeypatch.setattr(places, "_RUN", run)
    links = [folder.parent / "one", folder.parent / "two"]
    for link, name in zip(links, ("resolve", "NetworkManager"), strict=True):
        link.symlink_to(run / name / "resolv.conf")
    monkeypatch.setattr(places, "ETC", tuple(map(str, links)))
    read = of(folder).read
    assert run / "resolve" in read
    assert run / "NetworkManager" not in read
    assert run / "NetworkManager/resolv.conf" in read


def test_what_an_interpreter_keeps_in_etc_is_read_whatever_its_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tongue3", "tongue3.11", "other"):
        (folder.parent / name).mkdir()
    monkeypatch.setattr(places, "ETC", (f"{folder.parent}/tongue3*",))
    read = of(folder).read
    assert {folder.parent / "tongue3", folder.parent / "tongue3.11"} <= set(read)
    assert folder.parent / "other" not in read


@pytest.mark.skipif(shutil.which("true") is None, reason="there is no program `true`")
def test_the_program_of_a_command_is_among_the_places_with_its_loader(folder: Path) -> None:
    program = programs.look("true", folder, {})
    found = places.places(Wishes(), program, folder, {})
    assert set(program.executed) == set(found.execute) <= set(found.read)
