"""Who runs next, and in which blocks. No torch, no tokenizer."""
