"""What runs inside a box: standard library only, bound into it read-only, never imported beside a model."""
