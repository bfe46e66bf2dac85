"""The one kind of error a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, said in one line: what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2.
    """
