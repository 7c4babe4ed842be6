"""What models are made of: linears, norms, rotary embedding."""
