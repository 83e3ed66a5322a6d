"""What a user keeps and hands on: concept packs, written, checked, combined, exported, shared."""
