"""What fairseq 0.12.2 gets wrong beside newer libraries, one function for each.

``python compat_cases.py FOLDER`` runs them all with no fix in place but the one that fairseq needs
to be imported at all, and prints as JSON what each returned or raised.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

CASES: dict[str, Callable[[Path], Any]] = {}


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


def write_checkpoint(path: Path, **extra: Any) -> Path:
    import torch

    state = {
        "args": argparse.Namespace(arch="lstm_lm", task="language_modeling"),
        "model": {"weight": torch.ones(2)},
        "optimizer_history": [{"optimizer_name": "Adam", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 3}, **extra},
    }
    torch.save(state, path)
    return path


@case
def old_checkpoint(folder: Path) -> Any:
    from fairseq import checkpoint_utils

    path = write_checkpoint(folder / "old.pt")
    return checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["train_iterator"]


@case
def checkpoint_with_scores(folder: Path) -> Any:
    import numpy as np
    from fairseq import checkpoint_utils

    scores = {"bleu": np.float64(12.5), "counts": np.arange(3), "best": np.float32(2)}
    path = write_checkpoint(folder / "scores.pt", **scores)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]
    return [float(loaded["bleu"]), loaded["counts"].tolist(), float(loaded["best"])]


@case
def broadcast_configuration(folder: Path) -> Any:
    import torch
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    written = io.BytesIO()
    torch.save(OmegaConf.create({"epoch": 3}), written)
    received = iter([torch.tensor([len(written.getvalue())]), bytes_tensor(written.getvalue())])

    def receive(buffer: Any, src: int, group: Any) -> None:
        buffer.copy_(next(received))

    with mock.patch.object(utils, "broadcast", receive), mock.patch.object(utils, "get_rank") as me:
        me.return_value = 1
        loaded = utils._broadcast_object_slow(None, 0, None, torch.device("cpu"))
    return OmegaConf.to_container(loaded)


def bytes_tensor(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def blocks(sentences: list[list[int]], block_size: int | None, break_mode: str) -> Any:
    import torch
    from fairseq.data import TokenBlockDataset

    return TokenBlockDataset(
        [torch.tensor(sentence) for sentence in sentences],
        [len(sentence) for sentence in sentences],
        block_size=block_size,
        pad=1,
        eos=2,
        break_mode=break_mode,
        include_targets=True,
    )


@case
def blocks_of_sentences(folder: Path) -> Any:
    return [item[1].tolist() for item in blocks([[5, 6, 2], [7, 2]], None, "eos")]


@case
def block_of_one_word(folder: Path) -> Any:
    import numpy as np

    with np.errstate(over="ignore"):
        source, target, past_target = blocks([[5]], 1, "none")[0]
    return [source.tolist(), target.tolist(), past_target.tolist()]


@case
def bucketed_pairs(folder: Path) -> Any:
    import torch
    from fairseq.data import Dictionary, LanguagePairDataset

    words = Dictionary()
    words.add_symbol("a")
    sentences = [torch.tensor([4, 2]), torch.tensor([4, 4, 4, 2])]
    pairs = LanguagePairDataset(sentences, [2, 4], words, num_buckets=2)
    return [int(size) for size in pairs.bucketed_num_tokens]


@case
def span_mask(folder: Path) -> Any:
    from fairseq.data.data_utils import compute_mask_indices

    mask = compute_mask_indices((2, 20), None, 0.3, 3, no_overlap=True)
    return mask.any(axis=1).tolist()


@case
def conditional_random_field(folder: Path) -> Any:
    import torch
    from fairseq.modules import DynamicCRF

    field = DynamicCRF(num_embedding=6, low_rank=2, beam_size=3)
    log_likelihood = field(torch.zeros(1, 4, 6), torch.tensor([[1, 2, 3, 4]]), None)
    return log_likelihood.isfinite().tolist()


@case
def index_beyond_two_gigabytes(folder: Path) -> Any:
    import numpy as np
    from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(str(folder / "large.bin"), dtype=np.int32)
    # As merge_file_ collects them from the file of another preprocessing worker.
    builder._sizes = list(np.array([300_000_000] * 3, dtype=np.int32))
    with np.errstate(over="ignore"):
        builder.finalize(str(folder / "large.idx"))
    index = MMapIndexedDataset.Index(str(folder / "large.idx"))  # alive while it is read
    return index._pointers.tolist()


@case
def encoder_inference(folder: Path) -> Any:
    import torch
    from fairseq.models.transformer import TransformerConfig
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    config = TransformerConfig()
    config.encoder.embed_dim = config.encoder.ffn_embed_dim = 8
    config.encoder.attention_heads = 2
    layer = TransformerEncoderLayerBase(config)
    layer.load_state_dict(layer.state_dict())
    layer.eval()
    padding = torch.tensor([[False, False, True]])
    with torch.no_grad():
        output = layer(torch.ones(3, 1, 8), encoder_padding_mask=padding)
    return list(output.shape)


@case
def sacrebleu_of_files(folder: Path) -> Any:
    from fairseq_cli import score

    for name in ("system", "reference"):
        (folder / name).write_text("a man in a red coat\nthe dog runs fast\n")
    argv = ["fairseq-score", "--sacrebleu", "-s", str(folder / "system"), "-r"]
    printed = io.StringIO()
    argv.append(str(folder / "reference"))
    with mock.patch.object(sys, "argv", argv), redirect_stdout(printed):
        score.cli_main()
    return printed.getvalue().splitlines()[-1].split()[:3]


@contextmanager
def gloo_group(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed.nn.functional  # imported later, it would keep the group for good

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()  # models; threads that outlive Python may abort the process
        torch.distributed.destroy_process_group()


@case
def objects_gathered_on_cpu(folder: Path) -> Any:
    from fairseq.distributed import utils

    with gloo_group(folder):
        small = utils.all_gather_list({"loss": 1.5})
        large = utils.all_gather_list({"words": list(range(5000))}, max_size=65536)
    return [small, len(large[0]["words"])]


@case
def pytorch_ddp_on_cpu(folder: Path) -> Any:
    import torch
    from fairseq.dataclass.configs import DistributedTrainingConfig
    from fairseq.models.distributed_fairseq_model import DistributedFairseqModel

    settings = DistributedTrainingConfig(ddp_backend="pytorch_ddp")
    arguments = SimpleNamespace(**{**vars(settings), "tpu": False, "device_id": 0})
    device = torch.device("cpu")
    with gloo_group(folder):
        model = DistributedFairseqModel(arguments, torch.nn.Linear(2, 3), None, device)
        return list(model(torch.ones(1, 2)).shape)


@case
def bf16_without_a_tpu(folder: Path) -> Any:
    from fairseq import options

    parser = options.get_training_parser()
    flags = ["data", "--task", "language_modeling", "--arch", "transformer_lm", "--bf16"]
    arguments = options.parse_args_and_arch(parser, flags)
    return [arguments.bf16, arguments.tpu]


@case
def configuration_remarks(folder: Path) -> Any:
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parser = options.get_training_parser()
    arguments = options.parse_args_and_arch(
        parser, ["data", "--task", "language_modeling", "--arch", "transformer_lm"]
    )
    # Seen as a command would show them: fairseq's import has set its filters by now.
    with warnings.catch_warnings(record=True) as remarks:
        convert_namespace_to_omegaconf(arguments)
    return [str(remark.message) for remark in remarks]


def run_without_fixes(folder: Path) -> dict[str, Any]:
    import fairseq_compat

    for module in fairseq_compat.FIXES:
        fairseq_compat.FIXES[module] = ()
    fairseq_compat.FIXES["fairseq.dataclass.configs"] = ("fixes:hash_dataclasses",)
    fairseq_compat.install()
    outcomes: dict[str, Any] = {}
    for name, function in CASES.items():
        try:
            outcomes[name] = {"returned": function(folder)}
        except Exception as error:
            outcomes[name] = {"raised": f"{type(error).__name__}: {error}"}
    return outcomes


if __name__ == "__main__":
    result = run_without_fixes(Path(sys.argv[1]))
    print(json.dumps(result))
