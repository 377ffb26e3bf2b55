"""Triton's interpreter in half of its time, with the same results."""

from typing import Any

from triton.runtime import interpreter

__all__ = ["patch_once"]


def patch_once() -> None:
    """Have it patch Triton's language once for each module, and leave it so.

    It does so at each call of each function, looking through all of the language, which takes longer than the kernels'
    own work on small tensors; and puts back only what the outermost call found.
    """
    patch, left, seen = interpreter._patch_lang, interpreter._LangPatchScope(), set[str]()

    def patched(function: Any) -> Any:
        if function.__module__ not in seen:
            seen.add(function.__module__)
            patch(function)
        return left  # which restores nothing

    interpreter._patch_lang = patched
