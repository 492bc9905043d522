"""One Python file out of the modules of a package: what some names need, and nothing else.

The text of each definition stays as it is written, comments included; only names that two modules
use differently, or that an import renames, are replaced. What has effects when a module is imported
(registrations of ops) comes along with anything of its module.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "transnormer"
_ROOT = Path(__file__).parents[2]
_NO_KERNELS = 'raise RuntimeError("an exported file has no kernels")'


class Target(NamedTuple):
    """What a name means: an attribute of a module of the package, or the module itself (None)."""

    module: str
    name: str | None


class Outer(NamedTuple):
    """A name of another package: the line that imports it."""

    line: str


class Module:
    """A parsed module: its text, its statements, and what each of its top names means."""

    def __init__(self, name: str, text: str, moved: Mapping[str, str]) -> None:
        self.name, self.data = name, text.encode()
        # Offsets of lines in bytes, which is how the parser counts columns.
        self._starts = [0]
        for line in self.data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.statements = ast.parse(text).body
        self._moved, self._uses = moved, dict[int, _Uses]()
        self.names: dict[str, int | Target | Outer] = {}
        for index, statement in enumerate(self.statements):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.names.update(meanings(statement, moved))
            else:
                self.names.update(dict.fromkeys(_stored(statement), index))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends in the text, in bytes; decorators belong to it."""
        place: Any = node
        first = min([place, *getattr(node, "decorator_list", [])], key=lambda x: x.lineno)
        # A decorator begins after its sign.
        begin = self._starts[first.lineno - 1] + (place.col_offset if first is place else 0)
        return begin, self._starts[place.end_lineno - 1] + place.end_col_offset

    def segment(self, node: ast.AST) -> str:
        """The text of a node."""
        begin, end = self.span(node)
        return self.data[begin:end].decode()

    def comment_before(self, statement: ast.stmt) -> str:
        """The lines of comment right above a statement."""
        begin, _ = self.span(statement)
        index = self._starts.index(begin)
        lines: list[str] = []
        while index and self.data[self._starts[index - 1] :].startswith(b"#"):
            index -= 1
            lines.insert(0, self.data[self._starts[index] : self._starts[index + 1]].decode())
        return "".join(lines)

    def uses(self, index: int) -> "_Uses":
        """The uses in a statement, and the imports inside it."""
        if index not in self._uses:
            self._uses[index] = _Uses(self._moved)
            self._uses[index].visit(self.statements[index])
        return self._uses[index]

    def effects(self) -> Iterator[int]:
        """The statements that do something besides giving names a meaning."""
        for index, statement in enumerate(self.statements):
            decorators = [ast.unparse(x) for x in getattr(statement, "decorator_list", [])]
            registers = any("register_" in x or "torch.library" in x for x in decorators)
            call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            loop = isinstance(statement, ast.For | ast.While | ast.With | ast.Delete)
            if registers or call or loop:
                yield index


def source_file(module: str) -> Path | None:
    """The file of a module of the package; None where there is no such module."""
    path = _ROOT.joinpath(*module.split("."))
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def meanings(
    statement: ast.Import | ast.ImportFrom, moved: Mapping[str, str]
) -> dict[str, Target | Outer]:
    """What the names of an import mean; ``moved`` names modules that stand in for others."""
    found: dict[str, Target | Outer] = {}
    for alias in statement.names:
        local = alias.asname or alias.name.split(".")[0]
        renamed = f" as {alias.asname}" if alias.asname else ""
        if isinstance(statement, ast.Import):
            found[local] = Outer(f"import {alias.name}{renamed}")
            continue
        module = moved.get(statement.module or "", statement.module or "")
        if module.split(".")[0] != PACKAGE:
            found[local] = Outer(f"from {module} import {alias.name}{renamed}")
        else:
            found[local] = Target(module, alias.name)
    return found


def _stored(node: ast.AST) -> set[str]:
    """Names that a statement gives a meaning in its own scope."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return {x.target.id for x in ast.walk(node) if isinstance(x, ast.NamedExpr)}
    found = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ExceptHandler) and node.name:
        found.add(node.name)
    if isinstance(node, ast.Import | ast.ImportFrom):
        found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    for child in ast.iter_child_nodes(node):
        found |= _stored(child)
    return found


class Use(NamedTuple):
    """A place where a statement names something of its module's top."""

    node: ast.AST
    name: str
    attribute: str | None
    local: Target | Outer | None


class _Uses(ast.NodeVisitor):
    """Finds the uses in one statement of a module, scope by scope."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self.uses: list[Use] = []
        self.imports: list[ast.ImportFrom | ast.Import] = []
        self._moved = moved
        # Names that each scope around the present place gives a meaning of its own.
        self._scopes: list[dict[str, Target | Outer | None]] = []

    def _meaning(self, name: str) -> tuple[bool, Target | Outer | None]:
        """Whether a name is of the module's top, or of an import inside, and which."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name] is not None, scope[name]
        return True, None

    def _use(self, node: ast.AST, name: str, attribute: str | None) -> None:
        visible, local = self._meaning(name)
        if visible:
            self.uses.append(Use(node, name, attribute, local))

    def visit_Name(self, node: ast.Name) -> None:
        self._use(node, node.id, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self._use(node, node.value.id, node.attr)
        else:
            self.visit(node.value)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.imports.append(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.imports.append(node)

    def _inside(self, names: dict[str, Target | Outer | None], nodes: Iterable[ast.AST]) -> None:
        self._scopes.append(names)
        for node in nodes:
            self.visit(node)
        self._scopes.pop()

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *filter(None, (node.args.vararg, node.args.kwarg)),
        ]
        for x in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(x)
        for argument in arguments:
            if argument.annotation is not None:
                self.visit(argument.annotation)
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        names: dict[str, Target | Outer | None] = dict.fromkeys(a.arg for a in arguments)
        for statement in body:
            names |= dict.fromkeys(_stored(statement))
        for statement in (x for part in body for x in _imports_in(part)):
            names |= meanings(statement, self._moved)
        self._inside(names, body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        if node.returns is not None:
            self.visit(node.returns)
        self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for x in (*node.decorator_list, *node.bases, *(k.value for k in node.keywords)):
            self.visit(x)
        own = {name for statement in node.body for name in _stored(statement)}
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                # A class's names are not those of the functions inside it.
                self.visit(statement)
            else:
                self._inside(dict.fromkeys(own), [statement])

    def _comprehension(self, node: ast.AST) -> None:
        targets = [x.target for x in ast.walk(node) if isinstance(x, ast.comprehension)]
        names = {name for target in targets for name in _stored(target)}
        self._inside(dict.fromkeys(names), ast.iter_child_nodes(node))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _imports_in(node: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
    """Imports of a function's own scope."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    elif not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _imports_in(child)


def edited(data: bytes, edits: Iterable[tuple[int, int, str]]) -> str:
    """Text with spans replaced, which do not overlap; offsets are in bytes."""
    for start, end, replacement in sorted(edits, reverse=True):
        data = data[:start] + replacement.encode() + data[end:]
    return data.decode()


def without_kernels(statement: ast.ImportFrom | ast.Import) -> str | None:
    """What stands in the place of an import inside a function; None leaves it."""
    module = getattr(statement, "module", None) or ""
    if any("triton" in x for x in (module, *(alias.name for alias in statement.names))):
        return _NO_KERNELS
    return "pass" if module.split(".")[0] == PACKAGE else None
