"""Lets stock fairseq 0.12.2 run on current Python, torch, numpy and sacrebleu.

:func:`install` puts one finder on ``sys.meta_path``.  It costs next to nothing until one of the
fairseq modules listed in :data:`FIXES` is imported; that module, and no other, is then mended by
the functions of :mod:`fairseq_compat.fixes` and :mod:`fairseq_compat.data_parallel`.  Every fix
first tests whether the interpreter or library at hand shows the problem, and does nothing if not.

A ``.pth`` file beside this package calls :func:`install` when the interpreter starts, so that the
stock commands (``fairseq-train`` and so on) and the processes they spawn find fairseq mended.
``.pth`` files are read from site directories alone; where the package is found some other way
(``PYTHONPATH``, say), call it by hand before the first import of fairseq::

    import fairseq_compat

    fairseq_compat.install()
"""

from __future__ import annotations

import sys

__all__ = ["FIXES", "install", "uninstall"]

# Which fixes each fairseq module needs, as "module of this package:function".  Plain names, so
# that the start of every Python process does not pay for importing them.
FIXES: dict[str, tuple[str, ...]] = {
    "fairseq.checkpoint_utils": ("fixes:trust_checkpoint_globals",),
    "fairseq.data.data_utils": ("fixes:restore_numpy_names",),
    "fairseq.data.indexed_dataset": ("fixes:widen_index_sizes",),
    "fairseq.data.iterators": ("fixes:silence_pin_memory",),
    "fairseq.data.language_pair_dataset": ("fixes:restore_numpy_names",),
    "fairseq.data.token_block_dataset": (
        "fixes:restore_numpy_names",
        "fixes:sign_block_indices",
    ),
    "fairseq.dataclass.configs": ("fixes:hash_dataclasses",),
    "fairseq.dataclass.initialize": ("fixes:silence_hydra",),
    "fairseq.distributed.utils": (
        "fixes:trust_other_workers",
        "data_parallel:train_on_cpu_workers",
    ),
    "fairseq.models.distributed_fairseq_model": ("data_parallel:wrap_cpu_models",),
    "fairseq.modules.dynamic_crf_layer": ("fixes:restore_numpy_names",),
    "fairseq.modules.multihead_attention": ("fixes:silence_mask_types",),
    "fairseq.modules.transformer_layer": ("fixes:avoid_encoder_fast_path",),
    "fairseq.options": ("fixes:spare_bf16_the_tpu",),
    "fairseq.tasks.fairseq_task": ("fixes:silence_autocast",),
    "fairseq.trainer": ("fixes:multiply_with_all_lanes",),
    "fairseq_cli": ("fixes:wait_briefly",),
    "fairseq_cli.score": ("fixes:pass_sacrebleu_sequences",),
}


class _Finder:
    """Finds the modules of :data:`FIXES` through the other finders and mends their loader."""

    def find_spec(self, name, path=None, target=None):
        if name not in FIXES:
            return None
        from fairseq_compat.loader import mended_spec

        others = [finder for finder in sys.meta_path if finder is not self]
        return mended_spec(name, path, target, others, FIXES[name])


_finder = _Finder()


def install() -> None:
    """Mends fairseq's modules as they are imported from now on; calling it again does nothing."""
    if _finder in sys.meta_path:
        return
    late = sorted(FIXES.keys() & sys.modules.keys())
    if late:
        import warnings

        warnings.warn(
            f"{late[0]} was imported before fairseq_compat.install() and stays as it is; "
            "call install() before the first import of fairseq",
            RuntimeWarning,
            stacklevel=2,
        )
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Leaves modules that are imported from now on alone; those already mended stay mended."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
