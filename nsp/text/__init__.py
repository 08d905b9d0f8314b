"""How a prompt becomes numbers: `tokenizer` (no torch: engines use it) and `encoder` (torch)."""
