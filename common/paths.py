"""Paths as people type them: `~` for a home folder, and folders whose names look like patterns."""

import os
import re


def path(text):
    """argparse type of every flag that names a file, a folder, a hub name, a pattern or an address.

    `~` and `~user` become the home folder where a path can begin: at the start, after the @ of a file of prompts, and
    at the start of a part of a brace pattern that begins the text. The shell of a `pipe:` command expands its own.
    """
    beginnings = r"(^|[{,])" if text.startswith("{") else r"(^@?)"
    return re.sub(beginnings + r"(~[^/,{}]*)", lambda found: found[1] + os.path.expanduser(found[2]), text)


def labelled_path(text):
    """`path` of `PATH` or `LABEL=PATH`."""
    whole = path(text)
    label, separator, rest = text.partition("=")
    return whole if os.path.exists(whole) or not separator else f"{label}={path(rest)}"


def prompt(text):
    """A prompt as it is, `path` of `@FILE`."""
    return path(text) if text.startswith("@") else text


def literal_folder(pattern):
    """(the longest leading folder that exists as it is written, with its slash; the rest, which may be a pattern)."""
    ends = [found.end() for found in re.finditer("/", pattern)]
    end = next((end for end in reversed(ends) if os.path.isdir(pattern[:end])), 0)
    return pattern[:end], pattern[end:]
