"""RLHF with credit assignment."""
