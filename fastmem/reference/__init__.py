"""References: each op in plain PyTorch, forward and closed-form backward, for any float dtype and any device."""
