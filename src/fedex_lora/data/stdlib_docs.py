"""English sentences from the docstrings of the running Python's standard library, by area.

Real text that every installation holds: six classes, told apart by what the module is for. The
source files are parsed, never imported. The result depends on the Python version alone.
"""

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from fedex_lora.errors import RecipeError

AREAS: dict[str, str] = {
    "networking": """
        asynchat asyncore cgi cgitb ftplib http imaplib ipaddress mailcap netrc nntplib nturl2path
        poplib smtpd smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc
        uuid asyncio/sslproto asyncio/streams asyncio/transports asyncio/protocols
        asyncio/selector_events asyncio/proactor_events asyncio/base_events mailbox""",
    "concurrency": """
        _threading_local asyncio concurrent contextvars multiprocessing queue sched selectors
        signal subprocess threading""",
    "numbers and dates": """
        _pydatetime _pydecimal _pylong _strptime bisect calendar colorsys datetime decimal
        fractions heapq numbers random secrets statistics timeit zoneinfo""",
    "files": """
        _compression _pyio aifc bz2 chunk compression dbm filecmp fileinput fnmatch genericpath
        glob gzip imghdr io linecache lzma mimetypes ntpath os pathlib posixpath shelve shutil
        sndhdr stat sunau tarfile tempfile wave zipapp zipfile""",
    "text": """
        _markupbase argparse base64 codecs configparser csv difflib email encodings getopt gettext
        html json locale optparse plistlib pprint quopri re reprlib shlex string stringprep
        textwrap tomllib uu xml""",
    "code": """
        _pyrepl abc ast bdb cProfile code codeop compileall contextlib copy copyreg dataclasses
        dis distutils doctest ensurepip enum functools importlib inspect keyword lib2to3
        modulefinder opcode operator pdb pickle pickletools pkgutil profile pstats py_compile
        pyclbr pydoc runpy symtable sysconfig tabnanny token tokenize trace traceback types typing
        unittest venv warnings weakref zipimport""",
}
"""Which modules and packages (`package/module` for a single file) belong to which area; a file
belongs to the longest entry that names it, and what a version lacks is passed over."""

LABELS: tuple[str, ...] = tuple(AREAS)
"""The names of the classes, in the order of their numbers."""

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
FEWEST_PER_CLASS = 20
HELD_OUT = 0.15  # of each class, for validation and again for test
SEED = 0  # of the choice and the split: the data are the same for every run

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[\"'(]?[A-Za-z][A-Za-z'-]*[\"')]?[.,;:!?]?[\"')]?")
_CODE_OR_LIST = re.compile(r">>>|->|^\s+\S|^[:@*+-]", re.MULTILINE)  # in a paragraph
_NOT_PROSE = re.compile(r"\w\([^)]*[=,]|==|\s=\s|[=<>{}\[\]|\\^~#*`]{3}")  # in a sentence


@cache  # a comparison of methods loads its data again for every run
def stdlib_docs() -> dict[str, Dataset]:
    """The sentences, cleaned, without duplicates, with equally many of each class.

    A sentence has 5 to 40 words. One that occurs in two areas is in neither, as its label would
    be a matter of chance.

    Returns:
        `train`, `validation` and `test`, disjoint, with columns `text` (str) and `label` (int,
        an index into `LABELS`).

    Raises:
        UserError: This Python has no sources of its standard library.
    """
    found = _unambiguous(
        [
            [s for file in _files(area) for text in _docstrings(file) for s in sentences(text)]
            for area in LABELS
        ]
    )
    count = min(len(sentences) for sentences in found)
    if count < FEWEST_PER_CLASS:
        raise RecipeError(
            f"data.source stdlib-docs: only {count} sentences of the area "
            f"'{LABELS[[len(s) for s in found].index(count)]}' were found in "
            f"{sysconfig.get_path('stdlib')}; this Python seems to come without the source files "
            "of its standard library. Use another Python, or data of your own (data.path)."
        )
    chosen = [random.Random(SEED).sample(s, count) for s in found]
    held_out = max(1, int(HELD_OUT * count))
    bounds = {
        "train": slice(2 * held_out, None),
        "validation": slice(0, held_out),
        "test": slice(held_out, 2 * held_out),
    }
    return {
        name: _dataset([(s, label) for label, group in enumerate(chosen) for s in group[part]])
        for name, part in bounds.items()
    }


def sentences(docstring: str) -> list[str]:
    """The sentences of plain prose in a docstring: no code, no lists, no signatures.

    Example:
        >>> sentences("spam(x) -> y\\n\\nReturn the file as a\\nlist of lines. Too short.")
        ['Return the file as a list of lines.']
    """
    candidates = [
        sentence
        for paragraph in re.split(r"\n\s*\n", docstring)
        if not _CODE_OR_LIST.search(paragraph)
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
    ]
    return [sentence for sentence in candidates if _is_prose(sentence)]


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    plain = sum(bool(_WORD.fullmatch(word)) for word in words)
    ends = sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
    fits = 5 <= len(words) <= 40 and plain >= 0.8 * len(words)
    return ends and fits and not _NOT_PROSE.search(sentence)


def _files(area: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    entries = AREAS[area].split()
    files = [file for entry in entries for file in _files_of(root, entry)]
    elsewhere = {
        root / f"{entry}.py"
        for other in LABELS
        if other != area
        for entry in AREAS[other].split()
        if "/" in entry
    }
    return sorted(set(files) - elsewhere)


def _files_of(root: Path, entry: str) -> Iterator[Path]:
    if (root / f"{entry}.py").is_file():
        yield root / f"{entry}.py"
    for file in (root / entry).rglob("*.py"):
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
            yield file


def _docstrings(file: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pending: list[ast.AST] = [ast.parse(file.read_bytes())]
    while pending:
        node = pending.pop()
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text:
            yield text
        # only statements can hold definitions; leaving expressions out takes a third of the time
        pending.extend(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt))


def _unambiguous(found: list[list[str]]) -> list[list[str]]:
    """Each sentence once, and none that two areas have; capitals do not make a difference."""
    unique = [{s.lower(): s for s in reversed(sentences)} for sentences in found]
    areas = Counter(key for by_key in unique for key in by_key)
    return [[s for key, s in sorted(by_key.items()) if areas[key] == 1] for by_key in unique]


def _dataset(rows: list[tuple[str, int]]) -> Dataset:
    random.Random(SEED).shuffle(rows)
    features = Features(text=Value("string"), label=ClassLabel(names=list(LABELS)))
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    return Dataset.from_dict(columns, features=features)
