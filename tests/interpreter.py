"""Triton's interpreter, without the third of its time in which it does again what it has done."""

import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import cache
from typing import Any


def patch_language_once_a_launch() -> None:
    """Let a function that a kernel calls find the language as the kernel's launch has patched it.

    The interpreter replaces what `triton.language` holds for a launch and puts it back after it. It
    replaces it at every call of a function within as well, by a walk through some hundred names of
    which none is left to replace. Other versions of the interpreter are left as they are.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set()

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    @cache
    def languages_of(fn: Callable[..., Any]) -> frozenset[str]:
        modules = filter(inspect.ismodule, fn.__globals__.values())
        return frozenset(x.__name__ for x in modules if x in (language, language.core))

    def patch_what_is_not(fn: Callable[..., Any]) -> object:
        wanted = languages_of(fn)
        if wanted and wanted <= patched:
            # Of a call within a launch, whose scope nobody asks for.
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.update(wanted)
        return scope

    interpreter._LangPatchScope = Launch
    interpreter._patch_lang = patch_what_is_not
