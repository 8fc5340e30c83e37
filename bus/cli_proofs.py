"""`aal provenance verify`, `prove`, `prove-consistency`, `checkpoint` and `key`: whether the ledger is what it was."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bus.cli_ledger import app
from bus.console import (
    AsJson,
    Exit,
    complain,
    err,
    make_app,
    mark,
    out,
    print_json,
    print_pretty,
    printable,
    say,
    whole,
    workplace,
)
from bus.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus.ledger_key import LedgerKey
    from bus.notes import Checkpoint, Verifier
    from bus.proofs import Prover
    from bus.verification import VerifyReport

__all__ = ["app"]

key = make_app("Make and show the key that checkpoints are signed with.")
app.add_typer(key, name="key")

Size = Annotated[
    int | None,
    typer.Option("--size", parser=whole(1), metavar="M", help="In the tree of the first M lines; default: of all."),
]


@app.command()
def verify(
    ctx: typer.Context,
    *,
    start: Annotated[int, typer.Option("--from", parser=whole(1), metavar="N", help="The first line.")] = 1,
    end: Annotated[
        int | None, typer.Option("--to", parser=whole(1), metavar="M", help="The last line; default: all.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A checkpoint that was kept: its lines must still be these.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VKEY",
            help="A verifier key that is trusted, once for each; one of them must have signed. Default: our own key, "
            "for the notes that it signed.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every line (JSON, hash, number, the line before), the Merkle tree and all checkpoints.

    Exit 4 at the first that is wrong, and where --key is given and signed neither a checkpoint nor --against.

    Example: aal provenance verify, or aal provenance verify --against checkpoint.txt --key VKEY
    """
    from bus import verification

    path = workplace(ctx).settings().ledger
    verifiers = _verifiers(ctx, key)
    with _progress(path) as told:
        report = verification.verify(
            path,
            start=start,
            end=end,
            verifiers=verifiers,
            signed=bool(key),
            against=None if against is None else _kept_checkpoint(against, verifiers),
            against_signed=against is not None and bool(verifiers),
            progress=told,
        )
    if as_json:
        print_json({"ok": report.ok} | asdict(report))
    else:
        _tell(report)
    if not report.ok:
        raise typer.Exit(Exit.LEDGER_BROKEN)


def _tell(report: "VerifyReport") -> None:
    """What was found, for people: a fault on stderr."""
    if report.ok:
        checked = f", {report.checkpoints} checkpoints ({report.signed} signatures)" if report.checkpoints else ""
        if report.signed_size is not None:
            checked += f", signed up to line {report.signed_size}"
        out().print(mark("ok"), f"{report.lines} lines, head {report.head_hash}{checked}", soft_wrap=True)
    elif report.first_bad is None:
        hint = "The lines fit each other, which they also do where somebody wrote all of them anew."
        complain("ERR_LEDGER_BROKEN", report.reason or "", hint)
    else:
        hint = f"The {report.lines} before it are good; the last of them has the hash {report.head_hash}."
        complain("ERR_LEDGER_BROKEN", f"line {report.first_bad}: {report.reason}", hint)


def _verifiers(ctx: typer.Context, vkeys: list[str] | None) -> "list[Verifier]":
    """Of the keys that are named, or else of our own where there is one."""
    from bus.notes import Verifier

    if not vkeys:
        signer = _key(ctx).signer()
        return [] if signer is None else [Verifier.read(signer.vkey)]
    try:
        return [Verifier.read(vkey) for vkey in vkeys]
    except ValueError as error:
        raise typer.BadParameter(printable(str(error)), param_hint="--key") from None


def _kept_checkpoint(path: Path, verifiers: "list[Verifier]") -> "Checkpoint":
    """What a file says, its signature checked where there is a key. Raises `typer.BadParameter` for what is none."""
    from bus.notes import NoteError, open_signed, read_checkpoint

    try:
        text = path.read_bytes().decode("utf-8")
        return open_signed(text, verifiers) if verifiers else read_checkpoint(text)
    except (OSError, UnicodeDecodeError, NoteError) as error:
        raise typer.BadParameter(printable(f"{path}: {error}"), param_hint="--against") from None


@contextlib.contextmanager
def _progress(path: Path) -> Iterator["Callable[[int], None]"]:
    """What to tell the lines that are done: of how many, the last line says."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from bus import provenance

    console = err()
    columns = (BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f} lines"), TimeRemainingColumn())
    last = provenance.tail(path, 1)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=last[0]["seq"] if last else 0)
        yield lambda lines: progress.update(task, completed=lines)


@contextlib.contextmanager
def _broken_as_operator_error() -> Iterator[None]:
    """A broken line is told with what to do about it."""
    from bus.records import BrokenLineError

    try:
        yield
    except BrokenLineError as error:
        hint = "aal provenance verify names the first bad line."
        raise OperatorError(error.code, error.detail, hint=hint) from None


@app.command()
def prove(
    ctx: typer.Context,
    seq: Annotated[int, typer.Argument(parser=whole(1), metavar="N", help="The line's number.")],
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Prove that line N is in the ledger's Merkle tree; with --json as a file for TOOLS/verify.py.

    Example: aal provenance prove 1 --json
    """
    with _broken_as_operator_error():
        proof = _prover(ctx).inclusion(seq, size)
    if as_json:
        print_json(proof.body())
    else:
        print_pretty(proof.body())


@app.command("prove-consistency")
def prove_consistency(
    ctx: typer.Context,
    old: Annotated[int, typer.Argument(parser=whole(0), metavar="A", help="Lines of the smaller tree.")],
    new: Annotated[
        int | None, typer.Argument(parser=whole(1), metavar="[B]", help="Lines of the larger; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that the tree of B lines grew out of that of A lines; with --json as a file for TOOLS/verify.py.

    Example: aal provenance prove-consistency 1 2 --json
    """
    with _broken_as_operator_error():
        proof = _prover(ctx).consistency(old, new)
    if as_json:
        print_json(proof.body())
    else:
        print_pretty(proof.body())


@app.command()
def checkpoint(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The signed note of the ledger as it is now, to be kept where nobody who can write the ledger can.

    Example: aal provenance checkpoint > checkpoint.txt
    """
    with _broken_as_operator_error():
        now = _prover(ctx).checkpoint()
    if as_json:
        print_json(now.body())
    elif now.checkpoint is not None:
        sys.stdout.write(now.checkpoint)
    else:
        say(f"{now.tree_size} lines, root {now.root}")
        _remark("It is not signed: aal provenance key new makes a key.")


def _prover(ctx: typer.Context) -> "Prover":
    from bus.proofs import Prover

    path = workplace(ctx).settings().ledger
    with _progress(path) as told:
        return ctx.with_resource(Prover(path, _key(ctx).notary(), progress=told))


def _key(ctx: typer.Context) -> "LedgerKey":
    from bus.ledger_key import LedgerKey

    return LedgerKey(workplace(ctx).settings().state)


def _remark(text: str) -> None:
    """A line for people beside what a command prints, on stderr: stdout can be taken as it is."""
    err().print(printable(text), style="dim", soft_wrap=True)


@key.command("new")
def new_key(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The log's name in checkpoints; default: HOST/aal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print its verifier key, which auditors need. A running server takes it at its next start.

    Example: aal provenance key new example.org/aal
    """
    name = f"{socket.gethostname()}/aal" if name is None else name
    try:
        signer = _key(ctx).create(name)
    except ValueError as error:
        raise typer.BadParameter(printable(str(error)), param_hint="NAME") from None
    _print_key(signer.vkey, as_json)
    if not as_json:
        _remark("Auditors check signatures with this. A running server signs from its next start on.")


@key.command("show")
def show_key(ctx: typer.Context, as_json: AsJson = False) -> None:
    """The verifier key, which auditors need.

    Example: aal provenance key show
    """
    from bus.errors import NotFoundError

    signer = _key(ctx).signer()
    if signer is None:
        raise NotFoundError("ERR_NOT_FOUND", "there is no key", hint="aal provenance key new makes one.")
    _print_key(signer.vkey, as_json)


def _print_key(vkey: str, as_json: bool) -> None:
    if as_json:
        print_json({"vkey": vkey})
    else:
        sys.stdout.write(vkey + "\n")
