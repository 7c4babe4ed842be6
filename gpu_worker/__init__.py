"""The worker: weights, KV blocks, and one step after another. The loop knows no model; a runner does the step."""
