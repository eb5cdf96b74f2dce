"""`fastdml completion`: a script that completes commands, data sets, options and their choices.

tyro writes it, from types: the settings of each data set, and for the other commands a dataclass
made of their options. It needs Python on the PATH where it runs, but neither torch nor fastdml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastdml.cli.parsing import Parser, as_folder, parser_of
from fastdml.errors import require

Command = Callable[[list[str]], None]
SHELLS = ("bash", "zsh", "fish")
OF_SETTINGS = ("train", "config")  # commands that take DATA and its settings

# What tyro writes is changed where it knows nothing, such as for the folder of a run: files are
# offered then. In bash its function gives one empty word, and bash completes names of files only
# where there is none at all.
FILES_IN_BASH = """
_fastdml_or_files() {
  _tyro_fastdml "$@"
  if [[ ${#COMPREPLY[@]} -eq 1 && -z "${COMPREPLY[0]}" ]]; then COMPREPLY=(); fi
}
complete -o default -F _fastdml_or_files fastdml
"""
IN_ZSH = (
    'if [[ "$completions" == "__TYRO_COMPLETE_FILES__" ]]',
    'if [[ -z "$completions" || "$completions" == "__TYRO_COMPLETE_FILES__" ]]',
)
# In fish the program for Python goes through a pipe: it is longer than the 128 KiB that Linux
# allows one argument. The word that is being typed comes with the others.
IN_FISH = (
    """    set -l results ($python_cmd -c "$pycode" $words $current)
    if test "$results" = __TYRO_COMPLETE_FILES__""",
    """    set -l word (commandline -ct)
    set -l results (printf '%s\\n' "$pycode" | $python_cmd - $words "$word" $current)
    if test -z "$results" -o "$results" = __TYRO_COMPLETE_FILES__""",
)


def print_completion(args: list[str], command: Command, commands: Mapping[str, Command]) -> None:
    """`commands`: all there are by name, this `command` among them."""
    parser = Parser("completion", command)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        'bash: eval "$(fastdml completion bash)"             for good: in ~/.bashrc\n'
        "zsh:  fastdml completion zsh > FOLDER/_fastdml      a FOLDER of $fpath\n"
        "fish: fastdml completion fish > ~/.config/fish/completions/fastdml.fish"
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse(args).shell
    print(script(shell, commands))


def script(shell: str, commands: Mapping[str, Command]) -> str:
    tyro = require("tyro", "train")
    subcommands = []
    for name, command in commands.items():
        if name in OF_SETTINGS:
            kind: Any = object
            constructor = _of_settings(tyro, with_to=name == "config")
        else:
            kind, constructor = _of_options(tyro, name, parser_of(command)), None
        about = tyro.conf.subcommand(name, description=command.__doc__, constructor=constructor)
        subcommands.append(Annotated[kind, about])
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(
            functools.reduce(operator.or_, subcommands),
            prog="fastdml",
            args=["--tyro-write-completion", shell, "-"],
        )
    # A description that goes on in the next line of its source would be offered as a word.
    lines = written.getvalue().splitlines(keepends=True)
    text = "".join(
        line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC = ") else line
        for line in lines
    )
    if shell == "bash":
        return text + FILES_IN_BASH
    written_by_tyro, ours = IN_ZSH if shell == "zsh" else IN_FISH
    return text.replace(written_by_tyro, ours)


def _of_settings(tyro: Any, *, with_to: bool) -> Callable[..., None]:
    """A function whose argument is the settings of one of the data sets."""
    from fastdml.data import dataset_names
    from fastdml.train.config.sources import preset

    kinds = []
    for data in dataset_names():
        config = preset(data)
        if with_to:
            config = _with_to(config)
        kinds.append(Annotated[type(config), tyro.conf.subcommand(data, default=config)])

    def of_settings(settings: Any) -> None:
        """Never called: tyro reads its signature."""

    of_settings.__annotations__ = {
        "settings": tyro.conf.OmitArgPrefixes[
            tyro.conf.OmitSubcommandPrefixes[functools.reduce(operator.or_, kinds)]
        ]
    }
    return of_settings


def _with_to(config: Any) -> Any:
    """The settings with the option --to beside them."""
    kind = dataclasses.make_dataclass(
        type(config).__name__,
        [("to", Path | None, dataclasses.field(default=None))],
        bases=(type(config),),
        frozen=True,
        kw_only=True,
    )
    return kind(**config.to_dict())


def _of_options(tyro: Any, name: str, parser: Parser) -> type:
    """A dataclass with the options of a command; RUN and its like are files, to the shell."""
    fields = []
    for action in parser.options():
        option = action.option_strings[-1].removeprefix("--")
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        about = tyro.conf.arg(name=option, help=text)
        kind, default = _type_of(tyro, action)
        field = dataclasses.field(default=default)
        fields.append((f"option_{option.replace('-', '_')}", Annotated[kind, about], field))
    return dataclasses.make_dataclass(name, fields)


def _type_of(tyro: Any, action: argparse.Action) -> tuple[Any, Any]:
    """The type of an option's value, and a value of it."""
    if action.nargs == 0:
        return tyro.conf.FlagCreatePairsOff[bool], False
    if action.choices is not None:
        choices = tuple(action.choices)
        kind: Any = Literal.__getitem__(choices)
        default: Any = choices[0]
    else:
        kind, default = Path if action.type is as_folder else action.type or str, None
        kind = kind | None
    several = action.nargs in ("+", 2)
    return (tuple.__class_getitem__((kind, ...)), ()) if several else (kind, default)
