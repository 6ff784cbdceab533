"""MR physics: k-space crops and zero-filling, image degradations, data consistency."""
