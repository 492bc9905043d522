"""What some names of the package need, written as one file; see ``flatten``."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping

from transnormer.hf.flatten import (
    PACKAGE,
    Module,
    Outer,
    Target,
    edited,
    source_file,
    without_kernels,
)

# The name space of the file's ops: another one each time it is loaded, since torch knows ops by name.
_NAMESPACE = "OPS"
_HEAD = f"""import uuid

{_NAMESPACE} = f"{PACKAGE}_{{uuid.uuid4().hex}}"
"""

Rewrite = Callable[[Module, ast.stmt], str | None]


class Bundle:
    """The definitions that some names need, module by module."""

    def __init__(self, moved: Mapping[str, str], rewrites: Mapping[Target, Rewrite]) -> None:
        """Begin with nothing.

        Args:
            moved: modules that stand in for others, by the others' names.
            rewrites: for a top name, what gives its statement another text.
        """
        self._moved, self._rewrites = moved, rewrites
        self._modules: dict[str, Module] = {}
        # In the order in which they can be executed.
        self._order: list[str] = []
        self._taken: set[tuple[str, int]] = set()
        self._outer: dict[str, str] = {}

    def module(self, name: str) -> Module:
        """A module of the package, parsed, its rewritten statements in place."""
        if name not in self._modules:
            file = source_file(name)
            assert file is not None, name
            module = Module(name, file.read_text(encoding="utf-8"), self._moved)
            edits = []
            for target, rewrite in self._rewrites.items():
                index = module.names.get(target.name or "")
                if target.module == name and isinstance(index, int):
                    statement = module.statements[index]
                    text = rewrite(module, statement)
                    if text is not None:
                        edits.append((*module.span(statement), text))
            if edits:
                module = Module(name, edited(module.data, edits), self._moved)
            self._modules[name] = module
        return self._modules[name]

    def resolve(self, target: Target | Outer) -> Target | Outer:
        """Where a name is defined, through the modules that pass it on."""
        while isinstance(target, Target) and target.name is not None:
            found = self.module(target.module).names.get(target.name)
            if isinstance(found, int):
                return target
            inner = f"{target.module}.{target.name}"
            inner = self._moved.get(inner, inner)
            # A package's own name wins over a module of its folder.
            if found is None and source_file(inner) is None:
                raise ValueError(f"{target.module} has no {target.name}; expected a top name")
            target = Target(inner, None) if found is None else found
        return target

    def add(self, target: Target) -> None:
        """Take a name's definition, and whatever it needs."""
        todo = [target]
        while todo:
            found = self.resolve(todo.pop())
            if isinstance(found, Outer):
                self._import(found)
                continue
            module = self.module(found.module)
            index = module.names.get(found.name or "")
            wanted = {index} if isinstance(index, int) else set()
            if (found.module, -1) not in self._taken:
                self._taken.add((found.module, -1))
                wanted |= set(module.effects())
            for at in sorted(wanted):
                if (found.module, at) not in self._taken:
                    self._taken.add((found.module, at))
                    todo += self._needs(module, at)

    def _import(self, outer: Outer) -> None:
        local = outer.line.split()[-1].split(".")[0]
        if self._outer.setdefault(local, outer.line) != outer.line:
            self._outer[local] = min(self._outer[local], outer.line, key=len)
            pair = {outer.line, self._outer[local]}
            if any(" as " in line or line.startswith("from ") for line in pair):
                raise ValueError(f"{local} is imported in two ways: {sorted(pair)}")

    def _meaning(
        self, module: Module, name: str, attribute: str | None, local: Target | Outer | None
    ) -> Target | Outer | None:
        """What a use means; None for builtins, names of the file's own scopes and outer imports."""
        found = local if local is not None else module.names.get(name)
        if isinstance(found, int):
            return Target(module.name, name)
        if found is None or (isinstance(found, Target) and not _is_plain(found)):
            return None
        found = self.resolve(found)
        if isinstance(found, Target) and found.name is None and attribute is not None:
            found = self.resolve(Target(found.module, attribute))
        return found

    def _needs(self, module: Module, index: int) -> list[Target]:
        needs = []
        for use in module.uses(index).uses:
            found = self._meaning(module, use.name, use.attribute, use.local)
            if isinstance(found, Outer) and use.local is None:
                self._import(found)
            elif isinstance(found, Target):
                needs.append(found)
        return needs

    def _sort(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            if name in self._order or name.startswith("-"):
                continue
            self._order.append(f"-{name}")
            module = self.module(name)
            inner = [x for x in module.names.values() if isinstance(x, Target)]
            resolved = [self.resolve(x) for x in inner if _is_plain(x)]
            below = {x.module for x in resolved if isinstance(x, Target)}
            self._sort(x for x in below if (x, -1) in self._taken and f"-{x}" not in self._order)
            self._order[self._order.index(f"-{name}")] = ""
            self._order.append(name)

    def text(self) -> str:
        """The file without its docstring: imports, then the definitions of each module."""
        taken = {name for name, _ in self._taken}
        self._sort(taken)
        order = [name for name in self._order if name]
        flat = self._flat_names(order)
        parts = []
        for name in order:
            module = self.module(name)
            texts = [
                self._statement(module, at, flat)
                for at in range(len(module.statements))
                if (name, at) in self._taken
            ]
            if texts:
                parts.append(f"# {name}\n\n" + "\n\n\n".join(texts))
        lines = sorted(self._outer.values(), key=lambda x: (x.startswith("from"), x))
        return "\n".join([*lines, _HEAD]) + "\n\n" + "\n\n\n".join(parts) + "\n"

    def _flat_names(self, order: list[str]) -> dict[Target, str]:
        """The name of each definition in the file: its own, or with its module's where two share it."""
        found: dict[str, list[Target]] = {}
        for name in order:
            module = self.module(name)
            for own, index in module.names.items():
                if isinstance(index, int) and (name, index) in self._taken:
                    found.setdefault(own, []).append(Target(name, own))
        flat = {}
        for own, targets in found.items():
            shared = len(targets) > 1 or own in self._outer
            for target in targets:
                module_name = "_".join(target.module.split(".")[1:])
                flat[target] = f"{own}__{module_name}" if shared and own != "_" else own
        return flat

    def _statement(self, module: Module, index: int, flat: Mapping[Target, str]) -> str:
        """The text of a statement with its names replaced by those of the file."""
        statement = module.statements[index]
        begin, end = module.span(statement)
        edits: dict[tuple[int, int], str] = {}
        uses = module.uses(index)
        for use in uses.uses:
            found = self._meaning(module, use.name, use.attribute, use.local)
            if not isinstance(found, Target):
                continue
            whole = use.attribute is not None and found.name == use.attribute
            whole = whole and module.names.get(use.name) != module.names.get(found.name or "")
            node: ast.AST = use.node
            if use.attribute is not None and not whole:
                assert isinstance(node, ast.Attribute)
                node = node.value
            edits[module.span(node)] = flat[found]
        for place in uses.imports:
            text = without_kernels(place)
            if text is not None:
                edits[module.span(place)] = text
        inside = [(a - begin, b - begin, text) for (a, b), text in edits.items()]
        text = edited(module.data[begin:end], inside)
        own = getattr(statement, "name", None)
        if own is not None:
            new = flat[Target(module.name, own)]
            text = re.sub(rf"^((?:def|class) ){own}\b", rf"\g<1>{new}", text, count=1, flags=re.M)
        return module.comment_before(statement) + _own_ops(text)


def _is_plain(target: Target) -> bool:
    """Whether a name is not about kernels, which the file does not hold."""
    return "triton_" not in f"{target.module}.{target.name}"


def _own_ops(text: str) -> str:
    """The text with the package's name space of ops replaced by the file's."""
    text = re.sub(rf'(?<!\w)f?"{PACKAGE}::', f'f"{{{_NAMESPACE}}}::', text)
    text = text.replace(f'Library("{PACKAGE}",', f"Library({_NAMESPACE},")
    return text.replace(f"torch.ops.{PACKAGE}", f"getattr(torch.ops, {_NAMESPACE})")
