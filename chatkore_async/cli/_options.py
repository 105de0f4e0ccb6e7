"""Options that commands have in common."""

import click

_DEBUG = "chatkore_async.cli.debug"


def debug_option(command: click.Command) -> click.Command:
    """Give a command `--debug`, which means the same before and after the command's name."""
    option = click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        # Eager, so that it counts for what is wrong with the other options too.
        is_eager=True,
        help="Show the traceback of an error.",
        callback=_remember,
    )
    command.params.append(option)
    return command


def is_debugging(ctx: click.Context) -> bool:
    """Tell whether `--debug` was given, wherever."""
    return _DEBUG in ctx.meta


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click calls it so
    # click shares `meta` between the context of a group and those of its commands.
    if value:
        ctx.meta[_DEBUG] = True
