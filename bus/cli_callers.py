"""`aal token` and `aal secret`: who may call over HTTP, and which overlays get which secrets. A server follows."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bus.console import AsJson, err, make_app, mark, print_json, print_table, printable, say, workplace
from bus.model import Phase

if TYPE_CHECKING:
    from bus.secrets import Secrets
    from bus.tokens import Token, Tokens

tokens = make_app("Make, list and revoke the tokens of callers; a running server follows.")
secrets = make_app("Set secrets, and say which overlays may have them; a running server follows.")

_USUAL_PHASES = ",".join(phase for phase in Phase if phase is not Phase.ASCEND)

Read = TypeVar("Read")


def _read(read: Callable[..., Read], given: Any, option: str, *more: Any) -> Read:  # noqa: ANN401
    """What `read` makes of an argument; its `ValueError` is told as wrong usage."""
    try:
        return read(given, *more)
    except ValueError as error:
        raise typer.BadParameter(printable(str(error)), param_hint=option) from None


def _split(text: str) -> list[str]:
    return [member.strip() for member in text.split(",")]


def _note(text: str) -> None:
    """A line for people beside what a command prints, on stderr: stdout can be taken as it is."""
    err().print(printable(text), style="dim", soft_wrap=True)


# --- aal token ---------------------------------------------------------------------------------------------------


def _tokens(ctx: typer.Context) -> "Tokens":
    from bus.tokens import Tokens

    return Tokens(workplace(ctx).settings().state)


@tokens.command()
def create(
    ctx: typer.Context,
    *,
    name: Annotated[str, typer.Option(metavar="NAME", help="What records call the caller.")],
    overlays: Annotated[
        str, typer.Option(metavar="GLOB,...", help="Patterns of the overlays that it may call; * is all.")
    ] = "*",
    phases: Annotated[
        str, typer.Option(metavar="PHASE,...", help="Phases that it may call in; default: all but ASCEND.")
    ] = _USUAL_PHASES,
    scopes: Annotated[
        str, typer.Option(metavar="SCOPE,...", help="Of invoke, read-ledger, replay, admin; default: invoke.")
    ] = "invoke",
    rate: Annotated[
        str | None, typer.Option(metavar="N/s|N/m|N/h", help="Calls that it may make; default: any number.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="30d|DATE", help="A span (h, d, w) or a time in UTC; default: never.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token, and print it: this once, since only its SHA-256 is kept.

    From the first one on each request over HTTP needs one, from this machine too.

    Example: aal token create --name ci --overlays 'psyfi,fin-*' --phases OPEN,CLEAR --rate 10/s --expires 30d
    """
    from bus import tokens as form

    kept = _tokens(ctx)
    is_first = not kept.all()
    token, text = kept.create(
        _read(form.read_name, name, "--name"),
        overlays=_read(form.read_overlays, _split(overlays), "--overlays"),
        phases=_read(form.read_phases, _split(phases.upper()), "--phases"),
        scopes=_read(form.read_scopes, _split(scopes), "--scopes"),
        rate=None if rate is None else _read(form.read_rate, rate, "--rate"),
        expires=None if expires is None else _read(form.read_expiry, expires, "--expires", datetime.now(UTC)),
    )
    if as_json:
        print_json({"token": text} | token.shown())
        return
    sys.stdout.write(text + "\n")
    _note(f"The token {token.name} is shown this once. Callers send it as  Authorization: Bearer TOKEN")
    if is_first:
        _note("It is the first one: from now on each request over HTTP needs a token, from this machine too.")


@tokens.command("list")
def list_tokens(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every token and what it allows, never the token itself.

    Example: aal token list
    """
    kept = _tokens(ctx).all()
    if as_json:
        print_json({"tokens": [token.shown() for token in kept]})
        return
    columns = ("name", "overlays", "phases", "scopes", "rate", "created", "expires")
    print_table(columns, (_row(token, datetime.now(UTC)) for token in kept))
    if not kept:
        say("no tokens; whoever reaches the server from this machine may call", "dim")


def _row(token: "Token", now: datetime) -> tuple[object, ...]:
    shown = token.shown()
    is_over = token.expires is not None and token.expires <= now
    return (
        token.name,
        *(", ".join(shown[name]) for name in ("overlays", "phases", "scopes")),
        shown["rate"] or "any",
        shown["created"],
        mark("fail", f"{shown['expires']} (over)") if is_over else shown["expires"] or "never",
    )


@tokens.command()
def revoke(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The token's name.")],
    as_json: AsJson = False,
) -> None:
    """End a token; the next request with it is refused.

    Example: aal token revoke ci
    """
    left = _tokens(ctx).revoke(name)
    if as_json:
        print_json({"name": name, "left": len(left)})
        return
    say(f"revoked {name}", "green")
    if not left:
        _note("It was the last one: from now on whoever reaches the server from this machine may call.")


# --- aal secret --------------------------------------------------------------------------------------------------

SecretName = Annotated[str, typer.Argument(metavar="NAME", help="The secret's name, and that of its variable.")]
OverlayName = Annotated[str, typer.Argument(metavar="OVERLAY", help="The overlay's name.")]


def _secrets(ctx: typer.Context) -> "Secrets":
    from bus.secrets import Secrets

    settings = workplace(ctx).settings()
    return Secrets(settings.state, settings.secrets)


@secrets.command("set")
def set_(
    ctx: typer.Context,
    *,
    name: SecretName,
    overlays: Annotated[
        list[str] | None, typer.Option("--overlay", metavar="OVERLAY", help="Who may have it; may be repeated.")
    ] = None,
    from_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Keep no value, but the bus's variable that has it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set a secret, or set it anew; its value is read from stdin, or asked for, and never an argument.

    An overlay gets it as an environment variable where its manifest lists the name in secrets, and it may have it.

    Example: aal secret set API_KEY --overlay psyfi < key.txt
    """
    from bus import secrets as form
    from bus.redaction import LEAST

    kept = _secrets(ctx)
    _read(form.read_name, name, "NAME")
    allowed = [_read(form.read_overlay, overlay, "--overlay") for overlay in overlays or ()]
    if from_env is not None:
        kept.set(name, allowed, env=_read(form.read_variable, from_env, "--from-env"))
    else:
        value = _read(form.read_value, _value(name), "the value")
        kept.set(name, allowed, value=value)
        if len(value) < LEAST:
            _note(f"It has less than {LEAST} characters: too short to be told from other text in logs and records.")
    _print_secret(kept, name, as_json)


def _value(name: str) -> str:
    """From a terminal unseen, and twice; else all of stdin, without the line break at its end."""
    if sys.stdin.isatty():
        given: str = typer.prompt(f"Value of {name}", hide_input=True, confirmation_prompt=True, err=True)
        return given
    text = sys.stdin.buffer.read()
    try:
        return text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise typer.BadParameter("not UTF-8", param_hint="the value") from None


def _print_secret(kept: "Secrets", name: str, as_json: bool) -> None:
    """A secret as it is after a change."""
    shown = next(secret.shown() for secret in kept.all() if secret.name == name)
    if as_json:
        print_json(shown)
        return
    say(f"{name}: {', '.join(shown['overlays']) or 'no overlay'} may have it", "green")
    if not shown["overlays"]:
        _note(f"aal secret allow {name} OVERLAY lets an overlay have it.")


@secrets.command("list")
def list_secrets(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every secret, where its value is, and which overlays may have it; never a value.

    Example: aal secret list
    """
    found = [secret.shown() for secret in _secrets(ctx).all()]
    if as_json:
        print_json({"secrets": found})
        return
    columns = ("name", "set in", "value", "overlays")
    print_table(
        columns,
        (
            (one["name"], one["source"], f"variable {one['env']}" if one["env"] else "kept", ", ".join(one["overlays"]))
            for one in found
        ),
    )
    if not found:
        say("no secrets; aal secret set NAME sets one", "dim")


@secrets.command()
def allow(ctx: typer.Context, name: SecretName, overlay: OverlayName, as_json: AsJson = False) -> None:
    """Let an overlay have a secret.

    Example: aal secret allow API_KEY psyfi
    """
    from bus.secrets import read_overlay

    kept = _secrets(ctx)
    kept.allow(name, _read(read_overlay, overlay, "OVERLAY"))
    _print_secret(kept, name, as_json)


@secrets.command()
def deny(ctx: typer.Context, name: SecretName, overlay: OverlayName, as_json: AsJson = False) -> None:
    """Let an overlay no longer have a secret.

    Example: aal secret deny API_KEY psyfi
    """
    kept = _secrets(ctx)
    kept.deny(name, overlay)
    _print_secret(kept, name, as_json)


@secrets.command()
def remove(ctx: typer.Context, name: SecretName, as_json: AsJson = False) -> None:
    """Forget a secret, its value and who may have it.

    Example: aal secret remove API_KEY
    """
    _secrets(ctx).remove(name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        say(f"removed {name}", "green")
