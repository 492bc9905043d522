"""The default corpus: text that ships with every Python; nothing is downloaded or stored.

It is the help topics of `pydoc_data.topics` (the language reference in plain text) and the sources,
docstrings included, of a fixed list of pure-Python modules that Python 3.11 to 3.13 have. About
8 MB. Whole modules are held out, so no held-out line has a twin from its own module in the
training part; the help topics, which quote each other, are all in the training part.
The text differs a little from one Python release to the next: `embedded_hash` tells which it is.
"""

import ast
import hashlib
import importlib.util
import sysconfig
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from transnormer.data.document import Document

Split = Literal["train", "heldout"]
_TOPICS = "pydoc_data.topics"
_TRAIN = """
__future__ _collections_abc _compat_pickle _markupbase _py_abc _pydecimal _pyio _sitebuiltins
_strptime _threading_local _weakrefset abc argparse ast asyncio.__main__ asyncio.base_events
asyncio.base_futures asyncio.base_subprocess asyncio.base_tasks asyncio.coroutines asyncio.events
asyncio.exceptions asyncio.format_helpers asyncio.futures asyncio.locks asyncio.proactor_events
asyncio.protocols asyncio.queues asyncio.runners asyncio.selector_events asyncio.sslproto
asyncio.staggered asyncio.streams asyncio.subprocess asyncio.taskgroups asyncio.tasks
asyncio.timeouts asyncio.transports asyncio.trsock asyncio.unix_events asyncio.windows_events
asyncio.windows_utils base64 bdb bz2 cmd code codecs codeop collections compileall
concurrent.futures concurrent.futures._base concurrent.futures.process concurrent.futures.thread
copy copyreg dataclasses datetime dis doctest email email._encoded_words
email._header_value_parser email._parseaddr email._policybase email.base64mime email.charset
email.contentmanager email.encoders email.errors email.feedparser email.generator email.header
email.headerregistry email.iterators email.message email.mime.audio email.mime.image
email.mime.multipart email.parser email.policy email.quoprimime email.utils enum filecmp fileinput
ftplib functools genericpath getopt gettext hashlib hmac html html.parser http http.client
http.cookiejar http.cookies http.server imaplib importlib importlib._bootstrap
importlib._bootstrap_external importlib.metadata importlib.metadata._adapters
importlib.metadata._functools importlib.metadata._itertools importlib.metadata._text
importlib.resources._adapters importlib.resources._common importlib.resources.abc
importlib.resources.readers importlib.resources.simple importlib.util inspect io ipaddress
linecache locale logging logging.config logging.handlers lzma mimetypes modulefinder
multiprocessing.connection multiprocessing.context multiprocessing.dummy
multiprocessing.dummy.connection multiprocessing.forkserver multiprocessing.heap
multiprocessing.managers multiprocessing.pool multiprocessing.popen_fork
multiprocessing.popen_forkserver multiprocessing.popen_spawn_posix
multiprocessing.popen_spawn_win32 multiprocessing.process multiprocessing.queues
multiprocessing.reduction multiprocessing.resource_sharer multiprocessing.resource_tracker
multiprocessing.shared_memory multiprocessing.sharedctypes multiprocessing.spawn
multiprocessing.synchronize multiprocessing.util netrc ntpath numbers operator optparse os pathlib
pdb pickle pickletools pkgutil platform poplib posixpath pprint profile pstats pty py_compile
pyclbr pydoc quopri random re re._compiler re._constants re._parser reprlib rlcompleter runpy
selectors shelve shutil signal site smtplib socket sqlite3 sqlite3.dbapi2 sqlite3.dump ssl stat
subprocess symtable sysconfig tabnanny tarfile tempfile threading tokenize traceback tracemalloc
turtle types typing unittest unittest._log unittest.async_case unittest.case unittest.loader
unittest.main unittest.mock unittest.result unittest.runner unittest.signals unittest.suite
unittest.util urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid
warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
wsgiref.types wsgiref.util wsgiref.validate xml.dom xml.dom.domreg xml.dom.expatbuilder
xml.dom.minicompat xml.dom.minidom xml.dom.pulldom xml.dom.xmlbuilder xml.etree
xml.etree.ElementInclude xml.etree.ElementPath xml.etree.ElementTree xml.sax xml.sax._exceptions
xml.sax.expatreader xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server
zipfile zipimport zoneinfo._common zoneinfo._tzpath zoneinfo._zoneinfo
"""
_HELDOUT = """
bisect calendar colorsys configparser contextlib csv difflib fnmatch fractions getpass glob
graphlib gzip heapq json json.decoder json.encoder json.scanner json.tool mailbox plistlib queue
sched secrets shlex socketserver statistics string textwrap timeit tomllib._parser tomllib._re
trace zipapp
"""


def embedded_modules(split: Split) -> tuple[str, ...]:
    """Return the fixed list of modules of "train" or "heldout", in order."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
    return tuple((_TRAIN if split == "train" else _HELDOUT).split())


@lru_cache(maxsize=2)
def embedded_documents(split: Split) -> list[Document]:
    """Return the documents of "train" or "heldout", always in the same order.

    Modules are read, not imported, from the directory of the running Python's standard library, so
    that a file of the same name elsewhere cannot take their place.

    Raises RuntimeError where this Python lacks a module's source (a Python cut down by its
    packager), naming all that it lacks.
    """
    documents = []
    missing = []
    for name in embedded_modules(split):
        path = _source_path(name)
        if path is None:
            missing.append(name)
        else:
            text = importlib.util.decode_source(path.read_bytes())
            documents.append(Document(name, text))
    if split == "train":
        path = _source_path(_TOPICS)
        if path is None:
            missing.append(_TOPICS)
        else:
            documents.extend(_topics(path))
    if missing:
        raise RuntimeError(
            f"the embedded corpus lacks {len(missing)} modules in this Python "
            f"({', '.join(missing[:5])}); expected Python 3.11 to 3.13 with its standard library "
            "in source form; use such a Python or set data.path to your own text"
        )
    return [document for document in documents if document.text]


def embedded_hash() -> str:
    """Return the sha256 of the names and texts of the whole embedded corpus, 64 hex digits."""
    digest = hashlib.sha256()
    for split in ("train", "heldout"):
        for name, text in embedded_documents(split):
            for part in (split, name, text):
                data = part.encode("utf-8")
                digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _source_path(name: str) -> Path | None:
    """Return the source file of a module, found without importing its parents."""
    first, *rest = name.split(".")
    search = [sysconfig.get_path("stdlib")]
    # The path finder, unlike importlib.util.find_spec, sees the file behind a frozen module.
    spec = PathFinder.find_spec(first, search)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _topics(path: Path) -> list[Document]:
    """Return the help topics: the file holds one assignment of a table of strings."""
    tree = ast.parse(importlib.util.decode_source(path.read_bytes()))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [Document(f"{_TOPICS}:{key}", topics[key]) for key in sorted(topics)]
    raise RuntimeError(f"{path} holds no table of topics; expected Python's own file")
