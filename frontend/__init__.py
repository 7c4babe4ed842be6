"""HTTP in, text out: tokenizing, the journal of each request, detokenizing. No torch."""
