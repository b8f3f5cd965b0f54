"""The files of a page that runs an exported model in a browser, without any other server."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path

__all__ = ["find_npm", "page_files"]

_PAGE = ("index.html", "app.mjs", "model.mjs", "style.css")
_PACKAGE = "onnxruntime-web@1.30.0"
_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
# The build for processors alone, in one thread or several.
_RUNTIME = {
    "package/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
    "package/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
    "package/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "package/package.json": "package.json",
}
_SECONDS = 300


def find_npm() -> str:
    """Returns the program that fetches onnxruntime-web.

    Raises:
        ValueError: if there is none.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"--format web needs npm, to fetch {_PACKAGE}: install Node.js")
    return npm


def page_files() -> dict[str, bytes]:
    """Returns the page and onnxruntime-web, by their names in the folder.

    Raises:
        ValueError: if npm is missing, or the registry does not give the package.
    """
    page = files("fairseq_lightrnn.export") / "web"
    result = {name: (page / name).read_bytes() for name in _PAGE}
    npm = find_npm()
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                [npm, "pack", _PACKAGE, "--silent", "--pack-destination", folder],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
                cwd=folder,
            )
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise ValueError(
                f"--format web: npm did not get {_PACKAGE} ({said[-1] if said else 'no reason'})"
            ) from None
        (archive,) = Path(folder).glob("*.tgz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != _SHA256:
            raise ValueError(f"--format web: npm gave another {_PACKAGE} than the one known here")
        with tarfile.open(archive) as packed:
            for member, name in _RUNTIME.items():
                content = packed.extractfile(member)
                assert content is not None
                result[f"onnxruntime/{name}"] = content.read()
    return result
