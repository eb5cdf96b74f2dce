"""`fastdml config`: the settings of a run as a file to edit."""

from __future__ import annotations

from fastdml.cli.train import train_config
from fastdml.errors import InputError
from fastdml.names import advice
from fastdml.paths import expanded


def config(args: list[str]) -> None:
    """print all settings of a data set as YAML with comments, for --config of train"""
    from fastdml.data import dataset_names

    known = dataset_names()
    if not args or args[0] in ("-h", "--help"):
        print(
            f"usage: fastdml config {{{','.join(known)}}} [--to FILE] [OPTIONS]\n\n"
            "Prints all settings with their defaults for this data, or writes them to FILE. The "
            f"options are\nthose of fastdml train, and change what is printed: fastdml train "
            f"{known[0]} --help"
        )
        return
    data, *options = args
    if data not in known:
        raise InputError(f"no settings for {data!r}; {advice(data, known)}")
    options, to = take_to(options)
    settings = train_config(data, options)

    from fastdml.files import write_atomically
    from fastdml.train.config.commented import commented_yaml

    text = commented_yaml(settings)
    if to is None:
        print(text, end="")
        return
    path = expanded(to)
    if path.exists():
        raise InputError(f"{path} is there already: remove it, or give another name")
    write_atomically(path, text)
    print(path)


def take_to(options: list[str]) -> tuple[list[str], str | None]:
    """The options without `--to FILE` or `--to=FILE`, and the file. Raises InputError where its
    name is missing."""
    rest, to, waiting = [], None, False
    for option in options:
        if waiting:
            to, waiting = option, False
        elif option == "--to":
            waiting = True
        elif option.startswith("--to="):
            to = option.removeprefix("--to=")
        else:
            rest.append(option)
    if waiting or to == "" or (to and to.startswith("--")):
        raise InputError("--to needs the name of a file")
    return rest, to
