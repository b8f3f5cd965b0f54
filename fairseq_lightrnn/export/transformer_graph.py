"""The graph by which a transformer reads words, each with those before it in sight.

It computes what fairseq's ``TransformerDecoder.extract_features`` does, from these inputs, besides
those that words are read by:

- ``keys``, ``values`` (N, layers, S, d): what the layers have made of the words before, one slot
  for each; in ``S`` slots, of which a text need not use all.
- ``seen`` (N, S): 1 where a slot holds a word, 0 where it holds nothing.
- ``shown`` (N, T): 0 where a new word is padding, at which no word looks, 1 elsewhere.

Beside the outputs (N, T, d) it returns the slots of the new words: ``more_keys`` and
``more_values`` (N, layers, T, d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_lightrnn.export.pieces import (
    Graph,
    Linear,
    LookUp,
    Stored,
    WordReader,
    feed_forward,
    feed_on,
    make_graph,
    optional,
    read_inputs,
)
from fairseq_lightrnn.models.lightrnn_transformer import (
    LightRNNTransformerDecoder,
    TransformerText,
)

__all__ = ["transformer_read_graph"]


def transformer_read_graph(text: TransformerText) -> Graph:
    """Returns the graph.

    Raises:
        ValueError: if the transformer has a part that no graph is known of.
    """
    decoder = text.decoder
    _check(decoder)
    slots = ("N", decoder.num_layers, "S", decoder.embed_dim)
    state = {"keys": slots, "values": slots, "seen": ("N", "S"), "shown": ("N", "T")}
    inputs = read_inputs(text.reader, text.reader.num_components, state)
    return make_graph(_Read(text), inputs, ["outputs", "more_keys", "more_values"])


def _check(decoder: LightRNNTransformerDecoder) -> None:
    flags = {
        "--quant-noise-scalar": decoder.cfg.quant_noise.scalar,
        "--decoder-xformers-att-config": decoder.cfg.decoder.xformers_att_config,
    }
    for flag, value in flags.items():
        if value:
            raise ValueError(
                f"{flag} {value}: a transformer that was trained with it cannot be exported; "
                "train one without it"
            )


class _Norm(nn.Module):
    """Layer normalisation."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = Stored(layer.weight), Stored(layer.bias)
        self.eps = layer.eps

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight()
        return F.layer_norm(inputs, weight.shape, weight, self.bias(), self.eps)


class _Attention(nn.Module):
    """fairseq's ``MultiheadAttention`` of words to themselves and to those before them."""

    def __init__(self, attention: Any, head_scales: Tensor | None) -> None:
        super().__init__()
        self.heads, self.scaling = attention.num_heads, attention.scaling
        self.query = Linear.of(attention.q_proj)
        self.key = Linear.of(attention.k_proj)
        self.value = Linear.of(attention.v_proj)
        weight, bias = attention.out_proj.weight, attention.out_proj.bias
        if head_scales is not None:  # fairseq scales outputs, as many in a row as a head has
            scales = head_scales.repeat_interleave(attention.head_dim)
            weight, bias = weight * scales[:, None], bias * scales
        self.out = Linear(weight, bias)

    def forward(
        self, inputs: Tensor, keys: Tensor, values: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the outputs (N, T, d), and the keys and values of the new words (N, T, d)."""
        key, value = self.key(inputs), self.value(inputs)
        queries = self._by_head(self.query(inputs) * self.scaling)
        keys = self._by_head(torch.cat([keys, key], dim=1))
        values = self._by_head(torch.cat([values, value], dim=1))
        # (N, heads, T, S + T)
        scores = (queries @ keys.transpose(2, 3)).masked_fill(~visible, float("-inf"))
        found = torch.softmax(scores, dim=3) @ values
        return self.out(found.transpose(1, 2).flatten(2)), key, value

    def _by_head(self, values: Tensor) -> Tensor:
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)


class _Layer(nn.Module):
    """fairseq's ``TransformerDecoderLayer``, without a source text."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.normalize_before = layer.normalize_before
        self.activation = layer.activation_fn
        self.attention = _Attention(layer.self_attn, layer.c_attn)
        self.attention_norm = _Norm(layer.self_attn_layer_norm)
        self.after_attention = optional(_Norm, layer.attn_ln)
        self.inner, self.outer = Linear.of(layer.fc1), Linear.of(layer.fc2)
        self.between = optional(_Norm, layer.ffn_layernorm)
        self.residual = optional(Stored, layer.w_resid)
        self.norm = _Norm(layer.final_layer_norm)

    def forward(
        self, inputs: Tensor, keys: Tensor, values: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`_Attention`."""
        first = self.attention_norm(inputs) if self.normalize_before else inputs
        attended, key, value = self.attention(first, keys, values, visible)
        if self.after_attention is not None:
            attended = self.after_attention(attended)
        middle = inputs + attended
        if not self.normalize_before:
            middle = self.attention_norm(middle)
        inner = self.activation(self.inner(self.norm(middle) if self.normalize_before else middle))
        if self.between is not None:
            inner = self.between(inner)
        if self.residual is not None:
            middle = self.residual() * middle
        outputs = middle + self.outer(inner)
        return outputs if self.normalize_before else self.norm(outputs), key, value


class _Read(WordReader):
    def __init__(self, text: TransformerText) -> None:
        super().__init__(text.reader)
        decoder = text.decoder
        self.scale = decoder.embed_scale
        # What is left of it after the training is a layer.
        self.noise = optional(Linear.of, decoder.quant_noise)
        self.project_in = optional(Linear.of, decoder.project_in_dim)
        self.positions = _positions(decoder)
        self.norm_in = optional(_Norm, decoder.layernorm_embedding)
        self.layers = nn.ModuleList(map(_Layer, decoder.layers))
        self.norm_out = optional(_Norm, decoder.layer_norm)
        self.project_out = optional(Linear.of, decoder.project_out_dim)
        self.ffn = feed_forward(text.head.conditioner.ffn)

    def forward(
        self,
        places: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        shown: Tensor,
        numbers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.look_up(places, numbers) * self.scale
        for layer in (self.noise, self.project_in):
            hidden = hidden if layer is None else layer(hidden)
        if self.positions is not None:
            number = seen.sum(dim=1, keepdim=True) + shown.cumsum(dim=1)
            hidden = hidden + self.positions((number * shown).int())
        hidden = hidden if self.norm_in is None else self.norm_in(hidden)
        visible, made = _visible(seen, shown), []
        for layer, old_keys, old_values in zip(
            self.layers, keys.unbind(1), values.unbind(1), strict=True
        ):
            hidden, *new = layer(hidden, old_keys, old_values, visible)
            made.append(new)
        for layer in (self.norm_out, self.project_out):
            hidden = hidden if layer is None else layer(hidden)
        more_keys, more_values = (torch.stack(parts, dim=1) for parts in zip(*made, strict=True))
        return feed_on(self.ffn, hidden), more_keys, more_values


def _positions(decoder: LightRNNTransformerDecoder) -> LookUp | None:
    """Returns the vectors of positions: first that of padding, then those of words from 1 on."""
    if decoder.embed_positions is None:
        return None
    padding = decoder.padding_idx
    words = torch.full((1, decoder.max_positions() + 1), padding + 1)
    words[:, 0] = padding
    return LookUp(decoder.embed_positions(words)[0])


def _visible(seen: Tensor, shown: Tensor) -> Tensor:
    """Returns which slots each new word may look at: (N, 1, T, S + T)."""
    order = torch.arange(shown.size(1), device=shown.device)
    up_to_itself = order[None, :] <= order[:, None]
    before = (seen > 0)[:, None].expand(-1, shown.size(1), -1)
    return torch.cat([before, (shown > 0)[:, None] & up_to_itself], dim=2)[:, None]
