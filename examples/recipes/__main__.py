"""`python -m examples.recipes`: which recipes there are."""

import argparse
import ast
from pathlib import Path

from . import __doc__ as told

HERE = Path(__file__).parent


def recipes() -> dict[str, str]:
    """What each learns, by name; nothing is imported, since some need packages of their own."""
    files = {path.stem: ast.parse(path.read_text()) for path in sorted(HERE.glob("*.py"))}
    lines = {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in files.items()}
    return {name: line for name, line in lines.items() if name not in ("__init__", "__main__", "fit")}


if __name__ == "__main__":
    argparse.ArgumentParser("python -m examples.recipes", description=told).parse_args()
    print(*(f"python -m examples.recipes.{name:<12} {line}" for name, line in recipes().items()), sep="\n")
