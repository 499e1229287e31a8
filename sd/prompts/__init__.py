"""What a prompt can say beyond plain words: weights, alternatives in braces, arithmetic on embeddings."""
