"""What people add to a model: small files that change its weights, its words, its U-Net's maps or its decoder."""
