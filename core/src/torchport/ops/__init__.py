"""Operations on nested structures of tensors, on one process and across processes."""
