"""One function for each thing in fairseq 0.12.2 that newer libraries break, but data parallelism.

A function marked ``@rewrite`` gets the syntax tree of the named module before it runs, the others
get the module just after.  Each begins with a test for the problem.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import io
import os
import pickle
import re
import types
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fairseq_compat.loader import rewrite

__all__ = [
    "avoid_encoder_fast_path",
    "hash_dataclasses",
    "multiply_with_all_lanes",
    "pass_sacrebleu_sequences",
    "restore_numpy_names",
    "sign_block_indices",
    "silence_autocast",
    "silence_hydra",
    "silence_mask_types",
    "silence_pin_memory",
    "spare_bf16_the_tpu",
    "trust_checkpoint_globals",
    "trust_other_workers",
    "wait_briefly",
    "widen_index_sizes",
]


# --- Python 3.11: a dataclass default must be hashable ---------------------------------------


def _refuses_dataclass_defaults() -> bool:
    @dataclasses.dataclass
    class Inner:
        pass

    try:

        @dataclasses.dataclass
        class Outer:
            inner: Inner = Inner()

    except ValueError:
        return True
    return False


@rewrite
def hash_dataclasses(tree: ast.Module) -> None:
    """``fairseq.dataclass.configs`` nests configurations by giving instances as defaults.

    Python 3.11 refuses defaults without a hash, and ``@dataclass`` removes the hash of a class
    that has none of its own.  So every subclass of ``FairseqDataclass``, a user's included, is
    given the identity hash before its decorator runs.  (A ``default_factory`` would not do:
    ``hydra_init`` reads the defaults themselves.)
    """
    if not _refuses_dataclass_defaults():
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "FairseqDataclass":
            node.body.extend(ast.parse(_INIT_SUBCLASS).body)


_INIT_SUBCLASS = """
def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    if "__hash__" not in cls.__dict__:
        cls.__hash__ = object.__hash__
"""


# --- torch 2.6: torch.load reads tensors and plain containers only -----------------------------


def trust_checkpoint_globals(module: ModuleType) -> None:
    """Lets ``fairseq.checkpoint_utils`` load the classes that fairseq puts into checkpoints.

    A few harmless names are added to what ``torch.load`` accepts, while fairseq's own functions
    run.  ``weights_only`` stays in force: a checkpoint still cannot run code of its own.
    """
    if not _refuses_namespaces():
        return
    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        function = getattr(module, name, None)
        if function is not None:
            setattr(module, name, _with_safe_globals(function))


@rewrite
def trust_other_workers(tree: ast.Module) -> None:
    """Workers broadcast the state to resume from, configuration objects included.

    They belong to one job, and ``all_gather_list`` unpickles what they send already, so
    ``torch.load`` may as well in ``_broadcast_object_slow``.
    """
    if not _refuses_namespaces():
        return
    for function in tree.body:
        if getattr(function, "name", None) == "_broadcast_object_slow":
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    node.keywords.append(ast.keyword("weights_only", ast.Constant(False)))


def _refuses_namespaces() -> bool:
    import argparse

    import torch

    checkpoint = io.BytesIO()
    torch.save(argparse.Namespace(), checkpoint)
    checkpoint.seek(0)
    try:
        torch.load(checkpoint)
    except pickle.UnpicklingError:
        return True
    return False


def _with_safe_globals(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def loading(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.serialization.safe_globals(_safe_globals()):
            return function(*args, **kwargs)

    return loading


@functools.cache
def _safe_globals() -> list[Any]:
    """``argparse.Namespace`` (old checkpoints) and numbers of numpy (scores, as of --eval-bleu).

    numpy 2.0 moved the functions that make its scalars and arrays, and a checkpoint holds the
    names that the numpy had which wrote it, so both are given.
    """
    import argparse

    import numpy

    makers: list[Any] = [numpy.float64(0).__reduce__()[0], numpy.zeros(0).__reduce__()[0]]
    dtypes = [numpy.dtype(code) for code in "?bBhHiIlLqQefd"]
    return [
        argparse.Namespace,
        numpy.ndarray,
        numpy.dtype,
        *dict.fromkeys(type(dtype) for dtype in dtypes),
        *((maker, f"numpy._core.multiarray.{maker.__name__}") for maker in makers),
        *((maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers),
    ]


# --- numpy: names that are gone (1.24, 2.0, 2.4), integers that overflow (2.0) -----------------


def restore_numpy_names(module: ModuleType) -> None:
    """Gives the module a view of numpy that still has what numpy has dropped.

    Which is ``int`` and ``float`` (gone in 1.24), ``compat.long`` (2.0) and the argument
    ``interpolation`` of ``percentile`` (2.4), called ``method`` since 1.22.
    """
    import numpy

    restored: dict[str, Any] = {
        name: value
        for name, value in {
            "int": int,
            "float": float,
            "compat": types.SimpleNamespace(long=int),
        }.items()
        if not _has(numpy, name)
    }
    if "interpolation" not in inspect.signature(numpy.percentile).parameters:
        restored["percentile"] = _percentile
    if not restored or getattr(module, "np", None) is not numpy:
        return
    view = ModuleType("numpy", numpy.__doc__)
    others = functools.partial(getattr, numpy)  # names that numpy makes on demand
    view.__dict__.update({**vars(numpy), **restored, "__getattr__": others})
    module.np = view  # type: ignore[attr-defined]


def _has(library: ModuleType, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hasattr(library, name)


def _percentile(*args: Any, interpolation: str = "linear", **kwargs: Any) -> Any:
    import numpy

    return numpy.percentile(*args, **{"method": interpolation, **kwargs})


def _small_integers_wrap() -> bool:
    """Whether a numpy scalar keeps its width beside a Python integer (numpy 2, NEP 50)."""
    import numpy

    with numpy.errstate(over="ignore"):
        return bool(numpy.uint16(1) - 2 > 0)


def widen_index_sizes(module: ModuleType) -> None:
    """Keeps the offsets of ``fairseq-preprocess --workers N`` right beyond 2 GiB.

    The sizes read from the other workers' files are 32-bit numpy integers, and so are then the
    byte offsets that are summed up from them.
    """
    builder = getattr(module, "MMapIndexedDatasetBuilder", None)
    if builder is None or not _small_integers_wrap():
        return
    finalize = builder.finalize

    @functools.wraps(finalize)
    def finalize_with_python_integers(self: Any, index_file: str) -> None:
        self._sizes = [int(size) for size in self._sizes]
        finalize(self, index_file)

    builder.finalize = finalize_with_python_integers


def sign_block_indices(module: ModuleType) -> None:
    """``TokenBlockDataset`` subtracts 2 from an index that may be 1: keep its indices signed."""
    if not hasattr(module, "best_fitting_int_dtype") or not _small_integers_wrap():
        return
    import numpy

    def best_fitting_signed_dtype(largest: int | None) -> type:
        # A little room, since indices are also added to.
        return numpy.int32 if largest is not None and largest < 2**31 - 16 else numpy.int64

    module.best_fitting_int_dtype = best_fitting_signed_dtype  # type: ignore[attr-defined]


# --- torch 1.13: the fused transformer encoder layer wants to know the kind of mask ------------


def avoid_encoder_fast_path(module: ModuleType) -> None:
    """Keeps encoder layers on the ordinary path at inference; the result is the same."""
    import torch

    layer = getattr(module, "TransformerEncoderLayerBase", None)
    fused = getattr(torch.ops.aten, "_transformer_encoder_layer_fwd", None)
    if layer is None or fused is None:
        return
    arguments = {argument.name for argument in fused.default._schema.arguments}
    if "mask_type" not in arguments:
        return
    init = layer.__init__

    @functools.wraps(init)
    def init_without_fast_path(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.can_use_fastpath = False

    layer.__init__ = init_without_fast_path


# --- sacrebleu 2: sequences of lines instead of open files -------------------------------------


@rewrite
def pass_sacrebleu_sequences(tree: ast.Module) -> None:
    """``fairseq-score --sacrebleu`` hands over open files: make lists of their lines."""
    if _refuses_iterators():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sacrebleu.corpus_bleu":
                node.args = [_listed(argument) for argument in node.args]


def _refuses_iterators() -> bool:
    import sacrebleu

    lines: Any = ["a b c d"]
    try:
        sacrebleu.corpus_bleu(iter(lines), [iter(lines)])
    except (TypeError, EOFError):
        return True
    return False


def _listed(argument: ast.expr) -> ast.expr:
    """``x`` becomes ``list(x)``, ``[x, y]`` becomes ``[list(x), list(y)]``."""
    if isinstance(argument, ast.List):
        argument.elts = [_listed(element) for element in argument.elts]
        return argument
    return ast.Call(func=ast.Name("list", ast.Load()), args=[argument], keywords=[])


# --- threads that wait for each other in busy loops --------------------------------------------


def wait_briefly(module: ModuleType | None = None) -> None:
    """Lets threads of torch sleep after some microseconds without work, unless told otherwise.

    GNU's OpenMP has them spin for milliseconds.  On cores that other processes use too, two threads
    were half as fast as one; after a thousand turns they are as fast as ever on idle cores, and
    never much slower than one on busy ones (``examples/large_vocabulary`` has the figures).  The
    library reads its settings when torch loads it, so this must come before.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


# --- products of matrices that leave half of a processor idle ----------------------------------


def multiply_with_all_lanes(module: ModuleType) -> None:
    """Has oneDNN multiply matrices where torch's other library uses half of the processor.

    That is Intel's MKL, which takes AMD's processors with AVX-512 for older ones; with oneDNN,
    which torch has too, training is up to half faster.  Only training gets it, whose shapes repeat:
    a new shape costs oneDNN a third of a millisecond.  torch's setting allows rounding to bfloat16,
    which oneDNN does not do there; if products ever are not those of single precision, it is taken
    back.  Both are not timed instead, for a training that goes on must multiply as it did before.
    ``ATEN_CPU_CAPABILITY=avx2`` turns this off, as all use of AVX-512 in torch.
    """
    import torch

    if torch.cuda.is_available() or not _mkl_takes_it_for_older():
        return
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return  # somebody chose
    except RuntimeError:  # by torch's newer names
        return
    torch.set_float32_matmul_precision("medium")
    if not _multiplies_in_single_precision():
        torch.set_float32_matmul_precision("highest")


def _mkl_takes_it_for_older() -> bool:
    import torch

    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    cpu = getattr(torch.backends, "cpu", None)  # since torch 2.1
    if cpu is None or cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


def _multiplies_in_single_precision() -> bool:
    """Compares products of two sizes with those of double precision."""
    import torch

    for size in (64, 512):
        left = torch.linspace(-1.0, 1.0, size * size).reshape(size, size).sin()
        exact = left.double() @ left.double().T
        # Halves of bfloat16's precision are 4e-3, of single precision 6e-8.
        if (left @ left.T - exact).abs().max() > 1e-5 * exact.abs().max():
            return False
    return True


# --- remarks on deprecated usage that every command would print --------------------------------


def silence_pin_memory(module: ModuleType) -> None:
    """Data loaders ask for pinned memory, which torch remarks upon where there is no GPU."""
    _ignore(UserWarning, "'pin_memory' argument is set as true but no accelerator", "torch")


def silence_autocast(module: ModuleType) -> None:
    """``torch.cuda.amp.autocast`` has a new name."""
    _ignore(FutureWarning, "`torch.cuda.amp.autocast(args...)` is deprecated", module.__name__)


def silence_mask_types(module: ModuleType) -> None:
    """Attention gets a boolean and a float mask, which torch would rather have alike."""
    message = "Support for mismatched key_padding_mask and attn_mask is deprecated"
    _ignore(UserWarning, message, "torch")


def silence_hydra(module: ModuleType) -> None:
    """hydra's remarks on how fairseq calls it and on fairseq's own ``config.yaml``."""
    for message in (
        "hydra.experimental.initialize() is no longer experimental",
        "hydra.experimental.compose() is no longer experimental",
        "\nThe version_base parameter is not specified",
        "\nThe strict flag in the compose API is deprecated",
        "In 'config': Usage of deprecated keyword in package header",
        "\n'config' is validated against ConfigStore schema with the same name",
        "Future Hydra versions will no longer change working directory at job runtime",
    ):
        _ignore(UserWarning, message)


def _ignore(category: type[Warning], message: str, package: str = "") -> None:
    """Ignores one message, given by its beginning, if attributed to the package (default: any)."""
    where = rf"{re.escape(package)}(\.|$)" if package else ""
    warnings.filterwarnings("ignore", re.escape(message), category, where)


# --- --bf16 is not for TPUs alone -----------------------------------------------------------


def spare_bf16_the_tpu(module: ModuleType) -> None:
    """Trains in bfloat16 on CPUs and GPUs: fairseq takes ``--bf16`` for ``--tpu``."""
    if importlib.util.find_spec("torch_xla") is not None:
        return
    parse = module.parse_args_and_arch

    @functools.wraps(parse)
    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        found = parse(*args, **kwargs)
        flags = found[0] if isinstance(found, tuple) else found
        if getattr(flags, "bf16", False):  # fairseq-validate has flags that were given alone
            flags.tpu = False
        return found

    module.parse_args_and_arch = parse_args_and_arch  # type: ignore[attr-defined]
