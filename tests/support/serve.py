"""`kvstore`, with limits changed first: `python -m tests.support.serve NAME=VALUE... serve ...`.

For limits that no test can wait for. A limit is changed in every module that has taken it in.
"""

from __future__ import annotations

import ast
import sys

from kvstore import app, cli, limits


def main(words: list[str]) -> int:
    while words and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert hasattr(limits, name), f"no limit is called {name}"
        for module in [module for key, module in sys.modules.items() if key.startswith("kvstore")]:
            if hasattr(module, name):
                setattr(module, name, ast.literal_eval(value))
    return cli.main(words)


if __name__ == "__main__":
    assert app
    raise SystemExit(main(sys.argv[1:]))
