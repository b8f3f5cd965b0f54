"""The quickstart's text: documentation that is already on the machine, or the user's own files.

``build`` collects the docstrings and the command-line help texts of the Python standard library,
numpy and scipy as they are installed beside this interpreter. The source files are parsed with
``ast`` and never imported. ``own`` takes three text files as they are. Both write
``train.txt``, ``valid.txt`` and ``test.txt``, one sentence a line and words separated by spaces,
and a ``manifest.json`` with counts, versions and checksums. The same input gives the same files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import prose
from prose import sentences, tokenize

__all__ = [
    "build_corpus",
    "documentation",
    "installed_roots",
    "main",
    "own_corpus",
    "split_of",
]

SPLITS = ("train", "valid", "test")
PACKAGES = ("numpy", "scipy")
# Of 100 parts; what is left after these two is the test split.
TRAIN_PARTS, VALID_PARTS = 90, 5
# Distributions of Python differ in which of these they ship, and they hold next to no prose.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
)
HELP_KEYWORDS = frozenset({"description", "epilog", "help"})
# Functions by which C extensions are given their docstrings.
DOCUMENTING_CALLS = frozenset({"_add_docstr", "add_docstr", "add_newdoc"})

_OTHER_TEXTS = re.compile(
    rf"\b(?:{'|'.join(sorted(HELP_KEYWORDS))})\s*=|(?:{'|'.join(sorted(DOCUMENTING_CALLS))})\s*\("
)


def documentation(source: str, filename: str = "<source>") -> list[str]:
    """Returns the docstrings and help texts of one Python source, in the order of the source.

    Counted are the docstrings of the module, its classes and functions, string constants given as
    ``help``, ``description`` or ``epilog`` to a call, and the texts that ``add_docstr`` and
    ``add_newdoc`` attach to compiled functions.

    Args:
        source: the text of the source file.
        filename: its name, for the error message.

    Returns:
        The texts as written, untouched.

    Raises:
        SyntaxError: the source does not parse; ValueError: it holds null bytes.
    """
    with warnings.catch_warnings():
        # Invalid escapes and the like in somebody else's source are not this user's concern.
        warnings.simplefilter("ignore")
        tree = ast.parse(source, filename)
    found: list[tuple[int, int, str]] = []
    # Most sources hold nothing but docstrings, which are found without a look at expressions.
    nodes = ast.walk(tree) if _OTHER_TEXTS.search(source) else _statements(tree)
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and isinstance(node.body[0], ast.Expr):
                found.extend(_string_constant(node.body[0].value))
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in HELP_KEYWORDS:
                    found.extend(_string_constant(keyword.value))
            if _called_name(node.func) in DOCUMENTING_CALLS:
                for argument in node.args:
                    for part in ast.walk(argument):
                        # A name of an object has no space in it, a text has.
                        found.extend(text for text in _string_constant(part) if " " in text[2])
    return [text for _, _, text in sorted(found)]


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields the module and all statements in it, however deep, without their expressions."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, name, ()))


def _string_constant(node: ast.AST) -> list[tuple[int, int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [(node.lineno, node.col_offset, node.value)]
    return []


def _called_name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def split_of(module: str) -> str:
    """Returns the split that a module's documentation belongs to.

    Args:
        module: dotted path of the module, such as ``torch.nn.modules.rnn``.

    Returns:
        ``train``, ``valid`` or ``test``; always the same for a given path.
    """
    part = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 100
    if part < TRAIN_PARTS:
        return "train"
    return "valid" if part < TRAIN_PARTS + VALID_PARTS else "test"


def installed_roots() -> dict[str, Path]:
    """Tells where the sources lie: of the standard library (key ``""``) and of the packages.

    Raises:
        FileNotFoundError: one of the packages is not installed beside this interpreter.
    """
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        # Looks the package up without importing it.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"{package} is not installed for {sys.executable}: run scripts/setup.sh first"
            )
        roots[package] = Path(spec.origin).parent
    return roots


def _modules(roots: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yields (dotted module path, file) of every source below the roots, in order of the paths."""
    found = []
    for prefix, root in roots.items():
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for name in files:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    parts = path.relative_to(root).with_suffix("").parts
                    found.append((".".join([prefix, *parts] if prefix else parts), path))
    return iter(sorted(found))


def _prose_of(path: Path) -> list[tuple[str, list[str]]] | None:
    """Returns, of each text of a source, what it is known by and its sentences; None if broken."""
    try:
        texts = documentation(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, ValueError, RecursionError):
        return None
    return [(" ".join(text.split()), sentences(text)) for text in texts]


def _read(paths: list[Path], workers: int) -> Iterator[list[tuple[str, list[str]]] | None]:
    """Reads sources in several processes, if asked to, and yields them in the given order."""
    if workers == 1:
        yield from map(_prose_of, paths)
    else:
        with multiprocessing.Pool(workers) as pool:
            yield from pool.imap(_prose_of, paths, chunksize=16)


def build_corpus(
    out: Path, roots: Mapping[str, Path], versions: Mapping[str, str], workers: int = 1
) -> dict:
    """Writes the documentation found below some folders as a corpus of three splits.

    A text that occurs in several places is kept where it comes first in order of the module paths.
    Files that cannot be parsed are left out and counted.

    Args:
        out: folder to write to; made if it is not there.
        roots: source folders by the package name that their modules begin with.
        versions: what is installed, for the manifest and as the key for reuse.
        workers: processes that read sources; the corpus does not depend on it.

    Returns:
        The manifest, see ``_write_corpus``; unchanged files of an earlier call are kept.

    Raises:
        ValueError: a split would be empty.
    """
    rules = _file_sha256(Path(__file__), Path(prose.__file__))
    fingerprint = _digest(["build", rules, *(f"{k}={versions[k]}" for k in sorted(versions))])
    kept = _unchanged(out, fingerprint)
    if kept is not None:
        return kept
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    skipped = []
    modules = list(_modules(roots))
    for (module, _), texts in zip(
        modules, _read([path for _, path in modules], workers), strict=True
    ):
        if texts is None:
            skipped.append(module)
            continue
        for key, prose_lines in texts:
            if key not in seen:
                seen.add(key)
                lines[split_of(module)].extend(prose_lines)
    for split in SPLITS:
        if not lines[split]:
            raise ValueError(f"no documentation for the {split} split below {list(roots.values())}")
    extra = {"versions": dict(versions), "texts": len(seen), "files_left_out": skipped}
    writers = {split: _line_writer(lines[split]) for split in SPLITS}
    return _write_corpus(out, writers, fingerprint, extra)


def own_corpus(out: Path, files: Mapping[str, Path], *, tokenized: bool = True) -> dict:
    """Takes three text files as the corpus.

    Args:
        out: folder to write to; made if it is not there.
        files: the text file of each split, UTF-8, one sentence a line.
        tokenized: words are already separated by spaces, and the files are copied as they are;
            otherwise every line is tokenised as the documentation is.

    Returns:
        The manifest, see ``_write_corpus``; unchanged files of an earlier call are kept.

    Raises:
        ValueError: a file is missing, unreadable, not UTF-8, or has no words.
    """
    for split in SPLITS:
        _check_text(split, files[split])
    hashes = [_file_sha256(files[split]) for split in SPLITS]
    fingerprint = _digest(["own", str(tokenized), *hashes])
    kept = _unchanged(out, fingerprint)
    if kept is not None:
        return kept
    writers = {
        split: _copier(files[split]) if tokenized else _line_writer(_tokenized_lines(files[split]))
        for split in SPLITS
    }
    extra = {"sources": {split: str(files[split].resolve()) for split in SPLITS}}
    return _write_corpus(out, writers, fingerprint, extra)


def _check_text(split: str, path: Path) -> None:
    name = f"{split.upper()} file {path}"
    if not path.exists():
        raise ValueError(f"{name} does not exist: give the path of a text file")
    if not path.is_file():
        raise ValueError(f"{name} is not a file: give the path of a text file")
    try:
        with path.open(encoding="utf-8") as stream:
            has_words = False
            for line in stream:
                has_words = has_words or bool(line.strip())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text ({error}): convert it, e.g. with iconv"
        ) from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if not has_words:
        raise ValueError(f"{name} has no words in it: give a text of one sentence a line")


def _tokenized_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield " ".join(tokenize(line))


def _line_writer(lines: Iterable[str]) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        with target.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(line + "\n" for line in lines)

    return write


def _copier(source: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        shutil.copyfile(source, target)

    return write


def _write_corpus(
    out: Path, writers: Mapping[str, Callable[[Path], None]], fingerprint: str, extra: Mapping
) -> dict:
    """Writes the three files and, last, the manifest that vouches for them.

    Returns:
        The manifest: ``fingerprint`` of the input, ``corpus_sha256`` over the three files one after
        the other, ``splits`` (lines, words and sha256 of each), ``reused`` false, and the extras.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    splits = {}
    for split in SPLITS:
        partial = out / f"{split}.txt.partial"
        writers[split](partial)
        lines, words = _count(partial)
        splits[split] = {"lines": lines, "words": words, "sha256": _file_sha256(partial)}
        os.replace(partial, out / f"{split}.txt")
    manifest = {
        "fingerprint": fingerprint,
        "corpus_sha256": _file_sha256(*(out / f"{split}.txt" for split in SPLITS)),
        "splits": splits,
        "reused": False,
        **extra,
    }
    partial = out / "manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "manifest.json")
    return manifest


def _unchanged(out: Path, fingerprint: str) -> dict | None:
    """Returns the manifest of an earlier run of the same input whose files are still there."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return None
        files = [out / f"{split}.txt" for split in SPLITS]
        if _file_sha256(*files) != manifest["corpus_sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**manifest, "reused": True}


def _count(path: Path) -> tuple[int, int]:
    lines = words = 0
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            lines += 1
            words += len(line.split())
    return lines, words


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _report(manifest: Mapping, out: Path) -> str:
    splits = manifest["splits"]
    words = {split: f"{splits[split]['words']:,}" for split in SPLITS}
    reused = ", as found by an earlier run" if manifest["reused"] else ""
    return (
        f"{words['train']} words to train on, {words['valid']} to validate and {words['test']} "
        f"to test with{reused}: {out}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="corpus.py", description="Make the quickstart's corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="documentation installed beside this interpreter")
    own = commands.add_parser("own", help="three text files")
    for split in SPLITS:
        own.add_argument(split, type=Path, metavar=split.upper())
    own.add_argument("--tokenize", action="store_true", help="split words and drop case first")
    for command in (build, own):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        if args.command == "build":
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            versions["python"] = platform.python_version()
            workers = len(os.sched_getaffinity(0))
            manifest = build_corpus(args.out, installed_roots(), versions, workers)
        else:
            files = {split: getattr(args, split) for split in SPLITS}
            manifest = own_corpus(args.out, files, tokenized=not args.tokenize)
    except (FileNotFoundError, ValueError, importlib.metadata.PackageNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_report(manifest, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
