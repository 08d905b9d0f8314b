"""CLIP's byte-pair encoding as a `tokenizers` pipeline.

The pipeline is the one transformers builds in `CLIPTokenizer.__init__`: NFC, single spaces,
lowercase, CLIP's word pattern, UTF-8 bytes, BPE with `</w>` at word ends, framed by a start and an
end token.

It is not taken from transformers, which needs 1.7 s to import, reads files of a folder that nobody
listed, and accepts an empty merges.txt and added tokens whose ids are not those it gives them.

This file runs in the deployment image: tokenizers, no torch.
"""

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing

BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
CLIP_TOKENS = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": EOS_TOKEN}
WORD_END = "</w>"
CLIP_MAX_TOKENS = 77

# https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py, `self.pat`
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def is_clip(tokenizer: Tokenizer) -> bool:
    """Return whether this is CLIP's kind of tokenizer: BPE that marks the ends of words."""
    return isinstance(tokenizer.model, BPE) and tokenizer.model.end_of_word_suffix == WORD_END


def clip_tokenizer(model: BPE) -> Tokenizer:
    """Return a tokenizer with `model` and CLIP's text rules; `frame_prompts` completes it."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def frame_prompts(tokenizer: Tokenizer, *, bos_token: str, eos_token: str) -> None:
    """Put a start and an end token, both in the vocabulary, around each prompt."""
    bos_id, eos_id = tokenizer.token_to_id(bos_token), tokenizer.token_to_id(eos_token)
    assert bos_id is not None
    assert eos_id is not None
    tokenizer.post_processor = RobertaProcessing(
        (eos_token, eos_id), (bos_token, bos_id), trim_offsets=False, add_prefix_space=False
    )
