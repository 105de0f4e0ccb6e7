"""`chatkore completion`: what a shell has to be told to complete our commands, options and files."""

import click
from click.shell_completion import get_completion_class

from chatkore_async.cli._options import debug_option
from chatkore_async.cli._problems import Problem

SHELLS = ("bash", "zsh", "fish")


@debug_option
@click.command(
    epilog="""\b
Examples:
  eval "$(chatkore completion bash)"     in ~/.bashrc
  eval "$(chatkore completion zsh)"      in ~/.zshrc
  chatkore completion fish > ~/.config/fish/completions/chatkore.fish"""
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the code that lets a shell complete commands, options and files.

    Each completion asks `chatkore` itself, so that the code does not change with its version.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    try:
        source = kind(ctx.find_root().command, {}, "chatkore", "_CHATKORE_COMPLETE").source()
    except RuntimeError as error:  # a bash older than 4.4, as macOS has it
        raise Problem(str(error), "zsh and fish need nothing newer") from error
    click.echo(source)
