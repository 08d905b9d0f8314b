"""The stages of the family `next_patch` as torch modules; axes as in stages.py."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsp.families.next_patch.model import Attend, Attention, Gpt, attend_all, prefix_mask
from nsp.families.next_patch.system import NextPatchSystem
from nsp.layers.attention import KeyValue, attend_past
from nsp.layers.in_place import attend_in_place, stored
from nsp.layers.logits import filter_by_rank
from nsp.raster.drawing import NUM_DRAW, DecoderStage, NucleusStage, draw, filter_where_asked
from nsp.raster.stages import needs_nucleus_stage


def build_stages(system: NextPatchSystem, kv_layout: str) -> Mapping[str, nn.Module]:
    """Return the stages of `system`, sharing its weights."""
    grid = system.config.grid
    found: dict[str, nn.Module] = {}
    if system.config.caption is not None:
        found["text_encoder"] = system.text_stage()
        found["prefill"] = PrefillStage(system, kv_layout)
    found["decode"] = DecodeStage(system, kv_layout)
    if needs_nucleus_stage(grid, kv_layout):
        found["nucleus"] = NucleusStage()
    found["decoder"] = DecoderStage(system.vq)
    return {name: stage.eval() for name, stage in found.items()}


class PrefillStage(nn.Module):
    """The prompt's tokens -> logits, the first code, keys and values of the prompt."""

    def __init__(self, system: NextPatchSystem, kv_layout: str) -> None:
        super().__init__()
        self.gpt, self.num_prefix = system.gpt, system.config.num_prefix
        self.room = num_cached(system, kv_layout)

    def forward(
        self, states_NTC: Tensor, prompts_G: Tensor, first_G: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return logits, tokens, next, new_codes, guided, then new keys and values."""
        gpt, embedding = self.gpt, self.gpt.cls_embedding
        null_1TC = embedding.get_buffer("uncond_embedding")[None].to(states_NTC.dtype)
        states_GTC = torch.cat([states_NTC, null_1TC]).index_select(0, prompts_G)
        mask = prefix_mask(first_G, self.num_prefix, self.num_prefix)
        new: list[Tensor] = []
        attend = attend_all(mask, new)
        x_GTD = gpt.transformed(
            embedding(states_GTC), gpt.table[: self.num_prefix], [attend] * len(gpt.layers)
        )
        logits = gpt.logits(x_GTD[:, -1:])
        if self.room is not None:
            new = [stored(each, self.room) for each in new]
        return logits, *draw(logits, *inputs), *new


class DecodeStage(nn.Module):
    """One token -> logits, the next code, its keys and values."""

    def __init__(self, system: NextPatchSystem, kv_layout: str) -> None:
        super().__init__()
        self.is_in_place = kv_layout == "in_place"
        self.keep = filter_where_asked if self.is_in_place else filter_by_rank
        self.gpt, self.num_prefix = system.gpt, system.config.num_prefix
        self.has_classes = system.config.caption is None

    def forward(self, token_G: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return logits, tokens, next, new_codes, guided, then new keys and values."""
        gpt, drawn, rest = self.gpt, inputs[:NUM_DRAW], inputs[NUM_DRAW:]
        position = drawn[0] + (self.num_prefix - 1)  # in the cache; the number of the code is first
        first_G, past = (None, rest) if self.has_classes else (rest[0], rest[1:])
        pairs, new = list(zip(past[::2], past[1::2], strict=True)), list[Tensor]()
        if self.is_in_place:
            bias = None if first_G is None else self._prompt_mask(past[0].shape[2], first_G)
            at_G = position.expand(token_G.shape[0])
            attends = [_attend_in_place(each, at_G, gpt.table, bias, new) for each in pairs]
        else:
            mask = self._past_mask(past[0].shape[0], position, first_G)
            attends = [_attend_step(each, mask, new) for each in pairs]
        x_G1D = gpt.transformed(
            self._embedded(gpt, token_G), gpt.table.index_select(0, position), attends
        )
        logits = gpt.logits(x_G1D)
        return logits, *draw(logits, *drawn, keep=self.keep), *new

    def _embedded(self, gpt: Gpt, token_G: Tensor) -> Tensor:
        """Return the embedding (G, 1, D) of codes, or of classes, which are numbered after them."""
        num_codes = gpt.tok_embeddings.num_embeddings
        if not self.has_classes:
            codes: Tensor = gpt.tok_embeddings(token_G)
            return codes[:, None]
        codes = gpt.tok_embeddings(token_G.clamp_max(num_codes - 1))[:, None]
        classes = gpt.cls_embedding((token_G - num_codes).clamp_min(0))
        return torch.where((token_G < num_codes)[:, None, None], codes, classes)

    def _past_mask(self, length: int, position: Tensor, first_G: Tensor | None) -> Tensor:
        """Return what is added to the past's scores: (P,), or (G, 1, 1, P) with padded prompts."""
        mask = torch.where(torch.arange(length, device=position.device) < position, 0.0, -torch.inf)
        return mask if first_G is None else mask + self._prompt_mask(length, first_G)

    def _prompt_mask(self, length: int, first_G: Tensor) -> Tensor:
        """Return what leaves the padding of prompts out: (G, 1, 1, P)."""
        at = torch.arange(length, device=first_G.device)
        real = (at >= first_G[:, None]) | (at >= self.num_prefix)
        return torch.where(real, 0.0, -torch.inf)[:, None, None]


def num_cached(system: NextPatchSystem, kv_layout: str) -> int | None:
    """Return the tokens of a cache that is handed over whole, or None."""
    grid = system.config.grid
    return grid.cache(1, "float32").num_tokens if kv_layout == "in_place" else None


def _attend_step(past: KeyValue, mask: Tensor, new: list[Tensor]) -> Attend:
    """Return attention of one token over its past and itself; adds its key and value to `new`."""

    def attend(layer: Attention, packed_G1M: Tensor, table_1K2: Tensor) -> Tensor:
        q, k, v = layer.rotated(packed_G1M, table_1K2)
        new.extend([k.transpose(0, 1), v.transpose(0, 1)])
        return attend_past(q, k, v, past, mask, scale=q.shape[-1] ** -0.5).flatten(2)

    return attend


def _attend_in_place(
    past: KeyValue, at_G: Tensor, table_SK2: Tensor, bias: Tensor | None, new: list[Tensor]
) -> Attend:
    """Return attention that turns and stores the token itself; adds the whole cache to `new`."""

    def attend(layer: Attention, packed_G1M: Tensor, _: Tensor) -> Tensor:
        scale, table = layer.head_width**-0.5, table_SK2.to(packed_G1M.dtype)
        made: Sequence[Tensor] = attend_in_place(packed_G1M, *past, at_G, table, bias, scale)
        new.extend(made[1:])
        return made[0]

    return attend
