"""From a folder, a GGUF file or a hub id to a configuration and weights in fused parameters."""
