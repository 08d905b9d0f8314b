"""The stages of the family `latent_gpt` as torch modules; axes as in stages.py."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsp.families.latent_gpt.model import Attend, Attention
from nsp.families.latent_gpt.system import LatentGptSystem
from nsp.layers.attention import KeyValue, attend_past
from nsp.layers.in_place import attend_in_place
from nsp.layers.logits import filter_by_rank
from nsp.raster.drawing import NUM_DRAW, DecoderStage, NucleusStage, draw, filter_where_asked
from nsp.raster.stages import needs_nucleus_stage
from nsp.text.encoder import TextEncoderStage


def build_stages(system: LatentGptSystem, kv_layout: str) -> Mapping[str, nn.Module]:
    """Return the stages of `system`, sharing its weights."""
    grid, found = system.config.grid, dict[str, nn.Module]()
    if system.text_encoder is not None:
        found["text_encoder"] = StatesStage(system)
        found["condition"] = ConditionStage(system)
    found["decode"] = DecodeStage(system, kv_layout)
    if needs_nucleus_stage(grid, kv_layout):
        found["nucleus"] = NucleusStage()
    found["decoder"] = DecoderStage(system.vq)
    return {name: stage.eval() for name, stage in found.items()}


class StatesStage(nn.Module):
    """Prompts -> CLIP's states; what it pools is not used."""

    def __init__(self, system: LatentGptSystem) -> None:
        super().__init__()
        assert system.text_encoder is not None
        self.encoder = TextEncoderStage(system.text_encoder)

    def forward(self, token_ids_NT: Tensor) -> tuple[Tensor]:
        """Return text_states."""
        return (self.encoder(token_ids_NT)[0],)


class ConditionStage(nn.Module):
    """Encoded prompts -> the text's keys and values of every row and block; row N is null."""

    def __init__(self, system: LatentGptSystem) -> None:
        super().__init__()
        self.gpt = system.gpt

    def forward(self, states_NTW: Tensor, prompts_G: Tensor) -> tuple[Tensor, ...]:
        """Return cross_k_0, cross_v_0, cross_k_1, ..."""
        pairs = self.gpt.read(torch.cat([states_NTW, self.gpt.null_context]))
        return tuple(each.index_select(0, prompts_G) for pair in pairs for each in pair)


class DecodeStage(nn.Module):
    """One token -> logits, the next code, its keys and values."""

    def __init__(self, system: LatentGptSystem, kv_layout: str) -> None:
        super().__init__()
        self.gpt, self.has_text = system.gpt, system.config.text is not None
        self.is_in_place = kv_layout == "in_place"
        self.keep = filter_where_asked if self.is_in_place else filter_by_rank

    def forward(self, token_G: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return logits, tokens, next, new_codes, guided, then new keys and values."""
        gpt, drawn, rest = self.gpt, inputs[:NUM_DRAW], inputs[NUM_DRAW:]
        position, num_text = drawn[0], 2 * len(gpt.blocks) if self.has_text else 0
        texts: list[KeyValue | None] = [*_pairs(rest[:num_text])] or [None] * len(gpt.blocks)
        past, new = rest[num_text:], list[Tensor]()
        # The beginning is at position 0, so the number of the next code is that of its token.
        if self.is_in_place:
            at_G = position.expand(token_G.shape[0])
            attends = [_attend_in_place(pair, at_G, new) for pair in _pairs(past)]
        else:
            at = torch.arange(past[0].shape[0], device=position.device)
            mask = torch.where(at < position, 0.0, -torch.inf)
            attends = [_attend_step(pair, mask, new) for pair in _pairs(past)]
        embedded = gpt.token_embedding(token_G) + gpt.position_embedding(position)
        logits = gpt.transformed(embedded[:, None], attends, texts)
        return logits, *draw(logits, *drawn, keep=self.keep), *new


def _pairs(tensors: tuple[Tensor, ...]) -> list[KeyValue]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _attend_step(past: KeyValue, mask: Tensor, new: list[Tensor]) -> Attend:
    """Return attention of one token over its past and itself; adds its key and value to `new`."""

    def attend(layer: Attention, packed_G1M: Tensor) -> Tensor:
        q, k, v = layer.heads(packed_G1M)
        new.extend([k.transpose(0, 1), v.transpose(0, 1)])
        return attend_past(q, k, v, past, mask, scale=q.shape[-1] ** -0.5).flatten(2)

    return attend


def _attend_in_place(past: KeyValue, at_G: Tensor, new: list[Tensor]) -> Attend:
    """Return attention that stores the token itself; adds the whole cache to `new`."""

    def attend(layer: Attention, packed_G1M: Tensor) -> Tensor:
        scale = past[0].shape[-1] ** -0.5
        made: Sequence[Tensor] = attend_in_place(packed_G1M, *past, at_G, None, None, scale)
        new.extend(made[1:])
        return made[0]

    return attend
