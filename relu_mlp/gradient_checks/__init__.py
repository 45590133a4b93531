"""`check_gradients`, which compares a derivation with autograd and with finite differences."""
