"""Every architecture through ``fairseq-hydra-train``: the model that ``--arch`` gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fairseq import options
from fairseq.checkpoint_utils import save_checkpoint
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq_cli import hydra_train
from fairseq_run import (
    TASK,
    TINY_TRANSFORMER,
    TINY_TRANSFORMER_LM,
    TRANSLATION,
    load,
    train,
    train_translation,
)
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

LANGUAGE_MODELS = [
    "lightrnn_lm", "lightrnn_lm_500", "lightrnn_lm_1000", "lightrnn_lm_1500", "lightrnn_lm_gated",
    "lightrnn_transformer_lm",
]  # fmt: skip
TRANSLATIONS = [
    "lightrnn_translation", "lightrnn_translation_gated", "lightrnn_transformer",
    "lightrnn_transformer_iwslt_de_en",
]  # fmt: skip
RECOMMENDED = {
    "lightrnn_lm_gated": 65, "lightrnn_transformer_lm": 65, "lightrnn_translation_gated": 37,
    "lightrnn_transformer": 37, "lightrnn_transformer_iwslt_de_en": 37,
}  # fmt: skip
# What hydra says of fairseq's use of it.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:\s*'lightrnn' is validated against ConfigStore schema:UserWarning"
)
CONFIG = """\
# @package _global_
common: {{seed: 1, cpu: true, user_dir: "{user_dir}"}}
task: {{_name: {task}, data: "{data}", initial_table: random{more}}}
model: {{_name: {arch}{sizes}}}
criterion: {{_name: two_component_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.01], max_epoch: 1}}
dataset: {{batch_size: 8, num_workers: 0}}
"""


def sizes_of(arch: str) -> dict[str, int]:
    """Sizes of a tiny model; all else is the architecture's."""
    if "transformer" not in arch:
        return {"embed_dim": 8, "hidden_size": 8}
    tiny = TINY_TRANSFORMER_LM if arch.endswith("_lm") else TINY_TRANSFORMER
    return {n: v for n, v in tiny.items() if v is not None and not n.endswith("heads")}


def train_by_yaml(data: Path, folder: Path, arch: str) -> dict[str, Any]:
    """Trains as fairseq-hydra-train does, and returns the last checkpoint."""
    translates = arch in TRANSLATIONS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lightrnn.yaml").write_text(
        CONFIG.format(
            user_dir=TASK[1], data=data, arch=arch, task=(TRANSLATION if translates else TASK)[3],
            more="" if translates else ", tokens_per_sample: 12",
            sizes="".join(f", {name}: {value}" for name, value in sizes_of(arch).items()),
        )
    )  # fmt: skip
    metrics.reset()
    vars(save_checkpoint).clear()
    argv = [
        "fairseq-hydra-train", "--config-dir", folder, "--config-name", "lightrnn",
        f"checkpoint.save_dir={folder}", f"hydra.run.dir={folder}/hydra",
    ]  # fmt: skip
    with (
        mock.patch.object(sys, "argv", list(map(str, argv))),
        # hydra would take the handlers of pytest away.
        mock.patch("hydra.core.utils.configure_log"),
        mock.patch("hydra._internal.hydra.configure_log"),
    ):
        try:
            hydra_train.cli_main()
        finally:
            GlobalHydra.instance().clear()
    return load(folder / "checkpoint_last.pt")


def train_by_flags(data: Path, folder: Path, arch: str) -> dict[str, Any]:
    """Trains as fairseq-train does, and returns the last checkpoint."""
    tiny = train_translation if arch in TRANSLATIONS else train
    heads = {f"{side}_attention_heads": None for side in ("encoder", "decoder")}
    sizes = {"embed_dim": None, "hidden_size": None, **sizes_of(arch)}
    same = {"initial_table": "random", "label_smoothing": 0.1, "max_epoch": 1}
    tiny(data, folder, arch=arch, **same, **heads, **sizes)
    return load(folder / "checkpoint_last.pt")


@pytest.mark.parametrize("arch", [*LANGUAGE_MODELS, *TRANSLATIONS])
def test_yaml_trains_the_model_of_the_flag(
    data: Path, pairs: Path, tmp_path: Path, arch: str
) -> None:
    corpus = pairs if arch in TRANSLATIONS else data
    yaml = train_by_yaml(corpus, tmp_path / "yaml", arch)
    flags = train_by_flags(corpus, tmp_path / "flags", arch)
    one, two = (OmegaConf.to_container(OmegaConf.create(s["cfg"]["model"])) for s in (yaml, flags))
    assert set(two) - set(one) <= {"arch"}
    assert {name: str(two[name]) for name in one} == {name: str(one[name]) for name in one}
    assert yaml["model"].keys() == flags["model"].keys()
    for name, value in yaml["model"].items():
        if not name.endswith("_float_tensor"):  # a buffer without a value
            assert torch.equal(value, flags["model"][name]), name

    # It is what its name says.
    conditioner = [name for name in yaml["model"] if "head.conditioner" in name]
    assert any(".gates." in name for name in conditioner) == (arch in RECOMMENDED)
    assert any(".ffn." in name for name in conditioner) == (arch in RECOMMENDED)
    assert one["word_dim"] == RECOMMENDED.get(arch, 0)
    if arch.startswith("lightrnn_lm_1") or arch.endswith("_500"):
        assert (one["num_layers"], one["dropout"]) == (2, 0.2)


@pytest.mark.parametrize("arch", [*LANGUAGE_MODELS, *TRANSLATIONS])
def test_defaults_are_those_of_the_flag(arch: str) -> None:
    """Sizes too, which the tiny models above set."""
    task = TRANSLATION if arch in TRANSLATIONS else TASK
    parser = options.get_training_parser()
    args = ["data", *task, "--arch", arch, "--criterion", "two_component_cross_entropy"]
    flags = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, args)).model
    cfg = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(cfg, False)
    cfg.model, cfg.task = {"_name": arch}, {"_name": task[3], "data": "data"}
    add_defaults(cfg)
    known = {name: str(value) for name, value in cfg.model.items() if name != "_name"}
    assert len(known) > 10
    assert known == {name: str(flags[name]) for name in known}


def test_all_architectures_are_here() -> None:
    ours = {name for name in ARCH_MODEL_NAME_REGISTRY if name.startswith("lightrnn_")}
    ours |= {name for name in MODEL_DATACLASS_REGISTRY if name.startswith("lightrnn_")}
    assert ours == {*LANGUAGE_MODELS, *TRANSLATIONS}
